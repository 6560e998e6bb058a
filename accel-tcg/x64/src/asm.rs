//! The emitter: writes x86-64 instructions into a fixed buffer.
//!
//! One small function per instruction form. Nothing is checked but the end of the buffer, and that only by
//! [`Asm::room`] once per IR instruction; writing past it wraps around (and the code is thrown away).

/// Bytes in the buffer: the longest code of one region.
pub const BUFFER: usize = 64 * 1024;

/// Bytes behind the buffer, so that eight can be stored at any position.
const SLACK: usize = 8;

use holdfast_tcg_ir::VecInsn;

mod operand;

pub use operand::{Alu, Cc, Mem, Reg, Rm, Shift, Xmm};

/// Opcode map and mandatory prefix of an instruction.
#[derive(Clone, Copy)]
struct Opc {
    prefix: u8,
    map: u8,
    op: u8,
}

const fn one(op: u8) -> Opc {
    Opc { prefix: 0, map: 0, op }
}
const fn two(prefix: u8, op: u8) -> Opc {
    Opc { prefix, map: 1, op }
}
const fn three8(prefix: u8, op: u8) -> Opc {
    Opc { prefix, map: 2, op }
}

/// No-operations by length.
const NOPS: [&[u8]; 4] = [&[], &[0x90], &[0x66, 0x90], &[0x0f, 0x1f, 0x00]];

/// The code buffer and the current position.
pub struct Asm {
    buf: Box<[u8; BUFFER + SLACK]>,
    pos: usize,
    overflow: bool,
}

impl Default for Asm {
    fn default() -> Self {
        let zeroes = vec![0u8; BUFFER + SLACK].into_boxed_slice();
        let buf = zeroes.try_into().unwrap_or_else(|_| Box::new([0; BUFFER + SLACK]));
        Self { buf, pos: 0, overflow: false }
    }
}

impl Asm {
    /// An empty buffer.
    pub fn new() -> Self {
        Self::default()
    }

    /// Starts again.
    pub fn clear(&mut self) {
        self.pos = 0;
        self.overflow = false;
    }

    /// Current offset.
    #[inline]
    pub fn pos(&self) -> usize {
        self.pos
    }

    /// The bytes so far.
    pub fn bytes(&self) -> &[u8] {
        &self.buf[..self.pos.min(BUFFER)]
    }

    /// Whether at least 4 KiB are left; once false, the code is spoilt and stays so.
    #[inline]
    pub fn room(&mut self) -> bool {
        if self.pos > BUFFER - 4096 {
            self.overflow = true;
            self.pos = 0;
        }
        !self.overflow
    }

    /// Whether the buffer overflowed.
    pub fn overflowed(&self) -> bool {
        self.overflow
    }

    /// Writes the low `len` (at most 8) bytes of `x`: all eight at once, for a position that is stored and read again for
    /// every byte costs more than the bytes.
    #[inline]
    fn put(&mut self, x: u64, len: usize) {
        let at = self.pos & (BUFFER - 1);
        self.buf[at..at + 8].copy_from_slice(&x.to_le_bytes());
        self.pos += len;
    }

    #[inline]
    fn b(&mut self, x: u8) {
        self.put(u64::from(x), 1);
    }

    #[inline]
    fn d(&mut self, x: u32) {
        self.put(u64::from(x), 4);
    }

    /// The low `len` (at most 8) bytes of `x`.
    #[inline]
    pub fn data(&mut self, x: u64, len: usize) {
        self.put(x, len);
    }

    /// Raw bytes (constants behind the code).
    pub fn raw(&mut self, bytes: &[u8]) {
        for &x in bytes {
            self.b(x);
        }
    }

    /// Overwrites the 32-bit field at `at`.
    #[inline]
    pub fn patch32(&mut self, at: usize, x: u32) {
        let at = at & (BUFFER - 1);
        self.buf[at..at + 4].copy_from_slice(&x.to_le_bytes());
    }

