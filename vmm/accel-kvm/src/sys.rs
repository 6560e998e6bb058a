//! What kvm-ioctls does not wrap: raw requests, shared mappings, signals to one thread.

use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::ptr::NonNull;
use std::sync::atomic::{AtomicU8, AtomicU32, Ordering, fence};

use kvm_bindings::{
    KVM_DIRTY_GFN_F_MASK, KVM_DIRTY_LOG_PAGE_OFFSET, KVMIO, kvm_clear_dirty_log, kvm_dirty_gfn,
    kvm_ioeventfd, kvm_run, kvm_userspace_memory_region,
};
use kvm_ioctls::{VcpuFd, VmFd};
use vmm_sys_util::ioctl::{ioctl, ioctl_with_ref};
use vmm_sys_util::{ioctl_io_nr, ioctl_iow_nr, ioctl_iowr_nr};

ioctl_iowr_nr!(KVM_CLEAR_DIRTY_LOG, KVMIO, 0xc0, kvm_clear_dirty_log);
ioctl_io_nr!(KVM_RESET_DIRTY_RINGS, KVMIO, 0xc7);
ioctl_iow_nr!(KVM_IOEVENTFD, KVMIO, 0x79, kvm_ioeventfd);
ioctl_iow_nr!(KVM_INTERRUPT, KVMIO, 0x86, u32);
ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, u32);

fn check(ret: i32) -> io::Result<i32> {
    if ret < 0 { Err(io::Error::last_os_error()) } else { Ok(ret) }
}

/// Whether this processor has virtualization extensions. A KVM on a host without them interprets.
pub fn hardware_virtualization() -> bool {
    use std::arch::x86_64::__cpuid;
    let vmx = __cpuid(1).ecx >> 5 & 1 != 0;
    let svm = __cpuid(0x8000_0000).eax >= 0x8000_0001 && __cpuid(0x8000_0001).ecx >> 2 & 1 != 0;
    vmx || svm
}

/// Creates, changes or (with size 0) deletes a memory slot.
///
/// # Safety
/// `slot.userspace_addr` must point to `slot.memory_size` bytes that stay mapped until the slot is
/// deleted or the VM is gone, and that are meant to be read and written by the guest.
pub unsafe fn set_memory_slot(vm: &VmFd, slot: kvm_userspace_memory_region) -> io::Result<()> {
    // SAFETY: the caller vouches for the memory.
    unsafe { vm.set_user_memory_region(slot) }.map_err(crate::io_error)
}

/// Clears the dirty bits that are set in `bitmap` and protects those pages again.
pub fn clear_dirty_log(vm: &VmFd, slot: u32, pages: u64, bitmap: &mut [u64]) -> io::Result<()> {
    let num_pages = u32::try_from(pages).map_err(io::Error::other)?;
    if (bitmap.len() as u64) < pages.div_ceil(64) {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    let mut request = kvm_clear_dirty_log { slot, num_pages, ..Default::default() };
    request.__bindgen_anon_1.dirty_bitmap = bitmap.as_mut_ptr().cast();
    // SAFETY: the bitmap has a bit for each of `num_pages` pages (checked above); the kernel reads it.
    check(unsafe { ioctl_with_ref(vm, KVM_CLEAR_DIRTY_LOG(), &request) }).map(|_| ())
}

/// Gives collected ring entries back to the kernel and protects their pages again.
pub fn reset_dirty_rings(vm: &VmFd) -> io::Result<i32> {
    // SAFETY: the request takes no argument.
    check(unsafe { ioctl(vm, KVM_RESET_DIRTY_RINGS()) })
}

/// Registers or unregisters an ioeventfd.
pub fn ioeventfd(vm: &VmFd, request: &kvm_ioeventfd) -> io::Result<()> {
    // SAFETY: the kernel only reads the request.
    check(unsafe { ioctl_with_ref(vm, KVM_IOEVENTFD(), request) }).map(|_| ())
}

/// Queues an external interrupt, as the interrupt acknowledge cycle would. To be called by the vCPU's
/// thread, with the vCPU ready for injection.
pub fn interrupt(vcpu: &VcpuFd, vector: u8) -> io::Result<()> {
    let request = u32::from(vector);
    // SAFETY: struct kvm_interrupt is one u32, which the kernel only reads.
    check(unsafe { ioctl_with_ref(vcpu, KVM_INTERRUPT(), &request) }).map(|_| ())
}

/// The `immediate_exit` byte of a vCPU's `kvm_run`, for other threads to set.
///
/// The owner must not use it after the `VcpuFd` is dropped.
#[derive(Debug)]
pub struct ImmediateExit(NonNull<kvm_run>);

// SAFETY: the byte is only accessed atomically; the kernel reads it at entry.
unsafe impl Send for ImmediateExit {}

impl ImmediateExit {
    /// The byte of `vcpu`.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        Self(NonNull::from(vcpu.get_kvm_run()))
    }

    /// Sets the byte.
    pub fn store(&self, value: u8) {
        // SAFETY: the mapping lives as long as the VcpuFd, which the owner of `self` keeps to; the byte is
        // shared with other threads and the kernel, so it is written atomically through a raw pointer.
        let byte = unsafe { AtomicU8::from_ptr(&raw mut (*self.0.as_ptr()).immediate_exit) };
        byte.store(value, Ordering::SeqCst);
    }
}

