//! Block jobs: the manager's part.

use std::collections::BTreeMap;
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_block::nodes::{Hold, NamedNode, User};
use holdfast_block::options::DiscardMode;
use holdfast_block::queue::NodeBackend;
use holdfast_block::{BlockBackend, BlockNode};
use holdfast_config::DiskConfig;
use holdfast_threads::Role;
use holdfast_virtio::blk::Blk;
use serde_json::Value;

use super::storage::shown;
use super::{Manager, Message, Wire};
use crate::control::{ControlError, ErrorKind};
use crate::storage::jobs::mirror::{Mirror, MirrorOptions, MirroredDevice};
use crate::storage::jobs::{Job, JobOptions, JobStatus, JobVerb, Outcome, check_id, no_job};
use crate::storage::{LoggedDisk, find_disk, refused};

/// How often it is looked whether a job that was told to end has.
const LOOK: Duration = Duration::from_millis(10);

/// A job that is there.
#[derive(Debug)]
struct Entry {
    job: Arc<Job>,
    /// The disk, if the source is one's.
    disk: Option<String>,
    source: String,
    target: String,
    /// To cut its requests off.
    to: Weak<NamedNode>,
    thread: JoinHandle<()>,
}

/// The block jobs, by their ids.
#[derive(Debug, Default)]
pub(super) struct Jobs(BTreeMap<String, Entry>);

impl Jobs {
    fn active(&self) -> impl Iterator<Item = &Entry> {
        self.0.values().filter(|entry| entry.job.is_active())
    }

    fn forget_dismissed(&mut self) {
        self.0.retain(|_, entry| entry.job.status() != JobStatus::Null);
    }
}

fn failed(text: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Failed, text)
}

fn busy(node: &str) -> ControlError {
    failed(format!("Node '{node}' is busy: block device is in use by block job: mirror"))
}

/// A mirrored disk as its job reaches it: through the manager's thread.
struct Reached {
    wire: Wire,
    disk: Option<Arc<LoggedDisk>>,
}

impl Reached {
    fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Manager, &LoggedDisk) -> T + Send + 'static,
    ) -> Option<Result<T, String>> {
        let disk = Arc::clone(self.disk.as_ref()?);
        let answer = self.wire.ask(move |manager| what(manager, &disk));
        Some(answer.ok_or_else(|| "the VM manager has ended".to_owned()))
    }
}

impl MirroredDevice for Reached {
    fn quiesce(&self) -> Result<(), String> {
        self.ask(|manager, disk| disk.hold_back(true, manager.devices_work())).unwrap_or(Ok(()))
    }

    fn pivot(&self, target: Hold) -> Result<(), String> {
        self.ask(|manager, disk| manager.pivot(disk, target)).unwrap_or(Ok(Ok(()))).flatten()
    }

    fn release(&self) {
        let released = self.ask(|manager, disk| {
            disk.note(false, manager.devices_work());
            disk.hold_back(false, manager.devices_work());
        });
        if let Some(Err(error)) = released {
            tracing::debug!(error, "a disk is not mirrored any more");
        }
    }
}

/// What a mirror is made of.
struct Plan {
    id: String,
    disk: Option<Arc<LoggedDisk>>,
    holds: (Hold, Hold),
    log: Arc<holdfast_virtio::blk::log::WriteLog>,
}

impl Manager {
    /// The disk or else the node that a mirror's `device` names.
    fn mirrored(&self, device: &str) -> Result<(Option<Arc<Blk>>, Arc<NamedNode>), ControlError> {
        let disks = self.disks();
        let disk = find_disk(&disks, device).ok().or_else(|| disks.iter().find(|d| d.node() == device));
        let name = disk.map_or_else(|| device.to_owned(), |d| d.node());
        Ok((disk.cloned(), self.mirror_node(&name)?))
    }

    fn mirror_node(&self, name: &str) -> Result<Arc<NamedNode>, ControlError> {
        let missing = |_| failed(format!("Cannot find device='{name}' nor node-name='{name}'"));
        self.storage.nodes().find(name).map_err(missing)
    }

