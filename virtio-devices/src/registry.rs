//! Which devices there are, by name, and how they are plugged in.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError, Device, IrqLine};
use holdfast_devices::pci::PciBus;
use serde::de::DeserializeOwned;

use crate::config::FieldError;
use crate::console::PortArgs;
use crate::device::VirtioDevice;
use crate::transport::mmio::MmioTransport;
use crate::transport::pci::PciTransport;

/// What a device is built from, beside the VM's parts.
#[derive(Debug, Default)]
pub struct BuildArgs {
    /// The device's id, unique in the VM.
    pub id: String,
    /// Its config, as JSON.
    pub config: serde_json::Value,
    /// Its ports (console).
    pub ports: Vec<PortArgs>,
    /// Open file descriptors that were handed over with the config (net: one for each queue pair).
    pub fds: Vec<OwnedFd>,
}

/// Builds a device of one kind.
pub type Build = fn(BuildArgs, &BuildContext) -> Result<Arc<dyn VirtioDevice>, BuildError>;

/// A kind of device.
#[derive(Debug, Clone, Copy)]
pub struct VirtioDeviceModule {
    /// Its name: `virtio-blk`, ...
    pub name: &'static str,
    /// QEMU's `-device` names for it.
    pub aliases: &'static [&'static str],
    /// Builds one.
    pub build: Build,
}

const ALL: &[VirtioDeviceModule] = &[
    VirtioDeviceModule {
        name: "virtio-blk",
        aliases: &["virtio-blk-pci", "virtio-blk-device"],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::blk::build(&args.id, &config, context)?)
        },
    },
    VirtioDeviceModule {
        name: "virtio-net",
        aliases: &["virtio-net-pci", "virtio-net-device"],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::net::build(&args.id, &config, args.fds, context)?)
        },
    },
    VirtioDeviceModule {
        name: "virtio-balloon",
        aliases: &["virtio-balloon-pci", "virtio-balloon-device"],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::balloon::build(&args.id, &config, context)?)
        },
    },
    VirtioDeviceModule {
        name: "virtio-rng",
        aliases: &["virtio-rng-pci", "virtio-rng-device"],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::rng::build(&args.id, &config, context)?)
        },
    },
    VirtioDeviceModule {
        name: "virtio-console",
        aliases: &["virtio-serial", "virtio-serial-pci", "virtio-serial-device"],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::console::build(&args.id, &config, args.ports, context)?)
        },
    },
    VirtioDeviceModule {
        name: "virtio-vsock",
        aliases: &[],
        build: |args, context| {
            let config = parse(&args)?;
            Ok(crate::vsock::build(&args.id, &config, context)?)
        },
    },
    VirtioDeviceModule {
        name: "vhost-user-fs",
        aliases: &["vhost-user-fs-pci", "vhost-user-fs-device"],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_user::fs::build(&args.id, &config, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-user-vsock",
        aliases: &["vhost-user-vsock-pci"],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_user::vsock::build(&args.id, &config, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-user-blk",
        aliases: &["vhost-user-blk-pci"],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_user::blk::build(&args.id, &config, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-user-net",
        aliases: &[],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_user::net::build(&args.id, &config, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-net",
        aliases: &[],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_kernel::net::build(&args.id, &config, args.fds, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-vsock",
        aliases: &["vhost-vsock-pci"],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_kernel::vsock::build(&args.id, &config, context)
        },
    },
    VirtioDeviceModule {
        name: "vhost-user-generic",
        aliases: &["vhost-user-device-pci", "vhost-user-device"],
        build: |args, context| {
            let config = parse(&args)?;
            crate::vhost_user::generic::build(&args.id, &config, context)
        },
    },
];

/// All kinds of devices.
pub fn registry() -> &'static [VirtioDeviceModule] {
    ALL
}

/// The kind of device called `name`, by its own name or QEMU's.
pub fn find(name: &str) -> Option<&'static VirtioDeviceModule> {
    registry().iter().find(|m| m.name == name || m.aliases.contains(&name))
}

fn parse<T: DeserializeOwned>(args: &BuildArgs) -> Result<T, BuildError> {
    T::deserialize(&args.config)
        .map_err(|e| BuildError::Config { id: args.id.clone(), reason: e.to_string() })
}

/// The first wrong field of a config, as a build error.
pub(crate) fn check(id: &str, errors: Vec<FieldError>) -> Result<(), BuildError> {
    match errors.into_iter().next() {
        None => Ok(()),
        Some(error) => Err(BuildError::Config { id: id.to_owned(), reason: error.to_string() }),
    }
}

/// Where a device is plugged in.
#[derive(Debug, Clone)]
pub enum Slot {
    /// A PCI root bus.
    Pci {
        /// The bus.
        bus: Arc<PciBus>,
        /// The device number that is wanted; the first free one if absent.
        device: Option<u8>,
    },
    /// Behind a port of a PCI root bus.
    Port {
        /// The bus.
        bus: Arc<PciBus>,
        /// The port's device and function number.
        port: u8,
    },
    /// A virtio-mmio window of [`crate::transport::mmio::WINDOW`] bytes.
    Mmio {
        /// Its first address.
        base: u64,
        /// Its interrupt.
        irq: IrqLine,
    },
}

/// Puts `device` behind the transport that belongs to `slot`.
///
/// # Errors
/// [`BuildError`] if the slot is taken or the host refuses something.
pub fn plug(
    id: &str,
    device: Arc<dyn VirtioDevice>,
    slot: Slot,
    context: &BuildContext,
) -> Result<Arc<dyn Device>, BuildError> {
    match slot {
        Slot::Pci { bus, device: number } => Ok(PciTransport::plug(id, device, (&bus, number), context)?),
        Slot::Port { bus, port } => Ok(PciTransport::plug_behind(id, device, (&bus, port), context)?),
        Slot::Mmio { base, irq } => Ok(MmioTransport::plug(id, device, base, irq, context)?),
    }
}
