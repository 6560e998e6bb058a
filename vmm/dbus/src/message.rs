//! Messages (D-Bus Specification, "Message Protocol"). The wire format of what is in them is `zbus`'s.

use serde::de::DeserializeOwned;
use zbus::wire::serialized::{Context, Data};
use zbus::wire::{Endian, to_bytes};
use zbus::{ObjectPath, Signature, Type, Variant};

use crate::BusError;

// A message's first byte: the order of bytes in it.
const LITTLE: u8 = b'l';
const BIG: u8 = b'B';
/// Version of the protocol.
const PROTOCOL: u8 = 1;
/// Nobody is started to answer.
const NO_AUTO_START: u8 = 2;
/// Length of what tells how long a message is.
pub(crate) const PROLOGUE: usize = 16;
/// Most bytes of header fields; those of what is asked here come to some hundred.
const MAX_FIELDS: usize = 64 << 10;

const METHOD_CALL: u8 = 1;
pub(crate) const METHOD_RETURN: u8 = 2;
pub(crate) const ERROR: u8 = 3;

// Header fields.
const PATH: u8 = 1;
const INTERFACE: u8 = 2;
const MEMBER: u8 = 3;
const ERROR_NAME: u8 = 4;
const REPLY_SERIAL: u8 = 5;
const DESTINATION: u8 = 6;
const SENDER: u8 = 7;
const SIGNATURE: u8 = 8;

type Header<'a> = (u8, u8, u8, u8, u32, u32, Vec<(u8, Variant<'a>)>);

/// Whom a method is called of.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Method<'a> {
    pub(crate) destination: &'a str,
    pub(crate) path: &'a str,
    pub(crate) interface: &'a str,
    pub(crate) member: &'a str,
}

fn wrong(error: impl std::fmt::Display) -> BusError {
    BusError::Protocol(error.to_string())
}

impl Method<'_> {
    /// The message that calls it with one value, or none if that is `()`.
    pub(crate) fn call<T: serde::Serialize + Type>(
        &self,
        serial: u32,
        body: &T,
    ) -> Result<Vec<u8>, BusError> {
        let context = Context::new(Endian::Little, 0);
        let body_bytes = to_bytes(context, body).map_err(wrong)?;
        let path = ObjectPath::try_from(self.path).map_err(wrong)?;
        let mut fields = vec![
            (PATH, Variant::from(path)),
            (INTERFACE, Variant::from(self.interface)),
            (MEMBER, Variant::from(self.member)),
            (DESTINATION, Variant::from(self.destination)),
        ];
        if *T::SIGNATURE != Signature::Unit {
            fields.push((SIGNATURE, Variant::from(T::SIGNATURE.clone())));
        }
        let body_len = u32::try_from(body_bytes.len()).map_err(wrong)?;
        let header: Header<'_> = (LITTLE, METHOD_CALL, NO_AUTO_START, PROTOCOL, body_len, serial, fields);
        let mut message = to_bytes(context, &header).map_err(wrong)?.to_vec();
        message.resize(message.len().next_multiple_of(8), 0);
        message.extend_from_slice(&body_bytes);
        Ok(message)
    }
}

fn endian(first: u8) -> Result<Endian, BusError> {
    match first {
        LITTLE => Ok(Endian::Little),
        BIG => Ok(Endian::Big),
        other => Err(BusError::Protocol(format!("a message begins with {other:#04x}"))),
    }
}

/// How much follows a message's first [`PROLOGUE`] bytes, if its body has at most `limit` bytes.
pub(crate) fn rest(prologue: [u8; PROLOGUE], limit: usize) -> Result<usize, BusError> {
    let endian = endian(prologue[0])?;
    let number = |at: usize| endian.read_u32(&prologue[at..at + 4]) as usize;
    let (body, fields) = (number(4), number(12));
    if fields > MAX_FIELDS {
        return Err(BusError::Protocol(format!("a message with {fields} bytes of header fields")));
    }
    if body > limit {
        return Err(BusError::Long(body));
    }
    Ok(fields.next_multiple_of(8) + body)
}

/// A message that has come.
#[derive(Debug)]
pub(crate) struct Message {
    pub(crate) kind: u8,
    /// Which message it answers; 0 for none.
    pub(crate) answers: u32,
    pub(crate) sender: String,
    /// An error's name.
    error: String,
    signature: Signature,
    endian: Endian,
    bytes: Vec<u8>,
    body: usize,
}

impl Message {
    /// Reads a whole message.
    pub(crate) fn parse(bytes: Vec<u8>) -> Result<Self, BusError> {
        let endian = endian(bytes.first().copied().unwrap_or_default())?;
        let data = Data::new(bytes.as_slice(), Context::new(endian, 0));
        let (header, len): (Header<'_>, usize) = data.deserialize().map_err(wrong)?;
        let (_, kind, _, version, body_len, _, fields) = header;
        let body = len.next_multiple_of(8);
        if version != PROTOCOL || body.checked_add(body_len as usize) != Some(bytes.len()) {
            return Err(BusError::Protocol("a message whose header is wrong".into()));
        }
        let mut message = Self {
            kind,
            answers: 0,
            sender: String::new(),
            error: String::new(),
            signature: Signature::Unit,
            endian,
            bytes: Vec::new(),
            body,
        };
        for (code, value) in fields {
            match (code, value) {
                (REPLY_SERIAL, Variant::U32(serial)) => message.answers = serial,
                (SENDER, Variant::Str(name)) => message.sender = name.to_string(),
                (ERROR_NAME, Variant::Str(name)) => message.error = name.to_string(),
                (SIGNATURE, Variant::Signature(signature)) => message.signature = signature,
                (REPLY_SERIAL | SENDER | ERROR_NAME | SIGNATURE, _) => {
                    return Err(BusError::Protocol(format!("header field {code} is of another type")));
                }
                _ => {}
            }
        }
        drop(data);
        message.bytes = bytes;
        Ok(message)
    }

    /// What is in it; an error if it is something else.
    pub(crate) fn body<T: DeserializeOwned + Type>(&self) -> Result<T, BusError> {
        let (is, wanted) = (self.signature.to_string_no_parens(), T::SIGNATURE.to_string_no_parens());
        if is != wanted {
            return Err(BusError::Protocol(format!("an answer of type `{is}` instead of `{wanted}`")));
        }
        let body = self.bytes.get(self.body..).unwrap_or_default();
        let data = Data::new(body, Context::new(self.endian, 0));
        let (value, len) = data.deserialize().map_err(wrong)?;
        if len == body.len() {
            Ok(value)
        } else {
            Err(BusError::Protocol("an answer with more behind it".into()))
        }
    }

    /// What an error says: its text, if it has one, and its name.
    pub(crate) fn complaint(&self) -> BusError {
        let name = self.error.clone();
        // Errors mostly have a text, and need not.
        let text = self.body::<String>().unwrap_or_default();
        BusError::Answer { name, text: text.chars().take(1024).collect() }
    }
}
