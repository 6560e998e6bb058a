//! Disks that go along over NBD: they arrive as they are, and whatever happens to their connection, never two guests run.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_block::BlockNode;
use holdfast_block::nbd::proto::{Request, command};
use holdfast_block::nbd::{self, Writer, WriterError};
use holdfast_block::raw::{LockRange, RawImage, RawOptions};
use holdfast_migration::frame::{self, Kind, PREAMBLE, Preamble, Role};
use holdfast_migration::{
    Address, Arriving, Control, Listener, MigrationError, MirroredDisk, Outcome, Parameters, Plan, SendTo,
    receive, send,
};
use holdfast_threads::{PlainSpawner, Spawner};

use common::{Disk, Here, There, plan};

const SESSION: [u8; 16] = [3; 16];

/// A disk with zeroes at its start, in its midst and at its end, which the guest writes in every pass.
fn disk(id: &'static str, seed: u8) -> Disk {
    let mut bytes = vec![0; (3 << 20) + 512];
    bytes[128 << 10..200 << 10].fill(seed);
    bytes[(1 << 20) - 5000..(2 << 20) + 5000].fill(seed ^ 0x55);
    // The last is written when the guest stands.
    let writes = [(130 << 10, 0, 64 << 10), ((3 << 20) - 100, 9, 612), (77, 8, 4096)];
    Disk { id, bytes: bytes.into(), writes: parking_lot::Mutex::new(writes.into()) }
}

/// An image of `size` bytes that are not zero.
fn image(dir: &Path, name: &str, size: usize, readonly: bool) -> Arc<dyn BlockNode> {
    let path = dir.join(name);
    std::fs::write(&path, vec![0xa5; size]).expect("an image");
    let lock = LockRange::None;
    RawImage::open(RawOptions { readonly, lock, ..RawOptions::new(path) }, PlainSpawner::shared())
        .expect("an image")
}

fn images(dir: &Path, disks: &[Disk]) -> Vec<Arc<dyn BlockNode>> {
    disks.iter().map(|disk| image(dir, disk.id, disk.bytes.lock().len(), false)).collect()
}

type Received = Result<Option<Arriving>, MigrationError>;

struct End {
    here: Here,
    there: There,
    sent: Result<Outcome, MigrationError>,
    received: Received,
    transferred: u64,
}

impl End {
    /// The guest is there, with the disks that it had.
    fn arrived(&self, case: &str) {
        self.sent.as_ref().expect(case);
        self.received.as_ref().expect(case);
        assert!(self.there.runs && !self.here.runs.load(Ordering::SeqCst), "{case}");
        assert_eq!(self.there.state, b"state", "{case}");
        for (disk, image) in self.here.disks.iter().zip(&self.there.images) {
            let bytes = disk.bytes.lock();
            let mut there = vec![1; bytes.len()];
            image.read_at(0, &mut there).expect("read");
            assert!(*bytes == there, "{case}: {}", disk.id);
        }
    }

    /// The guest goes on here; both ends say why.
    fn stayed(&self, case: &str) -> [String; 2] {
        assert!(!self.there.runs && self.here.runs.load(Ordering::SeqCst), "{case}");
        assert!(!self.here.given.load(Ordering::SeqCst), "{case}");
        let sent = self.sent.as_ref().expect_err(case);
        [sent.describe(), self.received.as_ref().expect_err(case).describe()]
    }
}

fn target(listener: Listener, mut there: There) -> JoinHandle<(There, Received)> {
    std::thread::spawn(move || {
        let control = Arc::new(Control::new(Parameters::default()));
        let received = receive(&listener, &mut there, &control, &PlainSpawner::shared());
        (there, received)
    })
}

fn to(address: Address) -> SendTo {
    SendTo {
        address,
        tls: None,
        connections: 1,
        local: false,
        mirror: true,
        direct: false,
        postcopy: false,
        session: SESSION,
    }
}

fn migrate_with(here: Here, there: There, listener: Listener, to: &SendTo, control: &Arc<Control>) -> End {
    let target = target(listener, there);
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    let sent = send(&here, to, control, &spawner);
    let (there, received) = target.join().expect("no panic");
    End { here, there, sent, received, transferred: control.statistics().transferred }
}

fn migrate(here: Here, there: There, listen: &Path, connect: &Path) -> End {
    let listener = Listener::bind(&Address::Unix(listen.to_owned()), None).expect("a socket");
    let control = Arc::new(Control::new(Parameters::default()));
    migrate_with(here, there, listener, &to(Address::Unix(connect.to_owned())), &control)
}

