//! From instructions to IR.
//!
//! A region is one run of instructions from the entry on, past conditional branches, and past unconditional
//! jumps as long as an earlier branch goes to what follows. Branches to instructions of the run become jumps
//! within the region, so loops and small conditionals stay in it; all others leave it.
//!
//! Each part takes its instructions and leaves the others to the next; what no part takes raises #UD.

mod alu;
mod atomic;
mod bits;
mod cc;
mod code_info;
mod control;
mod mmx;
mod moves;
mod mpx;
mod muldiv;
mod operand;
mod opmask;
mod scan;
mod shift;
mod stack;
mod string;
mod sys;
mod vec;
mod x87;

use std::cell::RefCell;

use holdfast_tcg_ir::{Builder, Cond, HelperId, JumpHint, Label, Slot, Val, env::exit};
use holdfast_tcg_runtime::{CodeReader, Fault, TranslateRequest, Translated};
use iced_x86::Instruction;

use crate::flags::rflags;
use crate::helpers::Ids;
use crate::key::{CodeSize, Key};
use crate::state::{seg, slot};
use crate::system::regs::vector;
use cc::Cc;
use code_info::Part;
pub(crate) use operand::{Addr, Size};
use scan::{Line, Scan};

/// Slots that stay in host registers, by heat in compiled code.
pub(crate) const PINS: &[Slot] = &[
    slot::gpr(0),
    slot::gpr(4),
    slot::gpr(2),
    slot::gpr(1),
    slot::gpr(7),
    slot::gpr(6),
    slot::gpr(3),
    slot::gpr(5),
];

/// What is used again from region to region.
#[derive(Default)]
struct Buffers {
    scan: scan::Buffers,
    labels: Vec<Option<Label>>,
    leaving: Vec<(Label, u64)>,
    traps: Vec<Trap>,
}

thread_local! {
    static BUFFERS: RefCell<Buffers> = RefCell::default();
}

/// An exception that translated code found by a comparison: raised out of line.
struct Trap {
    label: Label,
    pc: u64,
    vector: u8,
    code: Option<u32>,
}

/// The state of translating one region.
pub(crate) struct Translator<'a> {
    pub(super) b: &'a mut Builder,
    pub(super) ids: &'a Ids,
    pub(super) key: Key,
    pub(super) size: CodeSize,
    /// Every way out of the region is an exit, not a jump.
    no_chain: bool,
    /// The instruction at hand, linear.
    pub(super) pc: u64,
    /// Behind it.
    pub(super) next: u64,
    /// The status flags.
    cc: Cc,
    /// The status flags that someone may read after the instruction at hand ([`iced_x86::RflagsBits`]).
    live: u32,
    /// Those that may be read where its direct jump or call out of the region goes.
    live_there: u32,
    scan: &'a Scan,
    /// Labels of instructions that are jumped to, by index.
    labels: Vec<Option<Label>>,
    /// Branches that leave: label and target.
    leaving: Vec<(Label, u64)>,
    traps: Vec<Trap>,
    /// Stores of 32 bytes that cross pages.
    crossing: Vec<vec::Crossing>,
}

/// Translates one region.
///
/// # Errors
/// The fault of fetching the first instruction.
pub(crate) fn region(
    request: &TranslateRequest,
    code: &mut CodeReader<'_, '_>,
    builder: &mut Builder,
    ids: &Ids,
) -> Result<Translated, Fault> {
    BUFFERS.with_borrow_mut(|buffers| region_with(buffers, request, code, (builder, ids)))
}

/// The same with these buffers.
fn region_with(
    buffers: &mut Buffers,
    request: &TranslateRequest,
    code: &mut CodeReader<'_, '_>,
    (builder, ids): (&mut Builder, &Ids),
) -> Result<Translated, Fault> {
    let key = Key::from_bits_truncate(request.key);
    let scan = scan::run(request, key, code, &mut buffers.scan)?;
    let mut t = Translator {
        b: builder,
        ids,
        key,
        size: key.code_size(),
        no_chain: request.no_chain || key.intersects(Key::SINGLE),
        pc: request.pc,
        next: request.pc,
        cc: Cc::default(),
        live: 0,
        live_there: STATUS,
        labels: std::mem::take(&mut buffers.labels),
        leaving: std::mem::take(&mut buffers.leaving),
        traps: std::mem::take(&mut buffers.traps),
        crossing: Vec::new(),
        scan: &scan,
    };
    t.run();
    (buffers.labels, buffers.leaving, buffers.traps) = (t.labels, t.leaving, t.traps);
    let made = Translated { insns: scan.lines.len() as u32, blocks: scan.blocks(), end: scan.end };
    buffers.scan.recycle(scan);
    Ok(made)
}

