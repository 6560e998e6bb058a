//! The allow-lists.
//!
//! They are built from groups: what every thread needs to exist, what raises interrupts, what moves data. A role
//! that starts threads needs all that its threads need, since they inherit its filter.

use std::collections::BTreeMap;

use holdfast_threads::Role;
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule,
    TargetArch,
};

use crate::{SandboxError, SeccompMode};

/// One permitted call.
#[derive(Debug, Clone, Copy)]
enum Permit {
    /// Whatever its arguments.
    Any(i64),
    /// If the argument has this value in its low 32 bits.
    Arg(i64, u8, u64),
    /// If the argument has this value under this mask.
    Masked(i64, u8, u64, u64),
    /// If the first argument is this process.
    OwnProcess(i64),
}

use Permit::{Any, Arg, Masked, OwnProcess};

/// An ioctl by its number.
const fn ioctl(request: u64) -> Permit {
    Arg(libc::SYS_ioctl, 1, request)
}

/// All ioctls of one type (bits 8 to 15 of the request).
const fn ioctls(kind: u64) -> Permit {
    Masked(libc::SYS_ioctl, 1, 0xff00, kind << 8)
}

const PROT_EXEC: u64 = libc::PROT_EXEC as u64;
const CLONE_THREAD: u64 = libc::CLONE_THREAD as u64;

/// What any thread needs to live: memory (never executable), locks, time, waiting, its descriptors, its end.
const LIFE: &[Permit] = &[
    Any(libc::SYS_read),
    Any(libc::SYS_write),
    Any(libc::SYS_readv),
    Any(libc::SYS_writev),
    Any(libc::SYS_close),
    Any(libc::SYS_futex),
    Any(libc::SYS_madvise),
    Any(libc::SYS_munmap),
    Any(libc::SYS_mremap),
    Any(libc::SYS_brk),
    Masked(libc::SYS_mmap, 2, PROT_EXEC, 0),
    Masked(libc::SYS_mprotect, 2, PROT_EXEC, 0),
    Any(libc::SYS_rt_sigreturn),
    Any(libc::SYS_rt_sigprocmask),
    Any(libc::SYS_rt_sigtimedwait),
    Any(libc::SYS_sigaltstack),
    Any(libc::SYS_exit),
    Any(libc::SYS_exit_group),
    Any(libc::SYS_gettid),
    Any(libc::SYS_getpid),
    OwnProcess(libc::SYS_tgkill),
    Any(libc::SYS_clock_gettime),
    Any(libc::SYS_clock_getres),
    Any(libc::SYS_clock_nanosleep),
    Any(libc::SYS_nanosleep),
    Any(libc::SYS_gettimeofday),
    Any(libc::SYS_sched_yield),
    Any(libc::SYS_sched_getaffinity),
    Any(libc::SYS_getcpu),
    Any(libc::SYS_restart_syscall),
    Any(libc::SYS_getrandom),
    Any(libc::SYS_membarrier),
    Arg(libc::SYS_prctl, 0, libc::PR_GET_NAME as u64),
    Arg(libc::SYS_prctl, 0, libc::PR_SET_NAME as u64),
    Arg(libc::SYS_prctl, 0, 0x5356_4d41), // PR_SET_VMA: names of anonymous memory
    Any(libc::SYS_epoll_wait),
    Any(libc::SYS_epoll_pwait),
    Any(libc::SYS_epoll_ctl),
    Any(libc::SYS_poll),
    Any(libc::SYS_ppoll),
    Any(libc::SYS_fcntl),
    Any(libc::SYS_lseek),
    Any(libc::SYS_fstat),
    Any(libc::SYS_timerfd_settime),
    Any(libc::SYS_clone3), // another filter answers ENOSYS
];

/// Raising interrupts from outside a vCPU.
const INTERRUPTS: &[Permit] = &[
    ioctl(0x4020_aea5), // KVM_SIGNAL_MSI
    ioctl(0x4008_ae61), // KVM_IRQ_LINE
    ioctl(0xc008_ae67), // KVM_IRQ_LINE_STATUS
    ioctl(0x4008_ae6a), // KVM_SET_GSI_ROUTING
    ioctl(0x4020_ae76), // KVM_IRQFD
];

