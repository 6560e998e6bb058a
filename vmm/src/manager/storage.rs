//! The storage graph: what monitors ask of it, and what its disks tell.

use std::sync::Arc;

use holdfast_block::nodes::NodeEvents;
use holdfast_config::{BlockdevOptions, VmConfig};
use holdfast_virtio::blk::Blk;
use holdfast_virtio::blk::policy::{Action, DiskEvents, IoFailure};
use holdfast_virtio::blk::stats::Kind;
use serde_json::{Value, json};

use super::{Manager, Message, Run, Stage, Wire};
use crate::confine;
use crate::control::{ControlError, ErrorKind, Event, Responder};
use crate::storage::{self, HistogramSet, Storage, StorageEvents, StorageRequest, find_disk, refused};

impl DiskEvents for Wire {
    fn io_error(&self, failure: IoFailure) {
        self.send(Message::Disk(failure));
    }
}

impl NodeEvents for Wire {
    fn write_threshold(&self, node: &str, exceeded: u64, threshold: u64) {
        self.send(Message::Event(Event::BlockWriteThreshold { node: node.to_owned(), exceeded, threshold }));
    }

    fn image_corrupted(&self, node: &str, message: &str) {
        let (node, message) = (node.to_owned(), message.to_owned());
        self.send(Message::Event(Event::BlockImageCorrupted { node, message }));
    }
}

impl StorageEvents for Wire {
    fn export_deleted(&self, id: &str) {
        self.send(Message::Event(Event::BlockExportDeleted { id: id.to_owned() }));
    }
}

/// What may take long and so is a job: opening images, also over the network.
fn is_long(request: &StorageRequest) -> bool {
    matches!(
        request,
        StorageRequest::Add(_)
            | StorageRequest::Reopen(_)
            | StorageRequest::Resize(..)
            | StorageRequest::ServerStop
    )
}

impl Manager {
    /// A disk's request failed: everyone hears of it, and the VM stops if it waits.
    pub(super) fn disk_failed(&mut self, failure: IoFailure) {
        let stops = failure.action == Action::Stop;
        self.events.publish(Event::BlockIoError(failure));
        if stops && matches!(self.stage, Stage::Built { run: Run::Running, .. }) {
            self.stand_still(Run::IoError);
            self.events.publish(Event::Paused);
            self.tell_stopped();
        }
    }

    /// The graph of a VM that is gone goes with it.
    pub(super) fn forget_storage(&mut self) {
        let objects = Arc::clone(self.storage.objects());
        // There may have been none.
        let _ = self.storage.stop_server();
        self.storage = Storage::new(objects, Arc::clone(&self.spawner), Arc::new(self.wire.clone()));
    }

    pub(super) fn disks(&self) -> Vec<Arc<Blk>> {
        self.built().map(|vm| vm.disks()).unwrap_or_default()
    }

    /// Does what a monitor asks of the graph, now or as a job.
    pub(super) fn serve_storage(&mut self, request: StorageRequest, reply: Responder<Value>) {
        if !is_long(&request) {
            let result = self.change_storage(request);
            return reply.respond(result);
        }
        let reached = match &request {
            StorageRequest::Add(options) => self.reach_node(options),
            StorageRequest::Reopen(all) => all
                .iter()
                .try_for_each(|o| self.check_no_job_above(o.node_name.as_deref().unwrap_or_default())),
            StorageRequest::Resize(which, _) => self
                .storage
                .node_of(which, &self.disks())
                .and_then(|node| self.check_no_job_above(node.name())),
            _ => Ok(()),
        };
        if let Err(error) = reached.and_then(|()| self.idle()) {
            return reply.respond(Err(error));
        }
        let (storage, disks, vm) = (Arc::clone(&self.storage), self.disks(), self.built().cloned().ok());
        let reopened = matches!(request, StorageRequest::Reopen(_));
        let added = match &request {
            StorageRequest::Add(options) => Some((**options).clone()),
            _ => None,
        };
        let work = move || match request {
            StorageRequest::Add(options) => storage.add(&options),
            StorageRequest::Resize(which, size) => storage.resize(&which, size, &disks),
            StorageRequest::ServerStop => storage.stop_server(),
            StorageRequest::Reopen(all) => match vm {
                Some(vm) => vm.reopen(&all),
                None => all.iter().try_for_each(|options| storage.reopen(options)),
            },
            _ => Ok(()),
        };
        let reply = Arc::new(parking_lot::Mutex::new(Some(reply)));
        let answer = Arc::clone(&reply);
        let started = self.start_job("storage", work, move |manager, result| {
            if let (Ok(()), Some(options)) = (&result, added) {
                manager.config.blockdevs.get_or_insert_default().push(options);
            }
            if reopened {
                manager.note_reopened();
            }
            if let Some(reply) = answer.lock().take() {
                reply.respond(result.map(|()| json!({})));
            }
        });
        if let Err(error) = started
            && let Some(reply) = reply.lock().take()
        {
            reply.respond(Err(error));
        }
    }

