//! The config tree against Cloud Hypervisor's shapes.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use holdfast_config::{AccelChoice, AccelKind, ConfigError, IdAllocator, VmConfig};
use serde_json::{Value, json};

fn problems(config: &Value) -> Vec<String> {
    let text = config.to_string();
    let checked = VmConfig::from_json(text.as_bytes()).and_then(|config| config.validate());
    match checked {
        Ok(()) => Vec::new(),
        Err(ConfigError::Invalid(problems)) => problems.0.into_iter().map(|p| p.field).collect(),
        Err(error) => panic!("{error}"),
    }
}

#[test]
fn an_empty_body_has_cloud_hypervisors_defaults() {
    let config = VmConfig::from_json(b"{}").unwrap();
    assert_eq!(config, VmConfig::default());
    let json = serde_json::to_value(&config).unwrap();
    assert_eq!(json["cpus"]["boot_vcpus"], 1);
    assert_eq!(json["memory"]["size"], 512 << 20);
    assert_eq!(json["memory"]["thp"], true);
    assert_eq!(json["rng"]["src"], "/dev/urandom");
    assert_eq!(json["serial"], json!({ "mode": "Null" }));
    assert_eq!(json["console"]["mode"], "Tty");
    assert_eq!(json["debug_console"], json!({ "mode": "Off", "iobase": 0xe9 }));
    assert!(json.get("payload").is_none(), "absent options are left out, never null");
    assert!(config.validate().is_ok());
    assert!(config.validate_for_boot().is_err());
}

#[test]
fn what_it_writes_it_reads_back() {
    let body = json!({
        "cpus": { "boot_vcpus": 2, "max_vcpus": 4, "topology": {
            "threads_per_core": 2, "cores_per_die": 2, "dies_per_package": 1, "packages": 1 } },
        "memory": { "size": 1073741824_u64, "hugepages": true, "hugepage_size": 2097152 },
        "payload": { "kernel": "/k", "cmdline": "console=ttyS0" },
        "disks": [{ "path": "/d" }],
        "net": [{ "mac": "02:00:00:00:00:01" }],
        "balloon": { "size": 0 },
        "platform": { "uuid": "6ba7b810-9dad-11d1-80b4-00c04fd430c8" },
        "arch": "riscv64", "machine": { "type": "virt" }, "accel": "kvm:tcg",
        "a_field_of_next_year": 1,
    });
    assert_eq!(problems(&body), Vec::<String>::new());
    let config = VmConfig::from_json(body.to_string().as_bytes()).unwrap();
    assert_eq!(config.accel, AccelChoice::Try(vec![AccelKind::Kvm, AccelKind::Tcg]));
    assert!(config.uuid().is_some());
    let again = serde_json::to_vec(&config).unwrap();
    assert_eq!(VmConfig::from_json(&again).unwrap(), config);
}

#[test]
fn all_problems_at_once() {
    let body = json!({
        "cpus": { "boot_vcpus": 4, "max_vcpus": 2, "affinity": [{ "vcpu": 9, "host_cpus": [] }] },
        "memory": { "size": 1000, "hugepage_size": 3 },
        "disks": [{ "id": "__mine", "path": "/d" }, { "id": "x", "path": "/d" }],
        "net": [{ "id": "x" }],
        "serial": { "mode": "Tty" },
        "platform": { "system_uuid": "?", "num_pci_segments": 2 },
    });
    let expected = [
        "cpus.max_vcpus",
        "cpus.affinity[0].vcpu",
        "cpus.affinity[0].host_cpus",
        "memory.size",
        "memory.hugepage_size",
        "memory.hugepage_size",
        "disks[0].id",
        "net[0].id",
        "console.mode",
        "platform.num_pci_segments",
        "platform.system_uuid",
    ];
    assert_eq!(problems(&body), expected);
}

#[test]
fn what_is_not_there_is_refused_by_name() {
    let body = json!({ "pmem": [{ "file": "x" }], "watchdog": true, "cpus": { "boot_vcpus": 1, "max_vcpus": 1,
        "kvm_hyperv": true }, "memory": { "size": 4096, "mergeable": true } });
    assert_eq!(problems(&body), ["pmem", "watchdog", "cpus.kvm_hyperv", "memory.mergeable"]);
    let idle = json!({ "fs": [], "watchdog": false, "vsock": null, "iommu": false, "numa": null,
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "max_phys_bits": 46, "features": { "amx": false } } });
    assert_eq!(problems(&idle), Vec::<String>::new());
}

#[test]
fn a_wrong_type_is_named() {
    let error = VmConfig::from_json(br#"{"cpus":{"boot_vcpus":"two"}}"#).unwrap_err();
    assert_eq!(error.to_string(), "`cpus.boot_vcpus` cannot be read");
    for text in ["{} x", "{bad", "", "{\"cpus\":"] {
        assert_eq!(VmConfig::from_json(text.as_bytes()).unwrap_err().to_string(), "not valid JSON", "{text}");
    }
    assert!(VmConfig::from_json(b"[]").is_err());
}

#[test]
fn identifiers_share_one_counter() {
    let body = json!({ "disks": [{ "path": "/a" }, { "path": "/b", "id": "mine" }, { "path": "/c", "id": "_disk1" }],
        "net": [{}, {}], "balloon": { "size": 0 } });
    let mut config = VmConfig::from_json(body.to_string().as_bytes()).unwrap();
    let mut ids = IdAllocator::default();
    ids.assign(&mut config);
    let expected = ["_disk0", "mine", "_disk1", "_net1", "_net2", "__console", "__rng", "__balloon"];
    assert_eq!(config.device_ids(), expected);
    assert!(config.validate().is_ok(), "what Holdfast named itself is valid");
    assert!(config.remove_device("_net1") && !config.remove_device("_net1"));
    assert_eq!(ids.allocate("_disk", |_| false), "_disk3");
}
