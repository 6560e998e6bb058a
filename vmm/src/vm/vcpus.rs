//! The vCPU threads and the way to talk to them.

use std::io;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_accel::{AccelError, CodePlace, DebugControl, Exit, Kicker, SystemEvent, Vcpu, Vm, Watchpoint};
use holdfast_arch::{CpuModel, CpuState};
use holdfast_clock::host_monotonic;
use holdfast_device::SystemSink;
use holdfast_threads::{Role, Spawner};
use parking_lot::Mutex;

use super::ahead::Ahead;

/// A vCPU that could not be made, reached or changed.
#[derive(Debug, thiserror::Error)]
pub enum VcpuError {
    /// The accelerator refused.
    #[error("vCPU {index}")]
    Accel {
        /// Which vCPU.
        index: u32,
        /// Why.
        #[source]
        source: AccelError,
    },
    /// The thread could not be started.
    #[error("vCPU {index}: no thread")]
    Thread {
        /// Which vCPU.
        index: u32,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// The thread is gone or does not answer.
    #[error("vCPU {index} does not answer")]
    Gone {
        /// Which vCPU.
        index: u32,
    },
}

/// What happens on a vCPU thread that the VM must know of.
pub trait VcpuEvents: Send + Sync {
    /// The accelerator cannot go on with this vCPU; the guest stands.
    fn vcpu_failed(&self, index: u32, error: AccelError);
    /// The vCPU stopped for the debugger.
    fn vcpu_debug(&self, index: u32, stop: DebugStop);
}

/// Why a vCPU stopped for the debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugStop {
    /// At a breakpoint or after a step; guest-virtual program counter.
    At(u64),
    /// A watchpoint was hit.
    Watch(Watchpoint),
}

type Reply<T> = SyncSender<Result<T, AccelError>>;

enum Command {
    Run(Reply<()>),
    Pause(Reply<()>),
    State(Reply<CpuState>),
    SetState(Box<CpuState>, Reply<()>),
    Reset(Reply<()>),
    Nmi(Reply<()>),
    Debug(DebugControl, Reply<()>),
    Rearm(Reply<()>),
    Translate(u64, Reply<Option<u64>>),
    /// Translate what does not run yet.
    Ahead(Arc<Ahead>),
    /// Stand for so many nanoseconds, without being stopped.
    Rest(u64),
    Stop,
}

/// One vCPU's thread.
struct Thread {
    commands: Mutex<Sender<Command>>,
    kicker: Arc<dyn Kicker>,
    tid: libc::pid_t,
    join: Mutex<Option<JoinHandle<()>>>,
}

/// What the threads share.
#[derive(Clone)]
struct Shared {
    events: Arc<dyn VcpuEvents>,
    system: Arc<dyn SystemSink>,
}

/// All vCPUs of a VM. They start paused.
pub struct Vcpus {
    threads: Vec<Thread>,
    /// What is being translated before the guest runs.
    ahead: Mutex<Option<Arc<Ahead>>>,
}

impl std::fmt::Debug for Vcpus {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Vcpus").field("count", &self.threads.len()).finish()
    }
}

/// What vCPU threads are started from.
pub struct VcpuSetup<'a> {
    /// The accelerator's VM.
    pub vm: &'a Arc<dyn Vm>,
    /// How many.
    pub count: u32,
    /// The CPU that they show.
    pub model: &'a CpuModel,
    /// Host CPUs on which each vCPU may run, by index; a missing or empty entry means all.
    pub affinity: &'a [Vec<usize>],
    /// Starts the threads.
    pub spawner: &'a dyn Spawner,
    /// Told of failures and debug stops.
    pub events: Arc<dyn VcpuEvents>,
    /// Told of what the guest asks.
    pub system: Arc<dyn SystemSink>,
}

/// A vCPU that takes longer than this to answer is taken for lost.
const ANSWER: Duration = Duration::from_secs(30);

