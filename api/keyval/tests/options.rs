//! Option strings against structs like those of the config tree.
#![allow(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::path::PathBuf;

use holdfast_keyval::{Error, from_str, keys, parse_size};
use schemars::JsonSchema;
use serde::Deserialize;

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
struct Affinity {
    vcpu: u32,
    host_cpus: Vec<usize>,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
struct Topology {
    threads: u16,
    cores: u16,
    dies: u16,
    packages: u16,
}

#[derive(Debug, Default, PartialEq, Deserialize, JsonSchema)]
enum Mode {
    #[default]
    Off,
    OnDemand,
}

#[derive(Debug, PartialEq, Deserialize, JsonSchema)]
struct Options {
    /// How many.
    #[serde(alias = "boot")]
    #[schemars(extend("x-cli" = "boot", "x-positional" = true))]
    boot_vcpus: u8,
    #[serde(default)]
    size: Option<u64>,
    #[serde(default)]
    readonly: bool,
    #[serde(default)]
    path: Option<PathBuf>,
    #[serde(default)]
    topology: Option<Topology>,
    #[serde(default)]
    affinity: Option<Vec<Affinity>>,
    #[serde(default)]
    fds: Option<Vec<i32>>,
    #[serde(default)]
    mode: Mode,
}

fn read(text: &str) -> Result<Options, Error> {
    from_str(text)
}

#[test]
fn every_kind_of_value() {
    let text = "boot=0x10,size=512M,readonly=on,path=\"a,b=c\",topology=1:2:3:4,\
                affinity=[0@[0-3],1@[4,6-7]],fds=[-1,5],mode=on-demand";
    let options = read(text).unwrap();
    assert_eq!(options.boot_vcpus, 16);
    assert_eq!(options.size, Some(512 << 20));
    assert!(options.readonly);
    assert_eq!(options.path, Some("a,b=c".into()));
    assert_eq!(options.topology, Some(Topology { threads: 1, cores: 2, dies: 3, packages: 4 }));
    let expected = vec![
        Affinity { vcpu: 0, host_cpus: vec![0, 1, 2, 3] },
        Affinity { vcpu: 1, host_cpus: vec![4, 6, 7] },
    ];
    assert_eq!(options.affinity, Some(expected));
    assert_eq!(options.fds, Some(vec![-1, 5]));
    assert_eq!(options.mode, Mode::OnDemand);
}

#[test]
fn a_bare_first_word_and_single_items() {
    let options = read("4,fds=3,path=/dev/x:y@z").unwrap();
    assert_eq!((options.boot_vcpus, options.fds), (4, Some(vec![3])));
    assert_eq!(options.path, Some("/dev/x:y@z".into()));
    assert!(read("4,fds=3,word").unwrap_err().to_string().contains("`word` is no key=value pair"));
}

#[test]
fn errors_name_key_value_and_remedy() {
    let says = |text: &str| read(text).unwrap_err().to_string();
    assert_eq!(says("boot=1,readonly=maybe"), "key `readonly`, value `maybe`: must be `on` or `off`");
    assert_eq!(says("boot=300"), "key `boot`, value `300`: must be from 0 to 255");
    assert_eq!(
        says("boot=1,size=big"),
        "key `size`, value `big`: must be a number, such as 4096, 0x1000 or 4K"
    );
    assert_eq!(says("boot=1,mode=x"), "key `mode`, value `x`: must be one of off, on-demand");
    assert_eq!(
        says("boot=1,colour=red"),
        "key `colour` (value `red`) is unknown; boot, size, readonly, path, topology, affinity, fds, mode are \
         known"
    );
    assert_eq!(says("size=1"), "`size=1`: missing key `boot`");
    assert!(says("boot=1,boot=2").contains("duplicate key `boot`"));
    assert!(says("boot=1,topology=1:2").contains("invalid length 2"));
    assert!(says("boot=1,topology=7").contains("must be `threads:cores:dies:packages`"));
    assert!(says("boot=1,fds=[3").contains("`[` is not closed"));
    assert!(says("boot=1,fds=3]").contains("has no `[`"));
    assert!(says("boot=1,path=\"x").contains("quote is not closed"));
    assert!(says("boot=1,fds=[5-3]").contains("ends before it begins"));
    assert!(says("boot=1,fds=[0-18446744073709551615]").contains("range of more than"));
    assert!(says(&format!("boot=1,fds={}", "[".repeat(100))).contains("nested too deeply"));
}

#[test]
fn keys_come_from_the_schema() {
    let keys = keys::<Options>();
    let boot = &keys[0];
    assert_eq!((boot.name.as_str(), boot.json_name.as_str()), ("boot", "boot_vcpus"));
    assert!(boot.required && boot.positional);
    assert_eq!(boot.description, "How many.");
    let value = |name: &str| keys.iter().find(|key| key.name == name).unwrap().value.clone();
    assert_eq!(value("readonly"), "on|off");
    assert_eq!(value("mode"), "off|on-demand");
    assert_eq!(value("topology"), "threads:cores:dies:packages");
    assert_eq!(value("affinity"), "[vcpu@[host_cpus],...]");
}

#[test]
fn sizes() {
    assert_eq!(parse_size("2G"), Ok(2 << 30));
    assert_eq!(parse_size("0x1000"), Ok(4096));
    for wrong in ["", "K", "-1", "1.5G", "0x-1", "99999999999999999999T", "1GG"] {
        assert!(parse_size(wrong).is_err(), "{wrong}");
    }
}
