//! Random regions: translated code against the interpreter.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM, RAM_SIZE, Rng, State, f, random_memory, random_state, w, x};
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_ir::{
    Builder, Cond, Effects, FenceKind, FpCond, FpMode, HelperId, HelperTable, JumpHint, Label, MemOp, Op,
    Region, RmwKind, Round, Slot, Type, Val,
};
use holdfast_tcg_x64::HostFeatures;

unsafe extern "C" fn pure(_: *mut u8, a: u64, b: u64, c: u64, d: u64, e: u64) -> u64 {
    a.wrapping_mul(3) ^ b.rotate_left(7) ^ c.wrapping_add(d) ^ e.rotate_left(21)
}

unsafe extern "C" fn pure32(_: *mut u8, a: u64, b: u64, c: u64, _: u64, _: u64) -> u64 {
    a.wrapping_mul(5) ^ b.rotate_left(9) ^ c
}

/// Reads and writes pinned and other slots.
unsafe extern "C" fn touch(env: *mut u8, a: u64, b: u64, _: u64, _: u64, _: u64) -> u64 {
    // SAFETY: the environment's guest state is a `State`.
    let s = unsafe { &mut *env.cast::<State>() };
    s.x[10] = s.x[10].wrapping_add(a) ^ s.x[20];
    s.x[21] = s.x[2].wrapping_sub(b);
    s.f[3] ^= s.f[4].rotate_left(1);
    s.x[8].rotate_left(3)
}

unsafe extern "C" fn maybe_fault(env: *mut u8, a: u64, _: u64, _: u64, _: u64, _: u64) -> HelperRet {
    // SAFETY: the environment's guest state is a `State`.
    let s = unsafe { &mut *env.cast::<State>() };
    s.last_helper[0] = s.x[9] ^ s.x[22];
    if a & 15 == 3 { HelperRet::exit(0x123) } else { HelperRet::ok(a ^ 0x55) }
}

fn helpers() -> (HelperTable, [HelperId; 4]) {
    let mut t = HelperTable::new();
    let a = t.plain("pure", pure, Type::I64, 5, Effects::PURE);
    let b = t.plain("touch", touch, Type::I64, 2, Effects::READS_SLOTS | Effects::WRITES_SLOTS);
    let c = t.faulting("maybe_fault", maybe_fault, Type::I64, 1, Effects::READS_SLOTS | Effects::MAY_FLUSH);
    let d = t.plain("pure32", pure32, Type::I32, 3, Effects::USES_FP);
    (t, [a, b, c, d])
}

struct Gen<'a> {
    b: &'a mut Builder,
    rng: &'a mut Rng,
    helpers: [HelperId; 4],
    ints: Vec<Val>,
    words: Vec<Val>,
    doubles: Vec<Val>,
    singles: Vec<Val>,
    pc: u64,
    fp: bool,
    leaving: Vec<Label>,
}

const BIN: [Op; 25] = [
    Op::Add,
    Op::Sub,
    Op::And,
    Op::Or,
    Op::Xor,
    Op::Andn,
    Op::Shl,
    Op::ShrU,
    Op::ShrS,
    Op::RotL,
    Op::RotR,
    Op::Mul,
    Op::MulHS,
    Op::MulHU,
    Op::MulHSU,
    Op::DivS,
    Op::DivU,
    Op::RemS,
    Op::RemU,
    Op::MinS,
    Op::MaxS,
    Op::MinU,
    Op::MaxU,
    Op::Add,
    Op::Add,
];
const UN: [Op; 10] =
    [Op::Neg, Op::Not, Op::Clz, Op::Ctz, Op::Popcnt, Op::Bswap, Op::Ext8S, Op::Ext16S, Op::Ext8U, Op::Ext16U];

