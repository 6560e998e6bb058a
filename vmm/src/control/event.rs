//! What the VM tells everyone.

use std::fmt;
use std::sync::Arc;
use std::sync::mpsc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use holdfast_virtio::blk::policy::IoFailure;
use parking_lot::Mutex;
use serde_json::{Map, Value, json};

/// Who caused a shutdown or reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// The guest asked its machine for it.
    Guest,
    /// The guest panicked or faulted.
    GuestPanic,
    /// Somebody asked over an API.
    Host,
    /// Somebody quit the process (`quit`, `vmm.shutdown`, Ctrl-A x).
    HostQuit,
    /// A signal (SIGTERM, SIGINT).
    HostSignal,
    /// Holdfast itself failed.
    HostError,
}

impl Origin {
    /// Whether the guest did it.
    pub fn is_guest(self) -> bool {
        matches!(self, Self::Guest | Self::GuestPanic)
    }

    fn shutdown_cause(self) -> &'static str {
        match self {
            Self::Guest => "guest-shutdown",
            Self::GuestPanic => "guest-panic",
            Self::Host => "host-qmp-system-reset",
            Self::HostQuit => "host-qmp-quit",
            Self::HostSignal => "host-signal",
            Self::HostError => "host-error",
        }
    }

    fn reset_cause(self) -> &'static str {
        match self {
            Self::Guest => "guest-reset",
            other => other.shutdown_cause(),
        }
    }
}

/// How far a block job is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BlockJobFacts {
    /// Its id.
    pub device: String,
    /// Bytes in all, as far as is known.
    pub len: u64,
    /// Bytes of them that are done.
    pub offset: u64,
    /// Most bytes a second; 0 for no limit.
    pub speed: u64,
}

/// Something that happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The process is up.
    VmmStarting,
    /// The process is about to end.
    VmmShutdown,
    /// The VM is being built.
    Booting,
    /// vCPUs run.
    Booted,
    /// The VM is about to pause.
    Pausing,
    /// No vCPU runs. QMP `STOP`.
    Paused,
    /// The VM is about to run again.
    Resuming,
    /// vCPUs run again. QMP `RESUME`.
    Resumed,
    /// The VM is off. QMP `SHUTDOWN`.
    Shutdown(Origin),
    /// The VM is about to restart.
    Rebooting,
    /// The VM has restarted. QMP `RESET`.
    Rebooted(Origin),
    /// The VM is gone.
    Deleted,
    /// A resize has begun.
    Resizing,
    /// A resize has ended.
    Resized,
    /// A snapshot has begun.
    Snapshotting,
    /// A snapshot is complete.
    Snapshotted,
    /// A restore has begun.
    Restoring,
    /// A restore is complete.
    Restored,
    /// A migration to elsewhere has begun.
    MigrationStarted,
    /// The VM has moved elsewhere.
    MigrationFinished,
    /// A migration to elsewhere has failed.
    MigrationFailed,
    /// A VM that comes from elsewhere is waited for.
    MigrationReceiveStarted,
    /// A VM has come from elsewhere.
    MigrationReceiveFinished,
    /// No VM has come from elsewhere.
    MigrationReceiveFailed,
    /// A migration's status, in QEMU's words. QMP `MIGRATION`.
    MigrationStatus(&'static str),
    /// A pass over RAM has begun. QMP `MIGRATION_PASS`.
    MigrationPass(u64),
    /// The power button was pressed. QMP `POWERDOWN`.
    PowerButton,
    /// The guest's driver has started a virtio device.
    DeviceActivated {
        /// Identifier of the device.
        id: String,
    },
    /// The guest's driver has reset a virtio device.
    DeviceReset {
        /// Identifier of the device.
        id: String,
    },
    /// The guest's kernel has panicked.
    GuestPanic,
    /// A vCPU's thread has been made.
    CreateVcpu {
        /// The vCPU.
        id: u32,
    },
    /// A device is gone. QMP `DEVICE_DELETED`.
    DeviceDeleted {
        /// Its identifier.
        id: String,
    },
    /// A disk's request failed. QMP `BLOCK_IO_ERROR`.
    BlockIoError(IoFailure),
    /// A disk's image is damaged. QMP `BLOCK_IMAGE_CORRUPTED`.
    BlockImageCorrupted {
        /// Name of the node.
        node: String,
        /// What is wrong.
        message: String,
    },
    /// A write went past a threshold. QMP `BLOCK_WRITE_THRESHOLD`.
    BlockWriteThreshold {
        /// Name of the node.
        node: String,
        /// How many bytes past it.
        exceeded: u64,
        /// The threshold in bytes.
        threshold: u64,
    },
    /// A block export is gone. QMP `BLOCK_EXPORT_DELETED`.
    BlockExportDeleted {
        /// Its identifier.
        id: String,
    },
    /// A job is at something else now. QMP `JOB_STATUS_CHANGE`.
    JobStatusChange {
        /// Its id.
        id: String,
        /// QEMU's word for what it is at.
        status: &'static str,
    },
    /// A mirror's target is like its source. QMP `BLOCK_JOB_READY`.
    BlockJobReady(BlockJobFacts),
    /// A block job has ended, with an error if there is one. QMP `BLOCK_JOB_COMPLETED`.
    BlockJobCompleted(BlockJobFacts, Option<String>),
    /// A block job was ended. QMP `BLOCK_JOB_CANCELLED`.
    BlockJobCancelled(BlockJobFacts),
    /// A block job cannot read, or if `write` cannot write, and ends. QMP `BLOCK_JOB_ERROR`.
    BlockJobError {
        /// Its id.
        device: String,
        /// It could not write.
        write: bool,
    },
    /// A block job waits to be finalized. QMP `BLOCK_JOB_PENDING`.
    BlockJobPending {
        /// Its id.
        id: String,
    },
}