/// Reading and writing files that are open.
const FILE_IO: &[Permit] = &[
    Any(libc::SYS_pread64),
    Any(libc::SYS_pwrite64),
    Any(libc::SYS_preadv),
    Any(libc::SYS_pwritev),
    Any(libc::SYS_preadv2),
    Any(libc::SYS_pwritev2),
    Any(libc::SYS_fsync),
    Any(libc::SYS_fdatasync),
    Any(libc::SYS_fallocate),
    Any(libc::SYS_ftruncate),
];

/// Using sockets that are connected.
const SOCKET_IO: &[Permit] = &[
    Any(libc::SYS_recvfrom),
    Any(libc::SYS_recvmsg),
    Any(libc::SYS_recvmmsg),
    Any(libc::SYS_sendto),
    Any(libc::SYS_sendmsg),
    Any(libc::SYS_sendmmsg),
    Any(libc::SYS_shutdown),
    Any(libc::SYS_getsockopt),
    Any(libc::SYS_setsockopt),
    Any(libc::SYS_getsockname),
    Any(libc::SYS_getpeername),
    Any(libc::SYS_accept4),
    ioctl(0x5421), // FIONBIO
    ioctl(0x541b), // FIONREAD
];

/// The asynchronous ring.
const RING: &[Permit] =
    &[Any(libc::SYS_io_uring_enter), Any(libc::SYS_io_uring_setup), Any(libc::SYS_io_uring_register)];

/// Block devices behind a disk.
const BLOCK_DEVICES: &[Permit] = &[
    ioctl(0x1277),      // BLKDISCARD
    ioctl(0x127f),      // BLKZEROOUT
    ioctl(0x1261),      // BLKFLSBUF
    ioctl(0x8008_1272), // BLKGETSIZE64
    ioctl(0x1268),      // BLKSSZGET
];

/// Queues of a tap.
const TAP: &[Permit] = &[
    ioctl(0x4004_54d0), // TUNSETOFFLOAD
    ioctl(0x4004_54d8), // TUNSETVNETHDRSZ
    ioctl(0x4004_54d9), // TUNSETQUEUE
    ioctl(0x4004_54dc), // TUNSETVNETLE
];

/// Devices of the kernel's vhost, once they are this process's.
const VHOST: &[Permit] = &[
    ioctl(0x4008_af00), // VHOST_SET_FEATURES
    ioctl(0x4008_af03), // VHOST_SET_MEM_TABLE
    ioctl(0x4008_af10), // VHOST_SET_VRING_NUM
    ioctl(0x4028_af11), // VHOST_SET_VRING_ADDR
    ioctl(0x4008_af12), // VHOST_SET_VRING_BASE
    ioctl(0x4008_af20), // VHOST_SET_VRING_KICK
    ioctl(0x4008_af21), // VHOST_SET_VRING_CALL
    ioctl(0x4008_af30), // VHOST_NET_SET_BACKEND
    ioctl(0x4004_af61), // VHOST_VSOCK_SET_RUNNING
];

/// Terminals: modes and size. Not TIOCSTI, which types for the user.
const TERMINALS: &[Permit] = &[
    ioctl(0x5401),      // TCGETS
    ioctl(0x5402),      // TCSETS
    ioctl(0x5403),      // TCSETSW
    ioctl(0x5404),      // TCSETSF
    ioctl(0x5413),      // TIOCGWINSZ
    ioctl(0x802c_542a), // TCGETS2
    ioctl(0x402c_542b), // TCSETS2
];

/// A vCPU: everything of KVM, what devices do in its registers' stead, and the alarms that it fires itself.
const VCPU: &[Permit] =
    &[ioctls(0xae), Any(libc::SYS_timer_create), Any(libc::SYS_timer_settime), Any(libc::SYS_timer_delete)];

