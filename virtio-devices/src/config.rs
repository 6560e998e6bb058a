//! What the configs of all virtio devices share.
//!
//! The structs mirror Cloud Hypervisor's JSON: the same field names, defaults and shapes. Unknown
//! fields are tolerated when reading and absent optional ones are omitted when writing. Fields that
//! name features which Holdfast does not have are parsed, so that `validate` can refuse them by name.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// A field whose value cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{field}`: {reason}")]
pub struct FieldError {
    /// The field's JSON name.
    pub field: &'static str,
    /// What is wrong with it and what would be right.
    pub reason: String,
}

impl FieldError {
    /// An error about `field`.
    pub fn new(field: &'static str, reason: impl Into<String>) -> Self {
        Self { field, reason: reason.into() }
    }
}

/// Largest number of queues of one kind that a device may have.
pub const MAX_QUEUES: u16 = 64;
/// Largest queue size (virtio 1.2 section 2.7 allows 32768; nothing gains from more than this).
pub const MAX_QUEUE_SIZE: u16 = 1024;

/// Binds the worker of a queue to host CPUs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct VirtQueueAffinity {
    /// Queue number, from 0.
    pub queue_index: u16,
    /// Host CPUs on which its worker may run.
    pub host_cpus: Vec<usize>,
}

/// Defines a token bucket with a maximum capacity and a refill interval.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct TokenBucket {
    /// The total number of tokens this bucket can hold.
    pub size: u64,
    /// The initial burst on top of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub one_time_burst: Option<u64>,
    /// Milliseconds it takes for the bucket to refill.
    pub refill_time: u64,
}

/// Independent limits of bytes and operations per second.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct RateLimiterConfig {
    /// Bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bandwidth: Option<TokenBucket>,
    /// Operations.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ops: Option<TokenBucket>,
}

/// Collects the errors of one config.
#[derive(Debug, Default)]
pub(crate) struct Checker(pub(crate) Vec<FieldError>);

impl Checker {
    pub(crate) fn refuse(&mut self, wrong: bool, field: &'static str, reason: impl Into<String>) {
        if wrong {
            self.0.push(FieldError::new(field, reason));
        }
    }

    /// Refuses a feature that is not there.
    pub(crate) fn unsupported(&mut self, set: bool, field: &'static str) {
        self.refuse(set, field, "not supported by this version");
    }

    /// Checks the fields that every PCI device has.
    pub(crate) fn pci(&mut self, iommu: bool, segment: u16, device: Option<u8>) {
        self.refuse(iommu, "iommu", "a virtual IOMMU is not supported by this version");
        self.refuse(segment != 0, "pci_segment", format!("there is no segment {segment}, only 0"));
        if let Some(device) = device {
            let reason = format!("{device} is not a free device number of the root bus: use 1 to 31");
            self.refuse(device == 0 || device > 31, "pci_device_id", reason);
        }
    }

    pub(crate) fn port(&mut self, bus: Option<&String>, device: Option<u8>) {
        let both = bus.is_some() && device.is_some();
        self.refuse(
            both,
            "pci_device_id",
            "does not go with `bus`: behind a hot-plug port there is one device",
        );
    }

    pub(crate) fn queue_size(&mut self, size: u16) {
        self.refuse(
            !size.is_power_of_two() || !(2..=MAX_QUEUE_SIZE).contains(&size),
            "queue_size",
            format!("{size} is not a power of two from 2 to {MAX_QUEUE_SIZE}"),
        );
    }
}

pub(crate) fn is_false(value: &bool) -> bool {
    !*value
}

pub(crate) fn yes() -> bool {
    true
}
