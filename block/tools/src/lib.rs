//! `holdfast img`: making, looking into, converting and repairing disk images; `holdfast nbd`: exporting them; `holdfast io`:
//! reading and writing them by commands.
//!
//! Commands, options, exit codes and output are those of `qemu-img`, `qemu-nbd` and `qemu-io`, whose names work too.

mod amend;
mod bench;
mod bitmap;
mod check;
mod commit;
mod common;
mod compare;
mod convert;
mod copy;
mod create;
mod dd;
mod info;
mod io;
mod map;
mod measure;
mod nbd;
mod rebase;
mod resize;
mod snapshot;

use std::ffi::OsString;

use clap::{Parser, Subcommand};

pub use common::ImgError;

#[derive(Debug, Parser)]
#[command(
    about = "Make, inspect, convert and repair disk images",
    version,
    subcommand_required = true,
    arg_required_else_help = true
)]
struct Cli {
    /// Make an object that other options name, such as `secret,id=ID,file=FILE`
    #[arg(long = "object", global = true, value_name = "TYPE,id=ID,...")]
    objects: Vec<String>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Change format-specific options of an image
    Amend(amend::Args),
    /// Measure the speed of requests to an image
    Bench(bench::Args),
    /// Change the persistent bitmaps of an image
    Bitmap(bitmap::Args),
    /// Check an image, and repair it
    Check(check::Args),
    /// Write an image's changes to its backing file
    Commit(commit::Args),
    /// Compare the contents of two images
    Compare(compare::Args),
    /// Copy an image to another, of another format if wanted
    Convert(convert::Args),
    /// Make an image
    Create(create::Args),
    /// Copy blocks of an image to another
    Dd(dd::Args),
    /// Say what an image is
    Info(info::Args),
    /// Say where an image's data is
    Map(map::Args),
    /// Calculate how large a new image will be
    Measure(measure::Args),
    /// Change the backing file of an image
    Rebase(rebase::Args),
    /// Change the size of an image
    Resize(resize::Args),
    /// List, make, apply and delete snapshots within an image
    Snapshot(snapshot::Args),
}

/// The command line, for help and completions. `name` is how the program is called.
pub fn command(name: &'static str) -> clap::Command {
    <Cli as clap::CommandFactory>::command().name(name)
}

/// The command line of `holdfast nbd`, for help and completions.
pub fn nbd_command(name: &'static str) -> clap::Command {
    <nbd::Args as clap::CommandFactory>::command().name(name)
}

/// The command line of `holdfast io`, for help and completions.
pub fn io_command(name: &'static str) -> clap::Command {
    <io::Args as clap::CommandFactory>::command().name(name)
}

/// Reads a command line whose first word is the program's name. Help and mistakes are printed here; the error is the
/// exit status.
fn parse<A: Parser>(args: impl IntoIterator<Item = OsString>, name: &'static str) -> Result<A, u8> {
    let matches = A::command().name(name).bin_name(name).try_get_matches_from(args);
    matches.and_then(|m| A::from_arg_matches(&m)).map_err(|error| {
        // Help goes to standard output, the rest to standard error.
        let _ = error.print();
        u8::from(error.use_stderr())
    })
}

/// Runs a command line whose first word is the program's name. Returns the exit status.
///
/// Names that end with `nbd` or `io` call the server and the tester of images.
pub fn main(args: impl IntoIterator<Item = OsString>, name: &'static str) -> u8 {
    if name.ends_with("nbd") {
        return nbd::main(args, name);
    }
    if name.ends_with("io") {
        return io::main(args, name);
    }
    let cli: Cli = match parse(args, name) {
        Ok(cli) => cli,
        Err(status) => return status,
    };
    let result = common::make_objects(&cli.objects).and_then(|()| run(cli.command, name));
    match result {
        Ok(status) => status,
        Err(error) => {
            eprintln!("{name}: {error}");
            error.status()
        }
    }
}

fn run(command: Command, name: &str) -> common::Result<u8> {
    match command {
        Command::Amend(args) => amend::run(&args),
        Command::Bench(args) => bench::run(&args),
        Command::Bitmap(args) => bitmap::run(&args),
        Command::Check(args) => check::run(&args, name),
        Command::Commit(args) => commit::run(&args),
        Command::Compare(args) => compare::run(&args),
        Command::Convert(args) => convert::run(&args),
        Command::Create(args) => create::run(&args),
        Command::Dd(args) => dd::run(&args),
        Command::Info(args) => info::run(&args),
        Command::Map(args) => map::run(&args),
        Command::Measure(args) => measure::run(&args),
        Command::Rebase(args) => rebase::run(&args),
        Command::Resize(args) => resize::run(&args),
        Command::Snapshot(args) => snapshot::run(&args),
    }
}
