use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::thread::JoinHandle;

use holdfast_threads::PlainSpawner;

use super::proto::{OPTION_MAGIC, REQUEST_MAGIC, SERVER_MAGIC, command, option};
use super::*;
use crate::graph::Opener;
use crate::node::Preallocation;
use crate::qcow2::{CreateOptions, Qcow2, create};
use crate::raw::{LockRange, RawImage, RawOptions};
use crate::{BlockNode, graph};

/// A server at a socket, on threads of its own.
struct Bed {
    dir: tempfile::TempDir,
    server: Arc<Server>,
    /// Held so that the name stays.
    accepting: Option<JoinHandle<()>>,
}

fn image(path: &Path) -> Arc<Qcow2> {
    let options = RawOptions { create: true, lock: LockRange::None, ..RawOptions::new(path) };
    let file = RawImage::open(options, PlainSpawner::shared()).expect("file");
    create(file, None, &CreateOptions::new(4 << 20), None).expect("image")
}

fn listen(server: &Arc<Server>, path: PathBuf) -> JoinHandle<()> {
    let listener = Listener::bind(&Address::Unix(path)).expect("listening");
    let server = Arc::clone(server);
    std::thread::spawn(move || {
        let mut threads = Vec::new();
        while let Ok(socket) = listener.accept() {
            // A client that says nothing at all is the test's end.
            let server = Arc::clone(&server);
            if server.export("").is_none() {
                break;
            }
            threads.push(std::thread::spawn(move || server.serve(socket)));
        }
        server.disconnect_all();
        drop(listener);
        for thread in threads {
            let _ = thread.join().expect("no panic");
        }
    })
}

impl Bed {
    fn new(readonly: bool) -> (Self, Arc<Qcow2>) {
        let dir = tempfile::tempdir().expect("directory");
        let node = image(&dir.path().join("a.qcow2"));
        let server = Server::new(None);
        let export = Export {
            name: String::new(),
            description: Some("words".to_owned()),
            node: Arc::clone(&node) as Arc<dyn BlockNode>,
            readonly,
            allocation_depth: true,
            bitmaps: Vec::new(),
            multi_conn: true,
            guard: None,
        };
        assert!(server.add(export));
        let accepting = Some(listen(&server, dir.path().join("s")));
        (Self { dir, server, accepting }, node)
    }

    fn socket(&self) -> PathBuf {
        self.dir.path().join("s")
    }

    fn options(&self) -> ClientOptions {
        ClientOptions {
            address: Address::Unix(self.socket()),
            export: String::new(),
            tls: None,
            context: None,
            reconnect_delay: 0,
            open_timeout: 0,
            readonly: false,
        }
    }

    /// A connection that is past the negotiation, of simple replies.
    fn raw(&self) -> UnixStream {
        let mut socket = UnixStream::connect(self.socket()).expect("connected");
        let mut hello = [0; 18];
        socket.read_exact(&mut hello).expect("hello");
        assert_eq!(hello[..8], SERVER_MAGIC.to_be_bytes());
        socket.write_all(&3u32.to_be_bytes()).expect("flags");
        socket
    }
}

impl Drop for Bed {
    fn drop(&mut self) {
        self.server.remove("");
        drop(UnixStream::connect(self.socket()));
        if let Some(thread) = self.accepting.take() {
            thread.join().expect("no panic");
        }
    }
}

fn option_bytes(kind: u32, data: &[u8]) -> Vec<u8> {
    [&OPTION_MAGIC.to_be_bytes()[..], &kind.to_be_bytes(), &(data.len() as u32).to_be_bytes(), data].concat()
}

#[test]
fn a_client_follows_the_size_of_what_is_served() {
    let (bed, node) = Bed::new(false);
    let client = Nbd::open(bed.options()).expect("client");
    let error = client.truncate(6 << 20, Preallocation::Off).expect_err("the server has no more");
    assert_eq!(error.to_string(), "Cannot resize NBD nodes");
    node.truncate(6 << 20, Preallocation::Off).expect("grown");
    client.truncate(6 << 20, Preallocation::Off).expect("now it has");
    assert_eq!(client.size(), 6 << 20);
    // On the connections that were there before, too.
    client.write_at((5 << 20) + 7, &[9; 1000]).expect("written");
    let mut there = [0; 1000];
    node.read_at((5 << 20) + 7, &mut there).expect("read");
    assert_eq!(there, [9; 1000]);
    node.truncate(5 << 20, Preallocation::Off).expect("shrunk");
    client.read_at(5 << 20, &mut there).expect_err("it is not there any more");
    client.refresh_size().expect("asked");
    assert_eq!(client.size(), 5 << 20);
}