/// Making descriptors that name nothing outside the process.
const PLUMBING: &[Permit] = &[
    Any(libc::SYS_epoll_create1),
    Any(libc::SYS_eventfd2),
    Any(libc::SYS_timerfd_create),
    Any(libc::SYS_pipe2),
    Any(libc::SYS_dup),
    Any(libc::SYS_dup3),
    Any(libc::SYS_socketpair),
];

/// Starting threads, which then confine themselves further.
const THREADS: &[Permit] = &[
    Masked(libc::SYS_clone, 0, CLONE_THREAD, CLONE_THREAD),
    Any(libc::SYS_set_robust_list),
    Any(libc::SYS_rseq),
    Any(libc::SYS_seccomp),
    Any(libc::SYS_capget),
    Any(libc::SYS_capset),
    Any(libc::SYS_landlock_create_ruleset),
    Any(libc::SYS_landlock_add_rule),
    Any(libc::SYS_landlock_restrict_self),
    Arg(libc::SYS_prctl, 0, libc::PR_SET_NO_NEW_PRIVS as u64),
    Arg(libc::SYS_prctl, 0, libc::PR_GET_NO_NEW_PRIVS as u64),
    Arg(libc::SYS_prctl, 0, libc::PR_SET_SECCOMP as u64),
    Arg(libc::SYS_prctl, 0, libc::PR_CAPBSET_DROP as u64),
    Arg(libc::SYS_prctl, 0, libc::PR_CAP_AMBIENT as u64),
    Any(libc::SYS_sched_setaffinity),
    Any(libc::SYS_prlimit64),
];

/// Names in the file system.
const FILES: &[Permit] = &[
    Any(libc::SYS_openat),
    Any(libc::SYS_open),
    Any(libc::SYS_stat),
    Any(libc::SYS_lstat),
    Any(libc::SYS_newfstatat),
    Any(libc::SYS_statx),
    Any(libc::SYS_statfs),
    Any(libc::SYS_fstatfs),
    Any(libc::SYS_access),
    Any(libc::SYS_faccessat),
    Any(libc::SYS_faccessat2),
    Any(libc::SYS_readlink),
    Any(libc::SYS_readlinkat),
    Any(libc::SYS_getcwd),
    Any(libc::SYS_getdents64),
    Any(libc::SYS_unlink),
    Any(libc::SYS_unlinkat),
    Any(libc::SYS_rename),
    Any(libc::SYS_renameat),
    Any(libc::SYS_renameat2),
    Any(libc::SYS_mkdir),
    Any(libc::SYS_mkdirat),
    Any(libc::SYS_rmdir),
    Any(libc::SYS_flock),
    Any(libc::SYS_fchmod),
    Any(libc::SYS_chmod),
    Any(libc::SYS_fchmodat),
    Any(libc::SYS_umask),
    Any(libc::SYS_copy_file_range),
    Any(libc::SYS_sendfile),
    Any(libc::SYS_fadvise64),
];

/// Making sockets.
const SOCKETS: &[Permit] = &[
    Any(libc::SYS_socket),
    Any(libc::SYS_bind),
    Any(libc::SYS_listen),
    Any(libc::SYS_connect),
    Any(libc::SYS_accept),
];

/// Looking for a peer, and a second channel to it.
const CONNECT: &[Permit] = &[Any(libc::SYS_socket), Any(libc::SYS_connect), Any(libc::SYS_socketpair)];

/// Making memory that is shared with a peer.
const SHARED_MEMORY: &[Permit] = &[Any(libc::SYS_memfd_create), Any(libc::SYS_ftruncate)];

/// Showing memory of a device to the guest.
const WINDOWS: &[Permit] = &[ioctl(0x4020_ae46)]; // KVM_SET_USER_MEMORY_REGION

/// Who this is.
const IDENTITY: &[Permit] = &[
    Any(libc::SYS_getuid),
    Any(libc::SYS_geteuid),
    Any(libc::SYS_getgid),
    Any(libc::SYS_getegid),
    Any(libc::SYS_getppid),
    Any(libc::SYS_uname),
    Any(libc::SYS_sysinfo),
    Any(libc::SYS_getrusage),
    Any(libc::SYS_times),
];

