//! A pseudo-terminal of our own.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use super::stream::{Io, Stream, StreamSpec};
use super::{CharBackend, CharContext, sys};

pub(super) fn open(context: &CharContext<'_>) -> io::Result<Arc<dyn CharBackend>> {
    let (master, slave, path) = sys::open_pty()?;
    let settings = sys::get_termios(slave.as_raw_fd())?;
    sys::set_termios(slave.as_raw_fd(), &sys::make_raw(settings))?;
    sys::set_nonblocking(&master)?;
    let master = Arc::new(master);
    let spec = StreamSpec {
        label: format!("pty:{}", path.display()),
        pty: Some(path),
        // Our own handle on the slave keeps the master usable while no client has it open.
        _keep: Some(slave),
        ..StreamSpec::default()
    };
    Stream::start(spec, Io::both(master), context)
}
