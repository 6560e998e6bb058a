//! Any virtio device that a vhost-user back end implements by itself.

pub mod config;

use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};

use super::{ConfigSource, Door, Spec, VhostUser};
use crate::device::{VirtioDevice, kind};
use config::GenericVhostUserConfig;

/// Bytes of config space that are asked of the back end.
const CONFIG_LEN: u32 = 256;
/// The feature bits that belong to device types (virtio 1.2 section 2.2), less bit 30, which vhost-user uses.
const DEVICE_FEATURES: u64 = 0xff_ffff | 0x3fff << 50;

/// Connects to the back end.
///
/// # Errors
/// [`BuildError`] naming the field, or what the back end or the host refused.
pub fn build(
    id: &str,
    config: &GenericVhostUserConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let spec = Spec {
        queue_sizes: config.queue_sizes.clone(),
        features: DEVICE_FEATURES,
        config: ConfigSource::BackEnd(CONFIG_LEN),
        stateful: config.device_type == kind::FS,
        // Which of its requests end by themselves is not known: what is under way is given to the back end again.
        settles: |_| false,
        ..Spec::new(id, "vhost-user-generic", config.device_type, Door::Connect(config.socket.clone()))
    };
    Ok(VhostUser::build(spec.with_shared_memory(context)?, context)?)
}
