//! The few system calls that neither `std` nor `vmm-sys-util` wraps.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, RawFd};

/// Waits until one of `fds` is ready: (fd, events). Returns the events that came, in the same order.
/// A timeout of -1 waits for ever; an interrupted wait returns with nothing ready.
pub fn poll(fds: &[(RawFd, i16)], timeout_ms: i32) -> io::Result<Vec<i16>> {
    let mut list: Vec<_> = fds.iter().map(|&(fd, events)| libc::pollfd { fd, events, revents: 0 }).collect();
    // SAFETY: `list` is an array of exactly that many pollfd structures, alive for the call.
    let n = unsafe { libc::poll(list.as_mut_ptr(), list.len() as libc::nfds_t, timeout_ms) };
    if n < 0 {
        let error = io::Error::last_os_error();
        if error.kind() != io::ErrorKind::Interrupted {
            return Err(error);
        }
        return Ok(vec![0; fds.len()]);
    }
    Ok(list.iter().map(|p| p.revents).collect())
}

/// Makes reads and writes of `file` return instead of waiting. The flag belongs to the open file, so
/// this is for files that no other process shares.
pub fn set_nonblocking(file: &File) -> io::Result<()> {
    // SAFETY: fcntl on an open descriptor with integer arguments touches no memory of ours.
    let flags = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETFL) };
    if flags < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: as above.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// A duplicate of `fd` (0 or 1) that closes on exec and on drop.
pub fn duplicate(fd: RawFd) -> io::Result<File> {
    // SAFETY: fcntl with integer arguments touches no memory of ours.
    let new = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if new < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `new` was just made and nobody else owns it.
    Ok(unsafe { File::from_raw_fd(new) })
}

/// A new pseudo-terminal: its master, its slave and the slave's path.
pub fn open_pty() -> io::Result<(File, File, std::path::PathBuf)> {
    // SAFETY: posix_openpt takes only flags.
    let fd = unsafe { libc::posix_openpt(libc::O_RDWR | libc::O_NOCTTY | libc::O_CLOEXEC) };
    if fd < 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: `fd` was just made and nobody else owns it.
    let master = unsafe { File::from_raw_fd(fd) };
    // SAFETY: both calls take an open master's descriptor.
    if unsafe { libc::grantpt(fd) } < 0 || unsafe { libc::unlockpt(fd) } < 0 {
        return Err(io::Error::last_os_error());
    }
    let mut name = [0u8; 64];
    // SAFETY: `name` is writable for the length passed; the result is NUL-terminated within it.
    let rc = unsafe { libc::ptsname_r(fd, name.as_mut_ptr().cast(), name.len()) };
    if rc != 0 {
        return Err(io::Error::from_raw_os_error(rc));
    }
    let name = std::ffi::CStr::from_bytes_until_nul(&name)
        .map_err(|_| io::Error::other("the pseudo-terminal's name is too long"))?;
    let path = std::path::PathBuf::from(name.to_string_lossy().into_owned());
    let slave = {
        use std::os::unix::fs::OpenOptionsExt;
        File::options().read(true).write(true).custom_flags(libc::O_NOCTTY).open(&path)?
    };
    Ok((master, slave, path))
}

/// The terminal settings of `fd`.
pub fn get_termios(fd: RawFd) -> io::Result<libc::termios> {
    // SAFETY: a termios of zeroes is a valid value of that plain C struct.
    let mut t: libc::termios = unsafe { std::mem::zeroed() };
    // SAFETY: `t` is valid for the call to fill in.
    if unsafe { libc::tcgetattr(fd, &mut t) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(t)
}

/// Changes the terminal settings of `fd` at once. Async-signal-safe.
pub fn set_termios(fd: RawFd, t: &libc::termios) -> io::Result<()> {
    // SAFETY: `t` is a valid termios for the length of the call.
    if unsafe { libc::tcsetattr(fd, libc::TCSANOW, t) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// `t` as a raw terminal: no echo, no line editing, no signals, no translation either way.
pub fn make_raw(mut t: libc::termios) -> libc::termios {
    // SAFETY: `t` is a valid termios for the call to change.
    unsafe { libc::cfmakeraw(&mut t) };
    t
}

/// True if `fd` is a terminal.
pub fn is_terminal(fd: RawFd) -> bool {
    // SAFETY: isatty takes any integer.
    unsafe { libc::isatty(fd) == 1 }
}
