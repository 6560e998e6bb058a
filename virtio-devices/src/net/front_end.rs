//! What is left here of a network card whose packets another process moves: the config space and the control queue.

use std::io;
use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_net::{Offloads, PacketBackend, PacketQueue};

use super::config::NetConfig;
use super::{Counters, NetState, Shared, bit, control};
use crate::device::read_bytes;
use crate::queue::{HandlerError, VirtQueue};
use crate::vhost_user::LocalQueue;

/// An interface that is the other process's.
#[derive(Debug)]
struct Elsewhere(String);

impl PacketBackend for Elsewhere {
    fn name(&self) -> &str {
        &self.0
    }

    fn queues(&self) -> Vec<Arc<dyn PacketQueue>> {
        Vec::new()
    }

    fn set_offloads(&self, _: Offloads) -> io::Result<()> {
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Whoever has the rings reads the number from the state.
    fn enable_queues(&self, _: usize) -> io::Result<()> {
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        None
    }
}

/// The config space and the control queue.
#[derive(Debug)]
pub(crate) struct NetControl {
    /// The device's kind in saved states.
    kind: &'static str,
    shared: Shared,
    mac: holdfast_net::MacAddr,
    mtu: Option<u16>,
}

impl NetControl {
    /// Of a card whose interface the other process has.
    pub(crate) fn new(id: &str, config: &NetConfig, context: &BuildContext) -> Result<Self, BuildError> {
        let backend = Arc::new(Elsewhere(id.to_owned()));
        Self::of("vhost-user-net", id, config, (backend, config.mtu), context)
    }

    /// Of a card of this kind, with its interface and the MTU that the guest is told.
    pub(crate) fn of(
        kind: &'static str,
        id: &str,
        config: &NetConfig,
        (backend, mtu): (Arc<dyn PacketBackend>, Option<u16>),
        context: &BuildContext,
    ) -> Result<Self, BuildError> {
        let mac = super::mac(id, config, context)?;
        let shared = Shared {
            backend,
            state: parking_lot::Mutex::new(NetState::fresh(mac)),
            max_pairs: config.queue_pairs(),
            counters: Counters::default(),
            switched: Vec::new(),
        };
        Ok(Self { kind, shared, mac, mtu })
    }
}

impl LocalQueue for NetControl {
    fn number(&self, features: u64) -> u16 {
        // Without multi-queue the control queue is number 2 (section 5.1.2).
        2 * if features & bit::MQ != 0 { self.shared.max_pairs } else { 1 }
    }

    fn begin(&self, features: u64) -> io::Result<()> {
        let (pairs, on) = {
            let mut state = self.shared.state.lock();
            (state.pairs, *state.offloads.get_or_insert(features & bit::GUEST_OFFLOADS))
        };
        self.shared.backend.set_offloads(super::offloads(on))?;
        self.shared.enable_queues(pairs)
    }

    fn serve(&self, queue: &mut VirtQueue, features: u64) -> Result<(), HandlerError> {
        control::serve_all(&self.shared, queue, features)
    }

    fn enabled(&self) -> u16 {
        2 * self.shared.state.lock().pairs
    }

    fn reset(&self) {
        *self.shared.state.lock() = NetState::fresh(self.mac);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        self.shared.save(self.kind)
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), StateError> {
        self.shared.restore(self.kind, state)
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.shared.config_space(self.mtu), offset, data);
    }

    fn announce(&self, features: u64) -> bool {
        let asked = features & bit::GUEST_ANNOUNCE != 0;
        self.shared.state.lock().announce |= asked;
        asked
    }

    fn address(&self) -> [u8; 6] {
        self.shared.state.lock().mac.0
    }
}
