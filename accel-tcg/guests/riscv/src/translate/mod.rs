//! From instructions to IR.
//!
//! A region is one run of instructions from the entry on, past conditional branches, and past unconditional
//! jumps as long as an earlier branch goes to what follows. Branches to instructions of the run become jumps
//! within the region, so loops and small conditionals stay in it; all others leave it.

mod bits;
mod control;
mod fp;
mod int;
mod mem;
mod scan;
mod sys;

use std::cell::Cell;

use holdfast_tcg_ir::{Builder, Cond, JumpHint, Label, Slot, Val, env::exit};
use holdfast_tcg_runtime::{CodeReader, Fault, TranslateRequest, Translated};

use crate::decode::Insn;
use crate::hart::{Hart, mstatus};
use crate::helpers::Ids;
use crate::key::Key;
use crate::trap::cause;
use scan::{Line, Scan};

/// The slot of an integer register.
pub(crate) const fn x_slot(r: u32) -> Slot {
    Slot::i64(std::mem::offset_of!(Hart, x) + 8 * (r as usize & 31))
}

/// The slot of a floating-point register.
const fn f_slot(r: u32) -> Slot {
    Slot::f64(std::mem::offset_of!(Hart, f) + 8 * (r as usize & 31))
}

const MSTATUS: Slot = Slot::i64(std::mem::offset_of!(Hart, mstatus));

/// Slots that stay in host registers, by heat in compiled code: a0, a5, a4, sp, s0, a1, a3, a2.
pub(crate) const PINS: &[Slot] =
    &[x_slot(10), x_slot(15), x_slot(14), x_slot(2), x_slot(8), x_slot(11), x_slot(13), x_slot(12)];

/// What is used again from region to region.
#[derive(Default)]
struct Buffers {
    lines: Vec<Line>,
    targets: Vec<u64>,
    labels: Vec<Option<Label>>,
    dirty: Vec<Option<bool>>,
    leaving: Vec<(Label, u64)>,
}

thread_local! {
    static BUFFERS: Cell<Buffers> = Cell::default();
}

/// The state of translating one region.
pub(crate) struct Translator<'a> {
    b: &'a mut Builder,
    ids: &'a Ids,
    key: Key,
    no_chain: bool,
    /// The instruction at hand.
    pc: u64,
    next: u64,
    raw: u32,
    /// FS is known to be dirty: whatever way of the region leads here has set it.
    fp_dirty: bool,
    scan: &'a Scan,
    /// Labels of instructions that are jumped to, by index.
    labels: Vec<Option<Label>>,
    /// Whether FS is known to be dirty at an instruction that is jumped to, by index: by all branches to it so far.
    dirty: Vec<Option<bool>>,
    /// Branches that leave: label and target.
    leaving: Vec<(Label, u64)>,
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
    let mut buffers = BUFFERS.take();
    let lines = std::mem::take(&mut buffers.lines);
    let scan = match scan::run(request, code, (lines, &mut buffers.targets)) {
        Ok(scan) => scan,
        Err(fault) => {
            BUFFERS.set(buffers);
            return Err(fault);
        }
    };
    let mut t = Translator {
        b: builder,
        ids,
        key: Key(request.key),
        no_chain: request.no_chain,
        pc: request.pc,
        next: request.pc,
        raw: 0,
        fp_dirty: false,
        labels: std::mem::take(&mut buffers.labels),
        dirty: std::mem::take(&mut buffers.dirty),
        leaving: std::mem::take(&mut buffers.leaving),
        scan: &scan,
    };
    t.run();
    (buffers.labels, buffers.dirty, buffers.leaving) = (t.labels, t.dirty, t.leaving);
    let made = Translated { insns: scan.lines.len() as u32, blocks: scan.blocks(), end: scan.end };
    buffers.lines = scan.lines;
    BUFFERS.set(buffers);
    Ok(made)
}

