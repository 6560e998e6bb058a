//! The device, driven through its rings.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::time::Duration;

use vm_memory::ByteValued;

use super::config::VsockConfig;
use super::connection::BUFFER;
use super::packet::{HEADER_LEN, HOST_CID, Header, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::testing::{DATA, Rig, WRITE, context, mischief, run_wild};

const CID: u64 = 42;
const BUF: u64 = DATA + 0x2000;
/// Room for data in each of the guest's buffers.
const ROOM: u32 = 0x1000;

struct Guest {
    rig: Rig,
    /// Guest addresses of buffers to receive into, by the descriptor they start with.
    buffers: std::collections::BTreeMap<u16, u64>,
}

impl Guest {
    fn new(socket: &Path) -> Self {
        let config = VsockConfig::new(CID, socket.to_owned());
        let context = context();
        let device = super::build("_vsock0", &config, &context).expect("builds");
        let mut rig = Rig::new(context, device);
        assert_eq!(rig.config(0, 8), CID.to_le_bytes());
        rig.start(0);
        let mut this = Self { rig, buffers: std::collections::BTreeMap::new() };
        for n in 0..4 {
            this.offer(BUF + n * 0x2000);
        }
        this
    }

    /// Gives the device a buffer.
    fn offer(&mut self, at: u64) {
        let head = self.rig.rings[0].chain(&[(at, HEADER_LEN as u32 + ROOM, WRITE)]);
        self.buffers.insert(head, at);
        self.rig.rings[0].publish(head);
        self.rig.kick(0);
    }

    fn packet(&self, op: u16, (host, guest): (u32, u32)) -> Header {
        Header {
            src_cid: CID,
            dst_cid: HOST_CID,
            src_port: guest,
            dst_port: host,
            kind: TYPE_STREAM,
            op,
            buf_alloc: 0x10000,
            ..Header::default()
        }
    }

    fn send(&mut self, header: Header, data: &[u8]) {
        let mut bytes = header.swapped().as_slice().to_vec();
        bytes.extend(data);
        self.rig.poke(DATA, &bytes);
        self.rig.request(1, &[(DATA, bytes.len() as u32, 0)]);
    }

    /// The next packet for the guest.
    fn receive(&mut self) -> (Header, Vec<u8>) {
        let (head, len) = self.rig.rings[0].wait_used();
        let at = self.buffers.remove(&head).expect("a buffer of ours");
        let bytes = self.rig.peek(at, len as usize);
        let header = *Header::from_slice(&bytes[..HEADER_LEN]).expect("a header");
        self.offer(at);
        (header.swapped(), bytes[HEADER_LEN..].to_vec())
    }

    fn expect(&mut self, op: u16) -> (Header, Vec<u8>) {
        let (header, data) = self.receive();
        let found = header.op;
        assert_eq!(found, op, "{header:?}");
        (header, data)
    }
}

fn stream(socket: &Path) -> UnixStream {
    let stream = UnixStream::connect(socket).expect("connects");
    stream.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    stream
}

fn ports(header: &Header) -> (u32, u32) {
    (header.src_port, header.dst_port)
}

#[test]
fn a_process_connects_to_the_guest_and_both_talk() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("v");
    let mut guest = Guest::new(&socket);
    let mut process = stream(&socket);
    process.write_all(b"CONNECT 1234\nearly").expect("written");
    let (request, _) = guest.expect(op::REQUEST);
    let ports = ports(&request);
    assert_eq!(ports.1, 1234);
    guest.send(guest.packet(op::RESPONSE, ports), &[]);
    let mut answer = vec![0; format!("OK {}\n", ports.0).len()];
    process.read_exact(&mut answer).expect("an answer");
    assert_eq!(answer, format!("OK {}\n", ports.0).as_bytes());
    assert_eq!(guest.expect(op::RW).1, b"early");
    guest.send(Header { len: 5, ..guest.packet(op::RW, ports) }, b"hello");
    let mut heard = [0; 5];
    process.read_exact(&mut heard).expect("data");
    assert_eq!(&heard, b"hello");
    // The process ends its side, and the guest the rest.
    process.shutdown(std::net::Shutdown::Write).expect("shut down");
    let (shutdown, _) = guest.expect(op::SHUTDOWN);
    let flags = shutdown.flags;
    assert_eq!(flags, SHUTDOWN_SEND);
    guest.send(Header { len: 3, ..guest.packet(op::RW, ports) }, b"bye");
    let all = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;
    guest.send(Header { flags: all, ..guest.packet(op::SHUTDOWN, ports) }, &[]);
    guest.expect(op::RST);
    let mut rest = Vec::new();
    process.read_to_end(&mut rest).expect("the end");
    assert_eq!(rest, b"bye");
}