#[test]
fn a_client_sees_what_the_server_has() {
    let (bed, node) = Bed::new(false);
    let client = Nbd::open(bed.options()).expect("client");
    assert_eq!((client.size(), client.info().description.as_deref()), (4 << 20, Some("words")));
    client.write_at(100_000, &[7; 70_000]).expect("written");
    client.write_zeroes(110_000, 1000, true).expect("zeroed");
    client.discard(3 << 20, 65536).expect("discarded");
    client.flush().expect("flushed");
    let (mut ours, mut theirs) = (vec![1; 4 << 20], vec![2; 4 << 20]);
    client.read_at(0, &mut ours).expect("read");
    node.read_at(0, &mut theirs).expect("read");
    assert!(ours == theirs && ours[100_000] == 7 && ours[110_500] == 0);
    let hole = client.status(0, 1 << 20).expect("status");
    assert!(hole.zero && !hole.data && hole.len == 65536, "{hole:?}");
    let data = client.status(65536, 1 << 20).expect("status");
    assert!(data.data && !data.zero, "{data:?}");
    assert!(client.read_at((4 << 20) - 10, &mut [0; 10]).is_ok());
    assert!(client.write_at((4 << 20) - 10, &[0; 11]).is_err());
    // By name, and with a format over it.
    let name = format!("nbd+unix:///?socket={}", bed.socket().display());
    let opener = Opener::writing(PlainSpawner::shared());
    let node =
        opener.open(&graph::named(&name, Some(crate::options::Driver::Raw)).expect("name")).expect("open");
    assert_eq!((node.driver(), node.size()), ("raw", 4 << 20));
    let exports = list(&bed.options().address, None).expect("exports");
    assert_eq!(exports[0].contexts, ["base:allocation", "qemu:allocation-depth"]);
}

#[test]
fn a_writer_uses_a_connection_that_is_there() {
    let (bed, node) = Bed::new(false);
    let stream = || Stream::Plain(Socket::connect(&bed.options().address).expect("connected"));
    node.write_at(0, &[9; 4 << 20]).expect("written");
    let mut writer = Writer::over(stream(), "").expect("writer");
    assert_eq!((writer.info().size, writer.info().description.as_deref()), (4 << 20, Some("words")));
    // More than are under way at a time.
    for n in 0..100_u64 {
        writer.write(n * 5000 + 1, &[n as u8; 4999]).expect("sent");
    }
    writer.write_zeroes(2 << 20, 1 << 20).expect("sent");
    writer.flush().expect("written");
    let mut there = vec![1; 4 << 20];
    node.read_at(0, &mut there).expect("read");
    let (written, rest) = there.split_at(500_000);
    for (n, piece) in written.chunks(5000).enumerate() {
        assert!(piece[0] == 9 && piece[1..].iter().all(|b| usize::from(*b) == n), "{n}");
    }
    assert!(rest[(2 << 20) - 500_000..][..1 << 20].iter().all(|b| *b == 0) && rest[rest.len() - 1] == 9);
    writer.end().expect("said");
    let mut writer = Writer::over(stream(), "").expect("writer");
    writer.write((4 << 20) - 1, &[1; 2]).expect("sent");
    assert!(matches!(writer.settle(), Err(WriterError::Refused(_))), "past the end");
    let error = Writer::over(stream(), "other").expect_err("no such export");
    assert!(error.to_string().contains("'other' not available"), "{error}");
    let (bed, _node) = Bed::new(true);
    let socket = Socket::connect(&bed.options().address).expect("connected");
    let error = Writer::over(Stream::Plain(socket), "").expect_err("not to be written").to_string();
    assert!(error.contains("read-only"), "{error}");
}

#[test]
fn several_connections_at_once() {
    let (bed, node) = Bed::new(false);
    let client = Nbd::open(bed.options()).expect("client");
    std::thread::scope(|s| {
        for n in 0..8u64 {
            let client = &client;
            s.spawn(move || {
                for m in 0..16 {
                    let at = (n * 16 + m) * 8192;
                    client.write_at(at, &[n as u8 + 1; 8192]).expect("written");
                    let mut back = [0; 8192];
                    client.read_at(at, &mut back).expect("read");
                    assert!(back.iter().all(|b| *b == n as u8 + 1));
                }
            });
        }
    });
    let mut all = vec![0; 1 << 20];
    node.read_at(0, &mut all).expect("read");
    assert!(all.chunks(16 * 8192).enumerate().all(|(n, c)| c.iter().all(|b| usize::from(*b) == n + 1)));
}

