//! Which instructions make a region.

use holdfast_tcg_runtime::{CodeReader, Fault, TranslateRequest};
use iced_x86::{Decoder, DecoderError, FlowControl, Instruction, Mnemonic, OpKind, Register};

use super::{STATUS, control};
use crate::key::{CodeSize, Key};

/// More instructions than this are not worth translating before it is known that they run.
const MAX_INSNS: u32 = 96;

/// A region goes on behind an unconditional jump if an earlier branch goes there, over a gap of at most
/// this many bytes (padding).
const MAX_GAP: u64 = 16;

/// A region goes on behind a jump forward that skips at most this many bytes.
const MAX_SKIP: u64 = 96;

const PAGE: u64 = 0xfff;

/// Bytes are read in units of this size, aligned: what a region's invalidation distinguishes.
const GRANULE: u64 = 64;

/// The longest instruction.
const MAX_LEN: usize = 15;

/// An instruction of the region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    pub pc: u64,
    pub insn: Instruction,
    pub len: u8,
    /// More than 15 bytes.
    pub too_long: bool,
    /// Some branch of the region goes here.
    pub target: bool,
    /// It may fault or leave in its middle, so that the flags before it can be seen.
    pub faults: bool,
    /// The status flags that may be read after it.
    pub live: u32,
    /// The same before it.
    pub live_before: u32,
    /// The same where its direct jump or call out of the region goes.
    pub live_there: u32,
    /// How it passes control on.
    flow: Flow,
    /// The status flags that it may read.
    read: u32,
    /// The status flags that it sets or leaves undefined, whatever happens.
    changed: u32,
}

/// The instructions of a region, by rising pc.
#[derive(Debug)]
pub(crate) struct Scan {
    pub lines: Vec<Line>,
    /// Behind the last byte.
    pub end: u64,
    /// What follows is an instruction across two pages: it has to be looked up.
    pub end_indirect: bool,
    /// The status flags that may be read behind the end.
    pub live_end: u32,
}

impl Scan {
    /// The instruction that starts at `pc`.
    pub fn index_of(&self, pc: u64) -> Option<usize> {
        self.lines.binary_search_by_key(&pc, |l| l.pc).ok()
    }

    /// How many basic blocks there are.
    pub fn blocks(&self) -> u32 {
        let follows = self.lines.iter().skip(1).zip(&self.lines);
        1 + follows.filter(|(line, before)| line.target || before.flow != Flow::Next).count() as u32
    }
}

/// How an instruction passes control on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flow {
    /// To the next.
    Next,
    /// To the next or to a constant.
    Branch(u64),
    /// To the next or elsewhere.
    Fork,
    /// To a constant only.
    Jump(u64),
    /// Elsewhere.
    Away,
    /// To the next, but the region ends.
    Stop,
}

fn flow(insn: &Instruction, key: Key) -> Flow {
    match insn.flow_control() {
        FlowControl::Next if control::ends_region(insn) => Flow::Stop,
        FlowControl::Next => Flow::Next,
        FlowControl::ConditionalBranch => match control::target(insn, key) {
            Some(to) => Flow::Branch(to),
            None => Flow::Fork,
        },
        FlowControl::UnconditionalBranch => match control::target(insn, key) {
            Some(to) => Flow::Jump(to),
            None => Flow::Away,
        },
        _ => Flow::Away,
    }
}

/// Buffers that are used again from region to region.
#[derive(Debug, Default)]
pub(crate) struct Buffers {
    lines: Vec<Line>,
    bytes: Vec<u8>,
    other: Vec<u8>,
    targets: Vec<u64>,
}

impl Buffers {
    /// Takes back what [`run`] gave.
    pub fn recycle(&mut self, scan: Scan) {
        self.lines = scan.lines;
    }
}

/// Reads bytes of one page (and of the next, for an instruction that runs into it) as they are wanted.
struct Bytes {
    start: u64,
    buffer: Vec<u8>,
    /// The next page is not to be read: a region that needs two pages is never jumped to directly.
    one_page: bool,
}

/// Why no more instructions were decoded.
enum End {
    /// They were not wanted.
    Stopped,
    /// The next one runs into the next page and is not the first.
    Page,
    /// Fetching its bytes faults.
    Fault(Fault),
}

impl Bytes {
    /// Nothing yet, from `start` on.
    fn new(start: u64, mut buffer: Vec<u8>, one_page: bool) -> Self {
        buffer.clear();
        Self { start, buffer, one_page }
    }

