//! Machines that are saved on one accelerator and go on on the other: KVM, with the interrupt controllers split, and
//! translation. Cases that save twice come back to where they started. `HOLDFAST_NO_KVM=1` skips it where there is no KVM; otherwise its absence fails.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use holdfast_accel::{AccelError, Accelerator, IrqChip, Vm, VmSpec};
use holdfast_accel_kvm::KvmAccelerator;
use holdfast_accel_tcg::TcgAccelerator;
use holdfast_arch::Arch;
use holdfast_conformance::cases;

/// Makes each VM on the other accelerator than the one before.
#[derive(Debug)]
struct Alternating {
    kvm: KvmAccelerator,
    tcg: TcgAccelerator,
    made: AtomicUsize,
}

impl Accelerator for Alternating {
    fn name(&self) -> &'static str {
        "alternating"
    }

    fn probe(&self, arch: Arch) -> Result<(), AccelError> {
        self.kvm.probe(arch)
    }

    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        match self.made.fetch_add(1, Ordering::Relaxed) % 2 {
            0 => self.kvm.create_vm(spec),
            _ => self.tcg.create_vm(spec),
        }
    }
}

/// All cases that save, first made on KVM (0) or translation (1).
fn cross(first: usize) {
    if std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
        return;
    }
    let all: Vec<_> = cases().into_iter().filter(|c| c.name.starts_with("save and restore")).collect();
    assert!(!all.is_empty());
    for case in all {
        let both = Alternating {
            kvm: KvmAccelerator::default(),
            tcg: TcgAccelerator::default(),
            made: AtomicUsize::new(first),
        };
        if let Err(e) = case.check(&both, IrqChip::Split) {
            let cause = std::error::Error::source(&e).map(ToString::to_string).unwrap_or_default();
            // A KVM that cannot scale the time-stamp counter has to refuse a guest that was started with another.
            if first == 1 && cause.contains("its TSC runs at") && cause.contains("cannot be scaled") {
                eprintln!("{}: refused, since this KVM cannot scale the time-stamp counter", case.name);
                continue;
            }
            panic!("{}: {e} ({cause})", case.name);
        }
        assert!(both.made.load(Ordering::Relaxed) >= first + 2, "{} made one machine only", case.name);
    }
}

#[test]
fn needs_kvm_saved_on_kvm_goes_on_translated() {
    cross(0);
}

#[test]
fn needs_kvm_saved_translated_goes_on_on_kvm() {
    cross(1);
}
