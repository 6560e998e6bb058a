//! The virtio network device (virtio 1.2 section 5.1).

pub(crate) mod announce;
pub mod back_end;
pub mod config;
mod control;
pub(crate) mod front_end;
mod handler;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_net::tap::{Tap, TapError, TapOptions, duplicate};
use holdfast_net::{MacAddr, Offloads, PacketBackend};
use holdfast_threads::Role;
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_CLOEXEC, EFD_NONBLOCK, EventFd};

use crate::device::{Interrupt, VirtioDevice, feature, kind, read_bytes};
use crate::queue::VirtQueue;
use crate::worker::{Activation, Worker};
use config::NetConfig;
use handler::PairHandler;

/// Feature bits (section 5.1.3).
pub(crate) mod bit {
    pub(crate) const CSUM: u64 = 1 << 0;
    pub(crate) const GUEST_CSUM: u64 = 1 << 1;
    pub(crate) const CTRL_GUEST_OFFLOADS: u64 = 1 << 2;
    pub(crate) const MTU: u64 = 1 << 3;
    pub(crate) const MAC: u64 = 1 << 5;
    pub(crate) const GUEST_TSO4: u64 = 1 << 7;
    pub(crate) const GUEST_TSO6: u64 = 1 << 8;
    pub(crate) const GUEST_ECN: u64 = 1 << 9;
    pub(crate) const GUEST_UFO: u64 = 1 << 10;
    pub(crate) const HOST_TSO4: u64 = 1 << 11;
    pub(crate) const HOST_TSO6: u64 = 1 << 12;
    pub(crate) const HOST_ECN: u64 = 1 << 13;
    pub(crate) const HOST_UFO: u64 = 1 << 14;
    pub(crate) const MRG_RXBUF: u64 = 1 << 15;
    pub(crate) const STATUS: u64 = 1 << 16;
    pub(crate) const CTRL_VQ: u64 = 1 << 17;
    pub(crate) const CTRL_RX: u64 = 1 << 18;
    pub(crate) const GUEST_ANNOUNCE: u64 = 1 << 21;
    pub(crate) const MQ: u64 = 1 << 22;
    pub(crate) const CTRL_MAC_ADDR: u64 = 1 << 23;

    /// Those that the guest can switch while it runs.
    pub(crate) const GUEST_OFFLOADS: u64 = GUEST_CSUM | GUEST_TSO4 | GUEST_TSO6 | GUEST_ECN | GUEST_UFO;
}

pub(crate) const CONTROL_SIZE: u16 = 64;

/// What may arrive unfinished, by the guest's feature bits.
pub(crate) fn offloads(features: u64) -> Offloads {
    let on = |bit| features & bit != 0;
    Offloads {
        csum: on(bit::GUEST_CSUM),
        tso4: on(bit::GUEST_TSO4),
        tso6: on(bit::GUEST_TSO6),
        ecn: on(bit::GUEST_ECN),
        ufo: on(bit::GUEST_UFO),
    }
}

/// What the driver has set through the control queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct NetState {
    pub(crate) mac: MacAddr,
    /// Queue pairs in use.
    pub(crate) pairs: u16,
    /// Feature bits of the offloads in use, once the driver is ready.
    pub(crate) offloads: Option<u64>,
    /// The driver is asked to announce itself (VIRTIO_NET_S_ANNOUNCE) and has not acknowledged it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub(crate) announce: bool,
}

impl NetState {
    /// As it is after a reset.
    fn fresh(mac: MacAddr) -> Self {
        Self { mac, pairs: 1, offloads: None, announce: false }
    }
}

/// Frames and bytes so far.
#[derive(Debug, Default)]
pub(crate) struct Counters {
    pub(crate) rx_bytes: AtomicU64,
    pub(crate) rx_frames: AtomicU64,
    pub(crate) rx_dropped: AtomicU64,
    pub(crate) tx_bytes: AtomicU64,
    pub(crate) tx_frames: AtomicU64,
    pub(crate) tx_dropped: AtomicU64,
}

/// What the workers share.
#[derive(Debug)]
pub(crate) struct Shared {
    pub(crate) backend: Arc<dyn PacketBackend>,
    pub(crate) state: Mutex<NetState>,
    pub(crate) max_pairs: u16,
    pub(crate) counters: Counters,
    /// Tell each worker that its queue of the interface was switched on or off.
    pub(crate) switched: Vec<EventFd>,
}

impl Shared {
    /// Uses the first `pairs` queues of the interface.
    pub(crate) fn enable_queues(&self, pairs: u16) -> std::io::Result<()> {
        self.backend.enable_queues(usize::from(pairs))?;
        for switched in &self.switched {
            // A full counter is readable as well.
            let _ = switched.write(1);
        }
        Ok(())
    }
}

