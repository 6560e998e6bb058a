//! Which paths a VM needs: Landlock's rules from the config.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use holdfast_config::VmConfig;
use holdfast_sandbox::{PathRule, Sandbox, SandboxError};

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

/// If the config asks for Landlock, lets this thread and those that it starts open only what the config
/// names. `restore_from` is the directory of the snapshot that is being restored.
///
/// # Errors
/// [`SandboxError`] if the kernel has no Landlock.
pub fn limit_paths(
    sandbox: &Sandbox,
    config: &VmConfig,
    restore_from: Option<&Path>,
) -> Result<(), SandboxError> {
    if !config.landlock_enable {
        return Ok(());
    }
    sandbox.limit_paths(rules(config, restore_from))
}

/// The rules for `config`, a path at most once.
fn rules(config: &VmConfig, restore_from: Option<&Path>) -> Vec<PathRule> {
    let mut rules = Rules::default();
    for path in READ {
        rules.existing(Path::new(path), false);
    }
    for path in WRITE {
        rules.existing(Path::new(path), true);
    }
    if let Some(payload) = &config.payload {
        for path in [&payload.kernel, &payload.firmware, &payload.initramfs].into_iter().flatten() {
            rules.existing(path, false);
        }
    }
    for disk in config.disks() {
        if let Some(path) = &disk.path {
            rules.existing(path, !disk.readonly);
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
    for path in outputs.into_iter().flatten() {
        rules.made(path);
    }
    if config.perf_map {
        rules.existing(Path::new("/tmp"), true);
    }
    if let Some(directory) = restore_from {
        rules.existing(directory, false);
    }
    for rule in config.landlock_rules.iter().flatten() {
        rules.existing(&rule.path, rule.access.contains('w'));
    }
    rules.0.into_iter().map(|(path, write)| PathRule::new(path, write)).collect()
}

/// Paths, and whether they are written.
#[derive(Default)]
struct Rules(BTreeMap<PathBuf, bool>);

impl Rules {
    /// A path that is opened. One that does not exist is left to whoever opens it to complain of.
    fn existing(&mut self, path: &Path, write: bool) {
        if path.exists() {
            *self.0.entry(path.to_owned()).or_default() |= write;
        }
    }

    /// A file or socket that is created: the directory that it is made in.
    fn made(&mut self, path: &Path) {
        match path.parent() {
            Some(parent) if parent != Path::new("") => self.existing(parent, true),
            _ => self.existing(Path::new("."), true),
        }
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
