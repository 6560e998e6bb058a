//! A server: its exports and its clients.

use std::collections::HashMap;
use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use holdfast_objects::tls::ServerConfig;
use parking_lot::{Mutex, RwLock};

use super::proto::transmission;
use super::{Socket, handshake, transmission as requests};
use crate::BlockNode;
use crate::qcow2::bitmap::Bitmap;

/// How long a client may take between two words of the negotiation.
const PATIENCE: Duration = Duration::from_secs(10);

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
}

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
    clients: Mutex<HashMap<u64, Socket>>,
    next: AtomicU64,
    /// Clients that came as far as an export, ever.
    served: AtomicUsize,
}

impl Server {
    /// A server without exports. With `tls`, plain clients get no further than that they need it.
    pub fn new(tls: Option<Arc<ServerConfig>>) -> Arc<Self> {
        Arc::new(Self { tls, ..Self::default() })
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
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        self.clients.lock().insert(id, socket.try_clone()?);
        let result = self.talk(socket);
        if let Some(socket) = self.clients.lock().remove(&id) {
            socket.shut_down();
        }
        result
    }

    fn talk(&self, socket: Socket) -> io::Result<()> {
        socket.set_timeout(Some(PATIENCE))?;
        let Some(session) = handshake::negotiate(self, socket)? else { return Ok(()) };
        session.stream.socket().set_timeout(None)?;
        self.served.fetch_add(1, Ordering::AcqRel);
        requests::serve(session)
    }

    /// Sends all clients away.
    pub fn disconnect_all(&self) {
        self.clients.lock().values().for_each(Socket::shut_down);
    }
}
