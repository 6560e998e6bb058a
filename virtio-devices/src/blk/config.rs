//! `--disk` and `DiskConfig`.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::policy::OnError;
use crate::config::{Checker, FieldError, MAX_QUEUES, RateLimiterConfig, VirtQueueAffinity, is_false, yes};

/// Largest serial number in bytes (virtio 1.2 section 5.2.6.1: VIRTIO_BLK_T_GET_ID).
pub const SERIAL_LEN: usize = 20;

/// The format of a disk image.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum ImageType {
    /// Fixed VHD.
    #[serde(alias = "vhd")]
    FixedVhd,
    /// QEMU's copy-on-write format.
    #[serde(alias = "qcow2")]
    Qcow2,
    /// The bytes of the disk and nothing else.
    #[serde(alias = "raw")]
    Raw,
    /// VHDX.
    #[serde(alias = "vhdx")]
    Vhdx,
    /// To be found out from the image.
    #[default]
    Unknown,
}

/// What is locked of an image file that is in use.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum LockGranularity {
    /// Its bytes.
    #[default]
    #[serde(alias = "byte-range")]
    ByteRange,
    /// The whole file, however it grows.
    #[serde(alias = "full")]
    Full,
}

/// A virtio block device.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct DiskConfig {
    /// Image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Name of the node that it shows, instead of `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// What is done when a read fails; `report` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rerror: Option<OnError>,
    /// What is done when a write fails; `enospc` if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub werror: Option<OnError>,
    /// The guest can read only.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// Behind the virtual IOMMU.
    #[serde(default)]
    pub iommu: bool,
    /// Number of request queues.
    #[serde(default = "one_queue")]
    pub num_queues: u16,
    /// Descriptors in each queue, a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
    /// Served by a vhost-user process.
    #[serde(default)]
    pub vhost_user: bool,
    /// Socket of the vhost-user process.
    #[serde(default, alias = "socket", skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-cli" = "socket"))]
    pub vhost_socket: Option<String>,
    /// Limits of bytes and operations per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter_config: Option<RateLimiterConfig>,
    /// Rate limit group that the disk belongs to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limit_group: Option<String>,
    /// Name of the device, unique in the VM.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub id: Option<String>,
    /// Serial number shown to the guest, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// PCI segment.
    #[serde(default)]
    pub pci_segment: u16,
    /// The hot-plug port that it is plugged into, instead of the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bus: Option<String>,
    /// PCI device number on the root bus.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pci_device_id: Option<u8>,
    /// Host CPUs for the queues' workers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_affinity: Option<Vec<VirtQueueAffinity>>,
    /// Follow references to backing files in the image; without it an image with such a reference is refused.
    #[serde(default)]
    pub backing_files: bool,
    /// Give discarded and zeroed ranges back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Format of the image; found out if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
    /// What is locked of the image file.
    #[serde(default)]
    pub lock_granularity: LockGranularity,
    /// Do not use io_uring.
    #[serde(default, alias = "_disable_io_uring", skip_serializing_if = "is_false")]
    pub disable_io_uring: bool,
    /// Accepted for compatibility: Linux AIO is never used.
    #[serde(default, alias = "_disable_aio", skip_serializing_if = "is_false")]
    pub disable_aio: bool,
}

fn one_queue() -> u16 {
    1
}

fn queue_size() -> u16 {
    128
}

impl Default for DiskConfig {
    fn default() -> Self {
        Self {
            path: None,
            node: None,
            rerror: None,
            werror: None,
            readonly: false,
            direct: false,
            iommu: false,
            num_queues: one_queue(),
            queue_size: queue_size(),
            vhost_user: false,
            vhost_socket: None,
            rate_limiter_config: None,
            rate_limit_group: None,
            id: None,
            serial: None,
            pci_segment: 0,
            bus: None,
            pci_device_id: None,
            queue_affinity: None,
            backing_files: false,
            sparse: true,
            image_type: None,
            lock_granularity: LockGranularity::default(),
            disable_io_uring: false,
            disable_aio: false,
        }
    }
}

