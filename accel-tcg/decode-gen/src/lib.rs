//! Generates instruction decoders from text tables.
//!
//! A table says, one line per encoding, which bits an instruction has and where its operands are. From
//! one or more tables [`Generator`] writes Rust: an enum with one variant per instruction, a struct of
//! operands per format, and per table a function that decodes one word by nested matches on the bits
//! that tell the encodings apart. It is meant to be called from a `build.rs`.
//!
//! # The table language
//!
//! One directive a line; `#` starts a comment (but not in `=#`), blanks separate words.
//!
//! ```text
//! decoder decode32 32                  # the function that this table makes and the width of a word
//! field rd 11:7                        # a field: bits 11 to 7
//! field imm_b 31,7,30:25,11:8 signed <<1   # concatenated, most significant first; sign-extended; shifted
//! field rdc 4:2 +8                     # 8 is added
//! format r rd rs1 rs2                  # operands; each is read from the field of its name
//! format i rd rs1 imm:signed           # no field is called `imm`: each encoding must say which it is
//! insn add r 0000000 ..... ..... 000 ..... 0110011
//! insn addi i imm=imm_i ............ ..... 000 ..... 0010011
//! insn ret i rd=#0 rs1=#1 imm=#0 1000000010000010   # constants
//! group                                # within a group encodings may overlap: the first that fits wins
//! reserved ........ 00000000           # decodes to nothing
//! insn ...
//! end
//! ```
//!
//! A pattern gives each bit as `0`, `1`, `.` (an operand's) or `-` (ignored), most significant first,
//! blanks anywhere. A `.` that no operand reads, encodings that overlap outside a group, and an encoding
//! in a group that can never be reached are errors, reported with their line. An instruction may have
//! several encodings, in several tables (compressed forms decode to what they stand for), if all have
//! the same format. Tables share fields and formats with the tables added before them.

mod emit;
mod parse;
mod spec;
mod tree;

pub use spec::{Decoded, Error, ErrorKind, Spec};

/// Reads tables and writes a decoder.
#[derive(Debug, Default)]
pub struct Generator {
    spec: Spec,
}

impl Generator {
    /// A generator without tables.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a table. `name` stands for it in errors.
    ///
    /// # Errors
    /// [`Error`] with the line of the first thing that is wrong.
    pub fn table(&mut self, name: &str, text: &str) -> Result<&mut Self, Error> {
        parse::table(&mut self.spec, name, text)?;
        Ok(self)
    }

    /// What the tables said.
    pub fn spec(&self) -> &Spec {
        &self.spec
    }

    /// The Rust source of the decoder, to be included in a module of its own.
    pub fn generate(&self) -> String {
        emit::rust(&self.spec)
    }
}

#[cfg(test)]
mod tests;
