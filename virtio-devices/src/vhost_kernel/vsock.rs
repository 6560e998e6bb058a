//! Sockets between the guest and the host's `AF_VSOCK`, by the host's kernel (`--vsock vhost=on`; virtio 1.2 section 5.10).

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};

use super::device::{Spec, VhostKernel, agree, open, rings};
use super::kernel::Vhost;
use super::relay::RINGS;
use crate::device::{VirtioDevice, feature, kind, read_bytes};
use crate::queue::{HandlerError, VirtQueue};
use crate::vhost_user::LocalQueue;
use crate::vhost_user::ring::SharedRings;
use crate::vsock::config::VsockConfig;

const PATH: &str = "/dev/vhost-vsock";
/// Descriptors in each queue: to the guest, from the guest, events.
const QUEUES: [u16; 3] = [256; 3];
/// Sockets that keep the limits of messages (section 5.10.3).
const SEQPACKET: u64 = 1 << 1;
/// All connections are lost (section 5.10.6.7).
const TRANSPORT_RESET: u32 = 0;

/// The config space and the event queue, of which the kernel knows nothing.
#[derive(Debug)]
struct Events {
    cid: u64,
    /// The driver is to be told that all connections are lost.
    lost: AtomicBool,
}

impl LocalQueue for Events {
    fn number(&self, _: u64) -> u16 {
        RINGS
    }

    fn serve(&self, queue: &mut VirtQueue, _: u64) -> Result<(), HandlerError> {
        // Buffers wait in the guest's ring until there is something to say.
        queue.enable_kicks()?;
        if !self.lost.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(chain) = queue.pop()? else { return Ok(()) };
        let event = TRANSPORT_RESET.to_le_bytes();
        queue.writer(&chain).write(&event)?;
        queue.push(chain.head, event.len() as u32)?;
        self.lost.store(false, Ordering::SeqCst);
        Ok(())
    }

    fn enabled(&self) -> u16 {
        RINGS
    }

    fn reset(&self) {
        self.lost.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::Value::Null)
    }

    fn restore(&self, _: &serde_json::Value) -> Result<(), StateError> {
        // The processes that the guest was connected to are not here.
        self.lost.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn announce(&self, _: u64) -> bool {
        false
    }

    fn address(&self) -> [u8; 6] {
        [0; 6]
    }
}

/// Opens vhost-vsock and takes the guest's address.
///
/// # Errors
/// [`BuildError`] naming the field, or what the kernel refused.
pub fn build(
    id: &str,
    config: &VsockConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let rings = rings(id, usize::from(RINGS))?;
    let fds = config.vhostfd.map(|fd| [fd]);
    let kernels = open(id, Path::new(PATH), (fds.as_ref().map(|fds| &fds[..]), 1), &rings)?;
    Ok(on(id, config, (kernels, rings), context)?)
}

/// As [`build`], on what is open.
pub(super) fn on(
    id: &str,
    config: &VsockConfig,
    (kernels, rings): (Vec<Box<dyn Vhost>>, SharedRings),
    context: &BuildContext,
) -> Result<Arc<VhostKernel>, BuildError> {
    let theirs = agree(id, &kernels)?;
    for kernel in &kernels {
        kernel.set_guest_cid(config.cid).map_err(|source| BuildError::Host {
            id: id.to_owned(),
            what: format!("cannot have cid {}: another VM of this host may have it", config.cid),
            source,
        })?;
    }
    let own = feature::QUEUES & !feature::INDIRECT_DESC;
    let kernel_features = feature::VERSION_1 | theirs & SEQPACKET;
    let spec = Spec {
        id: id.to_owned(),
        name: "vhost-vsock",
        device_type: kind::VSOCK,
        queue_sizes: QUEUES.to_vec(),
        features: own | kernel_features,
        kernel_features,
        local: Arc::new(Events { cid: config.cid, lost: AtomicBool::new(false) }),
        taps: Vec::new(),
    };
    VhostKernel::build(spec, kernels, rings, context)
}
