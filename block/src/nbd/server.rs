//! A server: its exports and its clients.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use holdfast_objects::Authz;
use holdfast_objects::tls::ServerConfig;
use parking_lot::{Mutex, RwLock};

use super::proto::transmission;
use super::{Socket, Stream, handshake, transmission as requests};
use crate::BlockNode;
use crate::qcow2::bitmap::Bitmap;

/// How long a client may take between two words of the negotiation.
pub const HANDSHAKE: Duration = Duration::from_secs(10);

/// A dirty bitmap that is offered as `qemu:dirty-bitmap:NAME`.
#[derive(Debug)]
pub struct BitmapContext {
    /// The bitmap as it was when the export was made.
    pub bitmap: Bitmap,
}

/// A metadata context of an export.
#[derive(Debug, Clone)]
pub(super) enum Context {
    Allocation,
    Depth,
    Bitmap(Arc<BitmapContext>),
}

impl Context {
    pub(super) fn name(&self) -> String {
        match self {
            Self::Allocation => "base:allocation".to_owned(),
            Self::Depth => "qemu:allocation-depth".to_owned(),
            Self::Bitmap(b) => format!("qemu:dirty-bitmap:{}", b.bitmap.name),
        }
    }
}

/// A node that clients can use.
#[derive(Debug)]
pub struct Export {
    /// Its name; the default export's is empty.
    pub name: String,
    /// Words for people.
    pub description: Option<String>,
    /// What is exported.
    pub node: Arc<dyn BlockNode>,
    /// Clients do not write it.
    pub readonly: bool,
    /// Offer `qemu:allocation-depth`.
    pub allocation_depth: bool,
    /// Dirty bitmaps that are offered.
    pub bitmaps: Vec<Arc<BitmapContext>>,
    /// Several connections of a client see one disk, and all do: flushes hold for all.
    pub multi_conn: bool,
    /// Dropped when the export is gone and no client has it any more.
    pub guard: Option<Box<dyn Guard>>,
}

/// Something whose end is that of an export.
pub trait Guard: Send + Sync + std::fmt::Debug {}

impl<T: Send + Sync + std::fmt::Debug> Guard for T {}

impl Export {
    pub(super) fn contexts(&self) -> Vec<Context> {
        let mut all = vec![Context::Allocation];
        if self.allocation_depth {
            all.push(Context::Depth);
        }
        all.extend(self.bitmaps.iter().map(|b| Context::Bitmap(Arc::clone(b))));
        all
    }

    pub(super) fn flags(&self) -> u16 {
        use transmission::{CACHE, FLUSH, FUA, HAS_FLAGS, MULTI_CONN, READ_ONLY, TRIM, WRITE_ZEROES};
        let writable = if self.readonly { READ_ONLY } else { TRIM | WRITE_ZEROES };
        HAS_FLAGS | FLUSH | FUA | CACHE | writable | if self.multi_conn { MULTI_CONN } else { 0 }
    }
}

/// Exports and who uses them. Connections are served on threads that the owner makes.
#[derive(Debug, Default)]
pub struct Server {
    exports: RwLock<Vec<Arc<Export>>>,
    pub(super) tls: Option<Arc<ServerConfig>>,
    /// Who may connect, by the name in the certificate.
    pub(super) authz: Option<Arc<Authz>>,
    /// Clients by number, with the export that they have come to.
    clients: Mutex<HashMap<u64, (Socket, Option<String>)>>,
    /// How long a client may take between two words of the negotiation: [`HANDSHAKE`] if absent, without end if zero.
    patience: Option<Duration>,
    next: AtomicU64,
    /// Clients that came as far as an export, ever.
    served: AtomicUsize,
}

impl Server {
    /// A server without exports. With `tls`, plain clients get no further than that they need it.
    pub fn new(tls: Option<Arc<ServerConfig>>) -> Arc<Self> {
        Self::guarded(tls, None)
    }

