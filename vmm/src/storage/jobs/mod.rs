//! Block jobs: what they are at, and what monitors may ask of them (QEMU's `job.json` and `block-core.json`).

pub mod mirror;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_clock::host_monotonic;
use holdfast_objects::ThrottleGroup;
use holdfast_objects::throttle::{Limits, Rate};
use parking_lot::{Condvar, Mutex, MutexGuard};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::failed;
use crate::control::{BlockJobFacts, ControlError, ErrorKind, Event, EventBus};

/// What a job is at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobStatus {
    /// It is there.
    Created,
    /// It works.
    Running,
    /// Somebody has paused it.
    Paused,
    /// The target is like the source and is kept so.
    Ready,
    /// Somebody has paused it behind that.
    Standby,
    /// Its work is done.
    Waiting,
    /// It waits to be made to count.
    Pending,
    /// It has failed or was cancelled, and cleans up.
    Aborting,
    /// It waits to be forgotten.
    Concluded,
    /// It is forgotten.
    Null,
}

impl JobStatus {
    /// QEMU's word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Created => "created",
            Self::Running => "running",
            Self::Paused => "paused",
            Self::Ready => "ready",
            Self::Standby => "standby",
            Self::Waiting => "waiting",
            Self::Pending => "pending",
            Self::Aborting => "aborting",
            Self::Concluded => "concluded",
            Self::Null => "null",
        }
    }
}

/// What is asked of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum JobVerb {
    /// End; with `force` at once, else, behind `ready`, with a target that is like the source.
    Cancel {
        /// At once, whatever has been reached.
        force: bool,
    },
    /// Stand still.
    Pause,
    /// Go on.
    Resume,
    /// Copy at most this many bytes a second; 0 for no limit.
    SetSpeed(i64),
    /// End, and let the disk go over to the target.
    Complete,
    /// Make the end count.
    Finalize,
    /// Be forgotten.
    Dismiss,
}

impl JobVerb {
    fn name(self) -> &'static str {
        match self {
            Self::Cancel { .. } => "cancel",
            Self::Pause => "pause",
            Self::Resume => "resume",
            Self::SetSpeed(_) => "set-speed",
            Self::Complete => "complete",
            Self::Finalize => "finalize",
            Self::Dismiss => "dismiss",
        }
    }

    fn fits(self, status: JobStatus) -> bool {
        use JobStatus::{Concluded, Created, Paused, Pending, Ready, Running, Standby, Waiting};
        let working = matches!(status, Created | Running | Paused | Ready | Standby);
        match self {
            Self::Cancel { .. } => working || matches!(status, Waiting | Pending),
            Self::Pause | Self::Resume | Self::SetSpeed(_) => working,
            Self::Complete => matches!(status, Ready | Standby),
            Self::Finalize => status == Pending,
            Self::Dismiss => status == Concluded,
        }
    }
}

/// How a job is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// The disk goes over to the target.
    Complete,
    /// The target stays as a copy.
    Cancel,
    /// Whatever has been reached.
    Abort,
}

/// It was told to end at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Aborted;

/// The kinds of jobs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum JobType {
    /// `blockdev-mirror`.
    Mirror,
}

/// What is done about an error of a job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum OnJobError {
    /// The job ends with it.
    Report,
    /// Not supported.
    Ignore,
    /// Not supported.
    Enospc,
    /// Not supported.
    Stop,
    /// The job ends with it.
    Auto,
}

