//! A test case: code, where it is, and the state it starts from. And the address space that both processors see.

use std::fmt;

use super::random::Random;

/// Start of the code area, at the same address on the host and in the guest.
pub const CODE: u64 = 0x2000_0000;
/// Its size in bytes; a page that is not mapped follows.
pub const CODE_SIZE: usize = 0x1_0000;
/// Code ends by a jump here.
pub const END: u64 = 0x2008_0000;
/// The same for 32-bit code.
pub const END32: u64 = END + 0x40;
/// Start of data: two writable pages, then a read-only one; pages before and behind are not mapped.
pub const DATA: u64 = 0x2010_0000;
/// Bytes that can be written.
pub const DATA_RW: usize = 0x2000;
/// Bytes that can be read.
pub const DATA_SIZE: usize = 0x3000;
/// Bytes of an XSAVE area with x87, SSE, AVX and AVX-512 in the standard format, as Intel's processors lay it out.
pub const XSAVE_SIZE: usize = ZMM_UPPER + 16 * 64;
/// Where the opmask registers are in it.
pub const OPMASK: usize = 1088;
/// The upper halves of ZMM0 to ZMM15.
pub const ZMM_HIGH: usize = 1152;
/// ZMM16 to ZMM31.
pub const ZMM_UPPER: usize = 1664;
/// Selector of 64-bit code at CPL 3, as Linux has it.
pub const CS64: u16 = 0x33;
/// Selector of 32-bit code.
pub const CS32: u16 = 0x23;
/// Selector of the stack, and of data for 32-bit code.
pub const SS: u16 = 0x2b;

/// What a general register holds at the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Any value.
    Any,
    /// An address in or near the data.
    Pointer,
    /// A small number, for indexes and counts.
    Small,
}

/// A processor's user-level state.
#[derive(Clone, PartialEq, Eq)]
pub struct Image {
    /// General registers as encoded.
    pub gpr: [u64; 16],
    /// Program counter.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// XSAVE area, standard format.
    pub xsave: [u8; XSAVE_SIZE],
}

impl Image {
    /// All zero, with a valid XSAVE header.
    pub fn new() -> Self {
        let mut image = Self { gpr: [0; 16], rip: 0, rflags: 2, xsave: [0; XSAVE_SIZE] };
        image.put(0, &0x37fu16.to_le_bytes());
        image.put(24, &0x1f80u32.to_le_bytes());
        image.put(28, &0xffffu32.to_le_bytes());
        image.put(512, &7u64.to_le_bytes());
        image
    }