impl Gen<'_> {
    fn forget(&mut self) {
        self.ints.clear();
        self.words.clear();
        self.doubles.clear();
        self.singles.clear();
    }

    fn int(&mut self) -> Val {
        let n = self.rng.below(10);
        if n < 5 && !self.ints.is_empty() {
            // Recent values more often.
            let l = self.ints.len() as u64;
            let back = if self.rng.below(3) > 0 { self.rng.below(l.min(3)) } else { self.rng.below(l) };
            return self.ints[(l - 1 - back) as usize];
        }
        if n == 9 {
            let c = self.rng.int();
            return self.b.iconst(c as i64);
        }
        let s = self.rng.below(32) as usize;
        let v = self.b.get(x(s));
        self.ints.push(v);
        v
    }

    fn word(&mut self) -> Val {
        let n = self.rng.below(10);
        if n < 4 && !self.words.is_empty() {
            return self.words[self.rng.below(self.words.len() as u64) as usize];
        }
        let v = match n {
            4 => {
                let c = self.rng.int();
                self.b.iconst32(c as i32)
            }
            5 | 6 => {
                let s = self.rng.below(16) as usize;
                self.b.get(w(s))
            }
            _ => {
                let a = self.int();
                self.b.trunc(a)
            }
        };
        self.words.push(v);
        v
    }

    fn double(&mut self) -> Val {
        if self.rng.below(2) == 0 && !self.doubles.is_empty() {
            return self.doubles[self.rng.below(self.doubles.len() as u64) as usize];
        }
        let s = self.rng.below(32) as usize;
        let v = self.b.get(f(s));
        self.doubles.push(v);
        v
    }

    fn single(&mut self) -> Val {
        if self.rng.below(2) == 0 && !self.singles.is_empty() {
            return self.singles[self.rng.below(self.singles.len() as u64) as usize];
        }
        let d = self.double();
        let v = self.b.funbox(d);
        self.singles.push(v);
        v
    }

    fn cond(&mut self) -> Cond {
        Cond::from_index(self.rng.below(10) as u16)
    }

    /// An address, nearly always in RAM.
    fn addr(&mut self) -> (Val, i32) {
        let v = self.int();
        if self.rng.below(40) == 0 {
            return (v, 0);
        }
        if self.rng.below(5) == 0 {
            // A constant address, as code that addresses its data relative to the pc makes.
            let at = RAM as i64 + self.rng.below(RAM_SIZE as u64 / 2) as i64;
            let at = if self.rng.below(2) == 0 { at & !7 } else { at };
            return (self.b.iconst(at), self.rng.pick(&[0, 8, -8, 0x7ff]));
        }
        let masked = self.b.andi(v, (RAM_SIZE as i64 / 2 - 1) & if self.rng.below(2) == 0 { !7 } else { -1 });
        let base = self.b.iconst(RAM as i64);
        let a = self.b.add(masked, base);
        if self.rng.below(4) == 0 {
            return self.table(a);
        }
        (a, self.rng.pick(&[0, 0, 8, 16, 0x700, -1, 24, 4091]))
    }

    /// An address in a small table: at `base` or at a constant address, which may be at the end of a page.
    fn table(&mut self, base: Val) -> (Val, i32) {
        let index = self.int();
        let index = match self.rng.below(3) {
            0 => self.b.andi(index, 0xff),
            1 => {
                let low = self.b.trunc(index);
                let low = self.b.unary(Op::Ext8U, low);
                self.b.zext(low)
            }
            _ => self.b.unary(Op::Ext8U, index),
        };
        let by = self.rng.below(4) as i64;
        let index = self.b.shli(index, by);
        match self.rng.below(4) {
            0 => {
                let at = self.rng.pick(&[0, 0x800, 0xd00, 0xffc]);
                (self.b.addi(index, RAM as i64 + at), 0)
            }
            1 => (self.b.add(index, base), 8),
            _ => (self.b.add(base, index), 0),
        }
    }

    fn mode(&mut self) -> FpMode {
        let r =
            self.rng.pick(&[Round::Dynamic, Round::Dynamic, Round::Dynamic, Round::NearestAway, Round::Up]);
        FpMode::canonical(r)
    }

    fn float_op(&mut self) {
        let mode = self.mode();
        let wide = self.rng.below(2) == 0;
        let (ty, a, b, c) = if wide {
            (Type::F64, self.double(), self.double(), self.double())
        } else {
            (Type::F32, self.single(), self.single(), self.single())
        };
        let other = if wide { Type::F32 } else { Type::F64 };
        let bin = [Op::FAdd, Op::FSub, Op::FMul, Op::FDiv, Op::FMin, Op::FMax];
        let v = match self.rng.below(14) {
            0..=4 => {
                let op = self.rng.pick(&bin);
                self.b.fbinary(op, mode, a, b)
            }
            5 => self.b.fsqrt(mode, a),
            6 | 7 => {
                let (n, m) = (self.rng.below(2) == 0, self.rng.below(2) == 0);
                self.b.fmuladd(mode.negate_product(n).negate_addend(m), a, b, c)
            }
            8 => {
                let op = self.rng.pick(&[Op::FSgnj, Op::FSgnjn, Op::FSgnjx]);
                let b = if self.rng.below(3) == 0 { a } else { b };
                self.b.fsgn(op, a, b)
            }
            9 => {
                let cc = self.rng.pick(&[FpCond::Eq, FpCond::Lt, FpCond::Le]);
                let v = self.b.fcmp(cc, a, b);
                return self.ints.push(v);
            }
            10 => return self.float_to_int(mode, a),
            11 => return self.int_to_float(mode, ty),
            12 => {
                let v = self.b.fcvt(Op::FCvtFF, mode, other, a);
                return if wide { self.singles.push(v) } else { self.doubles.push(v) };
            }
            _ => {
                let (cc, p, q) = (self.cond(), self.int(), self.int());
                self.b.movcond(cc, (p, q), a, b)
            }
        };
        if wide { self.doubles.push(v) } else { self.singles.push(v) }
    }

    fn float_to_int(&mut self, mode: FpMode, a: Val) {
        let mode = if self.rng.below(2) == 0 { FpMode::canonical(Round::Zero) } else { mode };
        let op = self.rng.pick(&[Op::FCvtToS, Op::FCvtToU]);
        match self.rng.below(4) {
            0 => {
                let v = self.b.fcvt(op, mode, Type::I32, a);
                self.words.push(v);
            }
            1 => {
                let v = self.b.fclass(a);
                self.ints.push(v);
            }
            2 => {
                let v = self.b.fbits(a);
                if self.b.ty(v) == Type::I32 { self.words.push(v) } else { self.ints.push(v) }
            }
            _ => {
                let v = self.b.fcvt(op, mode, Type::I64, a);
                self.ints.push(v);
            }
        }
    }

    fn int_to_float(&mut self, mode: FpMode, ty: Type) {
        let op = self.rng.pick(&[Op::FCvtFromS, Op::FCvtFromU]);
        let wide_int = self.rng.below(2) == 0;
        let a = if wide_int { self.int() } else { self.word() };
        let v = if self.rng.below(4) == 0 { self.b.ffrom_bits(a) } else { self.b.fcvt(op, mode, ty, a) };
        if self.b.ty(v) == Type::F64 { self.doubles.push(v) } else { self.singles.push(v) }
    }

    fn int_op(&mut self) {
        if self.rng.below(3) == 0 {
            let (a, b) = (self.word(), self.word());
            let v = match self.rng.below(6) {
                0 => {
                    let op = self.rng.pick(&UN);
                    self.b.unary(op, a)
                }
                1 => {
                    let (cc, t) = (self.cond(), self.word());
                    self.b.movcond(cc, (a, b), t, a)
                }
                _ => {
                    let op = self.rng.pick(&BIN);
                    self.b.binary(op, a, b)
                }
            };
            self.words.push(v);
            let v = if self.rng.below(2) == 0 { self.b.sext(v) } else { self.b.zext(v) };
            return self.ints.push(v);
        }
        let (a, b) = (self.int(), self.int());
        let v = match self.rng.below(9) {
            0 => {
                let op = self.rng.pick(&UN);
                self.b.unary(op, a)
            }
            1 => {
                let (cc, t, u) = (self.cond(), self.int(), self.int());
                self.b.movcond(cc, (a, b), t, u)
            }
            2 => {
                let cc = self.cond();
                self.b.setcond(cc, a, b)
            }
            3 => {
                let n = self.rng.below(5) as i64;
                self.b.shadd(a, n, b)
            }
            4 if self.rng.below(3) == 0 => {
                let n = self.rng.pick(&[32, 48, 56, 40]);
                let t = self.b.shli(a, n);
                if self.rng.below(2) == 0 { self.b.shrui(t, n) } else { self.b.shrsi(t, n) }
            }
            4 => {
                let n = self.rng.below(4096) as i64 - 2048;
                let op = self.rng.pick(&BIN);
                self.b.binary_imm(op, a, n)
            }
            _ => {
                let op = self.rng.pick(&BIN);
                self.b.binary(op, a, b)
            }
        };
        self.ints.push(v);
    }

    /// Several accesses off one base, now and then across a page, with other things between them.
    fn cluster(&mut self) {
        let v = self.int();
        let base = self.rng.pick(&[RAM as i64 + 0x2000, RAM as i64 + 0x3ff0, RAM as i64 + 0x4f80]);
        let masked = self.b.andi(v, 0x78);
        let base = self.b.iconst(base);
        let a = self.b.add(masked, base);
        self.ints.push(a);
        for _ in 0..2 + self.rng.below(6) {
            let d = self.rng.pick(&[0, 8, 16, 24, -8, 4, 12, 100, 200, 0x500]);
            let mem = MemOp(self.rng.below(4) as u16 | (self.rng.below(2) as u16) << 3);
            match self.rng.below(5) {
                0 | 1 => {
                    let v = self.b.load(Type::I64, mem, a, d);
                    self.ints.push(v);
                    if self.rng.below(2) == 0 {
                        let s = self.rng.pick(&common::PINS);
                        self.b.set(s, v);
                    }
                }
                2 | 3 => {
                    let v = self.int();
                    self.b.store(mem, a, d, v);
                }
                _ => self.statement(),
            }
        }
    }

    fn memory_op(&mut self) {
        if self.rng.below(6) == 0 {
            return self.cluster();
        }
        let (a, d) = self.addr();
        let size = self.rng.below(4) as u16;
        let mut mem = MemOp(size | (self.rng.below(2) as u16) << 3).mmu(self.rng.below(2) as u8);
        if self.rng.below(8) == 0 {
            mem = mem.big_endian();
        }
        if self.rng.below(4) == 0 {
            mem = mem.aligned();
        }
        match self.rng.below(10) {
            0..=3 => {
                let v = self.b.load(Type::I64, mem, a, d);
                self.ints.push(v);
            }
            4..=6 => {
                let v = self.int();
                self.b.store(mem, a, d, v);
            }
            7 if self.fp => {
                let v = self.b.load(Type::F64, MemOp(mem.0 & !15 | 3), a, d);
                self.doubles.push(v);
                let v = self.single();
                self.b.store(MemOp(mem.0 & !15 | 2), a, d, v);
            }
            8 => {
                let kind = RmwKind::from_index(self.rng.below(9) as u16);
                let v = self.int();
                let old = self.b.atomic_rmw(kind, mem, a, v);
                self.ints.push(old);
            }
            9 => {
                let (e, n) = (self.int(), self.int());
                let old = self.b.atomic_cas(mem, a, e, n);
                self.ints.push(old);
            }
            _ => {
                let mem = MemOp(mem.0 & !7 | (size % 3));
                let v = self.b.load(Type::I32, mem, a, d);
                self.words.push(v);
                let v = self.word();
                self.b.store(mem, a, d, v);
            }
        }
    }

    fn call(&mut self) {
        let args = [self.int(), self.int(), self.int(), self.int(), self.int()];
        match self.rng.below(4) {
            0 => {
                let v = self.b.call(self.helpers[0], &args);
                self.ints.push(v);
            }
            1 => {
                let v = self.b.call(self.helpers[1], &args[..2]);
                self.ints.push(v);
            }
            2 => {
                let v = self.b.call(self.helpers[2], &args[..1]);
                self.ints.push(v);
            }
            _ => {
                let v = self.b.call(self.helpers[3], &args[..3]);
                self.words.push(v);
            }
        }
    }

    fn set(&mut self) {
        match self.rng.below(if self.fp { 6 } else { 4 }) {
            0 => {
                let (v, s) = (self.word(), self.rng.below(16) as usize);
                self.b.set(w(s), v);
            }
            4 => {
                let (v, s) = (self.double(), self.rng.below(32) as usize);
                self.b.set(f(s), v);
            }
            5 => {
                let (v, s) = (self.single(), self.rng.below(32) as usize);
                let v = self.b.fbox(v);
                self.b.set(f(s), v);
                if self.rng.below(2) == 0 {
                    self.doubles.push(v);
                }
            }
            _ => {
                let v = self.int();
                let s: Slot = if self.rng.below(2) == 0 {
                    self.rng.pick(&common::PINS)
                } else {
                    x(self.rng.below(32) as usize)
                };
                self.b.set(s, v);
            }
        }
    }

    fn statement(&mut self) {
        if self.rng.below(3) == 0 {
            self.pc += 4;
            self.b.insn(self.pc, 4);
        }
        match self.rng.below(16) {
            0..=4 => self.int_op(),
            5..=8 => self.set(),
            9 | 10 => self.memory_op(),
            11 if self.rng.below(4) == 0 => self.call(),
            12 if self.rng.below(6) == 0 => self.b.fence(FenceKind::Full),
            13..=15 if self.fp => self.float_op(),
            _ => self.int_op(),
        }
    }

    fn branch(&mut self, l: Label) {
        let cc = self.cond();
        match self.rng.below(3) {
            0 => {
                let (a, b) = (self.word(), self.word());
                self.b.brcond(cc, a, b, l);
            }
            1 => {
                let (a, b) = (self.int(), self.int());
                let c = self.b.setcond(cc, a, b);
                self.b.brnz(c, l);
            }
            _ => {
                let (a, b) = (self.int(), self.int());
                self.b.brcond(cc, a, b, l);
            }
        }
        self.after_branch();
        if self.rng.below(4) == 0 {
            // A branch that leaves the region.
            let (out, a, b) = (self.b.label(), self.int(), self.int());
            self.b.brcond(cc, a, b, out);
            self.leaving.push(out);
        }
        self.after_branch();
    }

    fn after_branch(&mut self) {
        // A branch that folded to a jump has ended the block.
        if self.b.region().insts.last().is_some_and(|i| i.op == Op::Label) {
            self.forget();
        }
    }
}

