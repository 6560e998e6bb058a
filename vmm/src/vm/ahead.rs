//! Code that is translated before the guest runs.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use holdfast_accel::{CodePlace, Vcpu};
use parking_lot::{Condvar, Mutex};

/// Most places in one list.
pub const MOST: usize = 2048;
/// Bytes of one in the stream: guest-physical address, program counter (8 bytes each) and mode (4), little-endian.
const BYTES: usize = 20;
/// How many a vCPU's thread takes at once.
const TAKEN: usize = 16;

/// A list of places that the vCPUs' threads share out among themselves.
#[derive(Debug)]
pub struct Ahead {
    places: Vec<CodePlace>,
    next: AtomicUsize,
    over: AtomicBool,
    /// Threads that have not come to the end.
    left: Mutex<usize>,
    ended: Condvar,
}

impl Ahead {
    /// For `threads` threads.
    pub fn new(places: Vec<CodePlace>, threads: usize) -> Self {
        Self {
            places,
            next: AtomicUsize::new(0),
            over: AtomicBool::new(false),
            left: Mutex::new(threads),
            ended: Condvar::new(),
        }
    }

    /// One thread's part of it.
    pub fn work(&self, vcpu: &mut dyn Vcpu) {
        let go_on = || !self.over.load(Ordering::Acquire);
        while go_on() {
            let from = self.next.fetch_add(TAKEN, Ordering::Relaxed);
            let Some(rest) = self.places.get(from..).filter(|rest| !rest.is_empty()) else { break };
            vcpu.translate_ahead(rest.get(..TAKEN).unwrap_or(rest), &go_on);
        }
        *self.left.lock() -= 1;
        self.ended.notify_all();
    }

    /// A thread does not take part.
    pub fn without_one(&self) {
        *self.left.lock() -= 1;
    }

    /// Waits until all is translated, for `patience` at most.
    pub fn wait(&self, patience: Duration) {
        let deadline = Instant::now() + patience;
        let mut left = self.left.lock();
        while *left > 0 && !self.ended.wait_until(&mut left, deadline).timed_out() {}
    }

    /// No more of it is needed. Threads are through with what they are at when [`Ahead::wait`] returns.
    pub fn end(&self) {
        self.over.store(true, Ordering::Release);
    }
}

/// `places` as they go over the wire.
pub fn encode(places: &[CodePlace]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(places.len() * BYTES);
    for place in places {
        bytes.extend_from_slice(&place.gpa.to_le_bytes());
        bytes.extend_from_slice(&place.pc.to_le_bytes());
        bytes.extend_from_slice(&place.mode.to_le_bytes());
    }
    bytes
}

/// The places in `bytes`: at most [`MOST`]; what is behind a broken one is left out.
pub fn decode(bytes: &[u8]) -> Vec<CodePlace> {
    let place = |bytes: &[u8; BYTES]| {
        let number = |from: usize, len: usize| {
            bytes.iter().skip(from).take(len).rev().fold(0, |all, byte| all << 8 | u64::from(*byte))
        };
        CodePlace { gpa: number(0, 8), pc: number(8, 8), mode: number(16, 4) as u32 }
    };
    bytes.as_chunks::<BYTES>().0.iter().take(MOST).map(place).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn places_come_back() {
        let place =
            |n: u64| CodePlace { gpa: n << 40 | 0x123, pc: u64::MAX - n, mode: 0x7fff_0000 + n as u32 };
        let places: Vec<_> = (0..5000).map(place).collect();
        let bytes = encode(&places);
        assert_eq!(decode(&bytes), places[..MOST]);
        assert_eq!(decode(&bytes[..59]), places[..2]);
    }
}
