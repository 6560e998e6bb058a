//! One instruction from a template, its operands in reach of the data.

use iced_x86::{Decoder, DecoderOptions, Instruction, OpKind, Register};

use super::case::{Role, pointer};
use super::random::Random;
use super::templates::{Head, Template, head_bytes, is_string};

/// Encodes templates at an address.
pub struct Emit<'a> {
    /// Where choices come from.
    pub random: &'a mut Random,
    /// What registers hold.
    pub roles: &'a [Role; 16],
    /// 64 or 32.
    pub bits: u32,
    /// The instruction's address.
    pub ip: u64,
}

/// ModRM and what belongs to it.
#[derive(Default)]
struct Operand {
    bytes: Vec<u8>,
    /// REX.R, X, B as bits 2, 1, 0.
    rex: u8,
    /// Short displacements count operands.
    scaled: bool,
}

impl Emit<'_> {
    /// An instruction of `template`: its bytes and what they decode to.
    pub fn insn(&mut self, template: &Template) -> Option<(Vec<u8>, Instruction)> {
        let operand = self.operand(template);
        let mut bytes = self.prefixes(template);
        match template.head {
            Head::Legacy { map, prefix, wide, .. } => {
                let rex = operand.rex | u8::from(wide) << 3;
                let head = head_bytes(64, Head::Legacy { map, prefix: 0, wide: false, address: false }, 0);
                if prefix != 0 {
                    bytes.push(prefix);
                }
                if self.bits == 64 && (rex != 0 || self.random.percent(30)) {
                    bytes.push(0x40 | rex);
                }
                bytes.extend_from_slice(&head[..head.len() - 1]);
            }
            Head::Vex { map, pp, wide, long } => {
                let other = if self.random.percent(90) { self.random.below(16) as u8 } else { 0 };
                let other = if self.bits == 32 { other & 7 } else { other };
                let first = (operand.rex & 7) << 5 ^ 0xe0 | map;
                bytes.extend_from_slice(&[0xc4, first]);
                bytes.push(u8::from(wide) << 7 | (!other & 15) << 3 | u8::from(long) << 2 | pp);
            }
            Head::Evex { map, pp, wide, length, b } => {
                let long = u8::from(self.bits == 64);
                // An instruction that has no operand there wants none, and a vector index has one bit.
                let other = match self.random.below(10) {
                    0..3 => 0,
                    3 => 16,
                    _ => self.random.below(32) as u8,
                };
                let other = if self.bits == 32 { other & 7 } else { other };
                let mask = if self.random.percent(60) { self.random.below(8) as u8 } else { 0 };
                let zero = mask != 0 && self.random.percent(30);
                let high = self.random.below(2) as u8 & long;
                let index = if template.memory { 0 } else { self.random.below(2) as u8 & long };
                let first = ((operand.rex & 7 | index << 1) << 5 | high << 4) ^ 0xf0 | map;
                bytes.extend_from_slice(&[0x62, first]);
                bytes.push(u8::from(wide) << 7 | (!other & 15) << 3 | 4 | pp);
                let last = u8::from(zero) << 7 | length << 5 | u8::from(b) << 4;
                bytes.push(last | (!other >> 4 & 1) << 3 | mask);
            }
        }
        bytes.push(template.opcode);
        bytes.extend_from_slice(&operand.bytes);
        bytes.extend_from_slice(&self.random.next().to_le_bytes());
        if self.random.percent(30) {
            let at = bytes.len() - 8;
            let value = self.random.integer().to_le_bytes();
            bytes[at..].copy_from_slice(&value);
        }
        bytes.truncate(15);
        self.finish(bytes)
    }

    fn prefixes(&mut self, template: &Template) -> Vec<u8> {
        let mut bytes = Vec::with_capacity(15);
        if matches!(template.head, Head::Legacy { address: true, .. }) || self.random.percent(2) {
            bytes.push(0x67);
        }
        if self.random.percent(5) {
            bytes.push(self.random.pick(&[0x26, 0x2e, 0x36, 0x3e, 0x64, 0x65]));
        }
        let lockable = matches!(template.head, Head::Legacy { map: 0 | 1, .. }) && template.memory;
        if self.random.percent(if lockable { 10 } else { 0 }) {
            bytes.push(0xf0);
        }
        bytes
    }

    fn high(&mut self) -> u8 {
        if self.bits == 64 { self.random.below(2) as u8 } else { 0 }
    }

    fn bit_of(&mut self, mask: u8) -> u8 {
        let n = self.random.below(u64::from(mask.count_ones().max(1))) as u32;
        (0..8).filter(|b| mask >> b & 1 != 0).nth(n as usize).unwrap_or(0)
    }

    fn operand(&mut self, template: &Template) -> Operand {
        let reg = self.bit_of(template.regs);
        let high = self.high();
        let scaled = matches!(template.head, Head::Evex { .. });
        let mut operand = Operand { bytes: Vec::new(), rex: high << 2, scaled };
        if !template.memory {
            let rm = self.bit_of(template.rms);
            operand.rex |= self.high();
            operand.bytes.push(0xc0 | reg << 3 | rm);
            return operand;
        }
        let needs_sib = template.rms == 1 << 4;
        let kind = if needs_sib { 1 } else { self.random.below(10) };
        match kind {
            // Absolute or relative to RIP: the displacement is filled in later.
            0 => operand.bytes.extend_from_slice(&[reg << 3 | 5, 0, 0, 0, 0]),
            1..4 => self.with_sib(reg, &mut operand),
            _ => {
                let base = self.register(Role::Pointer);
                operand.rex |= base >> 3;
                if base & 7 == 4 {
                    self.displaced(reg, 4, &[0x24], base, &mut operand);
                } else {
                    self.displaced(reg, base & 7, &[], base, &mut operand);
                }
            }
        }
        operand
    }

    fn with_sib(&mut self, reg: u8, operand: &mut Operand) {
        let index = if self.random.percent(85) { self.register(Role::Small) } else { 4 };
        let index = if index == 4 && self.random.percent(50) { 5 } else { index };
        let scale = self.random.below(4) as u8;
        operand.rex |= index >> 3 << 1;
        if self.random.percent(10) {
            operand.bytes.extend_from_slice(&[reg << 3 | 4, scale << 6 | (index & 7) << 3 | 5, 0, 0, 0, 0]);
            return;
        }
        let base = self.register(Role::Pointer);
        operand.rex |= base >> 3;
        self.displaced(reg, 4, &[scale << 6 | (index & 7) << 3 | base & 7], base, operand);
    }

    /// ModRM with a displacement of some size.
    fn displaced(&mut self, reg: u8, rm: u8, sib: &[u8], base: u8, operand: &mut Operand) {
        let small = match self.random.below(4) {
            0 => 0,
            1 => (self.random.below(16) as i8) << 3,
            2 => (self.random.below(8) as i8 - 4) << 4,
            _ => self.random.below(16) as i8 - 8,
        };
        let small = if operand.scaled { small % 3 } else { small };
        let form = if base & 7 == 5 { 1 + self.random.below(2) } else { self.random.below(3) } as u8;
        operand.bytes.push(form << 6 | reg << 3 | rm);
        operand.bytes.extend_from_slice(sib);
        match form {
            1 => operand.bytes.push(small as u8),
            2 => operand.bytes.extend_from_slice(&i32::from(small).to_le_bytes()),
            _ => {}
        }
    }

    /// A register of the role, if there is one.
    fn register(&mut self, role: Role) -> u8 {
        let count = if self.bits == 64 { 16 } else { 8 };
        let all: Vec<u8> = (0..count).filter(|r| self.roles[usize::from(*r)] == role).collect();
        if all.is_empty() { self.random.below(count.into()) as u8 } else { self.random.pick(&all) }
    }

    /// Cuts to the length of the instruction and fills in displacements.
    fn finish(&mut self, mut bytes: Vec<u8>) -> Option<(Vec<u8>, Instruction)> {
        let (insn, offsets) = self.decode(&bytes)?;
        bytes.truncate(insn.len());
        let absolute = (0..insn.op_count()).any(|i| insn.op_kind(i) == OpKind::Memory)
            && (insn.memory_base() == Register::None || insn.is_ip_rel_memory_operand());
        if absolute && offsets.displacement_size() >= 4 {
            let mut to = pointer(self.random);
            if insn.is_ip_rel_memory_operand() {
                to = to.wrapping_sub(self.ip + bytes.len() as u64);
            }
            let (at, size) = (offsets.displacement_offset(), offsets.displacement_size());
            bytes[at..at + size].copy_from_slice(&to.to_le_bytes()[..size]);
        }
        if is_string(insn.mnemonic()) && self.roles[1] == Role::Any && self.random.percent(50) {
            // A count that is not small runs into the end of the data.
            return None;
        }
        let (insn, _) = self.decode(&bytes)?;
        Some((bytes, insn))
    }

    fn decode(&self, bytes: &[u8]) -> Option<(Instruction, iced_x86::ConstantOffsets)> {
        let mut decoder = Decoder::with_ip(self.bits, bytes, self.ip, DecoderOptions::NONE);
        let insn = decoder.decode();
        let offsets = decoder.get_constant_offsets(&insn);
        (!insn.is_invalid()).then_some((insn, offsets))
    }
}
