//! The worker that moves chains between the guest's rings and the kernel's.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;

use holdfast_clock::host_monotonic;
use holdfast_memory::GuestMemory;
use vhost::VhostUserMemoryRegionInfo;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Shared, Spec};
use super::kernel::Vhost;
use crate::device::Interrupt;
use crate::queue::{HandlerError, VirtQueue};
use crate::vhost_user::lane::Lane;
use crate::vhost_user::ring::{RelayRing, SharedRings};
use crate::worker::{Activation, Handler, Watch};

const KICK: u64 = 0;
const CALL: u64 = 1 << 32;
const LOCAL: u64 = 2 << 32;
/// Rings of one device of the kernel: to the guest, from the guest.
pub(super) const RINGS: u16 = 2;
/// Nanoseconds that what the guest sends may take when the device stops.
const SETTLE: u64 = 1_000_000_000;
const SETTLE_STEP_MS: i32 = 20;

/// A queue's event descriptors on the kernel's side.
#[derive(Debug)]
pub(super) struct Bells {
    /// Rung by the kernel: chains were finished.
    pub(super) call: EventFd,
    /// Rung by us: chains were submitted.
    pub(super) kick: EventFd,
}

/// What the worker is made from.
#[derive(Debug)]
pub(super) struct Parts {
    pub(super) spec: Arc<Spec>,
    /// Each serves [`RINGS`] queues, in order.
    pub(super) kernels: Vec<Box<dyn Vhost>>,
    pub(super) shared: Arc<Shared>,
    pub(super) rings: SharedRings,
    pub(super) bells: Vec<Bells>,
    /// Waits for calls while the device stops.
    pub(super) calls: Epoll,
}

#[derive(Debug)]
struct Live {
    lanes: Vec<Lane>,
    /// The queue that the kernel does not see.
    local: Option<VirtQueue>,
    features: u64,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The worker's handler.
#[derive(Debug)]
pub(super) struct Relay {
    parts: Parts,
    live: Option<Live>,
}

fn host(what: &'static str) -> impl Fn(io::Error) -> HandlerError {
    move |source| HandlerError::Host { what, source }
}

/// Guest RAM and the rings, as the kernel finds them in this process.
fn regions(memory: &GuestMemory, rings: &SharedRings) -> Vec<VhostUserMemoryRegionInfo> {
    let of = |guest_phys_addr, memory_size, hva: *mut u8| VhostUserMemoryRegionInfo {
        guest_phys_addr,
        memory_size,
        userspace_addr: hva as u64,
        // What another process would need to map it.
        mmap_offset: 0,
        mmap_handle: -1,
    };
    let ram = memory.iter().map(|r| of(r.start_addr().0, r.len(), r.as_ptr()));
    ram.chain(rings.memory().iter().map(|r| of(r.start_addr().0, r.len(), r.as_ptr()))).collect()
}

impl Parts {
    /// The kernel's device that serves `queue`, and the queue's number there.
    fn kernel(&self, queue: u16) -> Option<(&dyn Vhost, u16)> {
        self.kernels.get(usize::from(queue / RINGS)).map(|kernel| (&**kernel, queue % RINGS))
    }

    /// Lets the kernel serve `queue`, or not: that of a card, each of which has its own switch.
    fn switch(&self, queue: u16, on: bool) -> Result<(), HandlerError> {
        let tap = self.spec.taps.get(usize::from(queue / RINGS));
        match (self.kernel(queue), tap) {
            (Some((kernel, ring)), Some(tap)) => kernel
                .set_backend(ring, on.then(|| tap.fd()))
                .map_err(host("the kernel's vhost-net does not take the tap")),
            _ => Ok(()),
        }
    }

