//! A device whose back end is a thread of the test: the rust-vmm daemon with a queue that makes text large.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::mpsc::Receiver;
use std::thread::JoinHandle;

use holdfast_device::BuildContext;
use holdfast_memory::Tracked;
use vhost::vhost_user::Listener;
use vhost::vhost_user::message::VhostUserProtocolFeatures;
use vhost_user_backend::{ShutdownHandle, VhostUserBackendMut, VhostUserDaemon, VringRwLock, VringT};
use virtio_queue::QueueOwnedT;
use vm_memory::{
    Bytes, GuestAddress, GuestAddressSpace, GuestMemoryAtomic, GuestMemoryBackend, GuestMemoryMmap,
};
use vmm_sys_util::epoll::EventSet;
use vmm_sys_util::event::{EventConsumer, EventFlag, EventNotifier, new_event_consumer_and_notifier};

use super::generic::{self, config::GenericVhostUserConfig};
use crate::device::{VirtioDevice, feature, kind};
use crate::net::config::NetConfig;
use crate::testing::{DATA, RAM, RAM_SIZE, Rig, WRITE, context, shared_context};

const TYPE: u32 = 40;
/// A feature of the device.
const LOUD: u64 = 1 << 3;

/// What the back end does with requests.
mod mood {
    pub(super) const SERVE: u8 = 0;
    pub(super) const HOLD: u8 = 1;
    pub(super) const LIE: u8 = 2;
}

#[derive(Debug)]
struct Upper {
    mood: Arc<AtomicU8>,
    memory: Option<GuestMemoryAtomic<GuestMemoryMmap>>,
    config: Vec<u8>,
}

impl VhostUserBackendMut for Upper {
    type Bitmap = ();
    type Vring = VringRwLock;

    fn num_queues(&self) -> usize {
        1
    }

    fn max_queue_size(&self) -> usize {
        64
    }

    fn features(&self) -> u64 {
        feature::VERSION_1 | LOUD | 1 << 30
    }

    fn protocol_features(&self) -> VhostUserProtocolFeatures {
        VhostUserProtocolFeatures::MQ
            | VhostUserProtocolFeatures::CONFIG
            | VhostUserProtocolFeatures::REPLY_ACK
    }

    fn set_event_idx(&mut self, _enabled: bool) {}

    fn exit_event(&self, _thread: usize) -> Option<(EventConsumer, EventNotifier)> {
        new_event_consumer_and_notifier(EventFlag::NONBLOCK).ok()
    }

    fn get_config(&self, offset: u32, size: u32) -> Vec<u8> {
        let mut bytes = self.config.clone();
        bytes.resize(256, 0);
        bytes[offset as usize..(offset + size) as usize].to_vec()
    }

    fn set_config(&mut self, offset: u32, buf: &[u8]) -> io::Result<()> {
        let at = offset as usize;
        self.config[at..at + buf.len()].copy_from_slice(buf);
        // The device changes another byte in answer, as virtio-input does.
        self.config[7] = b'!';
        Ok(())
    }

    fn update_memory(&mut self, memory: GuestMemoryAtomic<GuestMemoryMmap>) -> io::Result<()> {
        self.memory = Some(memory);
        Ok(())
    }

    fn handle_event(
        &mut self,
        event: u16,
        _set: EventSet,
        rings: &[VringRwLock],
        _thread: usize,
    ) -> io::Result<()> {
        let memory = self.memory.as_ref().expect("set").memory();
        let ring = &rings[usize::from(event)];
        let mood = self.mood.load(Ordering::SeqCst);
        if mood == mood::HOLD {
            return Ok(());
        }
        let chains: Vec<_> = ring.get_mut().get_queue_mut().iter(memory.clone()).expect("ring").collect();
        for chain in chains {
            let head = chain.head_index();
            let (mut text, mut written) = (Vec::new(), 0);
            for d in chain {
                if d.is_write_only() {
                    let n = text.len().min(d.len() as usize);
                    memory.write_slice(&text[..n], d.addr()).expect("in RAM");
                    written = n as u32;
                } else {
                    let mut part = vec![0; d.len() as usize];
                    memory.read_slice(&mut part, d.addr()).expect("in RAM");
                    text.extend(part.to_ascii_uppercase());
                }
            }
            let head = if mood == mood::LIE { head + 7 } else { head };
            ring.add_used(head, written).expect("used");
        }
        ring.signal_used_queue()
    }
}

