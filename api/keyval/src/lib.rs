//! `key=value,key=value` option strings through serde.
//!
//! ```text
//! path=/images/root.img,readonly=on,queue_size=256
//! boot=4,topology=1:4:1:1,affinity=[0@[0-3],1@[4,6]]
//! path="a,file,with,commas"
//! ```
//!
//! Pairs are separated by commas; double quotes and square brackets protect commas inside. Numbers may
//! be hexadecimal and may end in `K`, `M`, `G` or `T` (powers of 1024); switches are `on` or `off`;
//! lists are `[a,b,c-d]`; a structure inside a value is its fields joined by `:` or `@`. A bare first
//! word sets the key whose schema has `x-positional`. The struct's schema also yields [`keys`], from
//! which help texts are made, and the names that errors suggest.

mod de;
mod keys;
mod split;

use schemars::JsonSchema;
use serde::de::DeserializeOwned;

pub use keys::{Key, keys};

/// Longest option string, in bytes.
pub const MAX_LEN: usize = 64 * 1024;

/// An option string that cannot be read. The option itself is named by the caller.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// A value is wrong.
    #[error("key `{key}`, value `{value}`: {reason}")]
    Value {
        /// The key.
        key: String,
        /// Its value as given.
        value: String,
        /// What would be right.
        reason: String,
    },
    /// A key is not one.
    #[error("key `{key}` (value `{value}`) is unknown; {} are known", list(known))]
    UnknownKey {
        /// The key.
        key: String,
        /// Its value as given.
        value: String,
        /// The keys that there are.
        known: Vec<String>,
    },
    /// A bare word stands where a pair should.
    #[error("`{word}` is no key=value pair; {} are the keys", list(known))]
    NoPair {
        /// The word.
        word: String,
        /// The keys that there are.
        known: Vec<String>,
    },
    /// Quotes or brackets do not match.
    #[error("`{text}`: {reason}")]
    Unbalanced {
        /// The text.
        text: String,
        /// What is wrong.
        reason: &'static str,
    },
    /// The whole does not make sense.
    #[error("`{text}`: {reason}")]
    Whole {
        /// The text.
        text: String,
        /// What is wrong.
        reason: String,
    },
}

fn list(names: &[String]) -> String {
    names.join(", ")
}

/// Reads `text` into `T`.
///
/// # Errors
/// [`Error`], naming key and value.
pub fn from_str<T: DeserializeOwned + JsonSchema>(text: &str) -> Result<T, Error> {
    let shown = || text.chars().take(200).collect::<String>();
    if text.len() > MAX_LEN {
        return Err(Error::Whole { text: shown(), reason: format!("is longer than {MAX_LEN} bytes") });
    }
    let keys = keys::<T>();
    let known = || keys.iter().map(|key| key.name.clone()).collect::<Vec<_>>();
    let mut pairs = Vec::new();
    for (i, part) in split::split(text, ',')?.into_iter().enumerate() {
        if part.is_empty() {
            continue;
        }
        match split::pair(part) {
            Some((key, value)) => pairs.push((key.trim(), value)),
            None => match keys.iter().find(|key| key.positional && i == 0) {
                Some(key) => pairs.push((&key.name, part)),
                None => return Err(Error::NoPair { word: part.to_owned(), known: known() }),
            },
        }
    }
    T::deserialize(de::Pairs { pairs: &pairs }).map_err(|fault| match fault {
        de::Fault::Value { key, value, reason } => Error::Value { key, value, reason },
        de::Fault::Unknown { key, value } => Error::UnknownKey { key, value, known: known() },
        de::Fault::Other(reason) => Error::Whole { text: shown(), reason: keys::in_cli_words(&keys, reason) },
    })
}

/// The pairs of an option string as they stand: key, value without quotes.
///
/// # Errors
/// [`Error::Unbalanced`].
pub fn pairs(text: &str) -> Result<Vec<(String, Option<String>)>, Error> {
    let parts = split::split(text, ',')?;
    let parts = parts.into_iter().filter(|part| !part.is_empty());
    Ok(parts
        .map(|part| match split::pair(part) {
            Some((key, value)) => (key.to_owned(), Some(split::unquote(value).into_owned())),
            None => (split::unquote(part).into_owned(), None),
        })
        .collect())
}

/// Reads a size in bytes: decimal or hexadecimal, with `K`, `M`, `G` or `T` behind it.
///
/// # Errors
/// What would be right.
pub fn parse_size(text: &str) -> Result<u64, String> {
    de::integer(text).and_then(|n| u64::try_from(n).map_err(|_| "must be from 0 to 2^64-1".to_owned()))
}
