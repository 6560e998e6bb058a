//! What one front end has said, and what follows from it.

use std::fmt;
use std::fs::File;
use std::io;
use std::os::fd::{FromRawFd, IntoRawFd, OwnedFd};
use std::sync::Arc;

use holdfast_memory::{GuestMemory, Tracked};
use parking_lot::Mutex;
use rustix::fs::OFlags;
use vhost::VhostUserMemoryRegionBase;
use vhost::vhost_user::message::{
    VhostTransferStateDirection, VhostTransferStatePhase, VhostUserConfigFlags, VhostUserInflight,
    VhostUserLog, VhostUserMemoryRegion, VhostUserProtocolFeatures, VhostUserShMemConfig, VhostUserSharedMsg,
    VhostUserSingleMemoryRegion, VhostUserVirtioFeatures, VhostUserVringAddrFlags, VhostUserVringState,
};
use vhost::vhost_user::{Error, GpuBackend, Result, VhostUserBackendReqHandlerMut};
use virtio_queue::QueueState;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::EventFd;

use super::log::DirtyLog;
use super::memory::{MAX_REGIONS, Range, SharedRam};
use crate::device::{Interrupt, VirtioDevice, feature, kind};
use crate::in_flight::InFlightArea;
use crate::queue::VirtQueue;
use crate::worker::Activation;

/// Bytes of config space that a front end may ask for at once (QEMU's `VHOST_USER_MAX_CONFIG_SIZE`).
const MAX_CONFIG: u32 = 256;

/// How the front end is told of something.
#[derive(Default)]
pub(super) struct Doorbells {
    calls: Mutex<Vec<Option<EventFd>>>,
    errors: Mutex<Vec<Option<EventFd>>>,
    /// The second channel.
    channel: Mutex<Option<OwnedFd>>,
    /// The log of written pages, while there is to be one, and what is written.
    log: Mutex<Option<(Arc<DirtyLog>, GuestMemory)>>,
}

impl fmt::Debug for Doorbells {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Doorbells").finish_non_exhaustive()
    }
}

impl Doorbells {
    /// Where the front end listens.
    pub(super) fn set_channel(&self, fd: OwnedFd) {
        *self.channel.lock() = Some(fd);
    }

    /// Notes what was written, if the front end wants to know.
    fn note_written(&self) {
        if let Some((log, memory)) = &*self.log.lock() {
            log.take(memory);
        }
    }
}

impl Interrupt for Doorbells {
    fn queue(&self, queue: u16) {
        self.note_written();
        if let Some(Some(call)) = self.calls.lock().get(usize::from(queue)) {
            // A full counter rings as well.
            let _ = call.write(1);
        }
    }

    fn config_changed(&self) {
        let channel = self.channel.lock();
        let Some(channel) = &*channel else { return };
        if let Err(error) = super::channel::say_config_changed(channel) {
            tracing::warn!(%error, "the front end does not hear of the changed config space");
        }
    }

    fn needs_reset(&self) {
        for error in self.errors.lock().iter().flatten() {
            let _ = error.write(1);
        }
    }
}

/// A ring as the front end has set it up. The addresses are the front end's.
#[derive(Debug, Default)]
struct Ring {
    size: u16,
    desc: u64,
    avail: u64,
    used: u64,
    /// The next available entry to look at.
    base: u16,
    kick: Option<Arc<EventFd>>,
    enabled: bool,
}

/// A connected front end.
pub(super) struct Session {
    device: Arc<dyn VirtioDevice>,
    doorbells: Arc<Doorbells>,
    ram: SharedRam,
    /// Rung when RAM is not there any more.
    alarm: Arc<EventFd>,
    /// Where requests under way are noted, if the front end keeps that for a successor.
    in_flight: Option<InFlightArea>,
    /// Where written pages are noted once that is asked for.
    log: Option<Arc<DirtyLog>>,
    rings: Vec<Ring>,
    /// What the driver chose, and bit 30.
    features: u64,
    /// The device has queues.
    active: bool,
}

fn refuse(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let cause = error.source().map(|cause| format!(": {cause}")).unwrap_or_default();
    tracing::warn!("{error}{cause}");
    Error::ReqHandlerError(io::Error::other(error))
}

fn wrong(text: &str) -> Error {
    tracing::warn!("the front end asks for what cannot be: {text}");
    Error::ReqHandlerError(io::Error::new(io::ErrorKind::InvalidInput, text.to_owned()))
}

/// Of a message that is answered only if it can be done: who waits for the answer learns by the connection's end.
fn last(error: impl std::error::Error + Send + Sync + 'static) -> Error {
    let _ = refuse(error);
    Error::InvalidParam
}

