//! A guest that counts, and the VMM that is told over REST what to do with it.

use std::path::{Path, PathBuf};
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

/// What the guest writes: a file that every process which goes on with the guest begins anew.
#[derive(Debug)]
pub struct Console {
    file: PathBuf,
    /// What was written before the file was begun anew; its last line may be half of one.
    before: String,
}

impl Console {
    /// A console of which nothing has been written.
    pub fn new(file: PathBuf) -> Self {
        Self { file, before: String::new() }
    }

    /// Where the process at hand writes it.
    pub fn file(&self) -> &Path {
        &self.file
    }

    /// All that the guest has written, in whatever process.
    pub fn text(&self) -> String {
        self.before.clone() + &String::from_utf8_lossy(&std::fs::read(&self.file).unwrap_or_default())
    }

    /// Keeps what is there; to be called between one process's end and the next one's beginning.
    pub fn is_begun_anew(&mut self) {
        self.before = self.text();
        // Else it would count twice until the next process opens it.
        std::fs::remove_file(&self.file).expect("the console's file");
    }

    /// Waits until `text` has been written; returns all that has.
    ///
    /// # Panics
    /// If `limit` passes first; the message shows the console and what the program said.
    pub fn wait_for(&self, program: &Program, text: &str, limit: Duration) -> String {
        let deadline = Instant::now() + limit;
        loop {
            let seen = self.text();
            if seen.contains(text) {
                return seen;
            }
            assert!(Instant::now() < deadline, "`{text}` did not come:\n{seen}\n{}", program.output());
            std::thread::sleep(Duration::from_millis(50));
        }
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_that_two_processes_wrote_is_one_line() {
        let dir = tempfile::tempdir().expect("directory");
        let mut console = Console::new(dir.path().join("console"));
        std::fs::write(console.file(), "quiet\nCOUNT 1 1 0.10\nCOUNT 2 33 0").expect("the first half");
        assert_eq!(Count::all(&console.text()).len(), 1);
        console.is_begun_anew();
        std::fs::write(console.file(), ".20\r\nCOUNT 3").expect("the second half");
        let counts = Count::all(&console.text());
        Count::NONE.goes_on_with(&counts);
        assert_eq!(counts.last(), Some(&Count { number: 2, sum: 33, uptime: 0.2 }));
    }
}