/// A job (`query-jobs`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct JobInfo {
    /// Its id.
    pub id: String,
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// What it is at.
    pub status: JobStatus,
    /// Bytes that are done.
    pub current_progress: u64,
    /// Those, and the ones that are left.
    pub total_progress: u64,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// A block job (`query-block-jobs`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct BlockJobInfo {
    /// Its kind.
    #[serde(rename = "type")]
    pub kind: JobType,
    /// Its id.
    pub device: String,
    /// Bytes in all, as far as is known.
    pub len: u64,
    /// Bytes of them that are done.
    pub offset: u64,
    /// It is at work just now.
    pub busy: bool,
    /// It is paused, or about to be.
    pub paused: bool,
    /// Most bytes a second; 0 for no limit.
    pub speed: u64,
    /// Always `ok`: an error ends the job.
    pub io_status: String,
    /// The target is like the source and is kept so.
    pub ready: bool,
    /// What it is at.
    pub status: JobStatus,
    /// It makes its end count by itself.
    pub auto_finalize: bool,
    /// It is forgotten by itself.
    pub auto_dismiss: bool,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Always false: writes of the guest do not wait for the target.
    pub actively_synced: bool,
}

#[derive(Debug)]
struct State {
    status: JobStatus,
    /// Somebody wants it to stand.
    paused: bool,
    speed: u64,
    end: Option<End>,
    finalize: bool,
    error: Option<String>,
    /// Bytes that are done, and that are left.
    progress: (u64, u64),
}

/// How a job came to its end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// It did what it should.
    Done,
    /// It was told to end at once.
    Cancelled,
    /// This stood in the way.
    Failed(String),
}

/// What a job is made with.
#[derive(Debug, Clone)]
pub struct JobOptions {
    /// Its id.
    pub id: String,
    /// Most bytes a second; 0 for no limit.
    pub speed: i64,
    /// It makes its end count by itself.
    pub auto_finalize: bool,
    /// It is forgotten by itself.
    pub auto_dismiss: bool,
}

/// A job, as its thread and monitors see it.
#[derive(Debug)]
pub struct Job {
    id: String,
    auto_finalize: bool,
    auto_dismiss: bool,
    state: Mutex<State>,
    changed: Condvar,
    rate: Arc<ThrottleGroup>,
    events: EventBus,
}

/// Checks the id of a job.
///
/// # Errors
/// If it does not begin with a letter, or has others than letters, digits, `-`, `.` and `_`.
pub fn check_id(id: &str) -> Result<(), ControlError> {
    let well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
        && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
    if well_formed { Ok(()) } else { Err(failed(format!("Invalid job ID '{id}'"))) }
}

fn rate_of(speed: i64) -> Result<(u64, Limits), ControlError> {
    let negative = |_| failed("Parameter 'speed' expects a non-negative value");
    let average = u64::try_from(speed).map_err(negative)?;
    let mut limits = Limits::default();
    if let Some(write) = limits.rates.get_mut(2) {
        *write = Rate { average, max: 0, length: 1 };
    }
    limits.check().map_err(|e| failed(format!("Parameter 'speed': {e}")))?;
    Ok((average, limits))
}

impl Job {
    /// A job that is at work.
    ///
    /// # Errors
    /// If the speed is none.
    pub fn start(options: JobOptions, events: EventBus) -> Result<Arc<Self>, ControlError> {
        let JobOptions { id, speed, auto_finalize, auto_dismiss } = options;
        let (speed, limits) = rate_of(speed)?;
        let job = Self {
            id,
            auto_finalize,
            auto_dismiss,
            state: Mutex::new(State {
                status: JobStatus::Null,
                paused: false,
                speed,
                end: None,
                finalize: false,
                error: None,
                progress: (0, 0),
            }),
            changed: Condvar::new(),
            rate: ThrottleGroup::new(limits),
            events,
        };
        let mut state = job.state.lock();
        job.enter(&mut state, JobStatus::Created);
        job.enter(&mut state, JobStatus::Running);
        drop(state);
        Ok(Arc::new(job))
    }

    /// Its id.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// What it is at.
    pub fn status(&self) -> JobStatus {
        self.state.lock().status
    }

    /// Whether it still uses its nodes.
    pub fn is_active(&self) -> bool {
        !matches!(self.status(), JobStatus::Concluded | JobStatus::Null)
    }