/// What a front end was not offered. Ends the connection.
fn absent<T>(what: &'static str) -> Result<T> {
    Err(Error::InvalidOperation(what))
}

/// An eventfd that came with a message. Writing to it never blocks.
fn eventfd(file: File) -> Result<EventFd> {
    let flags = rustix::fs::fcntl_getfl(&file).map_err(|e| Error::ReqHandlerError(e.into()))?;
    rustix::fs::fcntl_setfl(&file, flags | OFlags::NONBLOCK).map_err(|e| Error::ReqHandlerError(e.into()))?;
    // SAFETY: the descriptor is open, and `into_raw_fd` gives it away.
    Ok(unsafe { EventFd::from_raw_fd(file.into_raw_fd()) })
}

impl Session {
    pub(super) fn new(device: Arc<dyn VirtioDevice>, alarm: Arc<EventFd>) -> Self {
        let rings = device.queue_sizes().iter().map(|_| Ring::default()).collect::<Vec<_>>();
        let doorbells = Doorbells {
            calls: Mutex::new(rings.iter().map(|_| None).collect()),
            errors: Mutex::new(rings.iter().map(|_| None).collect()),
            channel: Mutex::default(),
            log: Mutex::default(),
        };
        let (doorbells, ram) = (Arc::new(doorbells), SharedRam::default());
        Self { device, doorbells, ram, alarm, in_flight: None, log: None, rings, features: 0, active: false }
    }

    pub(super) fn doorbells(&self) -> Arc<Doorbells> {
        Arc::clone(&self.doorbells)
    }

    fn ring(&mut self, index: u32) -> Result<&mut Ring> {
        let ring = usize::try_from(index).ok().and_then(|n| self.rings.get_mut(n));
        ring.ok_or_else(|| wrong("a ring that is not there"))
    }

    /// Takes the queues back from the device and notes where they stand.
    fn halt(&mut self) {
        if !std::mem::take(&mut self.active) {
            return;
        }
        for queue in self.device.stop() {
            if let Some(ring) = self.rings.get_mut(usize::from(queue.index())) {
                ring.base = queue.state().next_avail;
            }
        }
        self.doorbells.note_written();
    }

    /// The queue of a ring that is to run.
    fn queue(&self, index: u16, ring: &Ring) -> Result<Option<VirtQueue>> {
        let protocol = self.features & VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits() != 0;
        // Without protocol features rings are enabled from the start.
        let Some(kick) = ring.kick.as_ref().filter(|_| ring.enabled || !protocol) else { return Ok(None) };
        let gpa = |user| self.ram.guest_address(user).ok_or_else(|| wrong("a ring that is not in RAM"));
        let (desc_table, avail_ring, used_ring) = (gpa(ring.desc)?, gpa(ring.avail)?, gpa(ring.used)?);
        let memory = self.ram.memory();
        // Where the used ring stands is written in it.
        let next_used: u16 =
            used_ring.checked_add(2).and_then(|at| memory.read_obj(GuestAddress(at)).ok()).unwrap_or(0);
        let state = QueueState {
            max_size: ring.size,
            next_avail: ring.base,
            next_used: u16::from_le(next_used),
            event_idx_enabled: self.features & feature::EVENT_IDX != 0,
            size: ring.size,
            ready: true,
            desc_table,
            avail_ring,
            used_ring,
        };
        let queue = VirtQueue::new(index, state, memory, Arc::clone(kick)).map_err(refuse)?;
        let area = self.in_flight.as_ref().and_then(|area| area.queue(index, ring.size));
        Ok(Some(match area {
            Some(area) => queue.with_in_flight(area),
            None => queue,
        }))
    }

    /// Lets RAM note what is written to it, or not any more.
    fn watch_writes(&self) {
        let wanted = self.features & VhostUserVirtioFeatures::LOG_ALL.bits() != 0;
        let log = self.log.as_ref().filter(|_| wanted);
        for region in self.ram.memory().iter() {
            match log {
                Some(_) if region.bitmap_tracker().logging() => {}
                Some(_) => region.bitmap_tracker().start_log(),
                None => region.bitmap_tracker().stop_log(),
            }
        }
        let log = log.map(|log| (Arc::clone(log), self.ram.memory().clone()));
        *self.doorbells.log.lock() = log;
    }

    /// What drivers and front ends may choose of.
    fn offered(&self) -> u64 {
        let own = VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL;
        self.device.features() | own.bits()
    }

