//! `throttle-group` objects: rates that several users share.
//!
//! Each rate is a leaky bucket. Requests fill it with their units (bytes, or operations) and it leaks at the rate; while it is fuller
//! than a tenth of a second's worth, requests wait. With a burst, the bucket holds as much as the burst lasts, and a second, small
//! one that leaks at the burst's rate limits that.

use std::sync::Arc;
use std::time::Duration;

use parking_lot::{Mutex, RwLock};

use crate::{Fields, ObjectError, bad};

/// Largest rate or burst.
const MAX: u64 = 1_000_000_000_000_000;
/// Rates in the order of [`Limits::rates`], as options name them.
pub const NAMES: [&str; 6] = ["bps-total", "bps-read", "bps-write", "iops-total", "iops-read", "iops-write"];

/// One rate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rate {
    /// Units a second; 0 for no limit.
    pub average: u64,
    /// Units a second in a burst; 0 for no bursts.
    pub max: u64,
    /// How long a burst may last, in seconds.
    pub length: u64,
}

impl Default for Rate {
    fn default() -> Self {
        Self { average: 0, max: 0, length: 1 }
    }
}

/// All rates.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Limits {
    /// In the order of [`NAMES`].
    pub rates: [Rate; 6],
    /// Bytes that count as one operation; larger requests count as several. 0 if all count as one.
    pub iops_size: u64,
}

impl Limits {
    /// Says what does not fit together.
    ///
    /// # Errors
    /// [`ObjectError::Option`].
    pub fn check(&self) -> Result<(), ObjectError> {
        for kind in [0, 3] {
            let at = |n: usize| self.rates.get(kind + n).copied().unwrap_or_default();
            let (total, read, write) = (at(0), at(1), at(2));
            if total.average != 0 && (read.average != 0 || write.average != 0) {
                return Err(bad(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                ));
            }
            if total.max != 0 && (read.max != 0 || write.max != 0) {
                return Err(bad(
                    "bps/iops/max total values and read/write values cannot be used at the same time",
                ));
            }
        }
        let operations = self.rates.iter().skip(3).any(|r| r.average != 0);
        if self.iops_size != 0 && !operations {
            return Err(bad("iops size requires an iops value to be set"));
        }
        for rate in &self.rates {
            if rate.average > MAX || rate.max > MAX {
                return Err(bad(format!("bps/iops/max values must be within [0, {MAX}]")));
            }
            if rate.length == 0 {
                return Err(bad("the burst length cannot be 0"));
            }
            if rate.length > 1 && rate.max == 0 {
                return Err(bad("burst length set without burst rate"));
            }
            if rate.max != 0 && rate.average == 0 {
                return Err(bad("bps_max/iops_max require corresponding bps/iops values"));
            }
            if rate.max != 0 && rate.max < rate.average {
                return Err(bad("bps_max/iops_max cannot be lower than bps/iops"));
            }
            if rate.max.checked_mul(rate.length).is_none_or(|n| n > MAX) {
                return Err(bad("burst length too high for this burst rate"));
            }
        }
        Ok(())
    }

    /// Sets a rate by its option's name: `NAME`, `NAME-max`, `NAME-max-length` or `iops-size`. False if there is none.
    pub fn set(&mut self, key: &str, value: u64) -> bool {
        if key == "iops-size" {
            self.iops_size = value;
            return true;
        }
        for (rate, name) in self.rates.iter_mut().zip(NAMES) {
            match key.strip_prefix(name) {
                Some("") => rate.average = value,
                Some("-max") => rate.max = value,
                Some("-max-length") => rate.length = value,
                _ => continue,
            }
            return true;
        }
        false
    }