#[test]
fn the_guest_connects_to_a_process_and_neither_overruns_the_other() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("v");
    let mut guest = Guest::new(&socket);
    let ports = (5000, 77);
    guest.send(guest.packet(op::REQUEST, ports), &[]);
    guest.expect(op::RST);
    let listener = UnixListener::bind(dir.path().join("v_5000")).expect("binds");
    guest.send(Header { buf_alloc: 100, ..guest.packet(op::REQUEST, ports) }, &[]);
    guest.expect(op::RESPONSE);
    let (mut process, _) = listener.accept().expect("a connection");
    process.set_read_timeout(Some(Duration::from_secs(60))).expect("a timeout");
    // No more than the guest has room for.
    process.write_all(&[7; 250]).expect("written");
    let mut got = 0u32;
    while got < 100 {
        got += guest.expect(op::RW).1.len() as u32;
    }
    assert_eq!(got, 100);
    guest.expect(op::CREDIT_REQUEST);
    guest.send(Header { buf_alloc: 1000, fwd_cnt: 100, ..guest.packet(op::CREDIT_UPDATE, ports) }, &[]);
    while got < 250 {
        got += guest.expect(op::RW).1.len() as u32;
    }
    assert_eq!(got, 250);
    // What the process does not read fills the buffers, and is not lost.
    let part = [9; 0x1000];
    for _ in 0..BUFFER / 0x1000 {
        guest.send(
            Header { len: 0x1000, buf_alloc: 1000, fwd_cnt: 250, ..guest.packet(op::RW, ports) },
            &part,
        );
    }
    let mut all = vec![0; BUFFER as usize];
    process.read_exact(&mut all).expect("all of it");
    assert!(all.iter().all(|byte| *byte == 9));
}

#[test]
fn what_no_driver_does_is_answered_with_a_reset() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("v");
    let mut guest = Guest::new(&socket);
    guest.send(guest.packet(op::RW, (1, 2)), &[]);
    guest.expect(op::RST);
    guest.send(Header { kind: 9, ..guest.packet(op::REQUEST, (1, 2)) }, &[]);
    guest.expect(op::RST);
    guest.send(Header { len: 99, ..guest.packet(op::REQUEST, (1, 2)) }, b"short");
    guest.expect(op::RST);
    // From somebody else, or to somebody else: nobody is there to answer.
    guest.send(Header { src_cid: 9, ..guest.packet(op::REQUEST, (1, 2)) }, &[]);
    guest.send(Header { dst_cid: 9, ..guest.packet(op::REQUEST, (1, 2)) }, &[]);
    // Data for a connection that the guest has not agreed to.
    let mut process = stream(&socket);
    process.write_all(b"CONNECT 7\n").expect("written");
    let ports = ports(&guest.expect(op::REQUEST).0);
    guest.send(Header { len: 1, ..guest.packet(op::RW, ports) }, b"x");
    guest.expect(op::RST);
    assert_eq!(process.read(&mut [0; 8]).expect("the end"), 0);
    // Processes that say something else are left.
    let mut other = stream(&socket);
    other.write_all(b"GET / HTTP/1.1\r\n").expect("written");
    assert_eq!(other.read(&mut [0; 8]).unwrap_or(0), 0);
}

#[test]
fn a_wild_driver_harms_nobody() {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    let dir = tempfile::tempdir().expect("dir");
    let config = ProptestConfig { cases: 16, failure_persistence: None, ..Default::default() };
    let mut runner = TestRunner::new(config);
    let run = |what: Vec<crate::testing::Mischief>| {
        let mut guest = Guest::new(&dir.path().join("v"));
        run_wild(&mut guest.rig, 0, &what);
        Ok(())
    };
    runner.run(&mischief(), run).expect("survives");
}