/// What happens to a byte of the connection of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    /// It and what follows do not come.
    Cut(usize),
    /// It is another.
    Alter(usize),
}

/// Passes on what `from` says to `to`; returns it as it was.
fn pass_on(mut from: UnixStream, mut to: UnixStream, harm: Option<Harm>) -> Vec<u8> {
    let (mut all, mut buffer) = (Vec::new(), vec![0; 64 << 10]);
    while let Ok(n @ 1..) = from.read(&mut buffer) {
        let (start, mut part) = (all.len(), buffer[..n].to_vec());
        all.extend_from_slice(&part);
        let cut = matches!(harm, Some(Harm::Cut(at)) if at < all.len());
        match harm {
            Some(Harm::Cut(at)) if cut => part.truncate(at - start),
            Some(Harm::Alter(at)) if (start..all.len()).contains(&at) => part[at - start] ^= 0x11,
            _ => {}
        }
        if to.write_all(&part).is_err() || cut {
            break;
        }
    }
    // What is on the way the other way still arrives.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
    all
}

/// What came over each connection, forth and back.
type Heard = Vec<[Vec<u8>; 2]>;

/// A migration through somebody who harms the second connection, forth (0) or back (1).
fn through(dir: &Path, harm: Option<(usize, Harm)>) -> (End, Heard) {
    let (front, back) = (dir.join("front"), dir.join("back"));
    let gate = UnixListener::bind(&front).expect("a socket");
    let over = Arc::new(AtomicBool::new(false));
    let (far, ends) = (back.clone(), Arc::clone(&over));
    let proxy = std::thread::spawn(move || {
        let mut pairs: Vec<[JoinHandle<Vec<u8>>; 2]> = Vec::new();
        loop {
            let (near, _) = gate.accept().expect("a connection");
            if ends.load(Ordering::SeqCst) {
                break pairs.into_iter().map(|pair| pair.map(|p| p.join().expect("no panic"))).collect();
            }
            let Ok(far) = UnixStream::connect(&far) else { continue };
            let harm = |way| harm.filter(|_| pairs.len() == 1).filter(|(w, _)| *w == way).map(|(_, h)| h);
            let (forth, back) = (harm(0), harm(1));
            let (near2, far2) = (near.try_clone().expect("a socket"), far.try_clone().expect("a socket"));
            pairs.push([
                std::thread::spawn(move || pass_on(near, far, forth)),
                std::thread::spawn(move || pass_on(far2, near2, back)),
            ]);
        }
    });
    let here = Here::new(vec![disk("vda", 1)]);
    let there = There::new(images(dir, &here.disks));
    let end = migrate(here, there, &back, &front);
    over.store(true, Ordering::SeqCst);
    drop(UnixStream::connect(&front));
    let heard = proxy.join().expect("no panic");
    std::fs::remove_file(&front).expect("a socket");
    (end, heard)
}

#[test]
fn disks_arrive_over_nbd_connections_of_their_own() {
    let dir = tempfile::tempdir().expect("directory");
    let here = Here::new(vec![disk("vda", 1), disk("a disk / with ä name", 2)]);
    let there = There::new(images_by_number(dir.path(), &here.disks));
    let path = dir.path().join("s");
    let end = migrate(here, there, &path, &path);
    end.arrived("two disks");
    assert!(end.transferred > 2 * (1 << 20), "{}", end.transferred);
    // Zeroes take no room there, although there was something.
    use std::os::unix::fs::MetadataExt;
    let file = std::fs::metadata(dir.path().join("0")).expect("an image");
    assert!(file.blocks() * 512 < 2 << 20, "{} blocks", file.blocks());
}

/// As [`images`], where the ids are no names of files.
fn images_by_number(dir: &Path, disks: &[Disk]) -> Vec<Arc<dyn BlockNode>> {
    let sizes = disks.iter().map(|disk| disk.bytes.lock().len());
    sizes.enumerate().map(|(n, size)| image(dir, &n.to_string(), size, false)).collect()
}

#[test]
fn over_a_single_connection_disks_go_as_sections() {
    let dir = tempfile::tempdir().expect("directory");
    let here = Here::new(vec![disk("vda", 1), disk("vdb", 2)]);
    let there = There::new(images(dir.path(), &here.disks));
    let (near, far) = UnixStream::pair().expect("sockets");
    let listener = Listener::bind(&Address::Fd(far.as_raw_fd()), None).expect("a socket");
    let control = Arc::new(Control::new(Parameters::default()));
    migrate_with(here, there, listener, &to(Address::Fd(near.as_raw_fd())), &control).arrived("sections");
}

