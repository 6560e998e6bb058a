//! Disks that come and go on q35 while Debian's amd64 kernel runs, over REST.

use holdfast_tests::http::Api;
use holdfast_tests::shell::Guest;
use holdfast_tests::x86_64_args;
use serde_json::{Value, json};

#[test]
fn disks_come_and_go_over_rest() {
    let dir = tempfile::tempdir().expect("directory");
    let image = dir.path().join("a.img");
    std::fs::File::create(&image).and_then(|f| f.set_len(16 << 20)).expect("file");
    let socket = dir.path().join("api");
    let mut args = x86_64_args(1, "");
    // Where REST is served, machines have ports for what comes later.
    args.extend(["--api-socket".to_owned(), socket.display().to_string()]);
    let mut guest = Guest::boot(&args);
    let api = Api::connect(&socket);
    let disk = json!({ "path": image, "serial": "hot", "id": "d0" });
    let added = api.request("PUT", "vm.add-disk", &disk);
    assert_eq!((added.status, &added.json()["id"]), (200, &json!("d0")), "{added:?}");
    guest.wait_for("/sys/block/vda/serial", Some("hot"));
    guest.run("echo over rest | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null");
    assert_eq!(api.request("PUT", "vm.add-disk", &disk).status, 409, "the name is taken");
    let info = api.request("GET", "vm.info", &Value::Null).json();
    assert_eq!(info["config"]["disks"][0]["bus"], "hp0");
    assert_eq!(api.request("PUT", "vm.remove-device", &json!({ "id": "d0" })).status, 204);
    guest.wait_for("/sys/block/vda", None);
    let gone = || api.request("GET", "vm.info", &Value::Null).json()["config"]["disks"] == json!([]);
    let begun = std::time::Instant::now();
    while !gone() {
        assert!(begun.elapsed() < holdfast_tests::shell::BOOT, "it is still there");
        std::thread::sleep(std::time::Duration::from_millis(50));
    }
    assert!(std::fs::read(&image).expect("file").starts_with(b"over rest"));
    assert_eq!(api.request("PUT", "vm.remove-device", &json!({ "id": "d0" })).status, 404);
    guest.power_off();
}
