//! What a source says to a target of a migration.
//!
//! The first byte chooses: bit 0, the rest is the stream as it is (without the preamble); otherwise the rest is a list of sections, each a
//! kind, an address and a payload, to which headers with right checksums are made. Bit 1: a plan that fits comes first.

use std::io::Write;
use std::net::Shutdown;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_migration::frame::{self, Kind, Preamble, Role};
use holdfast_migration::{Address, Control, Listener, Parameters, Phase, Plan, Target, receive};
use holdfast_threads::{PlainSpawner, Spawner};
use vm_memory::GuestAddress;

const BASE: u64 = 0x8000_0000;
const RAM: u64 = 1 << 20;
/// Less than a socket holds, so that nobody has to read while we write.
const MOST: usize = 64 << 10;

const KINDS: [Kind; 17] = [
    Kind::Ram,
    Kind::Zero,
    Kind::Zstd,
    Kind::End,
    Kind::State,
    Kind::Go,
    Kind::Hello,
    Kind::Abort,
    Kind::Missing,
    Kind::Accept,
    Kind::Ready,
    Kind::Done,
    Kind::Request,
    Kind::Complete,
    Kind::Sync,
    Kind::Sparse,
    Kind::DiskSums,
];

struct Nobody(GuestMemory);

type Failure = Box<dyn std::error::Error + Send + Sync>;

impl Target for Nobody {
    fn build(&mut self, plan: &Plan, _files: Vec<OwnedFd>) -> Result<GuestMemory, Failure> {
        let here = Plan { page_size: PAGE_SIZE, ram: vec![(BASE, RAM)], ..Plan::default() };
        match plan.differences(&here).first() {
            Some(first) => Err(first.clone().into()),
            None => Ok(self.0.clone()),
        }
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), Failure> {
        serde_json::from_slice::<holdfast_vmm::snapshot::SavedVm>(state).map(drop).map_err(Into::into)
    }
    fn take_over(&mut self) -> Result<(), Failure> {
        Ok(())
    }
    fn run(&mut self) -> Result<(), Failure> {
        Ok(())
    }
    fn entered(&mut self, _phase: Phase) {}
    fn watcher(&self) -> Box<dyn FnMut(Phase) + Send> {
        Box::new(|_| {})
    }
}

/// Sections out of `data`.
fn sections(mut data: &[u8], out: &mut Vec<u8>) {
    while let Some(([kind, place, low, high], rest)) = data.split_first_chunk::<4>() {
        let kind = KINDS[usize::from(*kind) % KINDS.len()];
        // Mostly within RAM, sometimes beside it, sometimes at no page.
        let gpa = match *place {
            255 => u64::MAX - 4095,
            254 => BASE + 1,
            place => BASE + u64::from(place) * PAGE_SIZE,
        };
        let wanted = usize::from(u16::from_le_bytes([*low, *high]));
        let (payload, rest) = rest.split_at(wanted.min(rest.len()).min(kind.limit()));
        // Pages are long, inputs are short: RAM is filled up.
        let mut payload = payload.to_vec();
        if kind == Kind::Ram && wanted % 3 == 0 {
            payload.resize(payload.len().next_multiple_of(PAGE_SIZE as usize), 7);
        }
        if kind == Kind::Sparse
            && wanted % 3 == 0
            && let Some(mask) = payload.first_chunk::<8>()
        {
            let lines = u64::from_le_bytes(*mask).count_ones() as usize;
            payload.resize(8 + 64 * lines, 7);
        }
        frame::append(out, kind, gpa, &payload);
        data = rest;
    }
}

/// Runs the target.
pub fn run(data: &[u8]) {
    let Some((mode, rest)) = data.split_first() else { return };
    let mut stream = Preamble { role: Role::Main, session: [1; 16] }.encode().to_vec();
    if mode & 2 != 0 {
        let plan = Plan { page_size: PAGE_SIZE, ram: vec![(BASE, RAM)], connections: 1, ..Plan::default() };
        frame::append(&mut stream, Kind::Hello, 0, &serde_json::to_vec(&plan).expect("JSON"));
    }
    if mode & 1 != 0 {
        stream.extend_from_slice(rest);
    } else {
        sections(rest, &mut stream);
    }
    stream.truncate(MOST);
    let (mut near, far) = UnixStream::pair().expect("sockets");
    near.write_all(&stream).expect("there is room");
    near.shutdown(Shutdown::Write).expect("a socket");
    let listener = Listener::bind(&Address::Fd(far.as_raw_fd()), None).expect("a descriptor");
    let memory = GuestMemory::from_ranges(&[(GuestAddress(BASE), RAM as usize)]).expect("RAM");
    let control = Arc::new(Control::new(Parameters::default()));
    let spawner: Arc<dyn Spawner> = PlainSpawner::shared();
    // Good or bad, it is to come back.
    drop(receive(&listener, &mut Nobody(memory), &control, &spawner));
}
