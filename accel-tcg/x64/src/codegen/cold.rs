//! Cold paths, emitted behind the hot code of the region.

use super::Cx;
use crate::asm::{Alu, Mem, Reg, Xmm};
use crate::stubs::{Brief, Const, Slow, TEMPS};
use holdfast_tcg_ir::env::offset;

/// Bytes of guest code that few regions exceed.
const LONGEST_REGION: u64 = 512;

/// A register or immediate of an access.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Source {
    None,
    /// General register; as a destination, whether 64 bits are wanted.
    Gpr(Reg, bool),
    /// Vector register and whether it is a double.
    Xmm(Xmm, bool),
    /// Vector register of which `1 << log2` bytes are accessed: the low half is in scratch 1 (stores) or 0 (loads), the upper
    /// one in scratch 3 or 1.
    Vector(Xmm, u8),
    /// Sign-extended immediate.
    Imm(i32),
}

/// A guest address.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(crate) enum Base {
    /// In a register that the access does not change.
    Reg(Reg),
    /// Sign-extended constant.
    Const(i32),
}

/// What the slow path of an access needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Access {
    pub(crate) slow: Slow,
    pub(crate) desc: u16,
    pub(crate) base: Base,
    pub(crate) disp: i32,
    /// A temporary that is free on the cold path.
    pub(crate) temp: Reg,
    pub(crate) value: Source,
    pub(crate) new: Source,
    pub(crate) dest: Source,
    pub(crate) keep_xmm: bool,
    /// Registers with addends of shared probes, as a mask: the slow path may have made them void.
    pub(crate) pages: u32,
}

/// What a probe for one access needs.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lone {
    pub(crate) base: Reg,
    pub(crate) range: (i32, i32),
    /// Where the entries are.
    pub(crate) array: i32,
    /// For the addend, and one more.
    pub(crate) temps: (Reg, Reg),
}

/// A cold path.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Cold {
    /// Slow path of a memory access; comes back.
    Access { from: usize, back: usize, pc: u64, access: Access },
    /// Another jump to the cold path of the access that follows in the list.
    Jump { from: usize },
    /// Probes for the access that follows in the list alone, after a probe for a whole table; comes back.
    Probe { from: usize, back: usize, probe: Lone },
    /// Leaves with a code at a pc.
    Exit { from: usize, code: u32, pc: u64 },
    /// Asks for link `n`, and looks its target up in the indirect-branch cache.
    Link { from: usize, n: usize },
    /// Looks the pc in rax up, for an indirect branch at `pc` that missed by any of the jumps.
    Lookup { from: [usize; 3], pc: u64 },
    /// Replaces a NaN by the canonical one; comes back.
    Nan { from: usize, back: usize, x: Xmm, double: bool },
    /// The same for a fused multiply-add of these factors.
    NanFma { from: usize, back: usize, x: Xmm, factors: (Xmm, Xmm), double: bool },
    /// Minimum or maximum of equal or unordered operands; comes back.
    MinMax { from: usize, back: usize, x: Xmm, ab: (Xmm, Xmm), max: bool, double: bool },
    /// Conversion to signed that gave the minimum; comes back.
    CvtSigned { from: usize, back: usize, d: Reg, x: Xmm, double: bool, w: bool },
    /// A softfp request on a vector register with an integer result; comes back.
    Soft { from: usize, back: usize, d: Reg, x: Xmm, double: bool, request: u32 },
}

