//! The worker that moves chains between the guest's rings and the back end's.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_clock::{Timer, host_monotonic};
use holdfast_memory::GuestMemory;
use vmm_sys_util::epoll::{ControlOperation, Epoll, EpollEvent, EventSet};
use vmm_sys_util::eventfd::EventFd;

use super::device::{Shared, Spec};
use super::fuse::{self, Answer};
use super::lane::Lane;
use super::link::{Guard, Link, LinkError};
use super::ring::{RelayRing, SharedRings};
use crate::device::{Interrupt, kind};
use crate::queue::{HandlerError, VirtQueue};
use crate::worker::{Activation, Handler, Watch};

const KICK: u64 = 0;
const CALL: u64 = 1 << 32;
const SOCKET: u64 = 2 << 32;
const RETRY: u64 = 3 << 32;
const NEWS: u64 = 4 << 32;
const LOCAL: u64 = 5 << 32;
/// The event queue of a socket device, and what says in it that all connections are lost (virtio 1.2 section 5.10.6.7).
const VSOCK_EVENTS: u16 = 2;
const VIRTIO_VSOCK_EVENT_TRANSPORT_RESET: u32 = 0;
/// Nanoseconds between attempts to reach a back end that is gone.
const RETRY_AFTER: u64 = 100_000_000;
/// Nanoseconds that requests under way may take when the device stops.
const SETTLE: u64 = 5_000_000_000;
const SETTLE_STEP_MS: i32 = 20;

/// A queue's event descriptors on the back end's side.
#[derive(Debug)]
pub(super) struct Bells {
    /// Rung by the back end: chains were finished.
    pub(super) call: EventFd,
    /// Rung by us: chains were submitted.
    pub(super) kick: EventFd,
}

/// What the worker is made from.
pub(super) struct Parts {
    pub(super) spec: Arc<Spec>,
    pub(super) guard: Guard,
    pub(super) shared: Arc<Shared>,
    pub(super) rings: SharedRings,
    pub(super) bells: Vec<Bells>,
    /// Waits for calls while the device stops.
    pub(super) calls: Epoll,
    pub(super) retry: Arc<EventFd>,
    pub(super) timer: Timer,
    pub(super) socket: UnixStream,
}

struct Live {
    lanes: Vec<Lane>,
    /// The queue that the back end does not see.
    local: Option<VirtQueue>,
    features: u64,
    memory: GuestMemory,
    interrupt: Arc<dyn Interrupt>,
}

/// The worker's handler.
pub(super) struct Relay {
    parts: Parts,
    /// The connection's descriptor, for its end; none if it is gone.
    socket: Option<UnixStream>,
    live: Option<Live>,
}

impl Lane {
    /// Answers the requests that a daemon held when it died. Those that begin a session are left, for its successor.
    fn answer_held(&mut self, held: &mut BTreeMap<u16, Vec<u16>>) -> Result<(), HandlerError> {
        let mut kept = Vec::new();
        for head in held.remove(&self.queue.index()).unwrap_or_default() {
            let chain = self.queue.again(head)?;
            match fuse::answer(&self.queue, &chain)? {
                Answer::Begins => {
                    self.queue.forget(1);
                    kept.push(head);
                }
                Answer::Given(len) => self.queue.push(head, len)?,
            }
        }
        if !kept.is_empty() {
            held.insert(self.queue.index(), kept);
        }
        Ok(())
    }

    /// Answers waiting requests of a file system whose session is lost. True: one waits that begins another.
    fn answer_lost(&mut self, interrupt: &dyn Interrupt) -> Result<bool, HandlerError> {
        let mut begins = false;
        'all: loop {
            while let Some(chain) = self.queue.pop()? {
                match fuse::answer(&self.queue, &chain)? {
                    Answer::Begins => {
                        self.queue.undo_pop();
                        begins = true;
                        break 'all;
                    }
                    Answer::Given(len) => self.queue.push(chain.head, len)?,
                }
            }
            if !self.queue.enable_kicks()? {
                break;
            }
        }
        if self.queue.wants_interrupt()? {
            interrupt.queue(self.queue.index());
        }
        Ok(begins)
    }

    /// Tells a driver of sockets that all its connections are lost, in a buffer that a back end held (`heads`) or in
    /// the next one. A driver without a buffer has no connections yet.
    fn reset_transport(
        &mut self,
        heads: &mut Vec<u16>,
        interrupt: &dyn Interrupt,
    ) -> Result<(), HandlerError> {
        let chain = match heads.pop() {
            Some(head) => Some(self.queue.again(head)?),
            None => self.queue.pop()?,
        };
        let Some(chain) = chain else { return Ok(()) };
        let event = VIRTIO_VSOCK_EVENT_TRANSPORT_RESET.to_le_bytes();
        self.queue.writer(&chain).write(&event)?;
        self.queue.push(chain.head, event.len() as u32)?;
        if self.queue.wants_interrupt()? {
            interrupt.queue(self.queue.index());
        }
        Ok(())
    }
}

