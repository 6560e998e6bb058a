//! Instruction decoding: generated from `isa/rv64.dec` and `isa/rv64c.dec`.

include!(concat!(env!("OUT_DIR"), "/decode.rs"));

/// True if the instruction that starts with the 16 bits `low` is 16 bits long; else it is 32 bits
/// long (unprivileged specification, section 1.5; longer formats are not instructions here).
#[inline]
pub fn is_compressed(low: u16) -> bool {
    low & 3 != 3
}

/// Decodes the instruction that starts in the low bits of `word`: it and its length in bytes. Of a
/// compressed instruction the upper half of `word` is ignored.
#[inline]
pub fn decode(word: u32) -> (Option<Insn>, u8) {
    let low = word as u16;
    if is_compressed(low) { (decode16(low), 2) } else { (decode32(word), 4) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_decode_gen::Generator;

    fn spec() -> Generator {
        let mut g = Generator::new();
        g.table("rv64.dec", include_str!("../isa/rv64.dec")).expect("a table");
        g.table("rv64c.dec", include_str!("../isa/rv64c.dec")).expect("a table");
        g
    }

    /// `Add(R { rd: 1, rs1: 2, rs2: 3 })` of the generated decoder in the oracle's terms.
    fn text(insn: Option<Insn>) -> Option<String> {
        let insn = insn?;
        let debug = format!("{insn:?}");
        let operands = debug.split_once(" {").map_or("", |x| x.1).trim_end_matches([')', '}', ' ']);
        Some(format!("{}{}", insn.name(), operands))
    }

    fn oracle(g: &Generator, function: &str, word: u32) -> Option<String> {
        let (name, _, operands) = g.spec().decode(function, u64::from(word))?;
        let operands: Vec<String> = operands.iter().map(|(n, v)| format!(" {n}: {v}")).collect();
        Some(format!("{name}{}", operands.join(",")))
    }

    #[test]
    fn all_compressed_words_decode_as_the_table_says() {
        let g = spec();
        let mut valid = 0;
        for w in (0..=u16::MAX).filter(|&w| is_compressed(w)) {
            let found = text(decode16(w));
            valid += usize::from(found.is_some());
            assert_eq!(found, oracle(&g, "decode16", u32::from(w)), "{w:#06x}");
        }
        assert!(valid > 40_000, "{valid}");
    }

    #[test]
    fn words_near_every_encoding_decode_as_the_table_says() {
        let g = spec();
        let mut x = 0x9e37_79b9_7f4a_7c15u64;
        let mut random = || {
            x ^= x << 13;
            x ^= x >> 7;
            x ^= x << 17;
            x as u32
        };
        let all: Vec<(u32, u32)> = g.spec().encodings("decode32").map(|e| (e.1 as u32, e.2 as u32)).collect();
        for &(mask, value) in &all {
            for round in 0..64 {
                let mut w = random() & !mask | value;
                if round & 1 != 0 {
                    w ^= 1 << (random() % 32); // perhaps another instruction, perhaps none
                }
                assert_eq!(text(decode32(w)), oracle(&g, "decode32", w), "{w:#010x}");
            }
        }
        assert!(g.spec().instructions().count() > 180);
    }

    #[test]
    fn some_words_as_the_assembler_makes_them() {
        for (word, want) in [
            (0x0010_0093, "addi rd: 1, rs1: 0, imm: 1"),
            (0xfff5_8593, "addi rd: 11, rs1: 11, imm: -1"),
            (0xfe20_8ee3, "beq rs1: 1, rs2: 2, imm: -4"),
            (0x0080_006f, "jal rd: 0, imm: 8"),
            (0x1234_50b7, "lui rd: 1, imm: 305418240"),
            (0x3020_0073, "mret"),
            (0x1141, "addi rd: 2, rs1: 2, imm: -16"),
            (0x8082, "jalr rd: 0, rs1: 1, imm: 0"),
            (0x60a2, "ld rd: 1, rs1: 2, imm: 8"),
            (0xe406, "sd rs1: 2, rs2: 1, imm: 8"),
            (0x7139, "addi rd: 2, rs1: 2, imm: -64"),
        ] {
            assert_eq!(text(decode(word).0).as_deref(), Some(want), "{word:#x}");
        }
        assert_eq!(decode(0), (None, 2));
        assert_eq!(decode(u32::MAX), (None, 4));
    }
}
