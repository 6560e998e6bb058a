//! virtio-fs (virtio 1.2 section 5.11) by a vhost-user back end.

pub mod config;

use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};

use super::{ConfigSource, Door, Spec, VhostUser};
use crate::device::{VirtioDevice, kind};
use config::{FsConfig, TAG_LEN};

/// Connects to the back end.
///
/// # Errors
/// [`BuildError`] naming the field, or what the back end or the host refused.
pub fn build(
    id: &str,
    config: &FsConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    // struct virtio_fs_config (section 5.11.4): the tag, padded with zeros, and the number of request queues.
    let mut space = vec![0; TAG_LEN];
    for (to, from) in space.iter_mut().zip(config.tag.bytes()) {
        *to = from;
    }
    space.extend(u32::from(config.num_queues).to_le_bytes());
    let spec = Spec {
        // One more for urgent requests (section 5.11.2).
        queue_sizes: vec![config.queue_size; usize::from(config.num_queues) + 1],
        config: ConfigSource::Fixed(space),
        stateful: true,
        ..Spec::new(id, "vhost-user-fs", kind::FS, Door::Connect(config.socket.clone()))
    };
    Ok(VhostUser::build(spec.with_shared_memory(context)?, context)?)
}
