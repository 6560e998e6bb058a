//! What two processors left, compared; differences of which no manual says which is right are not.

use std::fmt::Write;

use iced_x86::{
    Code, Decoder, DecoderOptions, EncodingKind, FlowControl, Formatter, Instruction, IntelFormatter,
    Mnemonic,
};

use super::case::{
    CODE, CODE_SIZE, Case, END, End, Image, OPMASK, Outcome, Processor, XSAVE_SIZE, ZMM_HIGH, ZMM_UPPER,
};
use super::generate::{rflags_mask, undefined_after};

/// Status flags, DF, NT, AC and ID.
const FLAGS: u64 = 0x8d5 | 0x400 | 0x4000 | 1 << 18 | 1 << 21;

/// The instructions of a case with their addresses.
pub fn decode(case: &Case) -> Vec<Instruction> {
    let mut decoder = Decoder::with_ip(case.bits, &case.code, CODE + case.at as u64, DecoderOptions::NONE);
    let mut all = Vec::new();
    while decoder.can_decode() {
        all.push(decoder.decode());
    }
    all
}

/// Tracks undefined flags along a sequence whose branches may skip some of it.
#[derive(Debug, Clone, Copy, Default)]
pub struct Undefined {
    /// Status flags that are undefined, as iced has them.
    pub flags: u32,
    branched: bool,
}

impl Undefined {
    /// Goes past `insn`.
    pub fn pass(&mut self, insn: &Instruction) {
        let after = undefined_after(self.flags, insn);
        self.flags = if self.branched { self.flags | after } else { after };
        self.branched |= insn.flow_control() != FlowControl::Next;
    }
}

/// Flags that are undefined when the run ended.
fn undefined(insns: &[Instruction], outcome: &Outcome) -> u64 {
    let mut undefined = Undefined::default();
    for (n, insn) in insns.iter().enumerate() {
        if outcome.end != End::Done && insn.ip() == outcome.image.rip {
            return rflags_mask(undefined.flags | dead(&insns[n..]));
        }
        undefined.pass(insn);
    }
    // Elsewhere in executable memory it went through code that is not known, whose flags may be dead at the fault.
    let at = outcome.image.rip;
    let executable = (CODE..CODE + CODE_SIZE as u64).contains(&at) || (END..END + 0x1000).contains(&at);
    if outcome.end != End::Done && executable {
        undefined.flags |= !0;
    }
    rflags_mask(undefined.flags)
}

/// Flags that `insns` set before any of them reads them: translation does not keep them for exception handlers to
/// look at. Behind a branch that may be so for all.
fn dead(insns: &[Instruction]) -> u32 {
    let (mut read, mut changed) = (0, 0);
    for insn in insns {
        read |= insn.rflags_read() & !changed;
        if insn.flow_control() != FlowControl::Next {
            return !read;
        }
        changed |= insn.rflags_modified();
    }
    changed & !read
}

