//! Threads that put into RAM what came over the only connection: most of that work is the host's, which clears each page of RAM that is
//! written for the first time, and the connection is to be read meanwhile.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;

use holdfast_memory::GuestMemory;
use holdfast_threads::{Role, Spawner};

use crate::MigrationError;
use crate::control::Control;
use crate::frame::{HEADER, Header};
use crate::lanes::BLOCK;
use crate::target::Filler;

/// How many there are.
const THREADS: u64 = 2;
/// Frames are given to them together when they are so long, in bytes: to wake a thread takes longer than to put a short frame into RAM.
const BATCH: usize = 256 << 10;
/// How often that may be before one of them has taken the first.
const QUEUE: usize = 4;

/// Payloads shorter than this, in bytes, are copied: a buffer that was made for long ones is kept for those.
const SHORT: usize = 4096;

type Frames = Vec<(Header, Vec<u8>)>;

enum Job {
    Put(Frames),
    /// Says when everything before it is in RAM.
    Settle(SyncSender<Result<(), MigrationError>>),
}

/// The threads. Frames of one block of RAM always take the same one, so none overtakes an older one.
pub(crate) struct Fillers {
    jobs: Vec<Way>,
    threads: Vec<JoinHandle<()>>,
    /// Buffers that can be used again.
    back: Receiver<Vec<u8>>,
    failed: Arc<AtomicBool>,
}

/// The way to one of them.
struct Way {
    jobs: SyncSender<Job>,
    /// What it will be given, and how long that is, in bytes.
    kept: (Frames, usize),
}

impl Way {
    fn give(&mut self) -> Result<(), MigrationError> {
        let (frames, _) = std::mem::take(&mut self.kept);
        if frames.is_empty() { Ok(()) } else { self.jobs.send(Job::Put(frames)).map_err(|_| gone()) }
    }
}

impl Drop for Fillers {
    fn drop(&mut self) {
        // Without senders the threads end.
        self.jobs.clear();
        for thread in self.threads.drain(..) {
            // A panic was reported by the thread itself.
            let _ = thread.join();
        }
    }
}

fn serve(
    jobs: &Receiver<Job>,
    back: &Sender<Vec<u8>>,
    failed: &AtomicBool,
    (memory, control): (&GuestMemory, &Control),
) {
    let filler = Filler { memory, control, helpers: None };
    let mut result = Ok(());
    for job in jobs {
        match job {
            Job::Put(frames) => {
                for (header, payload) in frames {
                    // After a failure what is left is only taken off the queue.
                    if result.is_ok() {
                        result = filler.put(&header, &payload);
                        failed.fetch_or(result.is_err(), Ordering::AcqRel);
                    }
                    if payload.capacity() >= SHORT {
                        // Who reads may be gone.
                        let _ = back.send(payload);
                    }
                }
            }
            Job::Settle(answer) => {
                // As above.
                let _ = answer.send(std::mem::replace(&mut result, Ok(())));
            }
        }
    }
}

fn gone() -> MigrationError {
    MigrationError::Protocol("a thread that fills RAM ended".into())
}

impl Fillers {
    /// Starts them, if `memory` is such that each frame lies within one block.
    pub(crate) fn start(
        memory: &GuestMemory,
        control: &Arc<Control>,
        spawner: &dyn Spawner,
    ) -> Result<Option<Self>, MigrationError> {
        if crate::pages::ranges(memory).iter().any(|(start, _)| !start.is_multiple_of(BLOCK)) {
            return Ok(None);
        }
        let (give_back, back) = channel();
        let mut this = Self { jobs: Vec::new(), threads: Vec::new(), back, failed: Arc::default() };
        for n in 0..THREADS {
            let (jobs, queue) = sync_channel(QUEUE);
            let (memory, control, back) = (memory.clone(), Arc::clone(control), give_back.clone());
            let failed = Arc::clone(&this.failed);
            let body = move || serve(&queue, &back, &failed, (&memory, &control));
            let thread = spawner.spawn(&format!("migrate-fill{n}"), Role::Migration, Box::new(body));
            let failed = |source| MigrationError::Host { what: "no thread that fills RAM", source };
            this.threads.push(thread.map_err(failed)?);
            this.jobs.push(Way { jobs, kept: Default::default() });
        }
        Ok(Some(this))
    }

    /// Gives a frame to its thread, now or with later ones; `payload` becomes another buffer.
    pub(crate) fn put(&mut self, header: &Header, payload: &mut Vec<u8>) -> Result<(), MigrationError> {
        if self.failed.load(Ordering::Acquire) {
            return self.settle();
        }
        let full = if payload.len() < SHORT {
            payload.clone()
        } else {
            std::mem::replace(payload, self.back.try_recv().unwrap_or_default())
        };
        let index = (header.arg / BLOCK % THREADS) as usize;
        let way = self.jobs.get_mut(index).ok_or_else(gone)?;
        way.kept.1 += HEADER + full.len();
        way.kept.0.push((*header, full));
        if way.kept.1 < BATCH { Ok(()) } else { way.give() }
    }

    /// Waits until everything is in RAM.
    pub(crate) fn settle(&mut self) -> Result<(), MigrationError> {
        let ask = |way: &mut Way| {
            way.give()?;
            let (answer, answered) = sync_channel(1);
            way.jobs.send(Job::Settle(answer)).map_err(|_| gone())?;
            Ok(answered)
        };
        let answers = self.jobs.iter_mut().map(ask).collect::<Result<Vec<_>, MigrationError>>()?;
        answers.into_iter().try_for_each(|answered| answered.recv().map_err(|_| gone())?)
    }
}
