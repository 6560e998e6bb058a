//! Splitting at separators outside quotes and brackets.

use std::borrow::Cow;

use crate::Error;

/// Deepest nesting of brackets.
const MAX_DEPTH: usize = 8;

/// Splits `text` at every `separator` that is in neither quotes nor brackets.
pub(crate) fn split(text: &str, separator: char) -> Result<Vec<&str>, Error> {
    let fault = |reason| Error::Unbalanced { text: text.chars().take(200).collect(), reason };
    let mut parts = Vec::new();
    let (mut start, mut depth, mut quoted) = (0, 0_usize, false);
    for (at, c) in text.char_indices() {
        match c {
            '"' => quoted = !quoted,
            _ if quoted => {}
            '[' if depth == MAX_DEPTH => return Err(fault("brackets are nested too deeply")),
            '[' => depth += 1,
            ']' => depth = depth.checked_sub(1).ok_or_else(|| fault("a `]` has no `[`"))?,
            _ if c == separator && depth == 0 => {
                parts.push(text.get(start..at).unwrap_or_default());
                start = at + c.len_utf8();
            }
            _ => {}
        }
    }
    if quoted {
        return Err(fault("a quote is not closed"));
    }
    if depth > 0 {
        return Err(fault("a `[` is not closed"));
    }
    parts.push(text.get(start..).unwrap_or_default());
    Ok(parts)
}

/// Splits `key=value`. `None` if the key would have to hold quotes or brackets.
pub(crate) fn pair(text: &str) -> Option<(&str, &str)> {
    text.split_once('=').filter(|(key, _)| !key.contains(['"', '[', '/', '@']))
}

/// Whether `separator` stands in `text` outside quotes and brackets.
pub(crate) fn has(text: &str, separator: char) -> bool {
    split(text, separator).is_ok_and(|parts| parts.len() > 1)
}

/// The text between `[` and `]`, if that is what `text` is.
pub(crate) fn bracketed(text: &str) -> Option<&str> {
    text.strip_prefix('[')?.strip_suffix(']')
}

/// Drops the quotes.
pub(crate) fn unquote(text: &str) -> Cow<'_, str> {
    if text.contains('"') { text.replace('"', "").into() } else { text.into() }
}