impl Event {
    /// `source`, `event` and `properties` in Cloud Hypervisor's event monitor, if it is one there.
    pub fn monitor(&self) -> Option<(&'static str, &'static str, Option<Value>)> {
        let vm = |event| Some(("vm", event, None));
        match self {
            Self::VmmStarting => Some(("vmm", "starting", None)),
            Self::VmmShutdown => Some(("vmm", "shutdown", None)),
            Self::Booting => vm("booting"),
            Self::Booted => vm("booted"),
            Self::Pausing => vm("pausing"),
            Self::Paused => vm("paused"),
            Self::Resuming => vm("resuming"),
            Self::Resumed => vm("resumed"),
            Self::Shutdown(_) => vm("shutdown"),
            Self::Rebooting => vm("rebooting"),
            Self::Rebooted(_) => vm("rebooted"),
            Self::Deleted => vm("deleted"),
            Self::Resizing => vm("resizing"),
            Self::Resized => vm("resized"),
            Self::Snapshotting => vm("snapshotting"),
            Self::Snapshotted => vm("snapshotted"),
            Self::Restoring => vm("restoring"),
            Self::Restored => vm("restored"),
            Self::MigrationStarted => vm("migration-started"),
            Self::MigrationFinished => vm("migration-finished"),
            Self::MigrationFailed => vm("migration-failed"),
            Self::MigrationReceiveStarted => vm("migration-receive-started"),
            Self::MigrationReceiveFinished => vm("migration-receive-finished"),
            Self::MigrationReceiveFailed => vm("migration-receive-failed"),
            Self::PowerButton | Self::MigrationStatus(_) | Self::MigrationPass(_) => None,
            Self::DeviceActivated { id } => Some(("virtio-device", "activated", Some(json!({ "id": id })))),
            Self::DeviceReset { id } => Some(("virtio-device", "reset", Some(json!({ "id": id })))),
            Self::DeviceDeleted { id } => Some(("vm", "device-deleted", Some(json!({ "id": id })))),
            Self::BlockIoError(_)
            | Self::BlockImageCorrupted { .. }
            | Self::BlockWriteThreshold { .. }
            | Self::BlockExportDeleted { .. }
            | Self::JobStatusChange { .. }
            | Self::BlockJobReady(_)
            | Self::BlockJobCompleted(..)
            | Self::BlockJobCancelled(_)
            | Self::BlockJobError { .. }
            | Self::BlockJobPending { .. } => self.qmp().map(|(name, data)| ("block", name, data)),
            Self::GuestPanic => Some(("guest", "panic", None)),
            Self::CreateVcpu { id } => {
                Some(("cpu_manager", "create_vcpu", Some(json!({ "id": id.to_string() }))))
            }
        }
    }

    /// Name and data of the QMP event, if it is one.
    pub fn qmp(&self) -> Option<(&'static str, Option<Value>)> {
        let caused = |origin: Origin, reason| json!({ "guest": origin.is_guest(), "reason": reason });
        match self {
            Self::Paused => Some(("STOP", None)),
            Self::Resumed => Some(("RESUME", None)),
            Self::Shutdown(origin) => Some(("SHUTDOWN", Some(caused(*origin, origin.shutdown_cause())))),
            Self::Rebooted(origin) => Some(("RESET", Some(caused(*origin, origin.reset_cause())))),
            Self::PowerButton => Some(("POWERDOWN", None)),
            Self::MigrationStatus(status) => Some(("MIGRATION", Some(json!({ "status": status })))),
            Self::MigrationPass(pass) => Some(("MIGRATION_PASS", Some(json!({ "pass": pass })))),
            Self::GuestPanic => Some(("GUEST_PANICKED", Some(json!({ "action": "pause" })))),
            Self::DeviceDeleted { id } => {
                let path = format!("/machine/peripheral/{id}");
                Some(("DEVICE_DELETED", Some(json!({ "device": id, "path": path }))))
            }
            Self::BlockIoError(failure) => Some(("BLOCK_IO_ERROR", Some(io_error(failure)))),
            Self::BlockImageCorrupted { node, message } => {
                let data = json!({ "device": "", "node-name": node, "msg": message, "fatal": true });
                Some(("BLOCK_IMAGE_CORRUPTED", Some(data)))
            }
            Self::BlockWriteThreshold { node, exceeded, threshold } => {
                let data = json!({
                    "node-name": node, "amount-exceeded": exceeded, "write-threshold": threshold,
                });
                Some(("BLOCK_WRITE_THRESHOLD", Some(data)))
            }
            Self::BlockExportDeleted { id } => Some(("BLOCK_EXPORT_DELETED", Some(json!({ "id": id })))),
            Self::JobStatusChange { id, status } => {
                Some(("JOB_STATUS_CHANGE", Some(json!({ "id": id, "status": status }))))
            }
            Self::BlockJobReady(facts) => Some(("BLOCK_JOB_READY", Some(job_facts(facts, None)))),
            Self::BlockJobCompleted(facts, error) => {
                Some(("BLOCK_JOB_COMPLETED", Some(job_facts(facts, error.as_deref()))))
            }
            Self::BlockJobCancelled(facts) => Some(("BLOCK_JOB_CANCELLED", Some(job_facts(facts, None)))),
            Self::BlockJobError { device, write } => {
                let operation = if *write { "write" } else { "read" };
                let data = json!({ "device": device, "operation": operation, "action": "report" });
                Some(("BLOCK_JOB_ERROR", Some(data)))
            }
            Self::BlockJobPending { id } => {
                Some(("BLOCK_JOB_PENDING", Some(json!({ "type": "mirror", "id": id }))))
            }
            _ => None,
        }
    }
}