#[test]
fn a_destination_that_knows_no_nbd_gets_sections() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("s");
    let gate = UnixListener::bind(&path).expect("a socket");
    let old = std::thread::spawn(move || {
        let (mut stream, _) = gate.accept().expect("a source");
        let mut preamble = [0; PREAMBLE];
        stream.read_exact(&mut preamble).expect("a preamble");
        stream.write_all(&preamble).expect("sent");
        let (mut payload, mut image) = (Vec::new(), vec![7; (3 << 20) + 512]);
        loop {
            let frame::Header { kind, arg, .. } = frame::read(&mut stream, &mut payload).expect("a section");
            let answer = match kind {
                Kind::Hello => Some((Kind::Accept, &b"sync sparse"[..])),
                Kind::Sync => Some((Kind::Synced, &b""[..])),
                Kind::State => Some((Kind::Ready, &b""[..])),
                Kind::Go => Some((Kind::Done, &b""[..])),
                _ => None,
            };
            if let Some((answer, what)) = answer {
                frame::write(&mut stream, answer, 4096, what).expect("sent");
            }
            let at = arg as usize;
            match kind {
                Kind::Go => return image,
                Kind::Disk => image[at..at + payload.len() - 4].copy_from_slice(&payload[4..]),
                Kind::DiskZero => {
                    let len = u64::from_le_bytes(payload[4..].try_into().expect("a length"));
                    image[at..at + len as usize].fill(0);
                }
                kind => assert_ne!(kind, Kind::DiskSums),
            }
        }
    });
    let here = Here::new(vec![disk("vda", 1)]);
    let control = Arc::new(Control::new(Parameters::default()));
    send(&here, &to(Address::Unix(path)), &control, &PlainSpawner::shared()).expect("sent");
    assert!(old.join().expect("no panic") == *here.disks[0].bytes.lock());
}

/// Where bytes lie that say how much follows: with another number both ends would wait for what does not come, until their
/// patience ends.
fn lengths(heard: &[Vec<u8>; 2]) -> [Vec<usize>; 2] {
    let number = |bytes: &[u8]| bytes.iter().fold(0, |all, byte| all << 8 | usize::from(*byte));
    let [forth, back] = heard;
    // Forth: flags, one option, requests. Back: a greeting, replies to the option, replies of 16 bytes.
    let option = PREAMBLE + 4;
    let mut ours: Vec<usize> = (option + 12..option + 16).collect();
    let mut at = option + 16 + number(&forth[option + 12..option + 16]);
    while at < forth.len() {
        assert_eq!(forth[at..at + 4], nbd::proto::REQUEST_MAGIC.to_be_bytes());
        let write = forth[at + 6..at + 8] == command::WRITE.to_be_bytes();
        if write {
            ours.extend(at + 24..at + 28);
        }
        at += 28 + if write { number(&forth[at + 24..at + 28]) } else { 0 };
    }
    let (mut theirs, mut at) = (Vec::new(), PREAMBLE + 18);
    loop {
        theirs.extend(at + 16..at + 20);
        let last = back[at + 12..at + 16] == nbd::proto::reply::ACK.to_be_bytes();
        at += 20 + number(&back[at + 16..at + 20]);
        if last {
            // It is what ends the replies.
            theirs.extend(at - 8..at - 4);
            break;
        }
    }
    assert_eq!((back.len() - at) % 16, 0, "replies");
    [ours, theirs]
}

