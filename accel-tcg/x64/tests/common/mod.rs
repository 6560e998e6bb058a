//! A machine to run regions on, both ways.
#![allow(dead_code, reason = "not every test uses everything")]
#![allow(clippy::unwrap_used, reason = "tests")]

use holdfast_tcg_ir::env::{self, Env, SlowPaths, header, tables};
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_ir::interp::{Interpreter, Outcome, SlowMemory};
use holdfast_tcg_ir::{GuestSpec, HelperTable, MemOp, Region, RmwKind, Slot, verify};
use holdfast_tcg_x64::{HostFeatures, NativeRunner, Stubs, Target, Translator};

/// Guest state: 32 integer registers (offset 0), 32 floating-point registers (256), 32-bit things (512).
#[repr(C)]
#[derive(Clone, Copy, PartialEq, Debug)]
pub struct State {
    pub x: [u64; 32],
    pub f: [u64; 32],
    pub w: [u32; 16],
    pub last_helper: [u64; 8],
    pub v: [[u64; 2]; 24],
}

/// A vector slot.
pub const fn v(n: usize) -> Slot {
    Slot::new(640 + 16 * n as u32, holdfast_tcg_ir::Type::V128)
}

pub const fn x(n: usize) -> Slot {
    Slot::i64(n * 8)
}
pub const fn f(n: usize) -> Slot {
    Slot::f64(256 + n * 8)
}
pub const fn w(n: usize) -> Slot {
    Slot { offset: 512 + 4 * n as u32, ty: holdfast_tcg_ir::Type::I32 }
}

pub const PINS: [Slot; 8] = [x(2), x(8), x(9), x(10), x(1), x(11), x(12), x(13)];
pub const SPEC: GuestSpec = GuestSpec { name: "test", pins: &PINS, pc_shift: 1, page_bits: 12 };

/// First guest address of RAM.
pub const RAM: u64 = 0xffff_ffff_8000_0000;
pub const RAM_SIZE: usize = 16 * 4096;

/// Memory behind the slow paths.
pub struct Ram {
    pub bytes: Vec<u8>,
    /// Whether a miss enters the page in the TLB.
    pub fill: bool,
    pub slow_calls: u64,
    pub fault: Option<(u64, u64)>,
}

unsafe fn ram<'a>(env: *mut u8) -> &'a mut Ram {
    // SAFETY: the owner field holds a pointer to the machine's RAM.
    unsafe { &mut *((*header(env)).owner.load(std::sync::atomic::Ordering::Relaxed) as *mut Ram) }
}

unsafe fn range(env: *mut u8, va: u64, mem: MemOp, pc: u64) -> Option<usize> {
    // SAFETY: called with a machine's environment.
    let r = unsafe { ram(env) };
    r.slow_calls += 1;
    let at = va.wrapping_sub(RAM);
    let size = u64::from(mem.bytes());
    if at.checked_add(size).is_none_or(|e| e > RAM_SIZE as u64) || mem.is_aligned() && va & (size - 1) != 0 {
        r.fault = Some((va, pc));
        return None;
    }
    if r.fill {
        // SAFETY: the tables belong to the environment.
        unsafe {
            let tag = env::tlb_tag(va, (*header(env)).gen_tag);
            let page = at as usize & !4095;
            let addend = (r.bytes.as_mut_ptr() as u64).wrapping_add(page as u64).wrapping_sub(va & !4095);
            let e = env::TlbEntry { tag, addend };
            let t = &mut (*tables(env)).tlb[mem.mmu_idx()];
            t.read[env::tlb_index(va)] = e;
            t.write[env::tlb_index(va)] = e;
        }
    }
    Some(at as usize)
}

fn extend(v: u64, mem: MemOp) -> u64 {
    let sh = 64 - mem.bytes().min(8) * 8;
    if mem.is_signed() { ((v << sh) as i64 >> sh) as u64 } else { v << sh >> sh }
}

fn get(b: &[u8], mem: MemOp) -> u64 {
    let mut x = [0u8; 8];
    let n = mem.bytes().min(8) as usize;
    x[..n].copy_from_slice(&b[..n]);
    if mem.is_big_endian() {
        x[..n].reverse();
    }
    extend(u64::from_le_bytes(x), mem)
}

fn put(b: &mut [u8], mem: MemOp, v: u64) {
    let n = mem.bytes().min(8) as usize;
    let mut x = v.to_le_bytes();
    if mem.is_big_endian() {
        x[..n].reverse();
    }
    b[..n].copy_from_slice(&x[..n]);
}

