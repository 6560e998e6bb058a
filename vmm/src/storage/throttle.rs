//! Rates of disks and groups.

use std::sync::Arc;

use holdfast_objects::ThrottleGroup;
use holdfast_objects::throttle::{Limits, NAMES, Rate};
use holdfast_virtio::blk::Blk;
use serde_json::{Map, Value, json};

use super::request::BlockIoThrottle;
use super::{Storage, failed, find_disk};
use crate::control::ControlError;

/// The rates that a request asks for.
fn limits(t: &BlockIoThrottle) -> Limits {
    let rate = |average: u64, max: Option<u64>, length: Option<u64>| Rate {
        average,
        max: max.unwrap_or(0),
        length: length.unwrap_or(1),
    };
    Limits {
        rates: [
            rate(t.bps, t.bps_max, t.bps_max_length),
            rate(t.bps_rd, t.bps_rd_max, t.bps_rd_max_length),
            rate(t.bps_wr, t.bps_wr_max, t.bps_wr_max_length),
            rate(t.iops, t.iops_max, t.iops_max_length),
            rate(t.iops_rd, t.iops_rd_max, t.iops_rd_max_length),
            rate(t.iops_wr, t.iops_wr_max, t.iops_wr_max_length),
        ],
        iops_size: t.iops_size.unwrap_or(0),
    }
}

impl Storage {
    /// Lets a disk keep to rates, alone or with others of its group.
    ///
    /// # Errors
    /// If there is no such disk, or the rates do not fit together.
    pub fn set_throttle(&self, asked: &BlockIoThrottle, disks: &[Arc<Blk>]) -> Result<(), ControlError> {
        let id = match (asked.device.as_deref().filter(|d| !d.is_empty()), &asked.id) {
            (Some(id), None) => id,
            (None, Some(id)) => id,
            _ => return Err(failed("Need exactly one of 'device' and 'id'")),
        };
        let disk = find_disk(disks, id)?;
        let limits = limits(asked);
        limits.check().map_err(|e| failed(e.to_string()))?;
        if limits.rates.iter().all(|r| r.average == 0) {
            disk.set_throttle(None);
            return Ok(());
        }
        let mut groups = self.groups.lock();
        // Nobody else can join a group that no disk is in.
        groups.retain(|_, group| disks.iter().any(|d| d.throttle().is_some_and(|g| Arc::ptr_eq(&g, group))));
        let current = disk.throttle();
        let joined = groups.iter().find(|(_, g)| current.as_ref().is_some_and(|c| Arc::ptr_eq(c, g)));
        let name = match (&asked.group, joined) {
            (Some(name), _) => name.clone(),
            (None, Some((name, _))) => name.clone(),
            (None, None) => disk.id().to_owned(),
        };
        let group = match self.objects().throttle(&name) {
            Ok(group) => group,
            Err(_) => Arc::clone(groups.entry(name).or_insert_with(|| ThrottleGroup::new(Limits::default()))),
        };
        group.set_limits(limits).map_err(|e| failed(e.to_string()))?;
        disk.set_throttle(Some(group));
        Ok(())
    }

    /// The name of the group of a disk.
    pub(super) fn group_name(&self, disk: &Blk) -> Option<String> {
        let group = disk.throttle()?;
        let groups = self.groups.lock();
        let own = groups.iter().find(|(_, g)| Arc::ptr_eq(g, &group)).map(|(name, _)| name.clone());
        drop(groups);
        own.or_else(|| {
            let ids = self.objects().list().into_iter().map(|(id, _)| id);
            ids.into_iter().find(|id| self.objects().throttle(id).is_ok_and(|g| Arc::ptr_eq(&g, &group)))
        })
    }

    /// Changes the rates of a `throttle-group` object: those that are named.
    ///
    /// # Errors
    /// If there is no such group, or the rates do not fit together.
    pub fn set_limits(&self, id: &str, new: &Map<String, Value>) -> Result<(), ControlError> {
        let group = self.objects().throttle(id).map_err(|e| failed(e.to_string()))?;
        let mut limits = group.limits();
        for (key, value) in new {
            let value = value.as_u64().ok_or_else(|| {
                failed(format!("Invalid parameter type for 'limits.{key}', expected: integer"))
            })?;
            if !limits.set(key, value) {
                return Err(failed(format!("Parameter 'limits.{key}' is unexpected")));
            }
        }
        group.set_limits(limits).map_err(|e| failed(e.to_string()))
    }

    /// The rates of a `throttle-group` object.
    ///
    /// # Errors
    /// If there is no such group.
    pub fn limits(&self, id: &str) -> Result<Value, ControlError> {
        let limits = self.objects().throttle(id).map_err(|e| failed(e.to_string()))?.limits();
        let mut out = Map::new();
        for (rate, name) in limits.rates.iter().zip(NAMES) {
            out.insert(name.to_owned(), json!(rate.average));
            out.insert(format!("{name}-max"), json!(rate.max));
            out.insert(format!("{name}-max-length"), json!(rate.length));
        }
        out.insert("iops-size".to_owned(), json!(limits.iops_size));
        Ok(Value::Object(out))
    }
}