fn region(b: &mut Builder, rng: &mut Rng, ids: [HelperId; 4], fp: bool) -> Region {
    let entry = 0xffff_ffff_8123_4000 + rng.below(512) * 4;
    b.start(entry);
    let (ints, words, doubles, singles) = Default::default();
    let mut g =
        Gen { b, rng, helpers: ids, ints, words, doubles, singles, pc: entry, fp, leaving: Vec::new() };
    g.b.insn(entry, 4);
    let blocks = 1 + g.rng.below(4);
    let labels: Vec<Label> = (0..blocks).map(|_| g.b.label()).collect();
    // A loop over everything, a few times round by a counter that nothing else writes.
    let counter = Slot::i64(576 + 7 * 8);
    let top = (g.rng.below(3) == 0).then(|| g.b.label_at(entry));
    if let Some(top) = top {
        g.b.bind(top);
    }
    for n in 0..blocks as usize {
        for _ in 0..1 + g.rng.below(12) {
            g.statement();
        }
        let rest = blocks - n as u64;
        let target = labels[n + g.rng.below(rest) as usize];
        g.branch(target);
        for _ in 0..g.rng.below(6) {
            g.statement();
        }
        g.b.bind(labels[n]);
        g.forget();
    }
    if let Some(top) = top {
        let c = g.b.get(counter);
        let c = g.b.addi(c, 1);
        g.b.set(counter, c);
        let limit = g.b.iconst(3);
        g.b.brcond(Cond::LtU, c, limit, top);
    }
    for _ in 0..g.rng.below(6) {
        g.statement();
    }
    match g.rng.below(5) {
        0 => g.b.goto_pc(entry + 0x100),
        1 => g.b.goto_pc(0xffff_ffff_8123_5000 + 0x100),
        2 => {
            let v = g.int();
            g.b.goto_reg(v, JumpHint::Jump);
        }
        3 => {
            let v = g.int();
            g.b.exit_reg(0x111, v);
        }
        _ => g.b.exit(0x222, entry + 8),
    }
    for l in std::mem::take(&mut g.leaving) {
        g.b.bind(l);
        let to = entry / 4096 * 4096 + g.rng.below(1024) * 4;
        // A jump to the entry would go round in translated code, where the interpreter leaves.
        g.b.goto_pc(if to == entry { to ^ 0x800 } else { to });
    }
    g.b.take()
}

