//! Choosing an accelerator: `--accel kvm`, `tcg`, `auto`, or several in order (`kvm:tcg`).

use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, Vm, VmSpec};
use holdfast_arch::Arch;
use holdfast_config::{AccelChoice, AccelKind};

/// The accelerator called `kind`.
pub fn accelerator(kind: AccelKind) -> Arc<dyn Accelerator> {
    match kind {
        AccelKind::Kvm => Arc::new(holdfast_accel_kvm::KvmAccelerator::default()),
        AccelKind::Tcg => Arc::new(holdfast_accel_tcg::TcgAccelerator::default()),
    }
}

/// No accelerator can run the guest.
#[derive(Debug, thiserror::Error)]
#[error("no accelerator can run this guest: {}", .0.iter().map(describe).collect::<Vec<_>>().join("; "))]
pub struct NoAccelerator(pub Vec<AccelError>);

/// An error and all its causes in one line.
fn describe(error: &AccelError) -> String {
    let mut text = error.to_string();
    let mut cause = std::error::Error::source(error);
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

/// The order in which `choice` is tried for a guest of `arch`, and why, for the log.
fn order(choice: &AccelChoice, arch: Arch) -> (Vec<AccelKind>, String) {
    match choice {
        AccelChoice::Try(kinds) => (kinds.clone(), "as asked".into()),
        AccelChoice::Auto if Arch::HOST != Some(arch) => {
            (vec![AccelKind::Tcg], "the guest's architecture is not the host's".into())
        }
        AccelChoice::Auto => match accelerator(AccelKind::Kvm).check_speed(arch) {
            Ok(()) => (vec![AccelKind::Kvm, AccelKind::Tcg], "KVM runs it at the host's speed".into()),
            Err(why) => (vec![AccelKind::Tcg, AccelKind::Kvm], why),
        },
    }
}

/// Makes a VM with the first accelerator of `choice` that can, and says in the log which and why.
///
/// # Errors
/// [`NoAccelerator`] with what each of them said.
pub fn create_vm(choice: &AccelChoice, spec: &VmSpec) -> Result<Arc<dyn Vm>, NoAccelerator> {
    let (kinds, why) = order(choice, spec.arch);
    let mut errors = Vec::new();
    for kind in kinds {
        let accelerator = accelerator(kind);
        match accelerator.probe(spec.arch).and_then(|()| accelerator.create_vm(spec.clone())) {
            Ok(vm) => {
                tracing::info!("accelerator {kind} for a {} guest: {why}", spec.arch);
                return Ok(vm);
            }
            Err(error) => {
                tracing::warn!("accelerator {kind} cannot be used: {}", describe(&error));
                errors.push(error);
            }
        }
    }
    Err(NoAccelerator(errors))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_translates_a_foreign_guest() {
        let foreign = Arch::ALL.into_iter().find(|a| Arch::HOST != Some(*a)).expect("a foreign one");
        assert_eq!(order(&AccelChoice::Auto, foreign).0, [AccelKind::Tcg]);
    }

    #[test]
    fn a_list_is_tried_as_given() {
        let list = AccelChoice::Try(vec![AccelKind::Kvm, AccelKind::Tcg]);
        assert_eq!(order(&list, Arch::X86_64).0, [AccelKind::Kvm, AccelKind::Tcg]);
    }
}
