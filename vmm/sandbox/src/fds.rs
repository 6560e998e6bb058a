//! File descriptors that a child process would inherit.

use std::io;
use std::os::fd::RawFd;

/// The open file descriptors above standard error that are not close-on-exec, with what they refer to. All that
/// Holdfast opens are; this is for tests and for a look before guest code runs.
///
/// # Errors
/// If `/proc/self/fd` cannot be read.
pub fn inheritable_fds() -> io::Result<Vec<(RawFd, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc/self/fd")? {
        let entry = entry?;
        let Some(fd) = entry.file_name().to_str().and_then(|name| name.parse::<RawFd>().ok()) else {
            continue;
        };
        // SAFETY: F_GETFD takes no argument and reads one flag; a descriptor closed meanwhile gives EBADF.
        let flags = unsafe { libc::fcntl(fd, libc::F_GETFD) };
        if fd > 2 && flags >= 0 && flags & libc::FD_CLOEXEC == 0 {
            let target =
                std::fs::read_link(entry.path()).map_or_else(|_| "?".into(), |p| p.display().to_string());
            found.push((fd, target));
        }
    }
    found.sort();
    Ok(found)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

    #[test]
    fn only_descriptors_without_close_on_exec_are_found() {
        let file = std::fs::File::open("/dev/null").expect("open");
        // SAFETY: dup gives a new descriptor, without the flag, that nobody else owns.
        let leaky = unsafe { OwnedFd::from_raw_fd(libc::dup(file.as_raw_fd())) };
        let fds: Vec<RawFd> = inheritable_fds().expect("proc").into_iter().map(|(fd, _)| fd).collect();
        assert!(fds.contains(&leaky.as_raw_fd()));
        assert!(!fds.contains(&file.as_raw_fd()));
    }
}
