//! Memory accesses: the inline TLB probe and the access.
//!
//! **Shared probes.** When later accesses of the block have the same base value and displacements nearby, the first probe
//! covers the whole range (which must lie in one page) and its addend stays in a register; the others only test that it
//! is not 0. Every slow path zeroes these registers, since it may have changed the TLB.

use super::Cx;
use super::alloc::Page;
use super::analysis::bound;
use super::cold::{Access, Base, Cold, Lone, Source};
use crate::CodegenError;
use crate::asm::{Alu, Cc, Mem, Reg, Shift};
use crate::stubs::Slow;
use holdfast_tcg_ir::env::{TLB_ENTRIES, TLB_PAGE_BITS, offset, tlb_index};
use holdfast_tcg_ir::{FenceKind, Inst, MemOp, Op, RmwKind, Type, Val};

/// Result of a probe.
pub(crate) struct Probe {
    /// rel32 of the jump to the cold path; 0 if another probe leads there.
    pub(crate) miss: usize,
    /// The same of the jump that is taken when the address is misaligned.
    misaligned: Option<usize>,
    /// Guest address, before the constant.
    pub(crate) base: Base,
    /// Constant to add to it.
    pub(crate) disp: i32,
    /// Holds the addend.
    pub(crate) addend: Reg,
    /// A temporary that the cold path may use.
    pub(crate) other: Reg,
    /// A temporary that the result of a load may go to.
    pub(crate) dest: Option<Reg>,
    /// The page that later accesses share, to be noted after the access.
    page: Option<Page>,
}

/// Accesses that may share a probe.
struct Range {
    lo: i32,
    hi: i32,
    last: u32,
    /// One of them is a store.
    write: bool,
}

/// The widest range of a shared probe: what crosses a page takes the slow path with all its accesses. Where that was found to
/// be frequent, see [`crate::Translator::share_probes`], nothing is shared but what lies within the first access.
const MAX_RANGE: i32 = 256;
/// How far ahead accesses are looked for.
const LOOK_AHEAD: u32 = 48;

impl Probe {
    fn host(&self) -> Mem {
        match self.base {
            Base::Reg(base) => Mem::index(base, self.addend, 0, self.disp),
            Base::Const(at) => Mem::base(self.addend, at.wrapping_add(self.disp)),
        }
    }
}

