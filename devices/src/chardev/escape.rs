//! The terminal's escape key.

/// The key that starts an escape: Ctrl-A.
const KEY: u8 = 0x01;

/// What [`HELP`] says is what [`Escape`] does.
pub const HELP: &str = "\r\n\
    Ctrl-A h    show this help\r\n\
    Ctrl-A x    quit\r\n\
    Ctrl-A Ctrl-A    send Ctrl-A\r\n";

/// What came out of some typed bytes.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Escaped {
    /// Bytes for the guest.
    pub pass: Vec<u8>,
    /// The user wants to quit.
    pub quit: bool,
    /// The user wants help.
    pub help: bool,
}

/// Filters typed bytes.
#[derive(Debug, Default)]
pub struct Escape {
    armed: bool,
}

impl Escape {
    /// Takes typed bytes apart. Bytes behind a quit are dropped; an unknown key after Ctrl-A too.
    pub fn feed(&mut self, typed: &[u8]) -> Escaped {
        let mut out = Escaped::default();
        for &byte in typed {
            match (std::mem::take(&mut self.armed), byte) {
                (false, KEY) => self.armed = true,
                (false, _) | (true, KEY) => out.pass.push(byte),
                (true, b'x' | b'X') => {
                    out.quit = true;
                    break;
                }
                (true, b'h' | b'H' | b'?') => out.help = true,
                (true, _) => {}
            }
        }
        out
    }
}
