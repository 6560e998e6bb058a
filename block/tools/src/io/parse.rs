//! Options and numbers of commands, and numbers for people.

use holdfast_block::options::parse_size;

/// A command's words, taken apart.
#[derive(Debug, Default)]
pub(super) struct Words {
    pub(super) flags: Vec<char>,
    /// Options with their values.
    pub(super) values: Vec<(char, String)>,
    pub(super) rest: Vec<String>,
}

impl Words {
    /// Takes options apart: `with_value` are those that take one.
    pub(super) fn new(words: &[String], flags: &str, with_value: &str) -> Result<Self, String> {
        let mut out = Self::default();
        let mut words = words.iter();
        while let Some(word) = words.next() {
            let Some(letters) = word.strip_prefix('-').filter(|l| !l.is_empty() && out.rest.is_empty())
            else {
                out.rest.push(word.clone());
                continue;
            };
            let mut letters = letters.chars();
            while let Some(c) = letters.next() {
                if with_value.contains(c) {
                    let attached: String = letters.by_ref().collect();
                    let value = if attached.is_empty() { words.next().cloned() } else { Some(attached) };
                    let value = value.ok_or_else(|| format!("option requires an argument -- '{c}'"))?;
                    out.values.push((c, value));
                } else if flags.contains(c) {
                    out.flags.push(c);
                } else {
                    return Err(format!("invalid option -- '{c}'"));
                }
            }
        }
        Ok(out)
    }

    pub(super) fn has(&self, flag: char) -> bool {
        self.flags.contains(&flag)
    }

    pub(super) fn value(&self, flag: char) -> Option<&str> {
        self.values.iter().rev().find(|(c, _)| *c == flag).map(|(_, v)| v.as_str())
    }

    pub(super) fn number(&self, n: usize, what: &str) -> Result<u64, String> {
        let text = self.rest.get(n).map(String::as_str).unwrap_or_default();
        number(text, what)
    }
}

/// A number with an optional suffix.
pub(super) fn number(text: &str, what: &str) -> Result<u64, String> {
    match parse_size(text) {
        Some(n) if n <= i64::MAX as u64 => Ok(n),
        Some(_) => Err(format!("Parsing error: {what} argument -- {text} is too large")),
        None => {
            Err(format!("Parsing error: non-numeric argument, or extraneous/unrecognized suffix -- {text}"))
        }
    }
}

/// The byte of `-P`.
pub(super) fn pattern(text: &str) -> Result<u8, String> {
    let n = match text.strip_prefix("0x") {
        Some(hex) => u8::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    };
    n.ok_or_else(|| format!("{text} is not a valid pattern byte"))
}

/// A number of bytes with three decimals at most.
pub(super) fn bytes(value: f64) -> String {
    const UNITS: [&str; 6] = ["EiB", "PiB", "TiB", "GiB", "MiB", "KiB"];
    for (n, unit) in UNITS.iter().enumerate() {
        let size = (1u64 << (60 - 10 * n)) as f64;
        if value >= size {
            let text = format!("{:.3}", value / size);
            return format!("{} {unit}", text.strip_suffix(".000").unwrap_or(&text));
        }
    }
    let text = format!("{value:.3}");
    format!("{} bytes", text.strip_suffix(".000").unwrap_or(&text))
}

/// Splits a line at blanks; quotes keep them.
pub(super) fn split(line: &str) -> Vec<String> {
    let mut out = Vec::new();
    let mut word: Option<String> = None;
    let mut quote = None;
    for c in line.chars() {
        match (quote, c) {
            (Some(q), c) if c == q => quote = None,
            (None, '"' | '\'') => {
                quote = Some(c);
                word.get_or_insert_default();
            }
            (None, c) if c.is_whitespace() => out.extend(word.take()),
            (_, c) => word.get_or_insert_default().push(c),
        }
    }
    out.extend(word);
    out
}
