//! `holdfast io`: reads, writes and looks at images by commands, for tests. Commands and their output are those of `qemu-io`,
//! whose name works too.

mod commands;
mod flight;
mod parse;

use std::ffi::OsString;
use std::io::{BufRead, Write};

use clap::Parser;

use crate::common::{make_objects, refused};
use commands::{Next, Session};

/// Arguments.
#[derive(Debug, Parser)]
#[command(about = "Read and write disk images by commands", version)]
pub(crate) struct Args {
    /// Carry out a command
    #[arg(short, long = "cmd")]
    cmd: Vec<String>,
    /// Format of the image; found out if absent
    #[arg(short, long)]
    format: Option<String>,
    /// Open it for reading only
    #[arg(short, long)]
    read_only: bool,
    /// Write to a temporary file over the image, which is not changed
    #[arg(short, long)]
    snapshot: bool,
    /// Bypass the host's page cache
    #[arg(short, long)]
    nocache: bool,
    /// Keep in the image what is read from its backing file
    #[arg(short = 'C', long)]
    copy_on_read: bool,
    /// Use memory that is not aligned as direct I/O needs it
    #[arg(short, long)]
    misalign: bool,
    /// Linux AIO, as with --aio=native
    #[arg(short = 'k', long)]
    native_aio: bool,
    /// How aio_ commands are carried out: threads or io_uring
    #[arg(short = 'i', long)]
    aio: Option<String>,
    /// Cache mode
    #[arg(short = 't', long)]
    cache: Option<String>,
    /// What becomes of discards
    #[arg(short, long, value_parser = ["ignore", "off", "unmap", "on"], default_value = "ignore")]
    discard: String,
    /// Others may be writing it
    #[arg(short = 'U', long)]
    force_share: bool,
    /// Make an object that other options name
    #[arg(long = "object", value_name = "TYPE,id=ID,...")]
    objects: Vec<String>,
    /// The image is given by options
    #[arg(long)]
    image_opts: bool,
    /// The image
    filename: Option<String>,
}

/// Runs a command line whose first word is the program's name. Returns the exit status.
pub(crate) fn main(args: impl IntoIterator<Item = OsString>, name: &'static str) -> u8 {
    let args: Args = match crate::parse(args, name) {
        Ok(args) => args,
        Err(status) => return status,
    };
    let mut session = Session::default();
    let opened = make_objects(&args.objects).and_then(|()| {
        if args.image_opts && args.format.is_some() {
            return refused("--image-opts and -f are mutually exclusive");
        }
        match &args.filename {
            Some(file) => session.open(file, &args),
            None => Ok(()),
        }
    });
    if let Err(error) = opened {
        eprintln!("{name}: {error}");
        return 1;
    }
    if args.cmd.is_empty() {
        interactive(&mut session);
    } else {
        for command in &args.cmd {
            if session.run(command) == Next::Quit {
                break;
            }
        }
    }
    session.close();
    u8::from(session.failed)
}

/// Commands from standard input.
fn interactive(session: &mut Session) {
    let input = std::io::stdin();
    let mut lines = input.lock().lines();
    loop {
        print!("qemu-io> ");
        let _ = std::io::stdout().flush();
        let Some(Ok(line)) = lines.next() else { break };
        if session.run(&line) == Next::Quit {
            break;
        }
    }
}
