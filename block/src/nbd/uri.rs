//! `nbd://` and the older `nbd:` names.

use super::Address;
use crate::BlockError;

/// The port that is registered for NBD.
pub const PORT: u16 = 10809;

fn bad<T>(name: &str) -> Result<T, BlockError> {
    Err(BlockError::Option(format!("'{name}' is not a valid NBD address")))
}

fn unescape(text: &str) -> Option<String> {
    let mut out = Vec::new();
    let mut bytes = text.bytes();
    while let Some(b) = bytes.next() {
        if b == b'%' {
            let digit = |c: Option<u8>| c.and_then(|c| char::from(c).to_digit(16));
            let (high, low) = (digit(bytes.next())?, digit(bytes.next())?);
            out.push((high * 16 + low) as u8);
        } else {
            out.push(b);
        }
    }
    String::from_utf8(out).ok()
}

/// Host and port out of `HOST`, `HOST:PORT` or `[HOST]:PORT`.
fn host_port(text: &str) -> Option<(String, u16)> {
    let (host, port) = match text.strip_prefix('[') {
        Some(rest) => {
            let (host, port) = rest.split_once(']')?;
            (host, port.strip_prefix(':').or(port.is_empty().then_some("")))
        }
        None => text.split_once(':').map_or((text, Some("")), |(h, p)| (h, Some(p))),
    };
    let port = match port? {
        "" => PORT,
        port => port.parse().ok()?,
    };
    let host = if host.is_empty() { "localhost" } else { host };
    Some((host.to_owned(), port))
}

/// Address and export of a name; `None` if it is not an NBD name at all.
///
/// # Errors
/// [`BlockError::Option`] if it is one that cannot be read.
pub fn parse(name: &str) -> Result<Option<(Address, String)>, BlockError> {
    if let Some(rest) = name.strip_prefix("nbd+unix://") {
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let socket = query.split('&').find_map(|q| q.strip_prefix("socket=")).and_then(unescape);
        let export = path.strip_prefix('/').map_or(Some(String::new()), unescape);
        return match (socket, export) {
            (Some(socket), Some(export)) => Ok(Some((Address::Unix(socket.into()), export))),
            _ => bad(name),
        };
    }
    if let Some(rest) = name.strip_prefix("nbd://").or_else(|| name.strip_prefix("nbd+tcp://")) {
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        return match (host_port(host), unescape(path)) {
            (Some((host, port)), Some(export)) if !path.contains('?') => {
                Ok(Some((Address::Tcp(host, port), export)))
            }
            _ => bad(name),
        };
    }
    let Some(rest) = name.strip_prefix("nbd:") else { return Ok(None) };
    let (place, export) = rest.split_once(":exportname=").unwrap_or((rest, ""));
    let address = match place.strip_prefix("unix:") {
        Some(path) => Address::Unix(path.into()),
        None => match host_port(place) {
            Some((host, port)) => Address::Tcp(host, port),
            None => return bad(name),
        },
    };
    Ok(Some((address, export.to_owned())))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names() {
        let tcp = |h: &str, p, e: &str| Some((Address::Tcp(h.into(), p), e.to_owned()));
        let unix = |s: &str, e: &str| Some((Address::Unix(s.into()), e.to_owned()));
        assert_eq!(parse("a.raw").expect("parsed"), None);
        assert_eq!(parse("nbd://host").expect("parsed"), tcp("host", PORT, ""));
        assert_eq!(parse("nbd://host:10/a%20b").expect("parsed"), tcp("host", 10, "a b"));
        assert_eq!(parse("nbd://[::1]:10/").expect("parsed"), tcp("::1", 10, ""));
        assert_eq!(parse("nbd+unix:///exp?socket=/tmp/s").expect("parsed"), unix("/tmp/s", "exp"));
        assert_eq!(parse("nbd:unix:/tmp/s:exportname=e").expect("parsed"), unix("/tmp/s", "e"));
        assert_eq!(parse("nbd:host:5").expect("parsed"), tcp("host", 5, ""));
        for bad in
            ["nbd://host:x/", "nbd+unix:///exp", "nbd://h/%zz", "nbd://[::1", "nbd:h:99999", "nbd://[a]b/"]
        {
            assert!(parse(bad).is_err(), "{bad}");
        }
    }
}
