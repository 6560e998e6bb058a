//! The generated OpenAPI description against Cloud Hypervisor's.
//!
//! `openapi-cloud-hypervisor.txt` lists, for the routes that Holdfast has, their methods and the
//! properties of the schemas that they use, as Cloud Hypervisor 54's file has them. If `HOLDFAST_CH_OPENAPI`
//! names that file itself, the list is checked against it first.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::{BTreeMap, BTreeSet};

use holdfast_api::http::openapi::document;
use serde_json::Value;

const COMMITTED: &str = include_str!("openapi-cloud-hypervisor.txt");

/// Cloud Hypervisor's fields for features that Holdfast does not have: they are refused by name, and
/// have no schema.
const NOT_THERE: &[&str] = &[
    "VmConfig.rate_limit_groups",
    "VmConfig.pmem",
    "VmConfig.devices",
    "VmConfig.user_devices",
    "VmConfig.vdpa",
    "VmConfig.numa",
    "VmConfig.iommu",
    "VmConfig.watchdog",
    "VmConfig.rtc",
    "VmConfig.pvpanic",
    "VmConfig.pci_segments",
    "VmConfig.tpm",
    "CpusConfig.kvm_hyperv",
    "CpusConfig.max_phys_bits",
    "CpusConfig.nested",
    "CpusConfig.features",
    "CpusConfig.core_scheduling",
    "MemoryConfig.mergeable",
    "MemoryConfig.hotplug_method",
    "MemoryConfig.hotplug_size",
    "MemoryConfig.hotplugged_size",
    "MemoryConfig.reserve",
    "MemoryConfig.zones",
    "PayloadConfig.igvm",
    "PayloadConfig.host_data",
    "RestoreConfig.zone_updates",
    "ReceiveMigrationData.zone_updates",
    "PlatformConfig.iommu_segments",
    "PlatformConfig.iommu_address_width_bits",
    "PlatformConfig.system_serial_number",
    "PlatformConfig.serial_number",
    "PlatformConfig.uuid",
    "PlatformConfig.oem_strings",
    "PlatformConfig.system_manufacturer",
    "PlatformConfig.system_product_name",
    "PlatformConfig.system_version",
    "PlatformConfig.system_family",
    "PlatformConfig.system_sku_number",
    "PlatformConfig.chassis_asset_tag",
    "PlatformConfig.tdx",
    "PlatformConfig.sev_snp",
    "PlatformConfig.iommufd",
    "PlatformConfig.vfio_p2p_dma",
];

/// Routes of our own: of a migration under way Cloud Hypervisor has none.
const OUR_OWN: &[&str] = &[
    "get /vm.migration-progress",
    "put /vm.cancel-migration",
    "put /vm.pause-migration",
    "put /vm.recover-migration",
];

/// `route METHOD path` and `field Schema.property` lines of the committed list.
fn committed() -> (BTreeSet<String>, BTreeSet<String>) {
    let of = |kind: &str| {
        let lines = COMMITTED.lines().filter_map(|line| line.strip_prefix(kind));
        lines.map(|line| line.trim().to_owned()).collect()
    };
    (of("route "), of("field "))
}

fn ours() -> (BTreeSet<String>, BTreeSet<String>) {
    let document = document();
    let mut routes = BTreeSet::new();
    for (path, methods) in document["paths"].as_object().unwrap() {
        routes.extend(methods.as_object().unwrap().keys().map(|method| format!("{method} {path}")));
    }
    let mut fields = BTreeSet::new();
    for (name, schema) in document["components"]["schemas"].as_object().unwrap() {
        for property in schema["properties"].as_object().into_iter().flatten() {
            fields.insert(format!("{name}.{}", property.0));
        }
    }
    (routes, fields)
}

#[test]
fn it_is_cloud_hypervisors_for_the_routes_that_there_are() {
    let (their_routes, their_fields) = committed();
    let (our_routes, our_fields) = ours();
    let own = OUR_OWN.iter().map(|route| (*route).to_owned());
    let expected: BTreeSet<String> = their_routes.iter().cloned().chain(own).collect();
    assert_eq!(our_routes, expected, "the same routes with the same methods, and our own");
    let missing: Vec<&String> = their_fields
        .iter()
        .filter(|field| !our_fields.contains(*field) && !NOT_THERE.contains(&field.as_str()))
        .collect();
    assert!(missing.is_empty(), "fields without a schema: {missing:#?}");
    let stale: Vec<_> = NOT_THERE
        .iter()
        .filter(|field| our_fields.contains(**field) || !their_fields.contains(**field))
        .collect();
    assert!(stale.is_empty(), "listed as not there: {stale:?}");
}

#[test]
fn the_committed_list_is_their_file() {
    let (routes, fields) = committed();
    assert!(routes.len() >= 19 && fields.len() > 100);
    let Some(path) = std::env::var_os("HOLDFAST_CH_OPENAPI") else { return };
    let (their_routes, their_fields) = read_yaml(&std::fs::read_to_string(path).unwrap());
    for route in &routes {
        assert!(their_routes.contains(route), "{route} is not in their file");
    }
    for route in OUR_OWN {
        assert!(!their_routes.contains(*route), "{route} is in their file");
    }
    let schemas: BTreeSet<&str> = fields.iter().filter_map(|field| field.split('.').next()).collect();
    let used =
        their_fields.iter().filter(|field| schemas.contains(field.split('.').next().unwrap_or_default()));
    assert_eq!(fields, used.cloned().collect());
}

/// Reads routes and properties out of the YAML by its indentation; the file needs no more.
fn read_yaml(text: &str) -> (BTreeSet<String>, BTreeSet<String>) {
    let (mut routes, mut fields) = (BTreeSet::new(), BTreeSet::new());
    let (mut path, mut schema, mut in_properties) = ("", "", false);
    for line in text.lines().filter(|line| !line.trim().is_empty()) {
        let indent = line.len() - line.trim_start().len();
        let key = line.trim().trim_end_matches(':');
        match indent {
            2 if key.starts_with('/') => path = key,
            4 if !path.is_empty() && matches!(key, "get" | "put") => {
                routes.insert(format!("{key} {path}"));
            }
            4 if key.starts_with(|c: char| c.is_ascii_uppercase()) => (schema, in_properties) = (key, false),
            6 => in_properties = key == "properties",
            8 if in_properties && line.trim().ends_with(':') => {
                fields.insert(format!("{schema}.{key}"));
            }
            _ => {}
        }
    }
    (routes, fields)
}

#[test]
fn every_reference_leads_somewhere() {
    let document = document();
    let mut names = BTreeMap::new();
    collect(&document, &mut names);
    assert!(!names.is_empty());
    for path in names.keys() {
        assert!(document.pointer(path.trim_start_matches('#')).is_some(), "{path}");
    }
}

fn collect<'a>(value: &'a Value, names: &mut BTreeMap<&'a str, ()>) {
    match value {
        Value::Object(members) => {
            if let Some(Value::String(path)) = members.get("$ref") {
                names.insert(path, ());
            }
            members.values().for_each(|member| collect(member, names));
        }
        Value::Array(items) => items.iter().for_each(|item| collect(item, names)),
        _ => {}
    }
}
