//! What a back end says by itself: that its config space is another one, what is to be mapped into its shared memory.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vhost::vhost_user::message::{VhostUserMMap, VhostUserMMapFlags};
use vhost::vhost_user::{Frontend, FrontendReqHandler, VhostUserFrontend, VhostUserFrontendReqHandler};

use super::link::{Guard, LinkError, failed, host_error};
use crate::shared_memory::{Place, SharedMemory};

/// Notes that there was something, and maps what is asked for.
#[derive(Debug)]
struct Bell {
    config: AtomicBool,
    shared: Option<Arc<SharedMemory>>,
}

fn place(request: &VhostUserMMap) -> Place {
    Place { id: request.shmid, offset: request.shm_offset, len: request.len }
}

impl VhostUserFrontendReqHandler for Bell {
    fn handle_config_change(&self) -> io::Result<u64> {
        self.config.store(true, Ordering::SeqCst);
        Ok(0)
    }

    fn shmem_map(&self, request: &VhostUserMMap, fd: &dyn AsRawFd) -> io::Result<u64> {
        let shared = self.shared.as_ref().ok_or(rustix::io::Errno::NOSYS)?;
        // SAFETY: the descriptor came with the message and is open until this returns.
        let fd = unsafe { BorrowedFd::borrow_raw(fd.as_raw_fd()) };
        let file = File::from(fd.try_clone_to_owned()?);
        let writable = request.flags & VhostUserMMapFlags::WRITABLE.bits() != 0;
        shared.map(place(request), (file, request.fd_offset), writable).map(|()| 0)
    }

    fn shmem_unmap(&self, request: &VhostUserMMap) -> io::Result<u64> {
        let shared = self.shared.as_ref().ok_or(rustix::io::Errno::NOSYS)?;
        shared.unmap(place(request)).map(|()| 0)
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
    pub(super) fn open(
        frontend: &mut Frontend,
        acknowledged: bool,
        shared: Option<&Arc<SharedMemory>>,
    ) -> Result<Self, LinkError> {
        let what = "SET_BACKEND_REQ_FD";
        let bell = Arc::new(Bell { config: AtomicBool::new(false), shared: shared.cloned() });
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
                return Ok(self.bell.config.swap(false, Ordering::SeqCst));
            }
            let heard = guard.during(&self.stream, || self.handler.lock().handle_request())?;
            match heard {
                Ok(_) => {}
                // It has heard so, if it wanted to.
                Err(vhost::vhost_user::Error::ReqHandlerError(error)) => {
                    tracing::warn!(%error, "a request of a vhost-user back end is refused");
                }
                Err(error) => {
                    let source = host_error(io::Error::other(error.to_string()));
                    return Err(LinkError::Protocol { what: "what it says by itself", source });
                }
            }
        }
    }
}
