//! The code generator: one backward pass over the region for liveness, one forward pass that emits.
//!
//! **Where values live.** A value is in at most one register (a temporary, or a pin while the pinned slot holds it), may
//! also have a *home* (an unpinned slot that holds it now) and a spill slot; constants need none of these. Temporaries are
//! evicted on demand. At labels all values are dead, so no state is merged between blocks.
//!
//! **Slots.** A pin always holds its slot's current value, memory that of an unpinned slot, at every instruction that may
//! leave the region. An instruction right before the `SetSlot` of its result computes into the pin directly.

mod alloc;
mod analysis;
mod call;
mod cold;
mod control;
mod fp;
mod fpcvt;
mod int;
mod loops;
mod mem;
mod muldiv;
mod vec;

use crate::CodegenError;
use crate::asm::{Asm, Reg};
use crate::features::HostFeatures;
use crate::link::LinkSite;
use crate::stubs::{self, PIN_REGS, Stubs};
use alloc::Alloc;
use analysis::Analysis;
use cold::Cold;
use holdfast_tcg_ir::env::SlowPaths;
use holdfast_tcg_ir::{GuestSpec, HelperTable, Inst, Op, Region};
use loops::Loops;

/// Where code goes.
#[derive(Debug)]
pub struct Target<'a> {
    /// Writable memory; 16-byte aligned.
    pub out: &'a mut [u8],
    /// Address at which `out` executes.
    pub exec: u64,
    /// What link requests carry in the upper half of `exit_arg`.
    pub region_id: u32,
}

/// A compiled region.
#[derive(Debug)]
pub struct Compiled<'a> {
    /// Bytes used, a multiple of 16. The entry is at offset 0.
    pub len: usize,
    /// Bytes of hot code before the cold paths.
    pub hot_len: usize,
    /// Patchable jumps; index `i` is what link requests carry in the lower half of `exit_arg`.
    pub links: &'a [LinkSite],
    /// Code offset and guest pc of every guest instruction, ascending by offset; only hot code.
    pub insns: &'a [(u32, u64)],
}

/// Compiles regions for one guest; keeps its buffers between regions. One per translating thread.
pub struct Translator {
    spec: GuestSpec,
    helpers: HelperTable,
    slow: SlowPaths,
    features: HostFeatures,
    share: bool,
    st: State,
}

/// Everything that is reused from region to region.
pub(crate) struct State {
    asm: Asm,
    an: Analysis,
    al: Alloc,
    loops: Loops,
    cold: Vec<Cold>,
    links: Vec<LinkSite>,
    insns: Vec<(u32, u64)>,
    /// The number of the pin at a slot offset, direct mapped; [`NO_PIN`] where there is none.
    pin_at: [u8; PIN_INDEXES],
    /// Code offset of bound labels.
    label_at: Vec<Option<u32>>,
    /// Branches to each label that are not link sites themselves.
    label_uses: Vec<u32>,
    /// rel32s that wait for a label.
    label_refs: Vec<(u32, u32)>,
}

const PIN_INDEXES: usize = 64;
const NO_PIN: u8 = 0xff;

fn pin_index(offset: u32) -> usize {
    offset as usize / 8 % PIN_INDEXES
}

/// One compilation.
pub(crate) struct Cx<'a> {
    st: &'a mut State,
    r: &'a Region,
    helpers: &'a HelperTable,
    spec: &'a GuestSpec,
    stubs: &'a Stubs,
    features: HostFeatures,
    /// Accesses of different bytes may share a probe.
    share: bool,
    exec: u64,
    region_id: u32,
    /// Guest pc of the current instruction.
    pc: u64,
    /// Index of the current instruction.
    at: u32,
    error: Option<CodegenError>,
}

impl Translator {
    /// A translator for guest `spec` with its helpers and slow paths, for this processor.
    pub fn new(spec: GuestSpec, helpers: HelperTable, slow: SlowPaths) -> Result<Self, CodegenError> {
        Self::with_features(spec, (helpers, slow), HostFeatures::detect())
    }

    /// The same restricted to `features` (tests).
    pub fn with_features(
        spec: GuestSpec,
        (helpers, slow): (HelperTable, SlowPaths),
        features: HostFeatures,
    ) -> Result<Self, CodegenError> {
        stubs::check_pins(&spec)?;
        let mut st = State {
            asm: Asm::new(),
            an: Analysis::default(),
            al: Alloc::default(),
            loops: Loops::default(),
            cold: Vec::new(),
            links: Vec::new(),
            insns: Vec::new(),
            pin_at: [NO_PIN; PIN_INDEXES],
            label_at: Vec::new(),
            label_uses: Vec::new(),
            label_refs: Vec::new(),
        };
        for (n, pin) in spec.pins.iter().enumerate().rev() {
            st.pin_at[pin_index(pin.offset)] = n as u8;
        }
        Ok(Self { spec, helpers, slow, features, share: true, st })
    }

    /// The helpers it was made with.
    pub fn helpers(&self) -> &HelperTable {
        &self.helpers
    }

    /// Writes the shared stubs to the start of `out`, which executes at `exec` (16-byte aligned).
    pub fn stubs(&mut self, out: &mut [u8], exec: u64) -> Result<Stubs, CodegenError> {
        let s = stubs::generate(&mut self.st.asm, &self.spec, &self.slow, exec)?;
        copy(out, self.st.asm.bytes())?;
        Ok(s)
    }