    /// Changes the status and says so, while nobody else can.
    fn enter(&self, state: &mut State, status: JobStatus) {
        if state.status != status {
            state.status = status;
            self.events.publish(Event::JobStatusChange { id: self.id.clone(), status: status.name() });
        }
    }

    fn facts(&self, state: &State) -> BlockJobFacts {
        let (offset, left) = state.progress;
        BlockJobFacts { device: self.id.clone(), len: offset + left, offset, speed: state.speed }
    }

    /// Does what a monitor asks for.
    ///
    /// # Errors
    /// In QEMU's words, if that does not go with what the job is at.
    pub fn ask(&self, verb: JobVerb) -> Result<(), ControlError> {
        let mut state = self.state.lock();
        if !verb.fits(state.status) {
            let (id, status, verb) = (&self.id, state.status.name(), verb.name());
            return Err(failed(format!(
                "Job '{id}' in state '{status}' cannot accept command verb '{verb}'"
            )));
        }
        match verb {
            JobVerb::Cancel { force } => {
                let ready = matches!(state.status, JobStatus::Ready | JobStatus::Standby);
                state.end = match state.end {
                    end @ Some(_) if ready && !force => end,
                    _ if ready && !force => Some(End::Cancel),
                    _ => Some(End::Abort),
                };
                state.paused = false;
            }
            JobVerb::Pause if state.paused => return Err(failed("Job is already paused")),
            JobVerb::Pause => state.paused = true,
            JobVerb::Resume if !state.paused => {
                return Err(failed("Can't resume a job that was not paused"));
            }
            JobVerb::Resume => state.paused = false,
            JobVerb::SetSpeed(speed) => {
                let (speed, limits) = rate_of(speed)?;
                self.rate.set_limits(limits).map_err(|e| failed(e.to_string()))?;
                state.speed = speed;
            }
            JobVerb::Complete => match state.end {
                None | Some(End::Complete) => state.end = Some(End::Complete),
                Some(_) => {
                    return Err(failed(format!("The active block job '{}' cannot be completed", self.id)));
                }
            },
            JobVerb::Finalize => state.finalize = true,
            JobVerb::Dismiss => self.enter(&mut state, JobStatus::Null),
        }
        drop(state);
        self.changed.notify_all();
        Ok(())
    }

    /// Fails if it is to end at once.
    ///
    /// # Errors
    /// [`Aborted`].
    pub fn check(&self) -> Result<(), Aborted> {
        if self.state.lock().end == Some(End::Abort) { Err(Aborted) } else { Ok(()) }
    }

    /// Stands for as long as somebody wants it to.
    ///
    /// # Errors
    /// [`Aborted`] if it is to end at once.
    pub fn checkpoint(&self) -> Result<(), Aborted> {
        let mut state = self.state.lock();
        loop {
            if state.end == Some(End::Abort) {
                return Err(Aborted);
            }
            let ready = matches!(state.status, JobStatus::Ready | JobStatus::Standby);
            let (stands, goes) = match ready {
                true => (JobStatus::Standby, JobStatus::Ready),
                false => (JobStatus::Paused, JobStatus::Running),
            };
            if !state.paused {
                self.enter(&mut state, goes);
                return Ok(());
            }
            self.enter(&mut state, stands);
            self.changed.wait(&mut state);
        }
    }

    /// Waits until `bytes` may be copied, and stands meanwhile if somebody wants it to.
    ///
    /// # Errors
    /// [`Aborted`] if it is to end at once.
    pub fn pace(&self, bytes: u64) -> Result<(), Aborted> {
        while let Err(wait) = self.rate.admit(true, bytes, host_monotonic()) {
            // The speed may change meanwhile.
            let until = Instant::now() + Duration::from_nanos(wait.min(100_000_000));
            let mut state = self.state.lock();
            let idle = |state: &State| state.end != Some(End::Abort) && !state.paused;
            while idle(&state) && !self.changed.wait_until(&mut state, until).timed_out() {}
            drop(state);
            self.checkpoint()?;
        }
        Ok(())
    }