impl Translator<'_> {
    fn run(&mut self) {
        let scan = self.scan;
        self.labels.clear();
        let label = |l: &Line| (l.target && !self.no_chain).then(|| self.b.label_at(l.pc));
        self.labels.extend(scan.lines.iter().map(label));
        for (i, line) in scan.lines.iter().enumerate() {
            if let Some(label) = self.labels.get(i).copied().flatten() {
                if !self.b.terminated() && line.live_before != 0 {
                    self.sync();
                }
                self.b.bind(label);
                self.cc = Cc::default();
            } else if i > 0 && self.b.terminated() {
                continue; // behind an instruction that turned out to raise an exception
            }
            self.line(line);
        }
        if !self.b.terminated() {
            let end = self.next;
            if scan.live_end == 0 {
                self.cc = Cc::default();
            }
            if scan.end_indirect { self.goto_lookup(end) } else { self.goto(end) }
        }
        let mut leaving = std::mem::take(&mut self.leaving);
        for (label, target) in leaving.drain(..) {
            self.b.bind(label);
            self.cc = Cc::default();
            self.goto(target);
        }
        self.leaving = leaving;
        let mut traps = std::mem::take(&mut self.traps);
        for trap in traps.drain(..) {
            self.b.bind(trap.label);
            self.cc = Cc::default();
            self.pc = trap.pc;
            self.raise_now(trap.vector, trap.code);
        }
        self.traps = traps;
        for store in std::mem::take(&mut self.crossing) {
            self.b.bind(store.label);
            self.cc = Cc::default();
            self.cross(&store);
        }
    }

    fn line(&mut self, line: &Line) {
        self.pc = line.pc;
        self.next = line.pc.wrapping_add(u64::from(line.len));
        (self.live, self.live_there) = (line.live.into(), line.live_there.into());
        self.b.insn(line.pc, u32::from(line.len));
        if self.key.intersects(Key::SINGLE) {
            self.b.call(self.ids.sys.begin, &[]);
        }
        if self.key.contains(Key::CS_LIMIT) {
            self.check_limit(line);
        }
        if line.faults {
            self.sync();
        }
        if line.too_long {
            return self.raise_now(vector::GP, Some(0));
        }
        if line.insn.is_invalid() || !self.insn(&line.insn, line.part) {
            self.sync();
            self.raise_now(vector::UD, None);
        }
    }

    /// Where CS has a limit, the region has to lie below it; if it does not, its instructions are run one by one, and the first
    /// that is not inside faults.
    fn check_limit(&mut self, line: &Line) {
        let first = self.scan.lines.first().is_some_and(|l| l.pc == line.pc);
        if !first && !self.no_chain {
            return;
        }
        let end = if self.no_chain { self.next } else { self.scan.end };
        let last = self.ip_of(end.wrapping_sub(1));
        let limit = self.b.get(slot::seg_limit(seg::CS));
        if self.no_chain {
            self.sync();
            self.raise_if((Cond::GtU, last, limit), vector::GP, Some(0));
        } else {
            let inside = self.b.label();
            self.sync();
            self.b.brcond(Cond::LeU, last, limit, inside);
            self.b.call(self.ids.sys.alone, &[]);
            self.b.exit(exit::POLL, self.pc); // not reached: the helper leaves
            self.b.bind(inside);
            self.cc = Cc::default();
        }
    }

    /// Offers the instruction to the parts from `first` on. False if none has it.
    fn insn(&mut self, insn: &Instruction, first: Part) -> bool {
        first <= Part::Moves && self.moves(insn)
            || first <= Part::Alu && self.alu(insn)
            || first <= Part::Control && self.control(insn)
            || first <= Part::Stack && self.stack(insn)
            || self.shift(insn)
            || self.muldiv(insn)
            || self.bits(insn)
            || self.atomic(insn)
            || self.string(insn)
            || self.system(insn)
            || self.vec(insn)
            || self.vec_misc(insn)
            || self.x87(insn)
            || self.mmx(insn)
            || self.mpx(insn)
            || self.evex(insn)
            || self.opmask(insn)
    }

    // ---- leaving ----

    /// Goes on at the linear address `target` in the same mode.
    pub(super) fn goto(&mut self, target: u64) {
        self.sync();
        if self.no_chain { self.b.exit(exit::RESUME, target) } else { self.b.goto_pc(target) }
    }

    /// Goes on at `target`, looked up under the mode that holds then.
    pub(super) fn goto_lookup(&mut self, target: u64) {
        let v = self.b.iconst(target as i64);
        self.goto_val(v, JumpHint::Jump);
    }

    /// Goes on at the linear address in `target`, looked up under the mode that holds then.
    pub(super) fn goto_val(&mut self, target: Val, hint: JumpHint) {
        self.sync();
        if self.no_chain { self.b.exit_reg(exit::RESUME, target) } else { self.b.goto_reg(target, hint) }
    }

    /// Raises an exception of the instruction at hand; the block ends.
    pub(super) fn raise_now(&mut self, vector: u8, code: Option<u32>) {
        let args = [
            self.b.iconst(i64::from(vector)),
            self.b.iconst(code.map_or(-1, i64::from)),
            self.b.iconst(self.pc as i64),
        ];
        self.b.call(self.ids.int.raise, &args);
        self.b.exit(exit::RESUME, self.pc); // not reached: the helper leaves
    }

    /// Raises an exception of the instruction at hand, with the flags before it; the block ends.
    pub(super) fn raise(&mut self, vector: u8, code: Option<u32>) {
        self.sync();
        self.raise_now(vector, code);
    }

    /// Raises an exception if `a cc b`. The flags have to be recorded ([`Translator::sync`]), as they are in
    /// instructions that may fault.
    pub(super) fn raise_if(&mut self, (cc, a, b): (Cond, Val, Val), vector: u8, code: Option<u32>) {
        let (cc, a, b) = match self.b.known_cond(cc, a, b) {
            Some(false) => return,
            // A comparison that does not fold: the rest of the instruction is translated for nothing.
            Some(true) => {
                let flags = self.b.get(slot::FLAGS);
                (Cond::Ne, flags, self.b.iconst(0))
            }
            None => (cc, a, b),
        };
        let label = self.b.label();
        self.b.brcond(cc, a, b, label);
        self.traps.push(Trap { label, pc: self.pc, vector, code });
    }

    /// The label of the instruction at `pc`, if it is one of the region's that may be jumped to.
    fn label_of(&self, pc: u64) -> Option<Label> {
        let at = self.scan.index_of(pc)?;
        self.labels.get(at).copied().flatten()
    }

    /// The status flags that are live before the instruction at `pc` of the region.
    fn live_at(&self, pc: u64) -> u32 {
        let line = self.scan.index_of(pc).and_then(|at| self.scan.lines.get(at));
        line.map_or(STATUS, |l| l.live_before.into())
    }

    /// Goes on at linear `target` if `a cc b`.
    pub(super) fn branch(&mut self, (cc, a, b): (Cond, Val, Val), target: u64) {
        match self.b.known_cond(cc, a, b) {
            Some(true) => return self.jump(target),
            Some(false) => return,
            None => {}
        }
        match self.label_of(target) {
            Some(label) => {
                if self.live_at(target) != 0 {
                    self.sync();
                }
                self.b.brcond(cc, a, b, label);
            }
            None => {
                if self.live_there != 0 {
                    self.sync();
                }
                let label = self.b.label();
                self.b.brcond(cc, a, b, label);
                self.leaving.push((label, target));
            }
        }
    }

    /// Goes on at linear `target`, within the region if it is there.
    pub(super) fn jump(&mut self, target: u64) {
        match self.label_of(target) {
            Some(label) => {
                if self.live_at(target) != 0 {
                    self.sync();
                }
                self.b.br(label);
            }
            None => self.goto_there(target),
        }
    }

    /// Leaves by the direct jump or call at hand to `target`, for which it is known which flags are live there.
    pub(super) fn goto_there(&mut self, target: u64) {
        if self.live_there == 0 {
            self.cc = Cc::default();
        }
        self.goto(target);
    }

    // ---- the instruction pointer ----

    /// Whether linear addresses of code are RIP or EIP themselves.
    pub(super) fn flat_code(&self) -> bool {
        self.size == CodeSize::Bits64 || self.key.contains(Key::CS_FLAT)
    }

    /// RIP or EIP (`I64`) of the linear address `pc`.
    pub(super) fn ip_of(&mut self, pc: u64) -> Val {
        if self.flat_code() {
            return self.b.iconst(pc as i64);
        }
        let base = self.b.get(slot::seg_base(seg::CS));
        let pc = self.b.iconst(pc as i64);
        let ip = self.b.sub(pc, base);
        self.wrap32(ip)
    }

    /// The linear address of the RIP or EIP in `ip` (`I64`, upper half zero outside 64-bit mode).
    pub(super) fn pc_of(&mut self, ip: Val) -> Val {
        if self.flat_code() {
            return ip;
        }
        let base = self.b.get(slot::seg_base(seg::CS));
        let pc = self.b.add(ip, base);
        self.wrap32(pc)
    }

    /// The low 32 bits of an `I64`.
    pub(super) fn wrap32(&mut self, v: Val) -> Val {
        let low = self.b.trunc(v);
        self.b.zext(low)
    }

    /// Calls a helper that reads and writes registers and flags.
    pub(super) fn call_system(&mut self, id: HelperId, args: &[Val]) -> Val {
        self.sync();
        let v = self.b.call(id, args);
        for slot in
            [slot::CC_OP, slot::CC_SRC, slot::CC_DST, slot::CC_AUX, slot::CC_INC, slot::CC_ROT, slot::FLAGS]
        {
            self.b.forget(slot);
        }
        self.cc = Cc::default();
        v
    }
}

/// Bits of [`iced_x86::RflagsBits`] that are status flags.
pub(crate) const STATUS: u32 = 0x3f;
/// The carry among them.
pub(crate) const LIVE_CF: u32 = iced_x86::RflagsBits::CF;

const _: () = assert!(rflags::CF == 1);
