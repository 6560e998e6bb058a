//! Saying of which system call the process dies.
//!
//! Everything in the handler is async-signal-safe: it formats into a buffer on the stack, writes it to standard
//! error, and makes a forbidden call itself. `SIGSYS` is blocked meanwhile, so the kernel kills the process by it.

use std::io;

use crate::names::name_of;

/// `si_code` of a signal sent by a seccomp filter.
const SYS_SECCOMP: i32 = 1;

/// The part of `siginfo_t` that SIGSYS fills in (sigaction(2)).
#[repr(C)]
struct SigsysInfo {
    signo: i32,
    errno: i32,
    code: i32,
    _pad: i32,
    call_addr: *const libc::c_void,
    syscall: i32,
    arch: u32,
}

/// A line of text without allocation; what does not fit is cut.
struct Line {
    bytes: [u8; 192],
    len: usize,
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        for byte in text {
            if let Some(slot) = self.bytes.get_mut(self.len) {
                *slot = *byte;
                self.len += 1;
            }
        }
    }

    fn number(&mut self, mut value: u64) {
        let mut digits = [0u8; 20];
        let mut at = digits.len();
        loop {
            at -= 1;
            if let Some(digit) = digits.get_mut(at) {
                *digit = b'0' + (value % 10) as u8;
            }
            value /= 10;
            if value == 0 || at == 0 {
                break;
            }
        }
        self.push(digits.get(at..).unwrap_or_default());
    }
}

extern "C" fn report(_signal: i32, info: *mut libc::siginfo_t, _context: *mut libc::c_void) {
    // SAFETY: the kernel passes a valid siginfo, which for SIGSYS is laid out as `SigsysInfo`.
    let info = unsafe { &*info.cast::<SigsysInfo>() };
    say((info.code == SYS_SECCOMP).then(|| i64::from(info.syscall)));
    // SAFETY: no filter allows this call; with SIGSYS blocked, as it is here, the kernel kills the process.
    unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) };
    // SAFETY: not reached under a filter. Without one the signal was forged, and the process ends all the same.
    unsafe { libc::_exit(159) };
}

/// Ends the process as if this thread had just made forbidden system call `call`: for calls that the C library
/// makes with all signals blocked, when the kernel would end the process without a word.
pub fn die_of(call: i64) -> ! {
    say(Some(call));
    change_mask(libc::SIG_BLOCK);
    // SAFETY: no filter allows this call; with SIGSYS blocked the kernel kills the process.
    unsafe { libc::syscall(libc::SYS_execve, 0, 0, 0) };
    // SAFETY: not reached under a filter; without one there is no forbidden call to die of.
    unsafe { libc::_exit(159) };
}

/// Makes this thread take SIGSYS, whatever mask it has inherited: only a signal that is not blocked reaches the
/// handler.
pub fn unblock() {
    change_mask(libc::SIG_UNBLOCK);
}

fn change_mask(how: libc::c_int) {
    // SAFETY: sigset_t is plain data that sigemptyset initialises; the signal number is valid.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGSYS);
        libc::pthread_sigmask(how, &raw const set, std::ptr::null_mut());
    }
}

/// Writes which call this thread made; `None`: the signal came from elsewhere.
fn say(call: Option<i64>) {
    let mut line = Line { bytes: [0; 192], len: 0 };
    line.push(b"holdfast: thread `");
    let mut name = [0u8; 16];
    // SAFETY: PR_GET_NAME writes at most 16 bytes; every filter allows it.
    unsafe { libc::prctl(libc::PR_GET_NAME, name.as_mut_ptr()) };
    line.push(name.split(|b| *b == 0).next().unwrap_or_default());
    if let Some(call) = call {
        line.push(b"` made system call `");
        match name_of(call) {
            Some(name) => line.push(name.as_bytes()),
            None => line.number(call as u64),
        }
        line.push(b"`, which the sandbox forbids there; `--seccomp log` lets it pass and logs it\n");
    } else {
        line.push(b"` was sent SIGSYS\n");
    }
    // SAFETY: writes the filled part of the buffer; every filter allows it.
    unsafe { libc::write(2, line.bytes.as_ptr().cast(), line.len) };
}

/// Installs the handler.
pub fn install() -> io::Result<()> {
    // SAFETY: all-zero is a valid sigaction; what matters is filled in below.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    let handler: extern "C" fn(i32, *mut libc::siginfo_t, *mut libc::c_void) = report;
    action.sa_sigaction = handler as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the action is complete and its handler async-signal-safe.
    if unsafe { libc::sigaction(libc::SIGSYS, &raw const action, std::ptr::null_mut()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}