/// Building VMs: KVM, code memory, guest RAM, taps, page faults in user space.
const BUILD: &[Permit] = &[
    ioctls(0xae), // KVM
    ioctls(0xaa), // userfaultfd
    Any(libc::SYS_mmap),
    Any(libc::SYS_memfd_create),
    Any(libc::SYS_userfaultfd),
    Any(libc::SYS_mlock),
    Any(libc::SYS_mbind),
    Any(libc::SYS_mincore),
    Any(libc::SYS_msync),
    Any(libc::SYS_rt_sigaction),
    Any(libc::SYS_rt_sigpending),
    Any(libc::SYS_kcmp),
    Any(libc::SYS_signalfd4),
    OwnProcess(libc::SYS_kill),
    ioctl(0x0000_af01), // VHOST_SET_OWNER
    ioctl(0x8008_af00), // VHOST_GET_FEATURES
    ioctl(0x4008_af60), // VHOST_VSOCK_SET_GUEST_CID
    ioctl(0x4004_54ca), // TUNSETIFF
    ioctl(0x8004_54d2), // TUNGETIFF
    ioctl(0x8004_54cf), // TUNGETFEATURES
    ioctl(0x8913),      // SIOCGIFFLAGS
    ioctl(0x8914),      // SIOCSIFFLAGS
    ioctl(0x8915),      // SIOCGIFADDR
    ioctl(0x8916),      // SIOCSIFADDR
    ioctl(0x891b),      // SIOCGIFNETMASK
    ioctl(0x891c),      // SIOCSIFNETMASK
    ioctl(0x8921),      // SIOCGIFMTU
    ioctl(0x8922),      // SIOCSIFMTU
    ioctl(0x8924),      // SIOCSIFHWADDR
    ioctl(0x8927),      // SIOCGIFHWADDR
    ioctl(0x8933),      // SIOCGIFINDEX
    ioctl(0x8004_5430), // TIOCGPTN
    ioctl(0x4004_5431), // TIOCSPTLCK
    ioctl(0x5441),      // TIOCGPTPEER
];

/// Everything that threads of a role are permitted.
fn permits(role: Role) -> Vec<&'static [Permit]> {
    match role {
        // Registers are served on the vCPU's thread: serial output, flash writes, ioeventfds, balloon.
        Role::Vcpu => vec![LIFE, VCPU, FILE_IO, SOCKET_IO],
        Role::Timer => vec![LIFE, INTERRUPTS],
        // A pool of threads may grow under load.
        Role::Block => vec![LIFE, INTERRUPTS, FILE_IO, RING, BLOCK_DEVICES],
        // A client that connects again looks its server's name up.
        Role::Nbd => {
            vec![LIFE, INTERRUPTS, FILE_IO, BLOCK_DEVICES, SOCKET_IO, SOCKETS, FILES, IDENTITY]
        }
        Role::Net => vec![LIFE, INTERRUPTS, SOCKET_IO, TAP],
        Role::Device => vec![LIFE, INTERRUPTS, FILE_IO, SOCKET_IO, TERMINALS],
        // A back end that is gone is looked for again.
        Role::BackEnd => vec![LIFE, INTERRUPTS, SOCKET_IO, CONNECT, SHARED_MEMORY, WINDOWS],
        Role::Vhost => vec![LIFE, INTERRUPTS, TAP, VHOST],
        // Requests bring descriptors and name files; each connection has its thread.
        Role::Api => vec![LIFE, FILE_IO, SOCKET_IO, SOCKETS, PLUMBING, FILES, THREADS, IDENTITY],
        // The VM is reached through its manager.
        Role::Gdb => vec![LIFE, SOCKET_IO],
        Role::Signal => vec![LIFE, TERMINALS, SIGNALS],
        Role::Vmm | Role::Migration => vec![
            LIFE,
            INTERRUPTS,
            FILE_IO,
            SOCKET_IO,
            RING,
            BLOCK_DEVICES,
            TAP,
            VHOST,
            TERMINALS,
            VCPU,
            PLUMBING,
            THREADS,
            FILES,
            SOCKETS,
            IDENTITY,
            BUILD,
            SIGNALS,
        ],
    }
}

