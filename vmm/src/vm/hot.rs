//! Devices that come and go while the VM is there.

use std::sync::Arc;

use holdfast_config::{DiskConfig, PciDeviceInfo};
use holdfast_devices::pci::{Removal, RootPort};
use holdfast_machines::VirtioSlot;

use super::plug::{Plugs, address_on};
use super::{Vm, VmError};

impl Vm {
    /// The hot-plug port of that name, or the first free one.
    fn free_port(&self, wanted: Option<&str>) -> Result<Arc<RootPort>, VmError> {
        let ports = self.machine.ports();
        let refuse = |text: String| Err(VmError::Unsupported(text));
        match wanted {
            Some(name) => match ports.iter().find(|p| p.name() == name) {
                None => refuse(format!("there is no hot-plug port `{name}`")),
                Some(port) if port.device().is_some() => {
                    refuse(format!("the hot-plug port `{name}` is taken"))
                }
                Some(port) => Ok(Arc::clone(port)),
            },
            None if ports.is_empty() => refuse(
                "the machine has no hot-plug port; the machine's option hotplug_ports=N makes some"
                    .to_owned(),
            ),
            None => match ports.iter().find(|p| p.device().is_none()) {
                Some(port) => Ok(Arc::clone(port)),
                None => refuse(format!("all {} hot-plug ports are taken", ports.len())),
            },
        }
    }

    /// Plugs a disk into a hot-plug port, whose name is written into `config`.
    ///
    /// # Errors
    /// [`VmError`] if there is no port or the disk cannot be built.
    pub fn add_disk(&self, config: &mut DiskConfig) -> Result<PciDeviceInfo, VmError> {
        let port = self.free_port(config.bus.as_deref())?;
        let bus = self.machine.pci_bus();
        let bus = bus.ok_or_else(|| VmError::Unsupported("the machine has no PCI bus".to_owned()))?;
        config.bus = Some(port.name().to_owned());
        let id = config.id.clone().unwrap_or_default();
        let mut plugs = Plugs::new(&self.build);
        plugs.hot = true;
        plugs.disk(config, &self.storage, VirtioSlot::Port(Arc::clone(&bus), Arc::clone(&port)))?;
        self.plugged.write().append(&mut plugs.devices);
        self.disks.write().append(&mut plugs.disks);
        let bdf = address_on(&bus, &id).unwrap_or_default();
        Ok(PciDeviceInfo { id, bdf })
    }

    /// Asks the guest to let go of a device in a hot-plug port.
    ///
    /// # Errors
    /// [`VmError::Unsupported`] if the device is not in one.
    pub fn ask_for(&self, id: &str) -> Result<Removal, VmError> {
        let port = self.port_of(id);
        let port = port.ok_or_else(|| {
            VmError::Unsupported(format!(
                "`{id}` is not in a hot-plug port, so it stays for as long as the VM is there"
            ))
        })?;
        // Where the guest has no driver for ports (Debian's riscv64 kernel), a device that it has switched off is let go of.
        let idle = || {
            let behind = self.machine.pci_bus().and_then(|bus| bus.behind(port.devfn()));
            behind.is_none_or(|device| !device.config().bus_master())
        };
        match port.is_driven() {
            false if idle() => Ok(Removal::Now),
            _ => Ok(port.remove()),
        }
    }

    fn port_of(&self, id: &str) -> Option<Arc<RootPort>> {
        self.machine.ports().into_iter().find(|p| p.device().as_deref() == Some(id))
    }

    /// Takes a device out that the guest has let go of. False if it is not there.
    pub fn take_out(&self, id: &str) -> bool {
        let (Some(port), Some(bus)) = (self.port_of(id), self.machine.pci_bus()) else { return false };
        let mut all = self.plugged.write();
        let Some(at) = all.iter().position(|p| p.id == id) else { return false };
        let plugged = all.remove(at);
        drop(all);
        // Nothing touches the guest's memory from here on.
        plugged.device.reset();
        bus.unplug_behind(port.devfn());
        self.disks.write().retain(|d| d.id() != id);
        port.emptied();
        true
    }
}
