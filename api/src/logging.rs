//! `--log-file` and `-v`.

use std::fs::OpenOptions;
use std::io;
use std::path::Path;
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;

/// Sends the log to `file`, or to standard error. `verbosity`: 0 warnings, 1 information, 2 debugging,
/// 3 and more tracing.
///
/// # Errors
/// When the file cannot be opened.
pub fn start(file: Option<&Path>, verbosity: u8) -> io::Result<()> {
    let level = match verbosity {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        2 => LevelFilter::DEBUG,
        _ => LevelFilter::TRACE,
    };
    let builder = tracing_subscriber::fmt().with_max_level(level).with_thread_names(true);
    // A second start, in a test, keeps the first log: nothing is lost by that.
    match file {
        Some(path) => {
            let file = OpenOptions::new().create(true).append(true).open(path)?;
            let _ = builder.with_ansi(false).with_writer(Mutex::new(file)).try_init();
        }
        None => {
            let _ = builder.with_ansi(false).with_writer(io::stderr).try_init();
        }
    }
    Ok(())
}
