//! Makes programs of random instructions.

mod asm;

use asm::{Code, SCRATCH, TEMP};
use holdfast_decode_gen::Generator;
use holdfast_guest_riscv::decode::{Insn, decode};

/// Where programs are loaded, here and there.
pub const BASE: u64 = 0x1000_0000;
/// RAM that they have.
pub const RAM_SIZE: usize = 16 << 20;
/// Register states that each sequence is run from.
pub const STATES: usize = 8;
/// Words of a register dump: `fcsr`, `x1` to `x31`, `f0` to `f31`.
pub const DUMP_WORDS: usize = 64;

const SEQUENCES: usize = 300;
const LENGTH: usize = 56;

/// Loads and stores go to the middle of this much memory.
const SCRATCH_SIZE: u64 = 8192;

/// Registers that random instructions do not write: sp and s0 point to the scratch memory, for compressed accesses;
/// x31 does too; x30 is for addresses made on the spot.
const RESERVED: [u32; 4] = [2, 8, TEMP, SCRATCH];

/// Random numbers.
pub struct Random(u64);

impl Random {
    pub fn new(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn word(&mut self) -> u64 {
        // splitmix64
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ z >> 31
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.word() % n as u64) as usize
    }

    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len())]
    }

    /// A value for an integer register.
    fn integer(&mut self) -> u64 {
        let special = [
            0,
            1,
            u64::MAX,
            1 << 63,
            (1 << 63) - 1,
            1 << 31,
            0x7fff_ffff,
            0xffff_ffff_8000_0000,
            0xffff_ffff,
        ];
        match self.below(6) {
            0 | 1 => self.pick(&special),
            2 => self.word() >> self.below(64),
            3 => self.word() as i32 as u64,
            _ => self.word(),
        }
    }

    /// Bits of a float with `exponent` and `fraction` bits.
    fn float(&mut self, exponent: u32, fraction: u32) -> u64 {
        let sign = (self.word() & 1) << (exponent + fraction);
        let (emask, fmask) = ((1u64 << exponent) - 1, (1u64 << fraction) - 1);
        let bias = emask >> 1;
        let spread = self.word() % 8;
        let (e, f) = match self.below(12) {
            0 => (0, 0),                                                             // zero
            1 => (emask, 0),                                                         // infinity
            2 => (emask, self.word() & fmask | 1),                                   // a NaN of some kind
            3 => (emask, 1 << (fraction - 1)),                                       // the canonical NaN
            4 => (0, self.word() & fmask >> self.below(fraction as usize)),          // subnormal
            5 => (1 + self.word() % 2, self.pick(&[0, 1, fmask])), // around the smallest normal
            6 => (emask - 1, self.pick(&[0, fmask, fmask - 1])),   // around the largest
            7 => (bias + self.word() % (fraction as u64 + 12), self.word() & fmask), // integers and fractions
            8 => (bias + 28 + spread * 5, self.pick(&[0, fmask])), // around the limits of integers
            9 => (bias - 4 + spread, (self.word() & 7) << (fraction - 3)), // few bits: exact results and ties
            _ => (self.word() & emask, self.word() & fmask),
        };
        sign | e << fraction | f
    }

    /// A value for a floating-point register.
    fn register(&mut self) -> u64 {
        match self.below(12) {
            0..=5 => self.float(11, 52),
            6..=10 => self.float(8, 23) | 0xffff_ffff_0000_0000,
            _ => self.float(8, 23) | self.word() << 32, // not boxed
        }
    }
}

/// A program.
pub struct Program {
    pub seed: u64,
    /// The random instructions: address and bits.
    pub sequences: Vec<Vec<(u64, u32)>>,
    /// Where it stops when run bare.
    pub end: u64,
    /// What it writes.
    pub output: u64,
    pub output_len: usize,
    image: Vec<u8>,
    initial: Vec<u64>,
}