    fn plan_mirror(&self, options: &MirrorOptions) -> Result<Plan, ControlError> {
        options.check()?;
        let (disk, source) = self.mirrored(&options.device)?;
        let of_disk = disk.as_ref().map(|d| d.id().to_owned()).filter(|id| *id == options.device);
        let id = options.job_id.clone().or(of_disk).unwrap_or_default();
        check_id(&id)?;
        if self.jobs.0.contains_key(&id) {
            return Err(failed(format!("Job ID '{id}' already in use")));
        }
        self.check_no_job_on(source.name())?;
        let target = self.mirror_node(&options.target)?;
        if source.rests_on(target.name()) || target.rests_on(source.name()) {
            return Err(failed("Can't mirror node into itself"));
        }
        if source.users().iter().any(|user| user.role != "root") {
            return Err(failed("Need a root block node"));
        }
        let mine = disk.as_ref().map(|d| format!("block device '{}'", d.id()));
        if let Some(other) =
            source.users().iter().find(|user| user.writes && Some(&user.who) != mine.as_ref())
        {
            return Err(failed(format!("Node '{}' is written by {}, too", source.name(), other.who)));
        }
        if options.replaces.as_ref().is_some_and(|name| name != source.name()) {
            return Err(ControlError::unsupported("'replaces' of another node than the disk's"));
        }
        if target.is_readonly() {
            return Err(failed("Block node is read-only"));
        }
        let size = disk.as_ref().map_or_else(|| source.size(), |d| d.backend().geometry().size);
        let looks = NodeBackend::new(Arc::clone(&target) as Arc<dyn BlockNode>, &id, &self.spawner, false);
        if target.size() != size {
            return Err(failed("Source and target image have different sizes"));
        }
        let block = looks.geometry().logical_block;
        if disk.as_ref().is_some_and(|d| d.backend().geometry().logical_block < block) {
            let text = format!("a target with blocks of {block} bytes for a disk with smaller ones");
            return Err(ControlError::unsupported(text));
        }
        let log = options.log(size)?;
        let user = |role, writes| User {
            who: format!("block job '{id}'"),
            role,
            writes,
            // What the disk writes is noted; what others write would not be.
            shares_write: role == "source" && disk.is_some(),
        };
        let hold = |node: &Arc<NamedNode>, role, writes| node.hold(user(role, writes)).map_err(refused);
        let holds = (hold(&source, "source", false)?, hold(&target, "target", true)?);
        let (disk, log) = match disk {
            Some(blk) => {
                let disk = Arc::new(LoggedDisk::new(self.built()?, blk, log)?);
                let log = Arc::clone(&disk.log);
                (Some(disk), log)
            }
            None => (None, Arc::new(log)),
        };
        Ok(Plan { id, disk, holds, log })
    }

    /// `blockdev-mirror`.
    pub(super) fn start_mirror(&mut self, options: &MirrorOptions) -> Result<(), ControlError> {
        self.jobs.forget_dismissed();
        let Plan { id, disk, holds, log } = self.plan_mirror(options)?;
        let job = JobOptions {
            id: id.clone(),
            speed: options.speed.unwrap_or(0),
            auto_finalize: options.auto_finalize.unwrap_or(true),
            auto_dismiss: options.auto_dismiss.unwrap_or(true),
        };
        let job = Job::start(job, self.events.clone())?;
        if let Some(disk) = &disk {
            disk.note(true, self.devices_work());
        }
        let (source, to) = (holds.0.node().name().to_owned(), Arc::downgrade(holds.1.node()));
        let mirror = Mirror::new(Arc::clone(&job), holds, log, options);
        let disk_id = disk.as_ref().map(|d| d.blk.id().to_owned());
        let device = Box::new(Reached { wire: self.wire.clone(), disk: disk.clone() });
        let thread = self.spawner.spawn("mirror", Role::Nbd, Box::new(move || mirror.run(device)));
        let thread = match thread {
            Ok(thread) => thread,
            Err(error) => {
                if let Some(disk) = disk {
                    disk.note(false, self.devices_work());
                }
                job.aborting();
                job.conclude(&Outcome::Failed(error.to_string()));
                return Err(ControlError::failed("No thread for the mirror", error));
            }
        };
        let target = options.target.clone();
        self.jobs.0.insert(id, Entry { job, disk: disk_id, source, target, to, thread });
        Ok(())
    }

    /// Does what is asked of a job.
    pub(super) fn ask_job(&mut self, id: &str, verb: JobVerb, block: bool) -> Result<(), ControlError> {
        self.jobs.forget_dismissed();
        let entry = self.jobs.0.get(id).ok_or_else(|| no_job(id, block))?;
        entry.job.ask(verb)?;
        if entry.job.check().is_err()
            && let Some(to) = entry.to.upgrade()
        {
            to.cancel_in_flight();
        }
        Ok(())
    }

