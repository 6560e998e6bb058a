//! Network back ends that are named before a card uses them (QEMU's `netdev_add`).

use std::path::PathBuf;

use holdfast_config::NetConfig;
use schemars::JsonSchema;
use serde::Deserialize;

/// The UNIX socket of a vhost-user back end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BackEndSocket {
    /// Where it is.
    pub path: PathBuf,
    /// We listen there and the back end connects, not the other way round.
    pub listen: bool,
}

/// A network back end, as `netdev_add` describes it.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(tag = "type", rename_all = "kebab-case")]
pub enum Netdev {
    /// A tap.
    Tap(TapNetdev),
    /// A vhost-user process.
    VhostUser(VhostUserNetdev),
}

/// A tap.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapNetdev {
    /// Its name.
    pub id: String,
    /// Name of the interface; made if it does not exist, and the host chooses one if it is absent.
    #[serde(default)]
    pub ifname: Option<String>,
    /// Number of queue pairs.
    #[serde(default)]
    pub queues: Option<u16>,
    /// A program that sets it up: only `no`.
    #[serde(default)]
    pub script: Option<String>,
    /// A program that takes it down: only `no`.
    #[serde(default)]
    pub downscript: Option<String>,
    /// Packets are moved by the host's kernel (vhost-net).
    #[serde(default)]
    pub vhost: Option<bool>,
    /// The same.
    #[serde(default)]
    pub vhostforce: Option<bool>,
    /// An open file descriptor of `/dev/vhost-net`: not taken, it is opened by its name.
    #[serde(default)]
    pub vhostfd: Option<String>,
    /// Several of them, in the same way.
    #[serde(default)]
    pub vhostfds: Option<String>,
}

impl TapNetdev {
    /// Whether the kernel is to move packets. As with QEMU, `vhostforce` alone asks for it.
    pub fn is_vhost(&self) -> bool {
        self.vhost.unwrap_or(self.vhostforce == Some(true))
    }
}

/// A vhost-user process.
#[derive(Debug, Clone, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VhostUserNetdev {
    /// Its name.
    pub id: String,
    /// Name of its socket (`chardev-add`).
    pub chardev: String,
    /// Number of queue pairs.
    #[serde(default)]
    pub queues: Option<u16>,
}

/// What a card has of its own when a [`Netdev`] is behind it.
#[derive(Debug, Clone, Default)]
pub struct NetdevCard {
    /// Name of the back end.
    pub netdev: String,
    /// All queue pairs that the back end has are used, not only one.
    pub multi_queue: bool,
    /// How many MSI-X vectors it is to have, if that is said.
    pub vectors: Option<u32>,
    /// Everything else that a card has; what the back end says is put in.
    pub card: NetConfig,
}
