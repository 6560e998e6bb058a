//! Back ends on a file descriptor with a reading thread: terminal, pseudo-terminal, socket.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use holdfast_threads::Role;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::terminal::RawTerminal;
use super::{CharBackend, CharContext, CharReceiver, Escape, HELP, sys};

/// Unsent bytes that are kept: a whole boot log fits.
const BACKLOG: usize = 256 * 1024;
/// Bytes read or written at a time. Terminals take this much without waiting once they are writable.
const CHUNK: usize = 256;
/// How long a slow terminal may hold up its sender before output is dropped.
const PATIENCE_MS: i32 = 100;
/// Keys typed at a terminal that are kept for a guest which does not read.
const KEYS: usize = 4096;

/// The reading thread's own state.
#[derive(Debug, Default)]
struct Typed {
    escape: Escape,
    /// Read, but not taken by the front end yet.
    kept: VecDeque<u8>,
    /// What the front end takes now.
    room: usize,
}

/// Who is at the other end, and what is still to be sent.
#[derive(Debug, Default)]
pub(super) struct Io {
    input: Option<Arc<File>>,
    output: Option<Arc<File>>,
    backlog: VecDeque<u8>,
}

impl Io {
    pub(super) fn both(file: Arc<File>) -> Self {
        Self { input: Some(Arc::clone(&file)), output: Some(file), backlog: VecDeque::new() }
    }

    /// Writes what can be written without waiting.
    fn flush(&mut self) {
        while let Some(output) = self.output.clone() {
            let (head, _) = self.backlog.as_slices();
            if head.is_empty() {
                return;
            }
            match write_some(&output, &head[..head.len().min(CHUNK)]) {
                Ok(0) => return,
                Ok(n) => drop(self.backlog.drain(..n)),
                // The reader will notice the hang-up of a socket; a broken pipe stays closed.
                Err(_) => self.output = None,
            }
        }
    }
}

/// Writes as much of `data` as can be written without waiting.
fn write_some(mut output: &File, data: &[u8]) -> io::Result<usize> {
    let ready = sys::poll(&[(output.as_raw_fd(), libc::POLLOUT)], 0)?;
    // A hang-up or an error counts as ready: the write says what it is.
    if ready.first().is_none_or(|&events| events == 0) {
        return Ok(0);
    }
    match output.write(data) {
        Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => Ok(0),
        result => result,
    }
}

/// What a stream is made of besides its descriptors.
#[derive(Debug, Default)]
pub(super) struct StreamSpec {
    pub label: String,
    pub pty: Option<PathBuf>,
    pub _keep: Option<File>,
    pub listener: Option<(UnixListener, PathBuf)>,
    pub _raw: Option<RawTerminal>,
    /// Ctrl-A is an escape.
    pub escapes: bool,
    /// Senders wait a little for a slow reader.
    pub patient: bool,
}

#[derive(Debug)]
struct Shared {
    spec: StreamSpec,
    io: Mutex<Io>,
    receiver: Mutex<Option<Arc<dyn CharReceiver>>>,
    wake: EventFd,
    stop: AtomicBool,
}

/// A back end with a thread that reads and flushes.
#[derive(Debug)]
pub(super) struct Stream {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Stream {
    pub(super) fn start(
        spec: StreamSpec,
        io: Io,
        context: &CharContext<'_>,
    ) -> io::Result<Arc<dyn CharBackend>> {
        let shared = Arc::new(Shared {
            spec,
            io: Mutex::new(io),
            receiver: Mutex::default(),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC)?,
            stop: AtomicBool::new(false),
        });
        let (of_thread, quit) = (Arc::clone(&shared), Arc::clone(&context.quit));
        let body = Box::new(move || {
            if let Err(error) = of_thread.serve(quit.as_ref()) {
                tracing::error!(%error, "{}: input has ended", of_thread.spec.label);
            }
        });
        let thread = context.spawner.spawn(&format!("_{}", context.id), Role::Device, body)?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
        self.shared.wake();
        if let Some(thread) = self.thread.lock().take()
            && thread.thread().id() != std::thread::current().id()
        {
            // A thread that panicked has already said so.
            let _ = thread.join();
        }
        self.shared.io.lock().flush();
        if let Some((_, path)) = &self.shared.spec.listener {
            // Someone else may have removed it already.
            let _ = std::fs::remove_file(path);
        }
    }
}

