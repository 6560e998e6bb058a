//! On which host CPUs a thread may run.

use std::io;
use std::os::unix::thread::JoinHandleExt;
use std::thread::JoinHandle;

fn set_of(cpus: &[usize]) -> io::Result<libc::cpu_set_t> {
    // SAFETY: an all-zero cpu_set_t is the empty set.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    for &cpu in cpus {
        if cpu >= libc::CPU_SETSIZE as usize {
            let text = format!("host CPU {cpu} does not exist");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, text));
        }
        // SAFETY: `cpu` is below CPU_SETSIZE.
        unsafe { libc::CPU_SET(cpu, &mut set) };
    }
    Ok(set)
}

/// Lets the calling thread run on these CPUs only.
///
/// # Errors
/// The host's, which has at least one of them online and allowed if this succeeds.
pub fn pin_current(cpus: &[usize]) -> io::Result<()> {
    let set = set_of(cpus)?;
    // SAFETY: `set` is a valid set of the size given; 0 is the calling thread.
    let rc = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &set) };
    if rc == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

/// Lets `thread` run on these CPUs only.
///
/// # Errors
/// As [`pin_current`].
pub fn pin(thread: &JoinHandle<()>, cpus: &[usize]) -> io::Result<()> {
    let set = set_of(cpus)?;
    // SAFETY: a thread that has a handle has not been joined, so its `pthread_t` is valid; so is the set.
    let rc =
        unsafe { libc::pthread_setaffinity_np(thread.as_pthread_t(), size_of::<libc::cpu_set_t>(), &set) };
    if rc == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(rc)) }
}