impl DiskConfig {
    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        self.check_vhost_user(&mut check);
        check.unsupported(self.rate_limiter_config.is_some(), "rate_limiter_config");
        check.unsupported(self.rate_limit_group.is_some(), "rate_limit_group");
        self.check_affinity(&mut check);
        if let Some(kind) = self.image_type {
            let known = matches!(kind, ImageType::Raw | ImageType::Qcow2 | ImageType::Unknown);
            check.refuse(
                !known,
                "image_type",
                format!("{kind:?} images are not supported, only Raw and Qcow2"),
            );
        }
        check.pci(self.iommu, self.pci_segment, self.pci_device_id);
        check.queue_size(self.queue_size);
        let named = self.path.is_some() || self.node.is_some() || self.vhost_user;
        check.refuse(!named, "path", "is missing: name an image file, or a node");
        self.check_node(&mut check);
        check.refuse(
            !(1..=MAX_QUEUES).contains(&self.num_queues),
            "num_queues",
            format!("{} is not between 1 and {MAX_QUEUES}", self.num_queues),
        );
        if let Some(serial) = &self.serial {
            let reason = format!("`{serial}` is longer than {SERIAL_LEN} bytes");
            check.refuse(serial.len() > SERIAL_LEN, "serial", reason);
        }
        check.0
    }

    fn check_affinity(&self, check: &mut Checker) {
        let all = self.queue_affinity.as_deref().unwrap_or_default();
        for (i, one) in all.iter().enumerate() {
            let n = one.queue_index;
            let twice = all.iter().take(i).any(|other| other.queue_index == n);
            check.refuse(
                n >= self.num_queues,
                "queue_affinity",
                format!("names queue {n}, which is not there"),
            );
            check.refuse(twice, "queue_affinity", format!("names queue {n} twice"));
            check.refuse(one.host_cpus.is_empty(), "queue_affinity", format!("names no CPU for queue {n}"));
        }
    }

    /// What another process decides.
    fn check_vhost_user(&self, check: &mut Checker) {
        let socket = self.vhost_socket.as_deref().unwrap_or_default();
        if !self.vhost_user {
            check.refuse(self.vhost_socket.is_some(), "vhost_socket", "is of no use without `vhost_user`");
            return;
        }
        check.refuse(socket.is_empty(), "vhost_socket", "is missing: name the socket of the back end");
        let of_back_end = [
            ("path", self.path.is_some()),
            ("node", self.node.is_some()),
            ("direct", self.direct),
            ("serial", self.serial.is_some()),
            ("backing_files", self.backing_files),
            ("image_type", self.image_type.is_some()),
            ("lock_granularity", self.lock_granularity != LockGranularity::default()),
            ("rerror", self.rerror.is_some()),
            ("werror", self.werror.is_some()),
            ("queue_affinity", self.queue_affinity.as_ref().is_some_and(|a| !a.is_empty())),
        ];
        for (field, given) in of_back_end {
            check.refuse(given, field, "does not go with `vhost_user`: it is the back end's affair");
        }
    }

    /// What a node says by its own options.
    fn check_node(&self, check: &mut Checker) {
        if self.node.is_none() {
            return;
        }
        let of_image = [
            ("path", self.path.is_some()),
            ("direct", self.direct),
            ("backing_files", self.backing_files),
            ("image_type", self.image_type.is_some()),
            ("lock_granularity", self.lock_granularity != LockGranularity::default()),
            ("disable_io_uring", self.disable_io_uring),
        ];
        for (field, given) in of_image {
            check.refuse(given, field, "does not go with `node`: the node's own options say it");
        }
    }
}

/// A disk as QEMU's `-device virtio-blk-pci` and `device_add` describe it.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub struct QemuBlk {
    /// `virtio-blk-pci`, or another name of it.
    pub driver: String,
    /// Name of the device, unique in the VM.
    #[serde(default)]
    pub id: Option<String>,
    /// Name of the node that it shows.
    #[serde(default)]
    pub drive: Option<String>,
    /// Where it is plugged in: a hot-plug port.
    #[serde(default)]
    pub bus: Option<String>,
    /// Serial number shown to the guest, at most 20 bytes.
    #[serde(default)]
    pub serial: Option<String>,
    /// Number of request queues.
    #[serde(default)]
    pub num_queues: Option<u16>,
    /// Descriptors in each queue, a power of two.
    #[serde(default)]
    pub queue_size: Option<u16>,
    /// What is done when a read fails.
    #[serde(default)]
    pub rerror: Option<OnError>,
    /// What is done when a write fails.
    #[serde(default)]
    pub werror: Option<OnError>,
}

impl QemuBlk {
    /// The names of its driver.
    pub const DRIVERS: [&str; 4] =
        ["virtio-blk-pci", "virtio-blk-pci-non-transitional", "virtio-blk", "virtio-blk-device"];

    /// The same disk in the words of `--disk`.
    ///
    /// # Errors
    /// What is missing or not there, in QEMU's words.
    pub fn into_disk(self) -> Result<DiskConfig, String> {
        if !Self::DRIVERS.contains(&self.driver.as_str()) {
            return Err(format!("'{}' is not a valid device model name", self.driver));
        }
        let node = self.drive.ok_or("Device needs media, but drive is empty")?;
        let default = DiskConfig::default();
        Ok(DiskConfig {
            id: self.id,
            node: Some(node),
            bus: self.bus,
            serial: self.serial,
            num_queues: self.num_queues.unwrap_or(default.num_queues),
            queue_size: self.queue_size.unwrap_or(default.queue_size),
            rerror: self.rerror,
            werror: self.werror,
            ..default
        })
    }
}