    /// Gives the device all rings that are to run.
    fn go(&mut self) -> Result<()> {
        self.halt();
        self.watch_writes();
        if self.ram.is_empty() {
            return Ok(());
        }
        let mut queues = Vec::new();
        let mut result = Ok(());
        for (index, ring) in (0..).zip(&self.rings) {
            match self.queue(index, ring) {
                Ok(queue) => queues.extend(queue),
                Err(error) => result = Err(error),
            }
        }
        if queues.is_empty() {
            return result;
        }
        if self.features & feature::VERSION_1 == 0 {
            return Err(wrong("a driver older than virtio 1"));
        }
        let started: Vec<u16> = queues.iter().map(VirtQueue::index).collect();
        let interrupt: Arc<dyn Interrupt> = Arc::clone(&self.doorbells) as Arc<dyn Interrupt>;
        let features = self.features & self.device.features();
        self.active = true;
        self.device.activate(Activation { queues, features, memory: self.ram.memory().clone(), interrupt });
        for queue in started {
            // Something may have been finished that nobody was told of.
            self.doorbells.queue(queue);
        }
        result
    }

    fn change(&mut self, index: u32, change: impl FnOnce(&mut Ring)) -> Result<()> {
        self.ring(index)?;
        self.halt();
        change(self.ring(index)?);
        self.go()
    }

    fn use_ram(&mut self, ram: SharedRam) -> Result<()> {
        self.halt();
        self.ram = ram;
        self.go()
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        self.halt();
        self.device.reset();
    }
}

impl VhostUserBackendReqHandlerMut for Session {
    fn set_owner(&mut self) -> Result<()> {
        Ok(())
    }

    fn reset_owner(&mut self) -> Result<()> {
        self.reset_device()
    }

    fn reset_device(&mut self) -> Result<()> {
        self.halt();
        self.device.reset();
        for ring in &mut self.rings {
            *ring = Ring::default();
        }
        Ok(())
    }

    fn get_features(&mut self) -> Result<u64> {
        Ok(self.offered())
    }

    fn set_features(&mut self, features: u64) -> Result<()> {
        if features & !self.offered() != 0 {
            return Err(wrong("features that were not offered"));
        }
        if features != self.features {
            self.halt();
            self.features = features;
            return self.go();
        }
        Ok(())
    }

    fn set_mem_table(
        &mut self,
        regions: &[VhostUserMemoryRegion],
        files: Vec<File>,
        _postcopy: Option<bool>,
    ) -> Result<Option<Vec<VhostUserMemoryRegionBase>>> {
        let ranges = regions.iter().map(Range::from).zip(files);
        let ram = SharedRam::new(ranges, &self.alarm).map_err(refuse)?;
        self.use_ram(ram).map(|()| None)
    }

    fn set_vring_num(&mut self, index: u32, num: u32) -> Result<()> {
        let most = usize::try_from(index).ok().and_then(|n| self.device.queue_sizes().get(n).copied());
        let size = u16::try_from(num).ok().filter(|n| n.is_power_of_two());
        let Some(size) = size.filter(|size| most.is_some_and(|most| *size <= most)) else {
            tracing::warn!(num, most, "a ring larger than `queue_size`, or of no power of two");
            return Err(wrong("a ring of this size"));
        };
        self.change(index, |ring| ring.size = size)
    }

    fn set_vring_addr(
        &mut self,
        index: u32,
        _flags: VhostUserVringAddrFlags,
        descriptor: u64,
        used: u64,
        available: u64,
        _log: u64,
    ) -> Result<()> {
        self.change(index, |ring| (ring.desc, ring.used, ring.avail) = (descriptor, used, available))
    }

    fn set_vring_base(&mut self, index: u32, base: u32) -> Result<()> {
        let base = u16::try_from(base).map_err(|_| wrong("a ring position of more than 16 bits"))?;
        self.change(index, |ring| ring.base = base)
    }

    fn get_vring_base(&mut self, index: u32) -> Result<VhostUserVringState> {
        self.ring(index)?;
        // The answer is waited for, whatever becomes of the other rings.
        if let Err(error) = self.change(index, |ring| ring.kick = None) {
            tracing::warn!(%error, "the other rings do not go on");
        }
        let base = self.ring(index)?.base;
        Ok(VhostUserVringState::new(index, u32::from(base)))
    }

    fn set_vring_kick(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        let file = fd.ok_or_else(|| wrong("a ring that is polled"))?;
        let kick = Arc::new(eventfd(file)?);
        self.change(u32::from(index), |ring| ring.kick = Some(kick))
    }

    fn set_vring_call(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?;
        let call = fd.map(eventfd).transpose()?;
        if let Some(place) = self.doorbells.calls.lock().get_mut(usize::from(index)) {
            *place = call;
        }
        // Something may have been finished that the last one was told of in vain.
        self.doorbells.queue(u16::from(index));
        Ok(())
    }

