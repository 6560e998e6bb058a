//! The connection to a back end and what is agreed on it.

use std::io::{self, Read, Write};
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::time::Duration;

use holdfast_memory::GuestMemory;
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserHeaderFlag,
    VhostUserProtocolFeatures, VhostUserVirtioFeatures,
};
use vhost::vhost_user::{Frontend, VhostUserFrontend};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::door::Door;
use super::news::News;
use super::ring::{RelayRing, SharedRings};
use crate::device::feature;
use crate::shared_memory::SharedMemory;

/// `VHOST_USER_SEND_RARP`.
const SEND_RARP: u32 = 19;
/// `VHOST_USER_GET_SHMEM_CONFIG`, and the most that its answer may have: a count, padding, 256 sizes.
const GET_SHMEM_CONFIG: u32 = 44;
const SHMEM_CONFIG_LEN: usize = 8 + 256 * 8;
/// Version 1 of the protocol, and an answer in it.
const VERSION: u32 = 1;
const REPLY: u32 = VERSION | 1 << 2;
/// How long a back end may take for an answer.
const PATIENCE: Duration = Duration::from_secs(if cfg!(test) { 1 } else { 10 });

/// Why there is no use in a back end.
#[derive(Debug, thiserror::Error)]
pub(super) enum LinkError {
    #[error("cannot connect to `{}`", path.display())]
    Connect { path: PathBuf, source: io::Error },
    #[error("the back end fails at {what}")]
    Protocol { what: &'static str, source: vhost::Error },
    #[error("the back end lacks virtio 1")]
    Legacy,
    #[error("the back end has no features {missing:#x}, which the guest uses")]
    Features { missing: u64 },
    #[error("the back end has {offered} queues, {wanted} are asked for")]
    Queues { offered: u64, wanted: usize },
    #[error("the guest's RAM is not shared: set `shared=on` in the memory's options")]
    Private,
    #[error("the rings cannot be shared")]
    Rings,
    #[error("the back end's shared memory cannot be used: {reason}")]
    SharedMemory { reason: String },
}

/// Ends the connection of a back end that does not answer. (The protocol's library waits for an answer for ever,
/// whatever the socket's own timeout.)
#[derive(Debug, Clone)]
pub(super) struct Guard(Arc<Mutex<Sender<Option<UnixStream>>>>);

impl Guard {
    /// Starts the thread that waits.
    pub(super) fn start(id: &str, spawner: &dyn Spawner) -> io::Result<Self> {
        let (begin, inbox) = channel::<Option<UnixStream>>();
        let wait = move || {
            while let Ok(started) = inbox.recv() {
                let Some(stream) = started else { continue };
                match inbox.recv_timeout(PATIENCE) {
                    Ok(_) => {}
                    Err(RecvTimeoutError::Timeout) => {
                        tracing::warn!("a vhost-user back end does not answer; its connection is closed");
                        // It is closed on the other side at least as well as here.
                        let _ = stream.shutdown(std::net::Shutdown::Both);
                        // The end of the call that was waited for.
                        let _ = inbox.recv();
                    }
                    Err(RecvTimeoutError::Disconnected) => return,
                }
            }
        };
        spawner.spawn(&format!("{id}-guard"), Role::BackEnd, Box::new(wait))?;
        Ok(Self(Arc::new(Mutex::new(begin))))
    }

    /// Makes `call`, which waits for answers on `stream`.
    pub(super) fn during<T>(&self, stream: &UnixStream, call: impl FnOnce() -> T) -> Result<T, LinkError> {
        let gone = |source| LinkError::Protocol { what: "its socket", source: host_error(source) };
        let watched = stream.try_clone().map_err(gone)?;
        let sender = self.0.lock();
        let closed = |_| gone(io::ErrorKind::BrokenPipe.into());
        sender.send(Some(watched)).map_err(closed)?;
        let result = call();
        sender.send(None).map_err(closed)?;
        Ok(result)
    }
}

/// A connection on which features are agreed.
#[derive(Clone)]
pub(super) struct Link {
    frontend: Frontend,
    news: Option<News>,
    stream: Arc<UnixStream>,
    guard: Guard,
    /// Those of the device, its queues and of vhost-user itself.
    features: u64,
    protocol: VhostUserProtocolFeatures,
}

impl std::fmt::Debug for Link {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Link").field("features", &self.features).finish_non_exhaustive()
    }
}

/// An error of the host in the library's terms.
pub(super) fn host_error(source: io::Error) -> vhost::Error {
    vhost::Error::VhostUserProtocol(vhost::vhost_user::Error::ReqHandlerError(source))
}

