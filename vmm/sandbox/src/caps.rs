//! Capabilities: each thread keeps those that its role needs (capabilities(7)).

use std::io;

use holdfast_threads::Role;

use crate::SandboxError;

const DAC_OVERRIDE: u32 = 1;
const DAC_READ_SEARCH: u32 = 2;
const NET_ADMIN: u32 = 12;
const IPC_LOCK: u32 = 14;
const SYS_PTRACE: u32 = 19;
const SYS_NICE: u32 = 23;
const SYS_RESOURCE: u32 = 24;
/// The highest that the kernel may have.
const LAST: u32 = 63;

/// What a role needs. Threads that build VMs open files and taps, lock memory, place threads and serve page
/// faults; the others work on what they were given.
pub fn needed_by(role: Role) -> u64 {
    let set = |caps: &[u32]| caps.iter().fold(0, |set, cap| set | 1 << cap);
    match role {
        Role::Vmm | Role::Migration => {
            set(&[DAC_OVERRIDE, DAC_READ_SEARCH, NET_ADMIN, IPC_LOCK, SYS_PTRACE, SYS_NICE, SYS_RESOURCE])
        }
        Role::Api => set(&[DAC_OVERRIDE, DAC_READ_SEARCH]),
        Role::Vcpu
        | Role::Timer
        | Role::Block
        | Role::Nbd
        | Role::Net
        | Role::Device
        | Role::BackEnd
        | Role::Vhost
        | Role::Gdb
        | Role::Signal => 0,
    }
}

fn fail(what: &'static str) -> SandboxError {
    SandboxError::Privileges { what, source: io::Error::last_os_error() }
}

/// No later `execve` can give privileges.
pub fn no_new_privileges() -> Result<(), SandboxError> {
    // SAFETY: prctl with integer arguments.
    if unsafe { libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) } != 0 {
        return Err(fail("cannot set no_new_privs"));
    }
    Ok(())
}

#[repr(C)]
struct Header {
    version: u32,
    pid: i32,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Data {
    effective: u32,
    permitted: u32,
    inheritable: u32,
}

/// `_LINUX_CAPABILITY_VERSION_3`.
const VERSION: u32 = 0x2008_0522;

/// Gives up all capabilities of this thread but those in `keep`.
pub fn keep_only(keep: u64) -> Result<(), SandboxError> {
    let mut header = Header { version: VERSION, pid: 0 };
    let mut data = [Data::default(); 2];
    // SAFETY: header and data are laid out as the kernel's; version 3 has two data elements.
    if unsafe { libc::syscall(libc::SYS_capget, &raw mut header, data.as_mut_ptr()) } != 0 {
        return Err(fail("cannot read capabilities"));
    }
    for (half, shift) in data.iter_mut().zip([0, 32]) {
        let keep = (keep >> shift) as u32;
        half.effective &= keep;
        half.permitted &= keep;
        half.inheritable = 0;
    }
    // SAFETY: as above; the kernel only reads.
    if unsafe { libc::syscall(libc::SYS_capset, &raw mut header, data.as_ptr()) } != 0 {
        return Err(fail("cannot give up capabilities"));
    }
    Ok(())
}

/// Empties the bounding and ambient sets of this thread, which later threads inherit. That takes nothing that the
/// thread holds: it only ends what executing a program could give. Without privileges there is nothing to give up.
///
/// # Errors
/// [`SandboxError::Privileges`].
pub fn drop_bounding_set() -> Result<(), SandboxError> {
    // SAFETY: prctl with integer arguments.
    let _ = unsafe { libc::prctl(libc::PR_CAP_AMBIENT, libc::PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0) };
    for cap in 0..=LAST {
        // SAFETY: prctl with integer arguments.
        if unsafe { libc::prctl(libc::PR_CAPBSET_DROP, u64::from(cap), 0, 0, 0) } != 0 {
            match io::Error::last_os_error().raw_os_error() {
                // Past the last that the kernel has; or no privilege, and then no capability to bound.
                Some(libc::EINVAL | libc::EPERM) => break,
                _ => return Err(fail("cannot drop the bounding set")),
            }
        }
    }
    Ok(())
}