#[test]
fn whatever_happens_to_a_disk_on_its_way_at_most_one_runs() {
    let dir = tempfile::tempdir().expect("directory");
    let (end, heard) = through(dir.path(), None);
    end.arrived("without harm");
    assert_eq!(heard.len(), 2, "a connection for the disk");
    let whole = &heard[1];
    assert_eq!(whole[0][12..14], [4, 0], "its role");
    assert_eq!(whole[1][PREAMBLE..PREAMBLE + 16], *b"NBDMAGICIHAVEOPT");
    let lengths = lengths(whole);
    let mut cases = Vec::new();
    for (way, bytes) in whole.iter().enumerate() {
        // Of contents, of which there is much, some.
        let start = 300.min(bytes.len());
        let sampled = (0..start).chain((start..bytes.len()).step_by(bytes.len() / 40 + 1));
        for at in sampled.chain([bytes.len() - 29, bytes.len() - 17, bytes.len() - 1]) {
            if at % 5 == 0 {
                cases.push((way, Harm::Cut(at)));
            }
            if !lengths[way].contains(&at) && (at % 3 == 0 || at > start) {
                cases.push((way, Harm::Alter(at)));
            }
        }
    }
    // Some bytes mean nothing: those of a hint, say.
    let arrived = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        // They mostly wait.
        for cases in cases.chunks(cases.len() / 8 + 1) {
            let arrived = &arrived;
            scope.spawn(move || {
                let dir = tempfile::tempdir().expect("directory");
                for (way, harm) in cases {
                    let case = format!("{harm:?} of way {way}");
                    let (end, _) = through(dir.path(), Some((*way, *harm)));
                    if end.sent.is_ok() {
                        arrived.fetch_add(1, Ordering::Relaxed);
                        end.arrived(&case);
                    } else {
                        end.stayed(&case);
                    }
                }
            });
        }
    });
    assert!(arrived.load(Ordering::Relaxed) < cases.len() / 2, "{arrived:?} of {}", cases.len());
}

#[test]
fn what_does_not_fit_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("s");
    let size = (3 << 20) + 512;
    let here = Here::new(vec![disk("vda", 1)]);
    let there = There::new(vec![image(dir.path(), "small", size - 512, false)]);
    let said = migrate(here, there, &path, &path).stayed("a size");
    let text = "disk `vda` has 3146240 bytes at the source, 3145728 here";
    assert!(said.iter().all(|s| s.contains(text)), "{said:?}");
    let twice = Here::new(vec![disk("vda", 1), disk("vda", 2)]);
    let there = There::new(images(dir.path(), &twice.disks));
    let said = migrate(twice, there, &path, &path).stayed("an id twice");
    assert!(said[0].contains("disk `vda` comes twice"), "{said:?}");
    let here = Here::new(vec![disk("vda", 1)]);
    let there = There::new(vec![image(dir.path(), "held", size, true)]);
    let said = migrate(here, there, &path, &path).stayed("an image that is only read");
    assert!(said[0].contains("disk `vda` cannot be written there"), "{said:?}");
    let here = Here::new(vec![disk("vda", 1)]);
    let said = migrate(here, There::new(Vec::new()), &path, &path).stayed("no image");
    assert!(said[0].contains("1 disks come along, 0 images are here"), "{said:?}");
}

#[test]
fn it_can_be_cancelled_while_disks_go_over() {
    let dir = tempfile::tempdir().expect("directory");
    let here = Here::new(vec![disk("vda", 1)]);
    let there = There::new(images(dir.path(), &here.disks));
    let path = dir.path().join("s");
    let address = Address::Unix(path);
    let listener = Listener::bind(&address, None).expect("a socket");
    // At that speed it would take an hour.
    let slow = Parameters { bandwidth: 1024, ..Parameters::default() };
    let control = Arc::new(Control::new(slow));
    let other = Arc::clone(&control);
    let cancel = std::thread::spawn(move || {
        while other.statistics().transferred == 0 {
            std::thread::yield_now();
        }
        assert!(other.cancel());
    });
    let end = migrate_with(here, there, listener, &to(address), &control);
    cancel.join().expect("no panic");
    end.stayed("cancelled");
    assert!(matches!(end.sent, Err(MigrationError::Cancelled)), "{:?}", end.sent);
}

/// A connection to `path` as a source makes it.
fn dial(path: &Path, role: Role, session: [u8; 16]) -> UnixStream {
    let mut stream = UnixStream::connect(path).expect("the target listens");
    stream.write_all(&Preamble { role, session }.encode()).expect("sent");
    // Who is sent away may hear nothing.
    let _ = stream.read_exact(&mut [0; PREAMBLE]);
    stream
}

fn writer(stream: UnixStream, id: &str) -> Result<Writer, WriterError> {
    Writer::over(nbd::Stream::Plain(nbd::Socket::Unix(stream)), id)
}

