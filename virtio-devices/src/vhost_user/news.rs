//! What a back end says by itself: that its config space is another one.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::{Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandler};

use super::link::{Guard, LinkError, failed, host_error};

/// Notes that there was something.
#[derive(Debug, Default)]
struct Bell(AtomicBool);

impl VhostUserFrontendReqHandler for Bell {
    fn handle_config_change(&self) -> io::Result<u64> {
        self.0.store(true, Ordering::SeqCst);
        Ok(0)
    }
}

/// The channel on which the back end speaks.
#[derive(Clone)]
pub(super) struct News {
    handler: Arc<Mutex<FrontendReqHandler<Bell>>>,
    bell: Arc<Bell>,
    /// Our end of it.
    stream: Arc<UnixStream>,
}

impl News {
    /// Gives the back end its end.
    pub(super) fn open(frontend: &mut Frontend, acknowledged: bool) -> Result<Self, LinkError> {
        let what = "SET_BACKEND_REQ_FD";
        let bell = Arc::new(Bell::default());
        let handler = FrontendReqHandler::new(Arc::clone(&bell)).map_err(|e| io::Error::other(e.to_string()));
        let failure = |source| LinkError::Protocol { what, source: host_error(source) };
        let mut handler = handler.map_err(failure)?;
        handler.set_reply_ack_flag(acknowledged);
        failed(what, frontend.set_backend_request_fd(&handler.get_tx_raw_fd()))?;
        // SAFETY: the descriptor is open for as long as `handler` is there.
        let ours = unsafe { BorrowedFd::borrow_raw(handler.as_raw_fd()) };
        let stream = UnixStream::from(ours.try_clone_to_owned().map_err(failure)?);
        Ok(Self { handler: Arc::new(Mutex::new(handler)), bell, stream: Arc::new(stream) })
    }

    /// Becomes readable when the back end speaks.
    pub(super) fn fd(&self) -> RawFd {
        self.stream.as_raw_fd()
    }

    /// Hears all that it has said. True if its config space is another one.
    pub(super) fn hear(&self, guard: &Guard) -> Result<bool, LinkError> {
        let now = Timespec { tv_sec: 0, tv_nsec: 0 };
        loop {
            let mut fds = [PollFd::new(&*self.stream, PollFlags::IN)];
            // An error is met again when it is read.
            if !poll(&mut fds, Some(&now)).is_ok_and(|n| n != 0) {
                return Ok(self.bell.0.swap(false, Ordering::SeqCst));
            }
            let heard = guard.during(&self.stream, || self.handler.lock().handle_request())?;
            heard.map_err(|e| {
                let source = host_error(io::Error::other(e.to_string()));
                LinkError::Protocol { what: "what it says by itself", source }
            })?;
        }
    }
}
