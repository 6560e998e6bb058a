//! The QMP server: QEMU's monitor protocol over UNIX and TCP sockets, for several clients at once.
//!
//! Wire format and errors follow QEMU's `docs/interop/qmp-spec`.

mod block;
mod commands;
mod devices;
mod framing;
mod hmp;
mod jobs;
mod migration;
mod request;
mod schema;

use std::collections::VecDeque;
use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use holdfast_vmm::control::{ControlHandle, TimedEvent};
use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{Semaphore, mpsc, watch};

use framing::{Framer, Message};
use request::{QmpError, Request};

pub use schema::document as schema_document;

/// Clients that are served at once.
const MAX_CLIENTS: usize = 32;
/// Requests of one client that wait; it is not read from beyond that.
const MAX_QUEUE: usize = 16;
/// Events that wait for a client that does not read; more are dropped.
const MAX_EVENTS: usize = 256;
/// How long a client may take to accept a message.
const WRITE_TIMEOUT: Duration = Duration::from_secs(10);

/// Cuts and reads what a client sends, as a session does, and runs nothing: for fuzzing. Returns how many
/// requests are well formed.
pub fn read_stream(data: &[u8]) -> usize {
    let (mut framer, mut messages) = (Framer::default(), VecDeque::new());
    framer.feed(data, &mut messages);
    let requests = messages.iter().filter_map(|message| match message {
        Message::Object(text) => Request::parse(text, true).ok(),
        Message::Malformed(_) => None,
    });
    requests
        .filter(|request| {
            request.arguments.values().all(|value| {
                // A line for the human monitor is a language of its own.
                value.as_str().is_none_or(hmp::reads)
            })
        })
        .count()
}

/// Something that accepts clients.
pub(crate) trait Accept {
    /// A connection.
    type Stream: AsyncRead + AsyncWrite + Unpin + Send + 'static;
    /// The next client.
    fn next(&self) -> impl Future<Output = io::Result<Self::Stream>> + Send;
}

impl Accept for UnixListener {
    type Stream = tokio::net::UnixStream;

    async fn next(&self) -> io::Result<Self::Stream> {
        self.accept().await.map(|(stream, _)| stream)
    }
}

impl Accept for TcpListener {
    type Stream = tokio::net::TcpStream;

    async fn next(&self) -> io::Result<Self::Stream> {
        let (stream, _) = self.accept().await?;
        // Short messages either way; waiting for more to send only delays them.
        let _ = stream.set_nodelay(true);
        Ok(stream)
    }
}

