//! `holdfast blk-backend` and `holdfast net-backend`.

use std::path::PathBuf;

use clap::{Arg, ArgMatches, Command};
use holdfast_config::{BlkBackEndConfig, LandlockConfig, NetBackEndConfig};
use holdfast_keyval::Key;
use holdfast_vmm::back_end::BackEndConfig;

use super::options::{long_help, shared};
use super::run::{ObjectTexts, blockdevs, landlock, read_keys, seccomp, text};
use super::{CliError, SeccompMode};

/// What a back end was asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackEndOptions {
    /// What it serves.
    pub config: BackEndConfig,
    /// Secrets and the like that nodes name.
    pub objects: ObjectTexts,
    /// Where the log is written.
    pub log_file: Option<PathBuf>,
    /// How much is logged.
    pub verbosity: u8,
    /// The process opens only what the config names, and this.
    pub landlock: Option<Vec<LandlockConfig>>,
    /// System-call filters.
    pub seccomp: SeccompMode,
}

const COMMON: [&str; 5] = ["log-file", "verbose", "seccomp", "landlock", "landlock-rules"];

fn command(name: &'static str, about: &'static str, keys: fn() -> Vec<Key>, verbose: bool) -> Command {
    let config = Arg::new("config").value_name("key=value,...").required(true);
    let help = "What is served, and where";
    let config = if verbose { config.long_help(long_help(help, &keys())) } else { config.help(help) };
    Command::new(name).about(about).arg(config).args(shared(&COMMON, verbose))
}

/// The commands. `verbose` adds the keys to the long help.
pub(super) fn commands(verbose: bool) -> [Command; 2] {
    let disk = "Serve a disk to VMs of other processes by vhost-user";
    let tap = "Serve a tap to VMs of other processes by vhost-user";
    [
        command("blk-backend", disk, holdfast_keyval::keys::<BlkBackEndConfig>, verbose)
            .after_help("On SIGHUP it looks at the image's size again and tells the guest.")
            .args(shared(&["blockdev", "object"], verbose)),
        command("net-backend", tap, holdfast_keyval::keys::<NetBackEndConfig>, verbose),
    ]
}

pub(super) fn read(name: &str, matches: &ArgMatches) -> Result<BackEndOptions, CliError> {
    let value = text(matches, "config").unwrap_or_default();
    let (config, problems, objects) = if name == "net-backend" {
        let config: NetBackEndConfig = read_keys(name, value)?;
        let problems = config.validate();
        (BackEndConfig::Net(config), problems, Vec::new())
    } else {
        let config: BlkBackEndConfig = read_keys(name, value)?;
        let problems = config.validate();
        let nodes = blockdevs(matches)?.unwrap_or_default();
        let objects = matches.get_many::<String>("object").into_iter().flatten().cloned().collect();
        (BackEndConfig::Disk(config, nodes), problems, objects)
    };
    if let Some(problem) = problems.into_iter().next() {
        return Err(CliError::Together(format!("{name}: {problem}")));
    }
    Ok(BackEndOptions {
        config,
        objects: ObjectTexts(objects),
        log_file: text(matches, "log-file").map(PathBuf::from),
        verbosity: matches.get_count("verbose"),
        landlock: landlock(matches)?,
        seccomp: seccomp(matches)?,
    })
}
