//! A working VM moves between two hosts, which are network namespaces, and a third one never loses its connection to the guest.
//! `HOLDFAST_LAB_MOVES` says how often it goes there and back in every mode. Needs root.

use std::path::Path;
use std::process::Command;
use std::time::Instant;

use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::lab::{ARP, Ear, GUEST, Lab, MAC, Peer, RARP};
use holdfast_tests::migration::{Console, LIMIT, Vmm, config, pc_config};
use holdfast_tests::tls::certificates;
use holdfast_tests::{Program, holdfast};
use serde_json::{Value, json};

/// What the guest verifies all the time.
const DISKS: [&str; 2] = ["vda", "vdb"];

fn start(lab: &Lab, host: char, dir: &Path, n: usize) -> Vmm {
    let socket = dir.join(format!("{host}{n}"));
    let mut command = lab.command(host, &holdfast());
    command.args(["run", "--api-socket"]).arg(&socket);
    let program = Program::spawn(command);
    Vmm { program, api: Api::connect(&socket) }
}

/// A way in which a VM is sent: its name, and what is asked of source and destination beside the address.
struct Mode {
    name: &'static str,
    send: Value,
    receive: Value,
}

fn modes(dir: &Path) -> Vec<Mode> {
    let mode = |name, send, receive| Mode { name, send, receive };
    let (tls, post) =
        (json!({ "tls_dir": [dir.join("a"), dir.join("b")] }), json!({ "memory_mode": "Postcopy" }));
    let hybrid = json!({ "memory_mode": "Hybrid", "downtime_ms": 1 });
    vec![
        mode("four connections with zstd", json!({ "connections": 4, "zstd_level": 1 }), json!({})),
        mode("post-copy", post.clone(), post.clone()),
        mode("hybrid", hybrid, post.clone()),
        mode("TLS", tls.clone(), tls.clone()),
        mode("auto-converge", json!({ "auto_converge": true, "downtime_ms": 300 }), json!({})),
        mode("post-copy with TLS", merge(post.clone(), &tls), merge(post, &tls)),
        mode("one connection", json!({}), json!({})),
    ]
}

fn merge(mut to: Value, more: &Value) -> Value {
    for (key, value) in more.as_object().into_iter().flatten() {
        to[key] = value.clone();
    }
    to
}

/// A VM that works, on one of two hosts.
struct Lodger<'a> {
    lab: &'a Lab,
    dir: &'a Path,
    peer: Peer,
    rarp: Ear,
    arp: Ear,
    console: Console,
    /// The process that has it.
    here: Vmm,
    began: Instant,
    moves: usize,
}

impl<'a> Lodger<'a> {
    /// It runs on host `a`.
    fn new(lab: &'a Lab, dir: &'a Path, config: impl Fn(&Path, &str) -> Value) -> Self {
        for (host, address) in [("a", "10.78.0.1"), ("b", "10.78.0.2")] {
            std::fs::create_dir(dir.join(host)).expect("directory");
            certificates(&dir.join(host), address);
        }
        for (name, format) in [("raw", "raw"), ("qcow2", "qcow2")] {
            run(Command::new("qemu-img").args(["create", "-q", "-f", format]).arg(dir.join(name)).arg("64M"));
        }
        let (peer, rarp, arp) = (Peer::listen(lab), Ear::open(lab, RARP), Ear::open(lab, ARP));
        let console = Console(dir.join("console"));
        let mut config = config(&console.0, "lab");
        config["disks"] =
            json!([{ "path": dir.join("raw"), "image_type": "Raw" }, { "path": dir.join("qcow2") }]);
        let mac: Vec<String> = MAC.iter().map(|b| format!("{b:02x}")).collect();
        config["net"] = json!([{ "tap": "tap0", "mac": mac.join(":") }]);
        let here = start(lab, 'a', dir, 0);
        let began = Instant::now();
        here.api.put("vm.create", &config);
        here.api.put("vm.boot", &Value::Null);
        let this = Self { lab, dir, peer, rarp, arp, console, here, began, moves: 0 };
        this.works(1);
        this
    }

