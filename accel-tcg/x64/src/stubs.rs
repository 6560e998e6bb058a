//! The routines that all translated code of one code cache shares.

use crate::CodegenError;
use crate::asm::{Alu, Asm, Cc, Mem, Reg, Shift, Xmm};
use holdfast_tcg_ir::env::{self, SlowPaths, exit, offset};
use holdfast_tcg_ir::{Effects, GuestSpec, MemOp, Slot, Type};

/// Host registers of the pins, in the order of [`GuestSpec::pins`]. The first four survive calls of Rust code.
pub const PIN_REGS: [Reg; GuestSpec::MAX_PINS] =
    [Reg::RBX, Reg::R12, Reg::R13, Reg::R14, Reg::R8, Reg::R9, Reg::R10, Reg::R11];
/// How many of [`PIN_REGS`] survive calls.
const PRESERVED: usize = 4;
/// Temporaries of the code generator.
pub const TEMPS: [Reg; 5] = [Reg::RAX, Reg::RCX, Reg::RDX, Reg::RSI, Reg::RDI];
/// Spill slots of 8 bytes at `[rsp]`.
pub const SPILLS: usize = 64;
/// Bytes of the frame: with the return address and six saved registers it is a multiple of 16.
const FRAME: i32 = SPILLS as i32 * 8 + 8;

/// Kinds of memory slow path; each has a variant that also keeps the vector registers.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Slow {
    /// Load.
    Load,
    /// Store.
    Store,
    /// Atomic read-modify-write.
    Rmw,
    /// Compare and swap.
    Cas,
}

/// Constants that generated code refers to; each has 16 bytes in the pool.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Const {
    /// Canonical quiet NaN, binary32.
    Nan32,
    /// Canonical quiet NaN, binary64.
    Nan64,
    /// Sign bit, binary32.
    Sign32,
    /// Sign bit, binary64.
    Sign64,
    /// All but the sign, binary32.
    Abs32,
    /// All but the sign, binary64.
    Abs64,
    /// Upper half of the low 64 bits: the NaN box.
    Box,
}

const POOL: [u64; 7] = [
    0x7fc0_0000,
    0x7ff8_0000_0000_0000,
    0x8000_0000,
    1 << 63,
    0x7fff_ffff,
    !(1 << 63),
    0xffff_ffff_0000_0000,
];

/// What follows the call of a brief slow path, which returns elsewhere. Cold paths take half of all translated code, so they are
/// data where they can.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Brief {
    /// Guest pc.
    pub(crate) pc: u64,
    /// To be added to the base register.
    pub(crate) disp: i32,
    /// Where to go on: bytes from the start of this.
    pub(crate) back: i32,
    /// As the slow paths take it.
    pub(crate) desc: u16,
    /// Number of the register with the address.
    pub(crate) base: u8,
    /// Number of the register that is stored or loaded to, or [`Brief::IMM`].
    pub(crate) reg: u8,
    /// What is stored if that is said.
    pub(crate) imm: i32,
    /// Temporaries that become 0 first, as a mask.
    pub(crate) zeroed: u8,
    /// Whether 64 bits are loaded.
    pub(crate) wide: bool,
}

impl Brief {
    /// In place of a register: the immediate.
    pub(crate) const IMM: u8 = 4;
    const DISP: i32 = 8;
    const BACK: i32 = 12;
    const DESC: i32 = 16;
    const BASE: i32 = 18;
    const REG: i32 = 19;
    const IMM_AT: i32 = 20;
    const ZEROED: i32 = 24;
    const WIDE: i32 = 25;

    /// The bytes, as words.
    pub(crate) fn words(&self) -> [u64; 4] {
        let place = u64::from(self.disp as u32) | u64::from(self.back as u32) << 32;
        let access = u64::from(self.desc) | u64::from(self.base) << 16 | u64::from(self.reg) << 24;
        let access = access | u64::from(self.imm as u32) << 32;
        [self.pc, place, access, u64::from(self.zeroed) | u64::from(self.wide) << 8]
    }

    /// Bytes of the last word that count.
    pub(crate) const LAST: usize = 2;
    /// Bytes of all words.
    const LEN: usize = 3 * 8 + Self::LAST;
}

