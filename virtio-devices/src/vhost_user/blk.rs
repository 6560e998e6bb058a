//! A disk by a vhost-user back end (`--disk vhost_user=on`).

use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};

use super::{ConfigSource, Door, Spec, VhostUser};
use crate::blk::bit;
use crate::blk::config::DiskConfig;
use crate::device::{VirtioDevice, kind};

/// `SIZE_MAX` and `GEOMETRY` (virtio 1.2 section 5.2.3), which our own disks do not offer.
const SIZE_MAX: u64 = 1 << 1;
const GEOMETRY: u64 = 1 << 4;
/// Bytes of `struct virtio_blk_config` up to the last field for a feature that is passed on.
const CONFIG_LEN: u32 = 60;
const SEG_MAX_AT: usize = 12;
const NUM_QUEUES_AT: usize = 34;

/// What the guest may know of the back end's queues.
fn adapt(spec: &Spec, config: &mut [u8]) {
    let size = spec.queue_sizes.first().copied().unwrap_or(0);
    // Without indirect tables a request with its header and status must fit the ring.
    let most = u32::from(size.saturating_sub(2).max(1));
    if let Some(field) = config.get_mut(SEG_MAX_AT..SEG_MAX_AT + 4) {
        let theirs = u32::from_le_bytes([field[0], field[1], field[2], field[3]]);
        field.copy_from_slice(&theirs.clamp(1, most).to_le_bytes());
    }
    if let Some(field) = config.get_mut(NUM_QUEUES_AT..NUM_QUEUES_AT + 2) {
        field.copy_from_slice(&(spec.queue_sizes.len() as u16).to_le_bytes());
    }
}

/// Connects to the back end.
///
/// # Errors
/// [`BuildError`] naming the field, or what the back end or the host refused.
pub fn build(
    id: &str,
    config: &DiskConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let mut features = SIZE_MAX
        | bit::SEG_MAX
        | GEOMETRY
        | bit::RO
        | bit::BLK_SIZE
        | bit::FLUSH
        | bit::TOPOLOGY
        | bit::CONFIG_WCE
        | bit::DISCARD
        | bit::WRITE_ZEROES;
    let mut required = Vec::new();
    if config.num_queues > 1 {
        features |= bit::MQ;
        required.push((bit::MQ, "has one queue only: leave `num_queues` out"));
    }
    if config.readonly {
        required.push((bit::RO, "lets the guest write: make it read-only, or leave `readonly` out"));
    }
    let socket = config.vhost_socket.clone().unwrap_or_default();
    let spec = Spec {
        queue_sizes: vec![config.queue_size; usize::from(config.num_queues)],
        features,
        required,
        config: ConfigSource::BackEnd(CONFIG_LEN),
        adapt,
        ..Spec::new(id, "vhost-user-blk", kind::BLOCK, Door::Connect(socket.into()))
    };
    Ok(VhostUser::build(spec, context)?)
}
