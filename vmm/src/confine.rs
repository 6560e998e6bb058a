//! Which paths a VM needs: Landlock's rules from the config.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_arch::x86_64::boot::module_list;
use holdfast_block::graph::referenced_files;
use holdfast_block::options::{BlockdevOptions, NodeRef};
use holdfast_config::{LandlockConfig, VhostMode, VmConfig};
use holdfast_sandbox::{PathAccess, PathRule, Sandbox, SandboxError};
use holdfast_threads::PlainSpawner;

use crate::snapshot::SnapshotDir;

/// Paths that are read wherever they exist: default firmware, devices, what the C library asks for.
const READ: [&str; 7] = [
    "/usr/lib/riscv64-linux-gnu/opensbi",
    "/usr/share/qemu",
    "/usr/share/seabios",
    "/dev/urandom",
    "/proc/self",
    "/sys/devices/system/cpu",
    "/sys/kernel/mm",
];

/// Devices that are opened for writing where they exist.
const WRITE: [&str; 6] = ["/dev/kvm", "/dev/net/tun", "/dev/ptmx", "/dev/pts", "/dev/null", "/dev/shm"];

/// A VM that may not be made, because Landlock keeps the process from what it needs.
#[derive(Debug, thiserror::Error)]
#[error(
    "Landlock keeps this process to the paths that it was started with or that its first VM named, and `{path}` is \
     not among them for {access}; name it in --landlock-rules at the start, or use a new process"
)]
pub struct OutOfReach {
    /// The path.
    path: PathBuf,
    /// `reading` or `writing`.
    access: &'static str,
}

impl OutOfReach {
    fn of(rule: &PathRule) -> Self {
        let access = if rule.access.write { "writing" } else { "reading" };
        Self { path: rule.path.clone(), access }
    }
}

/// If the config asks for Landlock, lets this thread and those that it starts open only what the config
/// names; if the process is limited already, that stays. `restore_from` is the directory of the snapshot that is
/// being restored.
///
/// # Errors
/// [`SandboxError`] if the kernel has no Landlock.
pub fn limit_paths(
    sandbox: &Sandbox,
    config: &VmConfig,
    restore_from: Option<&Path>,
) -> Result<(), SandboxError> {
    if !config.landlock_enable || sandbox.is_limited() {
        return Ok(());
    }
    sandbox.limit_paths(rules(config, restore_from))
}

/// Checks that a process that is limited already may open what `config` names.
///
/// # Errors
/// [`OutOfReach`] for the first path that it may not.
pub fn check(sandbox: &Sandbox, config: &VmConfig, restore_from: Option<&Path>) -> Result<(), OutOfReach> {
    match named(config, restore_from).into_rules().iter().find(|rule| !sandbox.permits(rule)) {
        Some(rule) => Err(OutOfReach::of(rule)),
        None => Ok(()),
    }
}

/// Checks that a process that is limited already may write files in `directory`.
///
/// # Errors
/// [`OutOfReach`].
pub fn check_output(sandbox: &Sandbox, directory: &Path) -> Result<(), OutOfReach> {
    let rule = PathRule::new(directory, true);
    if sandbox.permits(&rule) { Ok(()) } else { Err(OutOfReach::of(&rule)) }
}

/// Limits the whole process, if called on its main thread before there are others (`--landlock`): to what `config`
/// names, or what the snapshot in `restore_from` names, and to `more`. Files may be removed from the directories of
/// `sockets`.
///
/// # Errors
/// [`SandboxError`] if the kernel has no Landlock.
pub fn limit_process(
    sandbox: &Sandbox,
    config: Option<&VmConfig>,
    restore_from: Option<&Path>,
    more: &[LandlockConfig],
    sockets: &[PathBuf],
) -> Result<(), SandboxError> {
    // A snapshot that cannot be read is complained of by whoever restores it.
    let saved = restore_from.and_then(|path| SnapshotDir::open(path).ok()?.config().ok());
    let none = VmConfig::default();
    let mut all = rules(config.or(saved.as_ref()).unwrap_or(&none), restore_from);
    let mut extra = Rules::default();
    extra.granted(more);
    all.extend(extra.into_rules());
    all.extend(sockets.iter().map(PathRule::removing));
    sandbox.limit_paths(all)
}

/// The rules for `config`.
fn rules(config: &VmConfig, restore_from: Option<&Path>) -> Vec<PathRule> {
    let mut rules = named(config, restore_from);
    for path in READ {
        rules.existing(Path::new(path), false);
    }
    for path in WRITE {
        rules.existing(Path::new(path), true);
    }
    rules.granted(config.landlock_rules.as_deref().unwrap_or_default());
    rules.into_rules()
}