unsafe extern "C" fn load(env: *mut u8, va: u64, desc: u32, pc: u64) -> HelperRet {
    let mem = MemOp(desc as u16);
    // SAFETY: called with a machine's environment.
    unsafe {
        match range(env, va, mem, pc) {
            Some(at) => {
                if mem.bytes() == 16 {
                    (*header(env)).scratch[0] = get(&ram(env).bytes[at + 8..], MemOp::U64);
                }
                HelperRet::ok(get(&ram(env).bytes[at..], mem))
            }
            None => HelperRet::exit(env::exit::FAULT),
        }
    }
}

unsafe extern "C" fn store(env: *mut u8, va: u64, desc: u32, pc: u64, v: u64) -> HelperRet {
    let mem = MemOp(desc as u16);
    // SAFETY: called with a machine's environment.
    unsafe {
        match range(env, va, mem, pc) {
            Some(at) => {
                if mem.bytes() == 16 {
                    put(&mut ram(env).bytes[at + 8..], MemOp::U64, (*header(env)).scratch[0]);
                }
                put(&mut ram(env).bytes[at..], mem, v);
                HelperRet::ok(0)
            }
            None => HelperRet::exit(env::exit::FAULT),
        }
    }
}

unsafe extern "C" fn rmw(env: *mut u8, va: u64, desc: u32, pc: u64, v: u64) -> HelperRet {
    let mem = MemOp(desc as u16 & MemOp::MASK);
    // SAFETY: called with a machine's environment.
    unsafe {
        match range(env, va, mem, pc) {
            Some(at) => {
                let b = &mut ram(env).bytes[at..];
                let old = get(b, mem);
                put(b, mem, RmwKind::from_index((desc >> MemOp::BITS) as u16).apply(old, v, mem.bytes()));
                HelperRet::ok(old)
            }
            None => HelperRet::exit(env::exit::FAULT),
        }
    }
}

unsafe extern "C" fn cas(env: *mut u8, va: u64, desc: u32, pc: u64, expected: u64, new: u64) -> HelperRet {
    let mem = MemOp(desc as u16);
    // SAFETY: called with a machine's environment.
    unsafe {
        match range(env, va, mem, pc) {
            Some(at) => {
                let b = &mut ram(env).bytes[at..];
                let old = get(b, mem);
                if extend(expected, mem) == old {
                    put(b, mem, new);
                }
                HelperRet::ok(old)
            }
            None => HelperRet::exit(env::exit::FAULT),
        }
    }
}

unsafe extern "C" fn lookup(_: *mut u8, _: u64) -> u64 {
    0
}

pub const SLOW: SlowPaths = SlowPaths { load, store, rmw, cas, lookup };

/// Anonymous memory, executable for code.
pub struct Map {
    pub base: *mut u8,
    len: usize,
}

impl Map {
    pub fn new(len: usize, exec: bool) -> Map {
        let prot = libc::PROT_READ | libc::PROT_WRITE | if exec { libc::PROT_EXEC } else { 0 };
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a fresh private mapping.
        let base = unsafe { libc::mmap(std::ptr::null_mut(), len, prot, flags, -1, 0) };
        assert_ne!(base, libc::MAP_FAILED);
        Map { base: base.cast(), len }
    }

    pub fn bytes(&mut self) -> &mut [u8] {
        // SAFETY: the mapping is ours and readable and writable.
        unsafe { std::slice::from_raw_parts_mut(self.base, self.len) }
    }
}

impl Drop for Map {
    fn drop(&mut self) {
        // SAFETY: unmaps what `new` mapped.
        unsafe { libc::munmap(self.base.cast(), self.len) };
    }
}

/// What a run leaves behind.
#[derive(Clone, PartialEq, Debug)]
pub struct After {
    pub state: State,
    pub exit: u32,
    pub pc: u64,
    pub mxcsr: u32,
    pub memory: Vec<u8>,
    pub fault: Option<(u64, u64)>,
}

pub struct Machine {
    pub env: Map,
    pub code: Map,
    pub ram: Box<Ram>,
    pub translator: Translator,
    pub stubs: Stubs,
    pub interp: Interpreter,
    pub helpers: HelperTable,
    /// What [`env::EnvHeader::retries`] is at first.
    pub retries: i32,
    /// Compile only, once per region: code stays valid until the next.
    pub compiled_len: usize,
}

impl Machine {
    pub fn new(helpers: HelperTable, features: HostFeatures) -> Machine {
        let mut translator = Translator::with_features(SPEC, (helpers.clone(), SLOW), features).unwrap();
        let mut code = Map::new(1 << 20, true);
        let exec = code.base as u64;
        let stubs = translator.stubs(code.bytes(), exec).unwrap();
        let env = Map::new(size_of::<Env<State>>(), false);
        let ram = Box::new(Ram { bytes: vec![0; RAM_SIZE], fill: true, slow_calls: 0, fault: None });
        let mut interp = Interpreter::new();
        interp.native = Some(Box::new(NativeRunner::new().unwrap()));
        let retries = i32::MAX;
        Machine { env, code, ram, translator, stubs, interp, helpers, retries, compiled_len: 0 }
    }

