//! The serde deserializers: of all pairs, and of one value.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, IntoDeserializer, Visitor};
use serde::forward_to_deserialize_any;

use crate::split::{bracketed, has, pair, split, unquote};

/// Longest list that ranges may expand to.
const MAX_LIST: usize = 65_536;

/// What is wrong, before the known keys are added.
#[derive(Debug)]
pub(crate) enum Fault {
    Value { key: String, value: String, reason: String },
    Unknown { key: String, value: String },
    Other(String),
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Value { reason, .. } | Self::Other(reason) => f.write_str(reason),
            Self::Unknown { key, .. } => write!(f, "key `{key}` is unknown"),
        }
    }
}

impl std::error::Error for Fault {}

impl de::Error for Fault {
    fn custom<T: fmt::Display>(message: T) -> Self {
        Self::Other(message.to_string())
    }
}

impl From<crate::Error> for Fault {
    fn from(error: crate::Error) -> Self {
        Self::Other(error.to_string())
    }
}

impl Fault {
    /// Says in which pair it happened.
    fn at(self, key: &str, value: &str) -> Self {
        let (key, value) = (key.to_owned(), value.to_owned());
        match self {
            Self::Value { reason, .. } | Self::Other(reason) => Self::Value { key, value, reason },
            Self::Unknown { .. } => Self::Unknown { key, value },
        }
    }
}

/// All pairs: a struct or map.
pub(crate) struct Pairs<'a> {
    pub(crate) pairs: &'a [(&'a str, &'a str)],
}

impl<'de> de::Deserializer<'de> for Pairs<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_map(PairAccess { rest: self.pairs.iter(), current: None })
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit
        unit_struct seq tuple tuple_struct map struct enum identifier ignored_any
    }
}

struct PairAccess<'a> {
    rest: std::slice::Iter<'a, (&'a str, &'a str)>,
    current: Option<(&'a str, &'a str)>,
}

impl<'de> de::MapAccess<'de> for PairAccess<'_> {
    type Error = Fault;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Fault> {
        let Some((key, value)) = self.rest.next().copied() else { return Ok(None) };
        self.current = Some((key, value));
        let key_deserializer: StrDeserializer<'_, Fault> = key.into_deserializer();
        seed.deserialize(key_deserializer).map(Some).map_err(|fault| fault.at(key, value))
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Fault> {
        let (key, value) = self.current.take().ok_or_else(|| Fault::Other("value without key".to_owned()))?;
        seed.deserialize(Value(value)).map_err(|fault| fault.at(key, value))
    }
}

/// One value.
#[derive(Clone, Copy)]
struct Value<'a>(&'a str);

/// Reads a number with an optional unit.
pub(crate) fn integer(text: &str) -> Result<i128, String> {
    let wrong = || "must be a number, such as 4096, 0x1000 or 4K".to_owned();
    let (digits, shift) = match text.char_indices().last() {
        Some((at, unit)) if !text.starts_with("0x") => match unit.to_ascii_uppercase() {
            'K' => (text.get(..at), 10),
            'M' => (text.get(..at), 20),
            'G' => (text.get(..at), 30),
            'T' => (text.get(..at), 40),
            _ => (Some(text), 0),
        },
        _ => (Some(text), 0),
    };
    let digits = digits.ok_or_else(wrong)?;
    let number = match digits.strip_prefix("0x") {
        Some(hex) if !hex.starts_with(['+', '-']) => i128::from_str_radix(hex, 16),
        Some(_) => return Err(wrong()),
        None => digits.parse::<i128>(),
    };
    number.map_err(|_| wrong())?.checked_mul(1 << shift).ok_or_else(wrong)
}

macro_rules! integers {
    ($($method:ident $visit:ident $ty:ty;)*) => {$(
        fn $method<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
            let number = integer(&unquote(self.0)).map_err(Fault::Other)?;
            let number = <$ty>::try_from(number).map_err(|_| {
                Fault::Other(format!("must be from {} to {}", <$ty>::MIN, <$ty>::MAX))
            })?;
            visitor.$visit(number)
        }
    )*};
}

