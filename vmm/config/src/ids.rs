//! Identifiers of devices: an interface, libvirt reads them.

use std::collections::HashSet;

use crate::VmConfig;

/// Names devices that the user did not name: `_disk0`, `_net1`, with one counter for all kinds, and
/// `__console`, `__rng` and `__balloon` for what there is one of.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct IdAllocator {
    next: u64,
}

impl IdAllocator {
    /// Names every device of `config` that has no name yet, in the order in which devices are made.
    pub fn assign(&mut self, config: &mut VmConfig) {
        let taken: HashSet<String> = config.device_ids().into_iter().map(str::to_owned).collect();
        let mut name = |prefix: &str, id: &mut Option<String>| {
            if id.is_none() {
                *id = Some(self.allocate(prefix, |id| taken.contains(id)));
            }
        };
        for disk in config.disks.iter_mut().flatten() {
            name("_disk", &mut disk.id);
        }
        for net in config.net.iter_mut().flatten() {
            name("_net", &mut net.id);
        }
        for fs in config.fs.iter_mut().flatten() {
            name("_fs", &mut fs.id);
        }
        for device in config.generic_vhost_user.iter_mut().flatten() {
            name("_generic_vhost_user", &mut device.id);
        }
        if let Some(vsock) = &mut config.vsock {
            name("_vsock", &mut vsock.id);
        }
        let has_console = config.has_console();
        if has_console {
            config.console.id.get_or_insert_with(|| "__console".to_owned());
        }
        config.rng.id.get_or_insert_with(|| "__rng".to_owned());
        if let Some(balloon) = &mut config.balloon {
            balloon.id.get_or_insert_with(|| "__balloon".to_owned());
        }
    }

    /// The next free name with `prefix`.
    pub fn allocate(&mut self, prefix: &str, taken: impl Fn(&str) -> bool) -> String {
        loop {
            let id = format!("{prefix}{}", self.next);
            self.next = self.next.wrapping_add(1);
            if !taken(&id) {
                return id;
            }
        }
    }
}

impl VmConfig {
    /// The names of all devices that have one.
    pub fn device_ids(&self) -> Vec<&str> {
        let disks = self.disks().iter().map(|disk| &disk.id);
        let nets = self.net().iter().map(|net| &net.id);
        let shares = self.fs().iter().map(|fs| &fs.id);
        let others = self.generic_vhost_user().iter().map(|device| &device.id);
        let single = [
            Some(&self.console.id),
            Some(&self.rng.id),
            self.balloon.as_ref().map(|b| &b.id),
            self.vsock.as_ref().map(|v| &v.id),
        ];
        let many = disks.chain(nets).chain(shares).chain(others);
        many.chain(single.into_iter().flatten()).filter_map(|id| id.as_deref()).collect()
    }

    /// Removes the device called `id`, of a kind that may go. False if there is none.
    pub fn remove_device(&mut self, id: &str) -> bool {
        let before = self.device_ids().len();
        let named = |other: &Option<String>| other.as_deref() == Some(id);
        if let Some(disks) = &mut self.disks {
            disks.retain(|disk| !named(&disk.id));
        }
        if let Some(net) = &mut self.net {
            net.retain(|net| !named(&net.id));
        }
        if let Some(fs) = &mut self.fs {
            fs.retain(|fs| !named(&fs.id));
        }
        if let Some(devices) = &mut self.generic_vhost_user {
            devices.retain(|device| !named(&device.id));
        }
        self.balloon.take_if(|balloon| named(&balloon.id));
        self.vsock.take_if(|vsock| named(&vsock.id));
        before != self.device_ids().len()
    }
}