    pub fn env(&mut self) -> *mut u8 {
        env::env_ptr(self.env.base.cast::<Env<State>>())
    }

    fn prepare(&mut self, state: &State, memory: &[u8], mxcsr: u32) {
        let env = self.env();
        self.ram.bytes.copy_from_slice(memory);
        self.ram.fault = None;
        let owner = std::ptr::from_mut(&mut *self.ram) as u64;
        // SAFETY: the environment is ours alone.
        unsafe {
            env.cast::<State>().write(*state);
            let h = &mut *header(env);
            h.owner.store(owner, std::sync::atomic::Ordering::Relaxed);
            h.mxcsr = mxcsr;
            h.gen_tag = 7 << env::GEN_SHIFT;
            h.ibtc_key = 1;
            h.pc = 0;
            h.retries = self.retries;
        }
    }

    fn after(&mut self, exit: u32) -> After {
        let env = self.env();
        // SAFETY: the environment is ours alone.
        let (state, pc, mxcsr) =
            unsafe { (env.cast::<State>().read(), (*header(env)).pc, (*header(env)).mxcsr) };
        // The denormal flag has no meaning to the guest.
        let mxcsr = mxcsr & !2;
        After { state, exit, pc, mxcsr, memory: self.ram.bytes.clone(), fault: self.ram.fault }
    }

    pub fn interpret(&mut self, r: &Region, state: &State, memory: &[u8], mxcsr: u32) -> After {
        self.prepare(state, memory, mxcsr);
        let env = self.env();
        // SAFETY: the environment fits the slow paths and the helpers.
        let o = unsafe {
            let mut mem = SlowMemory::new(env, SLOW);
            self.interp.run(r, &self.helpers, env, &mut mem)
        };
        match o {
            Outcome::Exit(code) => self.after(code),
            Outcome::Goto(pc) => {
                // Translated code leaves with "link" or "lookup"; both mean "go on there".
                // SAFETY: the environment is ours alone.
                unsafe { (*header(env)).pc = pc };
                self.after(env::exit::LOOKUP)
            }
        }
    }

    pub fn compile(&mut self, r: &Region) -> u64 {
        let start = self.stubs.len.next_multiple_of(64);
        let exec = self.code.base as u64 + start as u64;
        let out = &mut self.code.bytes()[start..];
        // SAFETY: a second view of the same mapping, so that the translator can be borrowed too.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr(), out.len()) };
        let c = self.translator.compile(&self.stubs, r, Target { out, exec, region_id: 1 }).unwrap();
        self.compiled_len = c.len;
        exec
    }

    pub fn execute(&mut self, r: &Region, state: &State, memory: &[u8], mxcsr: u32) -> After {
        let code = self.compile(r);
        self.run_code(code, state, memory, mxcsr)
    }

    /// Runs code that [`Machine::compile`] returned.
    pub fn run_code(&mut self, code: u64, state: &State, memory: &[u8], mxcsr: u32) -> After {
        self.prepare(state, memory, mxcsr);
        let env = self.env();
        // SAFETY: code and environment are of this machine.
        let exit = unsafe { self.stubs.enter()(env, code) } as u32;
        self.after(if exit == env::exit::LINK { env::exit::LOOKUP } else { exit })
    }

    /// Runs both ways and compares; returns what happened.
    pub fn both(&mut self, r: &Region, state: &State, memory: &[u8], mxcsr: u32) -> After {
        verify(r, &self.helpers).unwrap_or_else(|e| panic!("{e}\n{r}"));
        let want = self.interpret(r, state, memory, mxcsr);
        let got = self.execute(r, state, memory, mxcsr);
        if got != want {
            let mut text = format!("{r}\nbefore {state:x?}\n");
            if got.memory != want.memory {
                let at = got.memory.iter().zip(&want.memory).position(|(a, b)| a != b);
                text += &format!("memory differs at {at:x?}\n");
            }
            let words = |a: &After| {
                let s = a.state;
                let mut v = s.x.to_vec();
                v.extend(s.f);
                v.extend(s.w.chunks(2).map(|w| u64::from(w[0]) | u64::from(w[1]) << 32));
                v.extend(s.last_helper);
                v.extend(s.v.as_flattened());
                v
            };
            for (n, (g, w)) in words(&got).iter().zip(words(&want)).enumerate() {
                if *g != w {
                    text += &format!("slot [{}]: got {g:x}, want {w:x}\n", n * 8);
                }
            }
            let rest = |a: &After| (a.exit, a.pc, a.mxcsr, a.fault);
            text += &format!("got {:x?} want {:x?} mxcsr before {mxcsr:x}\n", rest(&got), rest(&want));
            text += &self.disassemble();
            panic!("{text}");
        }
        got
    }

