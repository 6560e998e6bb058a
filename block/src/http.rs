//! Files of HTTP servers, for reading: ranges are asked for, and what comes after them is read ahead.

use std::collections::{HashMap, VecDeque};
use std::fmt;
use std::io::{self, Read};
use std::net::{SocketAddr, ToSocketAddrs};
use std::sync::Arc;
use std::time::Duration;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use holdfast_objects::{Objects, Secret};
use parking_lot::Mutex;
use ureq::config::Config;
use ureq::http::{Response, Uri};
use ureq::tls::{Certificate, PemItem, RootCerts, TlsConfig};
use ureq::unversioned::resolver::{DefaultResolver, ResolvedSocketAddrs, Resolver};
use ureq::unversioned::transport::{DefaultConnector, NextTimeout};
use ureq::{Agent, Body, Proxy};
use zeroize::Zeroizing;

use crate::node::{Extent, Preallocation, os_error};
use crate::options::{BlockdevOptions, Driver};
use crate::{BlockError, BlockNode};

/// Bytes that are read ahead unless options say otherwise.
const READAHEAD: u64 = 256 << 10;
const MAX_READAHEAD: u64 = 64 << 20;
/// Seconds for a request unless options say otherwise.
const TIMEOUT: u64 = 5;
const MAX_TIMEOUT: u64 = 10_000;
/// Most bytes of one request, but for what is read ahead.
const MAX_FETCH: usize = 4 << 20;
/// Ranges that are kept.
const SEGMENTS: usize = 8;
/// How often a request is sent whose connection is lost.
const TRIES: usize = 3;
/// Where systems have the certificates that they trust; `SSL_CERT_FILE` names another file.
const ROOTS: [&str; 3] =
    ["/etc/ssl/certs/ca-certificates.crt", "/etc/pki/tls/certs/ca-bundle.crt", "/etc/ssl/cert.pem"];

/// The driver of a file name that is a URL of a web server.
pub fn scheme(name: &str) -> Option<Driver> {
    let (scheme, _) = name.split_once("://")?;
    [Driver::Http, Driver::Https].into_iter().find(|d| d.name().eq_ignore_ascii_case(scheme))
}

fn bad<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Option(text.into()))
}

/// Looks names up on the thread that asks, once: a VM's threads may neither start others nor read the resolver's files.
#[derive(Debug, Default)]
struct Names(Mutex<HashMap<String, Vec<SocketAddr>>>);

impl Resolver for Names {
    fn resolve(&self, uri: &Uri, _: &Config, _: NextTimeout) -> Result<ResolvedSocketAddrs, ureq::Error> {
        let place = uri.scheme().zip(uri.authority());
        let place = place.and_then(|(s, a)| DefaultResolver::host_and_port(s, a));
        let place = place.ok_or(ureq::Error::HostNotFound)?;
        let known = self.0.lock().get(&place).cloned();
        let found = match known {
            Some(found) => found,
            None => {
                let found: Vec<SocketAddr> = place.to_socket_addrs()?.collect();
                self.0.lock().insert(place, found.clone());
                found
            }
        };
        let mut out = self.empty();
        found.iter().take(16).for_each(|a| out.push(*a));
        if found.is_empty() { Err(ureq::Error::HostNotFound) } else { Ok(out) }
    }
}

/// A part of the file that was read.
#[derive(Debug, Clone)]
struct Segment {
    start: u64,
    data: Arc<Vec<u8>>,
}

impl Segment {
    fn from(&self, offset: u64) -> Option<&[u8]> {
        let skip = offset.checked_sub(self.start)?;
        self.data.get(usize::try_from(skip).ok()?..).filter(|rest| !rest.is_empty())
    }
}

/// A file of a server.
pub struct Http {
    driver: Driver,
    agent: Agent,
    url: String,
    size: u64,
    /// What the file is called as long as it does not change.
    tag: Option<String>,
    /// Headers of every request.
    headers: Vec<(&'static str, Zeroizing<String>)>,
    readahead: u64,
    segments: Mutex<VecDeque<Segment>>,
}

impl fmt::Debug for Http {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        // The URL may have a password in it, and headers have.
        f.debug_struct("Http").field("size", &self.size).finish_non_exhaustive()
    }
}

