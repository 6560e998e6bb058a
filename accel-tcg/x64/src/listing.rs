//! Host code as text, for logs.

use std::fmt::Write;

use iced_x86::{Code, Decoder, DecoderOptions, Formatter, IntelFormatter};

/// The instructions in `code`, which runs at `at`: a line each. Behind a call to an address for which `data_behind` says
/// more than 0 there are so many bytes that are no instructions: they have a line, too.
pub(crate) fn disassemble(code: &[u8], at: u64, data_behind: impl Fn(u64) -> usize) -> String {
    let mut text = String::new();
    let mut formatter = IntelFormatter::new();
    let mut decoder = Decoder::with_ip(64, code, at, DecoderOptions::NONE);
    while decoder.can_decode() {
        let insn = decoder.decode();
        // Writing to a String cannot fail.
        let _ = write!(text, "  {:#x}: ", insn.ip());
        formatter.format(&insn, &mut text);
        text.push('\n');
        let called = insn.code() == Code::Call_rel32_64;
        let data = if called { data_behind(insn.near_branch_target()) } else { 0 };
        let from = decoder.position();
        let bytes = code.get(from..).unwrap_or_default();
        let bytes = &bytes[..data.min(bytes.len())];
        if !bytes.is_empty() && decoder.set_position(from + bytes.len()).is_ok() {
            let _ = writeln!(text, "  {:#x}: db {bytes:02x?}", insn.next_ip());
            decoder.set_ip(insn.next_ip() + bytes.len() as u64);
        }
    }
    text
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_line_for_each_instruction() {
        let text = super::disassemble(&[0x48, 0x89, 0xc3, 0xc3], 0x1000, |_| 0);
        assert_eq!(text, "  0x1000: mov rbx,rax\n  0x1003: ret\n");
    }

    #[test]
    fn data_behind_a_call_are_no_instructions() {
        let code = [0xe8, 0xfb, 0x0f, 0, 0, 0x48, 0x89, 0xc3, 0xe8, 0, 0, 0, 0, 0xc3];
        let text = super::disassemble(&code, 0x1000, |target| if target == 0x2000 { 3 } else { 0 });
        let lines = ["call 0000000000002000h", "db [48, 89, c3]", "call 000000000000100Dh", "ret"];
        let places = ["0x1000", "0x1005", "0x1008", "0x100d"];
        let expected: String =
            places.iter().zip(lines).map(|(at, line)| format!("  {at}: {line}\n")).collect();
        assert_eq!(text, expected);
        // What is cut short ends the listing.
        let text = super::disassemble(&code[..6], 0x1000, |_| 3);
        assert_eq!(text.lines().count(), 2);
    }
}
