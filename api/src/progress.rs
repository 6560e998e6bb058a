//! `holdfast ctl migrate`: how far a migration has come, in one line.

use std::io::{self, IsTerminal, Write};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::Duration;

use holdfast_vmm::control::MigrationInfo;

use crate::cli::Ctl;
use crate::client::{self, ClientError};

/// How often the line is written anew.
const PERIOD: Duration = Duration::from_millis(200);
/// Columns of the bar.
const BAR: u64 = 30;

/// Sends `ctl` and shows how far the migration has come on standard error until there is an answer, which is returned.
///
/// # Errors
/// [`ClientError`].
pub fn send(ctl: &Ctl) -> Result<String, ClientError> {
    let ask = Ctl {
        endpoint: "vm.migration-progress",
        get: true,
        body: None,
        fds: Vec::new(),
        progress: false,
        socket: ctl.socket.clone(),
    };
    let (done, answered) = sync_channel(1);
    let answer = std::thread::scope(|scope| {
        scope.spawn(move || drop(done.send(client::send(ctl))));
        let mut shown = Line::default();
        loop {
            match answered.recv_timeout(PERIOD) {
                Ok(answer) => return (answer, shown),
                Err(RecvTimeoutError::Disconnected) => return (Err(ClientError::Malformed), shown),
                Err(RecvTimeoutError::Timeout) => {}
            }
            // Without an answer there is nothing to show; what the migration says counts.
            let Ok(info) = client::send(&ask) else { continue };
            if let Ok(info) = serde_json::from_str(&info) {
                shown.show(&line(&info));
            }
        }
    });
    let (answer, mut shown) = answer;
    if answer.is_ok() {
        shown.show("the VM has moved");
    }
    shown.end();
    answer
}

/// What is shown.
#[derive(Debug, Default)]
struct Line {
    last: String,
}

impl Line {
    fn show(&mut self, text: &str) {
        if text == self.last {
            return;
        }
        let mut err = io::stderr();
        // Who does not see it misses nothing else.
        let _ = if err.is_terminal() { write!(err, "\r{text}\x1b[K") } else { writeln!(err, "{text}") };
        let _ = err.flush();
        text.clone_into(&mut self.last);
    }

    fn end(&self) {
        if !self.last.is_empty() && io::stderr().is_terminal() {
            // As above.
            let _ = writeln!(io::stderr());
        }
    }
}

/// The line for `info`.
fn line(info: &MigrationInfo) -> String {
    let status = info.status.as_deref().unwrap_or("setup");
    let Some(ram) = info.ram.as_ref().filter(|ram| ram.total > 0) else { return status.to_owned() };
    let there = ram.total.saturating_sub(ram.remaining);
    let parts =
        |of: u64| u64::try_from(u128::from(there) * u128::from(of) / u128::from(ram.total)).unwrap_or(of);
    let full = parts(BAR) as usize;
    let mut text = format!(
        "[{}{}] {:3} %  {status}, pass {}, {} MiB sent",
        "#".repeat(full),
        ".".repeat((BAR as usize).saturating_sub(full)),
        parts(100),
        ram.dirty_sync_count,
        ram.transferred >> 20,
    );
    if ram.mbps > 0.0 {
        text += &format!(", {:.0} MiB/s", ram.mbps * 1e6 / 8.0 / f64::from(1 << 20));
    }
    if let Some(downtime) = info.expected_downtime {
        text += &format!(", {downtime} ms to stand");
    }
    text
}

#[cfg(test)]
mod tests {
    use holdfast_vmm::control::MigrationStats;

    use super::*;

    #[test]
    fn the_line_says_how_far_it_is() {
        assert_eq!(line(&MigrationInfo::default()), "setup");
        let ram = MigrationStats {
            total: 256 << 20,
            remaining: 64 << 20,
            transferred: 80 << 20,
            dirty_sync_count: 2,
            mbps: 838.8608,
            ..MigrationStats::default()
        };
        let info = MigrationInfo {
            status: Some("active".to_owned()),
            ram: Some(ram),
            expected_downtime: Some(12),
            ..MigrationInfo::default()
        };
        assert_eq!(
            line(&info),
            "[######################........]  75 %  active, pass 2, 80 MiB sent, 100 MiB/s, 12 ms to stand"
        );
    }
}