impl CharBackend for Stream {
    fn send(&self, data: &[u8]) {
        let mut io = self.shared.io.lock();
        io.backlog.extend(data);
        io.flush();
        if io.backlog.is_empty() {
            return;
        }
        if io.backlog.len() > BACKLOG {
            if self.shared.spec.patient
                && let Some(output) = io.output.clone()
                && sys::poll(&[(output.as_raw_fd(), libc::POLLOUT)], PATIENCE_MS).is_ok()
            {
                io.flush();
            }
            let excess = io.backlog.len().saturating_sub(BACKLOG);
            io.backlog.drain(..excess);
        }
        if io.output.is_some() {
            self.shared.wake();
        }
    }

    fn connect(&self, receiver: Arc<dyn CharReceiver>) {
        *self.shared.receiver.lock() = Some(receiver);
        self.shared.wake();
    }

    fn receiver_ready(&self) {
        self.shared.wake();
    }

    fn label(&self) -> String {
        self.shared.spec.label.clone()
    }

    fn pty_path(&self) -> Option<PathBuf> {
        self.shared.spec.pty.clone()
    }

    fn is_open(&self) -> bool {
        self.shared.io.lock().output.is_some()
    }
}

impl Shared {
    fn wake(&self) {
        // A full counter wakes as well as one that was added to.
        let _ = self.wake.write(1);
    }

    /// The thread: reads while the front end has room, flushes, and accepts clients.
    fn serve(&self, quit: &(dyn Fn() + Send + Sync)) -> io::Result<()> {
        let mut typed = Typed::default();
        while !self.stop.load(Ordering::SeqCst) {
            self.deliver(&mut typed);
            let (input, output) = {
                let io = self.io.lock();
                (io.input.clone(), io.output.clone().filter(|_| !io.backlog.is_empty()))
            };
            // The escape key works even while the guest reads nothing: some keys are kept for it.
            let limit = if self.spec.escapes { KEYS } else { typed.room };
            let input = input.filter(|_| typed.kept.len() < limit);
            let fd = |file: &Option<Arc<File>>| file.as_ref().map_or(-1, |f| f.as_raw_fd());
            let listener = self.spec.listener.as_ref().map_or(-1, |(l, _)| l.as_raw_fd());
            let ready = sys::poll(
                &[
                    (self.wake.as_raw_fd(), libc::POLLIN),
                    (fd(&input), libc::POLLIN),
                    (fd(&output), libc::POLLOUT),
                    (listener, libc::POLLIN),
                ],
                -1,
            )?;
            let &[woken, readable, writable, client] = ready.as_slice() else { continue };
            if woken != 0 {
                // Not readable any more is fine: all it says is to look again.
                let _ = self.wake.read();
            }
            if client != 0 {
                self.accept();
                continue;
            }
            if writable != 0 {
                self.io.lock().flush();
            }
            if readable != 0
                && let Some(input) = input
            {
                self.read(&input, &mut typed, limit, quit);
            }
        }
        Ok(())
    }

    /// Passes kept bytes on until none are left or the front end has no room, and notes what room is left.
    ///
    /// Only a front end that was asked while it had no room tells of new room: whatever it takes between
    /// two of these calls must be seen here, or kept bytes would wait for ever.
    fn deliver(&self, typed: &mut Typed) {
        let receiver = self.receiver.lock().clone();
        loop {
            typed.room = receiver.as_ref().map_or(0, |r| r.capacity());
            let n = typed.room.min(typed.kept.len());
            let Some(receiver) = receiver.as_ref().filter(|_| n > 0) else { return };
            let bytes: Vec<u8> = typed.kept.drain(..n).collect();
            receiver.receive(&bytes);
        }
    }