/// Whether threads of this role may start others.
pub fn may_start_threads(role: Role) -> bool {
    permits(role).into_iter().flatten().any(|permit| matches!(permit, Masked(libc::SYS_clone, ..)))
}

/// Waiting for signals.
const SIGNALS: &[Permit] = &[Any(libc::SYS_rt_sigsuspend), Any(libc::SYS_pause)];

fn broken(role: Role, e: impl std::fmt::Display) -> SandboxError {
    SandboxError::Compile { role, reason: e.to_string() }
}

fn condition(arg: u8, op: SeccompCmpOp, value: u64) -> Result<Vec<SeccompRule>, seccompiler::BackendError> {
    let condition = SeccompCondition::new(arg, SeccompCmpArgLen::Dword, op, value)?;
    Ok(vec![SeccompRule::new(vec![condition])?])
}

fn rules(role: Role) -> Result<BTreeMap<i64, Vec<SeccompRule>>, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut free = std::collections::BTreeSet::new();
    for permit in permits(role).into_iter().flatten() {
        let (call, more) = match *permit {
            Any(call) => {
                free.insert(call);
                (call, Vec::new())
            }
            Arg(call, arg, value) => (call, condition(arg, SeccompCmpOp::Eq, value)?),
            Masked(call, arg, mask, value) => (call, condition(arg, SeccompCmpOp::MaskedEq(mask), value)?),
            OwnProcess(call) => (call, condition(0, SeccompCmpOp::Eq, u64::from(std::process::id()))?),
        };
        rules.entry(call).or_default().extend(more);
    }
    // A call that some group permits whatever its arguments has no conditions.
    for call in free {
        rules.insert(call, Vec::new());
    }
    Ok(rules)
}

fn target(role: Role) -> Result<TargetArch, SandboxError> {
    TargetArch::try_from(std::env::consts::ARCH).map_err(|e| broken(role, e))
}

/// The filter of `role`.
pub fn compile(role: Role, mode: SeccompMode) -> Result<BpfProgram, SandboxError> {
    let otherwise = match mode {
        SeccompMode::Kill => SeccompAction::Trap,
        SeccompMode::Log => SeccompAction::Log,
        SeccompMode::Errno => SeccompAction::Errno(libc::EPERM as u32),
        SeccompMode::Off => SeccompAction::Allow,
    };
    let rules = rules(role).map_err(|e| broken(role, e))?;
    let filter = SeccompFilter::new(rules, otherwise, SeccompAction::Allow, target(role)?);
    filter.and_then(BpfProgram::try_from).map_err(|e| broken(role, e))
}

/// The filter that makes `clone3` unknown: its flags are in memory, where no filter sees them.
pub fn compile_no_clone3() -> Result<BpfProgram, SandboxError> {
    let role = Role::Vmm;
    let rules = BTreeMap::from([(libc::SYS_clone3, Vec::new())]);
    let unknown = SeccompAction::Errno(libc::ENOSYS as u32);
    let filter = SeccompFilter::new(rules, SeccompAction::Allow, unknown, target(role)?);
    filter.and_then(BpfProgram::try_from).map_err(|e| broken(role, e))
}

/// `struct sock_fprog` (seccomp(2)).
#[repr(C)]
struct Program {
    len: u16,
    filter: *const seccompiler::sock_filter,
}

/// Puts this thread under `filter`. What it does not allow is also noted in the kernel's log (`type=1326`), which
/// is all that is left of a call that the C library makes with every signal blocked.
pub fn apply(filter: &BpfProgram) -> std::io::Result<()> {
    let len = u16::try_from(filter.len()).map_err(|_| std::io::ErrorKind::InvalidInput)?;
    let program = Program { len, filter: filter.as_ptr() };
    let (mode, flags) = (libc::SECCOMP_SET_MODE_FILTER, libc::SECCOMP_FILTER_FLAG_LOG);
    // SAFETY: `program` describes `filter`, which outlives the call; the kernel copies it.
    let result = unsafe { libc::syscall(libc::SYS_seccomp, mode, flags, &raw const program) };
    if result == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
}
