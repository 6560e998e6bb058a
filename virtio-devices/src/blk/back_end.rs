//! `holdfast blk-backend`: a disk for the VM of another process.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::config::{DiskConfig, ImageType};
use super::policy::OnError;
use crate::config::{Checker, FieldError, yes};

/// A disk that is served to other processes by vhost-user.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct BlkBackEndConfig {
    /// The UNIX socket on which front ends connect.
    pub socket: PathBuf,
    /// Connect to `socket`, on which the front end listens.
    #[serde(default)]
    pub client: bool,
    /// Image file or block device.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<PathBuf>,
    /// Name of the node (`--blockdev`) that it shows, instead of `path`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// The guest can read only.
    #[serde(default)]
    pub readonly: bool,
    /// Bypass the host's page cache (O_DIRECT).
    #[serde(default)]
    pub direct: bool,
    /// Most request queues that a front end may use.
    #[serde(default = "one")]
    pub num_queues: u16,
    /// Most descriptors in each queue, a power of two.
    #[serde(default = "queue_size")]
    pub queue_size: u16,
    /// Serial number shown to the guest, at most 20 bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub serial: Option<String>,
    /// Follow references to backing files in the image; without it an image with such a reference is refused.
    #[serde(default)]
    pub backing_files: bool,
    /// Give discarded and zeroed ranges back to the host.
    #[serde(default = "yes")]
    pub sparse: bool,
    /// Format of the image; found out if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image_type: Option<ImageType>,
}

fn one() -> u16 {
    1
}

fn queue_size() -> u16 {
    128
}

impl BlkBackEndConfig {
    /// The same disk in the words of `--disk`.
    pub fn disk(&self) -> DiskConfig {
        DiskConfig {
            path: self.path.clone(),
            node: self.node.clone(),
            readonly: self.readonly,
            direct: self.direct,
            num_queues: self.num_queues,
            queue_size: self.queue_size,
            serial: self.serial.clone().or_else(|| Some(String::new())),
            backing_files: self.backing_files,
            sparse: self.sparse,
            image_type: self.image_type,
            // There is no VM here that could stop.
            rerror: Some(OnError::Report),
            werror: Some(OnError::Report),
            id: Some("disk".to_owned()),
            ..DiskConfig::default()
        }
    }

    /// All fields that cannot be used.
    pub fn validate(&self) -> Vec<FieldError> {
        let mut check = Checker::default();
        check.refuse(self.socket.as_os_str().is_empty(), "socket", "is empty: name a UNIX socket");
        check.0.extend(self.disk().validate());
        check.0
    }
}
