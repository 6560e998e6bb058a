//! Ends of migrations that tests make: a guest that stands still, with disks if they are wanted.

use std::collections::VecDeque;
use std::os::fd::{OwnedFd, RawFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use holdfast_block::BlockNode;
use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_migration::{MirroredDisk, Phase, Plan, RunningCode, Source, Target};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

pub type Failure = Box<dyn std::error::Error + Send + Sync>;

pub const BASE: u64 = 0x8000_0000;
pub const RAM: u64 = 1 << 20;
/// What the target is told of the guest's code.
pub const CODE: &[u8] = b"places";

pub fn memory() -> GuestMemory {
    GuestMemory::from_ranges(&[(GuestAddress(BASE), RAM as usize)]).expect("RAM")
}

pub fn plan() -> Plan {
    Plan { page_size: PAGE_SIZE, ram: vec![(BASE, RAM)], running: true, ..Plan::default() }
}

/// A disk at the source.
pub struct Disk {
    pub id: &'static str,
    pub bytes: Mutex<Vec<u8>>,
    /// What the guest writes before each pass: where, what byte, and how many of them.
    pub writes: Mutex<VecDeque<(usize, u8, usize)>>,
}

/// A guest that stands still at the source.
pub struct Here {
    pub memory: GuestMemory,
    pub runs: AtomicBool,
    pub given: AtomicBool,
    pub disks: Vec<Disk>,
}

impl Here {
    /// A guest with some RAM in use.
    pub fn new(disks: Vec<Disk>) -> Self {
        let here = Self { memory: memory(), runs: true.into(), given: false.into(), disks };
        for page in (0..RAM / PAGE_SIZE).step_by(3) {
            here.memory.write_obj(page + 1, GuestAddress(BASE + page * PAGE_SIZE)).expect("RAM");
        }
        here
    }
}

impl Source for Here {
    fn memory(&self) -> GuestMemory {
        self.memory.clone()
    }
    fn plan(&self) -> Result<Plan, Failure> {
        Ok(plan())
    }
    fn mirror(&self) -> Result<Vec<MirroredDisk>, Failure> {
        let describe = |disk: &Disk| MirroredDisk {
            id: disk.id.to_owned(),
            size: disk.bytes.lock().len() as u64,
            format: "raw".to_owned(),
        };
        Ok(self.disks.iter().map(describe).collect())
    }
    fn log_disks(&self, _on: bool) -> Result<(), Failure> {
        Ok(())
    }
    fn take_written(&self, disk: usize) -> Result<Vec<(u64, u64)>, Failure> {
        let disk = &self.disks[disk];
        let Some((at, byte, len)) = disk.writes.lock().pop_front() else { return Ok(Vec::new()) };
        disk.bytes.lock()[at..at + len].fill(byte);
        Ok(vec![(at as u64, len as u64)])
    }
    fn read_disk(&self, disk: usize, offset: u64, to: &mut [u8]) -> Result<(), Failure> {
        let from = offset as usize;
        to.copy_from_slice(&self.disks[disk].bytes.lock()[from..from + to.len()]);
        Ok(())
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
    fn running_code(&self) -> RunningCode {
        // The last is no RAM.
        RunningCode { pages: vec![BASE + RAM - PAGE_SIZE, BASE, BASE + RAM], places: CODE.to_vec() }
    }
    fn moved(&self) {}
    fn entered(&self, _phase: Phase) {}
    fn passed(&self, _pass: u64) {}
}

/// The guest at the target.
pub struct There {
    pub memory: GuestMemory,
    pub state: Vec<u8>,
    pub runs: bool,
    /// The code that it was told of, and whether it is still at it.
    pub code: (Vec<u8>, bool),
    pub images: Vec<Arc<dyn BlockNode>>,
}

impl There {
    /// One with these images.
    pub fn new(images: Vec<Arc<dyn BlockNode>>) -> Self {
        Self { memory: memory(), state: Vec::new(), runs: false, code: (Vec::new(), false), images }
    }
}

impl Target for There {
    fn build(&mut self, theirs: &Plan, _files: Vec<OwnedFd>) -> Result<GuestMemory, Failure> {
        match theirs.differences(&plan()) {
            all if all.is_empty() => Ok(self.memory.clone()),
            all => Err(all.join("; ").into()),
        }
    }
    fn images(&self) -> Result<Vec<Arc<dyn BlockNode>>, Failure> {
        Ok(self.images.clone())
    }
    fn prepare_code(&mut self, places: &[u8]) {
        self.code = (places.to_vec(), true);
    }
    fn end_code(&mut self) {
        self.code.1 = false;
    }
    fn restore(&mut self, state: &[u8]) -> Result<(), Failure> {
        assert!(!self.code.1, "nothing prepares code any more");
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