    fn is_on(&self, queue: u16) -> bool {
        queue < self.spec.local.enabled()
    }
}

impl Relay {
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        for (n, bells) in parts.bells.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, n as u64);
            parts.calls.ctl(ControlOperation::Add, bells.call.as_raw_fd(), event)?;
        }
        Ok(Self { parts, live: None })
    }

    /// Tells the kernel what the driver chose, where everything is, and lets it begin.
    fn set_up(&mut self) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let parts = &self.parts;
        parts.spec.local.begin(live.features).map_err(host("cannot set the interface up"))?;
        let regions = regions(&live.memory, &parts.rings);
        for kernel in &parts.kernels {
            let features = live.features & parts.spec.kernel_features;
            kernel.set_features(features).map_err(host("the kernel's vhost does not take the features"))?;
            kernel.set_memory(&regions).map_err(host("the kernel's vhost does not take the guest's RAM"))?;
        }
        let mut left = parts.shared.in_flight.lock();
        for lane in &mut live.lanes {
            let number = lane.queue.index();
            for head in left.remove(&number).unwrap_or_default() {
                let chain = lane.queue.again(head)?;
                if lane.ring.fits(&chain) {
                    lane.ring.submit(chain)?;
                }
            }
            let (Some((kernel, ring)), Some(bells)) =
                (parts.kernel(number), parts.bells.get(usize::from(number)))
            else {
                continue;
            };
            let wrong = host("the kernel's vhost does not take a ring");
            kernel.set_ring(ring, &parts.rings.place(number, lane.ring.size())).map_err(&wrong)?;
            kernel.set_bells(ring, &bells.call, &bells.kick).map_err(&wrong)?;
        }
        drop(left);
        for lane in &live.lanes {
            let number = lane.queue.index();
            if parts.is_on(number) {
                parts.switch(number, true)?;
            }
        }
        if parts.spec.taps.is_empty() {
            for kernel in &parts.kernels {
                kernel.set_running(true).map_err(host("the kernel's vhost-vsock does not start"))?;
            }
        }
        for lane in &mut live.lanes {
            if let Some(bells) = parts.bells.get(usize::from(lane.queue.index())) {
                // For what was submitted before.
                let _ = bells.kick.write(1);
                lane.forward(&bells.kick, &parts.shared.requests)?;
            }
        }
        Ok(())
    }

    /// Serves the queue that the kernel does not see.
    fn serve_local(&mut self) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let Some(queue) = &mut live.local else { return Ok(()) };
        let local = &self.parts.spec.local;
        let before = local.enabled();
        local.serve(queue, live.features)?;
        if queue.wants_interrupt()? {
            live.interrupt.queue(queue.index());
        }
        let now = local.enabled();
        for number in live.lanes.iter().map(|lane| lane.queue.index()) {
            if (number < before) != (number < now) {
                self.parts.switch(number, number < now)?;
            }
        }
        Ok(())
    }

    /// A kick of the guest's, or a call of the kernel's.
    fn lane_event(&mut self, number: u64, called: bool) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let lane = live.lanes.iter_mut().find(|lane| u64::from(lane.queue.index()) == number);
        let bells = usize::try_from(number).ok().and_then(|n| self.parts.bells.get(n));
        let (Some(lane), Some(bells)) = (lane, bells) else { return Ok(()) };
        if called {
            let _ = bells.call.read();
            lane.complete(&live.memory, &*live.interrupt)?;
        }
        lane.forward(&bells.kick, &self.parts.shared.requests)
    }

    /// Waits until the kernel has taken what the guest has sent. Buffers to receive into wait for ever.
    fn settle(&mut self) -> Result<(), HandlerError> {
        let mut events = [EpollEvent::default(); 8];
        let deadline = host_monotonic().saturating_add(SETTLE);
        let Some(live) = &mut self.live else { return Ok(()) };
        loop {
            let mut busy = false;
            for lane in &mut live.lanes {
                let number = lane.queue.index();
                lane.complete(&live.memory, &*live.interrupt)?;
                busy |= number % RINGS == 1 && self.parts.is_on(number) && !lane.ring.is_idle();
            }
            if !busy || host_monotonic() > deadline {
                return Ok(());
            }
            // An interrupted wait is a short one.
            let _ = self.parts.calls.wait(SETTLE_STEP_MS, &mut events);
        }
    }

    /// The kernel does not look at the rings any more when this returns.
    fn leave(&self) -> Result<(), HandlerError> {
        let Some(live) = &self.live else { return Ok(()) };
        let mut result = Ok(());
        for lane in &live.lanes {
            result = result.and(self.parts.switch(lane.queue.index(), false));
        }
        if self.parts.spec.taps.is_empty() {
            for kernel in &self.parts.kernels {
                let stopped = kernel.set_running(false);
                result = result.and(stopped.map_err(host("the kernel's vhost-vsock does not stop")));
            }
        }
        result
    }
}

impl Handler for Relay {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let Activation { queues, features, memory, interrupt } = activation;
        let (mut lanes, mut local) = (Vec::new(), None);
        let local_number = self.parts.spec.local.number(features);
        for queue in queues {
            let (number, size) = (queue.index(), queue.max_size());
            if number == local_number {
                watch.add(queue.kick().as_raw_fd(), LOCAL)?;
                local = Some(queue);
                continue;
            }
            watch.add(queue.kick().as_raw_fd(), KICK + u64::from(number))?;
            let ring = RelayRing::new(&self.parts.rings, number, size)?;
            lanes.push(Lane { queue, ring });
        }
        for (n, bells) in self.parts.bells.iter().enumerate() {
            let _ = bells.call.read();
            watch.add(bells.call.as_raw_fd(), CALL + n as u64)?;
        }
        self.live = Some(Live { lanes, local, features, memory, interrupt });
        self.set_up()?;
        self.serve_local()
    }

    fn event(&mut self, token: u64, _: &Watch) -> Result<(), HandlerError> {
        match token & !0xffff_ffff {
            KICK => self.lane_event(token & 0xffff_ffff, false),
            CALL => self.lane_event(token & 0xffff_ffff, true),
            _ => self.serve_local(),
        }
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        for step in [self.settle(), self.leave()] {
            if let Err(error) = step {
                tracing::warn!(id = self.parts.spec.id, %error, "the kernel's vhost does not end well");
            }
        }
        for bells in &self.parts.bells {
            watch.remove(bells.call.as_raw_fd());
        }
        let Some(mut live) = self.live.take() else { return Vec::new() };
        let mut left = self.parts.shared.in_flight.lock();
        let mut queues = Vec::new();
        if let Some(queue) = live.local.take() {
            watch.remove(queue.kick().as_raw_fd());
            queues.push(queue);
        }
        for mut lane in live.lanes.drain(..) {
            watch.remove(lane.queue.kick().as_raw_fd());
            if let Err(error) = lane.complete(&live.memory, &*live.interrupt) {
                tracing::warn!(id = self.parts.spec.id, %error, "the kernel's last answers");
            }
            let heads = lane.ring.take_back();
            if !heads.is_empty() {
                left.entry(lane.queue.index()).or_default().extend(heads);
            }
            queues.push(lane.queue);
        }
        queues
    }
}
