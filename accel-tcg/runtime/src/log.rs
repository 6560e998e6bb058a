//! The log of what is translated: guest code, IR, host code, and of exceptions and interrupts.

use std::fmt::Write as _;
use std::fs::File;
use std::io::Write;

use parking_lot::Mutex;

/// What is logged.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct LogOptions {
    /// Guest instructions of each region.
    pub guest: bool,
    /// Its intermediate representation, as the back end gets it.
    pub ir: bool,
    /// Its host instructions.
    pub host: bool,
    /// Exceptions and interrupts that are taken.
    pub interrupts: bool,
    /// Only regions with instructions at, and exceptions of, guest-virtual addresses in this range: first and last.
    pub filter: Option<(u64, u64)>,
    /// Bytes after which nothing more is written.
    pub limit: u64,
}

/// The log.
#[derive(Debug)]
pub struct TraceLog {
    options: LogOptions,
    out: Mutex<Out>,
}

#[derive(Debug)]
struct Out {
    file: File,
    left: u64,
}

/// What is known of a region when it was translated.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Translated<'a> {
    pub vcpu: u32,
    pub pc: u64,
    pub phys: u64,
    pub key: u32,
    /// Guest instructions, a line each.
    pub guest: &'a str,
    pub ir: &'a holdfast_tcg_ir::Region,
    /// Host code, where it runs, and the routines that it calls.
    pub host: Option<(&'a [u8], u64, &'a holdfast_tcg_x64::Stubs)>,
}

impl TraceLog {
    /// Writes to `file`.
    pub fn new(file: File, options: LogOptions) -> Self {
        Self { options, out: Mutex::new(Out { file, left: options.limit }) }
    }

    /// Whether guest code is wanted.
    pub(crate) fn guest(&self) -> bool {
        self.options.guest
    }

    /// Whether a region of `len` bytes at `pc` is wanted.
    pub(crate) fn wants(&self, pc: u64, len: u64) -> bool {
        let last = pc.saturating_add(len.max(1) - 1);
        (self.options.guest || self.options.ir || self.options.host)
            && self.options.filter.is_none_or(|(first, end)| pc <= end && first <= last)
    }

    pub(crate) fn region(&self, t: &Translated<'_>) {
        // Writing to a String cannot fail.
        let mut text = String::new();
        let Translated { vcpu, pc, phys, key, .. } = t;
        let _ = writeln!(text, "REGION {pc:#x} vcpu {vcpu} phys {phys:#x} key {key:#x}");
        if self.options.guest {
            let _ = write!(text, "GUEST:\n{}", t.guest);
        }
        if self.options.ir {
            let _ = write!(text, "IR:\n{}", t.ir);
        }
        if let Some((code, at, stubs)) = t.host.filter(|_| self.options.host) {
            let _ = writeln!(text, "HOST: {} bytes at {at:#x}", code.len());
            text += &stubs.disassemble(code, at);
        }
        text.push('\n');
        self.write(&text);
    }

    /// An exception, of the instruction at `pc`, or (without a cause) an interrupt before it.
    pub(crate) fn event(&self, vcpu: u32, pc: u64, fault: Option<&crate::Fault>, handler: u64) {
        if !self.options.interrupts || self.options.filter.is_some_and(|(first, end)| pc < first || end < pc)
        {
            return;
        }
        self.write(&match fault {
            Some(f) => format!(
                "INT: vcpu {vcpu} at {pc:#x}: exception {:#x}, operands {:#x} and {:#x}, goes to {handler:#x}\n",
                f.cause, f.value, f.aux
            ),
            None => format!("INT: vcpu {vcpu} at {pc:#x}: interrupt, goes to {handler:#x}\n"),
        });
    }

    fn write(&self, text: &str) {
        let mut out = self.out.lock();
        let len = text.len() as u64;
        if out.left == 0 {
            return;
        }
        if out.left < len {
            tracing::warn!(limit = self.options.limit, "the log of translations ends at its limit");
            out.left = 0;
            return;
        }
        out.left -= len;
        if let Err(error) = out.file.write_all(text.as_bytes()) {
            tracing::warn!(%error, "the log of translations ends");
            out.left = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn log(name: &str, options: LogOptions) -> (TraceLog, std::path::PathBuf) {
        let path = std::env::temp_dir().join(format!("holdfast-tcg-log-{name}-{}", std::process::id()));
        (TraceLog::new(File::create(&path).expect("a file"), options), path)
    }

    #[test]
    fn the_filter_is_of_addresses_and_the_limit_is_kept() {
        let options = LogOptions {
            interrupts: true,
            guest: true,
            filter: Some((0x1000, 0x1fff)),
            limit: 100,
            ..LogOptions::default()
        };
        let (log, path) = log("filter", options);
        assert!(
            log.wants(0xfff, 2) && log.wants(0x1fff, 1) && !log.wants(0xff0, 16) && !log.wants(0x2000, 8)
        );
        log.event(0, 0x2000, None, 1);
        log.event(0, 0x1000, None, 0x80);
        for _ in 0..10 {
            log.event(1, 0x1004, None, 0x80);
        }
        let text = std::fs::read_to_string(&path).expect("readable");
        assert!(text.starts_with("INT: vcpu 0 at 0x1000: interrupt, goes to 0x80\n"), "{text}");
        assert!(text.len() <= 100, "{text}");
        std::fs::remove_file(path).expect("removed");
    }
}
