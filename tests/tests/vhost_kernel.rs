//! The kernel's vhost, which the test machine need not have: Debian's amd64 kernel has it. It runs in a guest, and in that guest our program
//! with a riscv64 guest of its own, whose card and sockets that kernel serves.

use std::path::{Path, PathBuf};
use std::process::Command;

use holdfast_tests::devices::{run, sha256};
use holdfast_tests::shell::Guest;
use holdfast_tests::{
    add_archive, holdfast, printed, riscv64_guest, socat_archive, vhost_archive, x86_64_args,
};

/// What the inner VM is started with, beside its devices. Its console are two files.
const INNER: &str = "--arch riscv64 --machine virt --accel tcg --cpus boot=1 --memory size=256M --firmware /fw_dynamic.bin \
                     --kernel /Image --initramfs /inner.cpio --cmdline console=ttyS0 --serial tty --console off";
const FIRMWARE: &str = "/usr/lib/riscv64-linux-gnu/opensbi/generic/fw_dynamic.bin";

/// An archive with `program` of this machine, the libraries that it wants, and `files` in its root.
fn packed(dir: &Path, program: &str, files: &[PathBuf]) -> PathBuf {
    let (out, here) = (dir.join(program).with_extension("cpio"), Path::new(env!("CARGO_MANIFEST_DIR")));
    let path = format!("{}:{}", dir.display(), std::env::var("PATH").expect("a path"));
    let mut pack = Command::new(here.join("guests/pack"));
    pack.env("PATH", path).arg(&out).arg(here.join("guests/init")).arg(program);
    run(pack.args(files));
    out
}

/// The outer guest, with the modules loaded and all that the inner one needs.
fn outer(dir: &Path) -> Guest {
    run(Command::new("strip").arg("-o").arg(dir.join("holdfast")).arg(holdfast()));
    let inner = dir.join("inner.cpio");
    let mut bytes = std::fs::read(riscv64_guest().join("initramfs.cpio")).expect("its initramfs");
    bytes.extend(std::fs::read(socat_archive()).expect("socat"));
    std::fs::write(&inner, bytes).expect("written");
    std::fs::write(dir.join("blob"), blob()).expect("written");
    let files = [inner, riscv64_guest().join("Image"), FIRMWARE.into(), dir.join("blob")];
    let mut args = x86_64_args(2, "");
    let memory = args.iter_mut().find(|arg| *arg == "size=512M").expect("its size");
    *memory = "size=1536M".to_owned();
    for archive in [vhost_archive(), packed(dir, "holdfast", &files), packed(dir, "socat", &[])] {
        add_archive(&mut args, &archive, dir);
    }
    let mut guest = Guest::boot(&args);
    let loaded = guest.run(
        "for m in $(cat /lib/modules/vhost/order); do insmod /lib/modules/vhost/$m || echo MIS''SING $m; done; \
         ip link set lo up; mkfifo /in; mkdir /saved; ls /dev",
    );
    assert!(!loaded.contains("MISSING") && loaded.contains("vhost-net"), "{loaded}");
    guest
}

