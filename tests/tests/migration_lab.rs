//! A working VM moves between two hosts, which are network namespaces, and a third one never loses its connection to the guest.
//! `HOLDFAST_LAB_MOVES=10` makes ten moves in every mode. Needs root.

use std::path::Path;
use std::process::Command;

use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::lab::{ARP, Ear, GUEST, Lab, MAC, Peer, RARP};
use holdfast_tests::migration::{Console, LIMIT, Vmm, config};
use holdfast_tests::tls::certificates;
use holdfast_tests::{Program, holdfast};
use serde_json::{Value, json};

fn start(lab: &Lab, host: char, dir: &Path, n: usize) -> Vmm {
    let socket = dir.join(format!("{host}{n}"));
    let mut command = lab.command(host, &holdfast());
    command.args(["run", "--api-socket"]).arg(&socket);
    let program = Program::spawn(command);
    Vmm { program, api: Api::connect(&socket) }
}

/// The ways in which a VM is sent.
fn modes(dir: &Path) -> Vec<(&'static str, Value, Value)> {
    let tls = json!({ "tls_dir": dir });
    vec![
        ("pre-copy on four connections", json!({ "connections": 4, "zstd_level": 1 }), json!({})),
        ("post-copy", json!({ "memory_mode": "Postcopy" }), json!({ "memory_mode": "Postcopy" })),
        ("TLS", tls.clone(), tls),
        ("pre-copy with auto-converge", json!({ "auto_converge": true }), json!({})),
    ]
}

fn merge(mut to: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        to[key] = value.clone();
    }
    to
}

#[test]
fn a_working_vm_moves_between_hosts() {
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name);
    let lab = Lab::new("800mbit");
    // Every fourth move is by TLS, and so to host `b`.
    certificates(dir.path(), "10.78.0.2");
    for (name, format) in [("raw", "raw"), ("qcow2", "qcow2")] {
        run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(at(name)).arg("64M"));
    }
    let (peer, rarp, arp) = (Peer::listen(&lab), Ear::open(&lab, RARP), Ear::open(&lab, ARP));
    let console = Console(at("console"));
    let mut config = config(&console.0, "lab");
    config["disks"] = json!([{ "path": at("raw"), "image_type": "Raw" }, { "path": at("qcow2") }]);
    let mac: Vec<String> = MAC.iter().map(|b| format!("{b:02x}")).collect();
    config["net"] = json!([{ "tap": "tap0", "mac": mac.join(":") }]);
    let mut here = start(&lab, 'a', dir.path(), 0);
    here.api.put("vm.create", &config);
    here.api.put("vm.boot", &Value::Null);
    peer.goes_on(3);
    let disks = ["vda", "vdb"];
    console.disks_go_on(&disks, 1);
    let modes = modes(dir.path());
    let moves = std::env::var("HOLDFAST_LAB_MOVES").ok().and_then(|n| n.parse::<usize>().ok());
    let moves = moves.map_or(3, |each| each * modes.len());
    for n in 1..=moves {
        let (name, send, receive) = &modes[(n - 1) % modes.len()];
        let (host, address) = if n % 2 == 0 { ('a', "10.78.0.1") } else { ('b', "10.78.0.2") };
        let there = start(&lab, host, dir.path(), n);
        let url = format!("tcp:{address}:7711");
        let received = there.receive(merge(json!({ "receiver_url": url }), receive));
        let body = json!({
            "destination_url": url, "downtime_ms": 1000, "timeout_s": 20, "timeout_strategy": "Ignore",
        });
        rarp.forget();
        arp.forget();
        let sent = here.send(&merge(body, send));
        assert_eq!(sent.status, 204, "{name}: {sent:?}");
        assert_eq!(received.join().expect("an answer").status, 204, "{name}");
        assert!(here.program.wait_exit(LIMIT).success(), "{name}: the source has ended");
        here = there;
        peer.goes_on(3);
        console.disks_go_on(&disks, 1);
        console.goes_on(2);
        rarp.hears("reverse ARP", |frame| frame[6..12] == MAC && frame[20..22] == [0, 3]);
        // The driver's own announcement: an ARP frame about itself, to itself.
        arp.hears("gratuitous ARP", |f| f[6..12] == MAC && f[28..32] == GUEST && f[38..42] == GUEST);
    }
    console.sum_is_good();
    let text = console.text();
    assert!(!text.contains("STREAM BROKEN"), "{text}");
    if let Some(lost) = lab.lost() {
        // A move takes thousands of packets.
        assert!(lost > 0, "the link loses none");
        eprintln!("{moves} moves, and the link lost {lost} packets");
    }
    drop(here);
    run(Command::new("qemu-img").args(["check", "-q"]).arg(at("qcow2")));
}