    /// Whether accesses near each other share a TLB probe in what is compiled from now on, as they do at first. Where they lie in
    /// two pages each of them takes the slow path then, and fares better alone.
    pub fn share_probes(&mut self, share: bool) {
        self.share = share;
    }

    /// Compiles a well-formed region (see [`holdfast_tcg_ir::verify()`]) to `target`.
    pub fn compile(
        &mut self,
        stubs: &Stubs,
        region: &Region,
        target: Target<'_>,
    ) -> Result<Compiled<'_>, CodegenError> {
        let Target { out, exec, region_id } = target;
        let st = &mut self.st;
        st.asm.clear();
        st.cold.clear();
        st.links.clear();
        st.insns.clear();
        st.label_refs.clear();
        st.label_at.clear();
        st.label_at.resize(region.labels.len(), None);
        st.label_uses.clear();
        st.label_uses.extend(region.labels.iter().map(|l| l.refs));
        st.an.run(region);
        st.al.start(region.insts.len());
        let mut cx = Cx {
            st,
            r: region,
            helpers: &self.helpers,
            spec: &self.spec,
            stubs,
            features: self.features,
            share: self.share,
            exec,
            region_id,
            pc: region.entry_pc,
            at: 0,
            error: None,
        };
        cx.body();
        let hot_len = cx.st.asm.pos();
        cx.cold_paths();
        let error = cx.error.take();
        if let Some(e) = error {
            return Err(e);
        }
        if !self.st.asm.room() {
            return Err(CodegenError::TooLong(region.insts.len()));
        }
        self.st.asm.align(16, 0);
        copy(out, self.st.asm.bytes())?;
        let len = self.st.asm.pos();
        Ok(Compiled { len, hot_len, links: &self.st.links, insns: &self.st.insns })
    }

    /// The code of the last compilation (tests and disassembly).
    pub fn bytes(&self) -> &[u8] {
        self.st.asm.bytes()
    }
}

fn copy(out: &mut [u8], code: &[u8]) -> Result<(), CodegenError> {
    match out.get_mut(..code.len()) {
        Some(o) => {
            o.copy_from_slice(code);
            Ok(())
        }
        None => Err(CodegenError::BufferFull { need: code.len(), have: out.len() }),
    }
}

impl Cx<'_> {
    fn body(&mut self) {
        let r = self.r;
        self.find_loops();
        for n in (0..self.st.an.work().len()).rev() {
            let Some(&at) = self.st.an.work().get(n) else { break };
            let Some(i) = r.insts.get(at as usize) else { break };
            if i.op == Op::InsnStart {
                self.pc = i.imm();
                self.st.insns.push((self.st.asm.pos() as u32, self.pc));
                continue;
            }
            if self.st.an.is_dead(at) {
                continue;
            }
            self.at = at;
            if !self.st.asm.room() {
                return;
            }
            self.end_loop(at);
            self.inst(i);
            self.st.al.locked = 0;
        }
    }

    fn inst(&mut self, i: &Inst) {
        match i.op {
            // Those of the first line never get here.
            Op::Nop | Op::Const | Op::InsnStart | Op::Trunc => {}
            Op::GetSlot => self.get_slot(i),
            Op::SetSlot => self.set_slot(i),
            Op::Mul | Op::MulHS | Op::MulHU | Op::MulHSU => self.multiply(i),
            Op::DivS | Op::DivU | Op::RemS | Op::RemU => self.divide(i),
            Op::Shl | Op::ShrU | Op::ShrS | Op::RotL | Op::RotR => self.shift(i),
            Op::MinS | Op::MaxS | Op::MinU | Op::MaxU => self.min_max(i),
            Op::Add | Op::Sub | Op::And | Op::Or | Op::Xor | Op::Andn => self.alu(i),
            Op::SetCond => self.set_cond(i),
            Op::Select => self.select(i),
            Op::Load => self.load(i),
            Op::Store => self.store(i),
            Op::AtomicRmw => self.rmw(i),
            Op::AtomicCas => self.cas(i),
            Op::Fence => self.fence(i),
            Op::Call => self.call(i),
            Op::Vec | Op::VecFp => self.vec(i),
            Op::Host => self.host(i),
            Op::Label
            | Op::Br
            | Op::BrCond
            | Op::GotoPc
            | Op::GotoReg
            | Op::Exit
            | Op::ExitReg
            | Op::ExitAsIs => {
                self.control(i);
            }
            _ if i.op.is_int_unary() || matches!(i.op, Op::SExt | Op::ZExt) => self.int_unary(i),
            _ => self.float(i),
        }
    }

    /// The pin register of a slot.
    fn pin_of(&self, offset: u32) -> Option<Reg> {
        let n = self.st.pin_at[pin_index(offset)];
        if n == NO_PIN {
            return None;
        }
        if self.spec.pins.get(usize::from(n)).is_some_and(|s| s.offset == offset) {
            return PIN_REGS.get(usize::from(n)).copied();
        }
        let n = self.spec.pins.iter().position(|s| s.offset == offset)?;
        PIN_REGS.get(n).copied()
    }
}
