//! `holdfast net-backend`: a tap for the VM of another process.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError};
use holdfast_net::MacAddr;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::NetConfig;
use super::{Net, NetState, bit};
use crate::config::{Checker, FieldError, yes};
use crate::device::VirtioDevice;
use crate::queue::VirtQueue;
use crate::worker::Activation;

/// A tap that is served to other processes by vhost-user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetBackEndConfig {
    /// The UNIX socket on which front ends connect.
    pub socket: PathBuf,
    /// Connect to `socket`, on which the front end listens.
    #[serde(default)]
    pub client: bool,
    /// Name of the tap interface; made if it does not exist. The host chooses one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// IPv4 or IPv6 address of the host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Netmask of the host's end, of the same family as `ip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<IpAddr>,
    /// MAC address of the host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddr>,
    /// Largest packet that the link carries, in bytes without the Ethernet header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Most receive and transmit queues together that a front end may use: two for each pair.
    #[serde(default = "two")]
    pub num_queues: u16,
    /// Most descriptors in each queue, a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
    /// Offer TCP segmentation offload.
    #[serde(default = "yes")]
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload.
    #[serde(default = "yes")]
    pub offload_ufo: bool,
    /// Offer checksum offload.
    #[serde(default = "yes")]
    pub offload_csum: bool,
}

fn two() -> u16 {
    2
}

fn queue_size() -> u16 {
    1024
}

impl NetBackEndConfig {
    /// The same interface in the words of `--net`.
    pub fn net(&self) -> NetConfig {
        NetConfig {
            tap: self.tap.clone(),
            ip: self.ip,
            mask: self.mask,
            host_mac: self.host_mac,
            mtu: self.mtu,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            offload_tso: self.offload_tso,
            offload_ufo: self.offload_ufo,
            offload_csum: self.offload_csum,
            id: Some("net".to_owned()),
            ..NetConfig::default()
        }
    }

    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.refuse(self.socket.as_os_str().is_empty(), "socket", "is empty: name a UNIX socket");
        check.0.extend(self.net().validate());
        check.0
    }
}

/// The queues of a network device. Its config space and its control queue are the front end's.
#[derive(Debug)]
pub struct NetBackEnd(Arc<Net>);

/// Opens the tap.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(config: &NetBackEndConfig, context: &BuildContext) -> Result<Arc<NetBackEnd>, BuildError> {
    crate::registry::check("net", config.validate())?;
    Ok(Arc::new(NetBackEnd(super::build("net", &config.net(), Vec::new(), context)?)))
}

impl NetBackEnd {
    /// The interface's name on the host.
    pub fn interface(&self) -> &str {
        self.0.interface()
    }
}

impl VirtioDevice for NetBackEnd {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn device_type(&self) -> u32 {
        self.0.device_type()
    }

    fn features(&self) -> u64 {
        let front = bit::CTRL_VQ
            | bit::CTRL_RX
            | bit::CTRL_MAC_ADDR
            | bit::CTRL_GUEST_OFFLOADS
            | bit::GUEST_ANNOUNCE
            | bit::MAC
            | bit::STATUS;
        self.0.features() & !front
    }

    fn queue_sizes(&self) -> Vec<u16> {
        let mut sizes = self.0.queue_sizes();
        // The control queue.
        sizes.pop();
        sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }

    fn activate(&self, activation: Activation) {
        // As many pairs as the front end has enabled, and what the driver accepted, for its control queue is not here.
        let pairs = activation.queues.iter().map(|queue| queue.index() / 2 + 1).max().unwrap_or(1);
        let mac = self.0.mac;
        *self.0.shared.state.lock() = NetState { pairs, ..NetState::fresh(mac) };
        self.0.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        self.0.stop()
    }

    fn reset(&self) {
        self.0.reset();
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.0.counters()
    }
}
