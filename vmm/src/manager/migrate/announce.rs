//! Telling the network where a VM is.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use holdfast_threads::Role;

use super::super::Manager;
use super::invalid;
use crate::control::{AnnounceParameters, ControlError};

/// The announcements under way, by their names; each ends when its flag is set.
#[derive(Debug, Default)]
pub(super) struct Announcements(BTreeMap<String, Arc<AtomicBool>>);

impl AnnounceParameters {
    /// Fails with QEMU's words if a number is out of range.
    pub(super) fn check(&self) -> Result<(), ControlError> {
        for (name, value, range) in [
            ("announce_initial", self.initial, 0..=100_000),
            ("announce_max", self.max, 0..=100_000),
            ("announce_rounds", self.rounds, 0..=1000),
            ("announce_step", self.step, 0..=10_000),
        ] {
            if !range.contains(&value) {
                let text = format!("Parameter '{name}' expects a value between 0 and {}", range.end());
                return Err(invalid(text));
            }
        }
        Ok(())
    }

    /// How long to wait behind the time number `round`, which begins with 0.
    fn wait(&self, round: u64) -> Duration {
        Duration::from_millis((self.initial + round * self.step).min(self.max))
    }
}

impl Manager {
    /// Announces the VM on a thread of its own.
    pub(in super::super) fn announce(&mut self, how: AnnounceParameters) -> Result<(), ControlError> {
        how.check()?;
        let vm = Arc::downgrade(self.built()?);
        if how.rounds == 0 {
            return Ok(());
        }
        let over = Arc::new(AtomicBool::new(false));
        let name = how.id.clone().unwrap_or_default();
        if let Some(before) = self.migration.announcements.0.insert(name, Arc::clone(&over)) {
            before.store(true, Ordering::Release);
        }
        let body = move || {
            for round in 0..how.rounds {
                let Some(vm) = vm.upgrade().filter(|_| !over.load(Ordering::Acquire)) else { return };
                let named = |id: &str| how.interfaces.as_ref().is_none_or(|ids| ids.iter().any(|i| i == id));
                vm.devices().iter().filter(|d| named(d.id())).for_each(|d| d.announce());
                drop(vm);
                if round + 1 < how.rounds {
                    std::thread::sleep(how.wait(round));
                }
            }
        };
        let started = self.spawner.spawn("announce", Role::Migration, Box::new(body));
        started.map(drop).map_err(|e| ControlError::failed("No thread for announcements", e))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn waits_get_longer_up_to_the_limit() {
        let how = AnnounceParameters::default();
        how.check().expect("QEMU's defaults");
        let waits: Vec<_> = (0..7).map(|round| how.wait(round).as_millis()).collect();
        assert_eq!(waits, [50, 150, 250, 350, 450, 550, 550]);
        AnnounceParameters { rounds: 1001, ..how }.check().expect_err("too many");
    }
}