fn secret(objects: &Objects, id: Option<&str>) -> Result<Option<Arc<Secret>>, BlockError> {
    id.map(|id| objects.password(id)).transpose().map_err(|e| BlockError::Option(e.to_string()))
}

fn text(secret: &Secret) -> &str {
    std::str::from_utf8(secret.bytes()).unwrap_or_default()
}

/// The certificates that the system trusts.
fn roots() -> Result<Vec<Certificate<'static>>, BlockError> {
    let named = std::env::var("SSL_CERT_FILE").ok();
    let places = named.iter().map(String::as_str).chain(ROOTS.into_iter().filter(|_| named.is_none()));
    for place in places {
        if let Ok(bytes) = std::fs::read(place) {
            let items = ureq::tls::parse_pem(&bytes);
            let found = items.filter_map(|item| match item {
                Ok(PemItem::Certificate(certificate)) => Some(certificate),
                _ => None,
            });
            return Ok(found.collect());
        }
    }
    bad("there are no certificates to verify the server's with: SSL_CERT_FILE names a file of them")
}

/// The proxy that the environment names, with the user of the options.
fn proxy(options: &BlockdevOptions, objects: &Objects) -> Result<Option<Proxy>, BlockError> {
    let password = secret(objects, options.proxy_password_secret.as_deref())?;
    let Some(found) = Proxy::try_from_env() else { return Ok(None) };
    let Some(user) = &options.proxy_username else {
        return if password.is_some() {
            bad("'proxy-password-secret' needs 'proxy-username'")
        } else {
            Ok(Some(found))
        };
    };
    let mut builder = Proxy::builder(found.protocol()).host(found.host()).port(found.port()).username(user);
    if let Some(password) = &password {
        builder = builder.password(text(password));
    }
    for name in ["no_proxy", "NO_PROXY"] {
        for host in std::env::var(name).unwrap_or_default().split(',').filter(|h| !h.trim().is_empty()) {
            builder = builder.no_proxy(host.trim());
        }
    }
    builder.build().map(Some).map_err(|e| BlockError::Option(format!("the proxy cannot be used: {e}")))
}

fn agent(driver: Driver, options: &BlockdevOptions, objects: &Objects) -> Result<Agent, BlockError> {
    let seconds = options.timeout.unwrap_or(TIMEOUT);
    if seconds > MAX_TIMEOUT {
        return bad("timeout parameter is too large or negative");
    }
    let verify = options.sslverify.unwrap_or(true);
    let mut tls = TlsConfig::builder()
        .unversioned_rustls_crypto_provider(holdfast_objects::tls::provider())
        .disable_verification(!verify);
    if driver == Driver::Https && verify {
        tls = tls.root_certs(RootCerts::Specific(Arc::new(roots()?)));
    }
    let config = Agent::config_builder()
        .http_status_as_error(false)
        .https_only(driver == Driver::Https)
        .tls_config(tls.build())
        .proxy(proxy(options, objects)?)
        .user_agent(concat!("holdfast/", env!("CARGO_PKG_VERSION")))
        .accept_encoding("identity")
        .timeout_global((seconds != 0).then(|| Duration::from_secs(seconds)))
        .build();
    Ok(Agent::with_parts(config, DefaultConnector::default(), Names::default()))
}

/// The headers that say who asks.
fn headers(
    options: &BlockdevOptions,
    objects: &Objects,
) -> Result<Vec<(&'static str, Zeroizing<String>)>, BlockError> {
    let mut out = Vec::new();
    let password = secret(objects, options.password_secret.as_deref())?;
    match (&options.username, &password) {
        (None, Some(_)) => return bad("'password-secret' needs 'username'"),
        (None, None) => {}
        (Some(user), password) => {
            let password = password.as_deref().map(text).unwrap_or_default();
            let both = Zeroizing::new(format!("{user}:{password}"));
            out.push((
                "Authorization",
                Zeroizing::new(format!("Basic {}", STANDARD.encode(both.as_bytes()))),
            ));
        }
    }
    let cookies = secret(objects, options.cookie_secret.as_deref())?;
    match (&options.cookie, &cookies) {
        (Some(_), Some(_)) => {
            return bad("curl driver cannot handle both cookie and cookie secret");
        }
        (Some(cookie), None) => out.push(("Cookie", Zeroizing::new(cookie.clone()))),
        (None, Some(cookies)) => out.push(("Cookie", Zeroizing::new(text(cookies).to_owned()))),
        (None, None) => {}
    }
    Ok(out)
}