impl Vcpus {
    /// Makes the vCPUs, each on its own thread `vcpuN`.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn start(setup: &VcpuSetup<'_>) -> Result<Self, VcpuError> {
        let mut vcpus = Self { threads: Vec::new(), ahead: Mutex::new(None) };
        for index in 0..setup.count {
            vcpus.threads.push(start_thread(index, setup)?);
        }
        Ok(vcpus)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.threads.len()
    }

    /// True if there are none.
    pub fn is_empty(&self) -> bool {
        self.threads.is_empty()
    }

    /// The host thread ids, by vCPU.
    pub fn thread_ids(&self) -> Vec<i32> {
        self.threads.iter().map(|t| t.tid).collect()
    }

    /// Lets all vCPUs run.
    ///
    /// # Errors
    /// [`VcpuError`] of the first that fails.
    pub fn run(&self) -> Result<(), VcpuError> {
        self.broadcast(Command::Run)
    }

    /// Stops all vCPUs between two guest instructions, and returns when they stand.
    ///
    /// # Errors
    /// [`VcpuError`] of the first that fails.
    pub fn pause(&self) -> Result<(), VcpuError> {
        self.broadcast(Command::Pause)
    }

    /// Puts all vCPUs, which must be paused, into their reset state.
    ///
    /// # Errors
    /// [`VcpuError`] of the first that fails.
    pub fn reset(&self) -> Result<(), VcpuError> {
        self.broadcast(Command::Reset)
    }

    /// The states of all vCPUs, which must be paused.
    ///
    /// # Errors
    /// [`VcpuError`] of the first that fails.
    pub fn states(&self) -> Result<Vec<CpuState>, VcpuError> {
        (0..self.threads.len()).map(|i| self.state(i)).collect()
    }

    /// The state of one vCPU, which must be paused.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn state(&self, index: usize) -> Result<CpuState, VcpuError> {
        self.ask(index, Command::State)
    }

    /// Sets the state of one vCPU, which must be paused.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn set_state(&self, index: usize, state: CpuState) -> Result<(), VcpuError> {
        self.ask(index, |reply| Command::SetState(Box::new(state), reply))
    }

    /// Injects a non-maskable interrupt into every vCPU.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn nmi(&self) -> Result<(), VcpuError> {
        self.broadcast(Command::Nmi)
    }

    /// Sets breakpoints and stepping of one vCPU.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn set_debug(&self, index: usize, control: DebugControl) -> Result<(), VcpuError> {
        self.ask(index, |reply| Command::Debug(control, reply))
    }

    /// Lets one vCPU run.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn run_one(&self, index: usize) -> Result<(), VcpuError> {
        self.ask(index, Command::Run)
    }

    /// The breakpoint at which the vCPU stands was reported to nobody: it is to stop there again.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn rearm_breakpoint(&self, index: usize) -> Result<(), VcpuError> {
        self.ask(index, Command::Rearm)
    }

    /// Guest-virtual to guest-physical as vCPU `index` sees it.
    ///
    /// # Errors
    /// [`VcpuError`].
    pub fn translate(&self, index: usize, gva: u64) -> Result<Option<u64>, VcpuError> {
        self.ask(index, |reply| Command::Translate(gva, reply))
    }

    /// Lets all vCPUs that run stand for `nanoseconds` from now on. Returns at once.
    pub fn rest(&self, nanoseconds: u64) {
        for thread in &self.threads {
            // A thread that is gone rests.
            let _ = thread.commands.lock().send(Command::Rest(nanoseconds));
            thread.kicker.kick();
        }
    }

    /// Has the code at `places` translated by the threads of all vCPUs, which must be paused. Returns at once.
    pub fn translate_ahead(&self, places: Vec<CodePlace>) {
        self.end_ahead();
        let ahead = Arc::new(Ahead::new(places, self.threads.len()));
        for thread in &self.threads {
            if thread.commands.lock().send(Command::Ahead(Arc::clone(&ahead))).is_err() {
                ahead.without_one();
            }
        }
        *self.ahead.lock() = Some(ahead);
    }

    /// Waits until that is done, for `patience` at most.
    pub fn wait_ahead(&self, patience: Duration) {
        let ahead = self.ahead.lock().clone();
        if let Some(ahead) = ahead {
            ahead.wait(patience);
        }
    }

    /// No more of it is needed. When this returns no thread is at it.
    pub fn end_ahead(&self) {
        let ahead = self.ahead.lock().take();
        if let Some(ahead) = ahead {
            ahead.end();
            ahead.wait(ANSWER);
        }
    }

    fn broadcast(&self, command: impl Fn(Reply<()>) -> Command) -> Result<(), VcpuError> {
        let mut answers = Vec::with_capacity(self.threads.len());
        for index in 0..self.threads.len() {
            answers.push(self.send(index, &command)?);
        }
        for (index, answer) in answers.into_iter().enumerate() {
            receive(index, &answer)?;
        }
        Ok(())
    }

    fn ask<T>(&self, index: usize, command: impl FnOnce(Reply<T>) -> Command) -> Result<T, VcpuError> {
        let answer = self.send(index, command)?;
        receive(index, &answer)
    }

    fn send<T>(
        &self,
        index: usize,
        command: impl FnOnce(Reply<T>) -> Command,
    ) -> Result<Receiver<Result<T, AccelError>>, VcpuError> {
        let gone = VcpuError::Gone { index: index as u32 };
        let Some(thread) = self.threads.get(index) else { return Err(gone) };
        let (tx, rx) = sync_channel(1);
        thread.commands.lock().send(command(tx)).map_err(|_| gone)?;
        thread.kicker.kick();
        Ok(rx)
    }
}

fn receive<T>(index: usize, answer: &Receiver<Result<T, AccelError>>) -> Result<T, VcpuError> {
    let index = index as u32;
    match answer.recv_timeout(ANSWER) {
        Ok(result) => result.map_err(|source| VcpuError::Accel { index, source }),
        Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => Err(VcpuError::Gone { index }),
    }
}

impl Drop for Vcpus {
    fn drop(&mut self) {
        if let Some(ahead) = self.ahead.get_mut() {
            ahead.end();
        }
        for thread in &self.threads {
            // A thread that is gone already needs no telling.
            let _ = thread.commands.lock().send(Command::Stop);
            thread.kicker.kick();
        }
        for thread in &self.threads {
            if let Some(join) = thread.join.lock().take() {
                // A panic was reported by the thread itself.
                let _ = join.join();
            }
        }
    }
}

