//! Which instructions make a region.

use holdfast_tcg_runtime::{CodeReader, Fault, TranslateRequest};
use iced_x86::{Decoder, DecoderError, Instruction, OpKind};

use super::code_info::{self, CodeFlow, CodeInfo, Operands, Part};
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

/// So many bytes from a region's entry on are looked at at once; few regions are longer.
const WINDOW: u64 = 192;

/// So many bytes are looked at at once elsewhere.
const GLANCE: u64 = 64;

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
    /// The part of the translator to begin with.
    pub part: Part,
    /// The status flags that may be read after it.
    pub live: u8,
    /// The same before it.
    pub live_before: u8,
    /// The same where its direct jump or call out of the region goes.
    pub live_there: u8,
    /// The status flags that it may read.
    read: u8,
    /// The status flags that it sets or leaves undefined, whatever happens.
    changed: u8,
    /// How it passes control on.
    flow: Flow,
}

/// The instructions of a region, by rising pc.
#[derive(Debug)]
pub(crate) struct Scan {
    pub lines: Vec<Line>,
    /// Behind the last byte.
    pub end: u64,
    /// What follows has to be looked up: an instruction across two pages, or under a mode that is not known.
    pub end_indirect: bool,
    /// The status flags that may be read behind the end.
    pub live_end: u8,
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

/// How `insn` passes control on.
fn flow(insn: &Instruction, info: &CodeInfo, key: Key) -> Flow {
    match info.flow {
        CodeFlow::Next if info.ends || info.ends_by_register && control::sets_system_register(insn) => {
            Flow::Stop
        }
        CodeFlow::Next => Flow::Next,
        CodeFlow::Conditional => match control::target(insn, key) {
            Some(to) => Flow::Branch(to),
            None => Flow::Fork,
        },
        CodeFlow::Unconditional => match control::target(insn, key) {
            Some(to) => Flow::Jump(to),
            None => Flow::Away,
        },
        CodeFlow::Away => Flow::Away,
    }
}

/// All status flags.
const ALL: u8 = STATUS as u8;

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

/// Bytes of code that have been looked at, and how many of them say what the region is.
struct Window {
    start: u64,
    buffer: Vec<u8>,
    used: usize,
}

impl Window {
    /// Nothing yet, from `start` on.
    fn new(start: u64, mut buffer: Vec<u8>) -> Self {
        buffer.clear();
        Self { start, buffer, used: 0 }
    }

    /// Behind its last byte.
    fn end(&self) -> u64 {
        self.start.wrapping_add(self.buffer.len() as u64)
    }

    /// Looks at `len` more bytes, but not beyond the end of the page.
    fn more(&mut self, len: u64, code: &mut CodeReader<'_, '_>) -> Result<(), Fault> {
        let (had, at) = (self.buffer.len(), self.end());
        // Of another page no more than an instruction: all that is read there is noted.
        let len =
            if (at ^ self.start) & !PAGE == 0 { len.min(PAGE + 1 - (at & PAGE)) } else { MAX_LEN as u64 };
        self.buffer.resize(had + len as usize, 0);
        let read = code.peek(at, self.buffer.get_mut(had..).unwrap_or_default());
        if read.is_err() {
            self.buffer.truncate(had);
        }
        read
    }

    /// Makes what was used of it part of the region.
    fn note(&self, code: &mut CodeReader<'_, '_>) {
        let first_page = PAGE + 1 - (self.start & PAGE);
        if self.used > 0 {
            code.note(self.start, (self.used as u64).min(first_page));
        }
        if self.used as u64 > first_page {
            code.note(self.start.wrapping_add(first_page), self.used as u64 - first_page);
        }
    }

    /// Notes that the bytes before `position` were used.
    fn uses(&mut self, position: usize) {
        self.used = self.used.max(position);
    }
}

/// Why no more instructions were decoded.
enum End {
    /// They were not wanted.
    Stopped,
    /// The next one runs into the next page and is not the first.
    Page,
    /// There are no more bytes in the window.
    Bytes,
}

/// A decoder of the code under `key`.
fn decoder(key: Key, bytes: &[u8], start: u64) -> Decoder<'_> {
    let bits = match key.code_size() {
        CodeSize::Bits16 => 16,
        CodeSize::Bits32 => 32,
        CodeSize::Bits64 => 64,
    };
    Decoder::with_ip(bits, bytes, start, key.decoder_options())
}

/// Makes the decoder of a window that begins at `start` go on at `pc`. False if that is not in the window.
fn seek(decoder: &mut Decoder<'_>, start: u64, pc: u64) -> bool {
    if decoder.ip() != pc {
        let at = pc.wrapping_sub(start);
        if at > decoder.max_position() as u64 || decoder.set_position(at as usize).is_err() {
            return false;
        }
        decoder.set_ip(pc);
    }
    decoder.can_decode()
}

