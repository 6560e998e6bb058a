//! Network cards of back ends under Debian's kernels for riscv64 and amd64: several queues, either side listening, killed back ends,
//! a move to another host.
//!
//! Needs root, for taps and network namespaces.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use holdfast_tests::back_ends::{BackEnd, shared_ram};
use holdfast_tests::http::Api;
use holdfast_tests::lab::{ARP, Ear, GUEST, Lab, MAC};
use holdfast_tests::migration::Vmm;
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::{holdfast, riscv64_args, x86_64_args};
use serde_json::json;

/// A listener at the tap's own address, which comes with the tap.
fn listen(address: &str) -> TcpListener {
    let deadline = Instant::now() + BOOT;
    loop {
        match TcpListener::bind((address, 8377)) {
            Ok(listener) => return listener,
            Err(error) => assert!(Instant::now() < deadline, "{address}: {error}"),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// What the guest sends from its CPU `cpu` comes back to it, although `restart` is called on the way, both ways.
fn there_and_back(guest: &mut Guest, listener: &TcpListener, cpu: u32, restart: &mut dyn FnMut()) {
    let address = listener.local_addr().expect("an address").ip();
    let mask = 1 << cpu;
    guest.start(&format!("taskset {mask} nc {address} 8377 </tmp/a | sha256sum; sha256sum </tmp/a"));
    let mut stream: TcpStream = listener.accept().expect("the guest connects").0;
    let mut bytes = vec![0; 1 << 20];
    stream.read_exact(&mut bytes).expect("the guest sends");
    restart();
    stream.read_to_end(&mut bytes).expect("the guest sends the rest");
    let (first, rest) = bytes.split_at(1 << 20);
    stream.write_all(first).expect("the guest reads");
    restart();
    stream.write_all(rest).expect("the guest reads the rest");
    drop(stream);
    let said = guest.finish();
    let sums: Vec<&str> = said.lines().filter(|line| line.ends_with("  -")).collect();
    assert!(sums.len() == 2 && sums[0] == sums[1] && bytes.len() == 3 << 20, "{} bytes: {said}", bytes.len());
}

/// How often the queues that receive have interrupted, in order. Without MSI-X, which riscv64's cards on their bus do
/// not have, nobody knows.
fn interrupts(guest: &mut Guest) -> Vec<u64> {
    let said = guest.run("cat /proc/interrupts");
    let count = |line: &str| line.split_whitespace().skip(1).map_while(|word| word.parse::<u64>().ok()).sum();
    said.lines().filter(|line| line.contains("-input.")).map(count).collect()
}

/// Two queue pairs of a back end that `start` starts, with a tap at `net`.1, and that is killed again and again.
fn killed(mut args: Vec<String>, card: &str, net: &str, start: &dyn Fn() -> BackEnd) {
    let has_msix = args.iter().any(|arg| arg == "q35");
    shared_ram(&mut args);
    args.extend(["--net".to_owned(), format!("vhost_user=on,num_queues=4,{card}")]);
    let mut back_end = Some(start());
    let listener = listen(&format!("{net}.1"));
    let mut guest = Guest::boot(&args);
    guest.run(&format!(
        "ip addr add {net}.2/24 dev eth0; ip link set eth0 up; dd if=/dev/urandom of=/tmp/a bs=64k count=48 2>/dev/null"
    ));
    let queues = guest.run("ls /sys/class/net/eth0/queues | tr '\\n' ' '");
    assert!(queues.contains("rx-0 rx-1 tx-0 tx-1"), "{queues}");
    let mut restart = || {
        back_end = None;
        back_end = Some(start());
    };
    for cpu in 0..2 {
        let before = interrupts(&mut guest);
        there_and_back(&mut guest, &listener, cpu, &mut restart);
        let after = interrupts(&mut guest);
        if has_msix {
            assert!(after.len() == 2 && after[cpu as usize] > before[cpu as usize], "{before:?} {after:?}");
        }
    }
    guest.power_off();
}

/// What our back end is told of its tap.
fn tap(name: &str, net: &str) -> String {
    format!("tap={name},ip={net}.1,mask=255.255.255.0,host_mac=52:54:00:aa:00:01,num_queues=4")
}

#[test]
fn both_queues_of_a_tap_that_is_killed_carry_on() {
    let (dir, net) = (tempfile::tempdir().expect("directory"), "192.168.81");
    let socket = dir.path().join("s");
    let keys = format!("socket={},{}", socket.display(), tap("hftapvu4", net));
    let card = format!("socket={}", socket.display());
    killed(x86_64_args(2, ""), &card, net, &|| BackEnd::net(&keys, &socket));
}

#[test]
fn a_tap_that_connects_may_be_killed_and_connects_again() {
    let (dir, net) = (tempfile::tempdir().expect("directory"), "192.168.82");
    let socket = dir.path().join("s");
    let keys = format!("socket={},client=on,{}", socket.display(), tap("hftapvu5", net));
    let card = format!("socket={},vhost_mode=server", socket.display());
    killed(riscv64_args(2, ""), &card, net, &|| BackEnd::connecting(&keys));
    assert!(!socket.exists(), "the socket goes with the VM");
}

#[test]
#[ignore = "needs dpdk-testpmd, of Debian's dpdk-dev with its drivers, and a processor that it polls on"]
fn a_card_of_dpdk_that_is_killed_comes_again() {
    const TAP: &str = "hftapvu6";
    let (dir, net) = (tempfile::tempdir().expect("directory"), "192.168.83");
    let socket = dir.path().join("s");
    // It connects and listens to nobody else.
    let start = || {
        let mut command = std::process::Command::new("dpdk-testpmd");
        command.args(["-l", "0,1", "-m", "400", "--no-huge", "--no-shconf", "--no-pci", "--no-telemetry"]);
        command.args(["--vdev", &format!("net_vhost0,iface={},queues=2,client=1", socket.display())]);
        command.args(["--vdev", &format!("net_tap0,iface={TAP},mac=fixed"), "--", "--forward-mode=io"]);
        command.args(["--rxq=2", "--txq=2", "--no-mlockall", "--total-num-mbufs=8192", "--stats-period=60"]);
        let back_end = BackEnd::spawn(&mut command);
        let commands = [
            format!("link set {TAP} address 52:54:00:aa:00:02"),
            format!("addr add {net}.1/24 dev {TAP}"),
            format!("link set {TAP} up"),
        ];
        let deadline = Instant::now() + BOOT;
        for command in &commands {
            while !ip(command) {
                assert!(Instant::now() < deadline, "{command}: dpdk-testpmd makes no tap");
                std::thread::sleep(Duration::from_millis(50));
            }
        }
        back_end
    };
    // It passes on what the guest has not finished, to where nobody would.
    let card = format!("socket={},vhost_mode=server,offload_csum=off", socket.display());
    killed(riscv64_args(2, ""), &card, net, &start);
}

/// Whether `ip` does it.
fn ip(args: &str) -> bool {
    let done = std::process::Command::new("ip").args(args.split(' ')).output().expect("iproute2 is there");
    done.status.success()
}

#[test]
fn a_guest_announces_the_card_of_a_back_end_where_it_has_arrived() {
    let dir = tempfile::tempdir().expect("directory");
    let at = |name: &str| dir.path().join(name);
    let lab = Lab::new("1gbit");
    let start = |host, socket: &Path| {
        let keys = format!("socket={},tap=tap0", socket.display());
        BackEnd::start(lab.command(host, &holdfast()).args(["net-backend", &keys]), socket)
    };
    let first = start('a', &at("s"));
    let mac: Vec<String> = MAC.iter().map(|b| format!("{b:02x}")).collect();
    let mut args = riscv64_args(2, "");
    shared_ram(&mut args);
    args.extend([
        "--net".to_owned(),
        format!("vhost_user=on,socket={},mac={}", at("s").display(), mac.join(":")),
    ]);
    args.extend(["--api-socket".to_owned(), at("a").display().to_string()]);
    let mut guest = Guest::boot(&args);
    let source = Api::connect(&at("a"));
    let reached =
        guest.run("ip addr add 10.77.0.2/24 dev eth0; ip link set eth0 up; ping -c 1 -W 60 10.77.0.1");
    assert!(reached.contains("1 packets received"), "{reached}");
    // A path has one back end; the other host's comes to it with another's name.
    let _second = start('b', &at("t"));
    std::fs::rename(at("t"), at("s")).expect("renamed");
    let target = Vmm::start(dir.path(), "b", &[]);
    let url = format!("unix:{}", at("m").display());
    let received = target.receive(json!({ "receiver_url": url }));
    let arp = Ear::open(&lab, ARP);
    let sent = source.request("PUT", "vm.send-migration", &json!({ "destination_url": url }));
    assert_eq!(sent.status, 204, "{sent:?}");
    assert_eq!(received.join().expect("an answer").status, 204);
    drop(first);
    arp.hears("gratuitous ARP", |f| f[6..12] == MAC && f[28..32] == GUEST && f[38..42] == GUEST);
    let mut guest = guest.moved(target.program);
    let reached = guest.run("ping -c 1 -W 60 10.77.0.1");
    assert!(reached.contains("1 packets received"), "{reached}");
    guest.power_off();
}
