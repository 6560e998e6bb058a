//! Devices of vhost-user back ends that come and go while Debian's amd64 kernel runs, over QMP and REST.

use holdfast_tests::back_ends::{BackEnd, Virtiofsd, shared_ram};
use holdfast_tests::devices::run;
use holdfast_tests::http::Api;
use holdfast_tests::qmp::Qmp;
use holdfast_tests::shell::Guest;
use holdfast_tests::x86_64_args;
use serde_json::{Value, json};
use std::path::{Path, PathBuf};
use std::process::Command;

/// What our back end is told of its tap.
const TAP: &str = "tap=hftapvu1,ip=192.168.79.1,mask=255.255.255.0";

struct Rig {
    dir: tempfile::TempDir,
    guest: Guest,
    qmp: Qmp,
    api: Api,
}

impl Rig {
    fn boot() -> Self {
        let dir = tempfile::tempdir().expect("directory");
        let mut args = x86_64_args(2, "");
        shared_ram(&mut args);
        let (qmp, api) = (dir.path().join("qmp"), dir.path().join("api"));
        args.extend(["--qmp".to_owned(), format!("unix:{}", qmp.display())]);
        args.extend(["--api-socket".to_owned(), api.display().to_string()]);
        let guest = Guest::boot(&args);
        let (qmp, api) = (Qmp::connect(&qmp), Api::connect(&api));
        Self { dir, guest, qmp, api }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn chardev(&mut self, id: &str, socket: &Path) {
        self.chardev_of(id, socket, false);
    }

    fn chardev_of(&mut self, id: &str, socket: &Path, server: bool) {
        let addr = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": addr, "server": server } });
        self.qmp.ok("chardev-add", json!({ "id": id, "backend": backend }));
    }

    /// The guest and the VM have let go of a device.
    fn deleted(&mut self, id: &str) {
        loop {
            let data = self.qmp.event("DEVICE_DELETED");
            if data["device"] == id {
                return;
            }
        }
    }

    fn image(&self) -> PathBuf {
        let image = self.path("image");
        std::fs::File::create(&image).and_then(|file| file.set_len(16 << 20)).expect("file");
        image
    }

    fn disks_over_qmp(&mut self) {
        let (image, socket) = (self.image(), self.path("disk"));
        let _back_end = BackEnd::disk(&image, &socket);
        let add = json!({ "driver": "vhost-user-blk-pci", "chardev": "c", "id": "d", "num-queues": 2 });
        let unknown = self.qmp.fails("device_add", add.clone());
        assert!(unknown.contains("chardev' can't find value 'c'"), "{unknown}");
        self.chardev("c", &socket);
        let wrong = json!({ "driver": "vhost-user-blk-pci", "chardev": "c", "drive": "x" });
        assert!(
            self.qmp.fails("device_add", wrong).contains("Property 'vhost-user-blk-pci.drive' not found")
        );
        for text in ["once", "twice"] {
            self.qmp.ok("device_add", add.clone());
            self.guest.wait_for("/sys/block/vda/size", Some("32768"));
            self.guest.run(&format!("echo {text} | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null"));
            assert!(self.qmp.fails("chardev-remove", json!({ "id": "c" })).contains("is busy"));
            self.qmp.ok("device_del", json!({ "id": "d" }));
            self.deleted("d");
            assert!(std::fs::read(&image).expect("file").starts_with(text.as_bytes()));
            self.guest.wait_for("/sys/block/vda", None);
        }
        self.qmp.ok("chardev-remove", json!({ "id": "c" }));
        let gone = self.qmp.fails("chardev-remove", json!({ "id": "c" }));
        assert!(gone.contains("Chardev 'c' not found"), "{gone}");
    }

    fn file_systems_over_both(&mut self) {
        let (share, socket) = (self.path("share"), self.path("fs"));
        std::fs::create_dir(&share).expect("directory");
        std::fs::write(share.join("file"), "of the host").expect("file");
        let lost = self.api.request("PUT", "vm.add-fs", &json!({ "tag": "share", "socket": socket }));
        assert_eq!(lost.status, 500, "nobody listens: {lost:?}");
        assert!(lost.body.contains("cannot connect to"), "{lost:?}");
        // virtiofsd ends with its connection: there is one for each time.
        for over_rest in [false, true] {
            let _back_end = Virtiofsd::share(&share, &socket);
            if over_rest {
                let fs = json!({ "tag": "share", "socket": socket, "id": "f" });
                let added = self.api.request("PUT", "vm.add-fs", &fs);
                assert_eq!((added.status, &added.json()["id"]), (200, &json!("f")), "{added:?}");
            } else {
                self.chardev("c", &socket);
                let add = json!({ "driver": "vhost-user-fs-pci", "chardev": "c", "tag": "share", "id": "f" });
                self.qmp.ok("device_add", add);
            }
            let mount = "until mount -t virtiofs share /mnt 2>/dev/null; do sleep 0.2; done";
            assert!(self.guest.run(&format!("{mount}; cat /mnt/file")).contains("of the host"));
            self.guest.run("echo of the guest >/mnt/answer; umount /mnt");
            assert_eq!(std::fs::read_to_string(share.join("answer")).expect("file"), "of the guest\n");
            std::fs::remove_file(share.join("answer")).expect("file");
            if over_rest {
                self.api.put("vm.remove-device", &json!({ "id": "f" }));
            } else {
                self.qmp.ok("device_del", json!({ "id": "f" }));
            }
            self.deleted("f");
        }
    }

    /// The card is in the guest: it reaches the other end of the back end's tap, then lets go of it.
    fn card_works(&mut self) {
        self.guest.wait_for("/sys/class/net/eth0/address", Some("52:54:00:12:34:57"));
        let up = "ip addr add 192.168.79.2/24 dev eth0; ip link set eth0 up";
        let pinged = self.guest.run(&format!("{up}; until ping -c 1 -W 5 192.168.79.1; do sleep 0.2; done"));
        assert!(pinged.contains(" 0% packet loss"), "{pinged}");
    }

    fn cards_over_rest(&mut self) {
        let socket = self.path("net");
        let _back_end = BackEnd::net(&format!("socket={},{TAP}", socket.display()), &socket);
        let net =
            json!({ "vhost_user": true, "vhost_socket": socket, "id": "n", "mac": "52:54:00:12:34:57" });
        let added = self.api.request("PUT", "vm.add-net", &net);
        assert_eq!(added.status, 200, "{added:?}");
        self.card_works();
        self.api.put("vm.remove-device", &json!({ "id": "n" }));
        self.deleted("n");
        self.guest.wait_for("/sys/class/net/eth0", None);
    }

    /// Two pairs of queues of a back end that listens, then one of a back end that connects.
    fn cards_over_qmp(&mut self) {
        let socket = self.path("card");
        let add = json!({ "driver": "virtio-net-pci", "netdev": "b", "id": "n", "mac": "52:54:00:12:34:57",
            "mq": true });
        let unknown = self.qmp.fails("device_add", add.clone());
        assert!(unknown.contains("netdev' can't find value 'b'"), "{unknown}");
        for (listens, queues) in [(true, 2), (false, 1)] {
            let keys = format!("socket={},{TAP},num_queues={}", socket.display(), 2 * queues);
            let _back_end = match listens {
                true => BackEnd::net(&keys, &socket),
                false => BackEnd::connecting(&format!("{keys},client=on")),
            };
            let netdev = json!({ "type": "vhost-user", "id": "b", "chardev": "k", "queues": queues });
            let unknown = self.qmp.fails("netdev_add", netdev.clone());
            assert!(unknown.contains("chardev \"k\" not found"), "{unknown}");
            self.chardev_of("k", &socket, !listens);
            if !listens {
                let fs = json!({ "driver": "vhost-user-fs-pci", "chardev": "k", "tag": "x" });
                assert!(self.qmp.fails("device_add", fs).contains("does not take a server"));
            }
            self.qmp.ok("netdev_add", netdev.clone());
            assert!(self.qmp.fails("netdev_add", netdev).contains("Duplicate ID 'b'"));
            self.qmp.ok("device_add", add.clone());
            self.card_works();
            let pairs = self.guest.run("ls -d /sys/class/net/eth0/queues/rx-* | wc -l");
            assert!(pairs.lines().any(|line| line == queues.to_string()), "{pairs}");
            let second = json!({ "driver": "virtio-net-pci", "netdev": "b" });
            assert!(self.qmp.fails("device_add", second).contains("it's in use"));
            assert!(self.qmp.fails("netdev_del", json!({ "id": "b" })).contains("is in use"));
            self.qmp.ok("device_del", json!({ "id": "n" }));
            self.deleted("n");
            self.guest.wait_for("/sys/class/net/eth0", None);
            assert!(self.qmp.fails("chardev-remove", json!({ "id": "k" })).contains("is busy"));
            self.qmp.ok("netdev_del", json!({ "id": "b" }));
            self.qmp.ok("chardev-remove", json!({ "id": "k" }));
            assert!(!socket.exists() || listens, "a socket of ours goes with its card");
        }
        assert!(self.qmp.fails("netdev_del", json!({ "id": "b" })).contains("Device 'b' not found"));
    }

    /// The same with a tap, which is made and goes with its card.
    fn taps_over_qmp(&mut self) {
        let interface = Path::new("/sys/class/net/hftapvu2");
        self.qmp.ok("netdev_add", json!({ "type": "tap", "id": "t", "ifname": "hftapvu2", "script": "no" }));
        let script = json!({ "type": "tap", "id": "u", "script": "/etc/qemu-ifup" });
        assert!(self.qmp.fails("netdev_add", script).contains("`script` is not supported"));
        let add = json!({ "driver": "virtio-net-pci", "netdev": "t", "id": "n", "host_mtu": 1400 });
        let vectors = json!({ "driver": "virtio-net-pci", "netdev": "t", "vectors": 10 });
        assert!(self.qmp.fails("device_add", vectors).contains("the card has 4 vectors"));
        self.qmp.ok("device_add", add);
        self.guest.wait_for("/sys/class/net/eth0/mtu", Some("1400"));
        assert!(interface.exists());
        self.qmp.ok("device_del", json!({ "id": "n" }));
        self.deleted("n");
        assert!(!interface.exists(), "the tap goes with the card");
        self.guest.wait_for("/sys/class/net/eth0", None);
        self.qmp.ok("netdev_del", json!({ "id": "t" }));
    }

    /// The kernel's vhost, as far as a kernel without it can tell.
    fn kernels_over_qmp(&mut self) {
        let fd = json!({ "type": "tap", "id": "t", "vhost": true, "vhostfd": "3" });
        assert!(self.qmp.fails("netdev_add", fd).contains("`vhostfd` is not supported"));
        let vdpa = self.qmp.fails("netdev_add", json!({ "type": "vhost-vdpa", "id": "t" }));
        assert!(vdpa.contains("vhost-vdpa"), "{vdpa}");
        let scsi = self.qmp.fails("device_add", json!({ "driver": "vhost-scsi-pci" }));
        assert!(scsi.contains("'vhost-scsi-pci' is not a valid device model name"), "{scsi}");
        let cid = json!({ "driver": "vhost-vsock-pci", "guest-cid": 2 });
        assert!(self.qmp.fails("device_add", cid).contains("guest-cid property must be greater than 2"));
        if !Path::new("/dev/vhost-net").exists() {
            self.qmp.ok("netdev_add", json!({ "type": "tap", "id": "t", "vhost": true }));
            let card = self.qmp.fails("device_add", json!({ "driver": "virtio-net-pci", "netdev": "t" }));
            assert!(card.contains("/dev/vhost-net"), "{card}");
            self.qmp.ok("netdev_del", json!({ "id": "t" }));
        }
        if !Path::new("/dev/vhost-vsock").exists() {
            let sockets = json!({ "driver": "vhost-vsock-pci", "guest-cid": 3, "id": "v" });
            let refused = self.qmp.fails("device_add", sockets);
            assert!(refused.contains("/dev/vhost-vsock"), "{refused}");
        }
    }

    fn any_type_over_rest(&mut self) {
        let (image, socket) = (self.image(), self.path("any"));
        run(Command::new("dd")
            .arg("if=/dev/urandom")
            .arg(format!("of={}", image.display()))
            .args(["bs=1M", "count=16"]));
        let _back_end = BackEnd::disk(&image, &socket);
        // Type 2 is a disk: the guest's driver does not know that nobody here does.
        let device = json!({ "socket": socket, "device_type": 2, "queue_sizes": [128, 128], "id": "g" });
        let added = self.api.request("PUT", "vm.add-generic-vhost-user", &device);
        assert_eq!(added.status, 200, "{added:?}");
        self.guest.wait_for("/sys/block/vda/size", Some("32768"));
        let sum = self.guest.run("sha256sum </dev/vda");
        assert!(sum.contains(&holdfast_tests::devices::sha256(&image)), "{sum}");
        self.api.put("vm.remove-device", &json!({ "id": "g" }));
        self.deleted("g");
        let info = self.api.request("GET", "vm.info", &Value::Null).json();
        for list in ["disks", "net", "fs", "generic_vhost_user"] {
            assert!(info["config"][list].as_array().is_none_or(Vec::is_empty), "{list}: {info}");
        }
    }
}

#[test]
fn devices_of_back_ends_come_and_go() {
    let mut rig = Rig::boot();
    rig.disks_over_qmp();
    rig.file_systems_over_both();
    rig.cards_over_rest();
    rig.cards_over_qmp();
    rig.taps_over_qmp();
    rig.kernels_over_qmp();
    rig.any_type_over_rest();
    rig.guest.power_off();
}
