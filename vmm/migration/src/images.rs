//! The images at the target that disks of the source are written into: served over NBD, or filled from sections of the first connection.
//!
//! Each export has the id of its disk, and can be written but not read: it may hold what is not the source's. NBD has no checksums,
//! so both ends keep one over all that was written; they have to agree before the guest runs here.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use holdfast_block::BlockNode;
use holdfast_block::nbd::{Export, Server, Socket};
use holdfast_block::node::{Extent, Preallocation};
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;

use crate::checksum::checksum;
use crate::control::Control;
use crate::frame::{Header, Kind};
use crate::{MigrationError, MirroredDisk, Stream};

/// The checksum of one write of `len` bytes at `offset`: of `data`, or of zeroes if that is empty. The sum of all is that of a disk:
/// which of those under way together comes first makes no difference.
pub(crate) fn tally(offset: u64, len: u64, data: &[u8]) -> u64 {
    let mut head = [0; 16];
    head[..8].copy_from_slice(&offset.to_le_bytes());
    head[8..].copy_from_slice(&len.to_le_bytes());
    checksum(&head, data)
}

fn refused() -> io::Error {
    io::Error::from_raw_os_error(libc::EPERM)
}

/// An image that the source writes into.
#[derive(Debug)]
struct Image {
    node: Arc<dyn BlockNode>,
    control: Arc<Control>,
    /// Of all that was written; see [`tally`].
    sum: AtomicU64,
}

impl Image {
    fn count(&self, offset: u64, len: u64, data: &[u8]) {
        self.sum.fetch_add(tally(offset, len, data), Ordering::AcqRel);
        self.control.counters.transferred.fetch_add(data.len() as u64, Ordering::Relaxed);
    }
}

impl BlockNode for Image {
    fn driver(&self) -> &'static str {
        self.node.driver()
    }

    fn size(&self) -> u64 {
        self.node.size()
    }

    fn is_readonly(&self) -> bool {
        self.node.is_readonly()
    }

    fn read_at(&self, _offset: u64, _buf: &mut [u8]) -> io::Result<()> {
        Err(refused())
    }

    fn write_at(&self, offset: u64, buf: &[u8]) -> io::Result<()> {
        self.count(offset, buf.len() as u64, buf);
        self.node.write_at(offset, buf)
    }

    fn flush(&self) -> io::Result<()> {
        self.node.flush()
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(refused())
    }

    fn write_zeroes(&self, offset: u64, len: u64, unmap: bool) -> io::Result<()> {
        self.count(offset, len, &[]);
        self.node.write_zeroes(offset, len, unmap)
    }

    fn status(&self, _offset: u64, _len: u64) -> io::Result<Extent> {
        Err(refused())
    }

    fn truncate(&self, _size: u64, _preallocation: Preallocation) -> io::Result<()> {
        Err(refused())
    }
}

/// What threads that serve images share.
#[derive(Debug, Default)]
struct Shared {
    /// Why the first of them ended, unless the source just went.
    error: Mutex<Option<io::Error>>,
    /// They are sent home.
    over: AtomicBool,
}

/// A connection that an image is written over.
struct Client {
    socket: Socket,
    thread: Option<JoinHandle<()>>,
}

/// Images that are served. Nothing is written any more once this is dropped.
struct Served {
    server: Arc<Server>,
    images: Vec<Arc<Image>>,
    clients: Vec<Client>,
    shared: Arc<Shared>,
}

impl Drop for Served {
    fn drop(&mut self) {
        self.send_home();
    }
}

impl Served {
    fn send_home(&mut self) {
        self.shared.over.store(true, Ordering::Release);
        for mut client in self.clients.drain(..) {
            client.socket.shut_down();
            if let Some(thread) = client.thread.take() {
                // A panic was reported by the thread itself.
                let _ = thread.join();
            }
        }
    }

    /// Ends all connections; fails unless `theirs` are the sums of what was written.
    fn finish(&mut self, disks: &[MirroredDisk], theirs: &[u8]) -> Result<(), MigrationError> {
        self.send_home();
        let ours = self.images.iter().map(|image| image.sum.load(Ordering::Acquire).to_le_bytes());
        let (theirs, rest) = theirs.as_chunks::<8>();
        if theirs.len() != disks.len() || !rest.is_empty() {
            return Err(MigrationError::Protocol(format!(
                "{} checksums for {} disks",
                theirs.len(),
                disks.len()
            )));
        }
        let altered = disks.iter().zip(ours.zip(theirs)).find(|(_, (ours, theirs))| ours != *theirs);
        match altered {
            Some((disk, _)) => {
                let text = format!("the checksum of what came for disk `{}` is wrong", disk.id);
                Err(MigrationError::Protocol(text))
            }
            None => Ok(()),
        }
    }
}

/// All images of disks that come along.
pub(crate) struct Images<'a> {
    disks: &'a [MirroredDisk],
    nodes: Vec<Arc<dyn BlockNode>>,
    served: Option<Served>,
    /// What the source says that it has sent.
    sums: Option<Vec<u8>>,
}

fn unwritable(source: io::Error) -> MigrationError {
    MigrationError::vm("a disk cannot be written", source)
}

