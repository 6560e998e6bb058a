//! What the target must be like.

use serde::{Deserialize, Serialize};
use serde_json::Value;

/// A disk whose contents go along.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct MirroredDisk {
    /// The disk's id.
    pub id: String,
    /// Its size in bytes.
    pub size: u64,
    /// Format of the image: `raw`, `qcow2`.
    pub format: String,
}

/// The source's VM as the target needs to know it before the guest stops.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Plan {
    /// Who sends it, for people: `holdfast 0.1.0`.
    pub build: String,
    /// Unit of RAM in bytes.
    pub page_size: u64,
    /// The guest's architecture.
    pub arch: String,
    /// The machine's name.
    pub machine: String,
    /// How many vCPUs.
    pub vcpus: u32,
    /// What the CPU is called in the config.
    #[serde(default)]
    pub cpu_model: String,
    /// RAM: guest-physical start and length of each range, in bytes.
    pub ram: Vec<(u64, u64)>,
    /// Devices: id and kind, in the order in which they are restored.
    pub devices: Vec<(String, String)>,
    /// The config that the VM was made from.
    pub config: Value,
    /// The state of vCPU 0, for what the guest was shown of it.
    #[serde(default)]
    pub vcpu: Value,
    /// The guest runs, and is to run at the target.
    pub running: bool,
    /// RAM comes as file descriptors.
    #[serde(default)]
    pub local: bool,
    /// Pages may come after the guest runs at the target.
    #[serde(default)]
    pub postcopy: bool,
    /// Disks whose contents go along, because the target has other storage.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub mirror: Vec<MirroredDisk>,
    /// The source writes them over NBD if the target serves it.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub nbd: bool,
    /// Ids of the helpers on a D-Bus bus whose state goes along, as it is now.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub helpers: Vec<String>,
    /// Connections that carry RAM, the first one included.
    pub connections: u32,
}

impl Plan {
    /// What differs between the source (`self`) and the VM `here`; nothing if it fits.
    pub fn differences(&self, here: &Self) -> Vec<String> {
        let mut all = Vec::new();
        let mut compare = |what: &str, there: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
            let (there, here) = (there.to_string(), here.to_string());
            if there != here {
                all.push(format!("{what} is {there} at the source, {here} here"));
            }
        };
        compare("the page size", &self.page_size, &here.page_size);
        compare("the architecture", &self.arch, &here.arch);
        compare("the machine", &self.machine, &here.machine);
        compare("the number of vCPUs", &self.vcpus, &here.vcpus);
        compare("the CPU model", &name(&self.cpu_model), &name(&here.cpu_model));
        compare("RAM", &layout(&self.ram), &layout(&here.ram));
        for (id, kind) in &self.devices {
            match here.devices.iter().find(|(other, _)| other == id) {
                None => all.push(format!("device `{id}` ({kind}) is not here")),
                Some((_, other)) if other != kind => {
                    all.push(format!("device `{id}` is a {kind} at the source, a {other} here"));
                }
                Some(_) => {}
            }
        }
        for (id, kind) in &here.devices {
            if !self.devices.iter().any(|(other, _)| other == id) {
                all.push(format!("device `{id}` ({kind}) is not at the source"));
            }
        }
        all
    }
}

fn name(model: &str) -> &str {
    if model.is_empty() { "the machine's default" } else { model }
}

fn layout(ram: &[(u64, u64)]) -> String {
    let ranges: Vec<_> = ram.iter().map(|(gpa, len)| format!("{len:#x} bytes at {gpa:#x}")).collect();
    ranges.join(" and ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_differences_are_named() {
        let plan = Plan {
            page_size: 4096,
            machine: "q35".into(),
            vcpus: 2,
            ram: vec![(0, 1 << 20)],
            devices: vec![("_disk0".into(), "virtio-blk".into()), ("rng".into(), "virtio-rng".into())],
            ..Plan::default()
        };
        assert!(plan.differences(&plan).is_empty());
        let here = Plan {
            machine: "microvm".into(),
            vcpus: 4,
            cpu_model: "Nehalem".into(),
            page_size: 65536,
            ram: vec![(0, 2 << 20)],
            devices: vec![("_disk0".into(), "nvme".into()), ("_net1".into(), "virtio-net".into())],
            ..plan.clone()
        };
        let text = plan.differences(&here).join("; ");
        for what in [
            "the page size is 4096 at the source, 65536 here",
            "the machine is q35 at the source, microvm here",
            "the number of vCPUs is 2 at the source, 4 here",
            "the CPU model is the machine's default at the source, Nehalem here",
            "RAM is 0x100000 bytes at 0x0 at the source, 0x200000 bytes at 0x0 here",
            "device `_disk0` is a virtio-blk at the source, a nvme here",
            "device `rng` (virtio-rng) is not here",
            "device `_net1` (virtio-net) is not at the source",
        ] {
            assert!(text.contains(what), "{what}: {text}");
        }
    }
}