impl Program {
    pub fn new(seed: u64) -> Self {
        let mut random = Random::new(seed);
        let runs = SEQUENCES * STATES;
        let mut initial = Vec::with_capacity(runs * DUMP_WORDS);
        let code_size = 1u64 << 20;
        let scratch = BASE + code_size;
        let input = scratch + SCRATCH_SIZE;
        let output = input + (runs * DUMP_WORDS * 8) as u64;
        for _ in 0..runs {
            initial.push(random.below(5) as u64 * 32 + (random.word() & 31) * random.below(2) as u64);
            for x in 1..32 {
                initial.push(if RESERVED.contains(&x) {
                    scratch + SCRATCH_SIZE / 2
                } else {
                    random.integer()
                });
            }
            for _ in 0..32 {
                initial.push(random.register());
            }
        }
        let output_len = runs * DUMP_WORDS * 8 + SCRATCH_SIZE as usize;
        let mut code = Code::new(BASE);
        let driver = code.driver(&asm::Layout {
            scratch,
            scratch_size: SCRATCH_SIZE,
            input,
            output,
            output_len,
            runs,
        });
        let generator = Picker::new();
        let mut sequences = Vec::with_capacity(SEQUENCES);
        let mut starts = Vec::with_capacity(SEQUENCES);
        for _ in 0..SEQUENCES {
            let start = code.pc();
            sequences.push(generator.sequence(&mut random, &mut code));
            starts.push(start);
            code.jump(driver.after);
        }
        let table = code.align(8);
        for start in starts {
            (0..STATES).for_each(|_| code.dword(start));
        }
        code.patch_address(driver.table_at, table);
        assert!(code.len() < code_size as usize, "{}", code.len());
        let mut image = code.bytes();
        image.resize((input - BASE) as usize, 0);
        for word in &mut image[code_size as usize..].chunks_exact_mut(8) {
            word.copy_from_slice(&random.word().to_le_bytes());
        }
        image.extend(initial.iter().flat_map(|w| w.to_le_bytes()));
        Self { seed, sequences, end: driver.end, output, output_len, image, initial }
    }

    /// What a word of the dump was before run `run`.
    pub fn initial(&self, run: usize, word: usize) -> u64 {
        self.initial[run * DUMP_WORDS + word]
    }

    /// Random instructions in all sequences.
    pub fn insns(&self) -> u64 {
        self.sequences.iter().map(|s| s.len() as u64).sum()
    }

    /// The program as a static ELF file: one segment, all access.
    pub fn elf(&self) -> Vec<u8> {
        let mut out = vec![0x7f, b'E', b'L', b'F', 2, 1, 1, 0];
        out.resize(16, 0);
        let memory = (self.output - BASE) as usize + self.output_len;
        let header = 0x1000u64;
        for (value, bytes) in [
            (2u64, 2),
            (243, 2),
            (1, 4),
            (BASE, 8),
            (64, 8),
            (0, 8),
            (5, 4),
            (64, 2),
            (56, 2),
            (1, 2),
            (64, 2),
            (0, 2),
            (0, 2),
            // The segment.
            (1, 4),
            (7, 4),
            (header, 8),
            (BASE, 8),
            (BASE, 8),
            (self.image.len() as u64, 8),
            (memory as u64, 8),
            (0x1000, 8),
        ] {
            out.extend_from_slice(&value.to_le_bytes()[..bytes]);
        }
        out.resize(header as usize, 0);
        out.extend_from_slice(&self.image);
        out
    }
}

/// Picks instructions.
struct Picker {
    wide: Vec<(u32, u32)>,
    compressed: Vec<(u32, u32)>,
    fp: Vec<(u32, u32)>,
}

/// What an instruction of the table can be used for.
enum Use {
    /// As it is.
    Plain,
    /// With its base register forced to the scratch memory.
    Memory,
    /// Not at random.
    No,
}

