//! Encodings of the unprivileged specification, chapter 35, for tests.

use std::collections::HashMap;

pub const ZERO: u32 = 0;
pub const RA: u32 = 1;
pub const SP: u32 = 2;
pub const T0: u32 = 5;
pub const T1: u32 = 6;
pub const T2: u32 = 7;
pub const S0: u32 = 8;
pub const S1: u32 = 9;
pub const A0: u32 = 10;
pub const A1: u32 = 11;
pub const A2: u32 = 12;
pub const A3: u32 = 13;
pub const A4: u32 = 14;
pub const A5: u32 = 15;
pub const S2: u32 = 18;
pub const S3: u32 = 19;
pub const S4: u32 = 20;

pub const MSTATUS: u32 = 0x300;
pub const MIE: u32 = 0x304;
pub const MTVEC: u32 = 0x305;
pub const MEPC: u32 = 0x341;
pub const MCAUSE: u32 = 0x342;
pub const MTVAL: u32 = 0x343;
pub const SATP: u32 = 0x180;
pub const PMPCFG0: u32 = 0x3a0;
pub const PMPADDR0: u32 = 0x3b0;

#[derive(Debug, Clone, Copy)]
enum Fix {
    Branch,
    Jal,
}

/// Code with labels.
#[derive(Debug, Default)]
pub struct Asm {
    halves: Vec<u16>,
    labels: HashMap<&'static str, usize>,
    fixes: Vec<(usize, &'static str, Fix)>,
}

pub fn addi(rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32 & 0xfff) << 20 | rs1 << 15 | rd << 7 | 0x13
}

pub fn jalr(rd: u32, rs1: u32, imm: i32) -> u32 {
    (imm as u32 & 0xfff) << 20 | rs1 << 15 | rd << 7 | 0x67
}

impl Asm {
    pub fn new() -> Self {
        Self::default()
    }

    /// Bytes so far.
    pub fn here(&self) -> u64 {
        self.halves.len() as u64 * 2
    }

    pub fn label(&mut self, name: &'static str) -> &mut Self {
        assert!(self.labels.insert(name, self.halves.len()).is_none(), "label twice");
        self
    }

    /// Address of a label.
    pub fn at(&self, name: &str) -> u64 {
        super::RAM + self.labels[name] as u64 * 2
    }

    pub fn w(&mut self, insn: u32) -> &mut Self {
        self.halves.extend([insn as u16, (insn >> 16) as u16]);
        self
    }

    pub fn h(&mut self, insn: u16) -> &mut Self {
        self.halves.push(insn);
        self
    }

    /// Pads with nops up to `offset`.
    pub fn org(&mut self, offset: u64) -> &mut Self {
        assert!(self.here() <= offset);
        while self.here() < offset {
            self.h(1);
        }
        self
    }

    pub fn addi(&mut self, rd: u32, rs1: u32, imm: i32) -> &mut Self {
        self.w(addi(rd, rs1, imm))
    }

    pub fn r(&mut self, funct7: u32, rs2: u32, rs1: u32, funct3: u32, rd: u32) -> &mut Self {
        self.w(funct7 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x33)
    }

    pub fn add(&mut self, rd: u32, rs1: u32, rs2: u32) -> &mut Self {
        self.r(0, rs2, rs1, 0, rd)
    }

    pub fn xor(&mut self, rd: u32, rs1: u32, rs2: u32) -> &mut Self {
        self.r(0, rs2, rs1, 4, rd)
    }

    pub fn mul(&mut self, rd: u32, rs1: u32, rs2: u32) -> &mut Self {
        self.r(1, rs2, rs1, 0, rd)
    }

    pub fn slli(&mut self, rd: u32, rs1: u32, n: u32) -> &mut Self {
        self.w(n << 20 | rs1 << 15 | 1 << 12 | rd << 7 | 0x13)
    }

    /// Any constant, in a sequence whose length depends on it.
    pub fn li(&mut self, rd: u32, value: u64) -> &mut Self {
        let small = value as i64;
        if (-2048..2048).contains(&small) {
            return self.addi(rd, ZERO, small as i32);
        }
        if small == i64::from(small as i32) {
            let high = (small + 0x800) as u32 & 0xffff_f000;
            self.w(high | rd << 7 | 0x37);
            let low = (small as i32) << 20 >> 20;
            // addiw
            return self.w((low as u32 & 0xfff) << 20 | rd << 15 | rd << 7 | 0x1b);
        }
        let low = (small << 52) >> 52;
        self.li(rd, ((small - low) >> 12) as u64).slli(rd, rd, 12).addi(rd, rd, low as i32)
    }

    pub fn load(&mut self, funct3: u32, rd: u32, rs1: u32, imm: i32) -> &mut Self {
        self.w((imm as u32 & 0xfff) << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x03)
    }

