//! Cloud Hypervisor's fields and options that Holdfast does not have: refused by name, never ignored.
//!
//! Fields of the virtio devices are refused by the devices themselves.

use serde_json::{Value, json};

use crate::Problems;

/// Top-level fields of `VmConfig` and what configures nothing there.
fn vm_fields() -> [(&'static str, Vec<Value>); 16] {
    let none = || vec![json!([])];
    let off = || vec![json!(false)];
    [
        ("rate_limit_groups", none()),
        ("pmem", none()),
        ("devices", none()),
        ("user_devices", none()),
        ("vdpa", none()),
        ("numa", none()),
        ("iommu", off()),
        ("watchdog", off()),
        ("rtc", vec![]),
        ("pvpanic", off()),
        ("gdb", off()),
        ("pci_segments", none()),
        ("tpm", vec![]),
        ("ivshmem", vec![]),
        ("pvmemcontrol", vec![]),
        ("sgx_epc", none()),
    ]
}

/// Fields of the sub-configs.
fn nested_fields() -> [(&'static str, &'static str, Vec<Value>); 30] {
    let off = || vec![json!(false)];
    [
        ("cpus", "kvm_hyperv", off()),
        ("cpus", "max_phys_bits", vec![json!(46)]),
        ("cpus", "nested", vec![json!(true)]),
        ("cpus", "features", vec![json!({}), json!({"amx": false})]),
        ("cpus", "core_scheduling", vec![json!("Vm"), json!("Off")]),
        ("memory", "mergeable", off()),
        ("memory", "hotplug_method", vec![json!("Acpi")]),
        ("memory", "hotplug_size", vec![json!(0)]),
        ("memory", "hotplugged_size", vec![json!(0)]),
        ("memory", "reserve", off()),
        ("memory", "zones", vec![json!([])]),
        ("payload", "igvm", vec![]),
        ("payload", "host_data", vec![]),
        ("payload", "fw_cfg_config", vec![]),
        ("platform", "iommu_segments", vec![json!([])]),
        ("platform", "iommu_address_width_bits", vec![json!(64)]),
        ("platform", "iommufd", off()),
        ("platform", "vfio_p2p_dma", vec![json!(true)]),
        ("platform", "system_serial_number", vec![]),
        ("platform", "serial_number", vec![]),
        ("platform", "oem_strings", vec![json!([])]),
        ("platform", "system_manufacturer", vec![]),
        ("platform", "system_product_name", vec![]),
        ("platform", "system_version", vec![]),
        ("platform", "system_family", vec![]),
        ("platform", "system_sku_number", vec![]),
        ("platform", "chassis_asset_tag", vec![]),
        ("platform", "tdx", off()),
        ("platform", "sev_snp", off()),
        ("memory", "file", vec![]),
    ]
}

const REASON: &str = "is not supported by this version; leave it out";

/// Notes every field of `body`, a `VmConfig`, that configures something that is not there.
pub(crate) fn check_vm(body: &Value, problems: &mut Problems) {
    for (field, idle) in vm_fields() {
        check(body.get(field), &idle, || field.to_owned(), problems);
    }
    for (parent, field, idle) in nested_fields() {
        let value = body.get(parent).and_then(|parent| parent.get(field));
        check(value, &idle, || format!("{parent}.{field}"), problems);
    }
}

fn check(value: Option<&Value>, idle: &[Value], name: impl FnOnce() -> String, problems: &mut Problems) {
    if value.is_some_and(|value| !value.is_null() && !idle.contains(value)) {
        problems.add(name(), REASON);
    }
}

/// What Cloud Hypervisor calls an option on its command line that Holdfast refuses.
pub struct Cli {
    /// Name without dashes.
    pub name: &'static str,
    /// Whether it takes a value.
    pub takes_value: bool,
}

const fn valued(name: &'static str) -> Cli {
    Cli { name, takes_value: true }
}

const fn flag(name: &'static str) -> Cli {
    Cli { name, takes_value: false }
}

/// Cloud Hypervisor's options for features that Holdfast does not have.
pub const UNSUPPORTED_OPTIONS: &[Cli] = &[
    valued("igvm"),
    valued("host-data"),
    valued("fw-cfg-config"),
    valued("memory-zone"),
    valued("numa"),
    valued("pci-segment"),
    valued("pmem"),
    valued("vdpa"),
    valued("user-device"),
    valued("rtc"),
    flag("watchdog"),
    flag("pvpanic"),
    valued("tpm"),
    valued("ivshmem"),
    valued("pvmemcontrol"),
    valued("rate-limit-group"),
    valued("log-format"),
    valued("dbus-service-name"),
    valued("dbus-object-path"),
    flag("dbus-system-bus"),
];

/// Sub-keys of Cloud Hypervisor's options for features that Holdfast does not have.
const UNSUPPORTED_KEYS: &[(&str, &[&str])] = &[
    ("cpus", &["kvm_hyperv", "max_phys_bits", "features", "nested", "core_scheduling"]),
    (
        "memory",
        &["file", "mergeable", "hotplug_method", "hotplug_size", "hotplugged_size", "reserve", "zones"],
    ),
    (
        "platform",
        &[
            "iommu_segments",
            "iommu_address_width",
            "iommufd",
            "iommufd_fd",
            "vfio_p2p_dma",
            "system_manufacturer",
            "system_product_name",
            "system_version",
            "system_serial_number",
            "system_sku_number",
            "system_family",
            "oem_strings",
            "chassis_asset_tag",
            "serial_number",
            "tdx",
            "sev_snp",
        ],
    ),
    (
        "disk",
        &[
            "bw_size",
            "bw_one_time_burst",
            "bw_refill_time",
            "ops_size",
            "ops_one_time_burst",
            "ops_refill_time",
        ],
    ),
    (
        "net",
        &[
            "bw_size",
            "bw_one_time_burst",
            "bw_refill_time",
            "ops_size",
            "ops_one_time_burst",
            "ops_refill_time",
        ],
    ),
    ("restore", &["vfio_fds", "iommufd_fd", "zone_updates"]),
];

/// Whether `key` is a sub-key of Cloud Hypervisor's `--option` for a feature that Holdfast does not
/// have.
pub fn unsupported_cli_key(option: &str, key: &str) -> bool {
    UNSUPPORTED_KEYS.iter().any(|(name, keys)| *name == option && keys.contains(&key))
}