/// Addresses (in the executable mapping) of the shared routines.
#[derive(Clone, Debug)]
pub struct Stubs {
    /// Bytes used from the start of the buffer.
    pub len: usize,
    enter: u64,
    /// eax: exit code. Saves the pins and returns from [`Stubs::enter`]'s function.
    pub(crate) exit: u64,
    /// rax: guest pc. Probes the indirect-branch cache, then as `lookup_miss`.
    pub(crate) lookup: u64,
    /// rax: guest pc. Stores it, polls for exits, probes the second place in the indirect-branch cache, asks the lookup function
    /// and jumps.
    pub(crate) lookup_miss: u64,
    slow: [u64; 8],
    /// As `slow` for loads and stores of integers: what they need is behind the call, see [`Brief`].
    brief: [u64; 4],
    /// Asks for the link that is behind the call: 8 bytes for the exit's argument, 8 for the guest pc.
    pub(crate) link: u64,
    calls: [u64; 32],
    /// Performs the softfp request in scratch 1 on scratch 0, result there; keeps all registers.
    pub(crate) soft: u64,
    pool: u64,
}

/// Function that runs translated code at `code` (a region start) on `env` until it exits, and returns the exit code.
pub type Enter = unsafe extern "C" fn(env: *mut u8, code: u64) -> u64;

impl Stubs {
    /// The entry function. Calling it is sound only while the executable mapping that the stubs were generated for exists
    /// and holds their bytes, with an environment of the right layout that no other thread runs, and with `code` the start
    /// of a region compiled against these stubs.
    pub fn enter(&self) -> Enter {
        let p = self.enter as usize as *const ();
        // SAFETY: the address of a routine with that signature; callers of the returned unsafe function answer for the rest.
        unsafe { std::mem::transmute::<*const (), Enter>(p) }
    }

    pub(crate) fn slow(&self, kind: Slow, keep_xmm: bool) -> u64 {
        self.slow[kind as usize * 2 + usize::from(keep_xmm)]
    }

    /// The instructions in `code`, which runs at `at` and was compiled with these routines: a line each.
    pub fn disassemble(&self, code: &[u8], at: u64) -> String {
        crate::listing::disassemble(code, at, |routine| self.data_behind(routine))
    }

    /// Bytes behind a call of `routine` that are data.
    fn data_behind(&self, routine: u64) -> usize {
        if routine == self.link {
            2 * 8
        } else if self.brief.contains(&routine) {
            Brief::LEN
        } else {
            0
        }
    }

    pub(crate) fn brief(&self, kind: Slow, keep_xmm: bool) -> u64 {
        self.brief[kind as usize % 2 * 2 + usize::from(keep_xmm)]
    }

    pub(crate) fn call(&self, e: Effects) -> u64 {
        self.calls[usize::from(e.bits() & 31)]
    }

    pub(crate) fn constant(&self, c: Const) -> u64 {
        self.pool + 16 * c as u64
    }
}

/// Checks the pins of a guest.
pub(crate) fn check_pins(spec: &GuestSpec) -> Result<(), CodegenError> {
    for (n, s) in spec.pins.iter().enumerate() {
        let twice = spec.pins.iter().take(n).any(|t| t.offset == s.offset);
        if s.ty != Type::I64 || twice {
            return Err(CodegenError::BadPin(n));
        }
    }
    Ok(())
}

struct Gen<'a> {
    a: &'a mut Asm,
    pins: &'a [Slot],
}

