//! Virtio devices from the config, through the registry, into the machine's slots.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use holdfast_block::BlockError;
use holdfast_config::{
    BalloonConfig, ConsoleConfig, DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, RngConfig,
    VsockConfig,
};
use holdfast_device::{BuildContext, BuildError};
use holdfast_devices::pci::PciBus;
use holdfast_machines::VirtioSlot;
use holdfast_virtio::balloon::Balloon;
use holdfast_virtio::blk::Blk;
use holdfast_virtio::console::PortArgs;
use holdfast_virtio::input::PowerButton;
use holdfast_virtio::registry::{self, BuildArgs};
use holdfast_virtio::{Slot, VirtioDevice};
use serde::Serialize;

use super::{Plugged, VmError};
use crate::storage::Storage;

/// What has been plugged in so far.
pub(super) struct Plugs<'a> {
    build: &'a BuildContext,
    pub(super) devices: Vec<Plugged>,
    pub(super) balloon: Option<Arc<Balloon>>,
    pub(super) power_button: Option<Arc<PowerButton>>,
    pub(super) disks: Vec<Arc<Blk>>,
    /// The guest may be running.
    pub(super) hot: bool,
}

impl<'a> Plugs<'a> {
    pub(super) fn new(build: &'a BuildContext) -> Self {
        Self { build, devices: Vec::new(), balloon: None, power_button: None, disks: Vec::new(), hot: false }
    }

    pub(super) fn disk(
        &mut self,
        config: &DiskConfig,
        storage: &Storage,
        slot: VirtioSlot,
    ) -> Result<(), VmError> {
        let id = config.id.clone().unwrap_or_default();
        let wrong = |e: BlockError| {
            let cause = std::error::Error::source(&e).map(|s| format!(": {s}")).unwrap_or_default();
            BuildError::Config { id: id.clone(), reason: format!("{e}{cause}") }
        };
        if let Some(problem) = config.validate().into_iter().next() {
            return Err(BuildError::Config { id, reason: problem.to_string() }.into());
        }
        if config.vhost_user {
            let args = arguments(config.id.as_ref(), config)?;
            return self.named("vhost-user-blk", args, slot, config.pci_device_id);
        }
        let parts = storage.disk_parts(&id, config).map_err(wrong)?;
        let disk = Blk::of(&id, config, parts, self.build)?;
        // The VM keeps it by its own type as well: it is resized and throttled while it runs.
        self.plug("virtio-blk", &id, Arc::clone(&disk) as Arc<dyn VirtioDevice>, slot, config.pci_device_id)?;
        self.disks.push(disk);
        Ok(())
    }

    pub(super) fn net(
        &mut self,
        config: &NetConfig,
        fds: Vec<OwnedFd>,
        slot: VirtioSlot,
    ) -> Result<(), VmError> {
        let args = BuildArgs { fds, ..arguments(config.id.as_ref(), config)? };
        let kind = match (config.vhost_user, config.vhost) {
            (true, _) => "vhost-user-net",
            (false, true) => "vhost-net",
            (false, false) => "virtio-net",
        };
        self.named(kind, args, slot, config.pci_device_id)
    }

    pub(super) fn console(
        &mut self,
        config: &ConsoleConfig,
        ports: Vec<PortArgs>,
        slot: VirtioSlot,
    ) -> Result<(), VmError> {
        let args = BuildArgs { ports, ..arguments(config.id.as_ref(), config)? };
        self.named("virtio-console", args, slot, config.pci_device_id)
    }

    pub(super) fn rng(&mut self, config: &RngConfig, slot: VirtioSlot) -> Result<(), VmError> {
        let args = arguments(config.id.as_ref(), config)?;
        self.named("virtio-rng", args, slot, config.pci_device_id)
    }

    pub(super) fn fs(&mut self, config: &FsConfig, slot: VirtioSlot) -> Result<(), VmError> {
        let args = arguments(config.id.as_ref(), config)?;
        self.named("vhost-user-fs", args, slot, config.pci_device_id)
    }

