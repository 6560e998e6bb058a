//! Sockets between guest and host by a vhost-user back end (`--vsock vhost_user=on`).

use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};

use super::{ConfigSource, Door, Spec, VhostUser};
use crate::device::{VirtioDevice, kind};
use crate::vsock::config::VsockConfig;

/// Descriptors in each queue: to the guest, from the guest, events.
const QUEUES: [u16; 3] = [256; 3];

/// Connects to the back end.
///
/// # Errors
/// [`BuildError`] naming the field, or what the back end or the host refused.
pub fn build(
    id: &str,
    config: &VsockConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let own = config.cid.to_le_bytes();
    let spec = Spec {
        queue_sizes: QUEUES.to_vec(),
        config: match config.cid {
            0 => ConfigSource::BackEnd(own.len() as u32),
            _ => ConfigSource::Fixed(own.to_vec()),
        },
        // Buffers to receive into and for events wait; what the guest sends does not.
        settles: |queue| queue == 1,
        ..Spec::new(id, "vhost-user-vsock", kind::VSOCK, Door::Connect(config.socket.clone()))
    };
    let device = VhostUser::build(spec, context)?;
    // A guest and a back end that do not agree on its address would never hear of each other.
    match device.back_end_config(own.len() as u32) {
        None if config.cid == 0 => {
            let reason = "cid=0: the vhost-user back end does not say which cid it has".to_owned();
            Err(BuildError::Config { id: id.to_owned(), reason })
        }
        Some(theirs) if config.cid != 0 && theirs != own => {
            let cid = theirs.first_chunk().map_or(0, |bytes| u64::from_le_bytes(*bytes));
            let reason = format!("cid={}: the vhost-user back end was started for cid {cid}", config.cid);
            Err(BuildError::Config { id: id.to_owned(), reason })
        }
        _ => Ok(device),
    }
}