/// More than the rings and the sockets' buffers hold at once.
fn blob() -> Vec<u8> {
    (0..500_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

/// Types `command` into the inner guest's shell and waits until it has printed `word`, of which the command has two halves.
fn inner(guest: &mut Guest, command: &str, word: &str) -> String {
    let command = command.replace('\'', "'\\''");
    guest.run(&format!(
        "echo '{command}' >/in; until grep -q {word} /out || [ ! -d /proc/$PID ]; do sleep 0.2; done; tail -n 12 /out"
    ))
}

/// The same bytes come back from what the inner guest's socat listens on.
fn echoed(guest: &mut Guest, listen: &str, connect: &str, word: &str) {
    let (first, rest) = word.split_at(1);
    let socat = format!("/usr/bin/socat -d -d -t 60 {listen} PIPE 2>/tmp/log &");
    let waits = "until grep -q listening /tmp/log; do sleep 0.1; done";
    inner(guest, &format!("{socat} {waits}; echo {first}''{rest}"), word);
    let sums =
        guest.run(&format!("socat -t 60 - {connect} </blob >/back; sha256sum </back; cat /back | wc -c"));
    let dir = tempfile::tempdir().expect("directory");
    std::fs::write(dir.path().join("blob"), blob()).expect("written");
    assert!(sums.contains(&sha256(&dir.path().join("blob"))), "{connect}: {sums}");
}

/// The inner guest sends a file of its own to where a socat here listens.
fn sent(guest: &mut Guest, listen: &str, connect: &str, word: &str) {
    let (first, rest) = word.split_at(1);
    guest.run(&format!("rm -f /got; socat -u {listen} CREATE:/got & sleep 1"));
    let command = format!("/usr/bin/socat -u FILE:/tmp/a {connect}; sha256sum </tmp/a; echo {first}''{rest}");
    let said = inner(guest, &command, word);
    let sums = guest.run("wait $!; sha256sum </got | sed 's/^/GOT''-SUM /'");
    let sum = &printed(&sums, "GOT-SUM")[..64];
    assert!(said.contains(sum), "{connect}: {said}\n{sums}");
}

/// Starts the program with these options more, and waits for `word` in what its console says.
fn start(guest: &mut Guest, options: &str, word: &str) {
    let said = guest.run(&format!(
        "holdfast run {options} <>/in >/out 2>&1 & PID=$!; \
         until grep -q '{word}' /out || [ ! -d /proc/$PID ]; do sleep 0.2; done; tail -n 20 /out"
    ));
    assert!(said.contains(word), "{said}");
}

#[test]
fn the_kernel_moves_packets_and_connects_sockets() {
    let dir = tempfile::tempdir().expect("directory");
    let mut guest = outer(dir.path());
    let refused = guest.run(&format!(
        "holdfast run {INNER} --vsock cid=42,vhost=on,vhostfd=77 2>&1 </dev/null; holdfast run {INNER} --net vhost=on,vhost_user=on \
         2>&1 </dev/null"
    ));
    assert!(refused.contains("file descriptor 77"), "{refused}");
    assert!(refused.contains("does not go with `vhost_user`"), "{refused}");
    let net = "--net tap=hf0,ip=10.0.0.1,mask=255.255.255.0,mac=02:00:00:00:00:02,vhost=on";
    let options = format!(
        "{INNER} {net} --vsock cid=42,vhost=on --landlock --landlock-rules path=/saved,access=rw --api-socket /api"
    );
    start(&mut guest, &options, "poweroff -f");
    let uses =
        guest.run("ls -l /proc/$PID/fd | grep -c /dev/vhost-; cat /proc/$PID/task/*/comm | grep -c ^vhost-");
    assert!(uses.contains("2\n2"), "one of each, and the kernel's thread for it: {uses}");

    inner(
        &mut guest,
        "ip addr add 10.0.0.2/24 dev eth0; dd if=/dev/urandom of=/tmp/a bs=64k count=16; echo R''EADY",
        "READY",
    );
    let pinged = guest.run("ping -c 3 -s 1400 10.0.0.2");
    assert!(pinged.contains("3 packets received"), "{pinged}");
    echoed(&mut guest, "TCP-LISTEN:5001", "TCP:10.0.0.2:5001", "ATCP");
    sent(&mut guest, "TCP-LISTEN:5000,reuseaddr", "TCP:10.0.0.1:5000", "BTCP");
    echoed(&mut guest, "VSOCK-LISTEN:5001", "VSOCK-CONNECT:42:5001", "AVSOCK");
    sent(&mut guest, "VSOCK-LISTEN:5000", "VSOCK-CONNECT:2:5000", "BVSOCK");

    // Stopped, saved, and gone on with in another process.
    let saved = guest.run(
        "c='holdfast ctl --api-socket /api'; $c pause; $c resume; ping -c 1 10.0.0.2; $c pause; \
         $c snapshot file:///saved && ls /saved; $c shutdown-vmm; while [ -d /proc/$PID ]; do sleep 0.2; done; : >/out",
    );
    assert!(saved.contains("1 packets received") && saved.contains("state.json"), "{saved}");
    guest.run(
        "holdfast run --restore file:///saved,resume=on --api-socket /api <>/in >/out 2>&1 & PID=$!; sleep 1",
    );
    inner(&mut guest, "echo BA''CK", "BACK");
    let pinged = guest.run("ip addr show hf0; ping -c 3 10.0.0.2");
    assert!(pinged.contains("3 packets received"), "{pinged}");
    echoed(&mut guest, "TCP-LISTEN:5002", "TCP:10.0.0.2:5002", "CTCP");
    echoed(&mut guest, "VSOCK-LISTEN:5002", "VSOCK-CONNECT:42:5002", "CVSOCK");
    let off = guest.run("echo poweroff -f >/in; while [ -d /proc/$PID ]; do sleep 0.2; done; tail -n 3 /out");
    assert!(off.contains("Power down"), "{off}");
    guest.power_off();
}
