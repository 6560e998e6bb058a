//! One pair of receive and transmit queues, on its worker; the first one serves the control queue too.

use std::io;
use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_net::{HEADER_LEN, MAX_FRAME, PacketQueue};
use vmm_sys_util::eventfd::EventFd;

use super::{Shared, bit, control, offloads};
use crate::device::Interrupt;
use crate::dma;
use crate::queue::{Chain, HandlerError, QueueError, VirtQueue, total_len};
use crate::worker::{Activation, Handler, Watch};

const RX: u64 = 0;
const TX: u64 = 1;
const CONTROL: u64 = 2;
const FRAME: u64 = 3;
const SWITCHED: u64 = 4;

/// Offset of `num_buffers` in the header.
const NUM_BUFFERS: usize = 10;

pub(super) struct PairHandler {
    shared: Arc<Shared>,
    packets: Arc<dyn PacketQueue>,
    pair: u16,
    /// A frame on its way to the guest. Its copy costs less than walking the dozens of buffers that
    /// the largest frame might need.
    frame: Box<[u8]>,
    /// Bytes in `frame` for which the guest had no buffers yet.
    waiting: usize,
    live: Option<Live>,
}

struct Live {
    rx: Option<VirtQueue>,
    tx: Option<VirtQueue>,
    control: Option<VirtQueue>,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
}

impl Live {
    fn queues(&self) -> impl Iterator<Item = (u64, &VirtQueue)> {
        let all = [(RX, &self.rx), (TX, &self.tx), (CONTROL, &self.control)];
        all.into_iter().filter_map(|(token, q)| q.as_ref().map(|q| (token, q)))
    }
}

/// What became of a frame for the guest.
enum Delivery {
    Done,
    NoBuffers,
    TooLong,
}

impl PairHandler {
    pub(super) fn new(shared: Arc<Shared>, packets: Arc<dyn PacketQueue>, pair: u16) -> Self {
        Self { shared, packets, pair, frame: vec![0; MAX_FRAME].into(), waiting: 0, live: None }
    }

    /// Host to guest, until the interface is empty or the guest has no buffers.
    fn receive(&mut self) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let mergeable = live.features & bit::MRG_RXBUF != 0;
        let Some(queue) = &mut live.rx else { return Ok(()) };
        let counters = &self.shared.counters;
        let mut budget = queue.size();
        queue.disable_kicks()?;
        loop {
            if self.waiting == 0 {
                match self.packets.receive(&mut self.frame) {
                    Ok(n) if n > HEADER_LEN => self.waiting = n,
                    Ok(_) => continue,
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => break,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => continue,
                    Err(error) => {
                        // A queue that is switched off, or an interface that the host took away.
                        tracing::debug!(interface = self.shared.backend.name(), %error, "no frames");
                        break;
                    }
                }
            }
            let frame = self.frame.get_mut(..self.waiting).unwrap_or(&mut []);
            match deliver(queue, frame, mergeable)? {
                Delivery::Done => {
                    counters.rx_frames.fetch_add(1, Ordering::Relaxed);
                    counters.rx_bytes.fetch_add((self.waiting - HEADER_LEN) as u64, Ordering::Relaxed);
                }
                Delivery::TooLong => {
                    counters.rx_dropped.fetch_add(1, Ordering::Relaxed);
                }
                // Kicks are on: the driver's next buffers bring us back.
                Delivery::NoBuffers => break,
            }
            self.waiting = 0;
            budget -= 1;
            if budget == 0 {
                // Edge-triggered: nobody else would bring us back.
                queue.kick_again();
                break;
            }
        }
        if queue.wants_interrupt()? {
            live.interrupt.queue(queue.index());
        }
        Ok(())
    }

    /// Guest to host.
    fn transmit(&mut self) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let Some(queue) = &mut live.tx else { return Ok(()) };
        let mut budget = queue.size();
        loop {
            queue.disable_kicks()?;
            while budget != 0
                && let Some(chain) = queue.pop()?
            {
                send(&self.shared, &*self.packets, queue, &chain)?;
                queue.push(chain.head, 0)?;
                budget -= 1;
            }
            if budget == 0 {
                queue.kick_again();
                break;
            }
            if !queue.enable_kicks()? {
                break;
            }
        }
        if queue.wants_interrupt()? {
            live.interrupt.queue(queue.index());
        }
        Ok(())
    }

    fn control(&mut self) -> Result<(), HandlerError> {
        let Some(live) = &mut self.live else { return Ok(()) };
        let Some(queue) = &mut live.control else { return Ok(()) };
        control::serve_all(&self.shared, queue, live.features)?;
        if queue.wants_interrupt()? {
            live.interrupt.queue(queue.index());
        }
        Ok(())
    }

    /// The first worker brings the interface to what the driver has negotiated or had set.
    fn configure(&self, features: u64) -> Result<(), HandlerError> {
        let host = |what| move |source| HandlerError::Host { what, source };
        let (pairs, wanted) = {
            let mut state = self.shared.state.lock();
            (state.pairs, *state.offloads.get_or_insert(features & bit::GUEST_OFFLOADS))
        };
        let backend = &self.shared.backend;
        backend.set_offloads(offloads(wanted)).map_err(host("cannot set the tap's offloads"))?;
        self.shared.enable_queues(pairs).map_err(host("cannot switch the tap's queues"))
    }

    fn switched(&self) -> Option<&EventFd> {
        self.shared.switched.get(usize::from(self.pair))
    }
}

