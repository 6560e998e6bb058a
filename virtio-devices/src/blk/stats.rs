//! What a disk has done, as monitors count it.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

use holdfast_block::Op;
use holdfast_clock::host_monotonic;
use parking_lot::RwLock;

/// Kinds of requests that are counted apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Reads.
    Read,
    /// Writes, and writes of zeroes.
    Write,
    /// Flushes.
    Flush,
    /// Discards.
    Unmap,
}

impl Kind {
    /// All kinds, in the order of `Stats`.
    pub const ALL: [Self; 4] = [Self::Read, Self::Write, Self::Flush, Self::Unmap];

    pub(super) fn of(op: Op) -> Self {
        match op {
            Op::Read => Self::Read,
            Op::Write | Op::WriteZeroes { .. } => Self::Write,
            Op::Flush => Self::Flush,
            Op::Discard => Self::Unmap,
        }
    }
}

/// How many requests took how long. `bins` has one more than `boundaries`, which are in nanoseconds and rise.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Histogram {
    /// Where one bin ends and the next begins.
    pub boundaries: Vec<u64>,
    /// Requests.
    pub bins: Vec<u64>,
}

/// Requests of one kind.
#[derive(Debug)]
struct Counter {
    bytes: AtomicU64,
    ops: AtomicU64,
    failed: AtomicU64,
    invalid: AtomicU64,
    nanoseconds: AtomicU64,
    min: AtomicU64,
    max: AtomicU64,
    histogram: RwLock<Option<(Vec<u64>, Vec<AtomicU64>)>>,
}

impl Default for Counter {
    fn default() -> Self {
        let zero = || AtomicU64::new(0);
        Self {
            bytes: zero(),
            ops: zero(),
            failed: zero(),
            invalid: zero(),
            nanoseconds: zero(),
            min: AtomicU64::new(u64::MAX),
            max: zero(),
            histogram: RwLock::new(None),
        }
    }
}

/// What was counted of one kind.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Count {
    /// Bytes of requests that were done.
    pub bytes: u64,
    /// Requests that were done.
    pub ops: u64,
    /// Requests that failed.
    pub failed: u64,
    /// Requests that made no sense.
    pub invalid: u64,
    /// How long they took together, in nanoseconds.
    pub nanoseconds: u64,
    /// How long they took one by one, if that is asked for.
    pub histogram: Option<Histogram>,
}

/// The counters of a disk.
#[derive(Debug, Default)]
pub(crate) struct Stats {
    counters: [Counter; 4],
    /// When a request was last done, in nanoseconds of the host's clock; 0: none was.
    last: AtomicU64,
    /// The end of the write that came furthest.
    highest: AtomicU64,
}

impl Stats {
    fn counter(&self, kind: Kind) -> &Counter {
        let [read, write, flush, unmap] = &self.counters;
        match kind {
            Kind::Read => read,
            Kind::Write => write,
            Kind::Flush => flush,
            Kind::Unmap => unmap,
        }
    }

    /// A request was done in so many nanoseconds.
    pub(super) fn done(&self, kind: Kind, bytes: u64, nanoseconds: u64) {
        let c = self.counter(kind);
        c.bytes.fetch_add(bytes, Ordering::Relaxed);
        c.ops.fetch_add(1, Ordering::Relaxed);
        c.nanoseconds.fetch_add(nanoseconds, Ordering::Relaxed);
        c.min.fetch_min(nanoseconds, Ordering::Relaxed);
        c.max.fetch_max(nanoseconds, Ordering::Relaxed);
        self.last.store(host_monotonic(), Ordering::Relaxed);
        if let Some((boundaries, bins)) = &*c.histogram.read() {
            let at = boundaries.partition_point(|b| *b <= nanoseconds);
            if let Some(bin) = bins.get(at) {
                bin.fetch_add(1, Ordering::Relaxed);
            }
        }
    }

    pub(super) fn failed(&self, kind: Kind) {
        self.counter(kind).failed.fetch_add(1, Ordering::Relaxed);
        self.last.store(host_monotonic(), Ordering::Relaxed);
    }

    pub(super) fn invalid(&self, kind: Kind) {
        self.counter(kind).invalid.fetch_add(1, Ordering::Relaxed);
    }

    /// A write ends at `end`.
    pub(super) fn wrote(&self, end: u64) {
        self.highest.fetch_max(end, Ordering::Relaxed);
    }

    /// The end of the write that came furthest.
    pub(super) fn highest(&self) -> u64 {
        self.highest.load(Ordering::Relaxed)
    }

    /// Nanoseconds since a request was last done, if one was.
    pub(super) fn idle(&self) -> Option<u64> {
        match self.last.load(Ordering::Relaxed) {
            0 => None,
            last => Some(host_monotonic().saturating_sub(last)),
        }
    }

    /// What was counted.
    pub(super) fn count(&self, kind: Kind) -> Count {
        let c = self.counter(kind);
        let load = |n: &AtomicU64| n.load(Ordering::Relaxed);
        let histogram = c.histogram.read().as_ref().map(|(boundaries, bins)| Histogram {
            boundaries: boundaries.clone(),
            bins: bins.iter().map(load).collect(),
        });
        Count {
            bytes: load(&c.bytes),
            ops: load(&c.ops),
            failed: load(&c.failed),
            invalid: load(&c.invalid),
            nanoseconds: load(&c.nanoseconds),
            histogram,
        }
    }

    /// Begins a histogram with these boundaries, or ends it.
    pub(super) fn set_histogram(&self, kind: Kind, boundaries: Option<Vec<u64>>) {
        let fresh = boundaries.map(|b| {
            let bins = (0..=b.len()).map(|_| AtomicU64::new(0)).collect();
            (b, bins)
        });
        *self.counter(kind).histogram.write() = fresh;
    }

    /// The counters of `vm.counters`; times are in microseconds.
    pub(super) fn report(&self) -> BTreeMap<String, u64> {
        let mut out = BTreeMap::new();
        for (kind, name) in [(Kind::Read, "read"), (Kind::Write, "write")] {
            let c = self.count(kind);
            let raw = self.counter(kind);
            out.insert(format!("{name}_bytes"), c.bytes);
            out.insert(format!("{name}_ops"), c.ops);
            let average = (c.nanoseconds / 1000).checked_div(c.ops).unwrap_or(0);
            out.insert(format!("{name}_latency_avg"), average);
            let min = raw.min.load(Ordering::Relaxed) / 1000;
            out.insert(format!("{name}_latency_min"), if c.ops == 0 { 0 } else { min });
            out.insert(format!("{name}_latency_max"), raw.max.load(Ordering::Relaxed) / 1000);
        }
        out.insert("flush_ops".to_owned(), self.count(Kind::Flush).ops);
        let wrong = |kind| {
            let c = self.count(kind);
            c.failed + c.invalid
        };
        out.insert("errors".to_owned(), Kind::ALL.into_iter().map(wrong).sum());
        out
    }
}