impl Cx<'_> {
    /// The range that the access at hand and later ones of this block have in common; `None` when it is alone. A load before
    /// a store goes through the write array, whose pages can be read too.
    fn range(&self, mem: MemOp, disp: i32, write: bool) -> Option<Range> {
        let size = mem.bytes() as i32;
        let mut range = Range { lo: disp, hi: disp.checked_add(size)?, last: self.at, write };
        let max = if self.share { MAX_RANGE } else { size };
        let mut at = self.at;
        while let Some(n) = self.st.an.next_access(at).filter(|n| n - self.at <= LOOK_AHEAD) {
            at = n;
            let Some(i) = self.r.insts.get(n as usize) else { break };
            let m = i.mem();
            if m.mmu_idx() != mem.mmu_idx() {
                continue;
            }
            let end = i.disp().checked_add(m.bytes() as i32)?;
            let (lo, hi) = (range.lo.min(i.disp()), range.hi.max(end));
            if i64::from(hi) - i64::from(lo) <= i64::from(max) {
                range = Range { lo, hi, last: n, write: range.write || i.op == Op::Store };
            }
        }
        (range.last != self.at).then_some(range)
    }

    /// The page found earlier that serves an access.
    fn find_page(&self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Option<Page> {
        if self.st.al.page_regs() == 0 {
            return None;
        }
        if self.st.al.page_regs() == 0 {
            return None;
        }
        let addr = self.st.an.root(addr);
        let end = disp.checked_add(mem.bytes() as i32)?;
        let fits = |p: &Page| {
            p.base == addr && p.mmu_idx == mem.mmu_idx() && (p.write || !write) && p.lo <= disp && end <= p.hi
        };
        self.st.al.pages().find(fits)
    }

    /// Whether a load goes through a page whose register is needed further.
    fn page_goes_on(&self, mem: MemOp, at: (Val, i32), write: bool) -> bool {
        self.find_page(mem, at, write).is_some_and(|p| p.last > self.at)
    }

    /// An access through a page that an earlier probe found.
    fn reuse_page(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Option<Probe> {
        let page = self.find_page(mem, (addr, disp), write)?;
        self.st.al.locked |= 1 << page.reg.0;
        let base = self.gpr(addr);
        self.st.asm.test(true, page.reg, page.reg);
        let miss = self.st.asm.jcc(Cc::E);
        let ends = page.last <= self.at;
        if ends {
            self.st.al.drop_page(page.reg);
        }
        // The cold path zeroes the register anyway, so it may use it.
        let dest = ends.then_some(page.reg);
        let (base, addend, other) = (Base::Reg(base), page.reg, page.reg);
        Some(Probe { miss, misaligned: None, base, disp, addend, other, dest, page: None })
    }

    /// Emits the probe for a load or store at `addr + disp`.
    fn probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Probe {
        let addr = self.st.an.root(addr);
        let misaligned = self.check_alignment(mem, (addr, disp));
        let p = self.any_probe(mem, (addr, disp), write);
        Probe { misaligned, ..p }
    }

    /// Leaves for the cold path if the access has to be aligned and is not.
    fn check_alignment(&mut self, mem: MemOp, (addr, disp): (Val, i32)) -> Option<usize> {
        if !mem.is_aligned() || mem.bytes() == 1 {
            return None;
        }
        let low = mem.bytes() as i32 - 1;
        let base = self.gpr(addr);
        if disp & low == 0 {
            self.st.asm.test_imm(false, base, low);
        } else {
            let t = self.temp();
            self.st.asm.lea(false, t, Mem::base(base, disp));
            self.st.asm.test_imm(false, t, low);
            self.st.al.locked &= !(1 << t.0);
        }
        Some(self.st.asm.jcc(Cc::Ne))
    }

    /// The probe of an access, however it is aligned.
    fn any_probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Probe {
        if let Some(p) = self.reuse_page(mem, (addr, disp), write) {
            return p;
        }
        let Some(Range { lo, hi, last, write }) = self.range(mem, disp, write) else {
            return self.lone_probe(mem, (addr, disp), write);
        };
        let mut p = self.probe_range(mem, addr, (lo, hi), write);
        p.disp = disp;
        p.dest = Some(p.other);
        p.page = Some(Page { base: addr, mmu_idx: mem.mmu_idx(), write, lo, hi, reg: p.addend, last });
        p
    }

    /// A probe for one access with its alignment check (atomics).
    fn full_probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Probe {
        let misaligned = self.check_alignment(mem, (addr, disp));
        let p = self.lone_probe(mem, (addr, disp), write);
        Probe { misaligned, ..p }
    }

    /// A probe for one access.
    fn lone_probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Probe {
        // Aligned accesses cross no page; others miss by the page of their last byte.
        let size = if mem.is_aligned() { 1 } else { mem.bytes() as i32 };
        let hi = disp.saturating_add(size);
        let addr = self.st.an.root(addr);
        let known = self.const_probe(mem, (addr, disp), write);
        let mut p = match known.or_else(|| self.table_probe(mem, (addr, disp), write)) {
            Some(p) => p,
            None => self.probe_range(mem, addr, (disp, hi), write),
        };
        p.dest = Some(p.addend);
        p
    }

    /// A probe within reach of a displacement, at a constant address or in a table at one, that lies in one page: entry and
    /// tag are known.
    fn const_probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Option<Probe> {
        let known = self.konst(addr).map(|c| i32::try_from(c as i64));
        let (base, max) = match known {
            Some(base) => (base.ok()?, 0),
            None => (0, i32::try_from(bound(self.r, addr.0, 0)?).ok()?),
        };
        let va = base.checked_add(disp)?;
        let last = va.checked_add(max + mem.bytes() as i32 - 1)?;
        if (va ^ last) >> TLB_PAGE_BITS != 0 {
            return None;
        }
        let base = if known.is_some() { Base::Const(base) } else { Base::Reg(self.gpr(addr)) };
        let (t1, t2) = (self.temp(), self.temp());
        let entry = Self::array(mem, write) + 16 * tlb_index(va as i64 as u64) as i32;
        let a = &mut self.st.asm;
        a.lea(true, t2, Mem::base(Reg::R15, va & -4096));
        a.alu(Alu::Cmp, true, t2, Mem::env(entry));
        let miss = a.jcc(Cc::Ne);
        a.mov(true, t1, Mem::env(entry + 8));
        Some(Probe { miss, misaligned: None, base, disp, addend: t1, other: t2, dest: None, page: None })
    }

    /// A probe for all of a table that a load or store with a small index is from: it does not wait for the index. A table
    /// that crosses a page needs another.
    fn table_probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Option<Probe> {
        // A value to be swapped takes the register that the table would need.
        if mem.is_big_endian() {
            return None;
        }
        let (table, max) = self.st.an.table(self.r, self.at)?;
        let size = mem.bytes() as i32;
        let hi = disp.checked_add(i32::try_from(max).ok()?)?.checked_add(size)?;
        let base = self.gpr(addr);
        let array = Self::array(mem, write);
        let table = self.gpr(table);
        let temps = (self.temp(), self.temp());
        let from = self.emit_probe(&Lone { base: table, range: (disp, hi), array, temps });
        let lone = Lone { base, range: (disp, disp + size), array, temps };
        self.st.cold.push(Cold::Probe { from, back: self.st.asm.pos(), probe: lone });
        let base = Base::Reg(base);
        let (addend, other) = temps;
        Some(Probe { miss: 0, misaligned: None, base, disp, addend, other, dest: None, page: None })
    }

    /// Offset of the TLB entries for an access.
    fn array(mem: MemOp, write: bool) -> i32 {
        if write { offset::tlb_write(mem.mmu_idx()) } else { offset::tlb_read(mem.mmu_idx()) }
    }

    /// Emits the probe for `addr + lo .. addr + hi`.
    fn probe_range(&mut self, mem: MemOp, addr: Val, (lo, hi): (i32, i32), write: bool) -> Probe {
        let base = self.gpr(addr);
        let temps = (self.temp(), self.temp());
        let miss = self.emit_probe(&Lone { base, range: (lo, hi), array: Self::array(mem, write), temps });
        let base = Base::Reg(base);
        let (addend, other) = temps;
        Probe { miss, misaligned: None, base, disp: lo, addend, other, dest: None, page: None }
    }

    /// Emits a probe; gives the place of the rel32 of the jump that is taken on a miss.
    pub(crate) fn emit_probe(&mut self, p: &Lone) -> usize {
        let (base, (lo, hi), (t1, t2)) = (p.base, p.range, p.temps);
        let a = &mut self.st.asm;
        // t1 = index * 16: the page number's low bits, shifted to where an entry's offset has them.
        let down = (TLB_PAGE_BITS - 4) as u8;
        if lo != 0 {
            a.lea(true, t1, Mem::base(base, lo));
            a.shift_imm(Shift::Shr, true, t1, down);
        } else if self.features.bmi2 {
            a.rorx(true, t1, base, down);
        } else {
            a.mov(true, t1, base);
            a.shift_imm(Shift::Shr, true, t1, down);
        }
        if hi == 1 {
            a.mov(true, t2, base);
        } else {
            a.lea(true, t2, Mem::base(base, hi.wrapping_sub(1)));
        }
        a.probe_tail((t1, t2), (TLB_ENTRIES as u32 - 1) << 4, p.array)
    }

    /// Notes the cold path of the access just emitted.
    fn cold_access(
        &mut self,
        slow: Slow,
        desc: u16,
        p: &Probe,
        (value, new, dest): (Source, Source, Source),
    ) {
        if let Some(page) = p.page {
            self.st.al.add_page(page);
        }
        if let Some(from) = p.misaligned {
            self.st.cold.push(Cold::Jump { from });
        }
        let pages = self.st.al.page_regs();
        let keep_xmm = self.st.al.xmm_in_use(self.at);
        let access = Access {
            slow,
            desc,
            base: p.base,
            disp: p.disp,
            temp: p.other,
            value,
            new,
            dest,
            keep_xmm,
            pages,
        };
        let back = self.st.asm.pos();
        self.st.cold.push(Cold::Access { from: p.miss, back, pc: self.pc, access });
    }

    // Between the jump to the cold path and where it comes back, nothing may be emitted but the access: the cold path
    // would not do it. So all registers are taken before the probe.

    pub(crate) fn load(&mut self, i: &Inst) {
        let mem = i.mem();
        let at = (Val(i.a), i.disp());
        if i.ty == Type::V128 {
            return self.load_vector(mem, at);
        }
        if i.ty.is_float() {
            return self.load_float(i, mem, at);
        }
        // The pin is written only when the access has succeeded, so it may be the destination.
        let mut d = self.hinted();
        if d.is_none() && self.page_goes_on(mem, at, i.load_mem().is_for_update()) {
            d = Some(self.temp());
        }
        // A store follows, and shares the probe.
        let update = i.load_mem().is_for_update();
        let p = self.probe(mem, at, update);
        let Some(d) = d.or(p.dest) else {
            self.error = Some(CodegenError::Unsupported(i.op));
            return;
        };
        let w = i.ty == Type::I64;
        self.load_int(mem, w, d, p.host());
        let desc = i.load_mem().0;
        self.cold_access(Slow::Load, desc, &p, (Source::None, Source::None, Source::Gpr(d, w)));
        self.define(d);
    }

    fn load_float(&mut self, i: &Inst, mem: MemOp, at: (Val, i32)) {
        let d = self.xtemp();
        let double = i.ty == Type::F64;
        let t = mem.is_big_endian().then(|| self.temp());
        let p = self.probe(mem, at, false);
        if let Some(t) = t {
            self.load_int(mem, true, t, p.host());
            self.st.asm.mov_to_xmm(double, d, t);
        } else {
            self.st.asm.fload(double, d, p.host());
        }
        self.cold_access(Slow::Load, mem.0, &p, (Source::None, Source::None, Source::Xmm(d, double)));
        self.xdefine(d);
    }

    fn load_vector(&mut self, mem: MemOp, at: (Val, i32)) {
        let d = self.xtemp();
        let p = self.probe(mem, at, false);
        match mem.log2() {
            4 => self.st.asm.movups(d, p.host()),
            log2 => self.st.asm.fload(log2 == 3, d, p.host()),
        }
        self.cold_access(
            Slow::Load,
            mem.0,
            &p,
            (Source::None, Source::None, Source::Vector(d, mem.log2() as u8)),
        );
        self.xdefine(d);
    }

    fn store_vector(&mut self, i: &Inst, mem: MemOp) {
        let x = self.xmm(Val(i.b));
        let p = self.probe(mem, (Val(i.a), i.disp()), true);
        match mem.log2() {
            4 => self.st.asm.movups_store(p.host(), x),
            log2 => self.st.asm.fstore(log2 == 3, p.host(), x),
        }
        let value = Source::Vector(x, mem.log2() as u8);
        self.cold_access(Slow::Store, mem.0, &p, (value, Source::None, Source::None));
    }

    /// Loads with extension to 64 bits (`w`) or 32.
    fn load_int(&mut self, mem: MemOp, w: bool, d: Reg, m: Mem) {
        let a = &mut self.st.asm;
        let log2 = mem.log2();
        if !mem.is_big_endian() || log2 == 0 {
            if mem.is_signed() && log2 < 3 {
                a.movsx(log2, w, d, m);
            } else {
                a.movzx(log2, d, m);
            }
            return;
        }
        a.movzx(log2, d, m);
        swap_bytes(a, log2, d, mem.is_signed(), w);
    }

    pub(crate) fn store(&mut self, i: &Inst) {
        let mem = i.mem();
        let log2 = mem.log2();
        let v = Val(i.b);
        if i.ty == Type::V128 {
            return self.store_vector(i, mem);
        }
        if i.ty.is_float() {
            let x = self.xmm(v);
            let double = i.ty == Type::F64;
            let t = mem.is_big_endian().then(|| self.temp());
            let p = self.probe(mem, (Val(i.a), i.disp()), true);
            if let Some(t) = t {
                self.st.asm.mov_from_xmm(double, t, x);
                self.st.asm.bswap(double, t);
                self.st.asm.store(log2, p.host(), t);
            } else {
                self.st.asm.fstore(double, p.host(), x);
            }
            return self.cold_access(
                Slow::Store,
                mem.0,
                &p,
                (Source::Xmm(x, double), Source::None, Source::None),
            );
        }
        if let Some(imm) = self.imm32(v, log2 == 3)
            && !mem.is_big_endian()
        {
            let p = self.probe(mem, (Val(i.a), i.disp()), true);
            self.st.asm.store_imm(log2, p.host(), imm);
            return self.cold_access(Slow::Store, mem.0, &p, (Source::Imm(imm), Source::None, Source::None));
        }
        let r = self.gpr(v);
        let t = (mem.is_big_endian() && log2 > 0).then(|| self.temp());
        let p = self.probe(mem, (Val(i.a), i.disp()), true);
        if let Some(t) = t {
            self.st.asm.mov(true, t, r);
            swap_bytes(&mut self.st.asm, log2, t, false, true);
            self.st.asm.store(log2, p.host(), t);
        } else {
            self.st.asm.store(log2, p.host(), r);
        }
        self.cold_access(Slow::Store, mem.0, &p, (Source::Gpr(r, true), Source::None, Source::None));
    }

    pub(crate) fn fence(&mut self, i: &Inst) {
        if i.aux == FenceKind::Full as u16 {
            self.st.asm.fence();
        }
    }

    // ---- atomics ----

    /// Whether the fast path handles an atomic of this shape; else it always takes the slow path.
    fn atomic_inline(mem: MemOp) -> bool {
        (2..=3).contains(&mem.log2()) && !mem.is_big_endian()
    }

    /// Extends the old value in `d` as `mem` says.
    fn extend_old(&mut self, mem: MemOp, ty: Type, d: Reg) {
        if mem.log2() == 2 && ty == Type::I64 {
            if mem.is_signed() {
                self.st.asm.movsx(2, true, d, d);
            } else {
                self.st.asm.movzx(2, d, d);
            }
        }
    }

    pub(crate) fn rmw(&mut self, i: &Inst) {
        let (mem, kind) = (i.mem(), i.rmw());
        let log2 = mem.log2();
        let unused = self.st.an.last_use(Val(self.at)) == 0;
        let simple = matches!(kind, RmwKind::Swap | RmwKind::Add);
        if !simple {
            self.take(Reg::RAX);
        }
        let val = self.gpr(Val(i.b));
        let p = self.full_probe(mem, (Val(i.a), 0), true);
        let host = p.host();
        let d = if simple { p.other } else { Reg::RAX };
        if !Self::atomic_inline(mem) {
            // No fast path: jump to the slow one although the probe hit.
            let again = self.st.asm.jmp();
            let back = self.st.asm.pos();
            self.st.cold.push(Cold::Jump { from: again });
            debug_assert_eq!(back, self.st.asm.pos());
        } else if simple {
            self.st.asm.mov(true, d, val);
            if kind == RmwKind::Swap {
                self.st.asm.xchg(log2, host, d);
            } else {
                self.st.asm.lock_xadd(log2, host, d);
            }
            self.extend_old(mem, i.ty, d);
        } else {
            self.cas_loop(kind, log2, host, (val, p.other));
            if !unused {
                self.extend_old(mem, i.ty, d);
            }
        }
        let w = i.ty == Type::I64;
        self.cold_access(Slow::Rmw, i.aux, &p, (Source::Gpr(val, true), Source::None, Source::Gpr(d, w)));
        self.define(d);
    }

    /// `rax = old; t = old op val; cmpxchg` until it succeeds.
    fn cas_loop(&mut self, kind: RmwKind, log2: u32, m: Mem, (val, t): (Reg, Reg)) {
        let w = log2 == 3;
        let a = &mut self.st.asm;
        a.mov(w, Reg::RAX, m);
        let top = a.pos();
        match kind {
            RmwKind::And | RmwKind::Or | RmwKind::Xor => {
                let op = match kind {
                    RmwKind::And => Alu::And,
                    RmwKind::Or => Alu::Or,
                    _ => Alu::Xor,
                };
                a.mov(w, t, Reg::RAX);
                a.alu(op, w, t, val);
            }
            _ => {
                let cc = match kind {
                    RmwKind::MinS => Cc::G,
                    RmwKind::MaxS => Cc::L,
                    RmwKind::MinU => Cc::A,
                    _ => Cc::B,
                };
                a.mov(w, t, Reg::RAX);
                a.alu(Alu::Cmp, w, t, val);
                a.cmov(cc, w, t, val);
            }
        }
        a.lock_cmpxchg(log2, m, t);
        let again = a.jcc(Cc::Ne);
        a.patch_rel(again, top);
    }

    pub(crate) fn cas(&mut self, i: &Inst) {
        let mem = i.mem();
        self.take(Reg::RAX);
        let new = self.gpr(Val(i.c));
        self.copy_to(Reg::RAX, Val(i.b));
        let p = self.full_probe(mem, (Val(i.a), 0), true);
        if Self::atomic_inline(mem) {
            self.st.asm.lock_cmpxchg(mem.log2(), p.host(), new);
            self.extend_old(mem, i.ty, Reg::RAX);
        } else {
            let again = self.st.asm.jmp();
            self.st.cold.push(Cold::Jump { from: again });
        }
        let w = i.ty == Type::I64;
        let parts = (Source::Gpr(Reg::RAX, true), Source::Gpr(new, true), Source::Gpr(Reg::RAX, w));
        self.cold_access(Slow::Cas, mem.0, &p, parts);
        self.define(Reg::RAX);
    }
}

/// Reverses the low `1 << log2` bytes of `d` and extends them.
fn swap_bytes(a: &mut crate::asm::Asm, log2: u32, d: Reg, signed: bool, w: bool) {
    match log2 {
        1 => {
            a.bswap(false, d);
            a.shift_imm(if signed { Shift::Sar } else { Shift::Shr }, false, d, 16);
            if signed && w {
                a.movsx(2, true, d, d);
            }
        }
        2 => {
            a.bswap(false, d);
            if signed && w {
                a.movsx(2, true, d, d);
            }
        }
        3 => a.bswap(true, d),
        _ => {}
    }
}
