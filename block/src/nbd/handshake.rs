//! A server's side of the negotiation.

use std::io::{self, Write};
use std::sync::Arc;

use super::Stream;
use super::proto::{
    MAX_OPTION, MAX_REQUEST, MAX_STRING, OPTION_MAGIC, OPTION_REPLY_MAGIC, SERVER_MAGIC, garbage, handshake,
    info, option, reply, string_from, transmission, u16_from, u32_from, u64_from, vec_from,
};
use super::server::{Context, Export, Server};

/// Most options of a client before it comes to the point.
const MAX_OPTIONS: usize = 256;
/// Most names that one option asks for.
const MAX_QUERIES: u32 = 1024;

/// What was agreed on.
#[derive(Debug)]
pub(super) struct Session {
    pub(super) stream: Stream,
    pub(super) export: Arc<Export>,
    pub(super) structured: bool,
    /// The chosen metadata contexts, with their numbers.
    pub(super) contexts: Vec<(u32, Context)>,
}

struct Negotiation<'a> {
    server: &'a Server,
    stream: Stream,
    no_zeroes: bool,
    structured: bool,
    /// Contexts and the export that they were chosen for.
    contexts: Option<(String, Vec<(u32, Context)>)>,
}

/// What an option leads to.
enum Next {
    Option,
    Transmission(Arc<Export>),
    End,
}

/// Talks with a client until it has an export, or goes.
///
/// # Errors
/// The connection's, TLS's, or what of the client's words makes no sense.
pub(super) fn negotiate(server: &Server, mut stream: Stream) -> io::Result<Option<Session>> {
    let flags = handshake::FIXED_NEWSTYLE | handshake::NO_ZEROES;
    let mut hello = SERVER_MAGIC.to_be_bytes().to_vec();
    hello.extend_from_slice(&OPTION_MAGIC.to_be_bytes());
    hello.extend_from_slice(&flags.to_be_bytes());
    stream.write_all(&hello)?;
    let client = u32_from(&mut stream)?;
    if client & !u32::from(flags) != 0 || client & u32::from(handshake::FIXED_NEWSTYLE) == 0 {
        return Err(garbage("client flags that were not offered"));
    }
    let no_zeroes = client & u32::from(handshake::NO_ZEROES) != 0;
    let mut talk = Negotiation { server, stream, no_zeroes, structured: false, contexts: None };
    for _ in 0..MAX_OPTIONS {
        match talk.option()? {
            Next::Option => {}
            Next::End => return Ok(None),
            Next::Transmission(export) => {
                let contexts = talk.contexts.filter(|(name, _)| *name == export.name);
                return Ok(Some(Session {
                    stream: talk.stream,
                    structured: talk.structured,
                    contexts: contexts.map(|(_, c)| c).unwrap_or_default(),
                    export,
                }));
            }
        }
    }
    Err(garbage("too many options"))
}

