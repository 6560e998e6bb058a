//! The command line: `holdfast run`, `holdfast ctl` and what is generated from their options.

mod back_end;
mod ctl;
mod options;
mod run;

#[cfg(test)]
mod tests;

use std::ffi::OsString;
use std::path::Path;

use clap::{Arg, ArgAction, ArgMatches, Command};

pub use back_end::BackEndOptions;
pub use ctl::Ctl;
pub use holdfast_sandbox::SeccompMode;
pub use run::{Endpoint, ObjectTexts, QmpAddress, RunOptions};

/// The name under which Cloud Hypervisor's command line is served.
const CH_NAME: &str = "cloud-hypervisor";
/// The names under which the image tools are served to QEMU's users.
const TOOL_NAMES: [&str; 3] = ["qemu-img", "qemu-nbd", "qemu-io"];
/// Their commands here, and what they call themselves.
const TOOL_COMMANDS: [(&str, &str); 3] =
    [("img", "holdfast img"), ("nbd", "holdfast nbd"), ("io", "holdfast io")];
/// First line of `cloud-hypervisor --version`: libvirt derives capabilities from the number.
const CH_VERSION: &str = concat!("v54.0.0\nHoldfast ", env!("CARGO_PKG_VERSION"));

/// What the process was started for.
#[derive(Debug)]
pub enum Invocation {
    /// Run a VM.
    Run(Box<RunOptions>),
    /// Serve a device to other processes.
    BackEnd(Box<BackEndOptions>),
    /// Talk to a running one.
    Ctl(Ctl),
    /// Work on disk images: the arguments, the first of which is the program's name.
    Img(Vec<OsString>, &'static str),
    /// Print this text.
    Print(String),
    /// Write man pages into a directory.
    Man(std::path::PathBuf),
    /// Print a shell's completion script.
    Completions(clap_complete::Shell),
}

/// An option that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CliError {
    /// Its value cannot be read.
    #[error("--{option}")]
    Value {
        /// Name of the option.
        option: String,
        /// What is wrong with which key.
        #[source]
        source: holdfast_keyval::Error,
    },
    /// Its value makes no sense.
    #[error("--{option} `{value}`: {reason}")]
    Text {
        /// Name of the option.
        option: String,
        /// Value as given.
        value: String,
        /// What would be right.
        reason: String,
    },
    /// A Cloud Hypervisor feature that Holdfast does not have.
    #[error("--{option} is a Cloud Hypervisor option that is not supported by this version of Holdfast")]
    UnsupportedOption {
        /// Name of the option.
        option: String,
    },
    /// A sub-key of a Cloud Hypervisor feature that Holdfast does not have.
    #[error(
        "--{option}: key `{key}` is a Cloud Hypervisor key that is not supported by this version of Holdfast"
    )]
    UnsupportedKey {
        /// Name of the option.
        option: String,
        /// The key.
        key: String,
    },
    /// The options do not fit together.
    #[error("{0}")]
    Together(String),
    /// The configuration that they make is not valid.
    #[error("the options make no valid VM")]
    Config(#[source] holdfast_config::ConfigError),
    /// Usage, as clap reports it (also `--help` and `--version`).
    #[error("{0}")]
    Usage(clap::Error),
}

/// Reads the command line.
///
/// # Errors
/// [`CliError`], which names the option, the value and what would be right.
pub fn parse(args: impl IntoIterator<Item = OsString>) -> Result<Invocation, CliError> {
    let args: Vec<OsString> = args.into_iter().collect();
    let named = args.first().map(Path::new).and_then(Path::file_name);
    if let Some(name) = TOOL_NAMES.into_iter().find(|tool| named.is_some_and(|name| name == *tool)) {
        return Ok(Invocation::Img(args, name));
    }
    // The image tools read their own arguments, so that errors and exit statuses are the ones that their users know.
    let tool = TOOL_COMMANDS.into_iter().find(|(word, _)| args.get(1).is_some_and(|first| first == word));
    if let Some((_, name)) = tool {
        return Ok(Invocation::Img(args.into_iter().skip(1).collect(), name));
    }
    // The texts come from the schemas, which are worth generating only if somebody reads them.
    let verbose = args
        .iter()
        .skip(1)
        .any(|arg| matches!(arg.to_str(), Some("--help" | "-h" | "help" | "man" | "completions")));
    if named.is_some_and(|name| name == CH_NAME) {
        let command =
            options::run_command(CH_NAME, verbose).version(CH_VERSION).disable_help_subcommand(true);
        let matches = command.try_get_matches_from(args).map_err(CliError::Usage)?;
        return run::read(&matches).map(|run| Invocation::Run(Box::new(run)));
    }
    let matches = command(verbose).try_get_matches_from(args).map_err(CliError::Usage)?;
    dispatch(&matches)
}

fn dispatch(matches: &ArgMatches) -> Result<Invocation, CliError> {
    match matches.subcommand() {
        Some(("run", run)) => Ok(Invocation::Run(Box::new(run::read(run)?))),
        Some((name @ ("blk-backend" | "net-backend"), matches)) => {
            Ok(Invocation::BackEnd(Box::new(back_end::read(name, matches)?)))
        }
        Some(("ctl", ctl)) => Ok(Invocation::Ctl(ctl::read(ctl)?)),
        Some(("openapi", _)) => Ok(Invocation::Print(crate::http::openapi::text())),
        Some(("man", man)) => {
            let directory = man.get_one::<std::path::PathBuf>("directory").cloned().unwrap_or_default();
            Ok(Invocation::Man(directory))
        }
        Some(("completions", completions)) => {
            let shell = completions.get_one("shell").copied().unwrap_or(clap_complete::Shell::Bash);
            Ok(Invocation::Completions(shell))
        }
        _ => Err(CliError::Together(
            "no command; `holdfast run --help` and `holdfast ctl --help` say more".into(),
        )),
    }
}

/// The whole command line. `verbose` adds the texts that come from the config types.
pub fn command(verbose: bool) -> Command {
    Command::new("holdfast")
        .about("Runs virtual machines on KVM or by translation")
        .version(env!("CARGO_PKG_VERSION"))
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(options::run_command("run", verbose))
        .subcommand(ctl::command(verbose))
        .subcommands(back_end::commands(verbose))
        .subcommand(holdfast_img::command("img"))
        .subcommand(holdfast_img::nbd_command("nbd"))
        .subcommand(holdfast_img::io_command("io"))
        .subcommand(
            Command::new("man").about("Write man pages").hide(true).arg(
                Arg::new("directory")
                    .value_parser(clap::value_parser!(std::path::PathBuf))
                    .default_value(".")
                    .action(ArgAction::Set)
                    .help("Where to write them"),
            ),
        )
        .subcommand(
            Command::new("completions").about("Print a completion script").hide(true).arg(
                Arg::new("shell")
                    .value_parser(clap::value_parser!(clap_complete::Shell))
                    .required(true)
                    .help("The shell"),
            ),
        )
        .subcommand(Command::new("openapi").about("Print the OpenAPI description of the REST API").hide(true))
}
