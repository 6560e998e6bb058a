//! The way from the codecs to the manager's thread and back.

use std::fmt;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::sync::Arc;
use std::sync::mpsc;

use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::{ControlError, ErrorKind, EventBus, Operation, VmManager};

type Deliver<T> = Box<dyn FnOnce(Result<T, ControlError>) + Send>;
type Serve = Box<dyn FnOnce(&mut dyn VmManager) + Send>;

/// Answers one request, now or later, from any thread. If it is dropped without an answer, the caller
/// gets an error.
pub struct Responder<T>(Option<Deliver<T>>);

impl<T> Responder<T> {
    /// Calls `deliver` with the answer.
    pub fn new(deliver: impl FnOnce(Result<T, ControlError>) + Send + 'static) -> Self {
        Self(Some(Box::new(deliver)))
    }

    /// Gives the answer.
    pub fn respond(mut self, result: Result<T, ControlError>) {
        if let Some(deliver) = self.0.take() {
            deliver(result);
        }
    }
}

impl<T> Drop for Responder<T> {
    fn drop(&mut self) {
        if let Some(deliver) = self.0.take() {
            deliver(Err(gone()));
        }
    }
}

impl<T> fmt::Debug for Responder<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Responder").finish_non_exhaustive()
    }
}

fn gone() -> ControlError {
    ControlError::new(ErrorKind::Failed, "The VM manager ended before it answered")
}

/// A request on its way to the manager.
pub struct Request {
    name: &'static str,
    serve: Serve,
}

impl Request {
    fn new<O: Operation>(operation: O, responder: Responder<O::Reply>) -> Self {
        Self { name: O::NAME, serve: Box::new(move |manager| operation.serve(manager, responder)) }
    }

    /// Name of the operation, for logs.
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// Serves the request. Whoever waits is answered by the time that the operation allows.
    pub fn serve(self, manager: &mut dyn VmManager) {
        tracing::debug!(operation = self.name, "request");
        (self.serve)(manager);
    }
}

impl fmt::Debug for Request {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Request").field(&self.name).finish()
    }
}

/// Where the manager's thread finds requests.
#[derive(Debug)]
pub struct ControlInbox {
    requests: mpsc::Receiver<Request>,
    wake: Arc<EventFd>,
    events: EventBus,
}

impl ControlInbox {
    /// The next request, if one is there. Call until `None` whenever [`ControlInbox::as_fd`] becomes
    /// readable: the first call clears the readiness.
    pub fn next_request(&self) -> Option<Request> {
        // An error means that nothing was written since the last read.
        let _ = self.wake.read();
        self.requests.try_recv().ok()
    }

    /// Waits for a request. `None` once every handle is gone.
    pub fn wait(&self) -> Option<Request> {
        let request = self.requests.recv().ok();
        let _ = self.wake.read();
        request
    }

    /// Where the manager publishes events.
    pub fn events(&self) -> &EventBus {
        &self.events
    }
}

impl AsFd for ControlInbox {
    fn as_fd(&self) -> BorrowedFd<'_> {
        // SAFETY: the eventfd lives as long as `self`, to which the result's lifetime is bound.
        unsafe { BorrowedFd::borrow_raw(self.wake.as_raw_fd()) }
    }
}

impl AsRawFd for ControlInbox {
    fn as_raw_fd(&self) -> RawFd {
        self.wake.as_raw_fd()
    }
}

/// Drives the VM. Cheap to clone; every clone talks to the same VM.
#[derive(Debug, Clone)]
pub struct ControlHandle {
    requests: mpsc::Sender<Request>,
    wake: Arc<EventFd>,
    events: EventBus,
}

impl ControlHandle {
    /// Runs `operation` and waits for its reply.
    ///
    /// # Errors
    /// What the operation says.
    pub fn call<O: Operation>(&self, operation: O) -> Result<O::Reply, ControlError> {
        let (sender, receiver) = mpsc::channel();
        // The caller waits below: the receiver is there.
        self.submit(operation, move |result| drop(sender.send(result)));
        receiver.recv().unwrap_or_else(|_| Err(gone()))
    }

    /// Runs `operation`; `deliver` gets its reply on a thread of the VM's and must not block.
    pub fn submit<O: Operation>(
        &self,
        operation: O,
        deliver: impl FnOnce(Result<O::Reply, ControlError>) + Send + 'static,
    ) {
        let request = Request::new(operation, Responder::new(deliver));
        // If the manager is gone, the request comes back in the error, and dropping it answers.
        if self.requests.send(request).is_ok() {
            // The counter of an eventfd cannot overflow here: each write adds one, each read clears it.
            let _ = self.wake.write(1);
        }
    }

    /// What the VM tells everyone.
    pub fn events(&self) -> &EventBus {
        &self.events
    }
}

/// Makes a handle and the inbox at its other end.
///
/// # Errors
/// Whatever the host says when there is no eventfd.
pub fn control() -> io::Result<(ControlHandle, ControlInbox)> {
    let wake = Arc::new(EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?);
    let (sender, requests) = mpsc::channel();
    let events = EventBus::new();
    let handle = ControlHandle { requests: sender, wake: wake.clone(), events: events.clone() };
    Ok((handle, ControlInbox { requests, wake, events }))
}
