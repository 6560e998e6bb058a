//! Bodies of the migration requests.

use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Memory transfer mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum MigrationMode {
    /// All of RAM is at the destination before the guest runs there.
    #[default]
    #[serde(alias = "precopy")]
    Precopy,
    /// The guest runs at the destination first, and its pages follow as it touches them.
    #[serde(alias = "postcopy")]
    Postcopy,
    /// A pass while the guest runs, then as `Postcopy`, unless what is left fits into the downtime.
    Hybrid,
}

/// What happens when the time of a migration is up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub enum TimeoutStrategy {
    /// The VM goes on at the source.
    #[default]
    #[serde(alias = "cancel")]
    Cancel,
    /// The VM moves, however long it stands for that.
    #[serde(alias = "ignore")]
    Ignore,
}

fn downtime() -> u64 {
    300
}

fn timeout() -> u64 {
    3600
}

fn one() -> u32 {
    1
}

/// Where a VM goes, and how.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH` at which the destination receives, or `file:PATH` to store the VM in.
    #[schemars(extend("x-positional" = true))]
    pub destination_url: String,
    /// The destination is on this host and takes RAM over by its file descriptors (`unix:` and `--memory shared=on`).
    #[serde(default)]
    pub local: bool,
    /// Holdfast stays, with the paused VM, when the VM has moved; otherwise it ends.
    #[serde(default)]
    pub preserve_source: bool,
    /// How long the guest should stand at most, in milliseconds.
    #[serde(default = "downtime")]
    #[schemars(range(min = 1))]
    pub downtime_ms: u64,
    /// How long all may take, in seconds.
    #[serde(default = "timeout")]
    #[schemars(range(min = 1))]
    pub timeout_s: u64,
    /// What happens then.
    #[serde(default)]
    pub timeout_strategy: TimeoutStrategy,
    /// Parallel connections that carry RAM.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 128))]
    pub connections: u32,
    /// Directory with `ca-cert.pem`, `client-cert.pem` and `client-key.pem`: TLS is used (`tcp:` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// When RAM moves.
    #[serde(default)]
    pub memory_mode: MigrationMode,
    /// Bytes a second of all connections together; 0 for as many as there can be.
    #[serde(default)]
    pub bandwidth: u64,
    /// Slow vCPUs that write faster than RAM can be sent.
    #[serde(default)]
    pub auto_converge: bool,
    /// The contents of writable disks go along: the destination has other storage. Images (raw, qcow2) that are not there are made.
    #[serde(default)]
    pub mirror_disks: bool,
    /// RAM bypasses the page cache on its way into a file (`file:` only).
    #[serde(default)]
    pub direct_io: bool,
    /// Compress RAM with zstd at this level.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 19))]
    pub zstd_level: Option<i32>,
}

/// Where a VM comes in.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ReceiveMigrationData {
    /// `tcp:HOST:PORT` or `unix:PATH` at which to listen, or `file:PATH` with a stored VM.
    #[schemars(extend("x-positional" = true))]
    pub receiver_url: String,
    /// Directory with `ca-cert.pem`, `server-cert.pem` and `server-key.pem`: TLS is insisted on (`tcp:` only).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tls_dir: Option<PathBuf>,
    /// When RAM moves. The source decides; it must not be `Precopy` for a source that wants another.
    #[serde(default)]
    pub memory_mode: MigrationMode,
    /// Accelerators to try instead of those of the VM at the source.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub accel: Option<crate::AccelChoice>,
}

/// How a post-copy migration whose connections were lost goes on. One of the two is given.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct RecoverMigrationData {
    /// At the destination, which comes first: `tcp:HOST:PORT` or `unix:PATH` at which to listen.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub receiver_url: Option<String>,
    /// At the source: where the destination listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub destination_url: Option<String>,
}

impl SendMigrationData {
    /// What is wrong with the numbers, if anything.
    ///
    /// # Errors
    /// Naming the field.
    pub fn check(&self) -> Result<(), String> {
        if !(1..=128).contains(&self.connections) {
            return Err(format!("`connections` is {}; it must be from 1 to 128", self.connections));
        }
        if self.local && self.connections != 1 {
            return Err("`connections` must be 1 with `local`".to_owned());
        }
        if self.downtime_ms == 0 {
            return Err("`downtime_ms` is 0; it must be at least 1".to_owned());
        }
        if self.timeout_s == 0 {
            return Err("`timeout_s` is 0; it must be at least 1".to_owned());
        }
        match self.zstd_level {
            Some(level) if !(1..=19).contains(&level) => {
                Err(format!("`zstd_level` is {level}; it must be from 1 to 19"))
            }
            _ => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_cloud_hypervisors_and_unknown_fields_are_named() {
        let data: SendMigrationData =
            serde_json::from_str(r#"{"destination_url":"unix:/m"}"#).expect("enough");
        assert_eq!((data.downtime_ms, data.timeout_s, data.connections), (300, 3600, 1));
        assert_eq!(data.timeout_strategy, TimeoutStrategy::Cancel);
        data.check().expect("good");
        let many = SendMigrationData { connections: 129, ..data.clone() };
        assert!(many.check().expect_err("too many").contains("`connections` is 129"));
        let local = SendMigrationData { local: true, connections: 2, ..data };
        local.check().expect_err("together");
        let zones = r#"{"receiver_url":"unix:/m","zone_updates":[]}"#;
        let error = serde_json::from_str::<ReceiveMigrationData>(zones).expect_err("not there").to_string();
        assert!(error.contains("zone_updates"), "{error}");
    }
}