fn status_error(code: u16) -> io::Error {
    io::Error::other(format!("The requested URL returned error: {code}"))
}

fn header<'a>(response: &'a Response<Body>, name: &str) -> Option<&'a str> {
    response.headers().get(name).and_then(|v| v.to_str().ok())
}

impl Http {
    /// Asks the server for the file's size, and whether it gives ranges.
    ///
    /// # Errors
    /// [`BlockError::Option`] for options, [`BlockError::Format`] with what the server or the connection said.
    pub fn open(
        driver: Driver,
        options: &BlockdevOptions,
        objects: &Objects,
        writable: bool,
    ) -> Result<Arc<Self>, BlockError> {
        let name = driver.name();
        let Some(url) = options.url.clone() else {
            return bad(format!("{name} block driver requires an 'url' option"));
        };
        if scheme(&url) != Some(driver) {
            return bad(format!(
                "{name} curl driver cannot handle the URL '{url}' (does not start with '{name}://')"
            ));
        }
        if writable && options.read_only != Some(true) {
            return bad("curl driver does not support writes");
        }
        let readahead = options.readahead.unwrap_or(READAHEAD);
        if !readahead.is_multiple_of(512) || readahead > MAX_READAHEAD {
            return bad(format!(
                "HTTP_READAHEAD_SIZE {readahead} is not a multiple of 512, or more than 64 MiB"
            ));
        }
        let mut node = Self {
            driver,
            agent: agent(driver, options, objects)?,
            url,
            size: 0,
            tag: None,
            headers: headers(options, objects)?,
            readahead,
            segments: Mutex::default(),
        };
        let wrong = |e: io::Error| BlockError::Format(format!("CURL: Error opening file: {e}"));
        let mut request = node.agent.head(&node.url);
        for (name, value) in &node.headers {
            request = request.header(*name, value.as_str());
        }
        let response = request.call().map_err(|e| wrong(say(e)))?;
        let code = response.status().as_u16();
        if !response.status().is_success() {
            return Err(wrong(status_error(code)));
        }
        let size = header(&response, "content-length").and_then(|v| v.trim().parse::<u64>().ok());
        let Some(size) = size.filter(|s| *s <= i64::MAX as u64) else {
            return Err(wrong(io::Error::other("Server didn't report file size.")));
        };
        let ranges = header(&response, "accept-ranges");
        if !ranges.is_some_and(|v| v.trim().eq_ignore_ascii_case("bytes")) {
            return Err(wrong(io::Error::other("Server does not support 'range' (byte ranges).")));
        }
        node.size = size;
        // A weak one does not hold for bytes.
        node.tag = header(&response, "etag").filter(|t| t.starts_with('"')).map(str::to_owned);
        Ok(Arc::new(node))
    }

    /// Reads bytes `start` to `end` from the server.
    fn fetch(&self, start: u64, end: u64) -> io::Result<Segment> {
        let mut tries = 0;
        loop {
            tries += 1;
            match self.try_fetch(start, end) {
                Ok(segment) => return Ok(segment),
                Err(Failure::Lost(error)) if tries < TRIES => {
                    tracing::debug!(%error, "an HTTP request is sent again");
                }
                Err(Failure::Lost(error) | Failure::Said(error)) => return Err(error),
            }
        }
    }