    /// Makes the rel32 at `at` reach `target` (an offset).
    pub fn patch_rel(&mut self, at: usize, target: usize) {
        self.patch32(at, (target as u32).wrapping_sub(at as u32 + 4));
    }

    #[inline]
    fn modrm(&mut self, reg: u8, rm: Rm, imm_len: u32) {
        let reg = (reg & 7) << 3;
        match rm {
            Rm::R(r) => self.b(0xc0 | reg | r & 7),
            Rm::M(m) => self.modrm_mem(reg, m, imm_len),
        }
    }

    fn modrm_mem(&mut self, reg: u8, m: Mem, imm_len: u32) {
        if m.base == Mem::RIP {
            let end = self.pos as u32 + 5 + imm_len;
            let rel = (m.disp as u32).wrapping_sub(end);
            return self.put(u64::from(reg | 5) | u64::from(rel) << 8, 5);
        }
        let base = m.base & 7;
        let (md, disp_len) = if m.disp == 0 && base != 5 {
            (0, 0)
        } else if m.disp == i32::from(m.disp as i8) {
            (0x40, 1)
        } else {
            (0x80, 4)
        };
        let disp = u64::from(m.disp as u32);
        if m.index != Mem::NONE {
            let sib = m.scale << 6 | (m.index & 7) << 3 | base;
            self.put(u64::from(md | reg | 4) | u64::from(sib) << 8 | disp << 16, 2 + disp_len);
        } else if base == 4 {
            self.put(u64::from(md | reg | 4) | 0x24 << 8 | disp << 16, 2 + disp_len);
        } else {
            self.put(u64::from(md | reg | base) | disp << 8, 1 + disp_len);
        }
    }

    /// `rex` forces a REX prefix (byte registers).
    #[inline]
    fn enc(&mut self, o: Opc, w: bool, reg: u8, rm: Rm, more: (bool, u32)) {
        let (force, imm_len) = more;
        let (mut bytes, mut len) = (0, 0);
        let mut add = |x: u8| {
            bytes |= u64::from(x) << (8 * len);
            len += 1;
        };
        if o.prefix != 0 {
            add(o.prefix);
        }
        let (x, b) = match rm {
            Rm::R(r) => (0, r >> 3),
            Rm::M(m) => {
                let x = if m.index == Mem::NONE { 0 } else { m.index >> 3 };
                (x, if m.base == Mem::RIP { 0 } else { m.base >> 3 })
            }
        };
        let rex = (w as u8) << 3 | (reg >> 3) << 2 | x << 1 | b;
        if rex != 0 || force {
            add(0x40 | rex);
        }
        match o.map {
            0 => {}
            1 => add(0x0f),
            2 => {
                add(0x0f);
                add(0x38);
            }
            _ => {
                add(0x0f);
                add(0x3a);
            }
        }
        add(o.op);
        self.put(bytes, len);
        self.modrm(reg, rm, imm_len);
    }

    /// Three-byte VEX, L = 0. `pp`: 0 none, 1 66, 2 F3, 3 F2. `map`: 1 0F, 2 0F38, 3 0F3A.
    fn vex(&mut self, (pp, map, op): (u8, u8, u8), w: bool, reg: u8, vvvv: u8, rm: Rm) {
        self.vex_imm((pp, map, op), w, reg, (vvvv, u32::from(map == 3)), rm);
    }

    /// The same with `imm_len` bytes of immediate to follow; the two-byte form where it will do.
    fn vex_imm(&mut self, (pp, map, op): (u8, u8, u8), w: bool, reg: u8, (vvvv, imm_len): (u8, u32), rm: Rm) {
        let (x, b) = match rm {
            Rm::R(r) => (0, r >> 3),
            Rm::M(m) => {
                let x = if m.index == Mem::NONE { 0 } else { m.index >> 3 };
                (x, if m.base == Mem::RIP { 0 } else { m.base >> 3 })
            }
        };
        if x == 0 && b == 0 && !w && map == 1 {
            let second = (reg >> 3 ^ 1) << 7 | (!vvvv & 15) << 3 | pp;
            self.put(0xc5 | u64::from(second) << 8 | u64::from(op) << 16, 3);
            return self.modrm(reg, rm, imm_len);
        }
        let second = ((reg >> 3 ^ 1) << 7) | ((x ^ 1) << 6) | ((b ^ 1) << 5) | map;
        let third = (w as u8) << 7 | (!vvvv & 15) << 3 | pp;
        self.put(0xc4 | u64::from(second) << 8 | u64::from(third) << 16 | u64::from(op) << 24, 4);
        self.modrm(reg, rm, imm_len);
    }

