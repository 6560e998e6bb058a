//! A UNIX socket for hyper that keeps the file descriptors which arrive with the bytes.

use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use hyper::rt::{Read, ReadBufCursor, Write};
use parking_lot::Mutex;
use tokio::io::{AsyncWrite, Interest};
use tokio::net::UnixStream;

use crate::scm::recv_with_fds;

/// Most file descriptors that wait for the end of their request.
const MAX_WAITING: usize = 512;

/// The file descriptors that came with the request which is being read.
#[derive(Debug, Clone, Default)]
pub(super) struct ReceivedFds(Arc<Mutex<Vec<OwnedFd>>>);

impl ReceivedFds {
    /// All of them.
    pub(super) fn take(&self) -> Vec<OwnedFd> {
        std::mem::take(&mut *self.0.lock())
    }
}

/// The socket.
#[derive(Debug)]
pub(super) struct ScmStream {
    stream: UnixStream,
    fds: ReceivedFds,
}

impl ScmStream {
    /// Wraps `stream`; received file descriptors go to the second value.
    pub(super) fn new(stream: UnixStream) -> (Self, ReceivedFds) {
        let fds = ReceivedFds::default();
        (Self { stream, fds: fds.clone() }, fds)
    }
}

impl Read for ScmStream {
    fn poll_read(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        mut buffer: ReadBufCursor<'_>,
    ) -> Poll<io::Result<()>> {
        loop {
            ready!(self.stream.poll_read_ready(context))?;
            let mut received = Vec::new();
            // SAFETY: the slice is only written to, by the kernel; nothing in it is de-initialised.
            let space = unsafe { buffer.as_mut() };
            let read =
                self.stream.try_io(Interest::READABLE, || recv_with_fds(&self.stream, space, &mut received));
            match read {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
                Ok(count) => {
                    // SAFETY: the kernel has initialised the first `count` bytes.
                    unsafe { buffer.advance(count) };
                    let mut fds = self.fds.0.lock();
                    if fds.len() + received.len() > MAX_WAITING {
                        let error = io::Error::new(io::ErrorKind::InvalidData, "too many file descriptors");
                        return Poll::Ready(Err(error));
                    }
                    fds.append(&mut received);
                    return Poll::Ready(Ok(()));
                }
            }
        }
    }
}

impl Write for ScmStream {
    fn poll_write(self: Pin<&mut Self>, context: &mut Context<'_>, data: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write(context, data)
    }

    fn poll_flush(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_flush(context)
    }

    fn poll_shutdown(self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.get_mut().stream).poll_shutdown(context)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        context: &mut Context<'_>,
        data: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.get_mut().stream).poll_write_vectored(context, data)
    }
}
