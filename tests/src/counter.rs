//! A guest that counts, and the VMM that is told over REST what to do with it.

use std::path::Path;
use std::time::{Duration, Instant};

use crate::Program;
use crate::http::Api;

/// Starts a VMM that waits for its first request.
///
/// # Panics
/// If it does not start.
pub fn vmm(dir: &Path) -> (Program, Api) {
    let socket = dir.join("api");
    let program = Program::run(&["--api-socket", socket.to_str().expect("UTF-8")]);
    (program, Api::connect(&socket))
}

/// Waits until the guest's console, a file, contains `text`; returns all of it.
///
/// # Panics
/// If `limit` passes first; the message shows the console and what the program said.
pub fn wait_in(program: &Program, file: &Path, text: &str, limit: Duration) -> String {
    let deadline = Instant::now() + limit;
    loop {
        let seen = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
        if seen.contains(text) {
            return seen;
        }
        assert!(Instant::now() < deadline, "`{text}` did not come:\n{seen}\n{}", program.output());
        std::thread::sleep(Duration::from_millis(50));
    }
}

/// One line of the counter.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Count {
    /// The number.
    pub number: u64,
    /// What all numbers up to it sum up to, in the counter's way.
    pub sum: u64,
    /// The guest's uptime in seconds.
    pub uptime: f64,
}

impl Count {
    /// Before the first line.
    pub const NONE: Self = Self { number: 0, sum: 0, uptime: 0.0 };

    /// The lines of a console that are whole.
    pub fn all(console: &str) -> Vec<Self> {
        let whole = console.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let lines = whole.lines().filter_map(|l| l.trim().strip_prefix("COUNT "));
        let parse = |line: &str| {
            let mut words = line.split(' ');
            let (number, sum) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            Some(Self { number, sum, uptime: words.next()?.parse().ok()? })
        };
        lines.filter_map(parse).collect()
    }

    /// Checks that `counts` go on from here, one by one, with the right sums.
    ///
    /// # Panics
    /// If not.
    pub fn goes_on_with(&self, counts: &[Self]) {
        let Self { number: mut i, mut sum, .. } = *self;
        for count in counts {
            i += 1;
            sum = (sum * 31 + i) % 1_000_000_007;
            assert_eq!((count.number, count.sum), (i, sum), "{counts:?}");
        }
    }

    /// Checks that the guest's clock went on where it stood: `next` is the first line after an absence of a guest that
    /// ran for `ran` between the two lines, as far as is known from outside; `slack` covers what is not.
    ///
    /// # Panics
    /// If it went back, or past the time that the guest was away.
    pub fn clock_goes_on(&self, next: &Self, ran: Duration, slack: Duration) {
        let most = self.uptime + (ran + slack).as_secs_f64();
        assert!(
            (self.uptime..most).contains(&next.uptime),
            "uptime {} -> {}, at most {most}",
            self.uptime,
            next.uptime
        );
    }
}