    // ---- the TLB probe ----

    /// What all probes have in common, which is the greater part of most regions, as words: `and t1, mask; and t2, -4096;
    /// add t2, r15; cmp t2, [rbp + t1 + array]; jne ...; mov t1, [rbp + t1 + array + 8]`. `t1` and `t2` are two of the low
    /// eight registers. Gives the place of the jump's rel32.
    pub fn probe_tail(&mut self, (t1, t2): (Reg, Reg), mask: u32, array: i32) -> usize {
        let (r1, r2) = (u64::from(t1.0 & 7), u64::from(t2.0 & 7));
        let operands = |reg: u64, disp: i32| {
            // ModRM: SIB and a displacement of 32 bits; SIB: base RBP, index t1.
            0x84 << 16 | reg << 19 | 0x05 << 24 | r1 << 27 | u64::from(disp as u32) << 32
        };
        self.put(0xe081 | r1 << 8 | u64::from(mask) << 16, 6);
        self.put(0xff_fff0_00e0_8148 | r2 << 16, 7);
        self.put(0x00f8_014c | r2 << 16, 3);
        self.put(0x3b48 | operands(r2, array), 8);
        self.put(0x850f, 6);
        let miss = self.pos - 4;
        self.put(0x8b48 | operands(r1, array + 8), 8);
        miss
    }

    // ---- moves ----

    /// `mov r, r/m`, 64 or 32 bits.
    #[inline]
    pub fn mov(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(one(0x8b), w, d.0, s.into(), (false, 0));
    }

    /// `mov m, r` of `1 << log2` bytes.
    pub fn store(&mut self, log2: u32, m: Mem, s: Reg) {
        match log2 {
            0 => self.enc(one(0x88), false, s.0, m.into(), (s.0 >= 4, 0)),
            1 => self.enc(Opc { prefix: 0x66, map: 0, op: 0x89 }, false, s.0, m.into(), (false, 0)),
            _ => self.enc(one(0x89), log2 == 3, s.0, m.into(), (false, 0)),
        }
    }

    /// `mov m, imm` of `1 << log2` bytes, the immediate sign-extended from 32 bits.
    pub fn store_imm(&mut self, log2: u32, m: Mem, imm: i32) {
        match log2 {
            0 => {
                self.enc(one(0xc6), false, 0, m.into(), (false, 1));
                self.b(imm as u8);
            }
            1 => {
                self.enc(Opc { prefix: 0x66, map: 0, op: 0xc7 }, false, 0, m.into(), (false, 2));
                self.b(imm as u8);
                self.b((imm >> 8) as u8);
            }
            _ => {
                self.enc(one(0xc7), log2 == 3, 0, m.into(), (false, 4));
                self.d(imm as u32);
            }
        }
    }

    /// The shortest move of a 64-bit constant that leaves the flags alone.
    pub fn mov_imm(&mut self, d: Reg, imm: u64) {
        if imm <= 0xffff_ffff {
            if d.0 >= 8 {
                self.b(0x41);
            }
            self.b(0xb8 | d.0 & 7);
            self.d(imm as u32);
        } else if imm as i64 == i64::from(imm as i32) {
            self.enc(one(0xc7), true, 0, d.into(), (false, 4));
            self.d(imm as u32);
        } else {
            self.put(u64::from(0x48 | d.0 >> 3) | u64::from(0xb8 | d.0 & 7) << 8, 2);
            self.put(imm, 8);
        }
    }

