//! Cuts the stream of a client into JSON objects.
//!
//! QMP messages need no newline between them, so an object ends where its brackets close.

use std::collections::VecDeque;

/// Largest message in bytes.
pub(crate) const MAX_MESSAGE: usize = 1 << 20;
/// Deepest nesting.
const MAX_DEPTH: usize = 128;

/// What was cut out.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Message {
    /// A whole object; it may still not be JSON.
    Object(Vec<u8>),
    /// Something else, and why.
    Malformed(String),
}

/// Cuts a stream, which comes in pieces.
#[derive(Debug, Default)]
pub(crate) struct Framer {
    text: Vec<u8>,
    depth: usize,
    in_string: bool,
    escaped: bool,
    /// After an error everything up to the next newline is dropped.
    skipping: bool,
}

impl Framer {
    /// Takes the next piece and adds the messages that it completes to `out`.
    pub(crate) fn feed(&mut self, data: &[u8], out: &mut VecDeque<Message>) {
        for byte in data {
            if let Some(message) = self.push(*byte) {
                out.push_back(message);
            }
        }
    }

    fn push(&mut self, byte: u8) -> Option<Message> {
        if self.skipping {
            self.skipping = byte != b'\n';
            return None;
        }
        if self.depth == 0 {
            return match byte {
                b'{' => {
                    self.text.push(byte);
                    self.depth = 1;
                    None
                }
                // QEMU's clients send 0xff to resynchronise.
                b' ' | b'\t' | b'\r' | b'\n' | 0xff => None,
                _ => Some(self.fail("JSON parse error, expecting an object")),
            };
        }
        self.text.push(byte);
        if self.text.len() > MAX_MESSAGE {
            return Some(self.fail("JSON parse error, message too large"));
        }
        if self.in_string {
            match byte {
                _ if self.escaped => self.escaped = false,
                b'\\' => self.escaped = true,
                b'"' => self.in_string = false,
                _ => {}
            }
            return None;
        }
        match byte {
            b'"' => self.in_string = true,
            b'{' | b'[' if self.depth == MAX_DEPTH => {
                return Some(self.fail("JSON parse error, nesting too deep"));
            }
            b'{' | b'[' => self.depth += 1,
            b'}' | b']' => self.depth -= 1,
            _ => {}
        }
        (self.depth == 0).then(|| Message::Object(std::mem::take(&mut self.text)))
    }

    fn fail(&mut self, reason: &str) -> Message {
        *self = Self { skipping: true, ..Self::default() };
        Message::Malformed(reason.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cut(pieces: &[&str]) -> Vec<Message> {
        let mut framer = Framer::default();
        let mut out = VecDeque::new();
        for piece in pieces {
            framer.feed(piece.as_bytes(), &mut out);
        }
        out.into()
    }

    fn object(text: &str) -> Message {
        Message::Object(text.as_bytes().to_vec())
    }

    #[test]
    fn objects_in_any_pieces() {
        let text = r#" {"a":"}\"{"} {"b":[{}]}"#;
        let expected = [object(r#"{"a":"}\"{"}"#), object(r#"{"b":[{}]}"#)];
        assert_eq!(cut(&[text]), expected);
        let single: Vec<String> = text.chars().map(String::from).collect();
        let single: Vec<&str> = single.iter().map(String::as_str).collect();
        assert_eq!(cut(&single), expected);
    }

    #[test]
    fn an_error_costs_one_line() {
        let out = cut(&["nonsense {}\n{\"a\":1}\n"]);
        assert_eq!(out.len(), 2);
        assert!(matches!(&out[0], Message::Malformed(_)));
        assert_eq!(out[1], object("{\"a\":1}"));
        let deep = "[".repeat(200);
        assert!(matches!(cut(&["{", &deep])[..], [Message::Malformed(_)]));
        let large = " ".repeat(MAX_MESSAGE);
        assert!(matches!(cut(&["{", &large])[..], [Message::Malformed(_)]));
    }
}