pub(super) fn failed<T>(what: &'static str, result: Result<T, vhost::Error>) -> Result<T, LinkError> {
    result.map_err(|source| LinkError::Protocol { what, source })
}

/// Whether the other side of `socket` is gone.
pub(super) fn has_ended(socket: &UnixStream) -> bool {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut fds = [PollFd::new(socket, PollFlags::IN)];
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let polled = poll(&mut fds, Some(&now)).is_ok();
    polled && fds.iter().any(|fd| fd.revents().intersects(PollFlags::HUP | PollFlags::ERR | PollFlags::NVAL))
}

/// The sizes of the back end's shared memory regions by their numbers, which the library has no way to ask for.
fn shared_regions(mut stream: &UnixStream) -> io::Result<Vec<u64>> {
    let request: Vec<u8> =
        [GET_SHMEM_CONFIG, VERSION, 0].iter().flat_map(|word| word.to_le_bytes()).collect();
    stream.write_all(&request)?;
    let mut header = [[0; 4]; 3];
    for word in &mut header {
        stream.read_exact(word)?;
    }
    let [what, flags, len] = header.map(u32::from_le_bytes);
    let len = len as usize;
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "that is no answer");
    if what != GET_SHMEM_CONFIG
        || flags != REPLY
        || !(8..=SHMEM_CONFIG_LEN).contains(&len)
        || !len.is_multiple_of(8)
    {
        return Err(wrong());
    }
    let mut body = vec![0; len];
    stream.read_exact(&mut body)?;
    let (words, _) = body.as_chunks::<8>();
    let mut words = words.iter().map(|word| u64::from_le_bytes(*word));
    let count = words.next().ok_or_else(wrong)? & 0xffff_ffff;
    let sizes: Vec<u64> = words.collect();
    match sizes.iter().filter(|size| **size != 0).count() as u64 == count {
        true => Ok(sizes),
        false => Err(wrong()),
    }
}

impl Link {
    /// Connects to the back end for `queues` queues. The stream is for watching only. `listen`: what the back end has
    /// to say of its config space is of interest. `shared` is what it may show to the guest.
    pub(super) fn connect(
        door: &Door,
        queues: usize,
        (listen, shared): (bool, Option<&Arc<SharedMemory>>),
        guard: &Guard,
    ) -> Result<(Self, UnixStream), LinkError> {
        let connect = |source| LinkError::Connect { path: door.path().clone(), source };
        let stream = door.open().map_err(connect)?;
        let watched = stream.try_clone().map_err(connect)?;
        let kept = Arc::new(stream.try_clone().map_err(connect)?);
        let frontend = Frontend::from_stream(stream, queues as u64);
        let (features, protocol, news) =
            guard.during(&kept, || Self::negotiate(&frontend, &kept, queues, (listen, shared)))??;
        Ok((Self { frontend, news, stream: kept, guard: guard.clone(), features, protocol }, watched))
    }

    fn negotiate(
        frontend: &Frontend,
        stream: &UnixStream,
        queues: usize,
        (listen, shared): (bool, Option<&Arc<SharedMemory>>),
    ) -> Result<(u64, VhostUserProtocolFeatures, Option<News>), LinkError> {
        let mut frontend = frontend.clone();
        failed("SET_OWNER", frontend.set_owner())?;
        let features = failed("GET_FEATURES", frontend.get_features())?;
        if features & feature::VERSION_1 == 0 {
            return Err(LinkError::Legacy);
        }
        let mut protocol = VhostUserProtocolFeatures::empty();
        if features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0 {
            let mut known = VhostUserProtocolFeatures::MQ
                | VhostUserProtocolFeatures::REPLY_ACK
                | VhostUserProtocolFeatures::CONFIG
                | VhostUserProtocolFeatures::RARP
                | VhostUserProtocolFeatures::DEVICE_STATE;
            if listen || shared.is_some() {
                known |= VhostUserProtocolFeatures::BACKEND_REQ;
            }
            if shared.is_some() {
                known |= VhostUserProtocolFeatures::SHMEM;
            }
            protocol = failed("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())? & known;
            if !protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ) {
                // It has no way to say what is to be mapped.
                protocol.remove(VhostUserProtocolFeatures::SHMEM);
            }
            failed("SET_PROTOCOL_FEATURES", frontend.set_protocol_features(protocol))?;
        }
        if protocol.contains(VhostUserProtocolFeatures::MQ) {
            let offered = failed("GET_QUEUE_NUM", frontend.get_queue_num())?;
            if offered < queues as u64 {
                return Err(LinkError::Queues { offered, wanted: queues });
            }
        }
        if protocol.contains(VhostUserProtocolFeatures::REPLY_ACK) {
            frontend.set_hdr_flags(VhostUserHeaderFlag::NEED_REPLY);
        }
        let has_shared = protocol.contains(VhostUserProtocolFeatures::SHMEM);
        if let Some(shared) = shared {
            let sizes = match has_shared {
                true => shared_regions(stream).map_err(|source| LinkError::Protocol {
                    what: "GET_SHMEM_CONFIG",
                    source: host_error(source),
                })?,
                false => Vec::new(),
            };
            shared.agree(&sizes).map_err(|reason| LinkError::SharedMemory { reason })?;
        }
        let says_config = listen && protocol.contains(VhostUserProtocolFeatures::CONFIG);
        let channel = protocol.contains(VhostUserProtocolFeatures::BACKEND_REQ);
        let news = match channel && (says_config || has_shared) {
            true => {
                let acknowledged = protocol.contains(VhostUserProtocolFeatures::REPLY_ACK);
                Some(News::open(&mut frontend, acknowledged, shared.filter(|_| has_shared))?)
            }
            false => None,
        };
        Ok((features, protocol, news))
    }

