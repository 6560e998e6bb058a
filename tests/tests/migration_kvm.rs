//! Live migration of a VM on KVM, with the log of its writes, and between KVM and translation there and back.
//! `HOLDFAST_NO_KVM=1` skips it where there is no KVM.

use std::path::Path;

use holdfast_tests::migration::Vmm;
use holdfast_tests::small::{Counter, config};
use serde_json::{Value, json};

/// Moves the VM from `from` to a new process `name`, where it goes on on `accel`.
fn moves(dir: &Path, from: &Vmm, name: &str, accel: &str) -> Vmm {
    let there = Vmm::start(dir, name, &[]);
    let url = format!("unix:{}", dir.join(format!("{name}.m")).display());
    let came = there.receive(json!({ "receiver_url": url, "accel": accel }));
    // Passes go on until few pages are left: those that are written meanwhile are sent by the log.
    let sent = from.send(&json!({ "destination_url": url, "downtime_ms": 500 }));
    assert!((200..300).contains(&sent.status), "{name}, to {accel}: {sent:?}");
    let came = came.join().expect("the thread");
    assert!((200..300).contains(&came.status), "on {accel}: {came:?}");
    let info = there.api.request("GET", "vm.info", &Value::Null).json();
    assert_eq!(info["config"]["accel"], accel, "{info}");
    there
}

#[test]
fn needs_kvm_a_running_vm_moves_between_kvm_and_translation_and_back() {
    if std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let mut vmm = Vmm::start(dir.path(), "a", &[]);
    vmm.api.put("vm.create", &config(dir.path(), "kvm"));
    vmm.api.put("vm.boot", &Value::Null);
    let counter = Counter(dir.path().join("console"));
    counter.goes_on(3);
    for (name, accel) in [("b", "kvm"), ("c", "tcg"), ("d", "kvm"), ("e", "kvm"), ("f", "tcg")] {
        vmm = moves(dir.path(), &vmm, name, accel);
        counter.goes_on(3);
    }
}
