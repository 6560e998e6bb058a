//! The NBD server within the process, and its exports.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::os::fd::AsRawFd;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;

use holdfast_block::BlockNode;
use holdfast_block::nbd::{Address, BitmapContext, Export, Listener, Server};
use holdfast_block::nodes::{Hold, NamedNode, User};
use holdfast_block::options::SocketKind;
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use super::shown::{BlockExportInfo, BlockExportType};
use super::{Storage, StorageEvents, failed, refused};
use crate::control::ControlError;

/// Clients at a time, unless the server is told otherwise.
const MAX_CONNECTIONS: u32 = 100;

/// The address in QEMU's older spelling: `data` has what belongs to the type.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct AddressData {
    /// A UNIX socket's path.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Name or address of the host.
    #[serde(default)]
    pub host: Option<String>,
    /// The port.
    #[serde(default)]
    pub port: Option<String>,
}

/// Where the server listens.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NbdAddress {
    /// The kind.
    #[serde(rename = "type")]
    pub kind: SocketKind,
    /// The rest, in the older spelling.
    #[serde(default)]
    pub data: Option<AddressData>,
    /// A UNIX socket's path.
    #[serde(default)]
    pub path: Option<PathBuf>,
    /// Name or address of the host.
    #[serde(default)]
    pub host: Option<String>,
    /// The port.
    #[serde(default)]
    pub port: Option<String>,
}

impl NbdAddress {
    fn address(&self) -> Result<Address, ControlError> {
        let flat = AddressData { path: self.path.clone(), host: self.host.clone(), port: self.port.clone() };
        let data = self.data.clone().unwrap_or(flat);
        match (self.kind, data.path, data.host, data.port) {
            (SocketKind::Unix, Some(path), None, None) => Ok(Address::Unix(path)),
            (SocketKind::Unix, ..) => Err(failed("Parameter 'path' is missing")),
            (SocketKind::Inet, None, Some(host), Some(port)) => {
                let port = port.parse().map_err(|_| failed(format!("'{port}' is not a port number")))?;
                Ok(Address::Tcp(host, port))
            }
            (SocketKind::Inet, ..) => Err(failed("Parameters 'host' and 'port' are needed, and no 'path'")),
        }
    }
}

/// The server (`nbd-server-start`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ServerOptions {
    /// Where it listens.
    pub addr: NbdAddress,
    /// Id of its TLS credentials: then plain clients get nothing.
    #[serde(default)]
    pub tls_creds: Option<String>,
    /// Not supported.
    #[serde(default)]
    pub tls_authz: Option<String>,
    /// Clients at a time; 0 for any number.
    #[serde(default)]
    pub max_connections: Option<u32>,
}

/// An export (`block-export-add`).
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct ExportOptions {
    /// Its kind: `nbd`.
    #[serde(rename = "type")]
    pub kind: String,
    /// Its id.
    pub id: String,
    /// Name of the node.
    pub node_name: String,
    /// Clients may write.
    #[serde(default)]
    pub writable: Option<bool>,
    /// Not supported: clients say themselves what is to be durable.
    #[serde(default)]
    pub writethrough: Option<bool>,
    /// What clients call it; the node's name if absent.
    #[serde(default)]
    pub name: Option<String>,
    /// Words for people.
    #[serde(default)]
    pub description: Option<String>,
    /// Names of dirty bitmaps that are offered.
    #[serde(default)]
    pub bitmaps: Option<Vec<String>>,
    /// Offer `qemu:allocation-depth`.
    #[serde(default)]
    pub allocation_depth: Option<bool>,
}

/// The end of an export, once no client has it any more.
#[derive(Debug)]
struct Guard {
    hold: Option<Hold>,
    events: Arc<dyn StorageEvents>,
    id: String,
}

impl Drop for Guard {
    fn drop(&mut self) {
        // Whoever hears of it may delete the node.
        self.hold = None;
        self.events.export_deleted(&self.id);
    }
}

/// An export that is there.
#[derive(Debug)]
struct Entry {
    /// What clients call it.
    name: String,
    node: String,
}

/// A server that runs.
#[derive(Debug)]
struct Running {
    server: Arc<Server>,
    stop: Arc<Stop>,
    thread: Option<JoinHandle<()>>,
}

