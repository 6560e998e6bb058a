//! Snapshot and restore.
//!
//! A snapshot is a directory with three files, named as Cloud Hypervisor names them: `config.json` (the
//! `VmConfig`), `state.json` (vCPUs, devices, clock: [`SavedVm`]) and `memory-ranges` (RAM, sparse). None
//! of them names an accelerator. A snapshot is written to temporary names and renamed when it is
//! complete, `state.json` last: a directory without it is no snapshot.

pub mod helpers;
pub mod ram;

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use holdfast_arch::{Arch, CpuState};
use holdfast_config::VmConfig;
use holdfast_device::DeviceState;
use serde::{Deserialize, Serialize};

pub use helpers::HelperState;

/// The newest version of the layout of [`SavedVm`] itself; devices have their own.
const VERSION: u32 = 2;
/// The version of what has no helpers.
const PLAIN: u32 = 1;

const CONFIG: &str = "config.json";
const STATE: &str = "state.json";
const RAM: &str = "memory-ranges";

/// Everything of a paused VM but its RAM and config.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct SavedVm {
    /// Layout version: 1, or 2 with helpers, so that nobody loads it who does not know of them.
    pub version: u32,
    /// Guest architecture.
    pub arch: Arch,
    /// Machine name.
    pub machine: String,
    /// Guest-virtual time in nanoseconds.
    pub clock: u64,
    /// RAM: guest-physical start and length of each range, in file order.
    pub ram: Vec<(u64, u64)>,
    /// vCPUs by index.
    pub vcpus: Vec<CpuState>,
    /// Devices by id, in the order in which they are restored.
    pub devices: Vec<(String, DeviceState)>,
    /// What the accelerator keeps for the whole VM, under names of architectural things.
    #[serde(default)]
    pub platform: serde_json::Value,
    /// Helpers on a D-Bus bus (`dbus-vmstate`).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub helpers: Vec<HelperState>,
}

/// A snapshot that cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum SnapshotError {
    /// The destination is no directory.
    #[error("`{0}` is not an existing directory")]
    NoDirectory(PathBuf),
    /// A file cannot be written or read.
    #[error("snapshot file `{path}`")]
    File {
        /// Which.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file does not parse.
    #[error("snapshot file `{path}` does not parse")]
    Parse {
        /// Which.
        path: PathBuf,
        /// What is wrong.
        #[source]
        source: serde_json::Error,
    },
    /// It was written by a newer version.
    #[error("snapshot version {0} is newer than {VERSION}, the newest known")]
    Version(u32),
}

impl SavedVm {
    /// A saved VM in the current layout.
    pub fn new(arch: Arch, machine: &str, clock: u64) -> Self {
        Self {
            version: PLAIN,
            arch,
            machine: machine.to_owned(),
            clock,
            ram: Vec::new(),
            vcpus: Vec::new(),
            devices: Vec::new(),
            platform: serde_json::Value::Null,
            helpers: Vec::new(),
        }
    }

    /// Fails if a newer version wrote it.
    ///
    /// # Errors
    /// [`SnapshotError::Version`].
    pub fn check_version(&self) -> Result<(), SnapshotError> {
        if self.version > VERSION { Err(SnapshotError::Version(self.version)) } else { Ok(()) }
    }
}

/// A snapshot's directory.
#[derive(Debug, Clone)]
pub struct SnapshotDir(PathBuf);

impl SnapshotDir {
    /// The snapshot in, or to be written to, `path`.
    ///
    /// # Errors
    /// [`SnapshotError::NoDirectory`].
    pub fn open(path: &Path) -> Result<Self, SnapshotError> {
        if path.is_dir() {
            Ok(Self(path.to_owned()))
        } else {
            Err(SnapshotError::NoDirectory(path.to_owned()))
        }
    }

    fn error(&self, name: &str) -> impl FnOnce(io::Error) -> SnapshotError + use<> {
        let path = self.0.join(name);
        move |source| SnapshotError::File { path, source }
    }