    /// `query-jobs`, or if `block` `query-block-jobs`.
    pub(super) fn show_jobs(&mut self, block: bool) -> Result<Value, ControlError> {
        self.jobs.forget_dismissed();
        let all = self.jobs.0.values().map(|entry| &entry.job);
        if block {
            return shown(&all.map(|job| job.block_info()).collect::<Vec<_>>());
        }
        shown(&all.map(|job| job.info()).collect::<Vec<_>>())
    }

    /// Fails if a job reads the node.
    pub(super) fn check_no_job_on(&self, node: &str) -> Result<(), ControlError> {
        if self.jobs.active().any(|entry| entry.source == node) { Err(busy(node)) } else { Ok(()) }
    }

    /// Fails if a job uses the node or one above it.
    pub(super) fn check_no_job_above(&self, node: &str) -> Result<(), ControlError> {
        let rests = |name: &String| self.storage.nodes().find(name).is_ok_and(|top| top.rests_on(node));
        let used = self.jobs.active().any(|entry| [&entry.source, &entry.target].into_iter().any(rests));
        if used { Err(busy(node)) } else { Ok(()) }
    }

    /// Fails if a job copies the disk of that id.
    pub(super) fn check_no_job_of(&self, disk: &str) -> Result<(), ControlError> {
        let found = self.jobs.active().find(|entry| entry.disk.as_deref() == Some(disk));
        found.map_or(Ok(()), |entry| Err(busy(&entry.source)))
    }

    /// Fails if there is a job that still uses its nodes.
    pub(super) fn no_active_jobs(&self) -> Result<(), ControlError> {
        let first = self.jobs.active().next();
        first.map_or(Ok(()), |entry| {
            Err(failed(format!("block job '{}' is under way: it has to end first", entry.job.id())))
        })
    }

    /// Ends the jobs of a disk that goes, or all of them, and waits until they have.
    pub(super) fn end_jobs(&mut self, of: Option<&str>) {
        let goes = |entry: &Entry| of.is_none_or(|disk| entry.disk.as_deref() == Some(disk));
        for entry in self.jobs.0.values().filter(|entry| goes(entry)) {
            // Those that are over have nothing to end.
            let _ = entry.job.ask(JobVerb::Cancel { force: true });
            if let Some(to) = entry.to.upgrade() {
                to.cancel_in_flight();
            }
        }
        let mut later = Vec::new();
        while self.jobs.0.values().any(|entry| goes(entry) && !entry.thread.is_finished()) {
            match self.messages.recv_timeout(LOOK) {
                // The jobs are among those who ask.
                Ok(Message::Ask(what)) => what(self),
                Ok(other) => later.push(other),
                Err(_) => {}
            }
        }
        self.jobs.forget_dismissed();
        later.into_iter().for_each(|message| self.wire.send(message));
    }

    /// Lets a disk go over to the node that its mirror has written.
    fn pivot(&mut self, disk: &LoggedDisk, target: Hold) -> Result<(), String> {
        let (blk, id) = (&disk.blk, disk.blk.id().to_owned());
        let before = blk.backend().geometry();
        if blk.backend().is_readonly() {
            return Err(format!("Device '{id}' is read-only and stays on its node"));
        }
        let all = self.config.disks.iter_mut().flatten();
        let config = all.into_iter().find(|d| d.id.as_deref() == Some(&id));
        let config = config.ok_or_else(|| format!("Device '{id}' not found"))?;
        let user =
            User { who: format!("block device '{id}'"), role: "root", writes: true, shares_write: false };
        target.hand_over(user).map_err(|e| e.to_string())?;
        let node = Arc::clone(target.node());
        let discard = node.options().discard == Some(DiscardMode::Unmap) && config.sparse;
        let backend = NodeBackend::of(target, &id, &self.spawner, discard);
        if backend.geometry().size != before.size {
            return Err("cannot replace image with a mirror image of different size".to_owned());
        }
        *config = on_node(config, node.name());
        let works = self.devices_work();
        let changed = disk.standing(works, |disk| disk.blk.change_medium(backend, node.name().to_owned()));
        changed.map_err(|e| format!("Device '{id}' has no queues on the target: {e}"))
    }
}

/// The config of a disk that shows the node `node` from now on.
fn on_node(config: &DiskConfig, node: &str) -> DiskConfig {
    DiskConfig {
        node: Some(node.to_owned()),
        path: None,
        direct: false,
        backing_files: false,
        image_type: None,
        disable_io_uring: false,
        lock_granularity: DiskConfig::default().lock_granularity,
        ..config.clone()
    }
}