#[derive(Debug)]
struct Stop {
    asked: AtomicBool,
    wake: EventFd,
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.asked.store(true, Ordering::Release);
        // Its counter is never full.
        let _ = self.stop.wake.write(1);
        self.server.disconnect_all();
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// The server and its exports.
#[derive(Debug, Default)]
pub(super) struct Exports {
    running: Mutex<Option<Running>>,
    all: Mutex<BTreeMap<String, Entry>>,
}

fn bitmap(node: &NamedNode, name: &str, writable: bool) -> Result<Arc<BitmapContext>, ControlError> {
    let found = node
        .inner()
        .ok()
        .and_then(|inner| inner.as_qcow2().and_then(|q| q.bitmaps().into_iter().find(|b| b.name == name)));
    match found {
        None => Err(failed(format!("Bitmap '{name}' is not found"))),
        Some(b) if b.inconsistent => {
            Err(failed(format!("Bitmap '{name}' is inconsistent and cannot be used")))
        }
        Some(b) if b.enabled && (writable || !node.is_readonly()) => {
            Err(failed(format!("Enabled bitmap '{name}' incompatible with a node that is written")))
        }
        Some(bitmap) => Ok(Arc::new(BitmapContext { bitmap })),
    }
}

impl Storage {
    /// Starts the server.
    ///
    /// # Errors
    /// If there is one, or the host or the credentials do not let it listen.
    pub fn start_server(&self, options: &ServerOptions) -> Result<(), ControlError> {
        let mut running = self.exports.running.lock();
        if running.is_some() {
            return Err(failed("NBD server already running"));
        }
        let authz = options.tls_authz.as_deref().map(|id| self.objects.authz(id)).transpose();
        let authz = authz.map_err(|e| failed(e.to_string()))?;
        if authz.is_some() && options.tls_creds.is_none() {
            return Err(failed("'tls-authz' needs 'tls-creds'"));
        }
        let tls = options.tls_creds.as_deref().map(|id| self.objects.tls(id).and_then(|t| t.server()));
        let tls = tls.transpose().map_err(|e| failed(e.to_string()))?;
        let address = options.addr.address()?;
        let wrong = |e| failed(format!("Failed to listen on {address}: {e}"));
        let listener = Listener::bind(&address).map_err(wrong)?;
        let stop = Stop {
            asked: AtomicBool::new(false),
            wake: EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(wrong)?,
        };
        let (server, stop) = (Server::guarded(tls, authz), Arc::new(stop));
        let acceptor = Acceptor {
            listener,
            server: Arc::clone(&server),
            stop: Arc::clone(&stop),
            spawner: Arc::clone(&self.spawner),
            most: options.max_connections.unwrap_or(MAX_CONNECTIONS) as usize,
        };
        let thread = self.spawner.spawn("nbd_accept", Role::Api, Box::new(move || acceptor.run()));
        let thread = Some(thread.map_err(wrong)?);
        *running = Some(Running { server, stop, thread });
        Ok(())
    }

    /// Ends the server, and with it all exports.
    ///
    /// # Errors
    /// If there is none.
    pub fn stop_server(&self) -> Result<(), ControlError> {
        let running = self.exports.running.lock().take();
        if running.is_none() {
            return Err(failed("NBD server not running"));
        }
        self.exports.all.lock().clear();
        Ok(())
    }

    /// Exports a node.
    ///
    /// # Errors
    /// If it cannot be, or is used in a way that excludes it.
    pub fn add_export(&self, options: &ExportOptions) -> Result<(), ControlError> {
        if options.kind != "nbd" {
            return Err(ControlError::unsupported(format_args!("a block export of type '{}'", options.kind)));
        }
        if options.writethrough == Some(true) {
            return Err(ControlError::unsupported("'writethrough'"));
        }
        let running = self.exports.running.lock();
        let Some(running) = &*running else { return Err(failed("NBD server not running")) };
        let mut all = self.exports.all.lock();
        if all.contains_key(&options.id) {
            return Err(failed(format!("Block export id '{}' is already in use", options.id)));
        }
        let node = self.nodes.find(&options.node_name).map_err(refused)?;
        let writable = options.writable.unwrap_or(false);
        if writable && node.is_readonly() {
            return Err(failed("Cannot export read-only node as writable"));
        }
        if writable {
            // What is to come from elsewhere comes through this export, before the VM does.
            node.take().map_err(refused)?;
        }
        let names = options.bitmaps.iter().flatten();
        let bitmaps = names.map(|name| bitmap(&node, name, writable)).collect::<Result<Vec<_>, _>>()?;
        let user = User {
            who: format!("block export '{}'", options.id),
            role: "root",
            writes: writable,
            shares_write: true,
        };
        let hold = Some(node.hold(user).map_err(refused)?);
        let name = options.name.clone().unwrap_or_else(|| options.node_name.clone());
        if running.server.has(&name) {
            return Err(failed(format!("NBD server already has export named '{name}'")));
        }
        let guard = Guard { hold, events: Arc::clone(&self.events), id: options.id.clone() };
        running.server.add(Export {
            name: name.clone(),
            description: options.description.clone(),
            node: node as Arc<dyn BlockNode>,
            readonly: !writable,
            allocation_depth: options.allocation_depth.unwrap_or(false),
            bitmaps,
            multi_conn: true,
            guard: Some(Box::new(guard)),
        });
        all.insert(options.id.clone(), Entry { name, node: options.node_name.clone() });
        Ok(())
    }