/// A back end that listens and serves one connection.
struct BackEnd {
    mood: Arc<AtomicU8>,
    /// Comes when somebody has connected.
    handle: Receiver<Option<ShutdownHandle>>,
    thread: JoinHandle<()>,
}

impl BackEnd {
    fn listen(path: &Path, mood: u8) -> Self {
        let mood = Arc::new(AtomicU8::new(mood));
        let upper = Upper { mood: Arc::clone(&mood), memory: None, config: b"config..".to_vec() };
        let empty = GuestMemoryAtomic::new(GuestMemoryMmap::<()>::new());
        let backend = Arc::new(std::sync::Mutex::new(upper));
        let mut daemon = VhostUserDaemon::new("upper".into(), backend, empty).expect("daemon");
        let mut listener = Listener::new(path, true).expect("listens");
        let (tell, handle) = std::sync::mpsc::channel();
        let thread = std::thread::spawn(move || {
            if daemon.start(&mut listener).is_ok() {
                let _ = tell.send(daemon.shutdown_handle());
                let _ = daemon.wait();
            }
        });
        Self { mood, handle, thread }
    }

    fn set(&self, mood: u8) {
        self.mood.store(mood, Ordering::SeqCst);
    }

    /// Closes the connection, with whatever is under way.
    fn kill(self) {
        if let Some(handle) = self.handle.recv().expect("was connected") {
            handle.shutdown();
        }
        self.thread.join().expect("ends");
    }
}

fn config(socket: PathBuf) -> GenericVhostUserConfig {
    GenericVhostUserConfig::new(TYPE, vec![64], socket)
}

fn device(socket: &Path, context: &BuildContext) -> Arc<dyn VirtioDevice> {
    generic::build("_dev0", &config(socket.to_owned()), context).expect("built")
}

fn rig(socket: &Path) -> Rig {
    let context = shared_context();
    let device = device(socket, &context);
    Rig::new(context, device)
}

const TEXT: &[u8] = b"the quick brown fox";

fn shout(rig: &mut Rig) -> (u32, Vec<u8>) {
    rig.poke(DATA, TEXT);
    rig.poke(DATA + 0x1000, &[0; 32]);
    let len = rig.request(0, &[(DATA, 10, 0), (DATA + 10, 9, 0), (DATA + 0x1000, 32, WRITE)]);
    (len, rig.peek(DATA + 0x1000, TEXT.len()))
}

#[test]
fn requests_are_served_and_what_was_written_is_known() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let _back_end = BackEnd::listen(&socket, mood::SERVE);
    let mut rig = rig(&socket);
    assert_eq!(rig.offered() & LOUD, LOUD);
    assert_eq!(rig.offered() & feature::INDIRECT_DESC, 0);
    assert_eq!(rig.read32(8), TYPE);
    assert_eq!(rig.config(0, 8), b"config..");
    rig.start(LOUD | feature::EVENT_IDX);
    rig.write_config(0, b"C");
    assert_eq!(rig.config(0, 8), b"Config.!");
    let tracker = rig.context.memory.iter().next().expect("RAM").bitmap_tracker();
    tracker.start_log();
    let page = (DATA + 0x1000 - RAM) / holdfast_memory::PAGE_SIZE;
    for _ in 0..100 {
        let (len, text) = shout(&mut rig);
        assert_eq!((len, text.as_slice()), (19, TEXT.to_ascii_uppercase().as_slice()));
    }
    assert!(tracker.is_dirty(page), "the back end's write is marked");
    // A reset, and all over again.
    rig.start(0);
    assert_eq!(shout(&mut rig).0, 19);
}

#[test]
fn a_new_back_end_gets_what_the_old_one_held() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let first = BackEnd::listen(&socket, mood::SERVE);
    let mut rig = rig(&socket);
    rig.start(LOUD);
    assert_eq!(shout(&mut rig).0, 19);
    first.set(mood::HOLD);
    rig.poke(DATA, TEXT);
    for n in 0..3 {
        let head = rig.rings[0].chain(&[(DATA, 19, 0), (DATA + 0x2000 + n * 0x100, 32, WRITE)]);
        rig.rings[0].publish(head);
        rig.kick(0);
    }
    first.kill();
    let _second = BackEnd::listen(&socket, mood::SERVE);
    for _ in 0..3 {
        assert_eq!(rig.rings[0].wait_used().1, 19);
    }
    for n in 0..3 {
        assert_eq!(rig.peek(DATA + 0x2000 + n * 0x100, 19), TEXT.to_ascii_uppercase());
    }
    assert_eq!(shout(&mut rig).0, 19);
}

