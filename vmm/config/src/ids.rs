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
        let single = [Some(&self.console.id), Some(&self.rng.id), self.balloon.as_ref().map(|b| &b.id)];
        disks.chain(nets).chain(single.into_iter().flatten()).filter_map(|id| id.as_deref()).collect()
    }

    /// Removes the disk, network device or balloon called `id`. False if there is none.
    pub fn remove_device(&mut self, id: &str) -> bool {
        let named = |other: &Option<String>| other.as_deref() == Some(id);
        let before = self.disks().len() + self.net().len() + usize::from(self.balloon.is_some());
        if let Some(disks) = &mut self.disks {
            disks.retain(|disk| !named(&disk.id));
        }
        if let Some(net) = &mut self.net {
            net.retain(|net| !named(&net.id));
        }
        self.balloon.take_if(|balloon| named(&balloon.id));
        before != self.disks().len() + self.net().len() + usize::from(self.balloon.is_some())
    }
}