    /// Reads up to the end of the granule behind what there is.
    fn more(&mut self, code: &mut CodeReader<'_, '_>) -> Result<(), Fault> {
        let len = self.buffer.len();
        let at = self.start.wrapping_add(len as u64);
        self.buffer.resize(len + (GRANULE - at % GRANULE) as usize, 0);
        let read = code.bytes(at, self.buffer.get_mut(len..).unwrap_or_default());
        if read.is_err() {
            self.buffer.truncate(len);
        }
        read
    }

    /// Whether the byte at `pc` has been read.
    fn has(&self, pc: u64) -> bool {
        pc.wrapping_sub(self.start) < self.buffer.len() as u64
    }

    /// Decodes instructions from `pc` on, and where `each` says after each, until it says `None`.
    fn lines(
        &mut self,
        code: &mut CodeReader<'_, '_>,
        mut pc: u64,
        key: Key,
        mut each: impl FnMut(&mut CodeReader<'_, '_>, &Instruction, Facts) -> Option<u64>,
    ) -> End {
        let bits = match key.code_size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let mut insn = Instruction::default();
        loop {
            while !self.has(pc) {
                if let Err(fault) = self.more(code) {
                    return End::Fault(fault);
                }
            }
            let mut decoder = Decoder::with_ip(bits, &self.buffer, self.start, key.decoder_options());
            // One decoder for all that has been read: making one costs more than decoding an instruction.
            loop {
                let from = pc.wrapping_sub(self.start) as usize;
                if from >= self.buffer.len() {
                    break;
                }
                if decoder.ip() != pc {
                    if decoder.set_position(from).is_err() {
                        break;
                    }
                    decoder.set_ip(pc);
                }
                decoder.decode_out(&mut insn);
                if decoder.last_error() == DecoderError::NoMoreBytes {
                    let end = self.start.wrapping_add(self.buffer.len() as u64);
                    if (from != 0 || self.one_page) && end & PAGE == 0 {
                        return End::Page;
                    }
                    if let Err(fault) = self.more(code) {
                        return End::Fault(fault);
                    }
                    break;
                }
                match each(code, &insn, facts(pc, &insn, decoder.position() - from, key)) {
                    Some(next) => pc = next,
                    None => return End::Stopped,
                }
            }
        }
    }
}

/// What is asked of every instruction, also of those that are only looked at.
struct Facts {
    pc: u64,
    /// Behind it.
    next: u64,
    used: usize,
    flow: Flow,
    /// As in [`Line`].
    read: u32,
    changed: u32,
}

/// Those of an instruction at `pc` for which the decoder read `used` bytes.
fn facts(pc: u64, insn: &Instruction, used: usize, key: Key) -> Facts {
    let flow = flow(insn, key);
    let read = insn.rflags_read() & STATUS;
    let changed = insn.rflags_modified() & STATUS;
    let changed = if changed != 0 && counted(insn) { 0 } else { changed };
    Facts { pc, next: pc.wrapping_add(used.clamp(1, MAX_LEN) as u64), used, flow, read, changed }
}

impl Facts {
    fn line(&self, insn: &Instruction, key: Key) -> Line {
        Line {
            pc: self.pc,
            insn: *insn,
            len: self.used.clamp(1, MAX_LEN) as u8,
            // A valid instruction of 15 bytes decodes; what has read all 15 and does not is too long.
            too_long: self.used >= MAX_LEN && insn.is_invalid(),
            target: false,
            faults: can_fault(insn, key),
            live: 0,
            live_before: 0,
            live_there: STATUS,
            flow: self.flow,
            read: self.read,
            changed: self.changed,
        }
    }
}

/// Collects the region at `request.pc`.
///
/// # Errors
/// The fault of fetching the first instruction.
pub(crate) fn run(
    request: &TranslateRequest,
    key: Key,
    code: &mut CodeReader<'_, '_>,
    buffers: &mut Buffers,
) -> Result<Scan, Fault> {
    let single = key.intersects(Key::SINGLE);
    let limit = if single { 1 } else { request.max_insns.clamp(1, MAX_INSNS) as usize };
    let mut lines = std::mem::take(&mut buffers.lines);
    lines.clear();
    let mut scan = Scan { lines, end: request.pc, end_indirect: false, live_end: STATUS };
    let mut bytes = Bytes::new(request.pc, std::mem::take(&mut buffers.bytes), false);
    let targets = &mut buffers.targets;
    targets.clear();
    let end = bytes.lines(code, request.pc, key, |code, insn, facts| {
        scan.lines.push(facts.line(insn, key));
        scan.end = facts.next;
        if (facts.next.wrapping_sub(1) ^ request.pc) & !PAGE != 0 || insn.is_invalid() {
            return None; // it ran into the next page: alone
        }
        follow(facts.flow, facts.next, targets)
            .filter(|pc| (pc ^ request.pc) & !PAGE == 0 && scan.lines.len() < limit && !code.is_break(*pc))
    });
    match end {
        End::Fault(fault) if scan.lines.is_empty() => return Err(fault),
        End::Page => scan.end_indirect = true,
        End::Stopped | End::Fault(_) => {}
    }
    for target in targets.drain(..) {
        if let Some(line) = scan.index_of(target).and_then(|i| scan.lines.get_mut(i)) {
            line.target = true;
        }
    }
    let mut other = Bytes::new(0, std::mem::take(&mut buffers.other), true);
    look_ahead(&mut scan, key, code, (&mut bytes, &mut other));
    (buffers.bytes, buffers.other) = (bytes.buffer, other.buffer);
    liveness(&mut scan);
    Ok(scan)
}

