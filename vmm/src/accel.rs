//! Choosing an accelerator: `--accel kvm`, `tcg`, `auto`, or several in order (`kvm:tcg`).

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, Vm, VmSpec};
use holdfast_arch::Arch;

/// An accelerator by name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum AccelKind {
    /// The host's kernel.
    Kvm,
    /// Translation.
    Tcg,
}

impl AccelKind {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }

    fn accelerator(self) -> Arc<dyn Accelerator> {
        match self {
            Self::Kvm => Arc::new(holdfast_accel_kvm::Kvm::default()),
            Self::Tcg => Arc::new(holdfast_accel_tcg::Tcg::default()),
        }
    }
}

/// Which accelerators to try, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum AccelChoice {
    /// KVM where it can run the guest at speed, else translation.
    Auto,
    /// These, in order.
    List(Vec<AccelKind>),
}

/// A word that names no accelerator.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no accelerator; kvm, tcg, auto, or several in order such as kvm:tcg are")]
pub struct UnknownAccel(String);

impl FromStr for AccelChoice {
    type Err = UnknownAccel;

    fn from_str(text: &str) -> Result<Self, UnknownAccel> {
        if text == "auto" {
            return Ok(Self::Auto);
        }
        let kind = |word| match word {
            "kvm" => Ok(AccelKind::Kvm),
            "tcg" => Ok(AccelKind::Tcg),
            _ => Err(UnknownAccel(text.to_owned())),
        };
        text.split(':').map(kind).collect::<Result<_, _>>().map(Self::List)
    }
}

impl fmt::Display for AccelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::List(kinds) => {
                let names: Vec<_> = kinds.iter().map(|k| k.name()).collect();
                f.write_str(&names.join(":"))
            }
        }
    }
}

/// No accelerator can run the guest.
#[derive(Debug, thiserror::Error)]
#[error("no accelerator can run this guest: {}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
pub struct NoAccelerator(pub Vec<AccelError>);

/// The order in which `choice` is tried for a guest of `arch`, and why, for the log.
fn order(choice: &AccelChoice, arch: Arch) -> (Vec<AccelKind>, &'static str) {
    match choice {
        AccelChoice::List(kinds) => (kinds.clone(), "as asked"),
        AccelChoice::Auto if Arch::HOST != Some(arch) => {
            (vec![AccelKind::Tcg], "the guest's architecture is not the host's")
        }
        AccelChoice::Auto if !host_has_virtualisation() => (
            vec![AccelKind::Tcg, AccelKind::Kvm],
            "the host's CPU shows no virtualisation, so KVM would crawl or is absent",
        ),
        AccelChoice::Auto => (vec![AccelKind::Kvm, AccelKind::Tcg], "the host's CPU has virtualisation"),
    }
}

/// True if the host's CPU offers hardware virtualisation to its kernel (Intel VT-x, AMD-V).
#[cfg(target_arch = "x86_64")]
fn host_has_virtualisation() -> bool {
    use std::arch::x86_64::__cpuid;
    let vmx = __cpuid(1).ecx >> 5 & 1 != 0;
    let extended = __cpuid(0x8000_0000).eax;
    let svm = extended >= 0x8000_0001 && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0;
    vmx || svm
}

#[cfg(not(target_arch = "x86_64"))]
fn host_has_virtualisation() -> bool {
    std::path::Path::new("/dev/kvm").exists()
}

/// Makes a VM with the first accelerator of `choice` that can.
///
/// # Errors
/// [`NoAccelerator`] with what each of them said.
pub fn create_vm(choice: &AccelChoice, spec: &VmSpec) -> Result<Arc<dyn Vm>, NoAccelerator> {
    let (kinds, why) = order(choice, spec.arch);
    let mut errors = Vec::new();
    for kind in kinds {
        let accelerator = kind.accelerator();
        match accelerator.probe(spec.arch).and_then(|()| accelerator.create_vm(spec.clone())) {
            Ok(vm) => {
                tracing::info!("accelerator {} for a {} guest: {why}", kind.name(), spec.arch);
                return Ok(vm);
            }
            Err(error) => {
                tracing::warn!("accelerator {} cannot be used: {error}", kind.name());
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
    fn choices_parse_and_print() {
        for text in ["kvm", "tcg", "auto", "kvm:tcg"] {
            assert_eq!(text.parse::<AccelChoice>().expect("valid").to_string(), text);
        }
        for text in ["", "hvf", "kvm:", "auto:tcg"] {
            assert_eq!(text.parse::<AccelChoice>(), Err(UnknownAccel(text.to_owned())));
        }
    }

    #[test]
    fn auto_translates_a_foreign_guest() {
        let foreign = Arch::ALL.into_iter().find(|a| Arch::HOST != Some(*a)).expect("a foreign one");
        assert_eq!(order(&AccelChoice::Auto, foreign).0, [AccelKind::Tcg]);
    }
}
