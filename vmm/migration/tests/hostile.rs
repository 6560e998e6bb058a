//! A stream that is cut or altered at every section, in both directions: an error, and never two VMs that run.

use std::io::{Read, Write};
use std::net::Shutdown;
use std::os::fd::{OwnedFd, RawFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::thread::JoinHandle;

use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_migration::frame::{HEADER, Header, Kind, PREAMBLE};
use holdfast_migration::{
    Address, Arriving, Control, Listener, MigrationError, Outcome, Parameters, Phase, Plan, SendTo, Source,
    Target, receive, send,
};
use holdfast_threads::{PlainSpawner, Spawner};
use vm_memory::{Bytes, GuestAddress};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const BASE: u64 = 0x8000_0000;
const RAM: u64 = 1 << 20;

fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(BASE), RAM as usize)]).expect("RAM")
}

fn plan() -> Plan {
    Plan { page_size: PAGE_SIZE, ram: vec![(BASE, RAM)], running: true, ..Plan::default() }
}

/// A guest that stands still at the source.
struct Here {
    memory: GuestMemory,
    runs: AtomicBool,
    given: AtomicBool,
}

impl Source for Here {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
    fn plan(&self) -> Result<Plan, Failure> {
        Ok(plan())
    }
    fn ram_files(&self) -> Result<Vec<RawFd>, Failure> {
        Err("RAM has no files".into())
    }
    fn start_log(&self) -> Result<(), Failure> {
        Ok(())
    }
    fn sync_log(&self) -> Result<(), Failure> {
        // The guest has just written this.
        self.memory.write_obj(7_u64, GuestAddress(BASE + 0x3000))?;
        Ok(())
    }
    fn stop_log(&self) {}
    fn throttle(&self, _percent: u8) {}
    fn stop(&self) -> Result<(), Failure> {
        self.runs.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn save(&self) -> Result<Vec<u8>, Failure> {
        Ok(b"state".to_vec())
    }
    fn give_up(&self) -> Result<(), Failure> {
        self.given.store(true, Ordering::SeqCst);
        Ok(())
    }
    fn take_back(&self) -> Result<(), Failure> {
        self.given.store(false, Ordering::SeqCst);
        Ok(())
    }
    fn go_on(&self) {
        assert!(!self.given.load(Ordering::SeqCst), "what was given up was taken back first");
        self.runs.store(true, Ordering::SeqCst);
    }
    fn moved(&self) {}
    fn entered(&self, _phase: Phase) {}
    fn passed(&self, _pass: u64) {}
}

/// The guest at the target.
struct There {
    memory: GuestMemory,
    state: Vec<u8>,
    runs: bool,
}

impl Target for There {
    fn build(&mut self, theirs: &Plan, _files: Vec<OwnedFd>) -> Result<GuestMemory, Failure> {
        match theirs.differences(&plan()) {
            all if all.is_empty() => Ok(self.memory.clone()),
            all => Err(all.join("; ").into()),
        }
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), Failure> {
        self.state = state.to_vec();
        Ok(())
    }
    fn take_over(&mut self) -> Result<(), Failure> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), Failure> {
        self.runs = true;
        Ok(())
    }
    fn entered(&mut self, _phase: Phase) {}
    fn watcher(&self) -> Box<dyn FnMut(Phase) + Send> {
        Box::new(|_| {})
    }
}

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
    same: bool,
    kinds: [Vec<Kind>; 2],
}

fn path(dir: &Path) -> PathBuf {
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    dir.join(NUMBER.fetch_add(1, Ordering::Relaxed).to_string())
}

/// One migration with `harm` to section `victim` of direction `way` (0: from the source).
fn migrate(dir: &Path, way: usize, victim: usize, harm: Harm) -> End {
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    let (front, back) = (path(dir), path(dir));
    let gate = UnixListener::bind(&front).expect("a socket");
    let listener = Listener::bind(&Address::Unix(back.clone()), None).expect("a socket");
    let thread_spawner = Arc::clone(&spawner);
    let target: JoinHandle<_> = std::thread::spawn(move || {
        let mut there = There { memory: memory(), state: Vec::new(), runs: false };
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
    let here = Here { memory: memory(), runs: AtomicBool::new(true), given: AtomicBool::new(false) };
    for page in (0..RAM / PAGE_SIZE).step_by(3) {
        here.memory.write_obj(page + 1, GuestAddress(BASE + page * PAGE_SIZE)).expect("RAM");
    }
    let to = SendTo {
        address: Address::Unix(front),
        tls: None,
        connections: 1,
        local: false,
        mirror: false,
        direct: false,
        postcopy: false,
        session: [3; 16],
    };
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
    End { source_runs, target_runs: there.runs, sent, received, state: there.state, same, kinds }
}

#[test]
fn without_harm_the_guest_is_there_and_whole() {
    let dir = tempfile::tempdir().expect("directory");
    let end = migrate(dir.path(), 0, 0, Harm::None);
    assert_eq!(end.sent.expect("sent"), Outcome { running: true });
    assert!(end.received.expect("received").is_none());
    assert!(end.target_runs && !end.source_runs && end.same);
    assert_eq!(end.state, b"state");
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
