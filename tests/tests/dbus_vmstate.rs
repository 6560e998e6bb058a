//! Helpers on a D-Bus bus, by `dbus-daemon` and libdbus, whose state moves along with a VM (`dbus-vmstate`).

use std::path::Path;

use holdfast_tests::Program;
use holdfast_tests::dbus::Bus;
use holdfast_tests::http::Api;
use holdfast_tests::migration::{LIMIT, listening, migrate};
use holdfast_tests::qmp::Qmp;
use holdfast_tests::small::{Counter, options};
use serde_json::{Value, json};

/// Most bytes of a helper's state.
const MOST: usize = 1 << 20;

/// A process with the small guest of `dir`, or one that waits for it, and what drives it.
struct Vmm {
    program: Program,
    qmp: Qmp,
    api: Api,
}

fn process(dir: &Path, name: &str, more: &[&str]) -> Vmm {
    let at = |kind: &str| dir.join(format!("{name}.{kind}")).display().to_string();
    let mut args = options(dir, "tcg");
    args.extend(["--qmp".to_owned(), format!("unix:{}", at("qmp"))]);
    args.extend(["--api-socket".to_owned(), at("api")]);
    args.extend(more.iter().map(|&option| option.to_owned()));
    let program = Program::run(&args);
    let (qmp, api) = (Qmp::connect(at("qmp").as_ref()), Api::connect(at("api").as_ref()));
    Vmm { program, qmp, api }
}

/// One that waits at `uri`, with the helpers of `bus`.
fn destination(dir: &Path, name: &str, uri: &str, bus: Option<&Bus>) -> Vmm {
    let object = bus.map(|bus| format!("dbus-vmstate,id=there,addr={}", bus.address()));
    let mut more = vec!["--incoming", uri];
    more.extend(object.iter().flat_map(|object| ["--object", object.as_str()]));
    let vmm = process(dir, name, &more);
    if let Some(socket) = uri.strip_prefix("unix:") {
        listening(Path::new(socket));
    }
    vmm
}

/// Makes the object that names the helpers of `bus`, in place of the last one.
fn object(qmp: &mut Qmp, addr: &str, ids: Option<&str>) {
    qmp.command("object-del", &json!({ "id": "here" }));
    let mut options = json!({ "qom-type": "dbus-vmstate", "id": "here", "addr": addr });
    if let Some(ids) = ids {
        options["id-list"] = ids.into();
    }
    qmp.ok("object-add", options);
}

/// `len` bytes of which no part is like another.
fn state(len: usize, seed: u32) -> Vec<u8> {
    let next = |x: &u32| Some(x.wrapping_mul(1_664_525).wrapping_add(1_013_904_223));
    std::iter::successors(Some(seed), next).map(|x| (x >> 24) as u8).take(len).collect()
}

#[test]
fn two_helpers_move_with_their_vm_from_bus_to_bus() {
    let (dir, elsewhere) = (tempfile::tempdir().expect("directory"), tempfile::tempdir().expect("directory"));
    let [mut here, mut there] = ["bus-a", "bus-b"].map(|name| Bus::start(dir.path(), name));
    let mut last = Bus::start(elsewhere.path(), "bus-c");
    let (network, disk) = (state(MOST, 1), state(70_000, 2));
    here.helper("network", &network, "");
    here.helper("not listed", b"stays", "silent");
    here.helper("disk", &disk, "");
    // Elsewhere they have queued in another order, and there is one more.
    for bus in [&mut there, &mut last] {
        bus.helper("disk", b"", "");
        bus.helper("more", b"as it was", "");
        bus.helper("network", b"", "");
    }
    let uri = format!("unix:{}", dir.path().join("m").display());
    let mut first = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    object(&mut first.qmp, &here.address(), Some("disk,network"));
    let mut second = destination(dir.path(), "b", &uri, Some(&there));
    assert_eq!(migrate(&mut first.qmp, &uri), ("completed".to_owned(), String::new()));
    second.qmp.until("query-status", "status", "running");
    drop(first);
    counter.goes_on(2);
    assert!(there.state("network", 2) == network && there.state("disk", 0) == disk);
    assert_eq!(there.state("more", 1), b"as it was");
    assert!(here.state("network", 0) == network && here.state("disk", 2) == disk, "they stay as they are");
    // On over TCP, before its RAM, to a process that Landlock limits; without a list at the source all of them go.
    let pid = std::process::id();
    let host = format!("127.{}.{}.{}", ((pid >> 16) & 0x3f) | 0x40, (pid >> 8) & 0xff, (pid & 0xff) | 1);
    let rule = format!("path={},access=rw", dir.path().display());
    let to_last = format!("dbus-vmstate,id=v,addr={},id-list=network,,disk,,more", last.address());
    let limits = ["--landlock", "--landlock-rules", rule.as_str(), "--object", to_last.as_str()];
    let mut third = process(dir.path(), "c", &[&limits[..], &["--incoming", "defer"]].concat());
    let uri = format!("tcp:{host}:7444");
    third.qmp.ok("migrate-incoming", json!({ "uri": uri }));
    let sent = second.api.request(
        "PUT",
        "vm.send-migration",
        &json!({ "destination_url": uri, "memory_mode": "Postcopy" }),
    );
    assert!(sent.status < 300, "{sent:?}");
    third.qmp.until("query-status", "status", "running");
    drop(second);
    counter.goes_on(2);
    assert!(last.state("network", 2) == network && last.state("disk", 0) == disk);
    assert_eq!(last.state("more", 1), b"as it was");
}