impl Gen<'_> {
    fn pin(&self, n: usize) -> Option<(Reg, Mem)> {
        let s = self.pins.get(n)?;
        Some((*PIN_REGS.get(n)?, Mem::env(s.offset as i32)))
    }

    fn save_pins(&mut self, from: usize) {
        for n in from..GuestSpec::MAX_PINS {
            if let Some((r, m)) = self.pin(n) {
                self.a.store(3, m, r);
            }
        }
    }

    fn load_pins(&mut self, from: usize) {
        for n in from..GuestSpec::MAX_PINS {
            if let Some((r, m)) = self.pin(n) {
                self.a.mov(true, r, m);
            }
        }
    }

    fn enter(&mut self) {
        for r in [Reg::RBP, Reg::RBX, Reg::R12, Reg::R13, Reg::R14, Reg::R15] {
            self.a.push(r);
        }
        self.a.alu_imm(Alu::Sub, true, Reg::RSP, FRAME);
        self.a.mov(true, Reg::RBP, Reg::RDI);
        self.a.store(3, Mem::env(offset::HOST_SP), Reg::RSP);
        self.a.stmxcsr(Mem::env(offset::HOST_MXCSR));
        self.a.ldmxcsr(Mem::env(offset::MXCSR));
        self.load_pins(0);
        self.a.mov(true, Reg::R15, Mem::env(offset::GEN_TAG));
        self.a.jmp_rm(Reg::RSI);
    }

    fn exit(&mut self) {
        self.save_pins(0);
        self.a.stmxcsr(Mem::env(offset::MXCSR));
        self.a.ldmxcsr(Mem::env(offset::HOST_MXCSR));
        self.a.mov(true, Reg::RSP, Mem::env(offset::HOST_SP));
        self.a.alu_imm(Alu::Add, true, Reg::RSP, FRAME);
        for r in [Reg::R15, Reg::R14, Reg::R13, Reg::R12, Reg::RBX, Reg::RBP] {
            self.a.pop(r);
        }
        self.a.ret();
    }

    fn jump_exit(&mut self, exit_at: usize) {
        let at = self.a.jmp();
        self.a.patch_rel(at, exit_at);
    }

    fn lookup_miss(&mut self, exit_at: usize, lookup: env::Lookup, pc_shift: u32) {
        self.a.store(3, Mem::env(offset::PC), Reg::RAX);
        self.a.alu_imm(Alu::Cmp, false, Mem::env(offset::EXIT_REQUEST), 0);
        let poll = self.a.jcc(Cc::Ne);
        ibtc_index(self.a, pc_shift);
        self.a.alu_imm(Alu::Xor, false, Reg::RCX, (env::IBTC_SECOND as i32) << 5);
        let misses = ibtc_compare(self.a);
        let here = self.a.pos();
        for miss in misses {
            self.a.patch_rel(miss, here);
        }
        self.save_pins(PRESERVED);
        self.a.mov(true, Reg::RDI, Reg::RBP);
        self.a.mov(true, Reg::RSI, Reg::RAX);
        self.a.mov_imm(Reg::RAX, lookup as usize as u64);
        self.a.call_rm(Reg::RAX);
        self.load_pins(PRESERVED);
        self.a.mov(true, Reg::R15, Mem::env(offset::GEN_TAG));
        self.a.test(true, Reg::RAX, Reg::RAX);
        let none = self.a.jcc_short(Cc::E);
        self.a.jmp_rm(Reg::RAX);
        self.a.patch_short(none);
        self.a.mov_imm(Reg::RAX, u64::from(exit::LOOKUP));
        self.jump_exit(exit_at);
        let here = self.a.pos();
        self.a.patch_rel(poll, here);
        self.a.mov_imm(Reg::RAX, u64::from(exit::POLL));
        self.jump_exit(exit_at);
    }

    /// Probes the TLB for the access alone and makes it: what shared probes of a range that crosses a page fall back to.
    /// Falls through nowhere; returns the jumps that are taken on a miss.
    fn retry(&mut self, kind: Slow) -> Vec<usize> {
        const STRIDE: u32 = size_of::<env::MmuTlb>().trailing_zeros();
        const { assert!(size_of::<env::MmuTlb>().is_power_of_two()) };
        let array = if kind == Slow::Load { offset::tlb_read(0) } else { offset::tlb_write(0) };
        let scratch = |n: i32| Mem::env(offset::SCRATCH + 8 * n);
        let (rax, rcx, rdx, rsi, rdi) = (Reg::RAX, Reg::RCX, Reg::RDX, Reg::RSI, Reg::RDI);
        let a = &mut *self.a;
        a.mov(true, rsi, scratch(0));
        a.mov(false, rdx, scratch(2));
        let mut misses = Vec::new();
        // Alignment and byte order are for Rust, and sixteen bytes, and loads that have to fault as stores.
        a.test_imm(false, rdx, 0x34 | i32::from(MemOp::FOR_UPDATE));
        misses.push(a.jcc(Cc::Ne));
        a.mov(false, rcx, rdx);
        a.alu_imm(Alu::And, false, rcx, 7);
        a.mov_imm(rax, 1);
        a.shift_cl(Shift::Shl, false, rax);
        a.lea(true, rax, Mem::index(rsi, rax, 0, -1));
        a.alu_imm(Alu::And, true, rax, -4096);
        a.alu(Alu::Add, true, rax, Reg::R15);
        a.mov(false, rcx, rdx);
        a.shift_imm(Shift::Shr, false, rcx, 6);
        a.alu_imm(Alu::And, false, rcx, 15);
        a.shift_imm(Shift::Shl, false, rcx, STRIDE as u8);
        a.mov(true, rdi, rsi);
        a.shift_imm(Shift::Shr, true, rdi, (env::TLB_PAGE_BITS - 4) as u8);
        a.alu_imm(Alu::And, false, rdi, (env::TLB_ENTRIES as i32 - 1) << 4);
        a.alu(Alu::Add, true, rcx, rdi);
        a.alu(Alu::Cmp, true, rax, Mem::index(Reg::RBP, rcx, 0, array));
        misses.push(a.jcc(Cc::Ne));
        // Once in a while Rust looks at what this costs.
        a.alu_imm(Alu::Sub, false, Mem::env(offset::RETRIES), 1);
        misses.push(a.jcc(Cc::Le));
        a.alu(Alu::Add, true, rsi, Mem::index(Reg::RBP, rcx, 0, array + 8));
        let m = Mem::base(rsi, 0);
        if kind == Slow::Store {
            a.mov(true, rax, scratch(1));
            a.alu_imm(Alu::And, false, rdx, 3);
            self.by_size(&[3, 2, 0, 1], |a, log2| a.store(u32::from(log2), m, rax));
        } else {
            a.alu_imm(Alu::And, false, rdx, 15);
            self.by_size(&[3, 10, 0, 2, 1, 8, 9, 11], |a, d| {
                if d & 8 != 0 && d < 11 {
                    a.movsx(u32::from(d & 3), true, rax, m);
                } else {
                    a.movzx(u32::from(d & 3), rax, m);
                }
                a.store(3, scratch(0), rax);
            });
        }
        misses
    }

    /// Emits `access` for each of the kinds, chosen by edx, and returns from the stub after it.
    fn by_size(&mut self, kinds: &[u8], access: impl Fn(&mut Asm, u8)) {
        for (n, &k) in kinds.iter().enumerate() {
            let next = (n + 1 < kinds.len()).then(|| {
                self.a.alu_imm(Alu::Cmp, false, Reg::RDX, i32::from(k));
                self.a.jcc_short(Cc::Ne)
            });
            access(self.a, k);
            self.pop_all();
            self.a.ret();
            if let Some(at) = next {
                self.a.patch_short(at);
            }
        }
    }

    /// In: pc in the header, scratch: 0 address, 1 value or expected, 2 descriptor, 3 new value. Out: scratch 0.
    fn slow(&mut self, kind: Slow, keep_xmm: bool, func: u64, exit_at: usize) {
        let scratch = |n: i32| Mem::env(offset::SCRATCH + 8 * n);
        self.push_all();
        let rust = match kind {
            Slow::Load | Slow::Store => self.retry(kind),
            Slow::Rmw | Slow::Cas => Vec::new(),
        };
        let here = self.a.pos();
        for at in rust {
            self.a.patch_rel(at, here);
        }
        if keep_xmm {
            self.save_xmm();
        }
        self.save_pins(PRESERVED);
        self.a.mov(true, Reg::RDI, Reg::RBP);
        self.a.mov(true, Reg::RSI, scratch(0));
        self.a.mov(false, Reg::RDX, scratch(2));
        self.a.mov(true, Reg::RCX, Mem::env(offset::PC));
        if kind != Slow::Load {
            self.a.mov(true, Reg::R8, scratch(1));
        }
        if kind == Slow::Cas {
            self.a.mov(true, Reg::R9, scratch(3));
        }
        if kind == Slow::Store {
            // The upper half of a vector.
            self.a.mov(true, Reg::RAX, scratch(3));
            self.a.store(3, scratch(0), Reg::RAX);
        }
        self.a.mov_imm(Reg::RAX, func);
        self.a.call_rm(Reg::RAX);
        self.load_pins(PRESERVED);
        self.a.mov(true, Reg::R15, Mem::env(offset::GEN_TAG));
        self.a.test(true, Reg::RDX, Reg::RDX);
        let fault = self.a.jcc(Cc::Ne);
        if kind == Slow::Load {
            // The upper half of a vector.
            self.a.mov(true, Reg::RCX, scratch(0));
            self.a.store(3, scratch(1), Reg::RCX);
        }
        self.a.store(3, scratch(0), Reg::RAX);
        if keep_xmm {
            self.restore_xmm();
        }
        self.pop_all();
        self.a.ret();
        let here = self.a.pos();
        self.a.patch_rel(fault, here);
        self.a.mov(false, Reg::RAX, Reg::RDX);
        self.jump_exit(exit_at);
    }

    /// As [`Gen::slow`], which is at `slow_at`, with a [`Brief`] at the return address.
    fn brief(&mut self, kind: Slow, slow_at: usize) {
        let scratch = |n: i32| Mem::env(offset::SCRATCH + 8 * n);
        let (rax, rcx, rsi, rsp) = (Reg::RAX, Reg::RCX, Reg::RSI, Reg::RSP);
        let data = |at: i32| Mem::base(rsi, at);
        // Register n is at [rsp + 8 * n].
        let saved = |n: u8| Mem::base(rsp, 8 * i32::from(n));
        let numbered = Mem::index(rsp, rcx, 3, 0);
        let ret = Mem::base(rsp, 128);
        for n in (0..16).rev() {
            self.a.push(Reg(n));
        }
        let a = &mut *self.a;
        a.mov(true, rsi, ret);
        a.movzx(0, rcx, data(Brief::BASE));
        a.mov(true, rax, numbered);
        a.movsx(2, true, rcx, data(Brief::DISP));
        a.alu(Alu::Add, true, rax, rcx);
        a.store(3, scratch(0), rax);
        if kind == Slow::Store {
            a.movsx(2, true, rax, data(Brief::IMM_AT));
            a.store(3, saved(Brief::IMM), rax);
            a.movzx(0, rcx, data(Brief::REG));
            a.mov(true, rax, numbered);
            a.store(3, scratch(1), rax);
        }
        a.movzx(1, rax, data(Brief::DESC));
        a.store(2, scratch(2), rax);
        a.mov(true, rax, data(0));
        a.store(3, Mem::env(offset::PC), rax);
        // For the alignment of the stack.
        a.push(rsi);
        let at = a.call();
        a.patch_rel(at, slow_at);
        a.pop(rsi);
        // All but the temporaries may have changed.
        for n in [3, 8, 9, 10, 11, 12, 13, 14, 15] {
            a.store(3, saved(n), Reg(n));
        }
        a.movzx(0, rcx, data(Brief::ZEROED));
        for t in TEMPS {
            a.test_imm(false, rcx, 1 << t.0);
            let skip = a.jcc_short(Cc::E);
            a.store_imm(3, saved(t.0), 0);
            a.patch_short(skip);
        }
        if kind == Slow::Load {
            a.mov(true, rax, scratch(0));
            a.movzx(0, rcx, data(Brief::WIDE));
            a.test(false, rcx, rcx);
            let skip = a.jcc_short(Cc::Ne);
            a.mov(false, rax, rax);
            a.patch_short(skip);
            a.movzx(0, rcx, data(Brief::REG));
            a.store(3, numbered, rax);
        }
        a.movsx(2, true, rax, data(Brief::BACK));
        a.alu(Alu::Add, true, rax, rsi);
        a.store(3, ret, rax);
        for n in 0..16 {
            match n {
                4 | 5 => a.lea(true, rsp, Mem::base(rsp, 8)),
                _ => a.pop(Reg(n)),
            }
        }
        // Not by RET, which the processor expects behind the call. Signals leave what is right below the stack pointer alone.
        a.lea(true, rsp, Mem::base(rsp, 8));
        a.jmp_rm(Mem::base(rsp, -8));
    }

    /// Leaves with a link request.
    fn link(&mut self, exit_at: usize) {
        self.a.pop(Reg::RCX);
        self.a.mov(true, Reg::RAX, Mem::base(Reg::RCX, 0));
        self.a.store(3, Mem::env(offset::EXIT_ARG), Reg::RAX);
        self.a.mov(true, Reg::RAX, Mem::base(Reg::RCX, 8));
        self.a.store(3, Mem::env(offset::PC), Reg::RAX);
        self.a.mov_imm(Reg::RAX, u64::from(exit::LINK));
        self.jump_exit(exit_at);
    }

    fn push_all(&mut self) {
        for r in TEMPS {
            self.a.push(r);
        }
    }

    fn save_xmm(&mut self) {
        self.a.alu_imm(Alu::Sub, true, Reg::RSP, 256);
        for n in 0..16u8 {
            self.a.movups_store(Mem::base(Reg::RSP, i32::from(n) * 16), Xmm(n));
        }
    }

    fn restore_xmm(&mut self) {
        for n in 0..16u8 {
            self.a.movups(Xmm(n), Mem::base(Reg::RSP, i32::from(n) * 16));
        }
        self.a.alu_imm(Alu::Add, true, Reg::RSP, 256);
    }

    fn pop_all(&mut self) {
        for r in TEMPS.into_iter().rev() {
            self.a.pop(r);
        }
    }

    fn soft(&mut self) {
        self.push_all();
        self.save_xmm();
        self.save_pins(PRESERVED);
        self.a.stmxcsr(Mem::env(offset::MXCSR));
        self.a.ldmxcsr(Mem::env(offset::HOST_MXCSR));
        self.a.mov(true, Reg::RDI, Reg::RBP);
        self.a.mov(true, Reg::RSI, Mem::env(offset::SCRATCH));
        self.a.mov(true, Reg::R8, Mem::env(offset::SCRATCH + 8));
        self.a.mov_imm(Reg::RAX, crate::soft::soft_fp as *const () as usize as u64);
        self.a.call_rm(Reg::RAX);
        self.a.store(3, Mem::env(offset::SCRATCH), Reg::RAX);
        self.a.ldmxcsr(Mem::env(offset::MXCSR));
        self.load_pins(PRESERVED);
        self.restore_xmm();
        self.pop_all();
        self.a.ret();
    }

    /// In: rax function, rsi rdx rcx and scratch 0 and 1 arguments. Out: rax.
    fn call(&mut self, e: Effects, exit_at: usize) {
        let slots = e.intersects(Effects::READS_SLOTS | Effects::WRITES_SLOTS);
        self.a.alu_imm(Alu::Sub, true, Reg::RSP, 8);
        // What a helper does not write must be in memory too before everything is reloaded.
        self.save_pins(if slots { 0 } else { PRESERVED });
        if e.contains(Effects::USES_FP) {
            self.a.stmxcsr(Mem::env(offset::MXCSR));
            self.a.ldmxcsr(Mem::env(offset::HOST_MXCSR));
        }
        self.a.mov(true, Reg::RDI, Reg::RBP);
        self.a.mov(true, Reg::R8, Mem::env(offset::SCRATCH));
        self.a.mov(true, Reg::R9, Mem::env(offset::SCRATCH + 8));
        self.a.call_rm(Reg::RAX);
        if e.contains(Effects::USES_FP) {
            self.a.ldmxcsr(Mem::env(offset::MXCSR));
        }
        self.load_pins(if e.contains(Effects::WRITES_SLOTS) { 0 } else { PRESERVED });
        if e.contains(Effects::MAY_FLUSH) {
            self.a.mov(true, Reg::R15, Mem::env(offset::GEN_TAG));
        }
        self.a.alu_imm(Alu::Add, true, Reg::RSP, 8);
        if e.contains(Effects::MAY_FAULT) {
            self.a.test(true, Reg::RDX, Reg::RDX);
            let fault = self.a.jcc_short(Cc::Ne);
            self.a.ret();
            self.a.patch_short(fault);
            self.a.mov(false, Reg::RAX, Reg::RDX);
            self.jump_exit(exit_at);
        } else {
            self.a.ret();
        }
    }
}

