//! Devices that come and go, and the sockets of their back ends.

use std::path::PathBuf;

use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, MacAddr, NetConfig, VmRemoveDevice, VsockConfig,
};
use holdfast_virtio::blk::OnError;
use holdfast_virtio::blk::config::QemuBlk;
use holdfast_vmm::control::{self as ops, BackEndSocket, ControlHandle, Netdev, NetdevCard};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::block::Id;
use super::commands::Empty;
use super::request::QmpError;
use crate::call;

type Reply<T> = Result<T, QmpError>;

/// Arguments of `device_add`: the properties of all drivers that there are.
#[derive(Debug, Clone, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct DeviceAdd {
    /// QEMU's name of the device.
    driver: String,
    /// Name of the device, unique in the VM.
    #[serde(default)]
    id: Option<String>,
    /// Where it is plugged in: a hot-plug port.
    #[serde(default)]
    bus: Option<String>,
    /// Name of the node that a disk shows.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    drive: Option<String>,
    /// Serial number of a disk.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    serial: Option<String>,
    /// Number of a disk's request queues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_queues: Option<u16>,
    /// Descriptors in each queue.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    queue_size: Option<u16>,
    /// What is done when a read fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    rerror: Option<OnError>,
    /// What is done when a write fails.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    werror: Option<OnError>,
    /// Name of the socket of a vhost-user back end (`chardev-add`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    chardev: Option<String>,
    /// The name under which a shared directory is mounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    tag: Option<String>,
    /// Number of a shared directory's request queues.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_request_queues: Option<u16>,
    /// Type of a generic virtio device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    virtio_id: Option<u32>,
    /// Number of its queues.
    #[serde(default, rename = "num_vqs", skip_serializing_if = "Option::is_none")]
    num_vqs: Option<u16>,
    /// Their size.
    #[serde(default, rename = "vq_size", skip_serializing_if = "Option::is_none")]
    vq_size: Option<u16>,
    /// The guest's address, for sockets.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    guest_cid: Option<u64>,
    /// Name of a card's back end (`netdev_add`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    netdev: Option<String>,
    /// The card's MAC address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mac: Option<MacAddr>,
    /// Use all queue pairs of the card's back end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    mq: Option<bool>,
    /// Number of the card's MSI-X vectors: two for each queue pair and two more.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    vectors: Option<u32>,
    /// Largest packet that the card's driver is to send.
    #[serde(default, rename = "host_mtu", skip_serializing_if = "Option::is_none")]
    host_mtu: Option<u16>,
    /// Descriptors in each of the card's receive queues, and in the others.
    #[serde(default, rename = "rx_queue_size", skip_serializing_if = "Option::is_none")]
    rx_queue_size: Option<u16>,
    /// The same as `rx_queue_size`.
    #[serde(default, rename = "tx_queue_size", skip_serializing_if = "Option::is_none")]
    tx_queue_size: Option<u16>,
}

/// The names of a network card's driver.
const CARDS: [&str; 4] =
    ["virtio-net-pci", "virtio-net-pci-non-transitional", "virtio-net", "virtio-net-device"];

/// The properties, apart from `driver`, `id` and `bus`, that a driver has.
fn properties(driver: &str) -> Option<&'static [&'static str]> {
    let disk = QemuBlk::DRIVERS.contains(&driver);
    Some(match driver {
        _ if disk => &["drive", "serial", "num-queues", "queue-size", "rerror", "werror"],
        _ if CARDS.contains(&driver) => {
            &["netdev", "mac", "mq", "vectors", "host_mtu", "rx_queue_size", "tx_queue_size"]
        }
        "vhost-user-blk-pci" | "vhost-user-blk" => &["chardev", "num-queues", "queue-size"],
        "vhost-user-fs-pci" | "vhost-user-fs" => &["chardev", "tag", "num-request-queues", "queue-size"],
        "vhost-user-vsock-pci" | "vhost-user-vsock" => &["chardev"],
        "vhost-vsock-pci" | "vhost-vsock-pci-non-transitional" => &["guest-cid"],
        "vhost-user-device-pci" | "vhost-user-device" => &["chardev", "virtio-id", "num_vqs", "vq_size"],
        _ => return None,
    })
}

