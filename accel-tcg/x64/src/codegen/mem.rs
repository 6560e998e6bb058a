//! Memory accesses: the inline TLB probe and the access.

use super::Cx;
use super::cold::{Access, Cold, Source};
use crate::asm::{Alu, Cc, Mem, Reg, Shift};
use crate::stubs::Slow;
use holdfast_tcg_ir::env::{TLB_ENTRIES, TLB_PAGE_BITS, offset};
use holdfast_tcg_ir::{FenceKind, Inst, MemOp, RmwKind, Type, Val};

/// Result of a probe.
pub(crate) struct Probe {
    /// rel32 of the jump to the cold path.
    pub(crate) miss: usize,
    /// Guest address, in a register that the access does not change.
    pub(crate) base: Reg,
    /// Constant to add to it.
    pub(crate) disp: i32,
    /// Holds the addend.
    pub(crate) addend: Reg,
    /// A free temporary.
    pub(crate) other: Reg,
}

impl Probe {
    fn host(&self) -> Mem {
        Mem::index(self.base, self.addend, 0, self.disp)
    }
}

impl Cx<'_> {
    /// Emits the probe for an access at `addr + disp`.
    fn probe(&mut self, mem: MemOp, (addr, disp): (Val, i32), write: bool) -> Probe {
        let base = self.gpr(addr);
        let (t1, t2) = (self.temp(), self.temp());
        let array = if write { offset::tlb_write(mem.mmu_idx()) } else { offset::tlb_read(mem.mmu_idx()) };
        let size = mem.bytes() as i32;
        let a = &mut self.st.asm;
        // t1 = index * 16: the page number's low bits, shifted to where an entry's offset has them.
        let down = (TLB_PAGE_BITS - 4) as u8;
        if disp != 0 {
            a.lea(true, t1, Mem::base(base, disp));
            a.shift_imm(Shift::Shr, true, t1, down);
        } else if self.features.bmi2 {
            a.rorx(true, t1, base, down);
        } else {
            a.mov(true, t1, base);
            a.shift_imm(Shift::Shr, true, t1, down);
        }
        let aligned = mem.is_aligned();
        // The last byte's page, unless misaligned accesses miss anyway by the low bits that the mask keeps.
        match disp.checked_add(if aligned { 0 } else { size - 1 }) {
            Some(0) => a.mov(true, t2, base),
            Some(d) => a.lea(true, t2, Mem::base(base, d)),
            None => {
                a.lea(true, t2, Mem::base(base, disp));
                a.alu_imm(Alu::Add, true, t2, size - 1);
            }
        }
        a.alu_imm(Alu::And, false, t1, (TLB_ENTRIES as i32 - 1) << 4);
        a.alu_imm(Alu::And, true, t2, -4096 | if aligned { size - 1 } else { 0 });
        a.alu(Alu::Add, true, t2, Reg::R15);
        a.alu(Alu::Cmp, true, t2, Mem::index(Reg::RBP, t1, 0, array));
        let miss = a.jcc(Cc::Ne);
        a.mov(true, t1, Mem::index(Reg::RBP, t1, 0, array + 8));
        Probe { miss, base, disp, addend: t1, other: t2 }
    }

    /// Notes the cold path of the access just emitted.
    fn cold_access(
        &mut self,
        slow: Slow,
        desc: u16,
        p: &Probe,
        (value, new, dest): (Source, Source, Source),
    ) {
        let keep_xmm = self.st.al.xmm_in_use();
        let access =
            Access { slow, desc, base: p.base, disp: p.disp, temp: p.other, value, new, dest, keep_xmm };
        let back = self.st.asm.pos();
        self.st.cold.push(Cold::Access { from: p.miss, back, pc: self.pc, access });
    }

    pub(crate) fn load(&mut self, i: &Inst) {
        let mem = i.mem();
        let p = self.probe(mem, (Val(i.a), i.disp()), false);
        if i.ty.is_float() {
            let d = self.xtemp();
            let double = i.ty == Type::F64;
            if mem.is_big_endian() {
                self.load_int(mem, true, p.addend, p.host());
                self.st.asm.mov_to_xmm(double, d, p.addend);
            } else {
                self.st.asm.fload(double, d, p.host());
            }
            self.cold_access(Slow::Load, mem.0, &p, (Source::None, Source::None, Source::Xmm(d, double)));
            return self.xdefine(d);
        }
        // The pin is written only when the access has succeeded, so it may be the destination.
        let d = self.hinted().unwrap_or(p.addend);
        let w = i.ty == Type::I64;
        self.load_int(mem, w, d, p.host());
        self.cold_access(Slow::Load, mem.0, &p, (Source::None, Source::None, Source::Gpr(d, w)));
        self.define(d);
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
        if i.ty.is_float() {
            let x = self.xmm(v);
            let p = self.probe(mem, (Val(i.a), i.disp()), true);
            let double = i.ty == Type::F64;
            if mem.is_big_endian() {
                self.st.asm.mov_from_xmm(double, p.other, x);
                self.st.asm.bswap(double, p.other);
                self.st.asm.store(log2, p.host(), p.other);
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
        let p = self.probe(mem, (Val(i.a), i.disp()), true);
        if mem.is_big_endian() && log2 > 0 {
            let t = p.other;
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
        let p = self.probe(mem, (Val(i.a), 0), true);
        let host = p.host();
        let d = if simple { p.other } else { Reg::RAX };
        if !Self::atomic_inline(mem) {
            // No fast path: jump to the slow one although the probe hit.
            let again = self.st.asm.jmp();
            let back = self.st.asm.pos();
            self.st.cold.push(Cold::Jump { from: again, to: p.miss });
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
        let p = self.probe(mem, (Val(i.a), 0), true);
        if Self::atomic_inline(mem) {
            self.st.asm.lock_cmpxchg(mem.log2(), p.host(), new);
            self.extend_old(mem, i.ty, Reg::RAX);
        } else {
            let again = self.st.asm.jmp();
            self.st.cold.push(Cold::Jump { from: again, to: p.miss });
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
