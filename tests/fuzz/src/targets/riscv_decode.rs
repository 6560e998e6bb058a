//! The generated RISC-V decoder against the table that it is generated from.

use std::cell::OnceCell;

use holdfast_decode_gen::Generator;
use holdfast_guest_riscv::decode::{Insn, decode};

thread_local!(static TABLE: OnceCell<Generator> = const { OnceCell::new() });

fn table() -> Generator {
    let mut g = Generator::new();
    g.table("rv64.dec", include_str!("../../../../accel-tcg/guests/riscv/isa/rv64.dec")).expect("a table");
    g.table("rv64c.dec", include_str!("../../../../accel-tcg/guests/riscv/isa/rv64c.dec")).expect("a table");
    g
}

/// `Add(R { rd: 1, rs1: 2, rs2: 3 })` in the table's terms.
fn text(insn: Insn) -> String {
    let debug = format!("{insn:?}");
    let operands = debug.split_once(" {").map_or("", |x| x.1).trim_end_matches([')', '}', ' ']);
    format!("{}{operands}", insn.name())
}

/// Runs one input.
pub fn run(data: &[u8]) {
    TABLE.with(|cell| {
        let table = cell.get_or_init(table);
        for word in data.chunks_exact(4).take(64) {
            let word = u32::from_le_bytes([word[0], word[1], word[2], word[3]]);
            let (insn, len) = decode(word);
            assert_eq!(len, if word & 3 == 3 { 4 } else { 2 }, "{word:#x}");
            let (function, bits) = if len == 4 { ("decode32", word) } else { ("decode16", word & 0xffff) };
            let expected = table.spec().decode(function, u64::from(bits)).map(|(name, _, operands)| {
                let operands: Vec<_> = operands.iter().map(|(n, v)| format!(" {n}: {v}")).collect();
                format!("{name}{}", operands.join(","))
            });
            assert_eq!(insn.map(text), expected, "{word:#x}");
        }
    });
}