impl DeviceAdd {
    /// Fails with QEMU's words if the driver is not there, or a property that it does not have is given.
    fn check(&self) -> Reply<()> {
        let driver = &self.driver;
        let known = properties(driver)
            .ok_or_else(|| QmpError::generic(format!("'{driver}' is not a valid device model name")))?;
        let given = serde_json::to_value(self).map_err(|error| QmpError::generic(error.to_string()))?;
        for name in given.as_object().into_iter().flat_map(|map| map.keys()) {
            if !["driver", "id", "bus"].contains(&name.as_str()) && !known.contains(&name.as_str()) {
                return Err(QmpError::generic(format!("Property '{driver}.{name}' not found")));
            }
        }
        Ok(())
    }

    /// The socket that `chardev` names.
    async fn socket(&self, handle: &ControlHandle) -> Reply<PathBuf> {
        let missing = || QmpError::generic("Parameter 'chardev' is missing");
        let label = self.chardev.clone().ok_or_else(missing)?;
        let found = call(handle, ops::ChardevSocket(label.clone())).await?;
        let text = format!("Property '{}.chardev' can't find value '{label}'", self.driver);
        let socket = found.ok_or_else(|| QmpError::generic(text))?;
        if socket.listen {
            let why = "its back end listens itself (server=false)";
            return Err(QmpError::generic(format!("'{}' does not take a server: {why}", self.driver)));
        }
        Ok(socket.path)
    }

    /// The card, without its back end.
    fn card(self) -> Reply<NetdevCard> {
        let netdev = self.netdev.ok_or_else(|| QmpError::generic("Parameter 'netdev' is missing"))?;
        let default = NetConfig::default();
        let queue_size = match (self.rx_queue_size, self.tx_queue_size) {
            (Some(rx), Some(tx)) if rx != tx => {
                let text = "rx_queue_size and tx_queue_size are different: all queues have one size";
                return Err(QmpError::generic(text));
            }
            (rx, tx) => rx.or(tx).unwrap_or(default.queue_size),
        };
        let card = NetConfig {
            id: self.id,
            bus: self.bus,
            mac: self.mac,
            mtu: self.host_mtu,
            queue_size,
            ..default
        };
        Ok(NetdevCard { netdev, multi_queue: self.mq.unwrap_or(false), vectors: self.vectors, card })
    }
}

pub(super) async fn add(handle: ControlHandle, arguments: DeviceAdd) -> Reply<Empty> {
    arguments.check()?;
    let DeviceAdd { id, bus, .. } = arguments.clone();
    let driver = arguments.driver.strip_suffix("-pci").unwrap_or(&arguments.driver);
    match driver {
        "vhost-user-blk" => {
            let (socket, default) = (arguments.socket(&handle).await?, DiskConfig::default());
            let disk = DiskConfig {
                id,
                bus,
                vhost_user: true,
                vhost_socket: Some(socket.display().to_string()),
                num_queues: arguments.num_queues.unwrap_or(default.num_queues),
                queue_size: arguments.queue_size.unwrap_or(default.queue_size),
                ..default
            };
            call(&handle, ops::AddDisk(disk)).await?;
        }
        "vhost-user-fs" => {
            let socket = arguments.socket(&handle).await?;
            let tag = arguments.tag.ok_or_else(|| QmpError::generic("Parameter 'tag' is missing"))?;
            let mut fs = FsConfig { id, bus, ..FsConfig::new(tag, socket) };
            fs.num_queues = arguments.num_request_queues.unwrap_or(fs.num_queues);
            fs.queue_size = arguments.queue_size.unwrap_or(fs.queue_size);
            call(&handle, ops::AddFs(fs)).await?;
        }
        "vhost-user-vsock" => {
            let socket = arguments.socket(&handle).await?;
            // The address is the back end's.
            let vsock = VsockConfig { id, bus, vhost_user: true, ..VsockConfig::new(0, socket) };
            call(&handle, ops::AddVsock(vsock)).await?;
        }
        "vhost-vsock" | "vhost-vsock-pci-non-transitional" => {
            let cid = arguments.guest_cid.filter(|cid| *cid > 2);
            let cid = cid.ok_or_else(|| QmpError::generic("guest-cid property must be greater than 2"))?;
            let vsock = VsockConfig { id, bus, vhost: true, ..VsockConfig::new(cid, PathBuf::new()) };
            call(&handle, ops::AddVsock(vsock)).await?;
        }
        "vhost-user-device" => {
            let socket = arguments.socket(&handle).await?;
            let queues = usize::from(arguments.num_vqs.unwrap_or(1));
            let sizes = vec![arguments.vq_size.unwrap_or(64); queues];
            let kind = arguments.virtio_id.unwrap_or_default();
            let device =
                GenericVhostUserConfig { id, bus, ..GenericVhostUserConfig::new(kind, sizes, socket) };
            call(&handle, ops::AddGenericVhostUser(device)).await?;
        }
        _ if CARDS.contains(&arguments.driver.as_str()) => {
            call(&handle, ops::AddCard(Box::new(arguments.card()?))).await?;
        }
        _ => {
            let DeviceAdd { driver, drive, serial, num_queues, queue_size, rerror, werror, .. } = arguments;
            let disk = QemuBlk { driver, id, drive, bus, serial, num_queues, queue_size, rerror, werror };
            let disk = disk.into_disk().map_err(QmpError::generic)?;
            call(&handle, ops::AddDisk(disk)).await?;
        }
    }
    Ok(Empty {})
}

