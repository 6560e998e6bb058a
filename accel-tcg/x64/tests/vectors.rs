//! Random regions on vectors: translated code against the interpreter, which runs each instruction alone.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM, RAM_SIZE, Rng, random_memory, random_state, v, x};
use holdfast_tcg_ir::{Builder, Effects, HelperTable, MemOp, Slot, Type, Val, VecEncoding, VecForm, VecInsn};
use holdfast_tcg_x64::HostFeatures;

const fn insn(form: VecForm, pp: u8, map: u8, opcode: u8) -> VecInsn {
    VecInsn { form, encoding: VecEncoding::Either, pp, map, opcode, w: false, ext: 0, imm: None }
}

const fn imm(v: VecInsn, n: u8) -> VecInsn {
    VecInsn { imm: Some(n), ..v }
}

const fn vex(v: VecInsn, w: bool) -> VecInsn {
    VecInsn { encoding: VecEncoding::Vex, w, ..v }
}

/// Binary: (instruction, raises flags).
const BINARY: [(VecInsn, bool); 8] = [
    (insn(VecForm::Binary, 0, 1, 0x58), true),             // addps
    (insn(VecForm::Binary, 3, 1, 0x59), true),             // mulsd
    (insn(VecForm::Binary, 1, 1, 0xfe), false),            // paddd
    (insn(VecForm::Binary, 1, 1, 0xf8), false),            // psubb
    (insn(VecForm::Binary, 1, 2, 0x00), false),            // pshufb
    (imm(insn(VecForm::Binary, 0, 1, 0xc6), 0x1b), false), // shufps
    (imm(insn(VecForm::Binary, 1, 3, 0x0f), 5), false),    // palignr
    (insn(VecForm::Binary, 1, 1, 0xd3), false),            // psrlq
];

const UNARY: [(VecInsn, bool); 5] = [
    (insn(VecForm::Unary, 1, 1, 0x51), true),             // sqrtpd
    (imm(insn(VecForm::Unary, 1, 1, 0x70), 0x39), false), // pshufd
    (insn(VecForm::Unary, 0, 1, 0x5b), true),             // cvtdq2ps
    (insn(VecForm::Unary, 1, 2, 0x1c), false),            // pabsb
    (insn(VecForm::Unary, 1, 2, 0x20), false),            // pmovsxbw
];

extern "C" fn nothing(_: *mut u8, a: u64, _: u64, _: u64, _: u64, _: u64) -> u64 {
    a ^ 0x1234
}

struct Gen<'a> {
    b: &'a mut Builder,
    rng: &'a mut Rng,
    vals: Vec<Val>,
    ints: Vec<Val>,
    avx: bool,
    call: holdfast_tcg_ir::HelperId,
}

