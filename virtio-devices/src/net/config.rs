//! `--net` and `NetConfig`.

use std::net::IpAddr;

pub use holdfast_net::MacAddr;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::config::{Checker, FieldError, MAX_QUEUES, RateLimiterConfig, yes};

/// Who listens on a vhost-user socket.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum VhostMode {
    /// The other process listens.
    #[default]
    #[serde(alias = "client")]
    Client,
    /// Holdfast listens.
    #[serde(alias = "server")]
    Server,
}

/// A virtio network device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct NetConfig {
    /// Name of the tap interface; made if it does not exist. The host chooses one if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tap: Option<String>,
    /// IPv4 or IPv6 address of the host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ip: Option<IpAddr>,
    /// Netmask of the host's end, of the same family as `ip`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mask: Option<IpAddr>,
    /// MAC address of the guest; made up if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mac: Option<MacAddr>,
    /// MAC address of the host's end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub host_mac: Option<MacAddr>,
    /// Largest packet that the link carries, in bytes without the Ethernet header.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u16>,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Number of receive and transmit queues together: two for each pair.
    #[serde(default = "num_queues")]
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
    /// Served by a vhost-user process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of the vhost-user process.
    #[serde(default, alias = "socket", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-cli" = "socket"))]
    pub vhost_socket: Option<String>,
    /// Who listens on the vhost-user socket.
    #[serde(default)]
    pub vhost_mode: VhostMode,
    /// Packets are moved by the host's kernel (vhost-net).
    #[serde(default, skip_serializing_if = "crate::config::is_false")]
    pub vhost: bool,
    /// Open file descriptors of `/dev/vhost-net`, one for each queue pair; opened if absent.
    #[serde(default, alias = "vhostfd", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-cli" = "vhostfd"))]
    pub vhostfds: Option<Vec<i32>>,
    /// Name of the device, unique in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Open tap file descriptors, one for each queue pair.
    #[serde(default, alias = "fd", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-cli" = "fd"))]
    pub fds: Option<Vec<i32>>,
    /// Limits of bytes and operations per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The hot-plug port that it is plugged into, instead of the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// PCI device number on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Offer TCP segmentation offload to the guest.
    #[serde(default = "yes")]
    pub offload_tso: bool,
    /// Offer UDP fragmentation offload to the guest.
    #[serde(default = "yes")]
    pub offload_ufo: bool,
    /// Offer checksum offload to the guest.
    #[serde(default = "yes")]
    pub offload_csum: bool,
}

fn num_queues() -> u16 {
    2
}

fn queue_size() -> u16 {
    256
}

/// Smallest MTU that may be set: IPv6's (RFC 8200).
const MIN_MTU: u16 = 1280;

impl Default for NetConfig {
    fn default() -> Self {
        Self {
            tap: None,
            ip: None,
            mask: None,
            mac: None,
            host_mac: None,
            mtu: None,
            iommu: false,
            num_queues: num_queues(),
            queue_size: queue_size(),
            vhost_user: false,
            vhost_socket: None,
            vhost_mode: VhostMode::default(),
            vhost: false,
            vhostfds: None,
            id: None,
            fds: None,
            rate_limiter_config: None,
            pci_segment: 0,
            bus: None,
            pci_device_id: None,
            offload_tso: true,
            offload_ufo: true,
            offload_csum: true,
        }
    }
}

impl NetConfig {
    /// Receive and transmit queue pairs.
    pub fn queue_pairs(&self) -> u16 {
        self.num_queues / 2
    }

    /// What another process decides.
    fn check_vhost_user(&self, check: &mut Checker) {
        let server = self.vhost_mode != VhostMode::Client;
        if !self.vhost_user {
            let idle = "is of no use without `vhost_user`";
            check.refuse(self.vhost_socket.is_some(), "vhost_socket", idle);
            check.refuse(server, "vhost_mode", idle);
            return;
        }
        let named = self.vhost_socket.as_deref().is_some_and(|socket| !socket.is_empty());
        check.refuse(!named, "vhost_socket", "is missing: name the socket");
        let of_back_end = [
            ("tap", self.tap.is_some()),
            ("ip", self.ip.is_some()),
            ("mask", self.mask.is_some()),
            ("host_mac", self.host_mac.is_some()),
            ("fds", self.fds.is_some()),
        ];
        for (field, given) in of_back_end {
            check.refuse(given, field, "does not go with `vhost_user`: the interface is the back end's");
        }
    }

    /// What the host's kernel needs.
    fn check_vhost(&self, check: &mut Checker) {
        let both = self.vhost && self.vhost_user;
        check.refuse(
            both,
            "vhost",
            "does not go with `vhost_user`: packets are moved by the kernel or by a process",
        );
        let Some(fds) = &self.vhostfds else { return };
        check.refuse(!self.vhost, "vhostfds", "is of no use without `vhost`");
        let want = usize::from(self.queue_pairs());
        let reason = format!("{} file descriptors for {want} queue pairs", fds.len());
        check.refuse(fds.len() != want, "vhostfds", reason);
    }

    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        self.check_vhost_user(&mut check);
        self.check_vhost(&mut check);
        check.unsupported(self.rate_limiter_config.is_some(), "rate_limiter_config");
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        check.port(self.bus.as_ref(), self.pci_device_id);
        check.queue_size(self.queue_size);
        let n = self.num_queues;
        let even = n.is_multiple_of(2) && (2..=2 * MAX_QUEUES).contains(&n);
        check.refuse(!even, "num_queues", format!("{n} is not an even number from 2 to {}", 2 * MAX_QUEUES));
        if let Some(tap) = &self.tap {
            let fits =
                !tap.is_empty() && tap.len() < holdfast_net::IF_NAME_SIZE && !tap.contains(['/', '\0']);
            check.refuse(!fits, "tap", format!("`{tap}` is not an interface name of 1 to 15 bytes"));
        }
        if let Some(mtu) = self.mtu {
            check.refuse(mtu < MIN_MTU, "mtu", format!("{mtu} is less than {MIN_MTU}"));
        }
        if let Some(mac) = self.mac {
            check.refuse(mac.is_multicast(), "mac", format!("{mac} is a multicast address"));
        }
        match (self.ip, self.mask) {
            (None, Some(_)) => check.refuse(true, "mask", "is of no use without `ip`"),
            (Some(ip), Some(mask)) => {
                check.refuse(ip.is_ipv4() != mask.is_ipv4(), "mask", "is not of the address family of `ip`");
                let contiguous = holdfast_net::prefix_len(mask).is_some();
                check.refuse(!contiguous, "mask", format!("`{mask}` is not a netmask"));
            }
            _ => {}
        }
        if let Some(fds) = &self.fds {
            let want = usize::from(n / 2);
            let reason = format!("{} file descriptors for {want} queue pairs", fds.len());
            check.refuse(fds.len() != want, "fds", reason);
            check.refuse(self.tap.is_some(), "fds", "cannot be given together with `tap`");
        }
        check.0
    }
}