/// One port access as `kvm_run` describes it: `count` items of `size` bytes at `offset` in the mapping.
#[derive(Debug, Clone, Copy)]
pub struct PortIo {
    /// True for IN.
    pub input: bool,
    /// Bytes an item: 1, 2 or 4.
    pub size: usize,
    /// Port.
    pub port: u16,
    /// Items (more than one for string instructions).
    pub count: usize,
    offset: usize,
}

impl PortIo {
    /// The access of a vCPU that has just left with `KVM_EXIT_IO`.
    pub fn of(vcpu: &mut VcpuFd) -> Self {
        // SAFETY: the caller has seen KVM_EXIT_IO, for which the kernel fills in this member.
        let io = unsafe { vcpu.get_kvm_run().__bindgen_anon_1.io };
        Self {
            input: u32::from(io.direction) == kvm_bindings::KVM_EXIT_IO_IN,
            size: usize::from(io.size).max(1),
            port: io.port,
            count: io.count as usize,
            offset: io.data_offset as usize,
        }
    }

    /// The bytes to be read or written. `run_size` is the length of the `kvm_run` mapping.
    pub fn data<'a>(&self, vcpu: &'a mut VcpuFd, run_size: usize) -> Option<&'a mut [u8]> {
        let len = self.size.checked_mul(self.count)?;
        if self.offset.checked_add(len)? > run_size {
            return None;
        }
        let base = std::ptr::from_mut(vcpu.get_kvm_run()).cast::<u8>();
        // SAFETY: the bytes lie inside the mapping (checked), which lives as long as `vcpu` is borrowed, and
        // the vCPU is not running, so the kernel does not touch them.
        Some(unsafe { std::slice::from_raw_parts_mut(base.add(self.offset), len) })
    }
}

/// What `KVM_EXIT_INTERNAL_ERROR` says: the suberror, and the instruction's bytes if they were given.
pub fn internal_error(vcpu: &mut VcpuFd) -> (u32, Vec<u8>) {
    let run = vcpu.get_kvm_run();
    // SAFETY: the caller has seen KVM_EXIT_INTERNAL_ERROR; `suberror` and `ndata` are common to both views.
    let failure = unsafe { run.__bindgen_anon_1.emulation_failure };
    let given = u64::from(kvm_bindings::KVM_INTERNAL_ERROR_EMULATION_FLAG_INSTRUCTION_BYTES);
    if failure.suberror != kvm_bindings::KVM_INTERNAL_ERROR_EMULATION || failure.flags & given == 0 {
        return (failure.suberror, Vec::new());
    }
    // SAFETY: the flag says that the kernel has filled in the bytes; they are plain integers anyway.
    let bytes = unsafe { failure.__bindgen_anon_1.__bindgen_anon_1 };
    let n = usize::from(bytes.insn_size).min(bytes.insn_bytes.len());
    (failure.suberror, bytes.insn_bytes[..n].to_vec())
}

/// A vCPU's dirty ring, mapped.
#[derive(Debug)]
pub struct RingMap {
    base: NonNull<kvm_dirty_gfn>,
    entries: u32,
}

// SAFETY: entries are accessed with atomic flag words, as the kernel's protocol says; the mapping belongs
// to this object alone.
unsafe impl Send for RingMap {}