pub(super) async fn del(handle: ControlHandle, arguments: Id) -> Reply<Empty> {
    let id = arguments.id.strip_prefix("/machine/peripheral/").unwrap_or(&arguments.id).to_owned();
    call(&handle, ops::RemoveDevice(VmRemoveDevice { id })).await?;
    Ok(Empty {})
}

/// Arguments of `chardev-add`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ChardevAdd {
    id: String,
    backend: ChardevBackend,
}

/// What a character device is.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum ChardevBackend {
    /// A socket.
    Socket(ChardevSocket),
}

/// A socket.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case", deny_unknown_fields)]
struct ChardevSocket {
    addr: SocketAddress,
    /// Whether this side listens; as with QEMU it does if nothing is said.
    #[serde(default)]
    server: Option<bool>,
    /// Whether the command waits for a connection: never. A card waits when it is added.
    #[serde(default)]
    wait: Option<bool>,
    /// Seconds between attempts to connect again. Accepted as it is: back ends are waited for in any case.
    #[serde(default, rename = "reconnect")]
    _reconnect: Option<i64>,
    /// The same in milliseconds.
    #[serde(default, rename = "reconnect-ms")]
    _reconnect_ms: Option<i64>,
}

/// Where a socket is.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(tag = "type", content = "data", rename_all = "kebab-case")]
enum SocketAddress {
    /// A UNIX socket.
    Unix(UnixSocketAddress),
}

/// A UNIX socket.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
struct UnixSocketAddress {
    path: PathBuf,
}

/// What `chardev-add` answers: nothing, for what is no pseudo-terminal.
#[derive(Debug, Serialize, JsonSchema)]
pub(super) struct ChardevReturn {}

pub(super) async fn chardev_add(handle: ControlHandle, arguments: ChardevAdd) -> Reply<ChardevReturn> {
    let ChardevBackend::Socket(socket) = arguments.backend;
    if socket.wait == Some(true) {
        let text =
            "wait=true is not supported: the card that uses the socket waits for its back end (wait=false)";
        return Err(QmpError::generic(text));
    }
    let SocketAddress::Unix(address) = socket.addr;
    let place = BackEndSocket { path: address.path, listen: socket.server.unwrap_or(true) };
    call(&handle, ops::ChardevAdd(arguments.id, place)).await?;
    Ok(ChardevReturn {})
}

pub(super) async fn chardev_remove(handle: ControlHandle, arguments: Id) -> Reply<Empty> {
    call(&handle, ops::ChardevRemove(arguments.id)).await?;
    Ok(Empty {})
}

/// Arguments of `netdev_add`: which there are depends on `type`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct NetdevAdd(Netdev);

pub(super) async fn netdev_add(handle: ControlHandle, arguments: NetdevAdd) -> Reply<Empty> {
    call(&handle, ops::NetdevAdd(arguments.0)).await?;
    Ok(Empty {})
}

pub(super) async fn netdev_del(handle: ControlHandle, arguments: Id) -> Reply<Empty> {
    call(&handle, ops::NetdevDel(arguments.id)).await?;
    Ok(Empty {})
}