    fn set_vring_err(&mut self, index: u8, fd: Option<File>) -> Result<()> {
        self.ring(u32::from(index))?;
        let error = fd.map(eventfd).transpose()?;
        if let Some(place) = self.doorbells.errors.lock().get_mut(usize::from(index)) {
            *place = error;
        }
        Ok(())
    }

    fn get_protocol_features(&mut self) -> Result<VhostUserProtocolFeatures> {
        let mut features = VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::REPLY_ACK
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::BACKEND_REQ
            | VhostUserProtocolFeatures::RESET_DEVICE
            | VhostUserProtocolFeatures::LOG_SHMFD
            | VhostUserProtocolFeatures::CONFIGURE_MEM_SLOTS;
        // A network card's buffers are never under way: what is lost is sent again by others.
        if self.device.device_type() == kind::BLOCK {
            features |= VhostUserProtocolFeatures::INFLIGHT_SHMFD;
        }
        Ok(features)
    }

    fn set_protocol_features(&mut self, features: u64) -> Result<()> {
        let offered = self.get_protocol_features()?.bits();
        if features & !offered != 0 {
            return Err(wrong("protocol features that were not offered"));
        }
        Ok(())
    }

    fn get_queue_num(&mut self) -> Result<u64> {
        Ok(self.rings.len() as u64)
    }

    fn set_vring_enable(&mut self, index: u32, enable: bool) -> Result<()> {
        self.change(index, |ring| ring.enabled = enable)
    }

    fn get_config(&mut self, offset: u32, size: u32, _flags: VhostUserConfigFlags) -> Result<Vec<u8>> {
        if size > MAX_CONFIG {
            return Err(wrong("more config space than there is"));
        }
        let mut bytes = vec![0; size as usize];
        self.device.read_config(u64::from(offset), &mut bytes);
        Ok(bytes)
    }

    fn set_config(&mut self, offset: u32, data: &[u8], _flags: VhostUserConfigFlags) -> Result<()> {
        self.device.write_config(u64::from(offset), data);
        Ok(())
    }

    fn set_gpu_socket(&mut self, _gpu: GpuBackend) -> Result<()> {
        absent("a GPU")
    }

    fn get_shared_object(&mut self, _uuid: VhostUserSharedMsg) -> Result<File> {
        absent("shared objects")
    }

    fn get_inflight_fd(&mut self, inflight: &VhostUserInflight) -> Result<(VhostUserInflight, File)> {
        let (queues, size) = (inflight.num_queues, inflight.queue_size);
        let most = self.device.queue_sizes().into_iter().max().unwrap_or(0);
        if usize::from(queues) > self.rings.len() || size > most {
            return absent("an area of requests in flight for more queues, or larger ones, than there are");
        }
        let file = InFlightArea::create(queues, size).map_err(last)?;
        Ok((VhostUserInflight::new(InFlightArea::len(queues, size), 0, queues, size), file))
    }

    fn set_inflight_fd(&mut self, inflight: &VhostUserInflight, file: File) -> Result<()> {
        let range = (inflight.mmap_offset, inflight.mmap_size);
        let area =
            InFlightArea::map(file, range, inflight.num_queues, inflight.queue_size).map_err(refuse)?;
        self.halt();
        self.in_flight = Some(area);
        self.go()
    }

    fn get_max_mem_slots(&mut self) -> Result<u64> {
        Ok(MAX_REGIONS as u64)
    }

    fn add_mem_region(
        &mut self,
        region: &VhostUserSingleMemoryRegion,
        file: File,
        _postcopy: Option<bool>,
    ) -> Result<Option<VhostUserMemoryRegionBase>> {
        let ram = self.ram.with(region.into(), file, &self.alarm).map_err(refuse)?;
        self.use_ram(ram).map(|()| None)
    }

    fn remove_mem_region(&mut self, region: &VhostUserSingleMemoryRegion) -> Result<()> {
        let ram = self.ram.without(region.into()).map_err(refuse)?;
        self.use_ram(ram)
    }

    fn set_device_state_fd(
        &mut self,
        _direction: VhostTransferStateDirection,
        _phase: VhostTransferStatePhase,
        _file: File,
    ) -> Result<Option<File>> {
        absent("a state of its own")
    }

    fn check_device_state(&mut self) -> Result<()> {
        absent("a state of its own")
    }

    fn get_shmem_config(&mut self) -> Result<VhostUserShMemConfig> {
        absent("shared memory regions")
    }

    fn set_log_base(&mut self, log: &VhostUserLog, file: File) -> Result<()> {
        let log = DirtyLog::map(file, log.mmap_offset, log.mmap_size, &self.alarm).map_err(last)?;
        // What the last one does not say, this one does.
        self.halt();
        self.log = Some(Arc::new(log));
        self.go()
    }
}