impl<'a> Images<'a> {
    /// The images `nodes` of `disks`, which are checked to fit.
    pub(crate) fn new(
        disks: &'a [MirroredDisk],
        nodes: Vec<Arc<dyn BlockNode>>,
    ) -> Result<Self, MigrationError> {
        if nodes.len() != disks.len() {
            let text = format!("{} disks come along, {} images are here", disks.len(), nodes.len());
            return Err(MigrationError::Differs(text));
        }
        for (place, (MirroredDisk { id, size, .. }, node)) in disks.iter().zip(&nodes).enumerate() {
            let here = node.size();
            if here != *size {
                let text = format!("disk `{id}` has {size} bytes at the source, {here} here");
                return Err(MigrationError::Differs(text));
            }
            if disks.iter().take(place).any(|other| other.id == *id) {
                return Err(MigrationError::Protocol(format!("disk `{id}` comes twice")));
            }
        }
        Ok(Self { disks, nodes, served: None, sums: None })
    }

    /// Serves them over the next connections of the source, which `accept` gets.
    pub(crate) fn serve(
        &mut self,
        control: &Arc<Control>,
        spawner: &dyn Spawner,
        mut accept: impl FnMut() -> Result<Stream, MigrationError>,
    ) -> Result<(), MigrationError> {
        let image = |node: &Arc<dyn BlockNode>| {
            let (node, control) = (Arc::clone(node), Arc::clone(control));
            Arc::new(Image { node, control, sum: AtomicU64::new(0) })
        };
        let images: Vec<Arc<Image>> = self.nodes.iter().map(image).collect();
        let server = Server::new(None);
        for (MirroredDisk { id, .. }, image) in self.disks.iter().zip(&images) {
            server.add(Export {
                name: id.clone(),
                description: None,
                node: Arc::clone(image) as Arc<dyn BlockNode>,
                readonly: false,
                allocation_depth: false,
                bitmaps: Vec::new(),
                multi_conn: false,
                guard: None,
            });
        }
        let served = Served { server, images, clients: Vec::new(), shared: Arc::default() };
        let served = self.served.insert(served);
        for n in 0..self.disks.len() {
            let client = served.start(n, accept()?, control, spawner)?;
            served.clients.push(client);
        }
        Ok(())
    }

    /// Takes a section that is not RAM.
    pub(crate) fn take(&mut self, header: &Header, payload: &[u8]) -> Result<(), MigrationError> {
        match (header.kind, &self.served) {
            (Kind::Disk | Kind::DiskZero, None) => self.put(header, payload),
            (Kind::DiskSums, Some(_)) => {
                self.sums = Some(payload.to_vec());
                Ok(())
            }
            (kind, _) => Err(MigrationError::Protocol(format!("a {kind:?} section that was not agreed on"))),
        }
    }

    /// Why a connection failed, if one did.
    pub(crate) fn failure(&self) -> Option<MigrationError> {
        let error = self.served.as_ref()?.shared.error.lock().take()?;
        Some(MigrationError::broken("receiving a disk")(error))
    }

    /// All has come: nothing is written any more, and what was written is durable.
    pub(crate) fn finish(mut self) -> Result<(), MigrationError> {
        if let Some(mut served) = self.served.take() {
            let sums = self.sums.take();
            let missing = || MigrationError::Protocol("the checksums of the disks are missing".into());
            served.finish(self.disks, &sums.ok_or_else(missing)?)?;
        }
        let flushed = self.nodes.iter().try_for_each(|node| node.flush());
        flushed.map_err(|source| MigrationError::vm("the disks cannot be flushed", source))
    }

    /// Puts a section of a disk where it belongs.
    fn put(&self, header: &Header, payload: &[u8]) -> Result<(), MigrationError> {
        let wrong = || MigrationError::Protocol("a section of a disk that makes no sense".into());
        let (index, data) = payload.split_first_chunk::<4>().ok_or_else(wrong)?;
        let index = u32::from_le_bytes(*index) as usize;
        let (disk, node) = self.disks.get(index).zip(self.nodes.get(index)).ok_or_else(wrong)?;
        let within = |len: u64| header.arg.checked_add(len).is_some_and(|end| end <= disk.size && len > 0);
        if header.kind == Kind::DiskZero {
            let len = u64::from_le_bytes(data.try_into().map_err(|_| wrong())?);
            if !within(len) {
                return Err(wrong());
            }
            return node.write_zeroes(header.arg, len, true).map_err(unwritable);
        }
        if !within(data.len() as u64) {
            return Err(wrong());
        }
        node.write_at(header.arg, data).map_err(unwritable)
    }
}

impl Served {
    /// Serves connection number `n` on a thread of its own.
    fn start(
        &self,
        n: usize,
        stream: Stream,
        control: &Arc<Control>,
        spawner: &dyn Spawner,
    ) -> Result<Client, MigrationError> {
        let stream = holdfast_block::nbd::Stream::from(stream);
        let duplicate = stream.socket().try_clone();
        let socket = duplicate
            .map_err(|source| MigrationError::Host { what: "a connection cannot be duplicated", source })?;
        let (server, shared) = (Arc::clone(&self.server), Arc::clone(&self.shared));
        let control = Arc::clone(control);
        let body = move || {
            let result = server.serve_on(stream);
            if let Err(error) = result
                && !shared.over.load(Ordering::Acquire)
            {
                shared.error.lock().get_or_insert(error);
                // The first connection's thread is not to wait for what no longer comes.
                control.stop_reading();
            }
        };
        let thread = spawner.spawn(&format!("migrate-disk{n}"), Role::Migration, Box::new(body));
        let failed = |source| MigrationError::Host { what: "no thread for a disk", source };
        Ok(Client { socket, thread: Some(thread.map_err(failed)?) })
    }
}