/// Gives waiting chains to the back end. Without a session they stay: whoever begins one (`without_session`)
/// has to have seen the request that does so first.
fn forward(lane: &mut Lane, bells: &Bells, shared: &Shared) -> Result<(), HandlerError> {
    if !shared.session.load(Ordering::SeqCst) {
        return Ok(());
    }
    lane.forward(&bells.kick, &shared.requests)
}

impl Relay {
    pub(super) fn new(parts: Parts) -> io::Result<Self> {
        for (n, bells) in parts.bells.iter().enumerate() {
            let event = EpollEvent::new(EventSet::IN | EventSet::EDGE_TRIGGERED, n as u64);
            parts.calls.ctl(ControlOperation::Add, bells.call.as_raw_fd(), event)?;
        }
        let socket = Some(parts.socket.try_clone()?);
        Ok(Self { parts, socket, live: None })
    }

    /// Brings the back end to where the driver is, the requests included that its predecessor held.
    fn set_up(&mut self) -> Result<(), LinkErrorOr> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let mut link = self.parts.shared.link.lock().clone().ok_or(LinkErrorOr::Link(LinkError::Rings))?;
        let spec = &self.parts.spec;
        link.set_up(live.features & !spec.own_features, &live.memory, &self.parts.rings)?;
        let mut left = self.parts.shared.in_flight.lock();
        let session = &self.parts.shared.session;
        let without = !session.load(Ordering::SeqCst);
        for lane in &mut live.lanes {
            let number = lane.queue.index();
            if without && spec.device_type == kind::FS {
                lane.answer_held(&mut left)?;
            }
            lane.ring = RelayRing::new(&self.parts.rings, number, lane.queue.max_size())
                .map_err(HandlerError::from)?;
            let mut heads = left.remove(&number).unwrap_or_default();
            if without && spec.device_type == kind::VSOCK && number == VSOCK_EVENTS {
                lane.reset_transport(&mut heads, &*live.interrupt)?;
            }
            for head in heads {
                let chain = lane.queue.again(head).map_err(HandlerError::from)?;
                // Of a file system without a session only the request that begins one was left.
                session.store(true, Ordering::SeqCst);
                if lane.ring.fits(&chain) {
                    lane.ring.submit(chain).map_err(HandlerError::from)?;
                }
            }
        }
        drop(left);
        if spec.device_type != kind::FS {
            session.store(true, Ordering::SeqCst);
        }
        for lane in &mut live.lanes {
            let number = lane.queue.index();
            let Some(bells) = self.parts.bells.get(usize::from(number)) else { continue };
            let _ = bells.call.read();
            let enabled = spec.local.as_ref().is_none_or(|local| number < local.enabled());
            let ring = (&lane.ring, enabled);
            link.start_ring(number, &self.parts.rings, ring, (&bells.call, &bells.kick))?;
            let _ = bells.kick.write(1);
        }
        self.without_session()?;
        let Some(live) = &mut self.live else { return Ok(()) };
        for lane in &mut live.lanes {
            if let Some(bells) = self.parts.bells.get(usize::from(lane.queue.index())) {
                forward(lane, bells, &self.parts.shared)?;
            }
        }
        Ok(())
    }

    /// Answers the requests of a file system whose session is lost, until there is a new one. True: there is none.
    fn without_session(&mut self) -> Result<bool, HandlerError> {
        let session = &self.parts.shared.session;
        let is_fs = self.parts.spec.device_type == kind::FS;
        let lost = is_fs && !session.load(Ordering::SeqCst);
        let Some(live) = self.live.as_mut().filter(|_| lost) else { return Ok(false) };
        let mut begins = false;
        let mut left = self.parts.shared.in_flight.lock();
        for lane in &mut live.lanes {
            lane.answer_held(&mut left)?;
            begins |= lane.answer_lost(&*live.interrupt)?;
        }
        drop(left);
        if !begins || self.socket.is_none() {
            return Ok(true);
        }
        // What came before that request may be in the lanes that were looked at first.
        for lane in &mut live.lanes {
            lane.answer_lost(&*live.interrupt)?;
        }
        session.store(true, Ordering::SeqCst);
        for lane in &mut live.lanes {
            if let Some(bells) = self.parts.bells.get(usize::from(lane.queue.index())) {
                forward(lane, bells, &self.parts.shared)?;
            }
        }
        Ok(false)
    }

    /// Notes what the back end held and tries again later.
    fn lost(&mut self, watch: &Watch, why: &LinkError) {
        let source = std::error::Error::source(why).map(ToString::to_string).unwrap_or_default();
        tracing::warn!(id = self.parts.spec.id, %why, source, "the vhost-user back end is gone; waiting for another");
        self.disconnect(watch);
        self.retry_later();
    }

    fn disconnect(&mut self, watch: &Watch) {
        if let Some(socket) = self.socket.take() {
            watch.remove(socket.as_raw_fd());
        }
        if let Some(shared) = &self.parts.spec.shared {
            // The next one does not know what this one has mapped.
            shared.clear();
        }
        if self.parts.spec.has_session() {
            self.parts.shared.session.store(false, Ordering::SeqCst);
        }
        let link = self.parts.shared.link.lock().take();
        if let Some(fd) = link.as_ref().and_then(Link::news_fd) {
            watch.remove(fd);
        }
        drop(link);
        if let Some(live) = &mut self.live {
            let mut left = self.parts.shared.in_flight.lock();
            for lane in &mut live.lanes {
                // What it finished before it went counts.
                if let Err(error) = lane.complete(&live.memory, &*live.interrupt) {
                    tracing::debug!(%error, "the back end's last answers");
                }
                let heads = lane.ring.take_back();
                lane.queue.forget(heads.len());
                left.entry(lane.queue.index()).or_default().extend(heads);
            }
        }
    }

    fn retry_later(&self) {
        self.parts.timer.arm(self.parts.shared.clock.now() + RETRY_AFTER);
    }

    fn connect(&mut self, watch: &Watch) -> Result<(), LinkErrorOr> {
        let (link, socket) = self.parts.spec.connect(&self.parts.guard)?;
        watch.add(socket.as_raw_fd(), SOCKET)?;
        if let Some(fd) = link.news_fd() {
            watch.add(fd, NEWS)?;
        }
        self.socket = Some(socket);
        *self.parts.shared.link.lock() = Some(link);
        Ok(())
    }

    /// Connects and sets up; a back end that is not there is waited for.
    fn reach(&mut self, watch: &Watch) -> Result<(), HandlerError> {
        let connected = if self.socket.is_some() { Ok(()) } else { self.connect(watch) };
        match connected.and_then(|()| self.set_up()) {
            Ok(()) => Ok(()),
            Err(LinkErrorOr::Handler(error)) => Err(error),
            Err(LinkErrorOr::Link(error)) => {
                self.lost(watch, &error);
                Ok(())
            }
        }
    }

    fn retry(&mut self, watch: &Watch) -> Result<(), HandlerError> {
        let _ = self.parts.retry.read();
        if self.socket.is_some() {
            return Ok(());
        }
        match self.connect(watch) {
            Ok(()) => {
                tracing::info!(id = self.parts.spec.id, "a vhost-user back end is there again");
                self.parts.shared.reconnects.fetch_add(1, Ordering::Relaxed);
                self.reach(watch)?;
                self.look_at_config(watch);
                Ok(())
            }
            Err(LinkErrorOr::Link(LinkError::Connect { .. })) => {
                self.retry_later();
                Ok(())
            }
            Err(LinkErrorOr::Link(error)) => {
                self.lost(watch, &error);
                Ok(())
            }
            Err(LinkErrorOr::Handler(error)) => Err(error),
        }
    }

    /// The socket is readable, which the protocol never makes it by itself: it has ended, or the other side is mad.
    fn socket_event(&mut self, watch: &Watch) {
        let ended = LinkError::Connect {
            path: self.parts.spec.door.path().clone(),
            source: io::ErrorKind::ConnectionReset.into(),
        };
        let gone = self.socket.as_ref().is_some_and(super::link::has_ended);
        if gone {
            self.lost(watch, &ended);
        }
    }

    /// The back end has something to say.
    fn news(&mut self, watch: &Watch) {
        let link = self.parts.shared.link.lock().clone();
        match link.map_or(Ok(false), |link| link.hear()) {
            Ok(true) => self.look_at_config(watch),
            Ok(false) => {}
            Err(error) => self.lost(watch, &error),
        }
        let shared = self.parts.spec.shared.as_ref();
        if shared.is_some_and(|shared| shared.was_shortened()) {
            tracing::warn!(
                id = self.parts.spec.id,
                "a file that the guest sees was shortened: there are zeroes instead"
            );
        }
    }

    /// Tells the driver if the back end's config space is another one.
    fn look_at_config(&mut self, watch: &Watch) {
        let link = self.parts.shared.link.lock().clone();
        let Some(mut link) = link else { return };
        match self.parts.spec.read_config(&mut link) {
            Ok(Some(bytes)) => {
                let changed = {
                    let mut config = self.parts.shared.config.lock();
                    let changed = *config != bytes;
                    *config = bytes;
                    changed
                };
                if let (true, Some(live)) = (changed, &self.live) {
                    live.interrupt.config_changed();
                }
            }
            Ok(None) => {}
            Err(error) => self.lost(watch, &error),
        }
    }

    /// Serves the queue that the back end does not see.
    fn serve_local(&mut self, watch: &Watch) -> Result<(), HandlerError> {
        let (Some(local), Some(live)) = (&self.parts.spec.local, &mut self.live) else { return Ok(()) };
        let Some(queue) = &mut live.local else { return Ok(()) };
        let before = local.enabled();
        local.serve(queue, live.features)?;
        if queue.wants_interrupt()? {
            live.interrupt.queue(queue.index());
        }
        let now = local.enabled();
        let link = self.parts.shared.link.lock().clone();
        let Some(mut link) = link.filter(|_| now != before) else { return Ok(()) };
        let mut result = Ok(());
        for number in live.lanes.iter().map(|lane| lane.queue.index()) {
            if (number < before) != (number < now) {
                result = result.and(link.enable_ring(number, number < now));
            }
        }
        if let Err(error) = result {
            self.lost(watch, &error);
        }
        Ok(())
    }

    fn with_lane(
        &mut self,
        number: u64,
        act: impl FnOnce(&mut Lane, &Bells, &Shared, (&GuestMemory, &dyn Interrupt)) -> Result<(), HandlerError>,
    ) -> Result<(), HandlerError> {
        if self.socket.is_none() {
            return Ok(());
        }
        let Some(live) = &mut self.live else { return Ok(()) };
        let lane = live.lanes.iter_mut().find(|lane| u64::from(lane.queue.index()) == number);
        let bells = usize::try_from(number).ok().and_then(|n| self.parts.bells.get(n));
        match (lane, bells) {
            (Some(lane), Some(bells)) => {
                act(lane, bells, &self.parts.shared, (&live.memory, &*live.interrupt))
            }
            _ => Ok(()),
        }
    }

    /// Waits for the requests that a back end finishes by itself.
    fn settle(&mut self) {
        let deadline = host_monotonic().saturating_add(SETTLE);
        let mut events = [EpollEvent::default(); 8];
        loop {
            let Some(live) = &mut self.live else { return };
            let mut busy = false;
            for lane in &mut live.lanes {
                if let Err(error) = lane.complete(&live.memory, &*live.interrupt) {
                    tracing::warn!(id = self.parts.spec.id, %error, "the back end's last answers");
                    return;
                }
                busy |= (self.parts.spec.settles)(lane.queue.index()) && !lane.ring.is_idle();
            }
            if !busy || self.socket.as_ref().is_none_or(super::link::has_ended) || host_monotonic() > deadline
            {
                return;
            }
            // An interrupted wait is a short one.
            let _ = self.parts.calls.wait(SETTLE_STEP_MS, &mut events);
        }
    }
}