impl Shared {
    /// `struct virtio_net_config`.
    fn config_space(&self, mtu: Option<u16>) -> [u8; 12] {
        const LINK_UP: u16 = 1;
        const ANNOUNCE: u16 = 2;
        let mut config = [0; 12];
        let state = *self.state.lock();
        let status = LINK_UP | if state.announce { ANNOUNCE } else { 0 };
        config[..6].copy_from_slice(&state.mac.0);
        config[6..8].copy_from_slice(&status.to_le_bytes());
        config[8..10].copy_from_slice(&self.max_pairs.to_le_bytes());
        config[10..12].copy_from_slice(&mtu.unwrap_or(0).to_le_bytes());
        config
    }

    fn save(&self, kind: &'static str) -> Result<serde_json::Value, StateError> {
        let state = *self.state.lock();
        serde_json::to_value(state).map_err(|source| StateError::Parse { kind, source })
    }

    fn restore(&self, kind: &'static str, state: &serde_json::Value) -> Result<(), StateError> {
        let state = NetState::deserialize(state).map_err(|source| StateError::Parse { kind, source })?;
        if !(1..=self.max_pairs).contains(&state.pairs) {
            let reason =
                format!("{} queue pairs are in use, this device has {}", state.pairs, self.max_pairs);
            return Err(StateError::Invalid { kind, reason });
        }
        *self.state.lock() = state;
        Ok(())
    }
}

/// The guest's MAC address.
fn mac(id: &str, config: &NetConfig, context: &BuildContext) -> Result<MacAddr, BuildError> {
    if let Some(mac) = config.mac {
        return Ok(mac);
    }
    let mut bytes = [0; 6];
    let what = "cannot make up a MAC address".to_owned();
    let failed = |e| BuildError::Host { id: id.to_owned(), what, source: std::io::Error::other(e) };
    context.random.fill(&mut bytes).map_err(failed)?;
    Ok(MacAddr::local(bytes))
}

/// A virtio network device.
#[derive(Debug)]
pub struct Net {
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    queue_size: u16,
    features: u64,
    mtu: Option<u16>,
    mac: MacAddr,
    driver: Mutex<Option<announce::Driver>>,
}

/// Opens the tap and starts the workers of a network device. `fds` are open taps, one for each queue
/// pair, that were sent along with the config; they come before the config's own.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(
    id: &str,
    config: &NetConfig,
    fds: Vec<OwnedFd>,
    context: &BuildContext,
) -> Result<Arc<Net>, BuildError> {
    Net::new(id, config, open_tap(id, config, fds)?, context)
}

/// The tap of a checked config.
pub(crate) fn open_tap(id: &str, config: &NetConfig, fds: Vec<OwnedFd>) -> Result<Arc<Tap>, BuildError> {
    let sent = !fds.is_empty();
    let mut checked = config.clone();
    if sent {
        // The numbers in the config are the sender's and mean nothing here.
        checked.fds = Some(vec![-1; fds.len()]);
    }
    crate::registry::check(id, checked.validate())?;
    let failed = |e: TapError| {
        let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
        BuildError::Config { id: id.to_owned(), reason: format!("{e}{cause}") }
    };
    let tap = match (&config.fds, sent) {
        (_, true) => Tap::from_fds(fds),
        (Some(numbers), false) => {
            numbers.iter().map(|n| duplicate(*n)).collect::<Result<_, _>>().and_then(Tap::from_fds)
        }
        (None, false) => Tap::open(&TapOptions {
            name: config.tap.clone(),
            queues: usize::from(config.queue_pairs()),
            ip: config.ip,
            mask: config.mask,
            host_mac: config.host_mac,
            mtu: config.mtu,
        }),
    };
    tap.map_err(failed)
}

/// The MTU that the guest is told, if any.
pub(crate) fn shown_mtu(config: &NetConfig, backend: &dyn PacketBackend) -> Option<u16> {
    config.mtu.or_else(|| backend.mtu().filter(|mtu| *mtu != 1500 && *mtu >= 1280))
}

impl Net {
    /// A network device on an open back end.
    ///
    /// # Errors
    /// [`BuildError`] if the back end has too few queues or the host no threads.
    pub fn new(
        id: &str,
        config: &NetConfig,
        backend: Arc<dyn PacketBackend>,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        let queues = backend.queues();
        let pairs = config.queue_pairs();
        if queues.len() < usize::from(pairs) {
            let reason = format!("the interface has {} queues for {pairs} pairs", queues.len());
            return Err(BuildError::Config { id: id.to_owned(), reason });
        }
        let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
        let mac = mac(id, config, context)?;
        let mtu = shown_mtu(config, &*backend);
        let features = Self::offered(config, mtu, &*backend);
        let state = Mutex::new(NetState::fresh(mac));
        let mut switched = Vec::new();
        for _ in 0..pairs {
            let fd =
                EventFd::new(EFD_NONBLOCK | EFD_CLOEXEC).map_err(|e| host("cannot make an eventfd", e))?;
            switched.push(fd);
        }
        let counters = Counters::default();
        let shared = Arc::new(Shared { backend, state, max_pairs: pairs, counters, switched });
        let mut workers = Vec::new();
        for (n, queue) in queues.into_iter().take(usize::from(pairs)).enumerate() {
            let handler = Box::new(PairHandler::new(Arc::clone(&shared), queue, n as u16));
            let name = if pairs == 1 { id.to_owned() } else { format!("{id}_qp{n}") };
            let worker = Worker::start(&name, Role::Net, &*context.spawner, handler);
            workers.push(worker.map_err(|e| host("cannot start its thread", e))?);
        }
        shared.backend.enable_queues(1).map_err(|e| host("cannot switch the interface's queues", e))?;
        let (queue_size, driver) = (config.queue_size, Mutex::default());
        Ok(Arc::new(Self { shared, workers, queue_size, features, mtu, mac, driver }))
    }