    /// Writes everything. `write_ram` fills the file it is given.
    ///
    /// # Errors
    /// [`SnapshotError`]; an earlier snapshot in the directory is still whole then.
    pub fn write(
        &self,
        config: &VmConfig,
        state: &SavedVm,
        write_ram: impl FnOnce(&File) -> io::Result<u64>,
    ) -> Result<(), SnapshotError> {
        let result = self.write_parts(config, state, write_ram);
        if result.is_err() {
            for name in [CONFIG, STATE, RAM] {
                // What cannot be removed was not written, or is harmless without state.json.
                let _ = fs::remove_file(self.temporary(name));
            }
        }
        result
    }

    fn temporary(&self, name: &str) -> PathBuf {
        self.0.join(format!("{name}.tmp"))
    }

    fn write_parts(
        &self,
        config: &VmConfig,
        state: &SavedVm,
        write_ram: impl FnOnce(&File) -> io::Result<u64>,
    ) -> Result<(), SnapshotError> {
        let ram =
            File::options().read(true).write(true).create(true).truncate(true).open(self.temporary(RAM));
        let ram = ram.map_err(self.error(RAM))?;
        write_ram(&ram).and_then(|_| ram.sync_all()).map_err(self.error(RAM))?;
        self.write_json(CONFIG, config)?;
        self.write_json(STATE, state)?;
        // From here on a crash leaves no snapshot rather than a mixture of two.
        match fs::remove_file(self.0.join(STATE)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(self.error(STATE)(e)),
            _ => {}
        }
        for name in [RAM, CONFIG, STATE] {
            fs::rename(self.temporary(name), self.0.join(name)).map_err(self.error(name))?;
        }
        Ok(())
    }

    fn write_json(&self, name: &str, value: &impl Serialize) -> Result<(), SnapshotError> {
        let parse = |source| SnapshotError::Parse { path: self.0.join(name), source };
        let text = serde_json::to_vec(value).map_err(parse)?;
        let write = || {
            let mut file = File::create(self.temporary(name))?;
            io::Write::write_all(&mut file, &text)?;
            file.sync_all()
        };
        write().map_err(self.error(name))
    }

    fn read_json<T: for<'a> Deserialize<'a>>(&self, name: &str) -> Result<T, SnapshotError> {
        let text = fs::read(self.0.join(name)).map_err(self.error(name))?;
        serde_json::from_slice(&text)
            .map_err(|source| SnapshotError::Parse { path: self.0.join(name), source })
    }

    /// The saved config.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn config(&self) -> Result<VmConfig, SnapshotError> {
        self.read_json(CONFIG)
    }

    /// The saved state.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn state(&self) -> Result<SavedVm, SnapshotError> {
        let state: SavedVm = self.read_json(STATE)?;
        state.check_version().map(|()| state)
    }

    /// The saved RAM.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn ram(&self) -> Result<File, SnapshotError> {
        File::open(self.0.join(RAM)).map_err(self.error(RAM))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_snapshot_that_fails_leaves_the_earlier_one_whole() {
        let temp = tempfile::tempdir().expect("directory");
        let dir = SnapshotDir::open(temp.path()).expect("directory");
        let state = SavedVm::new(Arch::Riscv64, "virt", 7);
        dir.write(&VmConfig::default(), &state, |_| Ok(0)).expect("complete");
        assert_eq!(dir.state().expect("there"), state);
        let full = |_: &File| Err(io::Error::from_raw_os_error(libc::ENOSPC));
        dir.write(&VmConfig::default(), &state, full).expect_err("disk full");
        assert_eq!(dir.state().expect("the earlier one is whole"), state);
        let left: Vec<_> =
            fs::read_dir(temp.path()).expect("list").flatten().map(|e| e.file_name()).collect();
        assert!(!left.iter().any(|n| n.to_string_lossy().ends_with(".tmp")), "{left:?}");
    }

    #[test]
    fn a_newer_version_is_refused() {
        let temp = tempfile::tempdir().expect("directory");
        let dir = SnapshotDir::open(temp.path()).expect("directory");
        let state = SavedVm { version: VERSION + 1, ..SavedVm::new(Arch::Riscv64, "virt", 7) };
        dir.write(&VmConfig::default(), &state, |_| Ok(0)).expect("written");
        assert!(matches!(dir.state(), Err(SnapshotError::Version(3))));
        assert!(SnapshotDir::open(&temp.path().join("absent")).is_err());
    }
}