/// Where the region goes on behind an instruction, if it does: at `next` or a little further on. Notes where it jumps to.
fn follow(flow: Flow, next: u64, targets: &mut Vec<u64>) -> Option<u64> {
    match flow {
        Flow::Next | Flow::Fork => return Some(next),
        Flow::Branch(to) => {
            targets.push(to);
            return Some(next);
        }
        Flow::Stop => return None,
        Flow::Jump(to) => {
            targets.push(to);
            if to > next && to - next <= MAX_SKIP {
                // Into the middle of a loop, or past the other side of a conditional: what is skipped is likely jumped to
                // later in the region. If it is not, it is left out.
                return Some(next);
            }
        }
        Flow::Away => {}
    }
    targets.iter().copied().filter(|t| *t >= next && *t - next <= MAX_GAP).min()
}

/// How many instructions are looked at behind a way out.
const AHEAD: usize = 4;

/// Finds out for direct jumps and calls out of the region, to the same page, which status flags are live there. What is
/// read becomes part of the region, so a change of it is noticed.
fn look_ahead(
    scan: &mut Scan,
    key: Key,
    code: &mut CodeReader<'_, '_>,
    (bytes, other): (&mut Bytes, &mut Bytes),
) {
    if scan.lines.len() < 2 {
        return;
    }
    let mut live_at = |to: u64| {
        // What is read becomes part of the region, so nothing is read up to there.
        if bytes.has(to) {
            return live_at(to, key, code, bytes);
        }
        if !other.has(to) {
            other.buffer.clear();
            other.start = to;
        }
        live_at(to, key, code, other)
    };
    for i in 0..scan.lines.len() {
        let Some(line) = scan.lines.get(i) else { continue };
        let to = match line.flow {
            Flow::Next | Flow::Stop => continue,
            Flow::Branch(to) | Flow::Jump(to) => Some(to),
            // A call.
            Flow::Fork | Flow::Away => control::target(&line.insn, key),
        };
        let to = match to {
            Some(to) if (to ^ line.pc) & !PAGE == 0 && scan.index_of(to).is_none() => to,
            _ => continue,
        };
        let live = live_at(to);
        if let Some(line) = scan.lines.get_mut(i) {
            line.live_there = live;
        }
    }
    let goes_on = scan.lines.last().is_some_and(|l| !matches!(l.flow, Flow::Jump(_) | Flow::Away));
    if goes_on && (scan.end ^ scan.lines.first().map_or(0, |l| l.pc)) & !PAGE == 0 {
        scan.live_end = live_at(scan.end);
    }
}

/// The status flags that the code at `pc` may read before it sets them.
fn live_at(pc: u64, key: Key, code: &mut CodeReader<'_, '_>, bytes: &mut Bytes) -> u32 {
    let (mut read, mut changed, mut left) = (0, 0, AHEAD);
    bytes.lines(code, pc, key, |_, insn, facts| {
        if insn.is_invalid() {
            return None;
        }
        read |= facts.read & !changed;
        if facts.flow != Flow::Next || (facts.next ^ pc) & !PAGE != 0 {
            return None;
        }
        changed |= facts.changed;
        left -= 1;
        (changed != STATUS && left > 0).then_some(facts.next)
    });
    (read | !changed) & STATUS
}