impl Negotiation<'_> {
    fn reply(&mut self, option: u32, kind: u32, data: &[u8]) -> io::Result<()> {
        let mut out = OPTION_REPLY_MAGIC.to_be_bytes().to_vec();
        out.extend_from_slice(&option.to_be_bytes());
        out.extend_from_slice(&kind.to_be_bytes());
        out.extend_from_slice(&(data.len() as u32).to_be_bytes());
        out.extend_from_slice(data);
        self.stream.write_all(&out)
    }

    fn refuse(&mut self, option: u32, kind: u32, text: &str) -> io::Result<Next> {
        self.reply(option, kind, text.as_bytes())?;
        Ok(Next::Option)
    }

    fn option(&mut self) -> io::Result<Next> {
        if u64_from(&mut self.stream)? != OPTION_MAGIC {
            return Err(garbage("an option without its magic number"));
        }
        let (kind, len) = (u32_from(&mut self.stream)?, u32_from(&mut self.stream)?);
        if len > MAX_OPTION {
            return Err(garbage("an option that is too long"));
        }
        let data = vec_from(&mut self.stream, len as usize, MAX_OPTION as usize)?;
        if kind == option::ABORT {
            self.reply(kind, reply::ACK, &[])?;
            return Ok(Next::End);
        }
        if kind == option::STARTTLS {
            return self.start_tls(&data);
        }
        if self.server.tls.is_some() && matches!(self.stream, Stream::Plain(_)) {
            if kind == option::EXPORT_NAME {
                return Err(io::Error::new(io::ErrorKind::PermissionDenied, "the client does not use TLS"));
            }
            return self.refuse(kind, reply::TLS_REQUIRED, "Option not permitted before TLS");
        }
        match kind {
            option::EXPORT_NAME => self.export_name(data),
            option::LIST => self.list(&data),
            option::INFO | option::GO => self.info(kind, &data),
            option::STRUCTURED_REPLY if !data.is_empty() => {
                self.refuse(kind, reply::INVALID, "it has no data")
            }
            option::STRUCTURED_REPLY => {
                self.structured = true;
                self.reply(kind, reply::ACK, &[])?;
                Ok(Next::Option)
            }
            option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.contexts(kind, &data),
            _ => self.refuse(kind, reply::UNSUPPORTED, "the option is not supported"),
        }
    }

    fn start_tls(&mut self, data: &[u8]) -> io::Result<Next> {
        let kind = option::STARTTLS;
        if !data.is_empty() {
            return self.refuse(kind, reply::INVALID, "it has no data");
        }
        if !matches!(self.stream, Stream::Plain(_)) {
            return self.refuse(kind, reply::INVALID, "TLS is in use already");
        }
        let Some(config) = self.server.tls.clone() else {
            return self.refuse(kind, reply::POLICY, "TLS not configured");
        };
        self.reply(kind, reply::ACK, &[])?;
        let handle = self.stream.socket().try_clone()?;
        let plain = std::mem::replace(&mut self.stream, Stream::Plain(handle));
        self.stream = plain.into_tls_server(&config)?;
        self.authorize()?;
        // What was agreed on before could have been said by anybody.
        (self.structured, self.contexts) = (false, None);
        Ok(Next::Option)
    }

    /// Sends a client away whose certificate's name is not let in.
    fn authorize(&self) -> io::Result<()> {
        let Some(authz) = &self.server.authz else { return Ok(()) };
        let name = self.stream.peer_name();
        if authz.allows(name.as_deref()).map_err(io::Error::other)? {
            return Ok(());
        }
        let text = format!("TLS x509 authz check for {} is denied", name.as_deref().unwrap_or("nobody"));
        Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
    }

    fn export_name(&mut self, name: Vec<u8>) -> io::Result<Next> {
        let export = String::from_utf8(name).ok().and_then(|n| self.server.export(&n));
        let Some(export) = export else { return Err(garbage("an export that is not there")) };
        let mut out = export.node.size().to_be_bytes().to_vec();
        out.extend_from_slice(&self.flags(&export).to_be_bytes());
        if !self.no_zeroes {
            out.resize(out.len() + 124, 0);
        }
        self.stream.write_all(&out)?;
        Ok(Next::Transmission(export))
    }

    fn flags(&self, export: &Export) -> u16 {
        let df = if self.structured { transmission::DF } else { 0 };
        export.flags() | df
    }

    fn list(&mut self, data: &[u8]) -> io::Result<Next> {
        let kind = option::LIST;
        if !data.is_empty() {
            return self.refuse(kind, reply::INVALID, "it has no data");
        }
        for export in self.server.exports() {
            let mut out = (export.name.len() as u32).to_be_bytes().to_vec();
            out.extend_from_slice(export.name.as_bytes());
            out.extend_from_slice(export.description.as_deref().unwrap_or_default().as_bytes());
            self.reply(kind, reply::SERVER, &out)?;
        }
        self.reply(kind, reply::ACK, &[])?;
        Ok(Next::Option)
    }

    fn info(&mut self, kind: u32, mut data: &[u8]) -> io::Result<Next> {
        let data = &mut data;
        let asked = string_from(data).and_then(|name| {
            let count = u16_from(data)?;
            let asked: io::Result<Vec<u16>> = (0..count).map(|_| u16_from(data)).collect();
            asked.map(|a| (name, a))
        });
        let Ok((name, asked)) = asked else { return self.refuse(kind, reply::INVALID, "malformed") };
        if !data.is_empty() {
            return self.refuse(kind, reply::INVALID, "there are bytes left over");
        }
        let Some(export) = self.server.export(&name) else {
            return self.refuse(kind, reply::UNKNOWN, "export not present");
        };
        let piece = |what: u16, data: &[u8]| [what.to_be_bytes().as_slice(), data].concat();
        if asked.contains(&info::NAME) {
            self.reply(kind, reply::INFO, &piece(info::NAME, export.name.as_bytes()))?;
        }
        if let Some(text) = &export.description {
            self.reply(kind, reply::INFO, &piece(info::DESCRIPTION, text.as_bytes()))?;
        }
        // Parts of blocks are read, changed and written here.
        let sizes: Vec<u8> = [1u32, 4096, MAX_REQUEST].into_iter().flat_map(u32::to_be_bytes).collect();
        self.reply(kind, reply::INFO, &piece(info::BLOCK_SIZE, &sizes))?;
        let mut what = export.node.size().to_be_bytes().to_vec();
        what.extend_from_slice(&self.flags(&export).to_be_bytes());
        self.reply(kind, reply::INFO, &piece(info::EXPORT, &what))?;
        self.reply(kind, reply::ACK, &[])?;
        Ok(if kind == option::GO { Next::Transmission(export) } else { Next::Option })
    }

    fn contexts(&mut self, kind: u32, mut data: &[u8]) -> io::Result<Next> {
        let data = &mut data;
        if kind == option::SET_META_CONTEXT {
            self.contexts = None;
        }
        if !self.structured {
            return self.refuse(kind, reply::INVALID, "structured replies were not agreed on");
        }
        let asked = string_from(data).and_then(|name| {
            let count = u32_from(data)?;
            if count > MAX_QUERIES {
                return Err(garbage("too many queries"));
            }
            let queries: io::Result<Vec<String>> = (0..count).map(|_| string_from(data)).collect();
            queries.map(|q| (name, q))
        });
        let Ok((name, queries)) = asked else { return self.refuse(kind, reply::INVALID, "malformed") };
        if !data.is_empty() {
            return self.refuse(kind, reply::INVALID, "there are bytes left over");
        }
        let Some(export) = self.server.export(&name) else {
            return self.refuse(kind, reply::UNKNOWN, "export not present");
        };
        let list = kind == option::LIST_META_CONTEXT;
        let wanted = |context: &str| {
            let space = context.split_inclusive(':').next().unwrap_or_default();
            let bitmaps = "qemu:dirty-bitmap:";
            (list && queries.is_empty())
                || queries.iter().any(|q| {
                    q == context || (list && (q == space || (q == bitmaps && context.starts_with(bitmaps))))
                })
        };
        let mut chosen = Vec::new();
        for (n, context) in export.contexts().into_iter().enumerate() {
            let text = context.name();
            if wanted(&text) && text.len() <= MAX_STRING {
                // Numbers mean nothing in a list.
                let id = if list { 0 } else { n as u32 };
                let out = [id.to_be_bytes().as_slice(), text.as_bytes()].concat();
                self.reply(kind, reply::META_CONTEXT, &out)?;
                chosen.push((n as u32, context));
            }
        }
        self.reply(kind, reply::ACK, &[])?;
        if !list {
            self.contexts = Some((name, chosen));
        }
        Ok(Next::Option)
    }
}