#[test]
fn what_keeps_the_guest_here_is_named_before_it_stops() {
    let dir = tempfile::tempdir().expect("directory");
    let mut first = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    let uri = format!("unix:{}", dir.path().join("m").display());
    let mut here = Bus::start(dir.path(), "bus-a");
    here.helper("one", b"state of one", "");
    let mut twins = Bus::start(dir.path(), "bus-twins");
    twins.helper("twin", b"", "");
    twins.helper("twin", b"", "");
    let mut stray = Bus::start(dir.path(), "bus-stray");
    stray.helper("", b"", "");
    let qmp = &mut first.qmp;
    let refused =
        qmp.fails("object-add", json!({ "qom-type": "dbus-vmstate", "id": "x", "addr": "tcp:host=x" }));
    assert!(refused.contains("the transport 'tcp', which is not supported"), "{refused}");
    object(qmp, &here.address(), None);
    let second = json!({ "qom-type": "dbus-vmstate", "id": "x", "addr": here.address() });
    assert!(qmp.fails("object-add", second).contains("There is already an instance of dbus-vmstate"));
    let nowhere = format!("unix:path={}", dir.path().join("nowhere").display());
    for (addr, ids, says) in [
        (nowhere, None, "nobody can be reached there"),
        (here.address(), Some("one,two,six"), "helpers are missing on the bus"),
        (here.address(), Some("one,two,six"), "`six`, `two`"),
        (twins.address(), None, "have the Id `twin`"),
        (stray.address(), None, "has an Id that is not of 1 to 255 bytes"),
    ] {
        object(qmp, &addr, ids);
        let (status, error) = migrate(qmp, &uri);
        assert!(status == "failed" && error.contains(says), "{says}: {error}");
        counter.goes_on(1);
    }
    // What the other side lacks.
    object(qmp, &here.address(), None);
    let empty = Bus::start(dir.path(), "bus-empty");
    for (n, (bus, says)) in [
        (None, "the state of helpers comes along (`one`), and there is no dbus-vmstate object here"),
        (Some(&empty), "bus-empty/socket`: `one`"),
    ]
    .into_iter()
    .enumerate()
    {
        let mut there = destination(dir.path(), &format!("b{n}"), &uri, bus);
        let (status, error) = migrate(qmp, &uri);
        assert!(status == "failed" && error.contains(says), "{says}: {error}");
        assert!(error.contains("the destination gave up"), "{error}");
        assert!(!there.program.wait_exit(LIMIT).success());
    }
    assert!(qmp.heard("STOP", "status").is_empty(), "the guest never stood");
    assert_eq!(qmp.ok("query-status", json!({}))["status"], "running");
    counter.goes_on(2);
}

