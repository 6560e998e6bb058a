//! KVM behind the accelerator traits, for x86-64 guests on x86-64 hosts.
//!
//! By default the local APICs are in the kernel and the IOAPIC, the i8259 pair and the i8254 in user
//! space (`kernel_irqchip=split`); with `on` all of them are in the kernel. There is no `off`: a local
//! APIC in user space would cost an exit for every access and is not kept here.
//!
//! KVM documentation: `Documentation/virt/kvm/api.rst` of the Linux kernel.

mod debug;
mod dirty;
mod ioevents;
mod kick;
mod msi;
mod slots;
mod state;
mod sys;
mod vcpu;
mod vm;

use std::ffi::CString;
use std::io;
use std::os::fd::FromRawFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use holdfast_accel::{AccelError, Accelerator, Vm, VmSpec};
use holdfast_arch::Arch;
use kvm_ioctls::{Cap, Kvm};

pub use kick::kick_signal;

use vm::KvmVm;

/// The accelerator's name in options, messages and states.
const NAME: &str = "kvm";

/// How writes by vCPUs to RAM are logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirtyLog {
    /// One bit a page, fetched and cleared slot by slot (`KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2` where there is).
    #[default]
    Bitmap,
    /// A ring of page numbers per vCPU with this many entries, a power of two.
    Ring(u32),
}

/// What can be chosen about KVM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvmOptions {
    /// The device node.
    pub device: PathBuf,
    /// How dirty pages are found.
    pub dirty_log: DirtyLog,
}

impl Default for KvmOptions {
    fn default() -> Self {
        Self { device: PathBuf::from("/dev/kvm"), dirty_log: DirtyLog::Bitmap }
    }
}

/// KVM.
#[derive(Debug, Clone, Default)]
pub struct KvmAccelerator {
    options: KvmOptions,
}

/// Capabilities without which no VM can be made, with their names.
const NEEDED: [(Cap, &str); 12] = [
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::IrqRouting, "KVM_CAP_IRQ_ROUTING"),
    (Cap::SignalMsi, "KVM_CAP_SIGNAL_MSI"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::ReadonlyMem, "KVM_CAP_READONLY_MEM"),
];

fn unavailable(reason: String, remedy: &str) -> AccelError {
    AccelError::Unavailable { accel: NAME, reason, remedy: remedy.to_owned() }
}

/// The host refused `what`.
fn host(what: impl Into<String>, source: impl Into<io::Error>) -> AccelError {
    AccelError::Host { accel: NAME, what: what.into(), source: source.into() }
}

fn unsupported(what: impl Into<String>) -> AccelError {
    AccelError::Unsupported { accel: NAME, what: what.into() }
}

fn io_error(e: kvm_ioctls::Error) -> io::Error {
    io::Error::from_raw_os_error(e.errno())
}

impl KvmAccelerator {
    /// KVM with `options`.
    pub fn new(options: KvmOptions) -> Self {
        Self { options }
    }

    /// Opens the device node and checks version and capabilities.
    fn open(&self) -> Result<Kvm, AccelError> {
        let path = &self.options.device;
        let kvm = open_node(path).map_err(|e| explain_open(path, &e))?;
        let version = kvm.get_api_version();
        if version != 12 {
            return Err(unavailable(
                format!("{} speaks API version {version}, not 12", path.display()),
                "upgrade the host's kernel or use `--accel tcg`",
            ));
        }
        let missing: Vec<&str> =
            NEEDED.iter().filter(|(cap, _)| !kvm.check_extension(*cap)).map(|(_, name)| *name).collect();
        if !missing.is_empty() {
            return Err(unavailable(
                format!("the host's KVM lacks {}", missing.join(", ")),
                "upgrade the host's kernel or use `--accel tcg`",
            ));
        }
        Ok(kvm)
    }
}

fn open_node(path: &Path) -> io::Result<Kvm> {
    let name = CString::new(path.as_os_str().as_encoded_bytes()).map_err(io::Error::other)?;
    let fd = Kvm::open_with_cloexec_at(name, true).map_err(io_error)?;
    // SAFETY: the descriptor was just opened and nobody else has it. That it is a KVM node is checked by
    // asking for its API version, which any other file refuses.
    Ok(unsafe { Kvm::from_raw_fd(fd) })
}

/// Says why `/dev/kvm` could not be opened and what to do.
fn explain_open(path: &Path, e: &io::Error) -> AccelError {
    let path = path.display();
    match e.raw_os_error() {
        Some(libc::ENOENT | libc::ENODEV | libc::ENXIO) => unavailable(
            format!("{path} does not exist or has no driver"),
            "enable virtualization in the host's firmware and load kvm_intel or kvm_amd, or use `--accel tcg`",
        ),
        Some(libc::EACCES | libc::EPERM) => unavailable(
            format!("no permission to open {path}"),
            "add this user to the group that owns it (usually `kvm`), or use `--accel tcg`",
        ),
        _ => unavailable(format!("{path} cannot be opened: {e}"), "use `--accel tcg`"),
    }
}

impl Accelerator for KvmAccelerator {
    fn name(&self) -> &'static str {
        NAME
    }

    fn probe(&self, arch: Arch) -> Result<(), AccelError> {
        if arch != Arch::X86_64 || Arch::HOST != Some(Arch::X86_64) {
            return Err(unavailable(
                format!("guests of architecture {arch} cannot run on this host's KVM"),
                "use `--accel tcg`",
            ));
        }
        self.open().map(|_| ())
    }

    fn check_speed(&self, arch: Arch) -> Result<(), String> {
        self.probe(arch).map_err(|e| match e {
            AccelError::Unavailable { reason, .. } => reason,
            other => other.to_string(),
        })?;
        if sys::hardware_virtualization() {
            return Ok(());
        }
        Err("the host's KVM interprets: no processor has vmx or svm".into())
    }

    fn create_vm(&self, spec: VmSpec) -> Result<Arc<dyn Vm>, AccelError> {
        self.probe(spec.arch)?;
        let kvm = self.open()?;
        Ok(Arc::new(vm::VmRef(KvmVm::new(&kvm, spec, self.options.dirty_log)?)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn at(path: &str) -> KvmAccelerator {
        KvmAccelerator::new(KvmOptions { device: path.into(), ..KvmOptions::default() })
    }

    #[test]
    fn an_absent_or_wrong_node_is_named_with_a_remedy() {
        let text = at("/nonexistent/kvm").probe(Arch::X86_64).expect_err("absent").to_string();
        assert!(text.contains("/nonexistent/kvm does not exist") && text.contains("--accel tcg"), "{text}");
        let text = at("/dev/null").probe(Arch::X86_64).expect_err("not KVM").to_string();
        assert!(text.contains("/dev/null speaks API version"), "{text}");
    }

    #[test]
    fn a_forbidden_node_is_named_with_a_remedy() {
        let e = explain_open(Path::new("/dev/kvm"), &io::Error::from_raw_os_error(libc::EACCES)).to_string();
        assert!(e.contains("no permission to open /dev/kvm") && e.contains("group"), "{e}");
    }

    #[test]
    fn a_foreign_architecture_is_refused() {
        let text = KvmAccelerator::default().probe(Arch::Riscv64).expect_err("foreign").to_string();
        assert!(text.contains("riscv64") && text.contains("--accel tcg"), "{text}");
    }
}