    pub(super) fn generic_vhost_user(
        &mut self,
        config: &GenericVhostUserConfig,
        slot: VirtioSlot,
    ) -> Result<(), VmError> {
        let args = arguments(config.id.as_ref(), config)?;
        self.named("vhost-user-generic", args, slot, config.pci_device_id)
    }

    pub(super) fn vsock(&mut self, config: &VsockConfig, slot: VirtioSlot) -> Result<(), VmError> {
        let args = arguments(config.id.as_ref(), config)?;
        let kind = match (config.vhost_user, config.vhost) {
            (true, _) => "vhost-user-vsock",
            (false, true) => "vhost-vsock",
            (false, false) => "virtio-vsock",
        };
        self.named(kind, args, slot, config.pci_device_id)
    }

    pub(super) fn balloon(&mut self, config: &BalloonConfig, slot: VirtioSlot) -> Result<(), VmError> {
        let id = config.id.clone().unwrap_or_default();
        let balloon = holdfast_virtio::balloon::build(&id, config, self.build)?;
        // The VM keeps it by its own type as well: it is resized while it runs.
        self.balloon = Some(Arc::clone(&balloon));
        self.plug("virtio-balloon", &id, balloon, slot, config.pci_device_id)
    }

    pub(super) fn power_button(&mut self, slot: VirtioSlot) -> Result<(), VmError> {
        const ID: &str = "__power-button";
        let button = holdfast_virtio::input::build_power_button(ID, self.build)?;
        self.power_button = Some(Arc::clone(&button));
        self.plug("virtio-input", ID, button, slot, None)
    }

    /// Builds a device by its name in the registry and plugs it in.
    fn named(
        &mut self,
        kind: &'static str,
        args: BuildArgs,
        slot: VirtioSlot,
        pci_device: Option<u8>,
    ) -> Result<(), VmError> {
        let module = registry::find(kind)
            .ok_or_else(|| VmError::Unsupported(format!("there is no virtio device `{kind}`")))?;
        let id = args.id.clone();
        let device = (module.build)(args, self.build)?;
        self.plug(kind, &id, device, slot, pci_device)
    }

    fn plug(
        &mut self,
        kind: &'static str,
        id: &str,
        device: Arc<dyn VirtioDevice>,
        slot: VirtioSlot,
        pci_device: Option<u8>,
    ) -> Result<(), VmError> {
        if let (VirtioSlot::Mmio { .. }, Some(number)) = (&slot, pci_device) {
            let reason = format!("pci_device_id={number} needs a PCI bus; the machine has virtio=mmio");
            return Err(BuildError::Config { id: id.to_owned(), reason }.into());
        }
        let mut behind = None;
        let (slot, bus) = match slot {
            VirtioSlot::Pci(bus) => (Slot::Pci { bus: Arc::clone(&bus), device: pci_device }, Some(bus)),
            VirtioSlot::Port(bus, port) => {
                behind = Some(Arc::clone(&port));
                (Slot::Port { bus: Arc::clone(&bus), port: port.devfn() }, Some(bus))
            }
            VirtioSlot::Mmio { base, irq } => (Slot::Mmio { base, irq }, None),
        };
        let device = holdfast_virtio::plug(id, device, slot, self.build)?;
        if let Some(port) = behind {
            port.plugged(id, self.hot);
        }
        let bdf = bus.as_deref().and_then(|bus| address_on(bus, id));
        self.devices.push(Plugged { id: id.to_owned(), kind, device, bdf });
        Ok(())
    }
}

/// The address of the function that carries device `id`.
pub(super) fn address_on(bus: &PciBus, id: &str) -> Option<String> {
    let wrapper = format!("_virtio-pci-{id}");
    bus.info().into_iter().find(|f| f.name == wrapper || f.name == id).map(|f| f.bdf.to_string())
}

fn arguments(id: Option<&String>, config: &impl Serialize) -> Result<BuildArgs, VmError> {
    let id = id.cloned().unwrap_or_default();
    let config = serde_json::to_value(config)
        .map_err(|e| BuildError::Config { id: id.clone(), reason: e.to_string() })?;
    Ok(BuildArgs { id, config, ..BuildArgs::default() })
}