impl Translator<'_> {
    fn run(&mut self) {
        let scan = self.scan;
        self.labels.clear();
        let label = |l: &Line| (l.target && !self.no_chain).then(|| self.b.label_at(l.pc));
        self.labels.extend(scan.lines.iter().map(label));
        self.dirty.clear();
        self.dirty.resize(scan.lines.len(), None);
        for (i, line) in scan.lines.iter().enumerate() {
            if let Some(label) = self.labels.get(i).copied().flatten() {
                self.join(i);
                self.b.bind(label);
            } else if i > 0 && self.b.terminated() {
                continue; // behind an instruction that turned out to be illegal
            }
            self.line(line);
        }
        if !self.b.terminated() {
            let end = self.next;
            if scan.end_indirect { self.goto_lookup(end) } else { self.goto(end) }
        }
        let mut leaving = std::mem::take(&mut self.leaving);
        for (label, target) in leaving.drain(..) {
            self.b.bind(label);
            self.goto(target);
        }
        self.leaving = leaving;
    }

    /// Instruction `at` is next, to which branches go. Those that come later in the code bring what is known here, see
    /// [`Self::label_of`].
    fn join(&mut self, at: usize) {
        let through = (at == 0 || !self.b.terminated()).then_some(at != 0 && self.fp_dirty);
        let Some(dirty) = self.dirty.get_mut(at) else { return };
        self.fp_dirty = through.into_iter().chain(*dirty).all(|d| d);
        *dirty = Some(self.fp_dirty);
    }

    fn line(&mut self, line: &Line) {
        self.pc = line.pc;
        self.raw = line.raw;
        self.next = line.pc.wrapping_add(u64::from(line.len));
        self.b.insn(line.pc, u32::from(line.len));
        match line.insn {
            Some(insn) => self.insn(insn),
            None => self.illegal(),
        }
    }

    fn insn(&mut self, insn: Insn) {
        // Each part takes its instructions and leaves the others to the next.
        if self.int(insn) || self.mem(insn) || self.control(insn) || self.bits(insn) {
            return;
        }
        if !self.sys(insn) && !self.fp(insn) {
            self.illegal();
        }
    }

    // ---- registers ----

    fn x(&mut self, r: u32) -> Val {
        if r == 0 { self.b.iconst(0) } else { self.b.get(x_slot(r)) }
    }

    fn set_x(&mut self, r: u32, v: Val) {
        if r != 0 {
            self.b.set(x_slot(r), v);
        }
    }

    /// The low half.
    fn w(&mut self, r: u32) -> Val {
        let v = self.x(r);
        self.b.trunc(v)
    }

    /// Sets a register to a 32-bit value, sign-extended.
    fn set_w(&mut self, r: u32, v: Val) {
        if r != 0 {
            let v = self.b.sext(v);
            self.b.set(x_slot(r), v);
        }
    }

    // ---- leaving ----

    /// Goes on at `target` in the same mode.
    fn goto(&mut self, target: u64) {
        if self.no_chain { self.b.exit(exit::RESUME, target) } else { self.b.goto_pc(target) }
    }

    /// Goes on at `target`, looked up under the mode that holds then.
    fn goto_lookup(&mut self, target: u64) {
        if self.no_chain {
            self.b.exit(exit::RESUME, target);
        } else {
            let v = self.b.iconst(target as i64);
            self.b.goto_reg(v, JumpHint::Jump);
        }
    }

    fn goto_val(&mut self, target: Val, hint: JumpHint) {
        if self.no_chain { self.b.exit_reg(exit::RESUME, target) } else { self.b.goto_reg(target, hint) }
    }

    /// Raises an exception; the block ends.
    fn raise(&mut self, cause: u64, tval: u64) {
        let args = [self.b.iconst(cause as i64), self.b.iconst(tval as i64)];
        self.b.call(self.ids.raise, &args);
        self.b.exit(exit::RESUME, self.pc); // not reached: the helper leaves
    }

    fn illegal(&mut self) {
        self.raise(cause::ILLEGAL, u64::from(self.raw));
    }

    /// The label of the instruction at `pc`, for a jump from here, if it is one of the region's that may be jumped to.
    fn label_of(&mut self, pc: u64) -> Option<Label> {
        let at = self.scan.index_of(pc)?;
        let label = self.labels.get(at).copied().flatten()?;
        let dirty = self.dirty.get_mut(at)?;
        if pc > self.pc {
            *dirty = Some(self.fp_dirty && dirty.unwrap_or(true));
        } else if *dirty == Some(true) && !self.fp_dirty {
            // A way round the loop's head: what is translated there relies on FS.
            return None;
        }
        Some(label)
    }

    /// Goes on at `target` if `a cc b`.
    fn branch(&mut self, cc: Cond, a: Val, b: Val, target: u64) {
        match self.label_of(target) {
            Some(label) => self.b.brcond(cc, a, b, label),
            None => {
                let label = self.b.label();
                self.b.brcond(cc, a, b, label);
                self.leaving.push((label, target));
            }
        }
    }

    // ---- floating-point state ----

    /// Floating-point state was written: FS becomes dirty.
    fn mark_fp(&mut self) {
        if !self.fp_dirty {
            let status = self.b.get(MSTATUS);
            let status = self.b.ori(status, mstatus::FS as i64);
            self.b.set(MSTATUS, status);
            self.fp_dirty = true;
        }
    }
}
