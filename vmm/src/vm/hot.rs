//! Devices that come and go while the VM is there.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use holdfast_config::{DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PciDeviceInfo, VsockConfig};
use holdfast_devices::pci::{Removal, RootPort};
use holdfast_machines::VirtioSlot;

use super::plug::{Plugs, address_on};
use super::{Vm, VmError};

/// A device that is added to a running VM.
#[derive(Debug)]
pub enum HotDevice<'a> {
    /// A disk.
    Disk(&'a mut DiskConfig),
    /// A network card, with the descriptors of its tap.
    Net(&'a mut NetConfig, Vec<OwnedFd>),
    /// A shared directory.
    Fs(&'a mut FsConfig),
    /// A device of a vhost-user back end.
    Generic(&'a mut GenericVhostUserConfig),
    /// Sockets between guest and host.
    Vsock(&'a mut VsockConfig),
}

impl HotDevice<'_> {
    /// Its id and its port.
    fn place(&self) -> (&Option<String>, &Option<String>) {
        match self {
            Self::Disk(config) => (&config.id, &config.bus),
            Self::Net(config, _) => (&config.id, &config.bus),
            Self::Fs(config) => (&config.id, &config.bus),
            Self::Generic(config) => (&config.id, &config.bus),
            Self::Vsock(config) => (&config.id, &config.bus),
        }
    }
}

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

    /// Plugs a device into a hot-plug port, whose name is written into its config.
    ///
    /// # Errors
    /// [`VmError`] if there is no port or the device cannot be built.
    pub fn add(&self, device: HotDevice<'_>) -> Result<PciDeviceInfo, VmError> {
        let (id, place) = device.place();
        let id = id.clone().unwrap_or_default();
        let port = self.free_port(place.as_deref())?;
        let bus = self.machine.pci_bus();
        let bus = bus.ok_or_else(|| VmError::Unsupported("the machine has no PCI bus".to_owned()))?;
        let mut plugs = Plugs::new(&self.build);
        plugs.hot = true;
        let slot = VirtioSlot::Port(Arc::clone(&bus), Arc::clone(&port));
        let name = Some(port.name().to_owned());
        match device {
            HotDevice::Disk(config) => {
                config.bus = name;
                plugs.disk(config, &self.storage, slot)?;
            }
            HotDevice::Net(config, fds) => {
                config.bus = name;
                plugs.net(config, fds, slot)?;
            }
            HotDevice::Fs(config) => {
                config.bus = name;
                plugs.fs(config, slot)?;
            }
            HotDevice::Generic(config) => {
                config.bus = name;
                plugs.generic_vhost_user(config, slot)?;
            }
            HotDevice::Vsock(config) => {
                config.bus = name;
                plugs.vsock(config, slot)?;
            }
        }
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