impl Cx<'_> {
    pub(crate) fn cold_paths(&mut self) {
        let mut jumps: [Option<usize>; 2] = [None; 2];
        for n in 0..self.st.cold.len() {
            if !self.st.asm.room() {
                return;
            }
            let here = self.st.asm.pos();
            match self.st.cold[n] {
                Cold::Jump { from } => jumps = [Some(from), jumps[0]],
                Cold::Probe { from, back, probe } => {
                    self.st.asm.patch_rel(from, here);
                    jumps = [Some(self.emit_probe(&probe)), jumps[0]];
                    self.jump_back(back);
                }
                Cold::Access { from, back, pc, access } => {
                    if from != 0 {
                        self.st.asm.patch_rel(from, here);
                    }
                    for j in std::mem::take(&mut jumps).into_iter().flatten() {
                        self.st.asm.patch_rel(j, here);
                    }
                    if !self.brief_access(pc, &access, back) {
                        self.cold_access_path(pc, &access);
                        self.jump_back(back);
                    }
                }
                Cold::Exit { from, code, pc } => {
                    self.st.asm.patch_rel(from, here);
                    self.emit_exit(code, pc);
                }
                Cold::Link { from, n } => self.cold_link(from, n),
                Cold::Lookup { from, pc } => {
                    from.into_iter().for_each(|at| self.st.asm.patch_rel(at, here));
                    self.st.asm.mov_imm(Reg::RDX, pc);
                    self.st.asm.store(3, Mem::env(offset::BRANCH_PC), Reg::RDX);
                    let at = self.st.asm.jmp();
                    self.reach_stub(at, self.stubs.lookup_miss);
                }
                Cold::Nan { from, back, x, double } => {
                    self.st.asm.patch_rel(from, here);
                    let m = self.pool(if double { Const::Nan64 } else { Const::Nan32 });
                    self.st.asm.fload(double, x, m);
                    self.jump_back(back);
                }
                other => self.cold_fp(here, other),
            }
        }
    }

    fn cold_fp(&mut self, here: usize, c: Cold) {
        let back = match c {
            Cold::NanFma { from, back, x, factors, double } => {
                self.st.asm.patch_rel(from, here);
                self.cold_nan_fma(x, factors, double);
                back
            }
            Cold::MinMax { from, back, x, ab, max, double } => {
                self.st.asm.patch_rel(from, here);
                self.cold_min_max(x, ab, max, double);
                back
            }
            Cold::CvtSigned { from, back, d, x, double, w } => {
                self.st.asm.patch_rel(from, here);
                self.cold_cvt_signed(d, x, double, w);
                back
            }
            Cold::Soft { from, back, d, x, double, request } => {
                self.st.asm.patch_rel(from, here);
                self.st.asm.fstore(double, Mem::env(offset::SCRATCH), x);
                self.st.asm.mov_imm(d, u64::from(request));
                self.st.asm.store(3, Mem::env(offset::SCRATCH + 8), d);
                let at = self.st.asm.call();
                self.reach_stub(at, self.stubs.soft);
                self.st.asm.mov(true, d, Mem::env(offset::SCRATCH));
                back
            }
            _ => return,
        };
        self.jump_back(back);
    }

    fn jump_back(&mut self, back: usize) {
        let at = self.st.asm.jmp();
        self.st.asm.patch_rel(at, back);
    }

    /// A constant of the shared pool.
    pub(crate) fn pool(&self, c: Const) -> Mem {
        let disp = self.stubs.constant(c).wrapping_sub(self.exec) as i32;
        Mem { base: Mem::RIP, index: Mem::NONE, scale: 0, disp }
    }

    /// Makes the rel32 at `at` reach a shared stub.
    pub(crate) fn reach_stub(&mut self, at: usize, stub: u64) {
        let target = stub.wrapping_sub(self.exec) as i64;
        if i32::try_from(target).is_err() {
            self.error = Some(crate::CodegenError::OutOfReach(self.exec));
        }
        self.st.asm.patch_rel(at, target as usize);
    }

    /// Stores a constant to the header's pc; may use `t`.
    pub(crate) fn store_pc(&mut self, pc: u64, t: Reg) {
        if let Ok(imm) = i32::try_from(pc as i64) {
            self.st.asm.store_imm(3, Mem::env(offset::PC), imm);
        } else {
            self.st.asm.mov_imm(t, pc);
            self.st.asm.store(3, Mem::env(offset::PC), t);
        }
    }

    fn scratch_source(&mut self, n: i32, s: Source) {
        let m = Mem::env(offset::SCRATCH + 8 * n);
        match s {
            Source::None => {}
            Source::Gpr(r, _) => self.st.asm.store(3, m, r),
            Source::Xmm(x, double) => self.st.asm.fstore(double, m, x),
            Source::Vector(x, 4) => {
                self.st.asm.fstore(true, m, x);
                self.st.asm.movhps_store(Mem::env(offset::SCRATCH + 24), x);
            }
            Source::Vector(x, log2) => self.st.asm.fstore(log2 == 3, m, x),
            Source::Imm(i) => self.st.asm.store_imm(3, m, i),
        }
    }

    /// The cold path of a load or store of an integer, which is data but for a call. False if the access is no such.
    fn brief_access(&mut self, pc: u64, c: &Access, back: usize) -> bool {
        let (Base::Reg(base), Source::None) = (c.base, c.new) else { return false };
        let (reg, imm, wide) = match (c.slow, c.value, c.dest) {
            (Slow::Load, Source::None, Source::Gpr(d, w)) => (d.0, 0, w),
            (Slow::Store, Source::Gpr(r, _), Source::None) => (r.0, 0, false),
            (Slow::Store, Source::Imm(imm), Source::None) => (Brief::IMM, imm, false),
            _ => return false,
        };
        let at = self.st.asm.call();
        self.reach_stub(at, self.stubs.brief(c.slow, c.keep_xmm));
        let back = (back as i32).wrapping_sub(self.st.asm.pos() as i32);
        let (disp, desc, base, zeroed) = (c.disp, c.desc, base.0, c.pages as u8);
        let brief = Brief { pc, disp, back, desc, base, reg, imm, zeroed, wide };
        let [first, second, third, last] = brief.words();
        for word in [first, second, third] {
            self.st.asm.data(word, 8);
        }
        self.st.asm.data(last, Brief::LAST);
        true
    }

    fn cold_access_path(&mut self, pc: u64, c: &Access) {
        match c.base {
            Base::Reg(base) => {
                self.st.asm.lea(true, c.temp, Mem::base(base, c.disp));
                self.st.asm.store(3, Mem::env(offset::SCRATCH), c.temp);
            }
            Base::Const(at) => self.st.asm.store_imm(3, Mem::env(offset::SCRATCH), at.wrapping_add(c.disp)),
        }
        self.scratch_source(1, c.value);
        self.scratch_source(3, c.new);
        self.st.asm.store_imm(2, Mem::env(offset::SCRATCH + 16), i32::from(c.desc));
        self.store_pc(pc, c.temp);
        let at = self.st.asm.call();
        self.reach_stub(at, self.stubs.slow(c.slow, c.keep_xmm));
        for t in TEMPS.into_iter().filter(|t| c.pages >> t.0 & 1 != 0) {
            self.st.asm.alu(Alu::Xor, false, t, t);
        }
        let m = Mem::env(offset::SCRATCH);
        match c.dest {
            Source::Gpr(d, w) => self.st.asm.mov(w, d, m),
            Source::Xmm(x, double) => self.st.asm.fload(double, x, m),
            Source::Vector(x, 4) => self.st.asm.movups(x, m),
            Source::Vector(x, log2) => self.st.asm.fload(log2 == 3, x, m),
            Source::None | Source::Imm(_) => {}
        }
    }

    /// Stores pc and leaves with `code`.
    pub(crate) fn emit_exit(&mut self, code: u32, pc: u64) {
        self.store_pc(pc, Reg::RAX);
        self.st.asm.mov_imm(Reg::RAX, u64::from(code));
        let at = self.st.asm.jmp();
        self.reach_stub(at, self.stubs.exit);
    }

    fn cold_link(&mut self, from: usize, n: usize) {
        let Some(site) = self.st.links.get(n).copied() else { return };
        let here = self.st.asm.pos();
        self.st.asm.patch_rel(site.jump as usize, here);
        if from != 0 {
            self.st.asm.patch_rel(from, here);
        }
        let at = self.st.asm.call();
        self.reach_stub(at, self.stubs.link);
        self.st.asm.data(u64::from(self.region_id) << 32 | n as u64, 8);
        self.st.asm.data(site.target_pc, 8);
        // What begins near the end of a page may run into the next one: then nothing is linked to it.
        let page = 1u64 << self.spec.page_bits;
        let near_end = site.target_pc % page >= page.saturating_sub(LONGEST_REGION);
        let looked_up = near_end || site.kind == crate::LinkKind::CrossPage;
        let lookup = if looked_up { self.st.asm.pos() } else { 0 };
        if looked_up {
            self.st.asm.mov_imm(Reg::RAX, site.target_pc);
            let at = self.st.asm.jmp();
            self.reach_stub(at, self.stubs.lookup);
        }
        if let Some(s) = self.st.links.get_mut(n) {
            s.request_stub = here as u32;
            s.lookup_stub = lookup as u32;
        }
    }
}