/// Serves `listener` until `shutdown` changes.
pub(crate) async fn serve<L: Accept>(
    listener: L,
    handle: ControlHandle,
    mut shutdown: watch::Receiver<bool>,
) {
    let slots = Arc::new(Semaphore::new(MAX_CLIENTS));
    let mut clients = tokio::task::JoinSet::new();
    loop {
        let accepted = tokio::select! {
            accepted = async {
                let slot = slots.clone().acquire_owned().await;
                listener.next().await.map(|stream| (stream, slot))
            } => accepted,
            _ = clients.join_next(), if !clients.is_empty() => continue,
            _ = shutdown.changed() => break,
        };
        match accepted {
            Ok((stream, slot)) => {
                let session = Session::new(stream, handle.clone());
                let shutdown = shutdown.clone();
                clients.spawn(async move {
                    if let Err(error) = session.run(shutdown).await {
                        tracing::debug!(%error, "a QMP client went");
                    }
                    drop(slot);
                });
            }
            Err(error) => {
                tracing::warn!(%error, "the QMP socket cannot accept");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
    }
    let rest = async { while clients.join_next().await.is_some() {} };
    let _ = tokio::time::timeout(Duration::from_secs(1), rest).await;
}

type Running = Pin<Box<dyn Future<Output = Value> + Send>>;

/// One client.
struct Session<S> {
    stream: S,
    handle: ControlHandle,
    events: mpsc::Receiver<Arc<TimedEvent>>,
    framer: Framer,
    waiting: VecDeque<Message>,
    running: Option<Running>,
    negotiated: bool,
    /// The client has enabled out-of-band execution.
    oob: bool,
}

enum Step {
    Read(usize),
    Event(Arc<TimedEvent>),
    Reply(Value),
    Shutdown,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Session<S> {
    fn new(stream: S, handle: ControlHandle) -> Self {
        let (sender, events) = mpsc::channel(MAX_EVENTS);
        handle.events().listen(move |event: &Arc<TimedEvent>| match sender.try_send(event.clone()) {
            Err(mpsc::error::TrySendError::Closed(_)) => false,
            // Full: the client does not read. It loses this event, as QEMU documents it may.
            Ok(()) | Err(mpsc::error::TrySendError::Full(_)) => true,
        });
        Self {
            stream,
            handle,
            events,
            framer: Framer::default(),
            waiting: VecDeque::new(),
            running: None,
            negotiated: false,
            oob: false,
        }
    }

    async fn run(mut self, mut shutdown: watch::Receiver<bool>) -> io::Result<()> {
        let version = serde_json::to_value(commands::version()).unwrap_or_default();
        self.send(&json!({ "QMP": { "version": version, "capabilities": [request::OOB] } })).await?;
        let mut buffer = vec![0_u8; 4096];
        loop {
            match self.step(&mut buffer, &mut shutdown).await? {
                Step::Read(0) => return Ok(()),
                Step::Read(count) => {
                    let data = buffer.get(..count).unwrap_or_default();
                    self.framer.feed(data, &mut self.waiting);
                    self.answer_out_of_band().await?;
                }
                Step::Event(event) => self.send_event(&event).await?,
                Step::Reply(reply) => {
                    self.running = None;
                    // What happened before the reply is told before it: `STOP`, then `stop` returns.
                    while let Ok(event) = self.events.try_recv() {
                        self.send_event(&event).await?;
                    }
                    self.send(&reply).await?;
                }
                Step::Shutdown => return self.last_words().await,
            }
            self.start_next().await?;
        }
    }

    async fn step(&mut self, buffer: &mut [u8], shutdown: &mut watch::Receiver<bool>) -> io::Result<Step> {
        let reads = self.waiting.len() < MAX_QUEUE;
        let running = async {
            match &mut self.running {
                Some(running) => running.await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some(event) = self.events.recv() => Ok(Step::Event(event)),
            reply = running => Ok(Step::Reply(reply)),
            count = self.stream.read(buffer), if reads => count.map(Step::Read),
            _ = shutdown.changed() => Ok(Step::Shutdown),
        }
    }

    /// Answers out-of-band requests ahead of those that wait. No command can be run that way: like QEMU's, ours are
    /// in-band unless the schema says otherwise (`allow-oob`), and none has reason to.
    async fn answer_out_of_band(&mut self) -> io::Result<()> {
        if !self.oob {
            return Ok(());
        }
        for message in std::mem::take(&mut self.waiting) {
            let Message::Object(text) = &message else {
                self.waiting.push_back(message);
                continue;
            };
            match Request::parse(text, true) {
                Ok(request) if request.oob => {
                    let error = commands::refuse_out_of_band(&request.command);
                    self.send(&error.message(request.id)).await?;
                }
                _ => self.waiting.push_back(message),
            }
        }
        Ok(())
    }

    /// Starts the next request if none runs; answers what needs no running.
    async fn start_next(&mut self) -> io::Result<()> {
        while self.running.is_none() {
            let Some(message) = self.waiting.pop_front() else { return Ok(()) };
            let request = match message {
                Message::Object(text) => Request::parse(&text, self.oob),
                Message::Malformed(reason) => Err((None, QmpError::generic(reason))),
            };
            let request = match request {
                Ok(request) => request,
                Err((id, error)) => {
                    self.send(&error.message(id)).await?;
                    continue;
                }
            };
            match self.check_mode(&request) {
                Ok(true) => self.send(&request::reply(json!({}), request.id)).await?,
                Ok(false) => self.start(request),
                Err(error) => self.send(&error.message(request.id)).await?,
            }
        }
        Ok(())
    }

    /// Whether `request` was capabilities negotiation, which is then done.
    fn check_mode(&mut self, request: &Request) -> Result<bool, QmpError> {
        if request.oob {
            return Err(commands::refuse_out_of_band(&request.command));
        }
        match (request.command.as_str(), self.negotiated) {
            ("qmp_capabilities", false) => {
                self.oob = request::negotiate(&request.arguments)?;
                self.negotiated = true;
                Ok(true)
            }
            ("qmp_capabilities", true) => Err(QmpError::not_found(
                "Capabilities negotiation is already complete, command ignored".to_owned(),
            )),
            (_, false) => Err(QmpError::not_found(
                "Expecting capabilities negotiation with 'qmp_capabilities'".to_owned(),
            )),
            (_, true) => Ok(false),
        }
    }

    fn start(&mut self, request: Request) {
        let handle = self.handle.clone();
        self.running = Some(Box::pin(async move {
            match commands::run(handle, &request.command, request.arguments).await {
                Ok(value) => request::reply(value, request.id),
                Err(error) => error.message(request.id),
            }
        }));
    }

    async fn send_event(&mut self, event: &TimedEvent) -> io::Result<()> {
        match event.to_qmp() {
            Some(message) if self.negotiated => self.send(&message).await,
            _ => Ok(()),
        }
    }

    /// The process ends: the answer to `quit` and the last events still leave.
    async fn last_words(mut self) -> io::Result<()> {
        if let Some(running) = self.running.take()
            && let Ok(reply) = tokio::time::timeout(Duration::from_millis(200), running).await
        {
            self.send(&reply).await?;
        }
        while let Ok(event) = self.events.try_recv() {
            self.send_event(&event).await?;
        }
        self.stream.shutdown().await
    }

    async fn send(&mut self, message: &Value) -> io::Result<()> {
        let mut text = message.to_string();
        text.push_str("\r\n");
        let written = tokio::time::timeout(WRITE_TIMEOUT, self.stream.write_all(text.as_bytes())).await;
        written.unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
    }
}
