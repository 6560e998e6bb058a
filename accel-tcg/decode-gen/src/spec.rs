//! What tables say, checked.

use std::collections::BTreeMap;

/// What is wrong with a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ErrorKind {
    /// The first word of the line is no directive.
    #[error("`{0}` is no directive; decoder, field, format, insn, reserved, group and end are")]
    Directive(String),
    /// A directive lacks or has too many words.
    #[error("{0}")]
    Syntax(&'static str),
    /// A word cannot be read.
    #[error("`{0}` is not {1}")]
    Word(String, &'static str),
    /// A name is defined twice.
    #[error("`{0}` is defined twice")]
    Twice(String),
    /// A name is not defined.
    #[error("{1} `{0}` is not defined")]
    Unknown(String, &'static str),
    /// A pattern has the wrong number of bits.
    #[error("the pattern has {0} bits, a word has {1}")]
    Width(usize, u32),
    /// An operand bit is read by no operand.
    #[error("bit {0} is an operand's, but no operand reads it")]
    Unread(u32),
    /// A field reaches beyond the word.
    #[error("bit {0} is not in the word")]
    Range(u32),
    /// Signedness differs from the format's.
    #[error("operand `{0}` is signed in one place and unsigned in another")]
    Signedness(String),
    /// One instruction with two formats.
    #[error("`{0}` has format `{1}` elsewhere")]
    Format(String, String),
    /// Two encodings fit the same word.
    #[error("`{0}` overlaps `{1}` of line {2}")]
    Overlap(String, String, usize),
    /// An encoding in a group is hidden by an earlier one.
    #[error("`{0}` can never be reached: `{1}` of line {2} takes all of it")]
    Hidden(String, String, usize),
    /// A group is not closed, or closed twice.
    #[error("`group` and `end` do not pair")]
    Group,
    /// The table does not start with a decoder.
    #[error("`decoder NAME WIDTH` must come first")]
    NoDecoder,
}

/// An error in a table.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{table}:{line}: {kind}")]
pub struct Error {
    /// The table's name.
    pub table: String,
    /// Line, from 1.
    pub line: usize,
    /// What is wrong.
    #[source]
    pub kind: ErrorKind,
}

/// Bits of a word that make an operand.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Field {
    /// (most significant bit, length), most significant segment first.
    pub segments: Vec<(u32, u32)>,
    pub signed: bool,
    pub shift: u32,
    pub add: u32,
}

impl Field {
    /// Number of bits before the shift.
    pub fn len(&self) -> u32 {
        self.segments.iter().map(|s| s.1).sum()
    }

    /// The bits of the word that it reads.
    pub fn mask(&self) -> u64 {
        self.segments.iter().fold(0, |m, &(msb, len)| m | ((1u64 << len) - 1) << (msb + 1 - len))
    }

    /// Its value in `word`.
    pub fn value(&self, word: u64) -> i64 {
        let mut v = 0u64;
        for &(msb, len) in &self.segments {
            v = v << len | (word >> (msb + 1 - len)) & ((1 << len) - 1);
        }
        let mut v = v as i64;
        if self.signed {
            let unused = 64 - self.len();
            v = v << unused >> unused;
        }
        (v << self.shift) + i64::from(self.add)
    }
}

/// Where an operand's value comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Source {
    Field(Field),
    Constant(i64),
}

/// An operand of a format.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Operand {
    pub name: String,
    pub signed: bool,
    /// The field of the operand's name, if there is one.
    pub default: Option<Field>,
}

/// One encoding.
#[derive(Debug, Clone)]
pub(crate) struct Encoding {
    /// Name of the instruction; `None` if reserved.
    pub name: Option<String>,
    pub format: String,
    pub mask: u64,
    pub value: u64,
    /// One source per operand of the format, in its order.
    pub sources: Vec<Source>,
    pub line: usize,
    /// The group it is in.
    pub group: Option<usize>,
}

impl Encoding {
    pub fn label(&self) -> &str {
        self.name.as_deref().unwrap_or("reserved")
    }

    pub fn overlaps(&self, other: &Self) -> bool {
        let common = self.mask & other.mask;
        self.value & common == other.value & common
    }

    /// True if every word that fits `other` fits this one.
    pub fn covers(&self, other: &Self) -> bool {
        self.mask & other.mask == self.mask && other.value & self.mask == self.value
    }
}

/// One table.
#[derive(Debug, Clone)]
pub(crate) struct Table {
    /// Name of the function.
    pub function: String,
    /// Bits in a word.
    pub width: u32,
    pub encodings: Vec<Encoding>,
}

/// All that the tables say.
#[derive(Debug, Clone, Default)]
pub struct Spec {
    pub(crate) fields: BTreeMap<String, Field>,
    pub(crate) formats: BTreeMap<String, Vec<Operand>>,
    pub(crate) insns: BTreeMap<String, String>,
    pub(crate) tables: Vec<Table>,
}

/// An instruction found by [`Spec::decode`]: its name, its format, and its operands' names and values.
pub type Decoded<'a> = (&'a str, &'a str, Vec<(&'a str, i64)>);

impl Spec {
    /// Decodes a word by trying all encodings of the table that makes `function`: slow, and the oracle
    /// for generated decoders.
    pub fn decode(&self, function: &str, word: u64) -> Option<Decoded<'_>> {
        let table = self.tables.iter().find(|t| t.function == function)?;
        let found = table.encodings.iter().find(|e| word & e.mask == e.value)?;
        let name = found.name.as_deref()?;
        let operands = self.formats.get(&found.format)?;
        let values = operands.iter().zip(&found.sources).map(|(o, s)| {
            let value = match s {
                Source::Field(f) => f.value(word),
                Source::Constant(c) => *c,
            };
            (o.name.as_str(), value)
        });
        Some((name, found.format.as_str(), values.collect()))
    }

    /// The names of all instructions, sorted.
    pub fn instructions(&self) -> impl Iterator<Item = &str> {
        self.insns.keys().map(String::as_str)
    }

    /// Fixed bits of every encoding of `function`: (name, mask, value), `reserved` ones included.
    pub fn encodings(&self, function: &str) -> impl Iterator<Item = (&str, u64, u64)> {
        self.tables
            .iter()
            .filter(move |t| t.function == function)
            .flat_map(|t| t.encodings.iter().map(|e| (e.label(), e.mask, e.value)))
    }
}