fn usable(insn: &Insn) -> Use {
    match insn.name() {
        "lb" | "lh" | "lw" | "ld" | "lbu" | "lhu" | "lwu" | "sb" | "sh" | "sw" | "sd" | "flw" | "fld"
        | "fsw" | "fsd" => Use::Memory,
        "ecall" | "ebreak" | "mret" | "sret" | "wfi" | "sfence_vma" | "fence_i" | "jal" | "jalr" => Use::No,
        "beq" | "bne" | "blt" | "bge" | "bltu" | "bgeu" => Use::No,
        // Debian's qemu-riscv64 7.2 gives 64 for a low word of zero.
        "ctzw" => Use::No,
        name if name.starts_with("csr") || name.starts_with("lr_") || name.starts_with("sc_") => Use::No,
        name if name.starts_with("amo") => Use::No,
        _ => Use::Plain,
    }
}

/// True if `insn` writes one of the reserved integer registers, or rounds in a reserved way.
fn harmful(insn: &Insn) -> bool {
    let text = format!("{insn:?}");
    let operand = |name: &str| -> Option<u32> {
        let at = text.find(&format!(" {name}: "))? + name.len() + 3;
        text[at..].split(|c: char| !c.is_ascii_digit()).next()?.parse().ok()
    };
    if operand("rm").is_some_and(|rm| rm == 5 || rm == 6) {
        return true;
    }
    // Those that write floating-point registers: no harm.
    let name = insn.name();
    let to_float = name.starts_with('f')
        && !name.starts_with("fcvt_w")
        && !name.starts_with("fcvt_l")
        && ![
            "fmv_x_w", "fmv_x_d", "feq_s", "feq_d", "flt_s", "flt_d", "fle_s", "fle_d", "fclass_s",
            "fclass_d",
        ]
        .contains(&name);
    !to_float && operand("rd").is_some_and(|rd| RESERVED.contains(&rd))
}

impl Picker {
    fn new() -> Self {
        let mut g = Generator::new();
        g.table("rv64.dec", include_str!("../../isa/rv64.dec")).expect("a table");
        g.table("rv64c.dec", include_str!("../../isa/rv64c.dec")).expect("a table");
        let all = |function: &str| -> Vec<(u32, u32)> {
            g.spec()
                .encodings(function)
                .filter(|e| e.0 != "reserved")
                .map(|e| (e.1 as u32, e.2 as u32))
                .collect()
        };
        let wide = all("decode32");
        let is_fp = |value: u32| matches!(value & 0x7f, 0x53 | 0x43 | 0x47 | 0x4b | 0x4f);
        let fp = wide.iter().copied().filter(|e| is_fp(e.1)).collect();
        Self { wide, compressed: all("decode16"), fp }
    }

    /// Appends one sequence.
    fn sequence(&self, random: &mut Random, code: &mut Code) -> Vec<(u64, u32)> {
        let mut out = Vec::with_capacity(LENGTH);
        // Forward branches that are open: to be patched once their target is reached.
        let mut open: Vec<(u64, usize)> = Vec::new();
        while out.len() < LENGTH || !open.is_empty() {
            open.retain(|&(at, until)| {
                if out.len() >= until {
                    code.patch_branch(at, code.pc());
                }
                out.len() < until
            });
            if out.len() >= LENGTH && open.is_empty() {
                break;
            }
            match random.below(40) {
                0 | 1 => self.atomic(random, code, &mut out),
                2 => self.reserve(random, code, &mut out),
                3 => self.csr(random, code, &mut out),
                4 if out.len() < LENGTH => {
                    let at = code.pc();
                    let insn = asm::branch(
                        random.pick(&[0, 1, 4, 5, 6, 7]),
                        random.below(32) as u32,
                        random.below(32) as u32,
                        8,
                    );
                    code.emit(&mut out, insn);
                    open.push((at, out.len() + 1 + random.below(5)));
                }
                5 => {
                    // A call of what follows, and a constant.
                    let insn = asm::jal(random.pick(&[0, 1, 5, 7]), 4);
                    code.emit(&mut out, insn);
                }
                6..22 => self.one(random, code, &mut out, &self.fp),
                22..30 => self.one(random, code, &mut out, &self.compressed),
                _ => self.one(random, code, &mut out, &self.wide),
            }
        }
        // Branches in the listing as they were patched.
        for (pc, raw) in &mut out {
            *raw = code.read(*pc, *raw);
        }
        out
    }