    /// Everything goes on: the TCP connection, the counter, the disks by so many rounds.
    fn works(&self, rounds: usize) {
        let (peer, console) = (&self.peer, &self.console);
        std::thread::scope(|scope| {
            // One may have been on its way.
            scope.spawn(|| peer.goes_on(2));
            scope.spawn(|| console.disks_go_on(&DISKS, rounds));
            console.goes_on(1);
        });
        let (clock, host) = (self.console.clock(), self.began.elapsed().as_secs_f64());
        assert!(clock <= host, "the guest's clock is at {clock} s, {host} s after it was started");
    }

    /// To the other host, where the disks are written and verified so many times.
    fn moves(&mut self, mode: &Mode, rounds: usize) {
        self.moves += 1;
        let (host, address) =
            if self.moves.is_multiple_of(2) { ('a', "10.78.0.1") } else { ('b', "10.78.0.2") };
        let there = start(self.lab, host, self.dir, self.moves);
        let url = format!("tcp:{address}:7711");
        // The keys of the host that listens.
        let own_keys = |mut body: Value| {
            if let Some(keys) = body.get("tls_dir").map(|dirs| dirs[usize::from(host == 'b')].clone()) {
                body["tls_dir"] = keys;
            }
            body
        };
        let received = there.receive(own_keys(merge(json!({ "receiver_url": url }), &mode.receive)));
        let body = json!({
            "destination_url": url, "downtime_ms": 1000, "timeout_s": 20, "timeout_strategy": "Ignore",
        });
        self.rarp.forget();
        self.arp.forget();
        let sent = self.here.send(&own_keys(merge(body, &mode.send)));
        assert_eq!(sent.status, 204, "{}: {sent:?}", mode.name);
        assert_eq!(received.join().expect("an answer").status, 204, "{}", mode.name);
        assert!(self.here.program.wait_exit(LIMIT).success(), "{}: the source has ended", mode.name);
        self.here = there;
        self.works(rounds);
        self.rarp.hears("reverse ARP", |frame| frame[6..12] == MAC && frame[20..22] == [0, 3]);
        // The driver's own announcement: an ARP frame about itself, to itself.
        self.arp.hears("gratuitous ARP", |f| f[6..12] == MAC && f[28..32] == GUEST && f[38..42] == GUEST);
    }

    /// Nothing was lost.
    fn ends(self) {
        self.console.sum_is_good();
        let text = self.console.text();
        assert!(!text.contains("STREAM BROKEN"), "{text}");
        if let Some(lost) = self.lab.lost() {
            // A move takes thousands of packets.
            assert!(lost > 0, "the link loses none");
            eprintln!("{} moves, and the link lost {lost} packets", self.moves);
        }
        drop(self.here);
        run(Command::new("qemu-img").args(["check", "-q"]).arg(self.dir.join("qcow2")));
    }
}

/// Moves there and back ten times, or as often as is asked for, in every mode.
fn move_in_modes(config: impl Fn(&Path, &str) -> Value) {
    let rounds = std::env::var("HOLDFAST_LAB_MOVES").map_or(10, |n| n.parse().expect("a number"));
    let dir = tempfile::tempdir().expect("directory");
    let lab = Lab::new("2gbit");
    let mut guest = Lodger::new(&lab, dir.path(), config);
    for mode in &modes(dir.path()) {
        let began = Instant::now();
        for n in 0..rounds {
            // The disks are seen to work on either host, then at the end of each way there and back.
            guest.moves(mode, usize::from(n == 0));
            guest.moves(mode, 1);
        }
        eprintln!("{}: {rounds} times there and back in {:.0} s", mode.name, began.elapsed().as_secs_f64());
    }
    guest.ends();
}

#[test]
fn a_working_vm_moves_between_hosts() {
    move_in_modes(config);
}

#[test]
fn a_working_pc_moves_between_hosts() {
    move_in_modes(pc_config);
}
