//! Loads, stores, fences and atomics.

use holdfast_tcg_ir::{Cond, FenceKind, MemOp, RmwKind, Slot, Type, Val};

use super::{Translator, f_slot};
use crate::decode::{Amo, Insn, Load, Store};
use crate::hart::{Hart, NO_RESERVATION};
use crate::trap::cause;

const RES_ADDR: Slot = Slot::i64(std::mem::offset_of!(Hart, res_addr));
const RES_VALUE: Slot = Slot::i64(std::mem::offset_of!(Hart, res_value));

/// PRED and SUCC bits of memory writes and reads; device output and input count alike.
const FENCE_WRITES: u32 = 0b0101;
const FENCE_READS: u32 = 0b1010;
/// FENCE.TSO.
const FENCE_TSO: u32 = 0b1000;
/// `fence w, 0`: the `pause` hint.
const PAUSE: u32 = 0x0100_000f;

impl Translator<'_> {
    /// Translates accesses to memory; false if `insn` is something else.
    pub(super) fn mem(&mut self, insn: Insn) -> bool {
        match insn {
            Insn::Lb(l) => self.load(l, MemOp::S8),
            Insn::Lh(l) => self.load(l, MemOp::S16),
            Insn::Lw(l) => self.load(l, MemOp::S32),
            Insn::Ld(l) => self.load(l, MemOp::U64),
            Insn::Lbu(l) => self.load(l, MemOp::U8),
            Insn::Lhu(l) => self.load(l, MemOp::U16),
            Insn::Lwu(l) => self.load(l, MemOp::U32),
            Insn::Sb(s) => self.store(s, MemOp::U8),
            Insn::Sh(s) => self.store(s, MemOp::U16),
            Insn::Sw(s) => self.store(s, MemOp::U32),
            Insn::Sd(s) => self.store(s, MemOp::U64),
            Insn::Flw(l) => self.load_fp(l, Type::F32),
            Insn::Fld(l) => self.load_fp(l, Type::F64),
            Insn::Fsw(s) => self.store_fp(s, MemOp::U32),
            Insn::Fsd(s) => self.store_fp(s, MemOp::U64),
            Insn::Fence(f) => {
                let store_load = f.pred & FENCE_WRITES != 0 && f.succ & FENCE_READS != 0;
                if store_load && f.fm != FENCE_TSO {
                    self.b.fence(FenceKind::Full);
                } else if f.pred != 0 && f.succ != 0 {
                    self.b.fence(FenceKind::AcquireRelease);
                } else if self.raw == PAUSE {
                    self.b.call(self.ids.pause, &[]);
                }
            }
            _ => return self.atomic(insn),
        }
        true
    }

    fn here(&self, op: MemOp) -> MemOp {
        op.mmu(self.key.data_idx())
    }

    fn load(&mut self, l: Load, op: MemOp) {
        let base = self.x(l.rs1);
        let v = self.b.load(Type::I64, self.here(op), base, l.imm);
        self.set_x(l.rd, v);
    }

    fn store(&mut self, s: Store, op: MemOp) {
        let (base, v) = (self.x(s.rs1), self.x(s.rs2));
        self.b.store(self.here(op), base, s.imm, v);
    }

    fn load_fp(&mut self, l: Load, ty: Type) {
        if !self.key.fp_on() {
            return self.illegal();
        }
        let base = self.x(l.rs1);
        let op = if ty == Type::F32 { MemOp::U32 } else { MemOp::U64 };
        let mut v = self.b.load(ty, self.here(op), base, l.imm);
        if ty == Type::F32 {
            v = self.b.fbox(v);
        }
        self.mark_fp();
        self.b.set(f_slot(l.rd), v);
    }

    fn store_fp(&mut self, s: Store, op: MemOp) {
        if !self.key.fp_on() {
            return self.illegal();
        }
        let base = self.x(s.rs1);
        let v = self.b.get(f_slot(s.rs2));
        self.b.store_float(self.here(op), base, s.imm, v);
    }

    fn atomic(&mut self, insn: Insn) -> bool {
        let w = MemOp::S32.aligned();
        let d = MemOp::U64.aligned();
        let (amo, op, kind) = match insn {
            Insn::LrW(a) => return self.load_reserved(a, w),
            Insn::LrD(a) => return self.load_reserved(a, d),
            Insn::ScW(a) => return self.store_conditional(a, w),
            Insn::ScD(a) => return self.store_conditional(a, d),
            Insn::AmoswapW(a) => (a, w, RmwKind::Swap),
            Insn::AmoaddW(a) => (a, w, RmwKind::Add),
            Insn::AmoxorW(a) => (a, w, RmwKind::Xor),
            Insn::AmoandW(a) => (a, w, RmwKind::And),
            Insn::AmoorW(a) => (a, w, RmwKind::Or),
            Insn::AmominW(a) => (a, w, RmwKind::MinS),
            Insn::AmomaxW(a) => (a, w, RmwKind::MaxS),
            Insn::AmominuW(a) => (a, w, RmwKind::MinU),
            Insn::AmomaxuW(a) => (a, w, RmwKind::MaxU),
            Insn::AmoswapD(a) => (a, d, RmwKind::Swap),
            Insn::AmoaddD(a) => (a, d, RmwKind::Add),
            Insn::AmoxorD(a) => (a, d, RmwKind::Xor),
            Insn::AmoandD(a) => (a, d, RmwKind::And),
            Insn::AmoorD(a) => (a, d, RmwKind::Or),
            Insn::AmominD(a) => (a, d, RmwKind::MinS),
            Insn::AmomaxD(a) => (a, d, RmwKind::MaxS),
            Insn::AmominuD(a) => (a, d, RmwKind::MinU),
            Insn::AmomaxuD(a) => (a, d, RmwKind::MaxU),
            _ => return false,
        };
        let (addr, v) = (self.x(amo.rs1), self.x(amo.rs2));
        let old = self.b.atomic_rmw(kind, self.here(op), addr, v);
        self.set_x(amo.rd, old);
        true
    }

    /// What a reservation at `addr` looks like: its size is in the low bit.
    fn reservation(&mut self, addr: Val, op: MemOp) -> Val {
        self.b.ori(addr, i64::from(op.bytes() == 4))
    }

    fn load_reserved(&mut self, a: Amo, op: MemOp) -> bool {
        let addr = self.x(a.rs1);
        let v = self.b.load(Type::I64, self.here(op), addr, 0);
        let reservation = self.reservation(addr, op);
        self.b.set(RES_ADDR, reservation);
        self.b.set(RES_VALUE, v);
        self.set_x(a.rd, v);
        true
    }

    /// SC succeeds if the reservation is for this address and memory still holds the value that LR saw.
    fn store_conditional(&mut self, a: Amo, op: MemOp) -> bool {
        // Registers are read anew behind each branch: one on constants is folded and ends the block.
        let addr = self.x(a.rs1);
        let (fail, done, aligned) = (self.b.label(), self.b.label(), self.b.label());
        let held = self.b.get(RES_ADDR);
        let wanted = self.reservation(addr, op);
        self.b.brcond(Cond::Ne, held, wanted, fail);
        let (addr, new) = (self.x(a.rs1), self.x(a.rs2));
        let expected = self.b.get(RES_VALUE);
        let old = self.b.atomic_cas(self.here(op), addr, expected, new);
        let none = self.b.iconst(NO_RESERVATION as i64);
        let failed = self.b.setcond(Cond::Ne, old, expected);
        self.b.set(RES_ADDR, none);
        self.set_x(a.rd, failed);
        self.b.br(done);
        // Without a reservation nothing is accessed, but a misaligned address is still an exception.
        self.b.bind(fail);
        let addr = self.x(a.rs1);
        let low = self.b.andi(addr, i64::from(op.bytes()) - 1);
        let zero = self.b.iconst(0);
        self.b.brcond(Cond::Eq, low, zero, aligned);
        let args = [self.b.iconst(cause::STORE_MISALIGNED as i64), self.x(a.rs1)];
        self.b.call(self.ids.raise, &args);
        self.b.br(aligned);
        self.b.bind(aligned);
        let none = self.b.iconst(NO_RESERVATION as i64);
        let one = self.b.iconst(1);
        self.b.set(RES_ADDR, none);
        self.set_x(a.rd, one);
        self.b.br(done);
        self.b.bind(done);
        self.fp_dirty = false;
        true
    }
}