    /// Puts `bytes` into the XSAVE area.
    pub fn put(&mut self, at: usize, bytes: &[u8]) {
        self.xsave[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// `N` bytes of the XSAVE area.
    pub fn get<const N: usize>(&self, at: usize) -> [u8; N] {
        self.xsave[at..at + N].try_into().expect("N bytes")
    }
}

/// How a run ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The code came to its end.
    Done,
    /// An exception.
    Fault {
        /// Its vector.
        vector: u8,
        /// Its error code, 0 if it has none.
        error: u32,
        /// CR2 for page faults, else 0.
        address: u64,
    },
    /// It ended in a way that no processor does: a bug, described.
    Broken(&'static str),
}

/// What a run left.
#[derive(Clone)]
pub struct Outcome {
    /// How it ended.
    pub end: End,
    /// The state at the end, or at the faulting instruction.
    pub image: Image,
}

/// One of the processors that are compared.
pub trait Processor {
    /// For messages.
    fn name(&self) -> &'static str;
    /// Writes code at an offset of the code area.
    fn place(&mut self, at: usize, code: &[u8]);
    /// Runs from `image` in 64- or 32-bit mode with data that starts as `data`.
    fn run(&mut self, bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome;
    /// The writable data after a run.
    fn data(&self) -> &[u8];
}

/// Code with the state it starts from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Case {
    /// 64 or 32.
    pub bits: u32,
    /// Offset in the code area.
    pub at: usize,
    /// Bytes, without the jump to the end.
    pub code: Vec<u8>,
    /// What general registers hold.
    pub roles: [Role; 16],
    /// Everything else follows from it.
    pub seed: u64,
    /// With AVX-512's registers.
    pub wide: bool,
}

impl fmt::Display for Case {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{} {:#x} ", self.bits, if self.wide { "z" } else { "" }, self.at)?;
        self.code.iter().try_for_each(|b| write!(f, "{b:02x}"))?;
        f.write_str(" ")?;
        for role in self.roles {
            f.write_str(match role {
                Role::Any => "a",
                Role::Pointer => "p",
                Role::Small => "s",
            })?;
        }
        write!(f, " {:#x}", self.seed)
    }
}

impl Case {
    /// Reads what `Display` writes; the rest of the line is a comment.
    pub fn parse(line: &str) -> Option<Self> {
        let hex = |s: &str| u64::from_str_radix(s.strip_prefix("0x")?, 16).ok();
        let mut words = line.split_whitespace();
        let bits = words.next()?;
        let (bits, wide) = bits.strip_suffix('z').map_or((bits, false), |bits| (bits, true));
        let bits = bits.parse().ok()?;
        let at = hex(words.next()?)? as usize;
        let code = words.next()?;
        let code = (0..code.len() / 2)
            .map(|i| u8::from_str_radix(&code[2 * i..2 * i + 2], 16).ok())
            .collect::<Option<Vec<u8>>>()?;
        let mut roles = [Role::Any; 16];
        for (role, c) in roles.iter_mut().zip(words.next()?.chars()) {
            *role = match c {
                'p' => Role::Pointer,
                's' => Role::Small,
                _ => Role::Any,
            };
        }
        Some(Self { bits, at, code, roles, seed: hex(words.next()?)?, wide })
    }

    /// The code with its jump to the end.
    pub fn bytes(&self) -> Vec<u8> {
        let mut bytes = self.code.clone();
        let end = if self.bits == 64 { END } else { END32 };
        let behind = CODE + (self.at + bytes.len() + 5) as u64;
        bytes.push(0xe9);
        bytes.extend_from_slice(&(end.wrapping_sub(behind) as u32).to_le_bytes());
        bytes
    }

    /// The state it starts from.
    pub fn image(&self) -> Image {
        let mut random = Random::new(self.seed);
        let mut image = Image::new();
        image.rip = CODE + self.at as u64;
        image.rflags = flags(&mut random);
        for (register, role) in image.gpr.iter_mut().zip(self.roles) {
            *register = match role {
                Role::Any => random.integer(),
                Role::Pointer => pointer(&mut random),
                Role::Small if random.percent(90) => random.below(40),
                Role::Small => random.below(40).wrapping_neg(),
            };
        }
        if self.bits == 32 {
            image.gpr[..8].iter_mut().for_each(|r| *r &= 0xffff_ffff);
            image.gpr[8..].fill(0);
        }
        vectors(&mut random, &mut image);
        x87(&mut random, &mut image);
        if self.wide {
            // From numbers of their own, for cases of the corpus are older.
            wide(&mut Random::new(self.seed ^ 0x512), &mut image);
        }
        image
    }

    /// Which of the [`patterns`] data starts as.
    pub fn pattern(&self) -> usize {
        (self.seed >> 7) as usize % (PATTERNS / 2) * 2 + usize::from(self.bits == 32)
    }
}

fn flags(random: &mut Random) -> u64 {
    let mut flags = 0x202 | random.next() & 0x8d5;
    if random.percent(12) {
        flags |= 0x400;
    }
    if random.percent(2) {
        flags |= 1 << 18;
    }
    flags
}

/// An address in or near the data.
pub fn pointer(random: &mut Random) -> u64 {
    match random.below(20) {
        0..10 => DATA + (random.below(0x2000) & !31),
        10..15 => DATA + random.below(0x2000),
        15 | 16 => DATA + 0xff0 + random.below(0x20),
        17 => DATA + 0x1ff0 + random.below(0x20),
        18 => DATA + 0x2000 + random.below(0x1000),
        _ => (DATA - 16 + random.below(0x20)).wrapping_add(random.pick(&[0, DATA_SIZE as u64])),
    }
}

fn vectors(random: &mut Random, image: &mut Image) {
    let all = if random.percent(70) { Some(random.below(7)) } else { None };
    for register in 0..16 {
        let kind = all.unwrap_or_else(|| random.below(7));
        for lane in 0..2 {
            let (low, high) = (random.lane(kind), random.lane(kind));
            image.put(160 + 16 * register + 8 * lane, &low.to_le_bytes());
            image.put(576 + 16 * register + 8 * lane, &high.to_le_bytes());
        }
    }
    let mut mxcsr = 0x1f80u32 | (random.below(4) as u32) << 13;
    match random.below(10) {
        0 => mxcsr ^= 1 << 15,
        1 => mxcsr ^= 1 << 6,
        2 => mxcsr ^= (random.below(64) as u32) << 7,
        3 => mxcsr |= random.below(64) as u32,
        _ => {}
    }
    image.put(24, &mxcsr.to_le_bytes());
}

/// AVX-512's registers.
fn wide(random: &mut Random, image: &mut Image) {
    let all = if random.percent(70) { Some(random.below(7)) } else { None };
    for at in (ZMM_HIGH..XSAVE_SIZE).step_by(8) {
        let kind = all.unwrap_or_else(|| random.below(7));
        let lane = random.lane(kind);
        image.put(at, &lane.to_le_bytes());
    }
    for at in (OPMASK..ZMM_HIGH).step_by(8) {
        let mask = match random.below(8) {
            0 => 0,
            1 => u64::MAX,
            2 => u64::MAX >> random.below(64),
            3 => 1 << random.below(16),
            4 => random.below(256),
            _ => random.next(),
        };
        image.put(at, &mask.to_le_bytes());
    }
    image.put(512, &0xe7u64.to_le_bytes());
}

fn x87(random: &mut Random, image: &mut Image) {
    let mut control = 0x37fu16;
    match random.below(8) {
        0..3 => control = control & !0xf00 | random.pick(&[0u16, 2, 3]) << 8 | (random.below(4) as u16) << 10,
        3 => control ^= random.below(64) as u16,
        _ => {}
    }
    let mut status = (random.below(8) as u16) << 11 | (random.next() as u16 & 0x4700);
    if random.percent(5) {
        status |= random.below(0x80) as u16;
    }
    // A summary that does not follow from flags and masks is corrected by the load.
    if status & !control & 0x3f != 0 {
        status |= 0x8080;
    }
    let valid = if random.percent(50) { random.next() as u8 } else { random.pick(&[0, 0xff, 0x0f, 0xf0]) };
    image.put(0, &control.to_le_bytes());
    image.put(2, &status.to_le_bytes());
    image.put(4, &[valid]);
    for register in 0..8 {
        let (significand, exponent) = random.extended();
        image.put(32 + 16 * register, &significand.to_le_bytes());
        image.put(40 + 16 * register, &exponent.to_le_bytes());
    }
}

/// Number of [`patterns`].
const PATTERNS: usize = 64;

/// What data can start as.
pub fn patterns() -> Vec<[u8; DATA_SIZE]> {
    let mut random = Random::new(0xda7a);
    let mut all = vec![[0; DATA_SIZE]; PATTERNS];
    for (i, pattern) in all.iter_mut().enumerate() {
        let whole = i as u64 % 9;
        for chunk in pattern.chunks_exact_mut(8) {
            let kind = if whole < 7 { whole } else { random.below(7) };
            let value = match random.below(24) {
                0 if i % 2 == 1 => END32 << 32 | END32,
                0 => END,
                1 => pointer(&mut random),
                2 => {
                    let (significand, exponent) = random.extended();
                    if random.percent(50) { significand } else { u64::from(exponent) }
                }
                _ => random.lane(kind),
            };
            chunk.copy_from_slice(&value.to_le_bytes());
        }
    }
    all
}
