//! The suite on the host's KVM, with all interrupt controllers in the kernel and with the split.
//! `HOLDFAST_NO_KVM=1` skips it where there is no KVM; otherwise its absence fails.
//! `HOLDFAST_CASE=text` runs only the cases whose name contains the text.

use std::error::Error;

use holdfast_accel::{Accelerator, IrqChip};
use holdfast_accel_kvm::{DirtyLog, KvmAccelerator, KvmOptions};
use holdfast_arch::Arch;
use holdfast_conformance::{cases, hardware_cases};

fn run(kvm: &KvmAccelerator, irqchip: IrqChip, only: &str) {
    if std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
        return;
    }
    let wanted = std::env::var("HOLDFAST_CASE").unwrap_or_default();
    let mut failed = Vec::new();
    let mut all = cases();
    if kvm.at_speed(Arch::X86_64) {
        all.extend(hardware_cases());
    } else {
        eprintln!("skipped, since this KVM interprets: {:?}", hardware_cases());
    }
    for case in all.iter().filter(|c| c.name.contains(only) && c.name.contains(&wanted)) {
        if let Err(e) = case.check(kvm, irqchip) {
            let mut text = format!("{}: {e}", case.name);
            let mut cause = e.source();
            while let Some(c) = cause {
                text += &format!(": {c}");
                cause = c.source();
            }
            eprintln!("FAILED {irqchip:?} {text}");
            failed.push(text);
        } else {
            eprintln!("ok {irqchip:?} {}", case.name);
        }
    }
    assert!(failed.is_empty(), "needs /dev/kvm (HOLDFAST_NO_KVM=1 skips); failed: {failed:#?}");
}

#[test]
fn needs_kvm_split_irqchip_conforms() {
    run(&KvmAccelerator::default(), IrqChip::Split, "");
}

#[test]
fn needs_kvm_kernel_irqchip_conforms() {
    run(&KvmAccelerator::default(), IrqChip::On, "");
}

#[test]
fn needs_kvm_dirty_ring_conforms() {
    // As large as it goes: an interpreting KVM enters every store, and only looks for a full ring between runs of
    // many instructions.
    let options = KvmOptions { dirty_log: DirtyLog::Ring(65536), ..KvmOptions::default() };
    run(&KvmAccelerator::new(options), IrqChip::Split, "dirty log");
}