/// A FUSE request without arguments.
fn fuse_request(opcode: u32, unique: u64) -> Vec<u8> {
    let mut header = 40u32.to_le_bytes().to_vec();
    header.extend(opcode.to_le_bytes());
    header.extend(unique.to_le_bytes());
    header.resize(40, 0);
    header
}

#[test]
fn a_file_system_whose_daemon_died_is_told_until_it_begins_anew() {
    const LOOKUP: u32 = 1;
    const FORGET: u32 = 2;
    const INIT: u32 = 26;
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let first = BackEnd::listen(&socket, mood::SERVE);
    let context = shared_context();
    let config = GenericVhostUserConfig { device_type: kind::FS, ..config(socket.clone()) };
    let device = generic::build("_fs0", &config, &context).expect("built");
    let mut rig = Rig::new(context, device);
    rig.start(LOUD);
    let answer = DATA + 0x1000;
    let ask = |rig: &mut Rig, opcode, unique| {
        rig.poke(DATA, &fuse_request(opcode, unique));
        rig.poke(answer, &[0; 64]);
        rig.request(0, &[(DATA, 40, 0), (answer, 64, WRITE)])
    };
    let not_connected = |unique: u64| {
        let mut bytes = 16u32.to_le_bytes().to_vec();
        bytes.extend((-libc::ENOTCONN).to_le_bytes());
        bytes.extend(unique.to_le_bytes());
        bytes
    };
    // Nothing reaches a daemon before a session was begun.
    assert_eq!(ask(&mut rig, LOOKUP, 7), 16);
    assert_eq!(rig.peek(answer, 16), not_connected(7));
    assert_eq!(ask(&mut rig, INIT, 8), 40, "the daemon's answer is what was asked, in capitals");
    assert_eq!(ask(&mut rig, LOOKUP, 9), 40);
    // It dies with a request under way.
    first.set(mood::HOLD);
    rig.poke(DATA, &fuse_request(LOOKUP, 10));
    let head = rig.rings[0].chain(&[(DATA, 40, 0), (answer, 64, WRITE)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    first.kill();
    assert_eq!(rig.rings[0].wait_used().1, 16);
    assert_eq!(rig.peek(answer, 16), not_connected(10));
    let _second = BackEnd::listen(&socket, mood::SERVE);
    let device = Arc::clone(&rig.device);
    crate::testing::eventually("it is connected", || device.counters().get("reconnects") == Some(&1));
    assert_eq!(ask(&mut rig, LOOKUP, 11), 16);
    assert_eq!(rig.peek(answer, 16), not_connected(11));
    assert_eq!(ask(&mut rig, FORGET, 12), 0);
    assert_eq!(ask(&mut rig, INIT, 13), 40);
    assert_eq!(ask(&mut rig, LOOKUP, 14), 40);
}

#[test]
fn requests_under_way_move_with_the_device() {
    let dir = tempfile::tempdir().expect("dir");
    let (here, there) = (dir.path().join("here"), dir.path().join("there"));
    let _holds = BackEnd::listen(&here, mood::HOLD);
    let mut source = rig(&here);
    source.start(LOUD);
    source.poke(DATA, TEXT);
    let head = source.rings[0].chain(&[(DATA, 19, 0), (DATA + 0x2000, 32, WRITE)]);
    source.rings[0].publish(head);
    source.kick(0);
    source.device.pause();
    let state = source.device.save().expect("saves");
    // Here it would go on as well.
    let _serves = BackEnd::listen(&there, mood::SERVE);
    let mut target = rig(&there);
    let mut ram = vec![0; RAM_SIZE];
    source.context.memory.read_slice(&mut ram, GuestAddress(RAM)).expect("RAM");
    target.context.memory.write_slice(&ram, GuestAddress(RAM)).expect("RAM");
    target.device.restore(&state).expect("restores");
    target.device.resume();
    std::mem::swap(&mut source.rings, &mut target.rings);
    let memory = target.context.memory.clone();
    target.rings[0].move_to(&memory);
    assert_eq!(target.rings[0].wait_used().1, 19);
    assert_eq!(target.peek(DATA + 0x2000, 19), TEXT.to_ascii_uppercase());
    assert_eq!(shout(&mut target).0, 19);
    assert!(state.data.to_string().contains("in_flight"));
    let mut wrong = state;
    wrong.data["device"]["in_flight"] = serde_json::json!({ "9": [1] });
    target.device.pause();
    assert!(target.device.restore(&wrong).is_err(), "a queue that is not there");
}

#[test]
fn a_back_end_that_lies_stops_the_device_and_nothing_else() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let back_end = BackEnd::listen(&socket, mood::LIE);
    let mut rig = rig(&socket);
    rig.start(LOUD);
    rig.poke(DATA, TEXT);
    let head = rig.rings[0].chain(&[(DATA, 19, 0), (DATA + 0x2000, 32, WRITE)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    rig.expect_broken("the back end gave back what it did not have");
    back_end.set(mood::SERVE);
    rig.start(LOUD);
    assert_eq!(shout(&mut rig).0, 19);
}

fn refusal(socket: &Path, context: &BuildContext) -> String {
    let error = generic::build("d", &config(socket.to_owned()), context).expect_err("refused");
    let cause = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
    format!("{error}: {cause}")
}

#[test]
fn what_cannot_work_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let gone = refusal(&socket, &shared_context());
    assert!(gone.contains("cannot connect to `") && gone.contains("No such file"), "{gone}");
    let private = refusal(&socket, &context());
    assert!(private.contains("shared=on"), "{private}");
    // Somebody who takes the connection and says nothing.
    let silent = UnixListener::bind(&socket).expect("binds");
    let error = refusal(&socket, &shared_context());
    assert!(error.contains("GET_FEATURES"), "{error}");
    drop(silent);
    // Too few queues.
    let other = dir.path().join("t");
    let _back_end = BackEnd::listen(&other, mood::SERVE);
    let two = GenericVhostUserConfig { queue_sizes: vec![64, 64], ..config(other) };
    let error = generic::build("d", &two, &shared_context()).expect_err("refused").to_string();
    assert!(error.contains("1 queues, 2 are asked for"), "{error}");
}

#[test]
fn a_wild_driver_meets_checked_chains() {
    use proptest::prelude::*;
    use proptest::test_runner::TestRunner;
    let dir = tempfile::tempdir().expect("dir");
    let mut runner =
        TestRunner::new(ProptestConfig { cases: 8, failure_persistence: None, ..Default::default() });
    let counter = std::sync::atomic::AtomicU32::new(0);
    let run = |what: Vec<crate::testing::Mischief>| {
        let socket = dir.path().join(format!("s{}", counter.fetch_add(1, Ordering::SeqCst)));
        let _back_end = BackEnd::listen(&socket, mood::SERVE);
        let mut rig = rig(&socket);
        crate::testing::run_wild(&mut rig, LOUD, &what);
        Ok(())
    };
    runner.run(&crate::testing::mischief(), run).expect("survives");
}

#[test]
fn a_back_end_that_can_is_asked_to_announce_a_card() {
    const GET_FEATURES: u32 = 1;
    const GET_PROTOCOL_FEATURES: u32 = 15;
    const SEND_RARP: u32 = 19;
    const ANSWER: u32 = 1 | 1 << 2;
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let listener = UnixListener::bind(&socket).expect("binds");
    let (tell, told) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a front end");
        let mut header = [0; 12];
        while stream.read_exact(&mut header).is_ok() {
            let [request, flags, size] =
                [0, 4, 8].map(|at| u32::from_le_bytes(header[at..at + 4].try_into().expect("four bytes")));
            let mut body = vec![0; size as usize];
            stream.read_exact(&mut body).expect("the rest of the message");
            let value = match request {
                GET_FEATURES => feature::VERSION_1 | 1 << 30,
                GET_PROTOCOL_FEATURES => VhostUserProtocolFeatures::RARP.bits(),
                SEND_RARP => {
                    tell.send((flags, body)).expect("somebody waits");
                    continue;
                }
                _ => continue,
            };
            let mut answer: Vec<u8> =
                [request, ANSWER, 8].iter().flat_map(|word| word.to_le_bytes()).collect();
            answer.extend(value.to_le_bytes());
            stream.write_all(&answer).expect("the front end reads");
        }
    });
    let config = NetConfig {
        vhost_user: true,
        vhost_socket: Some(socket.display().to_string()),
        mac: Some(holdfast_net::MacAddr([2, 0, 0, 1, 2, 3])),
        ..NetConfig::default()
    };
    let device = super::net::build("n", &config, &shared_context()).expect("built");
    device.announce();
    let said = told.recv_timeout(std::time::Duration::from_secs(60)).expect("it is asked");
    // Version 1 and nothing that wants an answer; the address in the first six of eight bytes.
    assert_eq!(said, (1, vec![2, 0, 0, 1, 2, 3, 0, 0]));
}