/// Where something went wrong: with the back end, which may come again, or on our side.
pub(super) enum LinkErrorOr {
    Link(LinkError),
    Handler(HandlerError),
}

impl From<LinkError> for LinkErrorOr {
    fn from(error: LinkError) -> Self {
        Self::Link(error)
    }
}

impl From<HandlerError> for LinkErrorOr {
    fn from(error: HandlerError) -> Self {
        Self::Handler(error)
    }
}

impl Handler for Relay {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let Activation { queues, features, memory, interrupt } = activation;
        let (mut lanes, mut local) = (Vec::new(), None);
        let local_number = self.parts.spec.local.as_ref().map(|local| local.number(features));
        for queue in queues {
            let (number, size) = (queue.index(), queue.max_size());
            if Some(number) == local_number {
                watch.add(queue.kick().as_raw_fd(), LOCAL)?;
                local = Some(queue);
                continue;
            }
            watch.add(queue.kick().as_raw_fd(), KICK + u64::from(number))?;
            let ring = RelayRing::new(&self.parts.rings, number, size)?;
            lanes.push(Lane { queue, ring });
        }
        for (n, bells) in self.parts.bells.iter().enumerate() {
            watch.add(bells.call.as_raw_fd(), CALL + n as u64)?;
        }
        watch.add(self.parts.retry.as_raw_fd(), RETRY)?;
        if let Some(socket) = &self.socket {
            watch.add(socket.as_raw_fd(), SOCKET)?;
        }
        if let Some(fd) = self.parts.shared.link.lock().as_ref().and_then(Link::news_fd) {
            watch.add(fd, NEWS)?;
        }
        self.live = Some(Live { lanes, local, features, memory, interrupt });
        self.reach(watch)?;
        self.without_session()?;
        self.serve_local(watch)
    }

    fn event(&mut self, token: u64, watch: &Watch) -> Result<(), HandlerError> {
        let number = token & 0xffff_ffff;
        let result = match token & !0xffff_ffff {
            KICK if self.without_session()? => Ok(()),
            KICK => self.with_lane(number, |lane, bells, shared, _| forward(lane, bells, shared)),
            CALL => self.with_lane(number, |lane, bells, shared, (memory, interrupt)| {
                let _ = bells.call.read();
                lane.complete(memory, interrupt)?;
                forward(lane, bells, shared)
            }),
            SOCKET => {
                self.socket_event(watch);
                Ok(())
            }
            NEWS => {
                self.news(watch);
                Ok(())
            }
            LOCAL => self.serve_local(watch),
            _ => self.retry(watch),
        };
        // Whatever happened, the back end may be lost.
        result.and_then(|()| self.without_session().map(drop))
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        self.settle();
        self.parts.timer.disarm();
        let link = self.parts.shared.link.lock().clone();
        let mut failed = None;
        if let (Some(live), Some(mut link)) = (&self.live, link) {
            for lane in &live.lanes {
                failed = failed.or(link.stop_ring(lane.queue.index()).err());
            }
        }
        if let Some(error) = failed {
            tracing::warn!(id = self.parts.spec.id, %error, "the back end does not stop; it is left");
            self.disconnect(watch);
        }
        if let Some(socket) = &self.socket {
            watch.remove(socket.as_raw_fd());
        }
        if let Some(fd) = self.parts.shared.link.lock().as_ref().and_then(Link::news_fd) {
            watch.remove(fd);
        }
        for bells in &self.parts.bells {
            watch.remove(bells.call.as_raw_fd());
        }
        watch.remove(self.parts.retry.as_raw_fd());
        let Some(mut live) = self.live.take() else { return Vec::new() };
        let mut left = self.parts.shared.in_flight.lock();
        let mut queues = Vec::new();
        if let Some(queue) = live.local.take() {
            watch.remove(queue.kick().as_raw_fd());
            queues.push(queue);
        }
        for mut lane in live.lanes.drain(..) {
            watch.remove(lane.queue.kick().as_raw_fd());
            if self.socket.is_some() {
                if let Err(error) = lane.complete(&live.memory, &*live.interrupt) {
                    tracing::warn!(id = self.parts.spec.id, %error, "the back end's last answers");
                }
                let heads = lane.ring.take_back();
                if !heads.is_empty() {
                    left.entry(lane.queue.index()).or_default().extend(heads);
                }
            }
            queues.push(lane.queue);
        }
        queues
    }
}