    fn one(&self, random: &mut Random, code: &mut Code, out: &mut Vec<(u64, u32)>, from: &[(u32, u32)]) {
        loop {
            let (mask, value) = random.pick(from);
            let mut raw = random.word() as u32 & !mask | value;
            let compressed = raw & 3 != 3;
            if compressed {
                raw &= 0xffff;
            }
            let Some(insn) = decode(raw).0 else { continue };
            match usable(&insn) {
                Use::No => continue,
                Use::Memory if !compressed => raw = raw & !(31 << 15) | SCRATCH << 15,
                // Through s0, or sp as they are.
                Use::Memory if raw & 3 == 0 => raw &= !(7 << 7),
                _ => {}
            }
            let Some(insn) = decode(raw).0 else { continue };
            if !harmful(&insn) {
                return code.emit(out, raw);
            }
        }
    }

    /// A register that may be written.
    fn free(random: &mut Random) -> u32 {
        loop {
            let r = random.below(32) as u32;
            if !RESERVED.contains(&r) {
                return r;
            }
        }
    }

    fn atomic(&self, random: &mut Random, code: &mut Code, out: &mut Vec<(u64, u32)>) {
        let offset = (random.word() as i32 & 0xff) * 8 - 1024;
        code.emit(out, asm::addi(TEMP, SCRATCH, offset));
        let funct5 = random.pick(&[0u32, 1, 4, 8, 12, 16, 20, 24, 28]);
        let width = 2 + random.below(2) as u32;
        let (rd, rs2, order) = (Self::free(random), random.below(30) as u32, random.below(4) as u32);
        code.emit(out, funct5 << 27 | order << 25 | rs2 << 20 | TEMP << 15 | width << 12 | rd << 7 | 0x2f);
    }

    fn reserve(&self, random: &mut Random, code: &mut Code, out: &mut Vec<(u64, u32)>) {
        let offset = (random.word() as i32 & 0xff) * 8 - 1024;
        let width = 2 + random.below(2) as u32;
        code.emit(out, asm::addi(TEMP, SCRATCH, offset));
        if random.below(8) != 0 {
            code.emit(out, 2 << 27 | TEMP << 15 | width << 12 | Self::free(random) << 7 | 0x2f);
        }
        match random.below(8) {
            // Memory changes in between, or another address is used.
            0 => code.emit(out, asm::store(3, random.below(30) as u32, TEMP, 0)),
            1 => code.emit(out, asm::addi(TEMP, TEMP, 8)),
            _ => {}
        }
        let rs2 = random.below(30) as u32;
        code.emit(out, 3 << 27 | rs2 << 20 | TEMP << 15 | width << 12 | Self::free(random) << 7 | 0x2f);
    }

    fn csr(&self, random: &mut Random, code: &mut Code, out: &mut Vec<(u64, u32)>) {
        let rd = Self::free(random);
        match random.below(5) {
            // frm: one of the five modes.
            0 | 1 => code.emit(out, asm::csr(5, rd, random.below(5) as u32, 2)),
            2 => {
                let kind = random.pick(&[1, 2, 3, 5, 6, 7]);
                code.emit(out, asm::csr(kind, rd, random.below(30) as u32, 1));
            }
            3 => code.emit(out, asm::csr(2, rd, 0, random.pick(&[1, 2, 3]))),
            _ => {
                let value = random.below(5) as i32 * 32 + random.below(32) as i32;
                code.emit(out, asm::addi(TEMP, 0, value));
                code.emit(out, asm::csr(1, rd, TEMP, 3));
            }
        }
    }
}