    /// Ends an export. Its end is told when the last client is gone, who are sent away if `hard`.
    ///
    /// # Errors
    /// If there is none, or there are clients and it is not `hard`.
    pub fn delete_export(&self, id: &str, hard: bool) -> Result<(), ControlError> {
        let running = self.exports.running.lock();
        let mut all = self.exports.all.lock();
        let found = all.get(id).zip(running.as_ref());
        let (entry, running) = found.ok_or_else(|| failed(format!("Export '{id}' is not found")))?;
        if !hard && running.server.clients_of(&entry.name) != 0 {
            return Err(failed(format!("export '{id}' still in use")));
        }
        running.server.remove(&entry.name);
        running.server.disconnect(&entry.name);
        all.remove(id);
        Ok(())
    }

    /// The id of the export that clients call `name`.
    pub fn export_called(&self, name: &str) -> Option<String> {
        let all = self.exports.all.lock();
        all.iter().find(|(_, e)| e.name == name).map(|(id, _)| id.clone())
    }

    /// `query-block-exports`.
    pub fn exports(&self) -> Vec<BlockExportInfo> {
        let all = self.exports.all.lock();
        let shown = |(id, e): (&String, &Entry)| BlockExportInfo {
            id: id.clone(),
            kind: BlockExportType::Nbd,
            node_name: e.node.clone(),
            shutting_down: false,
        };
        all.iter().map(shown).collect()
    }
}

/// Waits for clients and gives each a thread.
struct Acceptor {
    listener: Listener,
    server: Arc<Server>,
    stop: Arc<Stop>,
    spawner: Arc<dyn Spawner>,
    /// Clients at a time; 0 for any number.
    most: usize,
}

impl Acceptor {
    fn run(self) {
        let mut threads: Vec<JoinHandle<()>> = Vec::new();
        while !self.stop.asked.load(Ordering::Acquire) {
            threads.retain(|t| !t.is_finished());
            let room = self.most == 0 || threads.len() < self.most;
            match self.wait(room) {
                Ok(true) => {}
                Ok(false) => continue,
                Err(error) => {
                    tracing::error!(%error, "the NBD server cannot wait for clients");
                    break;
                }
            }
            // Who has gone again before being looked at is no loss.
            let Ok(socket) = self.listener.accept() else { continue };
            let server = Arc::clone(&self.server);
            let body = Box::new(move || {
                if let Err(error) = server.serve(socket) {
                    tracing::debug!(%error, "an NBD client went");
                }
            });
            match self.spawner.spawn("nbd_client", Role::Nbd, body) {
                Ok(thread) => threads.push(thread),
                Err(error) => tracing::warn!(%error, "no thread for an NBD client"),
            }
        }
        drop(self.listener);
        self.server.disconnect_all();
        for thread in threads {
            let _ = thread.join();
        }
    }

    /// True if a client waits. Without room nobody is let in, and the threads are looked at from time to time.
    fn wait(&self, room: bool) -> io::Result<bool> {
        let poll = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        let mut fds = [poll(self.stop.wake.as_raw_fd()), poll(self.listener.as_raw_fd())];
        let count = if room { 2 } else { 1 };
        // SAFETY: `fds` are two valid pollfds whose descriptors `self` keeps open.
        if unsafe { libc::poll(fds.as_mut_ptr(), count, if room { -1 } else { 100 }) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok(false) } else { Err(error) };
        }
        let [_, listener] = fds;
        Ok(room && listener.revents != 0)
    }
}
