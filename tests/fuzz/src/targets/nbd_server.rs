//! What NBD clients send to a server.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, OnceLock};

use holdfast_block::nbd::{Export, Server, Socket};
use holdfast_block::raw::{LockRange, RawImage, RawOptions};
use holdfast_threads::PlainSpawner;
use vmm_sys_util::tempfile::TempFile;

/// Longest input: it fits a socket's buffer.
const MAX: usize = 64 << 10;
/// Bytes of the export.
const SIZE: u64 = 1 << 20;

fn server() -> &'static Arc<Server> {
    static SERVER: OnceLock<Arc<Server>> = OnceLock::new();
    SERVER.get_or_init(|| {
        let file = TempFile::new().expect("a file");
        file.as_file().set_len(SIZE).expect("long enough");
        let options =
            RawOptions { lock: LockRange::None, io_uring: false, ..RawOptions::new(file.as_path()) };
        let node = RawImage::open(options, PlainSpawner::shared()).expect("a node");
        let server = Server::new(None);
        server.add(Export {
            name: String::new(),
            description: Some("words".to_owned()),
            node,
            readonly: false,
            allocation_depth: true,
            bitmaps: Vec::new(),
            multi_conn: true,
            guard: None,
        });
        server
    })
}

/// The target: a client's side of a connection. Its first bytes are the client flags.
pub fn run(data: &[u8]) {
    let data = data.get(..data.len().min(MAX)).unwrap_or_default();
    let (ours, mut theirs) = UnixStream::pair().expect("sockets");
    theirs.write_all(data).expect("it fits");
    theirs.shutdown(Shutdown::Write).expect("open");
    let drain = std::thread::spawn(move || {
        let mut answer = [0; 4096];
        while theirs.read(&mut answer).is_ok_and(|n| n != 0) {}
    });
    // Clients may say what they want; nobody else is to notice.
    let _ = server().serve(Socket::Unix(ours));
    drain.join().expect("no panic");
}
