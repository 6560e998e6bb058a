//! A network card on a tap whose packets the host's kernel moves (`--net vhost=on`).

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};
use holdfast_net::PacketBackend;

use super::device::{Spec, VhostKernel, agree, open, rings};
use super::kernel::Vhost;
use crate::device::{VirtioDevice, feature, kind};
use crate::net::config::NetConfig;
use crate::net::front_end::NetControl;
use crate::net::{CONTROL_SIZE, Net, bit, open_tap, shown_mtu};
use crate::vhost_user::ring::SharedRings;

const PATH: &str = "/dev/vhost-net";

/// Opens the tap and vhost-net, once for each queue pair. `fds` are open taps, as with [`crate::net::build`].
///
/// # Errors
/// [`BuildError`] naming the field, or what the kernel refused.
pub fn build(
    id: &str,
    config: &NetConfig,
    fds: Vec<OwnedFd>,
    context: &BuildContext,
) -> Result<Arc<dyn VirtioDevice>, BuildError> {
    let tap = open_tap(id, config, fds)?;
    let pairs = config.queue_pairs();
    let rings = rings(id, 2 * usize::from(pairs))?;
    let kernels = open(id, Path::new(PATH), (config.vhostfds.as_deref(), pairs), &rings)?;
    Ok(on(id, config, tap, (kernels, rings), context)?)
}

/// As [`build`], on what is open.
pub(super) fn on(
    id: &str,
    config: &NetConfig,
    tap: Arc<dyn PacketBackend>,
    (kernels, rings): (Vec<Box<dyn Vhost>>, SharedRings),
    context: &BuildContext,
) -> Result<Arc<VhostKernel>, BuildError> {
    let pairs = config.queue_pairs();
    let taps = tap.queues();
    if taps.len() < usize::from(pairs) {
        let reason = format!("the interface has {} queues for {pairs} pairs", taps.len());
        return Err(BuildError::Config { id: id.to_owned(), reason });
    }
    let theirs = agree(id, &kernels)?;
    let mtu = shown_mtu(config, &*tap);
    // The tap does what there is to do to a packet. A chain must fit the kernel's ring: no indirect tables.
    let mut features = Net::offered(config, mtu, &*tap) & !feature::INDIRECT_DESC;
    let kernel_features = feature::VERSION_1 | theirs & bit::MRG_RXBUF;
    features &= kernel_features | !bit::MRG_RXBUF;
    tap.enable_queues(1).map_err(|source| BuildError::Host {
        id: id.to_owned(),
        what: "cannot switch the interface's queues".to_owned(),
        source,
    })?;
    let mut queue_sizes = vec![config.queue_size; 2 * usize::from(pairs)];
    queue_sizes.push(CONTROL_SIZE);
    let local = Arc::new(NetControl::of("vhost-net", id, config, (tap, mtu), context)?);
    let spec = Spec {
        id: id.to_owned(),
        name: "vhost-net",
        device_type: kind::NET,
        queue_sizes,
        features,
        kernel_features,
        local,
        taps,
    };
    VhostKernel::build(spec, kernels, rings, context)
}