/// What the config itself names.
fn named(config: &VmConfig, restore_from: Option<&Path>) -> Rules {
    let mut rules = Rules::default();
    if let Some(payload) = &config.payload {
        for path in [&payload.kernel, &payload.firmware, &payload.initramfs].into_iter().flatten() {
            rules.existing(path, false);
        }
        // A Multiboot image takes a list.
        for (path, _) in payload.initramfs.iter().flat_map(|list| module_list(list)) {
            rules.existing(&path, false);
        }
    }
    for flash in config.pflash() {
        rules.existing(&flash.path, !flash.readonly);
    }
    for disk in config.disks() {
        if let Some(path) = &disk.path {
            rules.existing(path, !disk.readonly);
            // What cannot be read is reported when the disk is made.
            let files = disk.backing_files.then(|| referenced_files(path, &PlainSpawner::shared()));
            for (file, write) in files.and_then(Result::ok).into_iter().flatten() {
                rules.existing(&file, write && !disk.readonly);
            }
        }
    }
    for net in config.net().iter().filter(|net| net.vhost_user && net.vhost_mode == VhostMode::Server) {
        rules.made(Path::new(net.vhost_socket.as_deref().unwrap_or_default()));
    }
    if config.net().iter().any(|net| net.vhost && net.vhostfds.is_none()) {
        rules.existing(Path::new("/dev/vhost-net"), true);
    }
    match &config.vsock {
        Some(vsock) if vsock.vhost && vsock.vhostfd.is_none() => {
            rules.existing(Path::new("/dev/vhost-vsock"), true);
        }
        Some(vsock) if !vsock.vhost && !vsock.vhost_user => rules.made(&vsock.socket),
        _ => {}
    }
    for options in config.blockdevs() {
        for (path, write) in files_of(options) {
            rules.existing(&path, write);
        }
    }
    rules.existing(&config.rng.src, false);
    let outputs = [
        &config.serial.file,
        &config.serial.socket,
        &config.console.file,
        &config.console.socket,
        &config.debug_console.file,
    ];
    let ports = config.console_ports().iter().flat_map(|port| [&port.file, &port.socket]);
    for path in outputs.into_iter().chain(ports).flatten() {
        rules.made(path);
    }
    if let Some(log) = &config.tcg_log {
        rules.made(&log.file);
    }
    if config.perf_map {
        rules.existing(Path::new("/tmp"), true);
    }
    if let Some(directory) = restore_from {
        rules.existing(directory, false);
    }
    rules
}

/// Files that the options of a node name, and whether they are written.
pub(crate) fn files_of(options: &BlockdevOptions) -> Vec<(PathBuf, bool)> {
    let write = options.read_only != Some(true);
    let mut files = Vec::new();
    if let Some(name) = &options.filename {
        files.push((PathBuf::from(name.strip_prefix("file:").unwrap_or(name)), write));
    }
    let below = [
        (&options.file, write),
        (&options.data_file, write),
        (&options.header, write),
        (&options.backing, false),
    ];
    for (node, write) in below {
        if let Some(NodeRef::Node(node)) = node {
            files.extend(files_of(node).into_iter().map(|(path, w)| (path, w && write)));
        }
    }
    files
}

/// Paths, each once, and what is done with them.
#[derive(Default)]
struct Rules(BTreeMap<PathBuf, PathAccess>);

impl Rules {
    /// A path that is opened. One that does not exist is left to whoever opens it to complain of.
    fn existing(&mut self, path: &Path, write: bool) {
        self.add(path, PathAccess { read: true, write, remove: false });
    }

    fn add(&mut self, path: &Path, access: PathAccess) {
        if path.exists() {
            let all = self.0.entry(path.to_owned()).or_default();
            *all = all.or(access);
        }
    }

    /// A file or socket that is created: the directory that it is made in.
    fn made(&mut self, path: &Path) {
        match path.parent() {
            Some(parent) if parent != Path::new("") => self.existing(parent, true),
            _ => self.existing(Path::new("."), true),
        }
    }

    /// What `--landlock-rules` grant; their access was checked when the config
    /// was. That they exist is not, so that Landlock complains if they do not.
    fn granted(&mut self, more: &[LandlockConfig]) {
        for rule in more {
            let all = self.0.entry(rule.path.clone()).or_default();
            *all = all.or(rule.access.parse().unwrap_or_default());
        }
    }

    fn into_rules(self) -> Vec<PathRule> {
        self.0.into_iter().map(|(path, access)| PathRule { path, access }).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rules_name_what_the_config_names() {
        let dir = tempfile::tempdir().expect("directory");
        let disk = dir.path().join("disk");
        std::fs::write(&disk, "x").expect("file");
        let json = serde_json::json!({
            "disks": [{ "path": disk, "readonly": true }],
            "serial": { "mode": "File", "file": dir.path().join("out") },
        });
        let config = VmConfig::from_json(json.to_string().as_bytes()).expect("valid");
        let rules = rules(&config, None);
        assert!(rules.contains(&PathRule::new(&disk, false)));
        assert!(rules.contains(&PathRule::new(dir.path(), true)), "the directory of a file that is made");
        assert!(!rules.iter().any(|r| r.path == Path::new("/etc")));
    }
}