/// Which status flags may be read before and after each instruction: backward passes until nothing changes. Ways out
/// of the region read all.
///
/// An instruction that faults reads none by that. So what a handler finds in RFLAGS is exact but for flags that the
/// program sets anew, whatever happens, before it reads them; nothing but a look at the saved RFLAGS can tell.
fn liveness(scan: &mut Scan) {
    if let [line] = scan.lines.as_mut_slice() {
        // It may be one that must not jump to itself.
        (line.live, line.live_before) = (STATUS, STATUS);
        return;
    }
    loop {
        let (mut backward, mut grew) = (false, false);
        let mut live = scan.live_end;
        for i in (0..scan.lines.len()).rev() {
            let Some(line) = scan.lines.get(i) else { continue };
            let there = |to| scan.index_of(to).and_then(|at| Some((at, scan.lines.get(at)?.live_before)));
            let out = match line.flow {
                Flow::Next => live,
                Flow::Branch(to) | Flow::Jump(to) => {
                    let next = if matches!(line.flow, Flow::Jump(_)) { 0 } else { live };
                    match there(to) {
                        Some((at, before)) => {
                            backward |= at <= i;
                            next | before
                        }
                        None => next | line.live_there,
                    }
                }
                Flow::Away => line.live_there,
                Flow::Stop | Flow::Fork => STATUS,
            };
            live = (out & !line.changed | line.read) & STATUS;
            if let Some(line) = scan.lines.get_mut(i) {
                grew |= line.live_before != live;
                (line.live, line.live_before) = (out, live);
            }
        }
        if !(backward && grew) {
            return;
        }
    }
}

/// Shifts and rotations by CL, and repeated comparisons: a count of 0 leaves the flags.
fn counted(insn: &Instruction) -> bool {
    if insn.is_string_instruction() {
        return insn.has_rep_prefix() || insn.has_repne_prefix();
    }
    (1..insn.op_count()).any(|n| insn.op_kind(n) == OpKind::Register && insn.op_register(n) == Register::CL)
}

/// Whether a vector instruction cannot fault in the mode unless it accesses memory.
fn quiet_vector(insn: &Instruction, key: Key) -> bool {
    let on = if insn.code().encoding() == iced_x86::EncodingKind::VEX {
        key.contains(Key::AVX | Key::PROTECTED)
    } else {
        key.contains(Key::OSFXSR)
    };
    on && !key.intersects(Key::TS | Key::EM | Key::SIMD_TRAPS) && super::vec::available(insn.code())
}

/// Whether the instruction may fault or leave translated code other than at its end.
fn can_fault(insn: &Instruction, key: Key) -> bool {
    if matches!(insn.mnemonic(), Mnemonic::Lea | Mnemonic::Nop) {
        return false;
    }
    // Near branches, where their targets are checked.
    if insn.flow_control() != FlowControl::Next
        && (key.contains(Key::CS_LIMIT)
            || insn.op0_kind() == OpKind::NearBranch64 && control::target(insn, key).is_none())
    {
        return true;
    }
    let mut vector = false;
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::Register => {
                let r = insn.op_register(n);
                let quiet = r.is_vector_register() && !r.is_zmm() && quiet_vector(insn, key);
                vector |= quiet;
                if !r.is_gpr() && !quiet {
                    return true;
                }
            }
            OpKind::NearBranch16 | OpKind::NearBranch32 | OpKind::NearBranch64 => {}
            OpKind::Immediate8
            | OpKind::Immediate8_2nd
            | OpKind::Immediate16
            | OpKind::Immediate32
            | OpKind::Immediate64
            | OpKind::Immediate8to16
            | OpKind::Immediate8to32
            | OpKind::Immediate8to64
            | OpKind::Immediate32to64 => {}
            _ => return true,
        }
    }
    let conditional = insn.condition_code() != iced_x86::ConditionCode::None; // Jcc, SETcc, CMOVcc
    !vector && !conditional && !is_plain(insn.mnemonic())
}

/// Instructions that fault by memory operands only.
fn is_plain(mnemonic: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(
        mnemonic,
        Mov | Add
            | Adc
            | And
            | Cmp
            | Dec
            | Inc
            | Neg
            | Not
            | Or
            | Sbb
            | Sub
            | Test
            | Xor
            | Shl
            | Shr
            | Sar
            | Rol
            | Ror
            | Shld
            | Shrd
            | Imul
            | Mul
            | Movzx
            | Movsx
            | Movsxd
            | Cbw
            | Cwde
            | Cdqe
            | Cwd
            | Cdq
            | Cqo
            | Bt
            | Bts
            | Btr
            | Btc
            | Bsf
            | Bsr
            | Tzcnt
            | Lzcnt
            | Popcnt
            | Bswap
            | Xchg
            | Xadd
            | Cmpxchg
            | Clc
            | Stc
            | Cmc
            | Cld
            | Std
            | Lahf
            | Sahf
            | Jmp
            | Andn
            | Bextr
            | Blsi
            | Blsmsk
            | Blsr
            | Bzhi
            | Mulx
            | Pdep
            | Pext
            | Rorx
            | Sarx
            | Shlx
            | Shrx
            | Endbr64
            | Endbr32
    )
}