    pub fn ld(&mut self, rd: u32, rs1: u32, imm: i32) -> &mut Self {
        self.load(3, rd, rs1, imm)
    }

    pub fn store(&mut self, funct3: u32, rs2: u32, rs1: u32, imm: i32) -> &mut Self {
        let imm = imm as u32;
        self.w((imm >> 5 & 0x7f) << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | (imm & 0x1f) << 7 | 0x23)
    }

    pub fn sd(&mut self, rs2: u32, rs1: u32, imm: i32) -> &mut Self {
        self.store(3, rs2, rs1, imm)
    }

    pub fn sw(&mut self, rs2: u32, rs1: u32, imm: i32) -> &mut Self {
        self.store(2, rs2, rs1, imm)
    }

    pub fn amo(&mut self, funct5: u32, rd: u32, rs1: u32, rs2: u32, funct3: u32) -> &mut Self {
        self.w(funct5 << 27 | 3 << 25 | rs2 << 20 | rs1 << 15 | funct3 << 12 | rd << 7 | 0x2f)
    }

    pub fn jalr(&mut self, rd: u32, rs1: u32, imm: i32) -> &mut Self {
        self.w(jalr(rd, rs1, imm))
    }

    pub fn ret(&mut self) -> &mut Self {
        self.jalr(ZERO, RA, 0)
    }

    pub fn csrw(&mut self, csr: u32, rs1: u32) -> &mut Self {
        self.w(csr << 20 | rs1 << 15 | 1 << 12 | 0x73)
    }

    pub fn csrs(&mut self, csr: u32, rs1: u32) -> &mut Self {
        self.w(csr << 20 | rs1 << 15 | 2 << 12 | 0x73)
    }

    pub fn csrr(&mut self, rd: u32, csr: u32) -> &mut Self {
        self.w(csr << 20 | 2 << 12 | rd << 7 | 0x73)
    }

    pub fn fence_i(&mut self) -> &mut Self {
        self.w(0x0000_100f)
    }

    pub fn sfence(&mut self, rs1: u32, rs2: u32) -> &mut Self {
        self.w(9 << 25 | rs2 << 20 | rs1 << 15 | 0x73)
    }

    pub fn mret(&mut self) -> &mut Self {
        self.w(0x3020_0073)
    }

    pub fn wfi(&mut self) -> &mut Self {
        self.w(0x1050_0073)
    }

    pub fn ebreak(&mut self) -> &mut Self {
        self.w(0x0010_0073)
    }

    pub fn branch(&mut self, funct3: u32, rs1: u32, rs2: u32, to: &'static str) -> &mut Self {
        self.fixes.push((self.halves.len(), to, Fix::Branch));
        self.w(rs2 << 20 | rs1 << 15 | funct3 << 12 | 0x63)
    }

    pub fn beq(&mut self, rs1: u32, rs2: u32, to: &'static str) -> &mut Self {
        self.branch(0, rs1, rs2, to)
    }

    pub fn bne(&mut self, rs1: u32, rs2: u32, to: &'static str) -> &mut Self {
        self.branch(1, rs1, rs2, to)
    }

    pub fn jal(&mut self, rd: u32, to: &'static str) -> &mut Self {
        self.fixes.push((self.halves.len(), to, Fix::Jal));
        self.w(rd << 7 | 0x6f)
    }

    pub fn j(&mut self, to: &'static str) -> &mut Self {
        self.jal(ZERO, to)
    }

    pub fn call(&mut self, to: &'static str) -> &mut Self {
        self.jal(RA, to)
    }

    /// Ends the test with the value in `reg`.
    pub fn done(&mut self, reg: u32) -> &mut Self {
        self.li(T0, super::DONE).sd(reg, T0, 0);
        // jal zero, 0
        self.w(0x6f)
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut halves = self.halves.clone();
        for (at, name, fix) in &self.fixes {
            let distance = (self.labels[name] as i64 - *at as i64) * 2;
            let d = distance as u32;
            let bits = match fix {
                Fix::Branch => {
                    assert!((-4096..4096).contains(&distance));
                    (d >> 12 & 1) << 31 | (d >> 5 & 0x3f) << 25 | (d >> 1 & 0xf) << 8 | (d >> 11 & 1) << 7
                }
                Fix::Jal => {
                    assert!((-1_048_576..1_048_576).contains(&distance));
                    (d >> 20 & 1) << 31
                        | (d >> 1 & 0x3ff) << 21
                        | (d >> 11 & 1) << 20
                        | (d >> 12 & 0xff) << 12
                }
            };
            halves[*at] |= bits as u16;
            halves[*at + 1] |= (bits >> 16) as u16;
        }
        halves.iter().flat_map(|h| h.to_le_bytes()).collect()
    }
}