/// Emits the probe of the indirect-branch cache for the pc in rax; clobbers rcx and rdx. Returns the places of the rel32s
/// of the jumps that are taken on a miss or a request to exit.
pub(crate) fn ibtc_probe(a: &mut Asm, pc_shift: u32) -> [usize; 3] {
    a.alu_imm(Alu::Cmp, false, Mem::env(offset::EXIT_REQUEST), 0);
    let m0 = a.jcc(Cc::Ne);
    ibtc_index(a, pc_shift);
    let [m1, m2] = ibtc_compare(a);
    [m0, m1, m2]
}

/// Emits the comparison of the entry at rcx with the pc in rax, and the jump; clobbers rdx. Returns the jumps taken if it does
/// not match.
fn ibtc_compare(a: &mut Asm) -> [usize; 2] {
    a.mov(true, Reg::RDX, Mem::env(offset::IBTC_KEY));
    a.alu(Alu::Cmp, true, Reg::RAX, Mem::index(Reg::RBP, Reg::RCX, 0, offset::IBTC));
    let m1 = a.jcc(Cc::Ne);
    a.alu(Alu::Cmp, true, Reg::RDX, Mem::index(Reg::RBP, Reg::RCX, 0, offset::IBTC + 8));
    let m2 = a.jcc(Cc::Ne);
    a.jmp_rm(Mem::index(Reg::RBP, Reg::RCX, 0, offset::IBTC + 16));
    [m1, m2]
}