    fn accept(&self) {
        let Some((listener, _)) = &self.spec.listener else { return };
        match listener.accept() {
            Ok((client, _)) => {
                if let Err(error) = client.set_nonblocking(true) {
                    tracing::error!(%error, "{}: client refused", self.spec.label);
                    return;
                }
                let mut io = self.io.lock();
                // The old client, if any, sees its connection close.
                let backlog = std::mem::take(&mut io.backlog);
                *io = Io { backlog, ..Io::both(Arc::new(File::from(OwnedFd::from(client)))) };
                io.flush();
            }
            Err(error) => tracing::warn!(%error, "{}: no client", self.spec.label),
        }
    }

    fn read(&self, input: &Arc<File>, typed: &mut Typed, limit: usize, quit: &(dyn Fn() + Send + Sync)) {
        let mut buffer = [0; CHUNK];
        let want = limit.saturating_sub(typed.kept.len()).min(CHUNK);
        let n = match input.as_ref().read(&mut buffer[..want]) {
            Ok(0) => return self.hung_up(input),
            Ok(n) => n,
            Err(e) if matches!(e.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted) => return,
            Err(_) => return self.hung_up(input),
        };
        if !self.spec.escapes {
            typed.kept.extend(&buffer[..n]);
            return;
        }
        let escaped = typed.escape.feed(&buffer[..n]);
        typed.kept.extend(&escaped.pass);
        if escaped.help {
            let mut io = self.io.lock();
            io.backlog.extend(HELP.as_bytes());
            io.flush();
        }
        if escaped.quit {
            quit();
        }
    }

    /// The other end is gone: forget it, unless a new client has taken its place.
    fn hung_up(&self, input: &Arc<File>) {
        let mut io = self.io.lock();
        if io.input.as_ref().is_some_and(|i| Arc::ptr_eq(i, input)) {
            io.input = None;
            if self.spec.listener.is_some() {
                io.output = None;
            }
        }
    }
}

/// Standard input and output.
pub(super) fn terminal(context: &CharContext<'_>) -> io::Result<Arc<dyn CharBackend>> {
    let io = Io {
        input: Some(Arc::new(sys::duplicate(libc::STDIN_FILENO)?)),
        output: Some(Arc::new(sys::duplicate(libc::STDOUT_FILENO)?)),
        backlog: VecDeque::new(),
    };
    let spec = StreamSpec {
        label: "stdio".into(),
        _raw: RawTerminal::enter()?,
        escapes: true,
        patient: true,
        ..StreamSpec::default()
    };
    Stream::start(spec, io, context)
}

/// A socket that listens at `path`. A stale socket there is replaced; any other file is not.
pub(super) fn socket(path: &Path, context: &CharContext<'_>) -> io::Result<Arc<dyn CharBackend>> {
    let is_socket = std::fs::symlink_metadata(path).is_ok_and(|m| m.file_type().is_socket());
    if is_socket && UnixStream::connect(path).is_err() {
        std::fs::remove_file(path)?;
    }
    let listener = UnixListener::bind(path)?;
    listener.set_nonblocking(true)?;
    let spec = StreamSpec {
        label: format!("unix:{}", path.display()),
        listener: Some((listener, path.to_owned())),
        ..StreamSpec::default()
    };
    Stream::start(spec, Io::default(), context)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes three bytes at a time and has room again at once, as a guest does that reads on another thread.
    #[derive(Debug, Default)]
    struct Quick(Mutex<Vec<u8>>);

    impl CharReceiver for Quick {
        fn capacity(&self) -> usize {
            3
        }

        fn receive(&self, data: &[u8]) {
            assert!(data.len() <= 3, "no more than the capacity");
            self.0.lock().extend(data);
        }
    }

    #[test]
    fn a_front_end_that_reads_while_it_is_fed_gets_everything() {
        let quick = Arc::new(Quick::default());
        let shared = Shared {
            spec: StreamSpec::default(),
            io: Mutex::default(),
            receiver: Mutex::new(Some(Arc::clone(&quick) as Arc<dyn CharReceiver>)),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).expect("an event"),
            stop: AtomicBool::new(false),
        };
        let mut typed = Typed { kept: b"echo 1 >/remove".iter().copied().collect(), ..Typed::default() };
        shared.deliver(&mut typed);
        assert_eq!(quick.0.lock().as_slice(), b"echo 1 >/remove");
        assert!(typed.kept.is_empty() && typed.room == 3);
    }
}