impl<'de> de::Deserializer<'de> for Value<'_> {
    type Error = Fault;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_str(&unquote(self.0))
    }

    fn deserialize_bool<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        match unquote(self.0).as_ref() {
            "on" | "true" => visitor.visit_bool(true),
            "off" | "false" => visitor.visit_bool(false),
            _ => Err(Fault::Other("must be `on` or `off`".to_owned())),
        }
    }

    integers! {
        deserialize_i8 visit_i8 i8;
        deserialize_i16 visit_i16 i16;
        deserialize_i32 visit_i32 i32;
        deserialize_i64 visit_i64 i64;
        deserialize_u8 visit_u8 u8;
        deserialize_u16 visit_u16 u16;
        deserialize_u32 visit_u32 u32;
        deserialize_u64 visit_u64 u64;
    }

    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        visitor: V,
    ) -> Result<V::Value, Fault> {
        visitor.visit_newtype_struct(self)
    }

    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let inner = bracketed(self.0).unwrap_or(self.0);
        let mut items = Vec::new();
        for item in split(inner, ',')?.into_iter().filter(|item| !item.is_empty()) {
            match range(item)? {
                Some((first, last)) => items.extend((first..=last).map(|n| n.to_string())),
                None => items.push(item.to_owned()),
            }
            if items.len() > MAX_LIST {
                return Err(Fault::Other(format!("is a list of more than {MAX_LIST}")));
            }
        }
        visitor.visit_seq(Items(items.iter()))
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        fields: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let text = bracketed(self.0).unwrap_or(self.0);
        let separator = ['@', ':'].into_iter().find(|separator| has(text, *separator));
        let parts = split(text, separator.unwrap_or(','))?;
        let pairs: Option<Vec<(&str, &str)>> = parts.iter().map(|part| pair(part)).collect();
        match pairs {
            Some(pairs) => Pairs { pairs: &pairs }.deserialize_any(visitor),
            None if separator.is_some() => {
                let parts: Vec<String> = parts.into_iter().map(str::to_owned).collect();
                visitor.visit_seq(Items(parts.iter()))
            }
            None => Err(Fault::Other(format!("must be `{}`", fields.join(":")))),
        }
    }

    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Fault> {
        let parts = split(bracketed(self.0).unwrap_or(self.0), ',')?;
        let pairs: Option<Vec<(&str, &str)>> = parts.iter().map(|part| pair(part)).collect();
        let pairs = pairs.ok_or_else(|| Fault::Other("must be `[key=value,...]`".to_owned()))?;
        Pairs { pairs: &pairs }.deserialize_any(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Fault> {
        let text = unquote(self.0);
        let same = |variant: &&&str| plain(variant) == plain(&text);
        let Some(variant) = variants.iter().find(same) else {
            let mut known: Vec<String> = Vec::new();
            for name in variants.iter().map(|variant| crate::keys::kebab(variant)) {
                if !known.iter().any(|other| plain(other) == plain(&name)) {
                    known.push(name);
                }
            }
            return Err(Fault::Other(format!("must be one of {}", known.join(", "))));
        };
        let variant: StrDeserializer<'_, Fault> = (*variant).into_deserializer();
        visitor.visit_enum(variant)
    }

    // Only a key that no field takes has its value ignored.
    fn deserialize_ignored_any<V: Visitor<'de>>(self, _: V) -> Result<V::Value, Fault> {
        Err(Fault::Unknown { key: String::new(), value: self.0.to_owned() })
    }

    forward_to_deserialize_any! {
        i128 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple tuple_struct identifier
    }
}

/// A name without case and punctuation.
fn plain(name: &str) -> String {
    name.chars().filter(|c| !matches!(c, '-' | '_')).map(|c| c.to_ascii_lowercase()).collect()
}

/// `a-b` with both ends numbers.
fn range(item: &str) -> Result<Option<(u64, u64)>, Fault> {
    let Some((first, last)) = item.split_once('-') else { return Ok(None) };
    let (Ok(first), Ok(last)) = (first.parse::<u64>(), last.parse::<u64>()) else { return Ok(None) };
    match last.checked_sub(first) {
        Some(span) if span < MAX_LIST as u64 => Ok(Some((first, last))),
        Some(_) => Err(Fault::Other(format!("`{item}` is a range of more than {MAX_LIST}"))),
        None => Err(Fault::Other(format!("`{item}` ends before it begins"))),
    }
}

/// The items of a list, or the fields of a struct in order.
struct Items<'a>(std::slice::Iter<'a, String>);

impl<'de> de::SeqAccess<'de> for Items<'_> {
    type Error = Fault;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Fault> {
        self.0.next().map(|item| seed.deserialize(Value(item))).transpose()
    }
}