/// Emits rcx = index of the pc in rax, times an entry's 32 bytes.
fn ibtc_index(a: &mut Asm, pc_shift: u32) {
    // From bits pc_shift.. of the pc and of the number of its page.
    let mask = (env::IBTC_ENTRIES as i32 - 1) << 5;
    a.mov(false, Reg::RCX, Reg::RAX);
    a.shift_imm(Shift::Shr, false, Reg::RCX, 12 - pc_shift.min(12) as u8);
    a.alu(Alu::Xor, false, Reg::RCX, Reg::RAX);
    if pc_shift < 5 {
        a.shift_imm(Shift::Shl, false, Reg::RCX, (5 - pc_shift) as u8);
    } else if pc_shift > 5 {
        a.shift_imm(Shift::Shr, false, Reg::RCX, (pc_shift - 5) as u8);
    }
    a.alu_imm(Alu::And, false, Reg::RCX, mask);
}

/// Generates the stubs at the start of `a`, for execution at `exec`.
pub(crate) fn generate(
    a: &mut Asm,
    spec: &GuestSpec,
    slow: &SlowPaths,
    exec: u64,
) -> Result<Stubs, CodegenError> {
    check_pins(spec)?;
    a.clear();
    let mut g = Gen { a, pins: spec.pins };
    let addr = |g: &mut Gen<'_>| {
        g.a.align(16, 0);
        exec + g.a.pos() as u64
    };
    let pool = addr(&mut g);
    for c in POOL {
        g.a.raw(&c.to_le_bytes());
        g.a.raw(&[0; 8]);
    }
    let enter = addr(&mut g);
    g.enter();
    let exit = addr(&mut g);
    let exit_at = (exit - exec) as usize;
    g.exit();
    let lookup = addr(&mut g);
    let misses = ibtc_probe(g.a, spec.pc_shift);
    let lookup_miss = addr(&mut g);
    for m in misses {
        g.a.patch_rel(m, (lookup_miss - exec) as usize);
    }
    g.lookup_miss(exit_at, slow.lookup, spec.pc_shift);
    let link = addr(&mut g);
    g.link(exit_at);
    let (slow_at, brief, calls) = ([0; 8], [0; 4], [0; 32]);
    let mut s =
        Stubs { len: 0, enter, exit, lookup, lookup_miss, slow: slow_at, brief, link, calls, soft: 0, pool };
    let kinds = [
        (Slow::Load, slow.load as usize),
        (Slow::Store, slow.store as usize),
        (Slow::Rmw, slow.rmw as usize),
        (Slow::Cas, slow.cas as usize),
    ];
    for (kind, f) in kinds {
        for keep in [false, true] {
            s.slow[kind as usize * 2 + usize::from(keep)] = addr(&mut g);
            g.slow(kind, keep, f as u64, exit_at);
        }
    }
    for kind in [Slow::Load, Slow::Store] {
        for keep in [false, true] {
            s.brief[kind as usize % 2 * 2 + usize::from(keep)] = addr(&mut g);
            g.brief(kind, (s.slow(kind, keep) - exec) as usize);
        }
    }
    for bits in 0..32u16 {
        s.calls[usize::from(bits)] = addr(&mut g);
        g.call(Effects::from_bits_truncate(bits), exit_at);
    }
    s.soft = addr(&mut g);
    g.soft();
    g.a.align(16, 0);
    s.len = g.a.pos();
    Ok(s)
}