fn start_thread(index: u32, setup: &VcpuSetup<'_>) -> Result<Thread, VcpuError> {
    let (tx, rx) = channel();
    let (made_tx, made_rx) = sync_channel(1);
    let vm = Arc::clone(setup.vm);
    let model = setup.model.clone();
    let shared = Shared { events: Arc::clone(&setup.events), system: Arc::clone(&setup.system) };
    let affinity = setup.affinity.get(index as usize).cloned().unwrap_or_default();
    let body = move || {
        if !affinity.is_empty()
            && let Err(error) = holdfast_threads::pin_current(&affinity)
        {
            tracing::warn!(index, %error, "vCPU affinity cannot be set");
        }
        match vm.create_vcpu(index, &model) {
            Ok(vcpu) => {
                // SAFETY: gettid takes no arguments and cannot fail.
                let tid = unsafe { libc::gettid() };
                if made_tx.send(Ok((vcpu.kicker(), tid))).is_ok() {
                    serve(index, vcpu, &rx, &shared);
                }
            }
            Err(source) => {
                // Nobody waits any more only if the VM is gone.
                let _ = made_tx.send(Err(source));
            }
        }
    };
    let join = setup
        .spawner
        .spawn(&format!("vcpu{index}"), Role::Vcpu, Box::new(body))
        .map_err(|source| VcpuError::Thread { index, source })?;
    let made = made_rx.recv().map_err(|_| VcpuError::Gone { index })?;
    let (kicker, tid) = made.map_err(|source| VcpuError::Accel { index, source })?;
    Ok(Thread { commands: Mutex::new(tx), kicker, tid, join: Mutex::new(Some(join)) })
}

/// The vCPU thread: runs guest code while told to, serves commands in between.
fn serve(index: u32, mut vcpu: Box<dyn Vcpu>, commands: &Receiver<Command>, shared: &Shared) {
    let mut running = false;
    let mut rest_until = 0_u64;
    loop {
        let rest = if rest_until == 0 { 0 } else { rest_until.saturating_sub(host_monotonic()) };
        let command = match (running, rest) {
            (false, _) => commands.recv().ok(),
            (true, 0) => commands.try_recv().ok(),
            (true, rest) => match commands.recv_timeout(Duration::from_nanos(rest)) {
                Err(RecvTimeoutError::Timeout) => continue,
                other => other.ok(),
            },
        };
        match command {
            Some(Command::Stop) => return,
            Some(Command::Rest(time)) => rest_until = host_monotonic().saturating_add(time),
            Some(command) => obey(command, vcpu.as_mut(), &mut running),
            // The VM is gone.
            None if !running => return,
            None => match vcpu.run() {
                Ok(Exit::Kicked) => {}
                Ok(exit) => running = after(index, &exit, shared),
                Err(error) => {
                    shared.events.vcpu_failed(index, error);
                    running = false;
                }
            },
        }
    }
}

/// Whether the vCPU goes on after `exit`.
fn after(index: u32, exit: &Exit, shared: &Shared) -> bool {
    match exit {
        Exit::Kicked => true,
        Exit::HaltedForever => false,
        Exit::Shutdown => {
            tracing::info!(index, "the guest shut itself down by a fault; it is reset");
            shared.system.request(SystemEvent::Reset);
            false
        }
        Exit::SystemEvent(event) => {
            shared.system.request(*event);
            false
        }
        Exit::Debug(pc) => {
            shared.events.vcpu_debug(index, DebugStop::At(*pc));
            false
        }
        Exit::Watch(_, hit) => {
            shared.events.vcpu_debug(index, DebugStop::Watch(*hit));
            false
        }
    }
}

fn obey(command: Command, vcpu: &mut dyn Vcpu, running: &mut bool) {
    // Whoever asked may have given up waiting; then nobody needs the answer.
    match command {
        Command::Run(reply) => {
            *running = true;
            let _ = reply.send(Ok(()));
        }
        Command::Pause(reply) => {
            *running = false;
            let _ = reply.send(Ok(()));
        }
        Command::State(reply) => {
            let _ = reply.send(vcpu.state());
        }
        Command::SetState(state, reply) => {
            let _ = reply.send(vcpu.set_state(&state));
        }
        Command::Reset(reply) => {
            let _ = reply.send(vcpu.reset());
        }
        Command::Nmi(reply) => {
            let _ = reply.send(vcpu.inject_nmi());
        }
        Command::Debug(control, reply) => {
            let _ = reply.send(vcpu.set_debug(&control));
        }
        Command::Rearm(reply) => {
            vcpu.rearm_breakpoint();
            let _ = reply.send(Ok(()));
        }
        Command::Translate(gva, reply) => {
            let _ = reply.send(vcpu.translate(gva));
        }
        Command::Ahead(ahead) => ahead.work(vcpu),
        Command::Stop => *running = false,
        // Not for the vCPU: its thread rests.
        Command::Rest(_) => {}
    }
}
