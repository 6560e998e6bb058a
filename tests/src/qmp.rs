//! The smallest QMP client: one command at a time, events kept.

use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::{Value, json};

/// A client that has negotiated.
#[derive(Debug)]
pub struct Qmp {
    stream: UnixStream,
    lines: BufReader<UnixStream>,
    /// Events so far, oldest first.
    pub events: Vec<Value>,
}

impl Qmp {
    /// Connects to `path`, when something listens there.
    ///
    /// # Panics
    /// If nothing does within ten seconds.
    pub fn connect(path: &Path) -> Self {
        let deadline = Instant::now() + Duration::from_secs(10);
        let stream = loop {
            match UnixStream::connect(path) {
                Ok(stream) => break stream,
                Err(error) => assert!(Instant::now() < deadline, "{}: {error}", path.display()),
            }
            std::thread::sleep(Duration::from_millis(5));
        };
        let lines = BufReader::new(stream.try_clone().expect("a socket"));
        let mut this = Self { stream, lines, events: Vec::new() };
        this.line();
        this.ok("qmp_capabilities", json!({}));
        this
    }

    fn line(&mut self) -> Value {
        let mut line = String::new();
        self.lines.read_line(&mut line).expect("the VMM answers");
        serde_json::from_str(&line).unwrap_or_else(|e| panic!("{e}: `{line}`"))
    }

    /// Runs a command and returns the whole answer.
    ///
    /// # Panics
    /// If the connection breaks.
    pub fn command(&mut self, name: &str, arguments: &Value) -> Value {
        let text = json!({ "execute": name, "arguments": arguments }).to_string() + "\n";
        self.stream.write_all(text.as_bytes()).expect("the VMM reads");
        loop {
            let message = self.line();
            if message.get("event").is_some() {
                self.events.push(message);
            } else {
                return message;
            }
        }
    }

    /// Runs a command that must succeed.
    ///
    /// # Panics
    /// If it does not.
    #[allow(clippy::needless_pass_by_value, reason = "arguments are made for the call")]
    pub fn ok(&mut self, name: &str, arguments: Value) -> Value {
        let answer = self.command(name, &arguments);
        assert!(answer.get("return").is_some(), "{name}: {answer}");
        answer["return"].clone()
    }

    /// Runs a command that must fail; returns the description.
    ///
    /// # Panics
    /// If it succeeds.
    #[allow(clippy::needless_pass_by_value, reason = "arguments are made for the call")]
    pub fn fails(&mut self, name: &str, arguments: Value) -> String {
        let answer = self.command(name, &arguments);
        answer["error"]["desc"].as_str().unwrap_or_else(|| panic!("{name}: {answer}")).to_owned()
    }

    /// Asks until `query`'s answer has `value` at `key`.
    ///
    /// # Panics
    /// If it has not within four minutes.
    pub fn until(&mut self, query: &str, key: &str, value: &str) -> Value {
        let deadline = Instant::now() + crate::migration::LIMIT;
        loop {
            let answer = self.ok(query, json!({}));
            if answer[key] == value {
                return answer;
            }
            assert!(Instant::now() < deadline, "{query}: {key} does not become {value}: {answer}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// As [`Qmp::until`], of the first of several.
    ///
    /// # Panics
    /// If it has not within four minutes.
    pub fn until_first(&mut self, query: &str, key: &str, value: &str) -> Value {
        let deadline = Instant::now() + crate::migration::LIMIT;
        loop {
            let answer = self.ok(query, json!({}))[0].clone();
            if answer[key] == value {
                return answer;
            }
            assert!(Instant::now() < deadline, "{query}: {key} does not become {value}: {answer}");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// The values of `key` in the data of events called `name`.
    pub fn heard(&self, name: &str, key: &str) -> Vec<Value> {
        self.events.iter().filter(|e| e["event"] == name).map(|e| e["data"][key].clone()).collect()
    }

    /// Forgets the events that have come so far: all that happened before the last answer.
    pub fn forget_events(&mut self) {
        self.events.clear();
    }

    /// Waits for an event, also among those that came before, takes it out and returns its data.
    ///
    /// # Panics
    /// If the connection breaks first, or nothing comes for four minutes.
    pub fn event(&mut self, name: &str) -> Value {
        self.stream.set_read_timeout(Some(crate::migration::LIMIT)).expect("a timeout");
        loop {
            if let Some(at) = self.events.iter().position(|e| e["event"] == name) {
                return self.events.remove(at)["data"].clone();
            }
            let message = self.line();
            self.events.push(message);
        }
    }
}