    fn try_fetch(&self, start: u64, end: u64) -> Result<Segment, Failure> {
        let mut request = self.agent.get(&self.url).header("Range", format!("bytes={start}-{}", end - 1));
        for (name, value) in &self.headers {
            request = request.header(*name, value.as_str());
        }
        if let Some(tag) = &self.tag {
            request = request.header("If-Range", tag);
        }
        let mut response = request.call().map_err(|e| match e {
            ureq::Error::Io(_) | ureq::Error::ConnectionFailed | ureq::Error::Timeout(_) => {
                Failure::Lost(say(e))
            }
            other => Failure::Said(say(other)),
        })?;
        let said = |text: &str| Err(Failure::Said(io::Error::other(text.to_owned())));
        match response.status().as_u16() {
            206 => {}
            200 => {
                return said(
                    "the file on the server has changed, or the server does not give ranges any more",
                );
            }
            code => return Err(Failure::Said(status_error(code))),
        }
        let range = header(&response, "content-range").and_then(|r| r.trim().strip_prefix("bytes "));
        let (range, size) = range.and_then(|r| r.split_once('/')).unwrap_or_default();
        if range != format!("{start}-{}", end - 1) || (size != "*" && size != self.size.to_string()) {
            return said("the server gives another range than the one that was asked for");
        }
        let len = (end - start) as usize;
        let mut data = Vec::with_capacity(len);
        let mut body = response.body_mut().with_config().limit(len as u64 + 1).reader();
        body.by_ref().take(len as u64).read_to_end(&mut data).map_err(Failure::Lost)?;
        if data.len() != len {
            return Err(Failure::Lost(io::ErrorKind::UnexpectedEof.into()));
        }
        Ok(Segment { start, data: Arc::new(data) })
    }

    /// What is known from `offset` on; `most` bytes are wanted.
    fn segment(&self, offset: u64, most: usize) -> io::Result<Segment> {
        if let Some(known) = self.segments.lock().iter().find(|s| s.from(offset).is_some()) {
            return Ok(known.clone());
        }
        let want = most.min(MAX_FETCH) as u64;
        // Who reads much at a time goes on behind it by himself.
        let ahead = if want < self.readahead { self.readahead } else { 0 };
        let end = offset.saturating_add(want + ahead).min(self.size);
        let segment = self.fetch(offset, end)?;
        let mut segments = self.segments.lock();
        if segments.len() == SEGMENTS {
            segments.pop_front();
        }
        segments.push_back(segment.clone());
        Ok(segment)
    }
}

/// Why there is no answer.
enum Failure {
    /// The connection failed; another one may do.
    Lost(io::Error),
    /// The server said so.
    Said(io::Error),
}

fn say(error: ureq::Error) -> io::Error {
    match error {
        ureq::Error::Io(error) => error,
        ureq::Error::StatusCode(code) => status_error(code),
        other => io::Error::other(other.to_string()),
    }
}

impl BlockNode for Http {
    fn driver(&self) -> &'static str {
        self.driver.name()
    }

    fn size(&self) -> u64 {
        self.size
    }

    fn is_readonly(&self) -> bool {
        true
    }

    fn read_at(&self, mut offset: u64, mut buf: &mut [u8]) -> io::Result<()> {
        while !buf.is_empty() {
            if offset >= self.size {
                buf.fill(0);
                return Ok(());
            }
            let segment = self.segment(offset, buf.len())?;
            let from = segment.from(offset).ok_or_else(|| os_error(libc::EIO))?;
            let n = from.len().min(buf.len());
            let (now, rest) = buf.split_at_mut(n);
            now.copy_from_slice(from.get(..n).unwrap_or_default());
            offset += n as u64;
            buf = rest;
        }
        Ok(())
    }

    fn write_at(&self, _offset: u64, _buf: &[u8]) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn flush(&self) -> io::Result<()> {
        Ok(())
    }

    fn discard(&self, _offset: u64, _len: u64) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn write_zeroes(&self, _offset: u64, _len: u64, _unmap: bool) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn status(&self, offset: u64, len: u64) -> io::Result<Extent> {
        let len = len.min(self.size.saturating_sub(offset));
        Ok(Extent { len, allocated: true, data: true, zero: false, compressed: false, offset: Some(offset) })
    }

    fn truncate(&self, _size: u64, _preallocation: Preallocation) -> io::Result<()> {
        Err(os_error(libc::EROFS))
    }

    fn is_remote(&self) -> bool {
        true
    }
}