    /// A server without exports, which talks to those clients only that `authz` lets in, by the names in their certificates.
    pub fn guarded(tls: Option<Arc<ServerConfig>>, authz: Option<Arc<Authz>>) -> Arc<Self> {
        Arc::new(Self { tls, authz, ..Self::default() })
    }

    /// As [`Server::guarded`], with clients that take longer than `patience` in the negotiation sent away; zero for never.
    pub fn patient(
        tls: Option<Arc<ServerConfig>>,
        authz: Option<Arc<Authz>>,
        patience: Duration,
    ) -> Arc<Self> {
        Arc::new(Self { tls, authz, patience: Some(patience), ..Self::default() })
    }

    /// Adds an export. False if there is one of that name.
    pub fn add(&self, export: Export) -> bool {
        let mut exports = self.exports.write();
        if exports.iter().any(|e| e.name == export.name) {
            return false;
        }
        exports.push(Arc::new(export));
        true
    }

    /// Takes an export away from new clients. False if there is none of that name.
    pub fn remove(&self, name: &str) -> bool {
        let mut exports = self.exports.write();
        let before = exports.len();
        exports.retain(|e| e.name != name);
        exports.len() != before
    }

    pub(super) fn export(&self, name: &str) -> Option<Arc<Export>> {
        self.exports.read().iter().find(|e| e.name == name).cloned()
    }

    pub(super) fn exports(&self) -> Vec<Arc<Export>> {
        self.exports.read().clone()
    }

    /// Clients now.
    pub fn clients(&self) -> usize {
        self.clients.lock().len()
    }

    /// Clients that came as far as an export, ever.
    pub fn served(&self) -> usize {
        self.served.load(Ordering::Acquire)
    }

    /// Serves a client until it goes or is sent away.
    ///
    /// # Errors
    /// The connection's, TLS's, or what of the client's words makes no sense. The connection is closed in any case.
    pub fn serve(&self, socket: Socket) -> io::Result<()> {
        self.serve_on(Stream::Plain(socket))
    }

    /// As [`Server::serve`], on a connection that is encrypted already or need not be.
    ///
    /// # Errors
    /// As [`Server::serve`].
    pub fn serve_on(&self, stream: Stream) -> io::Result<()> {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.clients.lock().insert(id, (stream.socket().try_clone()?, None));
        let result = self.talk(id, stream);
        if let Some((socket, _)) = self.clients.lock().remove(&id) {
            socket.shut_down();
        }
        result
    }

    fn talk(&self, id: u64, stream: Stream) -> io::Result<()> {
        let patience = self.patience.unwrap_or(HANDSHAKE);
        stream.socket().set_timeout(Some(patience).filter(|p| !p.is_zero()))?;
        let Some(session) = handshake::negotiate(self, stream)? else { return Ok(()) };
        session.stream.socket().set_timeout(None)?;
        if let Some((_, export)) = self.clients.lock().get_mut(&id) {
            *export = Some(session.export.name.clone());
        }
        // It may have been taken away meanwhile.
        if !self.has(&session.export.name) {
            return Ok(());
        }
        self.served.fetch_add(1, Ordering::AcqRel);
        requests::serve(session)
    }

    /// Sends all clients away.
    pub fn disconnect_all(&self) {
        self.clients.lock().values().for_each(|(socket, _)| socket.shut_down());
    }

    /// True if there is an export of that name.
    pub fn has(&self, name: &str) -> bool {
        self.export(name).is_some()
    }

    /// Clients of an export.
    pub fn clients_of(&self, name: &str) -> usize {
        self.clients.lock().values().filter(|(_, export)| export.as_deref() == Some(name)).count()
    }

    /// Sends the clients of an export away.
    pub fn disconnect(&self, name: &str) {
        let clients = self.clients.lock();
        clients
            .values()
            .filter(|(_, e)| e.as_deref() == Some(name))
            .for_each(|(socket, _)| socket.shut_down());
    }
}