/// The XSAVE area with components that are in their initial state written out.
fn normal(image: &Image) -> [u8; XSAVE_SIZE] {
    let mut area = image.xsave;
    let present = area[512];
    if present & 1 == 0 {
        area[..24].fill(0);
        area[..2].copy_from_slice(&0x37fu16.to_le_bytes());
        area[32..160].fill(0);
    }
    if present & 2 == 0 {
        area[160..416].fill(0);
    }
    if present & 4 == 0 {
        area[576..832].fill(0);
    }
    for (bit, part) in [(5, OPMASK..ZMM_HIGH), (6, ZMM_HIGH..ZMM_UPPER), (7, ZMM_UPPER..XSAVE_SIZE)] {
        if present >> bit & 1 == 0 {
            area[part].fill(0);
        }
    }
    area
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().rev().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

/// Differences of the register state, a line each, with a short kind.
fn registers(bits: u32, a: &Image, b: &Image, mask: u64, out: &mut Vec<(String, String)>) {
    const NAMES: [&str; 16] = [
        "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13",
        "r14", "r15",
    ];
    let mut note = |kind: String, a: String, b: String| {
        let text = format!("{kind}: {a} and {b}");
        out.push((kind, text));
    };
    for (i, name) in NAMES.iter().enumerate().take(if bits == 64 { 16 } else { 8 }) {
        if a.gpr[i] != b.gpr[i] {
            note((*name).to_string(), format!("{:#x}", a.gpr[i]), format!("{:#x}", b.gpr[i]));
        }
    }
    if a.rip != b.rip {
        note("rip".into(), format!("{:#x}", a.rip), format!("{:#x}", b.rip));
    }
    if (a.rflags ^ b.rflags) & FLAGS & !mask != 0 {
        note("rflags".into(), format!("{:#x}", a.rflags), format!("{:#x}", b.rflags));
    }
    let (x, y) = (normal(a), normal(b));
    let mut part = |name: String, at: usize, len: usize| {
        let range = at..at + len;
        if x[range.clone()] != y[range.clone()] {
            note(name, hex(&x[range.clone()]), hex(&y[range]));
        }
    };
    part("fcw".into(), 0, 2);
    part("fsw".into(), 2, 2);
    part("ftw".into(), 4, 1);
    part("mxcsr".into(), 24, 4);
    for i in 0..8 {
        part(format!("st{i}"), 32 + 16 * i, 10);
    }
    for i in 0..16 {
        part(format!("xmm{i}"), 160 + 16 * i, 16);
        part(format!("ymmh{i}"), 576 + 16 * i, 16);
        part(format!("zmmh{i}"), ZMM_HIGH + 32 * i, 32);
    }
    for i in 0..16 {
        part(format!("zmm{}", 16 + i), ZMM_UPPER + 64 * i, 64);
    }
    for i in 0..8 {
        part(format!("k{i}"), OPMASK + 8 * i, 8);
    }
}

/// What two processors hold differently, as text.
pub fn differences(bits: u32, a: &Image, b: &Image) -> Vec<String> {
    let mut all = Vec::new();
    registers(bits, a, b, 0, &mut all);
    all.into_iter().map(|d| d.1).collect()
}

/// A difference.
#[derive(Debug, Clone)]
pub struct Mismatch {
    /// What it is grouped by: code and what differs.
    pub kind: String,
    /// All that differs.
    pub text: String,
}

/// Runs `case` on both, whose code has been placed; `None` if they agree or the case proves nothing.
pub fn compare(
    case: &Case,
    a: &mut dyn Processor,
    b: &mut dyn Processor,
    data: &[u8; super::case::DATA_SIZE],
) -> (Outcome, Option<Mismatch>) {
    let image = case.image();
    let left = a.run(case.bits, &image, data);
    if let End::Fault { vector: 1, .. } = left.end {
        // TF was popped: single steps are the host kernel's affair.
        return (left, None);
    }
    let right = b.run(case.bits, &image, data);
    if let End::Fault { vector: 1, .. } = right.end {
        return (left, None);
    }
    let insns = decode(case);
    let mut all = Vec::new();
    let ends = (normal_end(left.end), normal_end(right.end));
    if ends.0 != ends.1 {
        all.push((end_name(ends), format!("{:x?} and {:x?}", ends.0, ends.1)));
    }
    let mut image = right.image.clone();
    if let End::Fault { vector: 19, .. } = left.end
        && left.image.get::<1>(24)[0] & 0x18 != 0
    {
        // With an overflow or underflow that is not masked, the result may count as inexact or not.
        image.xsave[24] = image.xsave[24] & !0x20 | left.image.xsave[24] & 0x20;
    }
    registers(case.bits, &left.image, &image, undefined(&insns, &left), &mut all);
    let bytes = a.data().iter().zip(b.data()).position(|(x, y)| x != y);
    // CALL to an address that is not canonical has stored the address to return to before it faults.
    let called = left.end == right.end
        && matches!(left.end, End::Fault { vector: 13, .. })
        && insns.iter().any(|i| i.ip() == left.image.rip && i.code() == Code::Call_rm64);
    if let Some(at) = bytes.filter(|_| !called) {
        let text = format!("memory at {:#x}: {:02x} and {:02x}", at, a.data()[at], b.data()[at]);
        all.push(("memory".into(), text));
    }
    if all.is_empty() || excused(&insns, &left, &right) {
        return (left, None);
    }
    let last = insns.iter().rev().map(Instruction::code).find(|c| *c != Code::Nopd).unwrap_or(Code::Nopd);
    let what = kind_of(&all[0].0);
    let text = all.into_iter().map(|a| a.1).collect::<Vec<_>>().join("\n    ");
    (left, Some(Mismatch { kind: format!("{} {last:?} {what}", case.bits), text }))
}

/// Names of registers without their numbers.
fn kind_of(name: &str) -> String {
    let vector = name.starts_with("xmm")
        || name.starts_with("ymm")
        || name.starts_with("zmm")
        || name.starts_with('k')
        || name.starts_with("st");
    if vector { name.trim_end_matches(|c: char| c.is_ascii_digit()).into() } else { name.into() }
}

fn end_name(ends: (End, End)) -> String {
    let name = |end| match end {
        End::Done => "done".to_string(),
        End::Fault { vector, error, .. } => format!("{vector}/{error:x}"),
        End::Broken(why) => why.to_string(),
    };
    format!("{}-{}", name(ends.0), name(ends.1))
}

/// Linux reports page faults at supervisor addresses as protection faults, whatever is there.
fn normal_end(end: End) -> End {
    match end {
        End::Fault { vector: 14, error, address } if address >= 0x7fff_ffff_f000 => {
            End::Fault { vector: 14, error: error | 1, address }
        }
        other => other,
    }
}

/// Differences that are allowed.
fn excused(insns: &[Instruction], left: &Outcome, right: &Outcome) -> bool {
    // The destination of a 16-bit double shift by more than 16 is undefined.
    let wide_shift = insns.iter().any(|i| match i.code() {
        Code::Shld_rm16_r16_CL | Code::Shrd_rm16_r16_CL => true,
        Code::Shld_rm16_r16_imm8 | Code::Shrd_rm16_r16_imm8 => i.immediate8() & 31 > 16,
        _ => false,
    });
    // An access that begins below the last canonical address, or the last address of 32-bit code, and ends behind it
    // is not checked as a whole.
    // Nor is it by vector instructions, before their alignment.
    let at_fault = insns.iter().find(|i| i.ip() == left.image.rip);
    let across = match (left.end, right.end) {
        (End::Fault { vector: 12 | 13, .. }, End::Fault { vector: 14, address, .. }) => {
            (0xffff_ff00..=0xffff_ffff).contains(&address) || (0x7fff_ffff_ff00..1 << 47).contains(&address)
        }
        (End::Fault { vector: 12 | 13, .. }, End::Fault { vector: 17, .. }) => true,
        // Elements under a mask are accessed several at once.
        (End::Fault { vector: 14, address, .. }, End::Fault { vector: 12 | 13, .. }) => {
            (0xffff_ff00..=0xffff_ffff).contains(&address)
                && at_fault.is_some_and(|i| i.code().encoding() == EncodingKind::EVEX)
        }
        _ => false,
    };
    // AMD's processors have one more bit in MXCSR.
    let amd = left.image.get::<4>(24)[2] & 2 != 0;
    // MASKMOVDQU checks alignment on some processors, if it stores enough.
    let masked = at_fault
        .is_some_and(|i| matches!(i.mnemonic(), Mnemonic::Maskmovdqu | Mnemonic::Vmaskmovdqu))
        && matches!(left.end, End::Fault { vector: 17, .. });
    // The elements of masked moves at addresses of 16 bits: some processors wrap each, some only that of the first.
    let element = at_fault.is_some_and(|i| {
        use iced_x86::Mnemonic as M;
        i.code().encoding() == EncodingKind::EVEX
            || matches!(i.mnemonic(), M::Vmaskmovps | M::Vmaskmovpd | M::Vpmaskmovd | M::Vpmaskmovq)
    });
    let wraps = match (left.end, right.end) {
        (
            End::Fault { vector: 14, error, address },
            End::Fault { vector: 14, error: other_error, address: other },
        ) => error == other_error && address.abs_diff(other) == 1 << 16,
        // Those behind 4 GiB: processors may wrap or raise (Intel SDM, volume 3A, section 5.3).
        (End::Fault { vector: 14, address, .. }, End::Fault { vector: 12 | 13, .. })
        | (End::Fault { vector: 12 | 13, .. }, End::Fault { vector: 14, address, .. }) => address < 0x100,
        _ => false,
    };
    // Some processors check the alignment of what VPCOMPRESS and its like store, others never.
    let compressed = |o: &Outcome| {
        use iced_x86::Mnemonic as M;
        let stored = insns.iter().find(|i| i.ip() == o.image.rip).map(Instruction::mnemonic);
        matches!(o.end, End::Fault { vector: 17, .. })
            && matches!(
                stored,
                Some(
                    M::Vpcompressb
                        | M::Vpcompressw
                        | M::Vpcompressd
                        | M::Vpcompressq
                        | M::Vcompressps
                        | M::Vcompresspd
                )
            )
    };
    let compressed = compressed(left) != compressed(right);
    // Which operand of CMPS is read first depends on its size and prefixes; POPA may write registers before it faults.
    let compared = insns.iter().any(|i| {
        use iced_x86::Mnemonic as M;
        matches!(i.mnemonic(), M::Cmpsb | M::Cmpsw | M::Cmpsd | M::Cmpsq | M::Popa | M::Popad)
            && i.ip() == left.image.rip
    });
    let either = compared && left.end != End::Done && right.end != End::Done;
    // VEX.W is not seen once decoded; some processors refuse 1 in 32-bit code.
    let wide_insert = insns.iter().any(|i| {
        use iced_x86::Mnemonic as M;
        i.ip() == left.image.rip && matches!(i.mnemonic(), M::Vpinsrd | M::Vpextrd)
    });
    let refused = wide_insert && matches!(left.end, End::Fault { vector: 6, .. });
    // Dot products stop between their steps.
    let steps = insns.iter().any(|i| {
        use iced_x86::Mnemonic as M;
        i.ip() == left.image.rip && matches!(i.mnemonic(), M::Dpps | M::Dppd | M::Vdpps | M::Vdppd)
    });
    let trapped = |o: &Outcome| matches!(o.end, End::Fault { vector: 19, .. });
    let refused = refused || steps && trapped(left) && trapped(right);
    wide_shift || refused || across || amd || masked || element && wraps || compressed || either
}

/// The instructions of a case as text.
pub fn listing(case: &Case) -> String {
    let mut formatter = IntelFormatter::new();
    let mut text = String::new();
    for insn in decode(case) {
        let mut line = String::new();
        formatter.format(&insn, &mut line);
        let _ = write!(text, "{line}; ");
    }
    text
}

/// The case with as few instructions as show a mismatch.
pub fn minimise(
    (case, first): (&Case, Mismatch),
    a: &mut dyn Processor,
    b: &mut dyn Processor,
    data: &[u8; super::case::DATA_SIZE],
) -> (Case, Mismatch) {
    let mut best = case.clone();
    let mut shown = attempt(&best, a, b, data)
        .unwrap_or_else(|| Mismatch { kind: format!("does not happen again: {}", first.kind), ..first });
    // From the end: what comes behind the difference goes at once.
    let insns = decode(&best);
    let straight = insns.iter().all(|i| i.flow_control() == FlowControl::Next);
    for insn in insns.iter().filter(|_| straight) {
        let mut shorter = best.clone();
        shorter.code.truncate(insn.next_ip() as usize - CODE as usize - case.at);
        if let Some(mismatch) = attempt(&shorter, a, b, data) {
            (best, shown) = (shorter, mismatch);
            break;
        }
    }
    for insn in insns.iter().rev() {
        let from = insn.ip() as usize - CODE as usize - case.at;
        if from + insn.len() > best.code.len() || insn.code() == Code::Nopd {
            continue;
        }
        let mut shorter = best.clone();
        shorter.code[from..from + insn.len()].fill(0x90);
        if let Some(mismatch) = attempt(&shorter, a, b, data) {
            (best, shown) = (shorter, mismatch);
        }
    }
    let mut shorter = best.clone();
    let nops =
        shorter.code.iter().take_while(|b| **b == 0x90).count().min(shorter.code.len().saturating_sub(1));
    shorter.code.drain(..nops);
    shorter.at += nops;
    if let Some(mismatch) = attempt(&shorter, a, b, data) {
        (best, shown) = (shorter, mismatch);
    }
    (best, shown)
}

fn attempt(
    case: &Case,
    a: &mut dyn Processor,
    b: &mut dyn Processor,
    data: &[u8; super::case::DATA_SIZE],
) -> Option<Mismatch> {
    let mut undefined = Undefined::default();
    for insn in decode(case) {
        if insn.rflags_read() & undefined.flags != 0 {
            return None;
        }
        undefined.pass(&insn);
    }
    let bytes = case.bytes();
    a.place(case.at, &bytes);
    b.place(case.at, &bytes);
    compare(case, a, b, data).1
}
