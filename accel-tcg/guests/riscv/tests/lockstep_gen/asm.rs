//! The fixed part of the programs, assembled by hand.

use super::{BASE, DUMP_WORDS};

/// x30: addresses made on the spot.
pub const TEMP: u32 = 30;
/// x31: the scratch memory.
pub const SCRATCH: u32 = 31;

pub fn addi(rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32 & 0xfff) << 20 | rs1 << 15 | rd << 7 | 0x13
}

/// A load (opcode 0x03) or a floating-point load (0x07) of 8 bytes.
fn load(opcode: u32, rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32 & 0xfff) << 20 | rs1 << 15 | 3 << 12 | rd << 7 | opcode
}

fn store_op(opcode: u32, width: u32, rs2: u32, rs1: u32, imm: i32) -> u32 {
    let imm = imm as u32 & 0xfff;
    imm >> 5 << 25 | rs2 << 20 | rs1 << 15 | width << 12 | (imm & 31) << 7 | opcode
}

pub fn store(width: u32, rs2: u32, rs1: u32, imm: i32) -> u32 {
    store_op(0x23, width, rs2, rs1, imm)
}

pub fn csr(funct3: u32, rd: u32, rs1: u32, number: u32) -> u32 {
    number << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x73
}

pub fn branch(funct3: u32, rs1: u32, rs2: u32, offset: i32) -> u32 {
    let o = offset as u32;
    let imm = (o >> 12 & 1) << 31 | (o >> 5 & 63) << 25 | (o >> 1 & 15) << 8 | (o >> 11 & 1) << 7;
    imm | rs2 << 20 | rs1 << 15 | funct3 << 12 | 0x63
}

pub fn jal(rd: u32, offset: i32) -> u32 {
    let o = offset as u32;
    (o >> 20 & 1) << 31
        | (o >> 1 & 0x3ff) << 21
        | (o >> 11 & 1) << 20
        | (o >> 12 & 0xff) << 12
        | rd << 7
        | 0x6f
}

fn jalr(rd: u32, rs1: u32) -> u32 {
    rs1 << 15 | rd << 7 | 0x67
}

/// Where things are.
pub struct Layout {
    pub scratch: u64,
    pub scratch_size: u64,
    pub input: u64,
    pub output: u64,
    pub output_len: usize,
    pub runs: usize,
}

/// Addresses in the driver.
pub struct Driver {
    /// Sequences go on here when they are done.
    pub after: u64,
    /// Where the program ends when run bare.
    pub end: u64,
    /// The address of the table of sequences is loaded here.
    pub table_at: u64,
}

/// Code that grows.
pub struct Code {
    base: u64,
    bytes: Vec<u8>,
}

impl Code {
    pub fn new(base: u64) -> Self {
        Self { base, bytes: Vec::new() }
    }

    pub fn pc(&self) -> u64 {
        self.base + self.bytes.len() as u64
    }

    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    pub fn bytes(self) -> Vec<u8> {
        self.bytes
    }

    fn put(&mut self, raw: u32) {
        let len = if raw & 3 == 3 { 4 } else { 2 };
        self.bytes.extend_from_slice(&raw.to_le_bytes()[..len]);
    }

    /// Appends an instruction of a sequence.
    pub fn emit(&mut self, out: &mut Vec<(u64, u32)>, raw: u32) {
        out.push((self.pc(), raw));
        self.put(raw);
    }

    pub fn dword(&mut self, value: u64) {
        self.bytes.extend_from_slice(&value.to_le_bytes());
    }

    pub fn align(&mut self, to: usize) -> u64 {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
        self.pc()
    }

    fn word_mut(&mut self, at: u64) -> &mut [u8] {
        let at = (at - self.base) as usize;
        &mut self.bytes[at..at + 4]
    }

    /// The instruction at `at` as it is now; `like` tells its length.
    pub fn read(&mut self, at: u64, like: u32) -> u32 {
        if like & 3 != 3 {
            return like;
        }
        let bytes: &[u8] = self.word_mut(at);
        u32::from_le_bytes(bytes.try_into().expect("4 bytes"))
    }

