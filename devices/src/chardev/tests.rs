//! Back ends against real files, sockets and pseudo-terminals.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::time::Duration;

use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;

use super::*;

#[derive(Debug)]
struct Front {
    room: Mutex<usize>,
    got: Mutex<Sender<Vec<u8>>>,
}

impl CharReceiver for Front {
    fn capacity(&self) -> usize {
        *self.room.lock()
    }
    fn receive(&self, data: &[u8]) {
        let mut room = self.room.lock();
        *room = room.checked_sub(data.len()).expect("no more than the capacity");
        self.got.lock().send(data.to_vec()).expect("the test listens");
    }
}

fn front(room: usize) -> (Arc<Front>, Receiver<Vec<u8>>) {
    let (tx, rx) = channel();
    (Arc::new(Front { room: Mutex::new(room), got: Mutex::new(tx) }), rx)
}

fn open_spec(spec: &CharSpec) -> Result<Arc<dyn CharBackend>, BuildError> {
    let spawner = PlainSpawner::shared();
    open(spec, &CharContext { id: "serial", spawner: &spawner, quit: Arc::new(|| {}), keep: false })
}

fn scratch(name: &str) -> PathBuf {
    std::env::temp_dir().join(format!("holdfast-chardev-{}-{name}", std::process::id()))
}

const SOON: Duration = Duration::from_secs(20);

#[test]
fn escapes_are_taken_out() {
    let mut e = Escape::default();
    assert_eq!(e.feed(b"ab"), Escaped { pass: b"ab".to_vec(), ..Escaped::default() });
    assert_eq!(e.feed(b"a\x01"), Escaped { pass: b"a".to_vec(), ..Escaped::default() });
    assert!(e.feed(b"h").help);
    assert_eq!(e.feed(b"\x01\x01b").pass, b"\x01b");
    assert_eq!(e.feed(b"\x01qx").pass, b"x");
    assert!(e.feed(b"\x01xabc").quit);
}

#[test]
fn a_file_gets_all_output() {
    let path = scratch("file");
    let backend = open_spec(&CharSpec::File(path.clone())).expect("writable");
    backend.send(b"one ");
    backend.send(b"two");
    assert_eq!(std::fs::read(&path).expect("there"), b"one two");
    assert!(open_spec(&CharSpec::File("/nonexistent/x".into())).is_err());
    std::fs::remove_file(path).expect("there");
}

#[test]
fn a_late_client_sees_the_backlog_and_its_input_waits_for_room() {
    let path = scratch("socket");
    let backend = open_spec(&CharSpec::Socket(path.clone())).expect("free");
    assert!(open_spec(&CharSpec::Socket(path.clone())).is_err(), "in use");
    backend.send(b"early ");
    assert!(!backend.is_open());
    let (front, got) = front(2);
    backend.connect(Arc::clone(&front) as Arc<dyn CharReceiver>);
    let mut client = UnixStream::connect(&path).expect("listens");
    let mut text = [0; 6];
    client.read_exact(&mut text).expect("backlog");
    assert_eq!(&text, b"early ");
    client.write_all(b"abcd").expect("connected");
    let mut seen = got.recv_timeout(SOON).expect("input");
    while seen.len() < 2 {
        seen.extend(got.recv_timeout(SOON).expect("input"));
    }
    assert_eq!(seen, b"ab");
    assert!(got.recv_timeout(Duration::from_millis(50)).is_err(), "no room");
    *front.room.lock() = 10;
    backend.receiver_ready();
    assert_eq!(got.recv_timeout(SOON).expect("the rest"), b"cd");
    // A second client takes over.
    let mut second = UnixStream::connect(&path).expect("listens");
    assert_eq!(client.read(&mut text).expect("closed"), 0);
    backend.send(b"x");
    second.read_exact(&mut text[..1]).expect("output");
    assert_eq!(text[0], b'x');
    drop(backend);
    assert!(!path.exists());
}

