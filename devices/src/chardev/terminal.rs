//! Raw mode of the process's own terminal, undone on every way out.
//!
//! While a [`RawTerminal`] lives, standard input is raw. Settings come back when it is dropped, when the
//! process exits or panics, and when a signal ends it, as long as nobody else handles that signal.

use std::io;
use std::mem::MaybeUninit;
use std::sync::Once;
use std::sync::atomic::{AtomicBool, AtomicPtr, Ordering};

use super::sys;

/// The settings to go back to; null while none are saved. The box behind it is never freed (a signal
/// handler may be reading it), only replaced: a few bytes for each time raw mode is entered.
static SAVED: AtomicPtr<libc::termios> = AtomicPtr::new(std::ptr::null_mut());
static RAW: AtomicBool = AtomicBool::new(false);
static HOOKS: Once = Once::new();

/// Signals that end a process unless handled.
const FATAL: [libc::c_int; 9] = [
    libc::SIGHUP,
    libc::SIGINT,
    libc::SIGQUIT,
    libc::SIGTERM,
    libc::SIGABRT,
    libc::SIGILL,
    libc::SIGFPE,
    libc::SIGSYS,
    libc::SIGXCPU,
];

/// Puts the terminal back as it was, if it is raw. May be called at any time, from any thread and from a
/// signal handler.
pub fn restore() {
    if !RAW.swap(false, Ordering::SeqCst) {
        return;
    }
    let saved = SAVED.load(Ordering::SeqCst);
    if saved.is_null() {
        return;
    }
    // SAFETY: a non-null pointer came from a leaked box and stays valid and unchanged for ever.
    let saved = unsafe { &*saved };
    // Nothing can be done about a terminal that has gone away.
    let _ = sys::set_termios(libc::STDIN_FILENO, saved);
}

extern "C" fn on_exit() {
    restore();
}

extern "C" fn on_signal(signal: libc::c_int) {
    restore();
    // SAFETY: raise is async-signal-safe; SA_RESETHAND made the default action current again, which
    // ends the process as the sender meant to.
    unsafe { libc::raise(signal) };
}

fn install_hooks() {
    let previous = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        previous(info);
    }));
    // SAFETY: `on_exit` is a function that lives for ever and does not unwind.
    unsafe { libc::atexit(on_exit) };
    for signal in FATAL {
        let mut old = MaybeUninit::<libc::sigaction>::zeroed();
        // SAFETY: a null new action only queries; `old` is valid to fill in.
        if unsafe { libc::sigaction(signal, std::ptr::null(), old.as_mut_ptr()) } != 0 {
            continue;
        }
        // SAFETY: zeroed is a valid sigaction, and the call above has filled it in.
        let mut action = unsafe { old.assume_init() };
        if action.sa_sigaction != libc::SIG_DFL {
            continue;
        }
        action.sa_sigaction = on_signal as extern "C" fn(libc::c_int) as libc::sighandler_t;
        action.sa_flags = libc::SA_RESETHAND | libc::SA_ONSTACK;
        // SAFETY: `action` is valid; the handler only uses async-signal-safe functions.
        unsafe { libc::sigaction(signal, &action, std::ptr::null_mut()) };
    }
}

/// Keeps standard input raw while it lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes standard input raw; `None` if it is no terminal.
    ///
    /// # Errors
    /// The host's error if its settings cannot be read or changed.
    pub fn enter() -> io::Result<Option<Self>> {
        if !sys::is_terminal(libc::STDIN_FILENO) {
            return Ok(None);
        }
        let settings = sys::get_termios(libc::STDIN_FILENO)?;
        HOOKS.call_once(install_hooks);
        if !RAW.load(Ordering::SeqCst) {
            SAVED.store(Box::into_raw(Box::new(settings)), Ordering::SeqCst);
        }
        RAW.store(true, Ordering::SeqCst);
        if let Err(error) = sys::set_termios(libc::STDIN_FILENO, &sys::make_raw(settings)) {
            restore();
            return Err(error);
        }
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}
