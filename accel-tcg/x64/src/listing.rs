//! Host code as text, for logs.

use std::fmt::Write;

use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

/// The instructions in `code`, which runs at `at`: a line each.
pub fn disassemble(code: &[u8], at: u64) -> String {
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    for insn in &mut Decoder::with_ip(64, code, at, DecoderOptions::NONE) {
        // Writing to a String cannot fail.
        let _ = write!(text, "  {:#x}: ", insn.ip());
        formatter.format(&insn, &mut text);
        text.push('\n');
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_line_for_each_instruction() {
        let text = super::disassemble(&[0x48, 0x89, 0xc3, 0xc3], 0x1000);
        assert_eq!(text, "  0x1000: mov rbx,rax\n  0x1003: ret\n");
    }
}
