//! The connection to a back end and what is agreed on it.

use std::io::{self, Write};
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

/// `VHOST_USER_SEND_RARP`.
const SEND_RARP: u32 = 19;
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

impl Link {
    /// Connects to the back end for `queues` queues. The stream is for watching only. `listen`: what the back end has
    /// to say of its config space is of interest.
    pub(super) fn connect(
        door: &Door,
        queues: usize,
        listen: bool,
        guard: &Guard,
    ) -> Result<(Self, UnixStream), LinkError> {
        let connect = |source| LinkError::Connect { path: door.path().clone(), source };
        let stream = door.open().map_err(connect)?;
        let watched = stream.try_clone().map_err(connect)?;
        let kept = Arc::new(stream.try_clone().map_err(connect)?);
        let frontend = Frontend::from_stream(stream, queues as u64);
        let (features, protocol, news) =
            guard.during(&kept, || Self::negotiate(&frontend, queues, listen))??;
        Ok((Self { frontend, news, stream: kept, guard: guard.clone(), features, protocol }, watched))
    }

    fn negotiate(
        frontend: &Frontend,
        queues: usize,
        listen: bool,
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
            if listen {
                known |= VhostUserProtocolFeatures::BACKEND_REQ;
            }
            protocol = failed("GET_PROTOCOL_FEATURES", frontend.get_protocol_features())? & known;
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
        let channel = VhostUserProtocolFeatures::BACKEND_REQ | VhostUserProtocolFeatures::CONFIG;
        let news = match protocol.contains(channel) {
            true => Some(News::open(&mut frontend, protocol.contains(VhostUserProtocolFeatures::REPLY_ACK))?),
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
        for word in [SEND_RARP, 1, 8] {
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