fn run(seed: u64, count: u64, features: HostFeatures, fp: bool) {
    let (table, ids) = helpers();
    let mut m = Machine::new(table.clone(), features);
    let mut b = Builder::new(&table);
    let mut rng = Rng(seed);
    for n in 0..count {
        let r = region(&mut b, &mut rng, ids, fp);
        m.ram.fill = n % 3 != 0;
        m.retries = if n % 5 == 0 { 2 } else { i32::MAX };
        m.translator.share_probes(n % 4 != 0);
        let state = random_state(&mut rng);
        let memory = random_memory(&mut rng);
        let mxcsr = 0x1f80 | (rng.below(4) as u32) << 13;
        let a = m.both(&r, &state, &memory, mxcsr);
        // Again with the flags that are up and a TLB that is warm.
        m.both(&r, &a.state, &a.memory, a.mxcsr);
    }
}

#[test]
fn integers() {
    run(0x1234_5678_9abc, 4000, HostFeatures::detect(), false);
}

#[test]
fn integers_baseline() {
    run(0x9876_5432_1111, 2000, HostFeatures::baseline(), false);
}

#[test]
fn with_floats() {
    run(0xfeed_f00d_0001, 4000, HostFeatures::detect(), true);
}

#[test]
fn with_floats_baseline() {
    run(0xfeed_f00d_0777, 2000, HostFeatures::baseline(), true);
}