impl Line {
    /// The line of `insn` at `pc`, for which the decoder read `used` bytes.
    fn new(pc: u64, insn: &Instruction, used: usize, key: Key, table: &[CodeInfo]) -> Option<Self> {
        let info = table.get(insn.code() as usize)?;
        let (read, changed) = info.flags(insn);
        Some(Self {
            pc,
            insn: *insn,
            len: used.clamp(1, MAX_LEN) as u8,
            // A valid instruction of 15 bytes decodes; what has read all 15 and does not is too long.
            too_long: used >= MAX_LEN && insn.is_invalid(),
            target: false,
            faults: can_fault(insn, info, key),
            part: info.part,
            live: 0,
            live_before: 0,
            live_there: ALL,
            flow: flow(insn, info, key),
            read: read as u8,
            changed: changed as u8,
        })
    }
}

/// A region being collected.
struct Collector<'a> {
    scan: Scan,
    targets: &'a mut Vec<u64>,
    entry: u64,
    key: Key,
    limit: usize,
    /// Where to go on.
    pc: u64,
}

impl Collector<'_> {
    /// Decodes instructions of the window on and on.
    fn lines(&mut self, window: (u64, u64), decoder: &mut Decoder<'_>, code: &CodeReader<'_, '_>) -> End {
        let (start, end) = window;
        let table = code_info::table();
        let mut insn = Instruction::default();
        loop {
            let pc = self.pc;
            if !seek(decoder, start, pc) {
                return End::Bytes;
            }
            let from = decoder.position();
            decoder.decode_out(&mut insn);
            if decoder.last_error() == DecoderError::NoMoreBytes {
                return if pc != self.entry && end & PAGE == 0 { End::Page } else { End::Bytes };
            }
            let Some(line) = Line::new(pc, &insn, decoder.position() - from, self.key, table) else {
                return End::Stopped;
            };
            let (flow, next) = (line.flow, pc.wrapping_add(u64::from(line.len)));
            self.scan.lines.push(line);
            self.scan.end = next;
            if (next.wrapping_sub(1) ^ self.entry) & !PAGE != 0 || insn.is_invalid() {
                return End::Stopped; // it ran into the next page: alone
            }
            let wanted = follow(flow, next, self.targets)
                .filter(|pc| (pc ^ self.entry) & !PAGE == 0 && self.scan.lines.len() < self.limit);
            match wanted {
                Some(pc) if !code.is_break(pc) => self.pc = pc,
                _ => return End::Stopped,
            }
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
    let scan = Scan { lines, end: request.pc, end_indirect: false, live_end: ALL };
    let mut window = Window::new(request.pc, std::mem::take(&mut buffers.bytes));
    let mut other = Window::new(0, std::mem::take(&mut buffers.other));
    let targets = &mut buffers.targets;
    targets.clear();
    let mut collector = Collector { scan, targets, entry: request.pc, key, limit, pc: request.pc };
    let done = loop {
        if let Err(fault) = window.more(WINDOW, code) {
            break Err(fault);
        }
        let bounds = (window.start, window.end());
        let mut decoder = decoder(key, &window.buffer, window.start);
        let end = collector.lines(bounds, &mut decoder, code);
        if matches!(end, End::Bytes) {
            continue;
        }
        let used = if matches!(end, End::Page) { window.buffer.len() } else { decoder.position() };
        // What changes the mode does not know under which the next is run.
        let stops = collector.scan.lines.last().is_some_and(|l| l.flow == Flow::Stop);
        collector.scan.end_indirect = stops || matches!(end, End::Page);
        let used = used.max(collector.look_ahead(&mut decoder, &mut other, code));
        window.uses(used);
        break Ok(());
    };
    let mut scan = collector.scan;
    window.note(code);
    (buffers.bytes, buffers.other) = (window.buffer, other.buffer);
    match done {
        Err(fault) if scan.lines.is_empty() => {
            buffers.lines = scan.lines;
            Err(fault)
        }
        _ => {
            liveness(&mut scan);
            Ok(scan)
        }
    }
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

impl Collector<'_> {
    /// Notes which instructions are jumped to, and finds out for direct jumps and calls out of the region, to the same page, which
    /// status flags are live there. What is read becomes part of the region, so a change of it is noticed. `decoder` is that of
    /// the region, `other` for what is elsewhere. How many bytes of the region's window were used.
    fn look_ahead(
        &mut self,
        decoder: &mut Decoder<'_>,
        other: &mut Window,
        code: &mut CodeReader<'_, '_>,
    ) -> usize {
        for target in self.targets.drain(..) {
            if let Some(line) = self.scan.index_of(target).and_then(|i| self.scan.lines.get_mut(i)) {
                line.target = true;
            }
        }
        if self.scan.lines.len() < 2 {
            return 0;
        }
        let mut used = 0;
        for i in 0..self.scan.lines.len() {
            let Some(line) = self.scan.lines.get(i) else { continue };
            let to = match line.flow {
                Flow::Next | Flow::Stop => continue,
                Flow::Branch(to) | Flow::Jump(to) => Some(to),
                // A call.
                Flow::Fork | Flow::Away => control::target(&line.insn, self.key),
            };
            let to = match to {
                Some(to) if (to ^ line.pc) & !PAGE == 0 && self.scan.index_of(to).is_none() => to,
                _ => continue,
            };
            let live = self.live_at(to, (decoder, &mut used), other, code);
            if let Some(line) = self.scan.lines.get_mut(i) {
                line.live_there = live;
            }
        }
        let goes_on = self.scan.lines.last().is_some_and(|l| !matches!(l.flow, Flow::Jump(_) | Flow::Away));
        let end = self.scan.end;
        if goes_on && (end ^ self.entry) & !PAGE == 0 {
            self.scan.live_end = self.live_at(end, (decoder, &mut used), other, code);
        }
        used
    }

    /// The status flags that the code at `pc` may read before it sets them.
    fn live_at(
        &self,
        pc: u64,
        (own, used): (&mut Decoder<'_>, &mut usize),
        other: &mut Window,
        code: &mut CodeReader<'_, '_>,
    ) -> u8 {
        if pc >= self.entry && seek(own, self.entry, pc) {
            let live = glance(own, pc, self.key);
            *used = (*used).max(own.position());
            return live;
        }
        // A region that needs two pages is never jumped to directly, so the next one is not read.
        other.buffer.clear();
        (other.start, other.used) = (pc, 0);
        if other.more(GLANCE, code).is_err() {
            return ALL;
        }
        let mut decoder = decoder(self.key, &other.buffer, pc);
        let live = glance(&mut decoder, pc, self.key);
        other.used = decoder.position();
        other.note(code);
        live
    }
}

/// The same, of a decoder that is there.
fn glance(decoder: &mut Decoder<'_>, entry: u64, key: Key) -> u8 {
    let table = code_info::table();
    let mut insn = Instruction::default();
    let (mut read, mut changed) = (0, 0);
    for _ in 0..AHEAD {
        if !decoder.can_decode() {
            break;
        }
        decoder.decode_out(&mut insn);
        let Some(info) = table.get(insn.code() as usize).filter(|_| !insn.is_invalid()) else { break };
        let (reads, changes) = info.flags(&insn);
        read |= reads & !changed;
        if flow(&insn, info, key) != Flow::Next || (decoder.ip() ^ entry) & !PAGE != 0 {
            break;
        }
        changed |= changes;
        if changed == STATUS {
            break;
        }
    }
    ((read | !changed) & STATUS) as u8
}

/// Which status flags may be read before and after each instruction: backward passes until nothing changes. Ways out
/// of the region read all.
///
/// An instruction that faults reads none by that. So what a handler finds in RFLAGS is exact but for flags that the
/// program sets anew, whatever happens, before it reads them; nothing but a look at the saved RFLAGS can tell.
fn liveness(scan: &mut Scan) {
    if let [line] = scan.lines.as_mut_slice() {
        // It may be one that must not jump to itself.
        (line.live, line.live_before) = (ALL, ALL);
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
                Flow::Stop | Flow::Fork => ALL,
            };
            live = (out & !line.changed | line.read) & ALL;
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
fn can_fault(insn: &Instruction, info: &CodeInfo, key: Key) -> bool {
    if info.harmless {
        return false;
    }
    // Near branches, where their targets are checked.
    if info.flow != CodeFlow::Next
        && (key.contains(Key::CS_LIMIT)
            || insn.op0_kind() == OpKind::NearBranch64 && control::target(insn, key).is_none())
    {
        return true;
    }
    match info.operands {
        Operands::Plain => return !info.plain,
        Operands::FirstMayBeMemory => return !info.plain || insn.op0_kind() == OpKind::Memory,
        Operands::SecondMayBeMemory => return !info.plain || insn.op1_kind() == OpKind::Memory,
        Operands::Others => {}
    }
    let mut vector = false;
    for n in 0..insn.op_count() {
        match insn.op_kind(n) {
            OpKind::Register => {
                let r = insn.op_register(n);
                if !r.is_gpr() {
                    if !r.is_vector_register() || r.is_zmm() || !(vector || quiet_vector(insn, key)) {
                        return true;
                    }
                    vector = true;
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
    !vector && !info.plain
}