    /// Fails if Landlock keeps the process from what a node's options name.
    fn reach_node(&self, options: &BlockdevOptions) -> Result<(), ControlError> {
        let config = VmConfig { blockdevs: Some(vec![options.clone()]), ..VmConfig::default() };
        confine::check(&self.options.sandbox, &config, None)
            .map_err(|e| ControlError::failed("The node is out of reach", e))
    }

    /// Writes down how nodes are opened now.
    fn note_reopened(&mut self) {
        for options in self.config.blockdevs.iter_mut().flatten() {
            let name = options.node_name.clone().unwrap_or_default();
            if let Ok(node) = self.storage.nodes().find(&name) {
                *options = self.storage.nodes().describe(&node);
            }
        }
    }

    fn delete_node(&mut self, name: &str) -> Result<(), ControlError> {
        self.check_no_job_on(name)?;
        self.storage.nodes().remove(name).map_err(refused)?;
        if let Some(all) = &mut self.config.blockdevs {
            all.retain(|o| o.node_name.as_deref() != Some(name));
        }
        Ok(())
    }

    fn change_storage(&mut self, request: StorageRequest) -> Result<Value, ControlError> {
        let disks = self.disks();
        let failed = |e: holdfast_objects::ObjectError| ControlError::new(ErrorKind::Failed, e.to_string());
        let storage = Arc::clone(&self.storage);
        let done = match request {
            StorageRequest::Nodes(flat) => return shown(&storage::named_nodes(&storage, flat)),
            StorageRequest::Block => return shown(&storage::block_info(&storage, &disks)),
            StorageRequest::Stats(nodes) => return shown(&storage::block_stats(&storage, &disks, nodes)),
            StorageRequest::Exports => return shown(&storage.exports()),
            StorageRequest::GetLimits(id) => return storage.limits(&id),
            StorageRequest::Jobs => return self.show_jobs(false),
            StorageRequest::BlockJobs => return self.show_jobs(true),
            StorageRequest::Mirror(options) => self.start_mirror(&options),
            StorageRequest::Job(id, verb, block) => self.ask_job(&id, verb, block),
            StorageRequest::Delete(name) => self.delete_node(&name),
            StorageRequest::Throttle(asked) => storage.set_throttle(&asked, &disks),
            StorageRequest::Histogram(set) => set_histogram(&set, &disks),
            StorageRequest::Threshold(name, offset) => {
                storage.nodes().find(&name).map_err(refused).map(|node| node.set_write_threshold(offset))
            }
            StorageRequest::ObjectAdd(options) => storage.objects().add(options).map_err(failed),
            StorageRequest::ObjectDelete(id) => storage.objects().remove(&id).map_err(failed),
            StorageRequest::SetLimits(id, limits) => storage.set_limits(&id, &limits),
            StorageRequest::ServerStart(options) => storage.start_server(&options),
            StorageRequest::ExportAdd(options) => storage.add_export(&options),
            StorageRequest::ExportDelete(id, hard) => storage.delete_export(&id, hard),
            StorageRequest::Add(_)
            | StorageRequest::Reopen(_)
            | StorageRequest::Resize(..)
            | StorageRequest::ServerStop => Ok(()),
        };
        done.map(|()| json!({}))
    }
}

/// What is shown, as JSON.
pub(super) fn shown<T: serde::Serialize>(what: &T) -> Result<Value, ControlError> {
    serde_json::to_value(what).map_err(|e| ControlError::failed("What was found cannot be shown", e))
}

fn set_histogram(set: &HistogramSet, disks: &[Arc<Blk>]) -> Result<(), ControlError> {
    let disk = find_disk(disks, &set.id)?;
    let none = Kind::ALL.iter().all(|kind| set.of(*kind).is_none());
    for kind in Kind::ALL {
        if let Some(boundaries) = set.of(kind) {
            let rises = boundaries.windows(2).all(|w| matches!(w, [a, b] if a < b));
            if boundaries.is_empty() || boundaries.first() == Some(&0) || !rises {
                let text =
                    format!("Device '{}' set {kind:?} boundaries fail: they must rise from above 0", set.id);
                return Err(ControlError::new(ErrorKind::Failed, text));
            }
        }
    }
    for kind in Kind::ALL {
        match set.of(kind) {
            Some(boundaries) => disk.set_histogram(kind, Some(boundaries.clone())),
            None if none => disk.set_histogram(kind, None),
            None => {}
        }
    }
    Ok(())
}
