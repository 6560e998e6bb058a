//! The log of translations.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// What is logged of translated code; only `tcg` translates.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TcgLogConfig {
    /// The file, made anew.
    pub file: PathBuf,
    /// Guest instructions of each region.
    #[serde(default)]
    pub guest: bool,
    /// Its intermediate representation.
    #[serde(default)]
    pub ir: bool,
    /// Its host instructions.
    #[serde(default)]
    pub host: bool,
    /// Exceptions and interrupts.
    #[serde(default)]
    pub int: bool,
    /// Only what is at these guest-virtual addresses: START..END (END is not one of them) or START+LENGTH.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub filter: Option<String>,
    /// Bytes after which the log ends.
    #[serde(default = "limit")]
    pub limit: u64,
}

fn limit() -> u64 {
    1 << 30
}

/// A number as people write addresses: hexadecimal with 0x, else decimal.
fn number(text: &str) -> Option<u64> {
    match text.strip_prefix("0x").or_else(|| text.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok(),
        None => text.parse().ok(),
    }
}

impl TcgLogConfig {
    /// The first and the last address of the filter.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn range(&self) -> Result<Option<(u64, u64)>, String> {
        let Some(filter) = &self.filter else { return Ok(None) };
        let range = if let Some((start, end)) = filter.split_once("..") {
            number(start).zip(number(end).and_then(|end| end.checked_sub(1)))
        } else if let Some((start, len)) = filter.split_once('+') {
            let (start, len) = (number(start), number(len));
            start.zip(len.filter(|len| *len > 0)).and_then(|(s, len)| Some((s, s.checked_add(len - 1)?)))
        } else {
            None
        };
        match range {
            Some((first, last)) if first <= last => Ok(Some((first, last))),
            _ => Err(format!("`{filter}` is no range of addresses: START..END or START+LENGTH")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_have_two_forms() {
        let range = |text: &str| {
            let filter = Some(text.to_owned());
            let log = TcgLogConfig {
                file: "f".into(),
                guest: true,
                ir: false,
                host: false,
                int: false,
                filter,
                limit: limit(),
            };
            log.range()
        };
        assert_eq!(range("0x1000..0x2000"), Ok(Some((0x1000, 0x1fff))));
        assert_eq!(range("0x1000+16"), Ok(Some((0x1000, 0x100f))));
        assert_eq!(
            range("0xffffffff81000000..0xffffffffffffffff"),
            Ok(Some((0xffff_ffff_8100_0000, u64::MAX - 1)))
        );
        for wrong in ["", "7", "5..5", "0..0", "9..3", "1+0", "0xffffffffffffffff+2", "a..b"] {
            let text = range(wrong).expect_err(wrong);
            assert!(text.contains("START..END"), "{text}");
        }
    }
}
