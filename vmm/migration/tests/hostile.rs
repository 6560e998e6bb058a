//! A stream that is cut or altered at every section, in both directions: an error, and never two VMs that run. And the end of
//! post-copy, of which the two connections bring word in any order.

mod common;

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::JoinHandle;

use holdfast_memory::PAGE_SIZE;
use holdfast_migration::frame::{self, HEADER, Header, Kind, PREAMBLE};
use holdfast_migration::{
    Address, Arriving, Control, Listener, MigrationError, Outcome, Parameters, SendTo, receive, send,
};
use holdfast_threads::{PlainSpawner, Spawner};
use vm_memory::{Bytes, GuestAddress};

use common::{BASE, CODE, Here, RAM, There};

/// What happens to one section.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Harm {
    None,
    Cut,
    /// A byte of this section is another.
    Alter(usize),
}

/// Passes on what `from` says to `to`, with `harm` to section `victim`. Returns the kinds of all sections.
fn pass_on(mut from: UnixStream, mut to: UnixStream, victim: usize, harm: Harm) -> Vec<Kind> {
    let mut kinds = Vec::new();
    let mut preamble = [0; PREAMBLE];
    if from.read_exact(&mut preamble).and_then(|()| to.write_all(&preamble)).is_ok() {
        let mut bytes = [0; HEADER];
        while from.read_exact(&mut bytes).is_ok() {
            let header = Header::decode(&bytes).expect("both ends write good headers");
            let mut section = bytes.to_vec();
            section.resize(HEADER + header.len, 0);
            if from.read_exact(&mut section[HEADER..]).is_err() {
                break;
            }
            kinds.push(header.kind);
            if kinds.len() == victim + 1 {
                match harm {
                    Harm::None => {}
                    Harm::Cut => break,
                    Harm::Alter(at) => {
                        let at = at % section.len();
                        section[at] ^= 0x11;
                    }
                }
            }
            if to.write_all(&section).is_err() {
                break;
            }
        }
    }
    // What is on the way the other way still arrives, as with a cable it would.
    let _ = to.shutdown(Shutdown::Write);
    let _ = from.shutdown(Shutdown::Read);
    kinds
}

struct End {
    source_runs: bool,
    target_runs: bool,
    sent: Result<Outcome, MigrationError>,
    received: Result<Option<Arriving>, MigrationError>,
    state: Vec<u8>,
    code: (Vec<u8>, bool),
    same: bool,
    kinds: [Vec<Kind>; 2],
}

fn path(dir: &Path) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    dir.join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string())
}

fn send_to(socket: PathBuf, postcopy: bool) -> SendTo {
    SendTo {
        address: Address::Unix(socket),
        tls: None,
        connections: 1,
        local: false,
        mirror: false,
        direct: false,
        postcopy,
        session: [3; 16],
    }
}

/// One migration with `harm` to section `victim` of direction `way` (0: from the source).
fn migrate(dir: &Path, way: usize, victim: usize, harm: Harm) -> End {
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    let (front, back) = (path(dir), path(dir));
    let gate = UnixListener::bind(&front).expect("a socket");
    let listener = Listener::bind(&Address::Unix(back.clone()), None).expect("a socket");
    let thread_spawner = Arc::clone(&spawner);
    let target: JoinHandle<_> = std::thread::spawn(move || {
        let mut there = There::new(Vec::new());
        let control = Arc::new(Control::new(Parameters::default()));
        let received = receive(&listener, &mut there, &control, &thread_spawner);
        (there, received)
    });
    let proxy = std::thread::spawn(move || {
        let (near, _) = gate.accept().expect("the source connects");
        let far = UnixStream::connect(&back).expect("the target listens");
        let harms = if way == 0 { [harm, Harm::None] } else { [Harm::None, harm] };
        let (near2, far2) = (near.try_clone().expect("a socket"), far.try_clone().expect("a socket"));
        let forth = std::thread::spawn(move || pass_on(near, far, victim, harms[0]));
        let back = pass_on(far2, near2, victim, harms[1]);
        [forth.join().expect("no panic"), back]
    });
    let here = Here::new(Vec::new());
    let to = send_to(front, false);
    let control = Arc::new(Control::new(Parameters::default()));
    let sent = send(&here, &to, &control, &spawner);
    drop(control);
    let (there, received) = target.join().expect("no panic");
    let kinds = proxy.join().expect("no panic");
    let same = (0..RAM / 8).all(|i| {
        let at = GuestAddress(BASE + i * 8);
        here.memory.read_obj::<u64>(at).ok() == there.memory.read_obj(at).ok()
    });
    let source_runs = here.runs.load(Ordering::SeqCst);
    End {
        source_runs,
        target_runs: there.runs,
        sent,
        received,
        state: there.state,
        code: there.code,
        same,
        kinds,
    }
}