/// Copies a frame to as many buffers as it takes.
fn deliver(queue: &mut VirtQueue, frame: &mut [u8], mergeable: bool) -> Result<Delivery, QueueError> {
    let mut chains: Vec<Chain> = Vec::new();
    let mut room = 0;
    while room < frame.len() as u64 {
        let full = chains.len() == usize::from(queue.size()) || (!mergeable && !chains.is_empty());
        let chain = if full { None } else { queue.pop()? };
        let Some(chain) = chain else {
            // Asked for while nothing is left, so that `avail_event` lies behind what is there: too
            // few buffers would otherwise hide those that follow.
            if !full && queue.enable_kicks()? {
                continue;
            }
            give_back(queue, &chains);
            // A frame that would not fit even into all buffers is lost.
            return Ok(if full { Delivery::TooLong } else { Delivery::NoBuffers });
        };
        let size = total_len(&chain.writable);
        if size < HEADER_LEN as u64 {
            return Err(QueueError::Short { queue: queue.index() });
        }
        room += size;
        chains.push(chain);
    }
    let count = chains.len() as u16;
    if let Some(field) = frame.get_mut(NUM_BUFFERS..NUM_BUFFERS + 2) {
        field.copy_from_slice(&count.to_le_bytes());
    }
    let mut rest: &[u8] = frame;
    let mut used = Vec::with_capacity(chains.len());
    for chain in &chains {
        let mut writer = queue.writer(chain);
        let n = writer.remaining().min(rest.len() as u64) as usize;
        let (now, later) = rest.split_at(n);
        writer.write(now)?;
        used.push((chain.head, writer.written()));
        rest = later;
    }
    for (head, written) in used {
        queue.push(head, written)?;
    }
    Ok(Delivery::Done)
}

fn give_back(queue: &mut VirtQueue, chains: &[Chain]) {
    for _ in chains {
        queue.undo_pop();
    }
}

/// Sends one frame. What the interface does not take is dropped, as any network may.
fn send(
    shared: &Shared,
    packets: &dyn PacketQueue,
    queue: &VirtQueue,
    chain: &Chain,
) -> Result<(), QueueError> {
    let len = total_len(&chain.readable);
    if len < HEADER_LEN as u64 || !chain.writable.is_empty() {
        return Err(QueueError::Short { queue: queue.index() });
    }
    let counters = &shared.counters;
    let parts = dma::vectors(queue.memory(), &chain.readable);
    let sent = match parts {
        Some(parts) if len <= MAX_FRAME as u64 => {
            // SAFETY: the parts are mapped RAM that `queue` keeps; the call is over when it returns.
            unsafe { packets.send(&parts) }
        }
        _ => Err(io::ErrorKind::InvalidInput.into()),
    };
    match sent {
        Ok(_) => {
            counters.tx_frames.fetch_add(1, Ordering::Relaxed);
            counters.tx_bytes.fetch_add(len - HEADER_LEN as u64, Ordering::Relaxed);
        }
        Err(error) => {
            tracing::debug!(interface = shared.backend.name(), %error, "frame dropped");
            counters.tx_dropped.fetch_add(1, Ordering::Relaxed);
        }
    }
    Ok(())
}

impl Handler for PairHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let Activation { queues, features, interrupt, .. } = activation;
        let pairs = if features & bit::MQ != 0 { self.shared.max_pairs } else { 1 };
        let mut live = Live { rx: None, tx: None, control: None, interrupt, features };
        for queue in queues {
            let index = queue.index();
            if index == 2 * self.pair {
                live.rx = Some(queue);
            } else if index == 2 * self.pair + 1 {
                live.tx = Some(queue);
            } else if self.pair == 0 && index == 2 * pairs {
                live.control = Some(queue);
            }
        }
        let live = self.live.insert(live);
        for (token, queue) in live.queues() {
            watch.add(queue.kick().as_raw_fd(), token)?;
        }
        if self.pair == 0 {
            self.configure(features)?;
        }
        watch.add(self.packets.fd(), FRAME)?;
        if let Some(switched) = self.switched() {
            watch.add(switched.as_raw_fd(), SWITCHED)?;
        }
        self.control()?;
        self.transmit()?;
        self.receive()
    }

    fn event(&mut self, token: u64, watch: &Watch) -> Result<(), HandlerError> {
        match token {
            SWITCHED => {
                // The kernel forgets who waits for a queue that is switched off.
                watch.remove(self.packets.fd());
                watch.add(self.packets.fd(), FRAME)?;
                self.receive()
            }
            TX => self.transmit(),
            CONTROL => self.control(),
            _ => self.receive(),
        }
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        watch.remove(self.packets.fd());
        if let Some(switched) = self.switched() {
            watch.remove(switched.as_raw_fd());
        }
        let Some(live) = self.live.take() else { return Vec::new() };
        for (_, queue) in live.queues() {
            watch.remove(queue.kick().as_raw_fd());
        }
        // A frame that no buffer was there for is lost, as any network may.
        self.waiting = 0;
        [live.rx, live.tx, live.control].into_iter().flatten().collect()
    }
}