#[test]
fn a_lost_connection_is_made_anew() {
    let (bed, _node) = Bed::new(false);
    let patient = Nbd::open(ClientOptions { reconnect_delay: 60, ..bed.options() }).expect("client");
    patient.write_at(0, &[9; 512]).expect("written");
    bed.server.disconnect_all();
    let mut back = [0; 512];
    patient.read_at(0, &mut back).expect("read again");
    assert_eq!(back, [9; 512]);
}

#[test]
fn what_is_read_only_is_not_written() {
    let (bed, _node) = Bed::new(true);
    let error = Nbd::open(bed.options()).expect_err("refused").to_string();
    assert!(error.contains("write access denied"), "{error}");
    let client = Nbd::open(ClientOptions { readonly: true, ..bed.options() }).expect("client");
    assert!(client.is_readonly() && client.write_at(0, &[1]).is_err());
    // A client that tries anyway.
    let mut socket = bed.raw();
    socket.write_all(&option_bytes(option::EXPORT_NAME, b"")).expect("asked");
    let mut export = [0; 10];
    socket.read_exact(&mut export).expect("export");
    for (kind, payload) in [(command::WRITE, 512usize), (command::TRIM, 0), (command::WRITE_ZEROES, 0)] {
        let request = proto::Request { flags: 0, command: kind, cookie: 5, offset: 0, len: 512 };
        socket.write_all(&[&request.to_bytes()[..], &vec![1; payload]].concat()).expect("asked");
        let mut answer = [0; 16];
        socket.read_exact(&mut answer).expect("answer");
        assert_eq!(answer[4..8], 1u32.to_be_bytes(), "EPERM");
    }
    assert!(Nbd::open(ClientOptions { export: "other".to_owned(), ..bed.options() }).is_err());
}

#[test]
fn garbage_ends_a_connection_and_nothing_else() {
    let (bed, _node) = Bed::new(false);
    let past = |tail: &[u8]| [option_bytes(option::EXPORT_NAME, b""), tail.to_vec()].concat();
    let request = |command: u16, offset: u64, len: u32| {
        proto::Request { flags: 0, command, cookie: 1, offset, len }.to_bytes().to_vec()
    };
    let half = request(command::WRITE, 0, 1 << 20);
    let words: Vec<Vec<u8>> = vec![
        vec![0xff; 64],
        option_bytes(option::GO, &[0xff; 64]),
        option_bytes(option::GO, b""),
        [&OPTION_MAGIC.to_be_bytes()[..], &option::LIST.to_be_bytes(), &u32::MAX.to_be_bytes()].concat(),
        option_bytes(option::STARTTLS, b""),
        option_bytes(option::SET_META_CONTEXT, &[0, 0, 0, 0, 0xff, 0xff, 0xff, 0xff]),
        option_bytes(option::EXPORT_NAME, &[0xff, 0xfe]),
        past(&[0; 100]),
        past(&REQUEST_MAGIC.to_be_bytes()),
        past(&request(command::WRITE, 0, u32::MAX)),
        past(&half[..]),
        past(&[request(command::READ, u64::MAX, 1), request(99, 0, 0)].concat()),
        past(&[request(command::READ, 0, u32::MAX), request(command::BLOCK_STATUS, 0, 512)].concat()),
    ];
    for text in &words {
        let mut socket = bed.raw();
        // The server may hang up in the middle.
        let _ = socket.write_all(text);
        let _ = socket.shutdown(std::net::Shutdown::Write);
        let mut rest = Vec::new();
        let _ = socket.read_to_end(&mut rest);
    }
    let client = Nbd::open(bed.options()).expect("still served");
    client.read_at(0, &mut [0; 512]).expect("read");
}

