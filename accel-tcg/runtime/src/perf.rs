//! The list of translated code that Linux's `perf` reads to name addresses outside of files
//! (Linux, tools/perf/Documentation/jit-interface.txt): a line `START SIZE NAME`, numbers in hexadecimal.

use std::fs::{File, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::OpenOptionsExt;

/// The file, open.
#[derive(Debug)]
pub struct PerfMap(File);

impl PerfMap {
    /// Makes or extends `/tmp/perf-PID.map`; several VMs of one process share it.
    pub fn create() -> io::Result<Self> {
        Self::at(&format!("/tmp/perf-{}.map", std::process::id()))
    }

    fn at(path: &str) -> io::Result<Self> {
        // Anyone can put a link into /tmp.
        let mut options = OpenOptions::new();
        options.append(true).create(true).mode(0o600).custom_flags(libc::O_NOFOLLOW | libc::O_CLOEXEC);
        options.open(path).map(Self)
    }

    /// Adds `len` bytes of code at `start`. A line is one write, so lines of several threads do not mix; one that cannot
    /// be written is missing from a profile and nowhere else.
    pub fn add(&self, start: u64, len: u64, name: &str) {
        let line = format!("{start:x} {len:x} {name}\n");
        if let Err(error) = (&self.0).write_all(line.as_bytes()) {
            tracing::debug!(%error, "perf map");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_as_perf_reads_them_and_links_are_not_followed() {
        let dir = std::env::temp_dir().join(format!("holdfast-perf-map-{}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        let path = |name: &str| dir.join(name).to_str().expect("UTF-8").to_owned();
        let map = PerfMap::at(&path("map")).expect("made");
        map.add(0x7f00_0000_1000, 0x123, "riscv64_80000000_3");
        PerfMap::at(&path("map")).expect("extended").add(0x10, 0x20, "b");
        let text = std::fs::read_to_string(path("map")).expect("readable");
        assert_eq!(text, "7f0000001000 123 riscv64_80000000_3\n10 20 b\n");
        std::os::unix::fs::symlink(path("map"), path("link")).expect("a link");
        assert!(PerfMap::at(&path("link")).is_err());
        std::fs::remove_dir_all(&dir).expect("removed");
    }
}