#[test]
fn a_helper_that_fails_leaves_the_guest_where_it_is() {
    let dir = tempfile::tempdir().expect("directory");
    let mut first = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    let uri = format!("unix:{}", dir.path().join("m").display());
    // How the first helper is here and there, and what is said of it.
    for (n, (here_is, there_is, says)) in [
        (
            "",
            "refuses",
            "the helper `odd` cannot load its state: this is not what I was (org.example.Broken)",
        ),
        ("dies", "", "the helper `odd` cannot save its state"),
        ("large", "", "the state of the helper `odd` has more than 1048576 bytes"),
        ("silent", "", "the helper `odd` cannot save its state: there was no answer within 10 seconds"),
    ]
    .into_iter()
    .enumerate()
    {
        let [mut here, mut there] =
            ["here", "there"].map(|side| Bus::start(dir.path(), &format!("bus-{side}-{n}")));
        for (bus, how) in [(&mut here, here_is), (&mut there, there_is)] {
            bus.helper("even", b"even", "");
            bus.helper("odd", b"odd", how);
        }
        object(&mut first.qmp, &here.address(), None);
        let mut second = destination(dir.path(), &format!("b{n}"), &uri, Some(&there));
        let (status, error) = migrate(&mut first.qmp, &uri);
        assert!(status == "failed" && error.contains(says), "{says}: {error}");
        assert!(!second.program.wait_exit(LIMIT).success());
        assert_eq!(first.qmp.ok("query-status", json!({}))["status"], "running");
        counter.goes_on(2);
    }
    // Without the object nothing keeps it.
    first.qmp.ok("object-del", json!({ "id": "here" }));
    let mut second = destination(dir.path(), "last", &uri, None);
    assert_eq!(migrate(&mut first.qmp, &uri), ("completed".to_owned(), String::new()));
    second.qmp.until("query-status", "status", "running");
    drop(first);
    counter.goes_on(2);
}

#[test]
fn snapshots_and_files_hold_helpers_too() {
    let dir = tempfile::tempdir().expect("directory");
    let [mut here, mut odd, mut there] =
        ["bus-a", "bus-odd", "bus-b"].map(|name| Bus::start(dir.path(), name));
    let held = state(123_457, 3);
    here.helper("held", &held, "");
    odd.helper("odd", b"", "large");
    there.helper("held", b"", "");
    let mut first = process(dir.path(), "a", &[]);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(2);
    let snapshot = dir.path().join("snapshot");
    std::fs::create_dir(&snapshot).expect("directory");
    let to = json!({ "destination_url": format!("file://{}", snapshot.display()) });
    first.api.put("vm.pause", &Value::Null);
    object(&mut first.qmp, &odd.address(), None);
    let failed = first.api.request("PUT", "vm.snapshot", &to);
    assert!(
        failed.status == 500 && failed.body.contains("the state of the helper `odd` has more"),
        "{failed:?}"
    );
    assert!(!snapshot.join("state.json").exists());
    object(&mut first.qmp, &here.address(), None);
    first.api.put("vm.snapshot", &to);
    // It goes on, and into a file.
    first.api.put("vm.resume", &Value::Null);
    counter.goes_on(2);
    let uri = format!("file:{}", dir.path().join("vm").display());
    let mapped = json!([{ "capability": "mapped-ram", "state": true }]);
    first.qmp.ok("migrate-set-capabilities", json!({ "capabilities": mapped }));
    assert_eq!(migrate(&mut first.qmp, &uri), ("completed".to_owned(), String::new()));
    drop(first);
    let url = format!("source_url=file://{},resume=true", snapshot.display());
    let at = |name: &str| format!("unix:{}", dir.path().join(name).display());
    let mut bare = Program::run(&["--restore", &url, "--qmp", &at("bare")]);
    assert!(!bare.wait_exit(LIMIT).success());
    assert!(bare.output().contains("comes along (`held`), and there is no dbus-vmstate object here"));
    let object = format!("dbus-vmstate,id=v,addr={}", there.address());
    let restored = Program::run(&["--restore", &url, "--qmp", &at("q"), "--object", &object]);
    let mut qmp = Qmp::connect(&dir.path().join("q"));
    qmp.until("query-status", "status", "running");
    assert!(there.state("held", 0) == held);
    drop((qmp, restored));
    // The snapshot is older than the file.
    std::fs::remove_file(dir.path().join("console")).expect("it is there");
    let mut again = Bus::start(dir.path(), "bus-c");
    again.helper("held", b"", "");
    let mut third = destination(dir.path(), "c", &uri, Some(&again));
    third.qmp.until("query-status", "status", "running");
    assert!(again.state("held", 0) == held);
}