    /// The features for a config, as far as the interface has them.
    pub(crate) fn offered(config: &NetConfig, mtu: Option<u16>, backend: &dyn PacketBackend) -> u64 {
        let mut f = feature::QUEUES | bit::MAC | bit::MRG_RXBUF | bit::STATUS;
        f |= bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_MAC_ADDR | bit::GUEST_ANNOUNCE;
        let mut guest = 0;
        if config.offload_csum {
            guest |= bit::GUEST_CSUM;
            f |= bit::CSUM;
            // Segmentation needs checksums.
            if config.offload_tso {
                guest |= bit::GUEST_TSO4 | bit::GUEST_TSO6 | bit::GUEST_ECN;
                f |= bit::HOST_TSO4 | bit::HOST_TSO6 | bit::HOST_ECN;
            }
            if config.offload_ufo {
                guest |= bit::GUEST_UFO;
                f |= bit::HOST_UFO;
            }
        }
        if guest != 0 {
            let works = |bits| backend.set_offloads(offloads(bits)).is_ok();
            if works(guest) {
                f |= guest | bit::CTRL_GUEST_OFFLOADS;
            } else if works(guest & !bit::GUEST_UFO) {
                f = (f | guest | bit::CTRL_GUEST_OFFLOADS) & !(bit::GUEST_UFO | bit::HOST_UFO);
            }
        }
        if mtu.is_some() {
            f |= bit::MTU;
        }
        if config.queue_pairs() > 1 {
            f |= bit::MQ;
        }
        f
    }

    /// The guest's MAC address.
    pub fn mac(&self) -> MacAddr {
        self.shared.state.lock().mac
    }

    /// The interface's name on the host.
    pub fn interface(&self) -> &str {
        self.shared.backend.name()
    }
}

impl VirtioDevice for Net {
    fn name(&self) -> &'static str {
        "virtio-net"
    }

    fn device_type(&self) -> u32 {
        kind::NET
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = vec![self.queue_size; 2 * self.workers.len()];
        sizes.push(CONTROL_SIZE);
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.shared.config_space(self.mtu), offset, data);
    }

    fn activate(&self, activation: Activation) {
        let Activation { queues, features, memory, interrupt } = activation;
        *self.driver.lock() = Some(announce::Driver { features, interrupt: Arc::clone(&interrupt) });
        // Without multi-queue the control queue is number 2 (section 5.1.2).
        let pairs = if features & bit::MQ != 0 { self.shared.max_pairs } else { 1 };
        let mut parts: Vec<Vec<VirtQueue>> = self.workers.iter().map(|_| Vec::new()).collect();
        for queue in queues {
            let pair = queue.index() / 2;
            // The first worker serves the control queue too.
            let worker = if pair < pairs { usize::from(pair) } else { 0 };
            if let Some(part) = parts.get_mut(worker) {
                part.push(queue);
            }
        }
        for (worker, queues) in self.workers.iter().zip(parts) {
            let (memory, interrupt) = (memory.clone(), Arc::clone(&interrupt) as Arc<dyn Interrupt>);
            worker.activate(Activation { queues, features, memory, interrupt });
        }
    }

    fn stop(&self) -> Vec<VirtQueue> {
        *self.driver.lock() = None;
        self.workers.iter().flat_map(Worker::stop).collect()
    }

    fn announce(&self) {
        self.announce_now();
    }

    fn reset(&self) {
        *self.shared.state.lock() = NetState::fresh(self.mac);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        self.shared.save("virtio-net")
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        self.shared.restore("virtio-net", state)
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        let c = &self.shared.counters;
        let all = [
            ("rx_bytes", &c.rx_bytes),
            ("rx_frames", &c.rx_frames),
            ("rx_dropped", &c.rx_dropped),
            ("tx_bytes", &c.tx_bytes),
            ("tx_frames", &c.tx_frames),
            ("tx_dropped", &c.tx_dropped),
        ];
        all.into_iter().map(|(name, n)| (name.to_owned(), n.load(Ordering::Relaxed))).collect()
    }
}