    pub(crate) fn from_fields(fields: &mut Fields) -> Result<Self, ObjectError> {
        let mut limits = Self::default();
        let names =
            NAMES.iter().flat_map(|n| [(*n).to_owned(), format!("{n}-max"), format!("{n}-max-length")]);
        for name in names.chain(["iops-size".to_owned()]) {
            for key in [format!("limits.{name}"), format!("x-{name}")] {
                if let Some(value) = fields.number(&key)? {
                    limits.set(&name, value);
                }
            }
        }
        limits.check().map(|()| limits)
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Bucket {
    level: f64,
    burst: f64,
}

impl Bucket {
    fn leak(&mut self, rate: &Rate, seconds: f64) {
        self.level = (self.level - rate.average as f64 * seconds).max(0.0);
        self.burst = (self.burst - rate.max as f64 * seconds).max(0.0);
    }

    /// Seconds until a request may pass.
    fn wait(&self, rate: &Rate) -> f64 {
        if rate.average == 0 {
            return 0.0;
        }
        let average = rate.average as f64;
        if rate.max == 0 {
            return (self.level - average / 10.0).max(0.0) / average;
        }
        let max = rate.max as f64;
        let long = (self.level - max * rate.length as f64).max(0.0) / average;
        let short = if rate.length > 1 { (self.burst - max / 10.0).max(0.0) / max } else { 0.0 };
        long.max(short)
    }
}

#[derive(Debug, Default)]
struct Levels {
    buckets: [Bucket; 6],
    /// When they last leaked, in nanoseconds.
    at: u64,
}

/// Rates, and how much of them is used.
#[derive(Debug, Default)]
pub struct ThrottleGroup {
    limits: RwLock<Limits>,
    levels: Mutex<Levels>,
    /// Requests pass in their order, reads and writes apart.
    turns: [Mutex<()>; 2],
}

impl ThrottleGroup {
    /// A group with these rates.
    pub fn new(limits: Limits) -> Arc<Self> {
        Arc::new(Self { limits: RwLock::new(limits), ..Self::default() })
    }

    /// The rates.
    pub fn limits(&self) -> Limits {
        *self.limits.read()
    }

    /// Changes the rates, at once.
    ///
    /// # Errors
    /// As [`Limits::check`].
    pub fn set_limits(&self, limits: Limits) -> Result<(), ObjectError> {
        limits.check()?;
        *self.limits.write() = limits;
        Ok(())
    }

    /// Takes a request of `bytes` in at `now` (nanoseconds), or says how many nanoseconds it has to wait first.
    pub fn admit(&self, write: bool, bytes: u64, now: u64) -> Result<(), u64> {
        let limits = self.limits();
        let own = usize::from(write) + 1;
        let mine = |n: usize| n.is_multiple_of(3) || n % 3 == own;
        let mut levels = self.levels.lock();
        let seconds = now.saturating_sub(levels.at) as f64 / 1e9;
        levels.at = levels.at.max(now);
        let mut wait = 0f64;
        for (n, (bucket, rate)) in levels.buckets.iter_mut().zip(&limits.rates).enumerate() {
            bucket.leak(rate, seconds);
            if mine(n) {
                wait = wait.max(bucket.wait(rate));
            }
        }
        if wait > 0.0 {
            return Err(((wait * 1e9) as u64).max(1));
        }
        let operations =
            if limits.iops_size == 0 { 1.0 } else { (bytes as f64 / limits.iops_size as f64).max(1.0) };
        for (n, bucket) in levels.buckets.iter_mut().enumerate().filter(|(n, _)| mine(*n)) {
            let units = if n < 3 { bytes as f64 } else { operations };
            bucket.level += units;
            bucket.burst += units;
        }
        Ok(())
    }

    /// Waits until a request of `bytes` may pass.
    pub fn pass(&self, write: bool, bytes: u64) {
        let turn = if write { &self.turns[1] } else { &self.turns[0] };
        let _turn = turn.lock();
        while let Err(wait) = self.admit(write, bytes, holdfast_clock::host_monotonic()) {
            // Rates may change meanwhile.
            std::thread::sleep(Duration::from_nanos(wait.min(100_000_000)));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Operations of 4096 bytes that pass in `seconds` of virtual time, from `from` on.
    fn passed(group: &ThrottleGroup, from: u64, seconds: u64) -> u64 {
        let (mut now, mut count) = (from * 1_000_000_000, 0);
        let end = (from + seconds) * 1_000_000_000;
        while now < end {
            match group.admit(false, 4096, now) {
                Ok(()) => count += 1,
                Err(wait) => now += wait,
            }
        }
        count
    }

    fn group(set: &[(&str, u64)]) -> Arc<ThrottleGroup> {
        let mut limits = Limits::default();
        set.iter().for_each(|(key, value)| assert!(limits.set(key, *value)));
        limits.check().expect("limits");
        ThrottleGroup::new(limits)
    }

    fn close(a: u64, b: u64) -> bool {
        a.abs_diff(b) * 20 <= b
    }

    #[test]
    fn rates_are_kept_within_five_percent() {
        assert!(close(passed(&group(&[("iops-total", 100)]), 1, 100), 10_000));
        assert!(close(passed(&group(&[("bps-read", 4096 * 50)]), 1, 100), 5000));
        assert!(close(passed(&group(&[("iops-total", 100), ("iops-size", 1024)]), 1, 100), 2500));
        let changed = group(&[("iops-read", 1000)]);
        assert!(close(passed(&changed, 1, 10), 10_000));
        let mut limits = changed.limits();
        limits.set("iops-read", 10);
        changed.set_limits(limits).expect("changed");
        assert!(close(passed(&changed, 20, 100), 1000));
        // Reads do not count as writes.
        assert_eq!(changed.admit(true, 4096, u64::MAX / 2), Ok(()));
    }

    #[test]
    fn bursts_last_as_long_as_they_may() {
        let group = group(&[("iops-total", 100), ("iops-total-max", 1000), ("iops-total-max-length", 3)]);
        // What leaks meanwhile lengthens it a little: 3000 units at 1000 in and 100 out.
        assert!(close(passed(&group, 1, 3), 3000));
        passed(&group, 4, 1);
        assert!(close(passed(&group, 5, 50), 5000));
        // After a rest there is a burst again.
        assert!(close(passed(&group, 200, 3), 3000));
    }

    /// Units that have passed at the end of each second, reads and writes by turns, when more wants to pass than may.
    fn curve(group: &ThrottleGroup, bytes: u64, only: Option<bool>, unit: u64, seconds: u64) -> Vec<u64> {
        let (mut now, mut done, mut turn, mut out) = (1_000_000_000, 0, false, Vec::new());
        while (out.len() as u64) < seconds {
            match group.admit(only.unwrap_or(turn), bytes, now) {
                Ok(()) => {
                    done += unit;
                    turn = !turn;
                }
                Err(wait) => {
                    now += wait;
                    while now > (out.len() as u64 + 2) * 1_000_000_000 && (out.len() as u64) < seconds {
                        out.push(done);
                    }
                }
            }
        }
        out
    }

    #[test]
    fn every_rate_follows_its_curve_second_by_second() {
        for (n, name) in NAMES.into_iter().enumerate() {
            let only = [None, Some(false), Some(true)][n % 3];
            for (average, max, length) in [(1000, 0, 1), (200, 1000, 1), (200, 1000, 4), (500, 5000, 10)] {
                let (bytes, unit) = if n < 3 { (4096, 4096) } else { (512, 1) };
                let keys = [name.to_owned(), format!("{name}-max"), format!("{name}-max-length")];
                let set: Vec<(&str, u64)> = keys
                    .iter()
                    .map(String::as_str)
                    .zip([average * unit, max * unit, length])
                    .filter(|(_, value)| *value > 1)
                    .collect();
                let seen = curve(&group(&set), bytes, only, unit, 60);
                for (at, seen) in seen.into_iter().enumerate() {
                    let t = at as u64 + 1;
                    // A burst of its rate until what it holds is used up, and the average from then on; without a burst a tenth of a
                    // second's worth is ahead.
                    let wanted = match (max, length) {
                        (0, _) => average * t + average / 10,
                        (max, 1) => max + average * t,
                        (max, length) => (max * t + max / 10).min(max * length + average * t),
                    } * unit;
                    let off = seen.abs_diff(wanted) as f64 / wanted as f64;
                    assert!(off <= 0.05, "{name} {average} {max} {length}: {seen} of {wanted} after {t} s");
                }
            }
        }
    }

    #[test]
    fn limits_that_do_not_fit_are_refused() {
        for set in [
            &[("iops-total", 1), ("iops-read", 1)][..],
            &[("iops-total-max", 1)],
            &[("iops-total", 10), ("iops-total-max", 5)],
            &[("iops-total", 10), ("iops-total-max-length", 5)],
            &[("bps-total", u64::MAX)],
            &[("bps-total", 1), ("iops-size", 1)],
            &[("bps-total", 1), ("bps-total-max", 1 << 40), ("bps-total-max-length", 1 << 40)],
        ] {
            let mut limits = Limits::default();
            set.iter().for_each(|(key, value)| assert!(limits.set(key, *value)));
            assert!(limits.check().is_err(), "{set:?}");
        }
    }
}
