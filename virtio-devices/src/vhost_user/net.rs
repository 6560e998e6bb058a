//! A network card by a vhost-user back end (`--net vhost_user=on`).

use std::path::Path;
use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};

use super::{Door, LocalQueue, Spec, VhostUser};
use crate::device::{VirtioDevice, kind};
use crate::net::config::{NetConfig, VhostMode};
use crate::net::front_end::NetControl;
use crate::net::{CONTROL_SIZE, bit};

/// Connects to the back end, or waits for it to connect.
///
/// # Errors
/// [`BuildError`] naming the field, or what the back end or the host refused.
pub fn build(
    id: &str,
    config: &NetConfig,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let control = NetControl::new(id, config, context)?;
    let socket = config.vhost_socket.clone().unwrap_or_default();
    let door = match config.vhost_mode {
        VhostMode::Client => Door::Connect(socket.into()),
        VhostMode::Server => Door::listen(Path::new(&socket)).map_err(|source| {
            let what = format!("cannot listen on `{socket}`");
            BuildError::Host { id: id.to_owned(), what, source }
        })?,
    };
    let mut features = bit::MRG_RXBUF;
    if config.offload_csum {
        features |= bit::CSUM | bit::GUEST_CSUM;
        if config.offload_tso {
            features |= bit::HOST_TSO4 | bit::HOST_TSO6 | bit::HOST_ECN;
            features |= bit::GUEST_TSO4 | bit::GUEST_TSO6 | bit::GUEST_ECN;
        }
        if config.offload_ufo {
            features |= bit::HOST_UFO | bit::GUEST_UFO;
        }
    }
    let mut own_features = bit::MAC | bit::STATUS | bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_MAC_ADDR;
    own_features |= bit::GUEST_ANNOUNCE;
    if config.mtu.is_some() {
        own_features |= bit::MTU;
    }
    let mut required = Vec::new();
    if config.queue_pairs() > 1 {
        features |= bit::MQ;
        required.push((bit::MQ, "has one pair of queues only: leave `num_queues` out"));
    }
    let mut queue_sizes = vec![config.queue_size; 2 * usize::from(config.queue_pairs())];
    queue_sizes.push(CONTROL_SIZE);
    let local: Arc<dyn LocalQueue> = Arc::new(control);
    let spec = Spec {
        queue_sizes,
        features,
        own_features,
        required,
        local: Some(local),
        // Buffers to receive into wait for packets.
        settles: |queue| queue % 2 == 1,
        ..Spec::new(id, "vhost-user-net", kind::NET, door)
    };
    Ok(VhostUser::build(spec, context)?)
}