#[test]
fn the_backlog_is_bounded_and_keeps_the_newest() {
    let path = scratch("bounded");
    let backend = open_spec(&CharSpec::Socket(path.clone())).expect("free");
    for n in 0..40_000u32 {
        backend.send(format!("{n:010}").as_bytes());
    }
    let mut client = UnixStream::connect(&path).expect("listens");
    let mut text = vec![0; 256 * 1024];
    client.read_exact(&mut text).expect("backlog");
    assert!(text.ends_with(b"0000039999"));
}

#[test]
fn a_pseudo_terminal_carries_bytes_both_ways() {
    let backend = open_spec(&CharSpec::Pty).expect("a pty");
    let path = backend.pty_path().expect("published");
    assert_eq!(backend.label(), format!("pty:{}", path.display()));
    let (front, got) = front(16);
    backend.connect(front);
    backend.send(b"a\nb");
    let mut slave = std::fs::File::options().read(true).write(true).open(&path).expect("slave");
    let mut text = [0; 3];
    slave.read_exact(&mut text).expect("output");
    assert_eq!(&text, b"a\nb", "raw: no CR is added");
    slave.write_all(b"\x03k").expect("input");
    let mut seen = got.recv_timeout(SOON).expect("input");
    while seen.len() < 2 {
        seen.extend(got.recv_timeout(SOON).expect("input"));
    }
    assert_eq!(seen, b"\x03k");
}

/// How the child of the next test ends.
const WAYS_OUT: [&str; 6] = ["drop", "exit", "panic", "abort", "term", "hup"];
const CHILD: &str = "HOLDFAST_TEST_TERMINAL_CHILD";

/// Not a test of its own: what the child process does with its terminal, on standard input.
#[test]
fn terminal_child() {
    let Ok(way) = std::env::var(CHILD) else { return };
    let raw = terminal::RawTerminal::enter().expect("settings").expect("a terminal");
    let echo = || sys::get_termios(libc::STDIN_FILENO).expect("settings").c_lflag & libc::ECHO != 0;
    assert!(!echo(), "raw mode does not echo");
    match way.as_str() {
        "drop" => {
            drop(raw);
            // SAFETY: ends the process at once, without exit handlers.
            unsafe { libc::_exit(0) };
        }
        "exit" => {
            std::mem::forget(raw);
            std::process::exit(0)
        }
        "panic" => {
            std::mem::forget(raw);
            assert!(std::panic::catch_unwind(|| panic!("on purpose")).is_err());
            // SAFETY: as above.
            unsafe { libc::_exit(0) };
        }
        "abort" => std::process::abort(),
        way => {
            let signal = if way == "term" { libc::SIGTERM } else { libc::SIGHUP };
            // SAFETY: raise has no memory to get wrong.
            unsafe { libc::raise(signal) };
            unreachable!("the signal ends the process");
        }
    }
}

#[test]
fn the_terminal_comes_back_on_every_way_out() {
    use std::os::unix::process::ExitStatusExt;
    for way in WAYS_OUT {
        let (_master, slave, _) = sys::open_pty().expect("a pty");
        let before = sys::get_termios(std::os::fd::AsRawFd::as_raw_fd(&slave)).expect("settings");
        let status = std::process::Command::new(std::env::current_exe().expect("this test"))
            .args(["--exact", "chardev::tests::terminal_child", "--test-threads=1"])
            .env(CHILD, way)
            .stdin(slave.try_clone().expect("a handle"))
            .stdout(std::process::Stdio::null())
            .stderr(std::process::Stdio::null())
            .status()
            .expect("runs");
        let signal = match way {
            "abort" => Some(libc::SIGABRT),
            "term" => Some(libc::SIGTERM),
            "hup" => Some(libc::SIGHUP),
            _ => None,
        };
        assert_eq!(status.signal(), signal, "{way}: {status}");
        assert!(signal.is_some() || status.success(), "{way}: {status}");
        let after = sys::get_termios(std::os::fd::AsRawFd::as_raw_fd(&slave)).expect("settings");
        assert_eq!((after.c_lflag, after.c_oflag), (before.c_lflag, before.c_oflag), "{way}");
        assert_ne!(after.c_lflag & libc::ECHO, 0);
    }
}
