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
        let addr = json!({ "type": "unix", "data": { "path": socket } });
        let backend = json!({ "type": "socket", "data": { "addr": addr, "server": false } });
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

    fn cards_over_rest(&mut self) {
        const TAP: &str = "hftapvu1";
        let socket = self.path("net");
        let keys = format!("socket={},tap={TAP},ip=192.168.79.1,mask=255.255.255.0", socket.display());
        let _back_end = BackEnd::net(&keys, &socket);
        let net =
            json!({ "vhost_user": true, "vhost_socket": socket, "id": "n", "mac": "52:54:00:12:34:57" });
        let added = self.api.request("PUT", "vm.add-net", &net);
        assert_eq!(added.status, 200, "{added:?}");
        self.guest.wait_for("/sys/class/net/eth0/address", Some("52:54:00:12:34:57"));
        let up = "ip addr add 192.168.79.2/24 dev eth0; ip link set eth0 up";
        let pinged = self.guest.run(&format!("{up}; until ping -c 1 -W 5 192.168.79.1; do sleep 0.2; done"));
        assert!(pinged.contains(" 0% packet loss"), "{pinged}");
        self.api.put("vm.remove-device", &json!({ "id": "n" }));
        self.deleted("n");
        self.guest.wait_for("/sys/class/net/eth0", None);
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
    rig.any_type_over_rest();
    rig.guest.power_off();
}