    /// Loads `1 << log2` bytes with zero extension to 64 bits (or a register's low part).
    pub fn movzx(&mut self, log2: u32, d: Reg, s: impl Into<Rm>) {
        let s = s.into();
        let force = log2 == 0 && matches!(s, Rm::R(4..));
        match log2 {
            0 => self.enc(two(0, 0xb6), false, d.0, s, (force, 0)),
            1 => self.enc(two(0, 0xb7), false, d.0, s, (false, 0)),
            _ => self.enc(one(0x8b), log2 == 3, d.0, s, (false, 0)),
        }
    }

    /// The same with sign extension to 64 bits (`w`) or 32 bits.
    pub fn movsx(&mut self, log2: u32, w: bool, d: Reg, s: impl Into<Rm>) {
        let s = s.into();
        let force = log2 == 0 && matches!(s, Rm::R(4..));
        match log2 {
            0 => self.enc(two(0, 0xbe), w, d.0, s, (force, 0)),
            1 => self.enc(two(0, 0xbf), w, d.0, s, (false, 0)),
            2 if w => self.enc(one(0x63), true, d.0, s, (false, 0)),
            _ => self.enc(one(0x8b), log2 == 3, d.0, s, (false, 0)),
        }
    }

    /// `lea`
    #[inline]
    pub fn lea(&mut self, w: bool, d: Reg, m: Mem) {
        self.enc(one(0x8d), w, d.0, m.into(), (false, 0));
    }

    /// `xchg r, m` (implicitly locked).
    pub fn xchg(&mut self, log2: u32, m: Mem, r: Reg) {
        self.sized(log2, 0x86, m, r);
    }

    /// `lock xadd m, r`
    pub fn lock_xadd(&mut self, log2: u32, m: Mem, r: Reg) {
        self.b(0xf0);
        self.sized2(log2, 0xc0, m, r);
    }

    /// `lock cmpxchg m, r` (compares with rax).
    pub fn lock_cmpxchg(&mut self, log2: u32, m: Mem, r: Reg) {
        self.b(0xf0);
        self.sized2(log2, 0xb0, m, r);
    }

    fn sized(&mut self, log2: u32, op: u8, m: Mem, r: Reg) {
        let prefix = if log2 == 1 { 0x66 } else { 0 };
        let o = Opc { prefix, map: 0, op: op | u8::from(log2 > 0) };
        self.enc(o, log2 == 3, r.0, m.into(), (log2 == 0 && r.0 >= 4, 0));
    }

    fn sized2(&mut self, log2: u32, op: u8, m: Mem, r: Reg) {
        let prefix = if log2 == 1 { 0x66 } else { 0 };
        let o = Opc { prefix, map: 1, op: op | u8::from(log2 > 0) };
        self.enc(o, log2 == 3, r.0, m.into(), (log2 == 0 && r.0 >= 4, 0));
    }

    /// `push r`
    pub fn push(&mut self, r: Reg) {
        if r.0 >= 8 {
            self.b(0x41);
        }
        self.b(0x50 | r.0 & 7);
    }

    /// `pop r`
    pub fn pop(&mut self, r: Reg) {
        if r.0 >= 8 {
            self.b(0x41);
        }
        self.b(0x58 | r.0 & 7);
    }

