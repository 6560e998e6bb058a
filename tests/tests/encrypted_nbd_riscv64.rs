//! Debian on an encrypted disk that is far away: LUKS in a qcow2 image, which QEMU's server has and gives over TLS only. fio and e2fsck
//! in the guest and QEMU's tools and e2fsck on the host agree. Needs qemu-utils, gnutls-bin and e2fsprogs.

use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use holdfast_tests::devices::{run, sha256};
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::tls::certificates;
use holdfast_tests::{add_archive, fio_archive, printed, riscv64_args};
use serde_json::json;

/// QEMU's server of a file, which ends with the test.
struct Server(Child);

impl Server {
    fn start(dir: &Path) -> Self {
        let credentials =
            format!("tls-creds-x509,id=t,endpoint=server,verify-peer=yes,dir={}", dir.join("pki").display());
        let child = Command::new("qemu-nbd")
            .args(["-t", "--shared=8", "-f", "raw", "--cache=writeback", "-x", "disk", "--tls-creds", "t"])
            .args(["--object", &credentials, "-k"])
            .args([dir.join("nbd"), dir.join("a.qcow2")])
            .stdin(Stdio::null())
            .spawn()
            .expect("qemu-nbd (Debian: qemu-utils)");
        let mut server = Self(child);
        let until = Instant::now() + BOOT;
        while !dir.join("nbd").exists() {
            assert!(server.0.try_wait().expect("server").is_none(), "qemu-nbd has ended");
            assert!(Instant::now() < until, "qemu-nbd does not come up");
            std::thread::sleep(Duration::from_millis(20));
        }
        server
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What QEMU's tools are told of the image.
fn image_opts(dir: &Path) -> String {
    format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", dir.join("a.qcow2").display())
}

fn create(dir: &Path) {
    let image = dir.join("a.qcow2");
    let make = || {
        Command::new("qemu-img")
            .args(["create", "-q", "-f", "qcow2", "--object", "secret,id=s,data=far away"])
            .args(["-o", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"])
            .arg(&image)
            .arg("96M")
            .output()
            .expect("qemu-img")
    };
    // QEMU times a hash to choose LUKS's iterations, and gives up where the clock of CPU time stood still.
    let unlucky = |out: &Output| String::from_utf8_lossy(&out.stderr).contains("accurate CPU usage");
    let mut made = make();
    for _ in 0..20 {
        if made.status.success() || !unlucky(&made) {
            break;
        }
        made = make();
    }
    assert!(made.status.success(), "qemu-img: {}", String::from_utf8_lossy(&made.stderr));
    // What a server has does not grow: there has to be room for all clusters.
    std::fs::File::options().write(true).open(&image).and_then(|f| f.set_len(128 << 20)).expect("room");
}

/// The riscv64 guest with fio, the disk as its only one.
fn arguments(dir: &Path) -> Vec<String> {
    let mut args = riscv64_args(2, "");
    add_archive(&mut args, &fio_archive(), dir);
    let node = json!({
        "driver": "qcow2", "node-name": "disk", "encrypt": { "format": "luks", "key-secret": "s" },
        "file": {
            "driver": "nbd", "node-name": "far", "export": "disk", "tls-creds": "c", "tls-hostname": "disk.example",
            "server": { "type": "unix", "path": dir.join("nbd") },
        },
    });
    let pki = dir.join("pki");
    let more = [
        "--object".to_owned(),
        "secret,id=s,data=far away".to_owned(),
        "--object".to_owned(),
        format!("tls-creds-x509,id=c,endpoint=client,verify-peer=yes,dir={}", pki.display()),
        "--blockdev".to_owned(),
        node.to_string(),
        "--device".to_owned(),
        "virtio-blk-pci,drive=disk,id=d0".to_owned(),
    ];
    args.extend(more);
    args
}

#[test]
fn fio_and_fsck_are_content_with_luks_in_qcow2_over_nbd_with_tls() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    std::fs::create_dir(dir.join("pki")).expect("directory");
    certificates(&dir.join("pki"), "disk.example");
    create(dir);
    let server = Server::start(dir);
    let mut guest = Guest::boot(&arguments(dir));
    guest.run("export LD_LIBRARY_PATH=/usr/lib");
    let made =
        guest.run("/usr/bin/mke2fs -q -t ext4 /dev/vda && mount -t ext4 /dev/vda /mnt && echo MOUNTED");
    assert!(made.contains("\nMOUNTED"), "{made}");
    let job = "/usr/bin/fio --name=v --filename=/mnt/f --size=4m --bs=4k --rw=randwrite --direct=1 --verify=crc32c --verify_fatal=1 --iodepth=8";
    let said = guest.run(&format!("{job} --ioengine=libaio --randrepeat=1; echo FIO $?"));
    assert_eq!(printed(&said, "FIO"), "0", "{said}");
    assert!(said.contains("WRITE: bw=") && said.contains("READ: bw="), "{said}");
    let said = guest
        .run("sha256sum /mnt/f | sed 's/^/SUM /'; umount /mnt; /usr/bin/e2fsck -f -n /dev/vda; echo FSCK $?");
    assert_eq!(printed(&said, "FSCK"), "0", "{said}");
    let sum = printed(&said, "SUM");
    // Once more with nothing in the guest's memory.
    let said = guest.run(&format!(
        "echo 3 >/proc/sys/vm/drop_caches; mount -t ext4 /dev/vda /mnt; {job} --ioengine=libaio --verify_only=1; echo FIO $?; umount /mnt"
    ));
    assert_eq!(printed(&said, "FIO"), "0", "{said}");
    guest.power_off();
    drop(server);
    checked_by_others(dir, &sum[..64]);
}

/// QEMU finds a sound image, and in it a sound file system with the file that the guest wrote.
fn checked_by_others(dir: &Path, sum: &str) {
    let opts = image_opts(dir);
    let secret = ["--object", "secret,id=s,data=far away"];
    run(Command::new("qemu-img").args(["check", "-q"]).args(secret).args(["--image-opts", &opts]));
    let plain = dir.join("plain");
    run(Command::new("qemu-img")
        .args(["convert", "-O", "raw"])
        .args(secret)
        .args(["--image-opts", &opts])
        .arg(&plain));
    run(Command::new("e2fsck").args(["-f", "-n"]).arg(&plain));
    let file = dir.join("file");
    run(Command::new("debugfs").arg("-R").arg(format!("dump /f {}", file.display())).arg(&plain));
    assert_eq!(sha256(&file), sum);
}