    /// Becomes readable when the back end has something to say.
    pub(super) fn news_fd(&self) -> Option<RawFd> {
        self.news.as_ref().map(News::fd)
    }

    /// Hears what the back end has to say. True: its config space is another one.
    pub(super) fn hear(&self) -> Result<bool, LinkError> {
        self.news.as_ref().map_or(Ok(false), |news| news.hear(&self.guard))
    }

    /// Lets the back end serve a ring, or not.
    pub(super) fn enable_ring(&mut self, queue: u16, on: bool) -> Result<(), LinkError> {
        self.call(|f| failed("SET_VRING_ENABLE", f.set_vring_enable(usize::from(queue), on)))
    }

    /// Makes a call that the back end answers.
    fn call<T>(&mut self, call: impl FnOnce(&mut Frontend) -> Result<T, LinkError>) -> Result<T, LinkError> {
        let (guard, mut frontend) = (self.guard.clone(), self.frontend.clone());
        guard.during(&self.stream, || call(&mut frontend))?
    }

    /// All features that the back end offers.
    pub(super) fn features(&self) -> u64 {
        self.features
    }

    /// Whether its config space can be read.
    pub(super) fn has_config(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::CONFIG)
    }

    /// Whether its own state can be carried away.
    pub(super) fn has_state(&self) -> bool {
        self.protocol.contains(VhostUserProtocolFeatures::DEVICE_STATE)
    }

    /// Asks the back end to announce `mac` by a packet of its own, if it can.
    pub(super) fn send_rarp(&mut self, mac: [u8; 6]) -> Result<(), LinkError> {
        if !self.protocol.contains(VhostUserProtocolFeatures::RARP) {
            return Ok(());
        }
        // The library has no way to say it. Request, version, size; then the address in eight bytes.
        let mut message = Vec::new();
        for word in [SEND_RARP, VERSION, 8] {
            message.extend(word.to_le_bytes());
        }
        message.extend(mac);
        message.extend([0; 2]);
        let sent = self.guard.during(&self.stream, || (&*self.stream).write_all(&message))?;
        sent.map_err(|source| LinkError::Protocol { what: "SEND_RARP", source: host_error(source) })
    }

    /// Carries the back end's own state through `fd`, of which `carry` has the other end.
    pub(super) fn transfer(
        &mut self,
        direction: VhostTransferStateDirection,
        fd: OwnedFd,
        carry: impl FnOnce() -> io::Result<()>,
    ) -> Result<(), LinkError> {
        let what = "SET_DEVICE_STATE_FD";
        let io = |source| LinkError::Protocol { what, source: host_error(source) };
        self.call(|f| {
            let other = f.set_device_state_fd(direction, VhostTransferStatePhase::STOPPED, fd);
            if failed(what, other)?.is_some() {
                return Err(io(io::Error::new(io::ErrorKind::Unsupported, "it wants another pipe")));
            }
            carry().map_err(io)?;
            failed("CHECK_DEVICE_STATE", f.check_device_state())
        })
    }

    /// The first `len` bytes of the config space.
    pub(super) fn config(&mut self, len: u32) -> Result<Vec<u8>, LinkError> {
        let buffer = vec![0; len as usize];
        let flags = VhostUserConfigFlags::empty();
        let read = |f: &mut Frontend| failed("GET_CONFIG", f.get_config(0, len, flags, &buffer));
        let (_, mut bytes) = self.call(read)?;
        bytes.resize(len as usize, 0);
        Ok(bytes)
    }

    /// Writes `data` at `offset` of the config space.
    pub(super) fn set_config(&mut self, offset: u32, data: &[u8]) -> Result<(), LinkError> {
        // What the driver writes; other flags are for migration.
        let flags = VhostUserConfigFlags::empty();
        self.call(|f| failed("SET_CONFIG", f.set_config(offset, flags, data)))
    }

    /// Tells the back end what the driver chose and where RAM is. `features` are those of the guest.
    pub(super) fn set_up(
        &mut self,
        features: u64,
        memory: &GuestMemory,
        rings: &SharedRings,
    ) -> Result<(), LinkError> {
        // How the guest is notified is our own affair.
        let wanted = features & !(feature::EVENT_IDX | feature::INDIRECT_DESC);
        let missing = wanted & !self.features;
        if missing != 0 {
            return Err(LinkError::Features { missing });
        }
        let own = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        self.call(|f| failed("SET_FEATURES", f.set_features(wanted | own)))?;
        let mut regions = Vec::new();
        for region in memory.iter() {
            let info = VhostUserMemoryRegionInfo::from_guest_region(region);
            regions.push(info.map_err(|_| LinkError::Private)?);
        }
        regions.push(rings.info().ok_or(LinkError::Rings)?);
        self.call(|f| failed("SET_MEM_TABLE", f.set_mem_table(&regions)).map(|_| ()))
    }

    /// Starts one ring, which the back end is to serve at once if it is `enabled`.
    pub(super) fn start_ring(
        &mut self,
        queue: u16,
        rings: &SharedRings,
        (ring, enabled): (&RelayRing, bool),
        (call, kick): (&EventFd, &EventFd),
    ) -> Result<(), LinkError> {
        let index = usize::from(queue);
        let (desc, avail, used) = rings.addresses(queue).ok_or(LinkError::Rings)?;
        let data = VringConfigData {
            queue_max_size: ring.size(),
            queue_size: ring.size(),
            flags: 0,
            desc_table_addr: desc,
            used_ring_addr: used,
            avail_ring_addr: avail,
            log_addr: None,
        };
        let enable = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        self.call(|f| {
            failed("SET_VRING_NUM", f.set_vring_num(index, ring.size()))?;
            failed("SET_VRING_ADDR", f.set_vring_addr(index, &data))?;
            failed("SET_VRING_BASE", f.set_vring_base(index, 0))?;
            failed("SET_VRING_CALL", f.set_vring_call(index, call))?;
            failed("SET_VRING_KICK", f.set_vring_kick(index, kick))?;
            if enable {
                failed("SET_VRING_ENABLE", f.set_vring_enable(index, enabled))?;
            }
            Ok(())
        })
    }

    /// Stops one ring: the back end does not look at it any more when this returns.
    pub(super) fn stop_ring(&mut self, queue: u16) -> Result<(), LinkError> {
        self.call(|f| failed("GET_VRING_BASE", f.get_vring_base(usize::from(queue))).map(|_| ()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What is made of this answer.
    fn answered(words: [u32; 3], body: &[u8]) -> io::Result<Vec<u64>> {
        let (ours, mut theirs) = UnixStream::pair()?;
        for word in words {
            theirs.write_all(&word.to_le_bytes())?;
        }
        theirs.write_all(body)?;
        let result = shared_regions(&ours);
        let mut asked = [0; 12];
        theirs.read_exact(&mut asked)?;
        assert_eq!(asked, [44, 0, 0, 0, 1, 0, 0, 0, 0, 0, 0, 0]);
        result
    }

    #[test]
    fn sizes_of_shared_memory_are_those_that_are_said_or_none() {
        let body = |count: u32, sizes: &[u64]| {
            let mut body = u64::from(count).to_le_bytes().to_vec();
            body.extend(sizes.iter().flat_map(|size| size.to_le_bytes()));
            body
        };
        let good = body(2, &[0x1000, 0, 0x2000]);
        let len = good.len() as u32;
        assert_eq!(answered([44, 5, len], &good).expect("good"), [0x1000, 0, 0x2000]);
        assert!(answered([44, 5, 8], &body(0, &[])).expect("none").is_empty());
        let all = body(256, &[0x1000; 256]);
        assert_eq!(answered([44, 5, all.len() as u32], &all).expect("many").len(), 256);
        for (words, body) in [
            ([45, 5, len], &good),
            ([44, 1, len], &good),
            ([44, 5, len - 1], &good),
            ([44, 5, 4], &good),
            ([44, 5, all.len() as u32 + 8], &all),
            ([44, 5, u32::MAX], &good),
            ([44, 5, len], &body(3, &[0x1000, 0, 0x2000])),
        ] {
            assert!(answered(words, body).is_err(), "{words:?}");
        }
    }
}
