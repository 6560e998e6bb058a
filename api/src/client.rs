//! A small HTTP client for the API socket, file descriptors included.

use std::io::{self, Read};
use std::os::fd::RawFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use crate::cli::Ctl;
use crate::scm::send_with_fds;

/// Largest response that is read.
const MAX_RESPONSE: u64 = 64 << 20;

/// A request that got no good answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers at the socket.
    #[error("cannot connect to the API socket {path}")]
    Connect {
        /// The socket.
        path: PathBuf,
        /// What the host says.
        #[source]
        source: io::Error,
    },
    /// The connection broke.
    #[error("the API connection broke")]
    Broken(#[source] io::Error),
    /// What came back is not HTTP.
    #[error("the API's answer cannot be read")]
    Malformed,
    /// The request was refused.
    #[error("the API refused {endpoint} with status {status}: {}", reasons.join(": "))]
    Refused {
        /// The endpoint.
        endpoint: String,
        /// HTTP status.
        status: u16,
        /// The error's chain, outermost first.
        reasons: Vec<String>,
    },
}

/// Sends `ctl` and returns the body of the answer.
///
/// # Errors
/// [`ClientError`].
pub fn send(ctl: &Ctl) -> Result<String, ClientError> {
    let connected = UnixStream::connect(&ctl.socket);
    let mut stream = connected.map_err(|source| ClientError::Connect { path: ctl.socket.clone(), source })?;
    let method = if ctl.get { "GET" } else { "PUT" };
    let mut request = format!(
        "{method} /api/v1/{} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n",
        ctl.endpoint
    );
    match &ctl.body {
        Some(body) => {
            request +=
                &format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}", body.len());
        }
        None => request += "\r\n",
    }
    exchange(&mut stream, request.as_bytes(), &ctl.fds).and_then(|(status, body)| {
        if (200..300).contains(&status) {
            return Ok(body);
        }
        let reasons = serde_json::from_str(&body).unwrap_or_else(|_| vec![body]);
        Err(ClientError::Refused { endpoint: ctl.endpoint.to_owned(), status, reasons })
    })
}

fn exchange(stream: &mut UnixStream, request: &[u8], fds: &[RawFd]) -> Result<(u16, String), ClientError> {
    send_with_fds(stream, request, fds).map_err(ClientError::Broken)?;
    let mut response = Vec::new();
    stream.take(MAX_RESPONSE).read_to_end(&mut response).map_err(ClientError::Broken)?;
    let text = String::from_utf8(response).map_err(|_| ClientError::Malformed)?;
    let (head, body) = text.split_once("\r\n\r\n").ok_or(ClientError::Malformed)?;
    let status = head.strip_prefix("HTTP/1.1 ").and_then(|rest| rest.get(..3));
    let status = status.and_then(|status| status.parse().ok()).ok_or(ClientError::Malformed)?;
    Ok((status, body.to_owned()))
}