impl RingMap {
    /// Maps the ring of `entries` entries of the vCPU behind `fd`.
    pub fn new(fd: RawFd, entries: u32) -> io::Result<Self> {
        let len = entries as usize * size_of::<kvm_dirty_gfn>();
        let offset = i64::from(KVM_DIRTY_LOG_PAGE_OFFSET) * 4096;
        // SAFETY: a new shared mapping of the vCPU's file, at an address that the kernel chooses.
        let at = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED,
                fd,
                offset,
            )
        };
        match NonNull::new(at.cast()) {
            Some(base) if at != libc::MAP_FAILED => Ok(Self { base, entries }),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Number of entries.
    pub fn entries(&self) -> u32 {
        self.entries
    }

    /// Takes entry `index` (modulo the ring) if the kernel has filled it: (slot, page offset).
    pub fn take(&self, index: u32) -> Option<(u32, u64)> {
        /// The kernel has filled the entry.
        const DIRTY: u32 = 1;
        /// We have collected it.
        const RESET: u32 = 2;
        let at = (index % self.entries) as usize;
        // SAFETY: `at` is inside the mapping; the flags word is shared with the kernel and accessed atomically.
        let flags = unsafe { AtomicU32::from_ptr(&raw mut (*self.base.as_ptr().add(at)).flags) };
        if flags.load(Ordering::Acquire) & KVM_DIRTY_GFN_F_MASK != DIRTY {
            return None;
        }
        // SAFETY: as above; while the entry is DIRTY and not RESET, the kernel leaves it alone.
        let entry = unsafe { self.base.as_ptr().add(at).read_volatile() };
        fence(Ordering::SeqCst);
        flags.store(DIRTY | RESET, Ordering::Release);
        Some((entry.slot, entry.offset))
    }
}

impl Drop for RingMap {
    fn drop(&mut self) {
        let len = self.entries as usize * size_of::<kvm_dirty_gfn>();
        // SAFETY: the mapping was made in `new` with this length and nobody else refers to it.
        unsafe { libc::munmap(self.base.as_ptr().cast(), len) };
    }
}

/// This thread's id.
pub fn gettid() -> i32 {
    // SAFETY: gettid has no argument and cannot fail.
    unsafe { libc::gettid() }
}

/// Sends `signal` to thread `tid` of this process. A thread that is gone is no error.
pub fn tgkill(tid: i32, signal: i32) {
    // SAFETY: tgkill takes three integers; a stale `tid` gets ESRCH, or a signal with an empty handler.
    unsafe { libc::syscall(libc::SYS_tgkill, libc::getpid(), tid, signal) };
}

/// struct kvm_signal_mask with the kernel's 64 signals.
#[repr(C, packed)]
struct SignalMask {
    len: u32,
    signals: u64,
}

/// Calls `run` so that an entry into the guest finds `signal` pending from the start. The signal is not
/// delivered.
pub fn run_with_signal_pending<T>(
    vcpu: &mut VcpuFd,
    signal: i32,
    run: impl FnOnce(&mut VcpuFd) -> T,
) -> io::Result<T> {
    let set = vmm_sys_util::signal::create_sigset(&[signal])
        .map_err(|e| io::Error::from_raw_os_error(e.errno()))?;
    // All signals but this one stay blocked inside the entry.
    let mask = SignalMask { len: 8, signals: !(1u64 << (signal - 1)) };
    let mut old = set;
    // SAFETY: both sets are valid; the thread's mask is restored below.
    unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, &raw mut old) };
    // SAFETY: the structure is laid out as the kernel's and only read.
    let masked = check(unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), &mask) });
    let result = masked.map(|_| {
        tgkill(gettid(), signal);
        let result = run(vcpu);
        let now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
        // SAFETY: set and time are valid; no information is asked for. The signal is blocked and pending.
        unsafe { libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const now) };
        // SAFETY: a null argument takes the mask away again.
        unsafe { vmm_sys_util::ioctl::ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), std::ptr::null::<u32>()) };
        result
    });
    // SAFETY: restores the mask that was there.
    unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const old, std::ptr::null_mut()) };
    result
}

/// The file descriptor of a vCPU.
pub fn raw(vcpu: &VcpuFd) -> RawFd {
    vcpu.as_raw_fd()
}