    /// Waits for `time` at most; how it is to end, if somebody has said so.
    pub fn rest(&self, time: Duration) -> Option<End> {
        let until = Instant::now() + time;
        let mut state = self.state.lock();
        while state.end.is_none() && !state.paused && !self.changed.wait_until(&mut state, until).timed_out()
        {
        }
        state.end
    }

    /// Bytes that are done, and that are left.
    pub fn progress(&self, done: u64, left: u64) {
        self.state.lock().progress = (done, left);
    }

    /// The target is like the source.
    pub fn ready(&self) {
        let mut state = self.state.lock();
        self.enter(&mut state, JobStatus::Ready);
        self.events.publish(Event::BlockJobReady(self.facts(&state)));
    }

    /// The work is done: waits until it may count.
    ///
    /// # Errors
    /// [`Aborted`] if it is not to.
    pub fn settle(&self) -> Result<(), Aborted> {
        let mut state = self.state.lock();
        let aborted = |state: &MutexGuard<'_, State>| state.end == Some(End::Abort);
        if aborted(&state) {
            return Err(Aborted);
        }
        self.enter(&mut state, JobStatus::Waiting);
        self.enter(&mut state, JobStatus::Pending);
        if !self.auto_finalize {
            self.events.publish(Event::BlockJobPending { id: self.id.clone() });
            while !state.finalize && !aborted(&state) {
                self.changed.wait(&mut state);
            }
        }
        if aborted(&state) { Err(Aborted) } else { Ok(()) }
    }

    /// Reading, or if `write` writing, has failed.
    pub fn io_failed(&self, write: bool) {
        self.events.publish(Event::BlockJobError { device: self.id.clone(), write });
    }

    /// It cleans up, because it has not come to a good end.
    pub fn aborting(&self) {
        self.enter(&mut self.state.lock(), JobStatus::Aborting);
    }

    /// It is over and uses nothing any more.
    pub fn conclude(&self, outcome: &Outcome) {
        let mut state = self.state.lock();
        let facts = self.facts(&state);
        match outcome {
            Outcome::Cancelled => self.events.publish(Event::BlockJobCancelled(facts)),
            Outcome::Done => self.events.publish(Event::BlockJobCompleted(facts, None)),
            Outcome::Failed(error) => {
                state.error = Some(error.clone());
                self.events.publish(Event::BlockJobCompleted(facts, Some(error.clone())));
            }
        }
        self.enter(&mut state, JobStatus::Concluded);
        if self.auto_dismiss {
            self.enter(&mut state, JobStatus::Null);
        }
    }

    /// `query-jobs`.
    pub fn info(&self) -> JobInfo {
        let state = self.state.lock();
        let (done, left) = state.progress;
        JobInfo {
            id: self.id.clone(),
            kind: JobType::Mirror,
            status: state.status,
            current_progress: done,
            total_progress: done + left,
            error: state.error.clone(),
        }
    }

    /// `query-block-jobs`.
    pub fn block_info(&self) -> BlockJobInfo {
        let state = self.state.lock();
        let (done, left) = state.progress;
        BlockJobInfo {
            kind: JobType::Mirror,
            device: self.id.clone(),
            len: done + left,
            offset: done,
            busy: state.status == JobStatus::Running && !state.paused,
            paused: state.paused,
            speed: state.speed,
            io_status: "ok".to_owned(),
            ready: matches!(state.status, JobStatus::Ready | JobStatus::Standby),
            status: state.status,
            auto_finalize: self.auto_finalize,
            auto_dismiss: self.auto_dismiss,
            error: state.error.clone(),
            actively_synced: false,
        }
    }
}

/// There is no such job: the generic commands and those of block jobs say so in different words.
pub fn no_job(id: &str, block: bool) -> ControlError {
    if block {
        return ControlError::new(ErrorKind::NotActive, format!("Block job '{id}' not found"));
    }
    failed("Job not found")
}
