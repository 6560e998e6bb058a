//! Where the time goes while the guest stands.

use std::fmt::Write;

use holdfast_clock::host_monotonic;

/// Notes how long each step took; told to the log at level `debug` when it is dropped.
#[derive(Debug)]
pub struct Marks {
    whose: &'static str,
    began: u64,
    last: u64,
    steps: String,
}

impl Marks {
    /// The first step, of what `whose` names, begins now.
    pub fn start(whose: &'static str) -> Self {
        let now = host_monotonic();
        Self { whose, began: now, last: now, steps: String::new() }
    }

    /// When the first step began; host monotonic nanoseconds.
    pub fn began(&self) -> u64 {
        self.began
    }

    /// The step `what` has ended and the next begins.
    pub fn mark(&mut self, what: &str) {
        let now = host_monotonic();
        // Writing to a string cannot fail.
        let _ = write!(self.steps, "{what} {}, ", (now - self.last) / 1000);
        self.last = now;
    }
}

impl Drop for Marks {
    fn drop(&mut self) {
        let steps = self.steps.trim_end_matches(", ");
        tracing::debug!(total = (self.last - self.began) / 1000, steps, "{} (µs)", self.whose);
    }
}