    /// The code that was compiled last.
    pub fn disassemble(&self) -> String {
        // What is behind calls is told by their targets, which depend on where the code runs.
        let start = self.stubs.len.next_multiple_of(64);
        self.stubs.disassemble(self.translator.bytes(), self.code.base as u64 + start as u64)
    }
}

/// xorshift.
pub struct Rng(pub u64);

impl Rng {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, n: u64) -> u64 {
        (self.next() >> 32) % n
    }

    pub fn pick<T: Copy>(&mut self, list: &[T]) -> T {
        list[self.below(list.len() as u64) as usize]
    }

    /// Integers with a liking for edges.
    pub fn int(&mut self) -> u64 {
        match self.below(8) {
            0 => {
                self.pick(&[0, 1, u64::MAX, 1 << 63, i64::MAX as u64, 0x8000_0000, 0x7fff_ffff, 0xffff_ffff])
            }
            1 => self.below(256),
            2 => self.below(64).wrapping_neg(),
            3 => self.next() as i32 as u64,
            4 => self.next() & 0xffff_ffff,
            _ => self.next(),
        }
    }

    /// Doubles, boxed singles and things that are neither, with a liking for special values.
    pub fn float(&mut self) -> u64 {
        let single = |v: u32| 0xffff_ffff_0000_0000 | u64::from(v);
        match self.below(10) {
            0 => self.pick(&SPECIAL64),
            1 | 2 => single(self.pick(&SPECIAL32)),
            3 => single(self.next() as u32),
            4 | 5 => single(((self.below(100) as f32 - 50.0) * 1.37).to_bits()),
            6 => self.next(),
            7 => (self.next() & 0x000f_ffff_ffff_ffff) | (0x3fe + self.below(4)) << 52 | self.next() << 63,
            _ => (self.below(1000) as f64 - 500.0).to_bits(),
        }
    }
}

pub const SPECIAL64: [u64; 24] = [
    0,
    1 << 63,
    1,
    0x000f_ffff_ffff_ffff,
    0x0010_0000_0000_0000,
    0x3ff0_0000_0000_0000,
    0xbff0_0000_0000_0000,
    0x3ff0_0000_0000_0001,
    0x7fef_ffff_ffff_ffff,
    0x7ff0_0000_0000_0000,
    0xfff0_0000_0000_0000,
    0x7ff8_0000_0000_0000,
    0xfff8_0000_0000_0123,
    0x7ff0_0000_0000_0001,
    0xfff4_0000_0000_0000,
    0x41e0_0000_0000_0000,
    0xc1e0_0000_0000_0000,
    0xc1e0_0000_0010_0000,
    0x43e0_0000_0000_0000,
    0xc3e0_0000_0000_0000,
    0x43f0_0000_0000_0000,
    0x3fe0_0000_0000_0000,
    0xbfe0_0000_0000_0000,
    0x41ef_ffff_ffe0_0000,
];

pub const SPECIAL32: [u32; 20] = [
    0,
    1 << 31,
    1,
    0x007f_ffff,
    0x0080_0000,
    0x3f80_0000,
    0xbf80_0000,
    0x3f80_0001,
    0x7f7f_ffff,
    0x7f80_0000,
    0xff80_0000,
    0x7fc0_0000,
    0xffc0_0123,
    0x7f80_0001,
    0xffa0_0000,
    0x4f00_0000,
    0xcf00_0000,
    0x5f00_0000,
    0xdf00_0000,
    0x5f80_0000,
];

pub fn random_state(rng: &mut Rng) -> State {
    let mut s = State { x: [0; 32], f: [0; 32], w: [0; 16], last_helper: [0; 8], v: [[0; 2]; 24] };
    for v in &mut s.x {
        *v = rng.int();
    }
    for v in &mut s.f {
        *v = rng.float();
    }
    for v in &mut s.w {
        *v = rng.int() as u32;
    }
    for v in s.v.as_flattened_mut() {
        *v = if rng.below(2) == 0 { rng.float() } else { rng.int() };
    }
    s
}

pub fn random_memory(rng: &mut Rng) -> Vec<u8> {
    let mut m = vec![0u8; RAM_SIZE];
    for c in m.chunks_mut(8) {
        c.copy_from_slice(&rng.next().to_le_bytes());
    }
    m
}