impl Gen<'_> {
    fn vector(&mut self) -> Val {
        if self.vals.is_empty() || self.rng.below(3) == 0 {
            let n = self.rng.below(24) as usize;
            let r = self.b.get(v(n));
            self.vals.push(r);
            return r;
        }
        self.rng.pick(&self.vals.clone())
    }

    fn address(&mut self) -> (Val, i32) {
        let at = RAM + self.rng.below(RAM_SIZE as u64 - 64);
        let disp = self.rng.below(32) as i32;
        (self.b.iconst(at as i64), disp)
    }

    fn int(&mut self) -> Val {
        if self.ints.is_empty() || self.rng.below(2) == 0 {
            let n = self.rng.below(32) as usize;
            let r = self.b.get(x(n));
            self.ints.push(r);
            return r;
        }
        self.rng.pick(&self.ints.clone())
    }

    fn statement(&mut self) {
        let a = self.vector();
        match self.rng.below(15) {
            0..=2 => {
                let (i, fp) = self.rng.pick(&BINARY);
                let b = self.vector();
                let r = self.b.vec(i, fp, Type::V128, &[a, b]);
                self.vals.push(r);
            }
            3 | 4 => {
                let (i, fp) = self.rng.pick(&UNARY);
                let r = self.b.vec(i, fp, Type::V128, &[a]);
                self.vals.push(r);
            }
            5 => {
                let mut i = imm(insn(VecForm::ShiftImm, 1, 1, 0x72), self.rng.below(33) as u8);
                i.ext = self.rng.pick(&[2, 4, 6]);
                let r = self.b.vec(i, false, Type::V128, &[a]);
                self.vals.push(r);
            }
            6 => {
                let n = self.rng.below(24) as usize;
                self.b.set(v(n), a);
            }
            7 => {
                // pextrd, pmovmskb, comisd
                let b = self.vector();
                let r = match self.rng.below(3) {
                    0 => {
                        let r =
                            self.b.vec(imm(insn(VecForm::Extract, 1, 3, 0x16), 2), false, Type::I32, &[a]);
                        self.b.zext(r)
                    }
                    1 => {
                        let r = self.b.vec(insn(VecForm::Unary, 1, 1, 0xd7), false, Type::I32, &[a]);
                        self.b.sext(r)
                    }
                    _ => self.b.vec(insn(VecForm::Flags, 1, 1, 0x2f), true, Type::I64, &[a, b]),
                };
                let n = self.rng.below(32) as usize;
                self.b.set(x(n), r);
                self.ints.push(r);
            }
            kind => self.statement_more(a, kind),
        }
    }

    fn statement_more(&mut self, a: Val, kind: u64) {
        match kind {
            8 => {
                // pinsrd, cvtsi2sd, movq
                let n = self.int();
                let w = VecInsn { w: true, ..insn(VecForm::Binary, 3, 1, 0x2a) };
                let r = match self.rng.below(3) {
                    0 => {
                        let n = self.b.trunc(n);
                        self.b.vec(imm(insn(VecForm::Binary, 1, 3, 0x22), 1), false, Type::V128, &[a, n])
                    }
                    1 => self.b.vec(w, true, Type::V128, &[a, n]),
                    _ => {
                        let i = VecInsn { w: true, ..insn(VecForm::Unary, 1, 1, 0x6e) };
                        self.b.vec(i, false, Type::V128, &[n])
                    }
                };
                self.vals.push(r);
            }
            9 => {
                let (p, d) = self.address();
                let mem = MemOp(self.rng.pick(&[2, 3, 4, 4]));
                let r = self.b.load(Type::V128, mem, p, d);
                self.vals.push(r);
            }
            10 => {
                let (p, d) = self.address();
                let mem = MemOp(self.rng.pick(&[2, 3, 4, 4]));
                self.b.store(mem, p, d, a);
            }
            11 if self.avx => {
                let (b, c) = (self.vector(), self.vector());
                let i = if self.rng.below(2) == 0 {
                    vex(insn(VecForm::Is4, 1, 3, 0x4c), false) // vpblendvb
                } else {
                    vex(insn(VecForm::Ternary, 1, 2, 0xb8), true) // vfmadd231pd
                };
                let r = self.b.vec(i, i.form == VecForm::Ternary, Type::V128, &[a, b, c]);
                self.vals.push(r);
            }
            12 => {
                let (c, b) = (self.int(), self.vector());
                let c = self.b.andi(c, 1);
                let r = self.b.select(c, a, b);
                self.vals.push(r);
            }
            13 => {
                let n = self.int();
                let r = self.b.call(self.call, &[n]);
                self.ints.push(r);
            }
            _ => self.host(),
        }
    }

    /// `movups xmm0, [a]; paddb xmm0, [b]; movups [c], xmm0; mov rax, [x28]; not rax; mov [x29], rax`
    fn host(&mut self) {
        let n = |g: &mut Self| 640 + 16 * g.rng.below(24) as u32;
        let (a, b, c) = (n(self), n(self), n(self));
        let mut code = vec![0x0f, 0x10, 0x85];
        code.extend(a.to_le_bytes());
        code.extend([0x66, 0x0f, 0xfc, 0x85]);
        code.extend(b.to_le_bytes());
        code.extend([0x0f, 0x11, 0x85]);
        code.extend(c.to_le_bytes());
        code.extend([0x48, 0x8b, 0x85]);
        code.extend((28u32 * 8).to_le_bytes());
        code.extend([0x48, 0xf7, 0xd0, 0x48, 0x89, 0x85]);
        code.extend((29u32 * 8).to_le_bytes());
        self.b.host(&code, &[Slot::new(c, Type::V128), x(29)]);
        // Everything below is gone: xmm1 to xmm15 too.
        self.vals.truncate(self.vals.len() - self.rng.below(self.vals.len() as u64) as usize);
    }
}

fn run(seed: u64, count: u64, features: HostFeatures) {
    let mut table = HelperTable::new();
    let call = table.plain("nothing", nothing, Type::I64, 1, Effects::empty());
    let mut m = Machine::new(table.clone(), features);
    let mut b = Builder::new(&table);
    let mut rng = Rng(seed);
    for n in 0..count {
        b.start(0x1000);
        b.insn(0x1000, 4);
        let (vals, ints) = Default::default();
        let avx = features.avx && features.fma;
        let mut g = Gen { b: &mut b, rng: &mut rng, vals, ints, avx, call };
        for _ in 0..4 + g.rng.below(60) {
            g.statement();
        }
        for to in 0..g.rng.below(20) as usize {
            let a = g.vector();
            g.b.set(v(to), a);
        }
        b.exit(0x222, 0x1004);
        let r = b.take();
        m.ram.fill = n % 3 != 0;
        let (state, memory) = (random_state(&mut rng), random_memory(&mut rng));
        let mxcsr = 0x1f80 | (rng.below(4) as u32) << 13;
        let a = m.both(&r, &state, &memory, mxcsr);
        m.both(&r, &a.state, &a.memory, a.mxcsr);
    }
}

#[test]
fn vectors() {
    run(0x1234_5678_9abc, 3000, HostFeatures::detect());
}

#[test]
fn vectors_baseline() {
    run(0x9876_5432_1111, 2000, HostFeatures::baseline());
}
