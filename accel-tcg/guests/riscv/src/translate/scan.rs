//! Which instructions make a region.

use holdfast_tcg_runtime::{CodeReader, Fault, TranslateRequest};

use crate::decode::{Insn, decode16, decode32, is_compressed};

/// More instructions than this are not worth translating before it is known that they run.
const MAX_INSNS: u32 = 96;

/// A region goes on behind an unconditional jump if an earlier branch goes there, over a gap of at most
/// this many bytes (padding).
const MAX_GAP: u64 = 8;

const PAGE: u64 = 0xfff;

/// An instruction of the region.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Line {
    pub pc: u64,
    pub insn: Option<Insn>,
    pub raw: u32,
    pub len: u8,
    /// Some branch of the region goes here.
    pub target: bool,
    /// A basic block ends with it.
    pub ends: bool,
}

/// The instructions of a region, by rising pc.
#[derive(Debug)]
pub(crate) struct Scan {
    pub lines: Vec<Line>,
    /// Behind the last byte.
    pub end: u64,
    /// What follows is an instruction across two pages: it has to be looked up.
    pub end_indirect: bool,
}

impl Scan {
    /// The instruction that starts at `pc`.
    pub fn index_of(&self, pc: u64) -> Option<usize> {
        self.lines.binary_search_by_key(&pc, |l| l.pc).ok()
    }

    /// How many basic blocks there are.
    pub fn blocks(&self) -> u32 {
        let follows = self.lines.iter().skip(1).zip(&self.lines);
        1 + follows.filter(|(line, before)| line.target || before.ends).count() as u32
    }
}

/// How an instruction passes control on.
enum Flow {
    /// To the next.
    Next,
    /// To the next or to a constant.
    Branch(u64),
    /// To a constant only.
    Jump(u64),
    /// Elsewhere.
    Away,
    /// To the next, but the region ends.
    Stop,
}

fn flow(line: &Line) -> Flow {
    let to = |imm: i32| line.pc.wrapping_add_signed(i64::from(imm));
    let Some(insn) = line.insn else { return Flow::Away };
    match insn {
        Insn::Beq(b) | Insn::Bne(b) | Insn::Blt(b) | Insn::Bge(b) | Insn::Bltu(b) | Insn::Bgeu(b) => {
            Flow::Branch(to(b.imm))
        }
        Insn::Jal(j) if j.rd == 0 => Flow::Jump(to(j.imm)),
        Insn::Jal(_) | Insn::Jalr(_) | Insn::Ecall(_) | Insn::Ebreak(_) | Insn::Mret(_) | Insn::Sret(_) => {
            Flow::Away
        }
        Insn::FenceI(_) | Insn::SfenceVma(_) | Insn::Wfi(_) => Flow::Stop,
        _ if super::sys::ends_region(insn) => Flow::Stop,
        _ => Flow::Next,
    }
}

/// So many bytes are looked at at once.
const WINDOW: usize = 128;

/// Bytes of the page that the region begins in that have been looked at.
struct Window {
    start: u64,
    len: usize,
    bytes: [u8; WINDOW],
}

impl Window {
    /// The two bytes at `pc` (even).
    fn half(&mut self, code: &mut CodeReader<'_, '_>, pc: u64) -> Result<u16, Fault> {
        let mut at = pc.wrapping_sub(self.start) as usize;
        if at.saturating_add(2) > self.len {
            let len = (WINDOW as u64).min(PAGE + 1 - (pc & PAGE)) as usize;
            code.peek(pc, self.bytes.get_mut(..len).unwrap_or_default())?;
            (self.start, self.len, at) = (pc, len, 0);
        }
        let half = self.bytes.get(at..at.wrapping_add(2)).and_then(|b| b.try_into().ok());
        Ok(u16::from_le_bytes(half.unwrap_or_default()))
    }
}

/// Reads one instruction. `Ok(None)`: it runs into the next page and is not the first.
fn read(
    window: &mut Window,
    code: &mut CodeReader<'_, '_>,
    pc: u64,
    first: bool,
) -> Result<Option<Line>, Fault> {
    let low = window.half(code, pc)?;
    if is_compressed(low) {
        return Ok(Some(Line {
            pc,
            insn: decode16(low),
            raw: u32::from(low),
            len: 2,
            target: false,
            ends: false,
        }));
    }
    let next = pc.wrapping_add(2);
    let high = if next & PAGE != 0 {
        window.half(code, next)?
    } else if first {
        code.u16(next)?
    } else {
        return Ok(None);
    };
    let raw = u32::from(low) | u32::from(high) << 16;
    Ok(Some(Line { pc, insn: decode32(raw), raw, len: 4, target: false, ends: false }))
}

/// Collects the region at `request.pc`, in buffers that may have been used before.
///
/// # Errors
/// The fault of fetching the first instruction.
pub(crate) fn run(
    request: &TranslateRequest,
    code: &mut CodeReader<'_, '_>,
    (mut lines, targets): (Vec<Line>, &mut Vec<u64>),
) -> Result<Scan, Fault> {
    let limit = request.max_insns.clamp(1, MAX_INSNS) as usize;
    lines.clear();
    targets.clear();
    let mut scan = Scan { lines, end: request.pc, end_indirect: false };
    let mut pc = request.pc;
    let mut window = Window { start: pc, len: 0, bytes: [0; WINDOW] };
    loop {
        let first = scan.lines.is_empty();
        if !first && ((pc ^ request.pc) & !PAGE != 0 || code.is_break(pc) || scan.lines.len() >= limit) {
            break;
        }
        let line = match read(&mut window, code, pc, first) {
            Ok(Some(line)) => line,
            Ok(None) => {
                scan.end_indirect = true;
                break;
            }
            Err(fault) if first => return Err(fault),
            Err(_) => break,
        };
        let next = pc.wrapping_add(u64::from(line.len));
        let flow = flow(&line);
        scan.lines.push(Line { ends: !matches!(flow, Flow::Next), ..line });
        scan.end = next;
        if (next.wrapping_sub(1) ^ request.pc) & !PAGE != 0 {
            break; // it ran into the next page: alone
        }
        pc = match flow {
            Flow::Next => next,
            Flow::Branch(to) => {
                targets.push(to);
                next
            }
            Flow::Stop => break,
            ended => {
                if let Flow::Jump(to) = ended {
                    targets.push(to);
                }
                match targets.iter().copied().filter(|t| *t >= next && *t - next <= MAX_GAP).min() {
                    Some(target) => target,
                    None => break,
                }
            }
        };
    }
    // Up to the end of the page: what is in the next one was noted when it was read.
    let last = if scan.end_indirect { request.pc | PAGE } else { scan.end.wrapping_sub(1) };
    code.note(request.pc, (last.wrapping_sub(request.pc)).min(PAGE - (request.pc & PAGE)).wrapping_add(1));
    for target in targets.drain(..) {
        if let Some(line) = scan.index_of(target).and_then(|i| scan.lines.get_mut(i)) {
            line.target = true;
        }
    }
    Ok(scan)
}
