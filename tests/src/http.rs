//! The smallest HTTP client that can judge the REST API: one request a connection, over a UNIX socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

/// A response as it came.
#[derive(Debug, Clone)]
pub struct Response {
    /// Status code.
    pub status: u16,
    /// Header lines as sent.
    pub headers: String,
    /// Body.
    pub body: String,
}

impl Response {
    /// The body as JSON.
    ///
    /// # Panics
    /// If it is none.
    pub fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|e| panic!("{e}: {self:?}"))
    }
}

/// A VMM's API socket.
#[derive(Debug, Clone)]
pub struct Api(std::path::PathBuf);

impl Api {
    /// Waits until something listens at `path`.
    ///
    /// # Panics
    /// If nothing does within ten seconds.
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(10);
        while UnixStream::connect(path).is_err() {
            assert!(Instant::now() < deadline, "nothing listens at {}", path.display());
            std::thread::sleep(Duration::from_millis(5));
        }
        Self(path.to_owned())
    }

    /// Sends one request; `body` is sent if it is not null.
    ///
    /// # Panics
    /// If the connection breaks, the answer is no HTTP or does not come within four minutes.
    pub fn request(&self, method: &str, route: &str, body: &Value) -> Response {
        let body = if body.is_null() { String::new() } else { body.to_string() };
        let mut stream = UnixStream::connect(&self.0).expect("the VMM listens");
        stream.set_read_timeout(Some(crate::migration::LIMIT)).expect("a timeout");
        let head = format!(
            "{method} /api/v1/{route} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nConnection: close\r\n"
        );
        let length = if body.is_empty() {
            "\r\n".to_owned()
        } else {
            format!("Content-Type: application/json\r\nContent-Length: {}\r\n\r\n", body.len())
        };
        stream.write_all((head + &length + &body).as_bytes()).expect("the VMM reads");
        let mut answer = String::new();
        stream.read_to_string(&mut answer).expect("the VMM answers");
        let (headers, body) = answer.split_once("\r\n\r\n").expect("a header");
        let status = headers.split(' ').nth(1).and_then(|s| s.trim().parse().ok());
        Response { status: status.expect("a status"), headers: headers.to_owned(), body: body.to_owned() }
    }

    /// A GET that must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn get(&self, route: &str) -> Value {
        let response = self.request("GET", route, &Value::Null);
        assert_eq!(response.status, 200, "{route}: {response:?}");
        response.json()
    }

    /// A PUT that must succeed.
    ///
    /// # Panics
    /// If it does not.
    pub fn put(&self, route: &str, body: &Value) -> Response {
        let response = self.request("PUT", route, body);
        assert!((200..300).contains(&response.status), "{route}: {response:?}");
        response
    }
}