/// The data of `BLOCK_IO_ERROR`.
fn io_error(failure: &IoFailure) -> Value {
    json!({
        "qom-path": format!("/machine/peripheral/{}/virtio-backend", failure.id),
        "device": "",
        "node-name": failure.node,
        "operation": if failure.write { "write" } else { "read" },
        "action": failure.action.name(),
        "nospace": failure.nospace,
        "reason": failure.reason,
    })
}

/// The data of events of block jobs.
fn job_facts(facts: &BlockJobFacts, error: Option<&str>) -> Value {
    let BlockJobFacts { device, len, offset, speed } = facts;
    let mut data =
        json!({ "type": "mirror", "device": device, "len": len, "offset": offset, "speed": speed });
    if let (Some(object), Some(error)) = (data.as_object_mut(), error) {
        object.insert("error".to_owned(), error.into());
    }
    data
}

/// An event and when it happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TimedEvent {
    /// What happened.
    pub event: Event,
    /// When, since the process started.
    pub since_start: Duration,
    /// When, since 1970-01-01 UTC.
    pub wall: Duration,
}

impl TimedEvent {
    /// The object of Cloud Hypervisor's event monitor.
    pub fn to_monitor(&self) -> Option<Value> {
        let (source, event, properties) = self.event.monitor()?;
        let since = self.since_start;
        let mut object = Map::new();
        object.insert(
            "timestamp".to_owned(),
            json!({ "secs": since.as_secs(), "nanos": since.subsec_nanos() }),
        );
        object.insert("source".to_owned(), source.into());
        object.insert("event".to_owned(), event.into());
        object.insert("properties".to_owned(), properties.unwrap_or(Value::Null));
        Some(Value::Object(object))
    }

    /// The QMP event message.
    pub fn to_qmp(&self) -> Option<Value> {
        let (name, data) = self.event.qmp()?;
        let mut object = Map::new();
        let timestamp = json!({ "seconds": self.wall.as_secs(), "microseconds": self.wall.subsec_micros() });
        object.insert("timestamp".to_owned(), timestamp);
        object.insert("event".to_owned(), name.into());
        if let Some(data) = data {
            object.insert("data".to_owned(), data);
        }
        Some(Value::Object(object))
    }
}

type Listener = Box<dyn FnMut(&Arc<TimedEvent>) -> bool + Send>;

/// Carries events from the manager to everyone who listens. Clones share the listeners.
#[derive(Clone)]
pub struct EventBus {
    start: Instant,
    listeners: Arc<Mutex<Vec<Listener>>>,
}

impl fmt::Debug for EventBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventBus").finish_non_exhaustive()
    }
}

impl Default for EventBus {
    fn default() -> Self {
        Self { start: Instant::now(), listeners: Arc::default() }
    }
}

impl EventBus {
    /// A bus without listeners; time starts now.
    pub fn new() -> Self {
        Self::default()
    }

    /// Tells everyone. Listeners must not block.
    pub fn publish(&self, event: Event) {
        // Events are stamped with the host's time: they are for people and logs, not for the guest.
        let wall = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let timed = Arc::new(TimedEvent { event, since_start: self.start.elapsed(), wall });
        tracing::debug!(event = ?timed.event, "event");
        self.listeners.lock().retain_mut(|listener| listener(&timed));
    }

    /// Calls `listener` for every event until it returns false. It runs on the publisher's thread and
    /// must neither block nor publish.
    pub fn listen(&self, listener: impl FnMut(&Arc<TimedEvent>) -> bool + Send + 'static) {
        self.listeners.lock().push(Box::new(listener));
    }

    /// A channel that gets every event from now on.
    pub fn subscribe(&self) -> mpsc::Receiver<Arc<TimedEvent>> {
        let (sender, receiver) = mpsc::channel();
        self.listen(move |event| sender.send(event.clone()).is_ok());
        receiver
    }
}