#[test]
fn servers_that_talk_nonsense_are_left() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("s");
    let hello = [&SERVER_MAGIC.to_be_bytes()[..], &OPTION_MAGIC.to_be_bytes(), &[0, 3]].concat();
    let reply = |option: u32, kind: u32, data: &[u8]| {
        [
            &0x0003_e889_0455_65a9u64.to_be_bytes()[..],
            &option.to_be_bytes(),
            &kind.to_be_bytes(),
            &(data.len() as u32).to_be_bytes(),
            data,
        ]
        .concat()
    };
    let size = [&[0, 0][..], &(1u64 << 20).to_be_bytes(), &[0, 1]].concat();
    let go = [
        reply(option::STRUCTURED_REPLY, 1, b""),
        reply(option::SET_META_CONTEXT, 1, b""),
        reply(option::GO, 3, &size),
        reply(option::GO, 1, b""),
    ]
    .concat();
    let opened = [hello.clone(), go].concat();
    let chunk = |kind: u16, len: u32, data: &[u8]| {
        [
            &0x668e_33efu32.to_be_bytes()[..],
            &1u16.to_be_bytes(),
            &kind.to_be_bytes(),
            &1u64.to_be_bytes(),
            &len.to_be_bytes(),
            data,
        ]
        .concat()
    };
    let all = |data: Vec<u8>| [opened.clone(), data].concat();
    let texts: Vec<Vec<u8>> = vec![
        b"SSH-2.0-OpenSSH_9.2p1 Debian\r\n".to_vec(),
        hello.clone(),
        [hello.clone(), vec![0xff; 64]].concat(),
        [hello.clone(), reply(option::STRUCTURED_REPLY, 1, b""), reply(option::LIST, 1, b"")].concat(),
        all(vec![0xff; 64]),
        all(chunk(1, 9, &[&u64::MAX.to_be_bytes()[..], &[1]].concat())),
        all(chunk(2, 12, &[&0u64.to_be_bytes()[..], &u32::MAX.to_be_bytes()].concat())),
        all(chunk(1, u32::MAX, &[0; 64])),
        all(chunk(0, 0, &[])),
        all(chunk(0x8001, 6, &[0; 6])),
        all(chunk(5, 12, &[0; 12])),
    ];
    for text in &texts {
        let listener = std::os::unix::net::UnixListener::bind(&path).expect("listening");
        let text = text.clone();
        let server = std::thread::spawn(move || {
            let (mut socket, _) = listener.accept().expect("client");
            let _ = socket.write_all(&text);
            let _ = socket.shutdown(std::net::Shutdown::Write);
            let _ = socket.read_to_end(&mut Vec::new());
        });
        let options = ClientOptions {
            address: Address::Unix(path.clone()),
            export: String::new(),
            tls: None,
            context: None,
            reconnect_delay: 0,
            open_timeout: 0,
            readonly: true,
        };
        if let Ok(client) = Nbd::open(options) {
            assert!(client.read_at(0, &mut [0; 512]).is_err());
        }
        server.join().expect("server");
        std::fs::remove_file(&path).expect("removed");
    }
}

#[test]
fn requests_to_a_silent_server_are_given_up() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("nbd");
    let listener = std::os::unix::net::UnixListener::bind(&path).expect("listening");
    // It lets two clients in and answers no request of theirs.
    let server = std::thread::spawn(move || {
        let mut kept = Vec::new();
        for _ in 0..2 {
            let (mut socket, _) = listener.accept().expect("a client");
            socket
                .write_all(&[SERVER_MAGIC.to_be_bytes(), OPTION_MAGIC.to_be_bytes()].concat())
                .expect("sent");
            socket.write_all(&[0, 0]).expect("sent");
            let mut asked = [0; 20];
            socket.read_exact(&mut asked).expect("flags and an option");
            let export = [(1u64 << 20).to_be_bytes().as_slice(), &1u16.to_be_bytes(), &[0; 124]].concat();
            socket.write_all(&export).expect("sent");
            kept.push(socket);
        }
        let mut rest = Vec::new();
        kept.iter_mut()
            .map(|socket| socket.read_to_end(&mut rest).expect("all that comes"))
            .collect::<Vec<_>>()
    });
    let options = ClientOptions {
        address: Address::Unix(path),
        export: String::new(),
        tls: None,
        context: None,
        reconnect_delay: 3600,
        open_timeout: 0,
        readonly: false,
    };
    let client = Nbd::open(options).expect("client");
    for _ in 0..2 {
        let writer = Arc::clone(&client);
        let write = std::thread::spawn(move || writer.write_at(0, &[1; 512]));
        let other = Arc::clone(&client);
        let waits = std::thread::spawn(move || other.write_at(512, &[1; 512]));
        // One has the only connection, the other waits for it.
        std::thread::sleep(std::time::Duration::from_millis(200));
        assert!(!write.is_finished() && !waits.is_finished());
        client.cancel_in_flight();
        for thread in [write, waits] {
            let error = thread.join().expect("no panic").expect_err("nobody has answered");
            assert_eq!(error.raw_os_error(), Some(libc::ECANCELED));
        }
    }
    drop(client);
    assert_eq!(server.join().expect("no panic"), [28 + 512; 2]);
}