#[test]
fn without_harm_the_guest_is_there_and_whole() {
    let dir = tempfile::tempdir().expect("directory");
    let end = migrate(dir.path(), 0, 0, Harm::None);
    assert_eq!(end.sent.expect("sent"), Outcome { running: true });
    assert!(end.received.expect("received").is_none());
    assert!(end.target_runs && !end.source_runs && end.same);
    assert_eq!(end.state, b"state");
    assert_eq!(end.code, (CODE.to_vec(), false));
    assert_eq!(end.kinds[0].iter().filter(|kind| **kind == Kind::Code).count(), 1);
    assert_eq!(end.kinds[0].first(), Some(&Kind::Hello));
    assert_eq!(end.kinds[0][end.kinds[0].len() - 3..], [Kind::End, Kind::State, Kind::Go]);
    let synced = |kinds: &[Kind], what| kinds.iter().filter(|kind| **kind == what).count();
    assert!(synced(&end.kinds[0], Kind::Sync) > 0);
    assert_eq!(synced(&end.kinds[0], Kind::Sync), synced(&end.kinds[1], Kind::Synced));
    let others: Vec<_> = end.kinds[1].iter().copied().filter(|kind| *kind != Kind::Synced).collect();
    assert_eq!(others, [Kind::Accept, Kind::Ready, Kind::Done]);
}

#[test]
fn whatever_section_is_hurt_at_most_one_runs() {
    let dir = tempfile::tempdir().expect("directory");
    let whole = migrate(dir.path(), 0, 0, Harm::None).kinds;
    for (way, kinds) in whole.iter().enumerate() {
        // All kinds, and of RAM, of which there is much alike, some.
        let tried = (0..kinds.len()).filter(|i| {
            !matches!(kinds[*i], Kind::Ram | Kind::Sparse | Kind::Zero)
                || *i < 4
                || i % 37 == 0
                || *i + 5 > kinds.len()
        });
        for victim in tried {
            for harm in [Harm::Cut, Harm::Alter(0), Harm::Alter(9), Harm::Alter(17), Harm::Alter(usize::MAX)]
            {
                let end = migrate(dir.path(), way, victim, harm);
                // How many passes there are depends on how fast they are: what was hurt may be another section than in the whole one.
                let Some(&hurt) = end.kinds[way].get(victim) else { continue };
                let case = format!("{hurt:?} {victim} of way {way}, {harm:?}");
                assert!(!end.code.1, "{case}: code is still being prepared");
                end.sent.expect_err(&case);
                if hurt == Kind::Done {
                    // The target has it; the source cannot know and waits.
                    assert!(end.target_runs && !end.source_runs, "{case}");
                } else if hurt == Kind::Go && harm == Harm::Cut {
                    // As little can it here, where nobody runs.
                    assert!(!end.target_runs, "{case}");
                } else {
                    assert!(end.received.is_err() && !end.target_runs && end.source_runs, "{case}");
                }
            }
        }
    }
}

/// Waits for the frame `kind`; those before it are let go.
fn until(from: &mut UnixStream, kind: Kind) {
    while frame::read(from, &mut Vec::new()).expect("the source goes on").kind != kind {}
}

/// Accepts a connection, whose preamble is answered by the same one.
fn accepted(listener: &UnixListener) -> UnixStream {
    let (mut stream, _) = listener.accept().expect("the source connects");
    let mut preamble = [0; PREAMBLE];
    stream.read_exact(&mut preamble).and_then(|()| stream.write_all(&preamble)).expect("a preamble");
    stream
}

/// A target that has all pages ends the connection for urgent ones, which its source hears before the word itself that all are there.
#[test]
fn the_word_that_all_pages_are_there_may_come_behind_the_end_of_the_other_connection() {
    let dir = tempfile::tempdir().expect("directory");
    let socket = path(dir.path());
    let gate = UnixListener::bind(&socket).expect("a socket");
    let (done, sent) = std::sync::mpsc::channel();
    std::thread::spawn(move || {
        let control = Arc::new(Control::new(Parameters::default()));
        control.start_postcopy_at_once();
        let sent = send(&Here::new(Vec::new()), &send_to(socket, true), &control, &PlainSpawner::shared());
        // Who waits may have given up.
        let _ = done.send(sent);
    });
    let mut main = accepted(&gate);
    until(&mut main, Kind::Hello);
    frame::write(&mut main, Kind::Accept, PAGE_SIZE, &[]).expect("it reads");
    let mut urgent = accepted(&gate);
    until(&mut main, Kind::State);
    frame::write(&mut main, Kind::Ready, 0, &[]).expect("it reads");
    until(&mut main, Kind::Go);
    frame::write(&mut main, Kind::Done, 0, &[]).expect("it reads");
    until(&mut main, Kind::End);
    urgent.shutdown(Shutdown::Write).expect("a socket");
    // The source has noticed, and has ended it too.
    urgent.read_to_end(&mut Vec::new()).expect("its end");
    frame::write(&mut main, Kind::Complete, 0, &[]).expect("it still reads");
    let sent = sent.recv_timeout(std::time::Duration::from_secs(60)).expect("it has ended");
    assert_eq!(sent.expect("it knows that all went well"), Outcome { running: true });
}