    /// `cmovcc r, r/m`
    pub fn cmov(&mut self, cc: Cc, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0, 0x40 | cc as u8), w, d.0, s.into(), (false, 0));
    }

    /// `setcc r8`
    pub fn setcc(&mut self, cc: Cc, d: Reg) {
        self.enc(two(0, 0x90 | cc as u8), false, 0, d.into(), (d.0 >= 4, 0));
    }

    // ---- arithmetic ----

    /// `op r, r/m`
    #[inline]
    pub fn alu(&mut self, op: Alu, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(one((op as u8) << 3 | 3), w, d.0, s.into(), (false, 0));
    }

    /// `op m, r`
    pub fn alu_store(&mut self, op: Alu, w: bool, m: Mem, s: Reg) {
        self.enc(one((op as u8) << 3 | 1), w, s.0, m.into(), (false, 0));
    }

    /// `op r/m, imm32`
    #[inline]
    pub fn alu_imm(&mut self, op: Alu, w: bool, d: impl Into<Rm>, imm: i32) {
        if let Ok(small) = i8::try_from(imm) {
            self.enc(one(0x83), w, op as u8, d.into(), (false, 1));
            self.b(small as u8);
        } else {
            self.enc(one(0x81), w, op as u8, d.into(), (false, 4));
            self.d(imm as u32);
        }
    }

    /// `test r, r`
    pub fn test(&mut self, w: bool, a: Reg, b: Reg) {
        self.enc(one(0x85), w, b.0, a.into(), (false, 0));
    }

    /// `test r/m, imm32`
    pub fn test_imm(&mut self, w: bool, a: impl Into<Rm>, imm: i32) {
        self.enc(one(0xf7), w, 0, a.into(), (false, 4));
        self.d(imm as u32);
    }

    /// Group 3: 2 not, 3 neg, 4 mul, 5 imul, 6 div, 7 idiv.
    pub fn group3(&mut self, n: u8, w: bool, d: impl Into<Rm>) {
        self.enc(one(0xf7), w, n, d.into(), (false, 0));
    }

    /// `imul r, r/m`
    pub fn imul(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0, 0xaf), w, d.0, s.into(), (false, 0));
    }

    /// `imul r, r/m, imm32`
    pub fn imul_imm(&mut self, w: bool, d: Reg, s: impl Into<Rm>, imm: i32) {
        self.enc(one(0x69), w, d.0, s.into(), (false, 4));
        self.d(imm as u32);
    }

    /// `cqo` or `cdq`
    pub fn cqo(&mut self, w: bool) {
        if w {
            self.b(0x48);
        }
        self.b(0x99);
    }

    /// Shift by a constant.
    pub fn shift_imm(&mut self, op: Shift, w: bool, d: Reg, n: u8) {
        self.enc(one(0xc1), w, op as u8, d.into(), (false, 1));
        self.b(n);
    }

    /// Shift by cl.
    pub fn shift_cl(&mut self, op: Shift, w: bool, d: Reg) {
        self.enc(one(0xd3), w, op as u8, d.into(), (false, 0));
    }

    /// BMI2 `shlx`, `shrx`, `sarx`: `d = s shifted by n`.
    pub fn shiftx(&mut self, op: Shift, w: bool, d: Reg, s: impl Into<Rm>, n: Reg) {
        let pp = match op {
            Shift::Shl => 1,
            Shift::Sar => 2,
            _ => 3,
        };
        self.vex((pp, 2, 0xf7), w, d.0, n.0, s.into());
    }

    /// BMI2 `rorx d, s, n`
    pub fn rorx(&mut self, w: bool, d: Reg, s: impl Into<Rm>, n: u8) {
        self.vex((3, 3, 0xf0), w, d.0, 0, s.into());
        self.b(n);
    }

    /// BMI1 `andn`: `d = !a & b`
    pub fn andn(&mut self, w: bool, d: Reg, a: Reg, b: impl Into<Rm>) {
        self.vex((0, 2, 0xf2), w, d.0, a.0, b.into());
    }

    /// `popcnt`
    pub fn popcnt(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0xf3, 0xb8), w, d.0, s.into(), (false, 0));
    }

    /// `lzcnt`
    pub fn lzcnt(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0xf3, 0xbd), w, d.0, s.into(), (false, 0));
    }

    /// `tzcnt`
    pub fn tzcnt(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0xf3, 0xbc), w, d.0, s.into(), (false, 0));
    }

    /// `bsr`
    pub fn bsr(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0, 0xbd), w, d.0, s.into(), (false, 0));
    }

    /// `bsf`
    pub fn bsf(&mut self, w: bool, d: Reg, s: impl Into<Rm>) {
        self.enc(two(0, 0xbc), w, d.0, s.into(), (false, 0));
    }

    /// `bswap`
    pub fn bswap(&mut self, w: bool, d: Reg) {
        let rex = (w as u8) << 3 | d.0 >> 3;
        if rex != 0 {
            self.b(0x40 | rex);
        }
        self.b(0x0f);
        self.b(0xc8 | d.0 & 7);
    }

    // ---- control ----

    /// `jcc rel32`; returns where the rel32 is.
    pub fn jcc(&mut self, cc: Cc) -> usize {
        self.put(0x0f | u64::from(0x80 | cc as u8) << 8, 6);
        self.pos - 4
    }

    /// `jmp rel32`; returns where the rel32 is.
    pub fn jmp(&mut self) -> usize {
        self.put(0xe9, 5);
        self.pos - 4
    }

    /// `jcc rel8` forward; patch with [`Asm::patch_short`].
    pub fn jcc_short(&mut self, cc: Cc) -> usize {
        self.b(0x70 | cc as u8);
        self.b(0);
        self.pos - 1
    }

    /// `jmp rel8` forward.
    pub fn jmp_short(&mut self) -> usize {
        self.b(0xeb);
        self.b(0);
        self.pos - 1
    }

    /// Makes the short jump at `at` land here.
    pub fn patch_short(&mut self, at: usize) {
        debug_assert!(self.pos - at - 1 < 128);
        self.buf[at & (BUFFER - 1)] = (self.pos - at - 1) as u8;
    }

    /// `jmp r/m`
    pub fn jmp_rm(&mut self, s: impl Into<Rm>) {
        self.enc(one(0xff), false, 4, s.into(), (false, 0));
    }

    /// `call r/m`
    pub fn call_rm(&mut self, s: impl Into<Rm>) {
        self.enc(one(0xff), false, 2, s.into(), (false, 0));
    }

    /// `call rel32`; returns where the rel32 is.
    pub fn call(&mut self) -> usize {
        self.put(0xe8, 5);
        self.pos - 4
    }

    /// `ret`
    pub fn ret(&mut self) {
        self.b(0xc3);
    }

    /// `mfence` is slower than a locked add on the stack; this is the latter.
    pub fn fence(&mut self) {
        self.b(0xf0);
        self.alu_imm(Alu::Or, false, Mem::base(Reg::RSP, 0), 0);
    }

    /// No-operations until `(pos + plus) % align == 0`.
    pub fn align(&mut self, align: usize, plus: usize) {
        loop {
            let n = (align - (self.pos + plus) % align) % align;
            if n == 0 {
                return;
            }
            self.raw(NOPS[n.min(3)]);
        }
    }

    /// Moves the code from offset `at` on up by `n` (at most 3) bytes of no-operation. It must not refer to itself or be
    /// referred to by distance.
    pub fn insert_nops(&mut self, at: usize, n: usize) {
        let end = self.pos.min(BUFFER - 4);
        if n == 0 || n > 3 || at > end {
            return;
        }
        self.buf.copy_within(at..end, at + n);
        // Not a byte more: the code is behind them.
        self.buf[at..at + n].copy_from_slice(NOPS[n]);
        self.pos = end + n;
    }

    // ---- SSE ----

    /// A scalar or packed SSE instruction: mandatory prefix (0, 66, F3, F2), opcode in map 0F.
    #[inline]
    pub fn sse(&mut self, prefix: u8, op: u8, d: Xmm, s: impl Into<Rm>) {
        self.enc(two(prefix, op), false, d.0, s.into(), (false, 0));
    }

    /// The same with an immediate byte.
    pub fn sse_imm(&mut self, prefix: u8, op: u8, d: Xmm, s: impl Into<Rm>, imm: u8) {
        self.enc(two(prefix, op), false, d.0, s.into(), (false, 1));
        self.b(imm);
    }

    /// SSE4.1 in map 0F38 with prefix 66.
    pub fn sse38(&mut self, op: u8, d: Xmm, s: impl Into<Rm>) {
        self.enc(three8(0x66, op), false, d.0, s.into(), (false, 0));
    }

    /// `movss`/`movsd` load (zeroes the rest).
    pub fn fload(&mut self, double: bool, d: Xmm, m: Mem) {
        self.sse(if double { 0xf2 } else { 0xf3 }, 0x10, d, m);
    }

    /// `movss`/`movsd` store.
    pub fn fstore(&mut self, double: bool, m: Mem, s: Xmm) {
        self.sse(if double { 0xf2 } else { 0xf3 }, 0x11, s, m);
    }

    /// `movaps d, s`
    pub fn movaps(&mut self, d: Xmm, s: Xmm) {
        if d != s {
            self.sse(0, 0x28, d, s);
        }
    }

    /// `movups` load.
    pub fn movups(&mut self, d: Xmm, m: Mem) {
        self.sse(0, 0x10, d, m);
    }

    /// `movups` store.
    pub fn movups_store(&mut self, m: Mem, s: Xmm) {
        self.sse(0, 0x11, s, m);
    }

    /// `movq`/`movd` to a vector register.
    pub fn mov_to_xmm(&mut self, w: bool, d: Xmm, s: impl Into<Rm>) {
        self.enc(two(0x66, 0x6e), w, d.0, s.into(), (false, 0));
    }

    /// `movq`/`movd` from a vector register.
    pub fn mov_from_xmm(&mut self, w: bool, d: Reg, s: Xmm) {
        self.enc(two(0x66, 0x7e), w, s.0, d.into(), (false, 0));
    }

    /// `cvt(t)ss/sd2si`
    pub fn cvt_to_int(&mut self, (double, truncate, w): (bool, bool, bool), d: Reg, s: Xmm) {
        let o = two(if double { 0xf2 } else { 0xf3 }, if truncate { 0x2c } else { 0x2d });
        self.enc(o, w, d.0, s.into(), (false, 0));
    }

    /// `cvtsi2ss/sd`
    pub fn cvt_from_int(&mut self, double: bool, w: bool, d: Xmm, s: Reg) {
        self.enc(two(if double { 0xf2 } else { 0xf3 }, 0x2a), w, d.0, s.into(), (false, 0));
    }

    /// FMA3, `231` form: `d = ±(a * b) ± d`. `op`: b9 vfmadd, bb vfmsub, bd vfnmadd, bf vfnmsub.
    pub fn fma231(&mut self, op: u8, double: bool, d: Xmm, a: Xmm, b: impl Into<Rm>) {
        self.vex((1, 2, op), double, d.0, a.0, b.into());
    }

    /// A vector instruction of the IR, VEX-encoded or legacy.
    pub fn vector(&mut self, v: &VecInsn, vex: bool, (reg, vvvv): (u8, u8), rm: Rm, imm: Option<u8>) {
        let imm_len = u32::from(imm.is_some());
        if vex {
            self.vex_imm((v.pp, v.map, v.opcode), v.w, reg, (vvvv, imm_len), rm);
        } else {
            let prefix = [0, 0x66, 0xf3, 0xf2][usize::from(v.pp & 3)];
            self.enc(Opc { prefix, map: v.map, op: v.opcode }, v.w, reg, rm, (false, imm_len));
        }
        if let Some(imm) = imm {
            self.b(imm);
        }
    }

    /// `lahf; movzx eax, ah; and eax, mask`
    pub fn flags_to_rax(&mut self, mask: i32) {
        self.raw(&[0x9f, 0x0f, 0xb6, 0xc4]);
        self.alu_imm(Alu::And, false, Reg::RAX, mask);
    }

    /// `movhps m, x`
    pub fn movhps_store(&mut self, m: Mem, s: Xmm) {
        self.sse(0, 0x17, s, m);
    }

    /// `ldmxcsr m`
    pub fn ldmxcsr(&mut self, m: Mem) {
        self.enc(two(0, 0xae), false, 2, m.into(), (false, 0));
    }

    /// `stmxcsr m`
    pub fn stmxcsr(&mut self, m: Mem) {
        self.enc(two(0, 0xae), false, 3, m.into(), (false, 0));
    }
}