    /// Points the branch at `at` to `to`.
    pub fn patch_branch(&mut self, at: u64, to: u64) {
        let old = self.read(at, 3);
        let new = branch(old >> 12 & 7, old >> 15 & 31, old >> 20 & 31, (to - at) as i32);
        self.word_mut(at).copy_from_slice(&new.to_le_bytes());
    }

    /// `rd = value`, in two instructions; values are below 2^31 - 2^11.
    fn li(&mut self, rd: u32, value: u64) {
        let high = (value as u32).wrapping_add(0x800) & 0xffff_f000;
        self.put(high | rd << 7 | 0x37);
        self.put(addi(rd, rd, (value as u32).wrapping_sub(high) as i32));
    }

    /// Sets the address that two instructions at `at` make in x5.
    pub fn patch_address(&mut self, at: u64, value: u64) {
        let mut made = Self::new(at);
        made.li(5, value);
        let at = (at - self.base) as usize;
        self.bytes[at..at + 8].copy_from_slice(&made.bytes);
    }

    /// `j to`, however far.
    pub fn jump(&mut self, to: u64) {
        self.put(jal(0, to.wrapping_sub(self.pc()) as i32));
    }

    /// The driver: loads a register state, runs a sequence, stores the registers; at the end copies the scratch
    /// memory behind them, writes all to standard output and exits. Its own state is three words at `control`: the
    /// next state to load, the next dump, the next entry of the table.
    pub fn driver(&mut self, layout: &Layout) -> Driver {
        let control = BASE + 0xf_f000;
        let middle = layout.scratch + layout.scratch_size / 2;
        self.li(6, layout.input);
        self.li(7, layout.output);
        let table_at = self.pc();
        self.li(5, 0);
        self.li(TEMP, control);
        for (slot, r) in [(0, 6), (8, 7), (16, 5)] {
            self.put(store(3, r, TEMP, slot));
        }
        // Loads the next state.
        let next = self.pc();
        self.li(SCRATCH, control);
        self.put(load(3, TEMP, SCRATCH, 0));
        self.put(load(3, 1, TEMP, 0));
        self.put(csr(1, 0, 1, 3));
        for f in 0..32 {
            self.put(load(7, f, TEMP, (256 + f * 8) as i32));
        }
        for x in 1..30 {
            self.put(load(3, x, TEMP, (x * 8) as i32));
        }
        self.put(load(3, TEMP, SCRATCH, 16));
        self.put(load(3, TEMP, TEMP, 0));
        self.li(SCRATCH, middle);
        self.put(jalr(0, TEMP));
        // Stores the registers.
        let after = self.pc();
        self.li(SCRATCH, control);
        self.put(load(3, TEMP, SCRATCH, 8));
        for x in 1..30 {
            self.put(store(3, x, TEMP, (x * 8) as i32));
        }
        for f in 0..32 {
            self.put(store_op(0x27, 3, f, TEMP, (256 + f * 8) as i32));
        }
        self.put(csr(2, 1, 0, 3));
        self.put(store(3, 1, TEMP, 0));
        for (slot, step) in [(0, DUMP_WORDS as i32 * 8), (8, DUMP_WORDS as i32 * 8), (16, 8)] {
            self.put(load(3, 5, SCRATCH, slot));
            self.put(addi(5, 5, step));
            self.put(store(3, 5, SCRATCH, slot));
        }
        self.put(load(3, 5, SCRATCH, 8));
        self.li(6, layout.output + (layout.runs * DUMP_WORDS * 8) as u64);
        let back = self.pc() + 4;
        self.put(branch(0, 5, 6, 8));
        self.put(jal(0, next.wrapping_sub(back) as i32));
        // The scratch memory.
        self.li(7, layout.scratch);
        self.li(8, layout.scratch + layout.scratch_size);
        let copy = self.pc();
        self.put(load(3, 9, 7, 0));
        self.put(store(3, 9, 5, 0));
        self.put(addi(5, 5, 8));
        self.put(addi(7, 7, 8));
        let here = self.pc();
        self.put(branch(1, 7, 8, copy.wrapping_sub(here) as i32));
        let end = self.pc();
        self.li(10, 1);
        self.li(11, layout.output);
        self.li(12, layout.output_len as u64);
        self.li(17, 64);
        self.put(0x73);
        self.li(10, 0);
        self.li(17, 93);
        self.put(0x73);
        Driver { after, end, table_at }
    }
}