/// What a target says to a source that does `what` when its plan was accepted.
fn says(what: impl FnOnce(&mut UnixStream, &Path)) -> String {
    let dir = tempfile::tempdir().expect("directory");
    let path = dir.path().join("s");
    let listener = Listener::bind(&Address::Unix(path.clone()), None).expect("a socket");
    let target = target(listener, There::new(vec![image(dir.path(), "vda", 1 << 20, false)]));
    let mut main = dial(&path, Role::Main, SESSION);
    let mirror = vec![MirroredDisk { id: "vda".into(), size: 1 << 20, format: "raw".into() }];
    let plan = Plan { mirror, nbd: true, connections: 1, ..plan() };
    let text = serde_json::to_vec(&plan).expect("JSON");
    frame::write(&mut main, Kind::Hello, 0, &text).expect("sent");
    let mut payload = Vec::new();
    assert_eq!(frame::read(&mut main, &mut payload).expect("an answer").kind, Kind::Accept);
    assert!(payload.split(|byte| *byte == b' ').any(|word| word == frame::NBD));
    // If nothing is said, the test fails instead of waiting.
    main.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
    what(&mut main, &path);
    drop(main);
    let (there, received) = target.join().expect("no panic");
    assert!(!there.runs);
    received.expect_err("refused").describe()
}

#[test]
fn a_source_that_does_not_keep_to_it_is_told() {
    let end = |main: &mut UnixStream| frame::write(main, Kind::End, 0, &[]).expect("sent");
    let said = says(|main, path| {
        let mut there = writer(dial(path, Role::Disk, SESSION), "vda").expect("served");
        there.write(0, &[1; 512]).expect("sent");
        there.flush().expect("written");
        end(main);
    });
    assert!(said.contains("the checksums of the disks are missing"), "{said}");
    let said = says(|main, path| {
        let mut there = writer(dial(path, Role::Disk, SESSION), "vda").expect("served");
        there.write(0, &[1; 512]).expect("sent");
        there.flush().expect("written");
        frame::write(main, Kind::DiskSums, 0, &[7; 8]).expect("sent");
        end(main);
    });
    assert!(said.contains("the checksum of what came for disk `vda` is wrong"), "{said}");
    let said = says(|main, path| {
        // Its connection stays, and says nothing: it is not waited for.
        let silent = dial(path, Role::Disk, SESSION);
        frame::write(main, Kind::DiskSums, 0, &[7; 16]).expect("sent");
        end(main);
        let _ = main.read_exact(&mut [0]);
        drop(silent);
    });
    assert!(said.contains("2 checksums for 1 disks"), "{said}");
    let said = says(|main, path| {
        let silent = dial(path, Role::Disk, SESSION);
        frame::write(main, Kind::Disk, 0, &[0; 516]).expect("sent");
        let _ = main.read_exact(&mut [0]);
        drop(silent);
    });
    assert!(said.contains("a Disk section that was not agreed on"), "{said}");
    let said = says(|_, path| drop(dial(path, Role::Disk, [4; 16])));
    assert!(said.contains("a connection of another migration"), "{said}");
    let said = says(|_, path| drop(dial(path, Role::Ram, SESSION)));
    assert!(said.contains("a connection of another migration"), "{said}");
    let said = says(|main, path| {
        let refused = writer(dial(path, Role::Disk, SESSION), "vdb").expect_err("no such image");
        assert!(matches!(refused, WriterError::Refused(_)), "{refused}");
        let _ = main.shutdown(Shutdown::Both);
    });
    assert!(said.contains("the connection broke"), "{said}");
    let said = says(|main, path| {
        let mut disk = dial(path, Role::Disk, SESSION);
        disk.write_all(&[0xff; 64]).expect("sent");
        let _ = main.read_exact(&mut [0]);
        drop(disk);
    });
    assert!(said.contains("NBD protocol"), "{said}");
}

#[test]
fn images_are_written_but_not_read() {
    says(|main, path| {
        let mut socket = dial(path, Role::Disk, SESSION);
        socket.read_exact(&mut [0; 18]).expect("a greeting");
        let option =
            [&nbd::proto::OPTION_MAGIC.to_be_bytes()[..], &[0, 0, 0, 1, 0, 0, 0, 3], b"vda"].concat();
        socket.write_all(&[&3_u32.to_be_bytes()[..], &option].concat()).expect("sent");
        socket.read_exact(&mut [0; 10]).expect("an export");
        for kind in [command::READ, command::TRIM] {
            let request = Request { flags: 0, command: kind, cookie: 5, offset: 0, len: 512 };
            socket.write_all(&request.to_bytes()).expect("sent");
            let mut answer = [0; 16];
            socket.read_exact(&mut answer).expect("an answer");
            assert_eq!(answer[4..8], 1_u32.to_be_bytes(), "EPERM");
        }
        let _ = main.shutdown(Shutdown::Both);
    });
}
