//! What NBD servers answer to a client.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};

use holdfast_block::BlockNode;
use holdfast_block::nbd::{Address, ClientOptions, Nbd, Socket, Stream, Writer};
use vmm_sys_util::tempdir::TempDir;

/// Longest input: it fits a socket's buffer.
const MAX: usize = 64 << 10;

/// The same to who only writes.
fn write(data: &[u8]) {
    let (near, mut far) = UnixStream::pair().expect("sockets");
    far.write_all(data).expect("there is room");
    far.shutdown(Shutdown::Write).expect("a socket");
    if let Ok(mut writer) = Writer::over(Stream::Plain(Socket::Unix(near)), "") {
        // Errors are all that is asked for.
        let _ = writer.write(0, &[1; 512]).and_then(|()| writer.flush());
    }
}

/// The target: a server's side of a connection.
pub fn run(data: &[u8]) {
    let data = data.get(..data.len().min(MAX)).unwrap_or_default().to_vec();
    write(&data);
    let dir = TempDir::new().expect("a directory");
    let path = dir.as_path().join("s");
    let listener = UnixListener::bind(&path).expect("listening");
    let server = std::thread::spawn(move || {
        let (mut socket, _) = listener.accept().expect("a client");
        // The client may hang up first.
        let _ = socket.write_all(&data);
        let _ = socket.shutdown(Shutdown::Write);
        let mut request = [0; 4096];
        while socket.read(&mut request).is_ok_and(|n| n != 0) {}
    });
    let options = ClientOptions {
        address: Address::Unix(path),
        export: String::new(),
        tls: None,
        context: None,
        reconnect_delay: 0,
        open_timeout: 0,
        readonly: true,
    };
    if let Ok(client) = Nbd::open(options) {
        let size = client.size();
        let mut buf = [0; 4096];
        if size >= 4096 {
            // Errors are all that is asked for.
            let _ = client.read_at(0, &mut buf);
            let _ = client.status(0, size);
            let _ = client.read_at(size - 4096, &mut buf);
        }
    }
    server.join().expect("no panic");
}
