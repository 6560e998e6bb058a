//! The balloon's queues, on its worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_memory::PAGE_SIZE;

use super::{PAGE_SHIFT, STATISTICS, Shared, bit, ram};
use crate::device::Interrupt;
use crate::queue::{Chain, HandlerError, QueueError, VirtQueue};
use crate::worker::{Activation, Handler, Watch};

const INFLATE: u16 = 0;
const DEFLATE: u16 = 1;
const STATS: u16 = 2;
/// Token of the wish for statistics.
const ASK: u64 = 0x100;

/// Page numbers read from guest memory at a time.
const BATCH: usize = 256;
/// Bytes of one statistic: tag and value.
const STAT_LEN: usize = 10;
/// Most statistics in one report; more are ignored.
const MAX_STATS: u64 = 64;

pub(super) struct BalloonHandler {
    shared: Arc<Shared>,
    queues: Vec<VirtQueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
    /// Number of the reporting queue: it follows the statistics queue, if the driver has that.
    reporting: u16,
    /// The driver's report, kept until new statistics are wanted.
    report: Option<Chain>,
}

impl BalloonHandler {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self { shared, queues: Vec::new(), interrupt: None, reporting: u16::MAX, report: None }
    }

    fn serve(&mut self, index: u16) -> Result<(), QueueError> {
        let Some(at) = self.queues.iter().position(|q| q.index() == index) else { return Ok(()) };
        // Taken out for the time being, so that the rest of `self` can be used with it.
        let mut queue = self.queues.swap_remove(at);
        let result = self.serve_queue(&mut queue);
        self.queues.push(queue);
        result
    }

    fn serve_queue(&mut self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        let index = queue.index();
        let mut budget = queue.size();
        loop {
            while budget != 0
                && let Some(chain) = queue.pop()?
            {
                budget -= 1;
                if index == self.reporting {
                    let mut bytes = 0;
                    for s in &chain.writable {
                        bytes += ram::release(queue.memory(), s.addr.0, u64::from(s.len));
                    }
                    self.shared.reported.fetch_add(bytes, Ordering::Relaxed);
                    queue.push(chain.head, 0)?;
                } else if index == STATS {
                    self.read_report(queue, &chain)?;
                    // One report at a time is kept; a driver has no reason to give two.
                    if let Some(old) = self.report.replace(chain) {
                        queue.push(old.head, 0)?;
                    }
                } else {
                    self.move_pages(queue, &chain, index == INFLATE)?;
                    queue.push(chain.head, 0)?;
                }
            }
            if budget == 0 {
                queue.kick_again();
                break;
            }
            if !queue.enable_kicks()? {
                break;
            }
        }
        self.notify(queue)
    }

    fn notify(&self, queue: &mut VirtQueue) -> Result<(), QueueError> {
        if queue.wants_interrupt()?
            && let Some(interrupt) = &self.interrupt
        {
            interrupt.queue(queue.index());
        }
        Ok(())
    }

    /// Pages whose numbers are in `chain` were given to or taken from the balloon.
    fn move_pages(&self, queue: &VirtQueue, chain: &Chain, inflate: bool) -> Result<(), QueueError> {
        let mut reader = queue.reader(chain);
        let mut bytes = [0; 4 * BATCH];
        // Neighbouring pages are released together.
        let (mut start, mut len) = (0u64, 0u64);
        while reader.remaining() >= 4 {
            let n = (reader.remaining() as usize & !3).min(bytes.len());
            let some = bytes.get_mut(..n).unwrap_or(&mut []);
            reader.read(some)?;
            let counter = if inflate { &self.shared.inflated } else { &self.shared.deflated };
            counter.fetch_add(n as u64 / 4, Ordering::Relaxed);
            if !inflate {
                // Memory comes back when it is touched.
                continue;
            }
            for pfn in some.chunks_exact(4) {
                let pfn = u32::from_le_bytes([pfn[0], pfn[1], pfn[2], pfn[3]]);
                let page = u64::from(pfn) << PAGE_SHIFT;
                if len != 0 && page == start + len {
                    len += PAGE_SIZE;
                } else if len != 0 && page + PAGE_SIZE == start {
                    (start, len) = (page, len + PAGE_SIZE);
                } else {
                    ram::release(queue.memory(), start, len);
                    (start, len) = (page, PAGE_SIZE);
                }
            }
        }
        ram::release(queue.memory(), start, len);
        Ok(())
    }

    fn read_report(&self, queue: &VirtQueue, chain: &Chain) -> Result<(), QueueError> {
        let mut reader = queue.reader(chain);
        let mut statistics = self.shared.statistics.lock();
        for _ in 0..MAX_STATS {
            if reader.remaining() < STAT_LEN as u64 {
                break;
            }
            let mut tag = [0; 2];
            let mut value = [0; 8];
            reader.read(&mut tag)?;
            reader.read(&mut value)?;
            if let Some(name) = STATISTICS.get(usize::from(u16::from_le_bytes(tag))) {
                statistics.insert(name, u64::from_le_bytes(value));
            }
        }
        Ok(())
    }

    /// Gives the report back, upon which the driver makes a new one.
    fn ask(&mut self) -> Result<(), QueueError> {
        let Some(at) = self.queues.iter().position(|q| q.index() == STATS) else { return Ok(()) };
        let Some(report) = self.report.take() else { return Ok(()) };
        let mut queue = self.queues.swap_remove(at);
        let pushed = queue.push(report.head, 0).and_then(|()| self.notify(&mut queue));
        self.queues.push(queue);
        pushed
    }
}

impl Handler for BalloonHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let has = |bit| activation.features & bit != 0;
        let stats = has(bit::STATS_VQ);
        self.reporting = match has(bit::REPORTING) {
            true => STATS + u16::from(stats),
            false => u16::MAX,
        };
        self.interrupt = Some(activation.interrupt);
        self.queues = activation.queues;
        for queue in &self.queues {
            watch.add(queue.kick().as_raw_fd(), u64::from(queue.index()))?;
        }
        watch.add(self.shared.ask.as_raw_fd(), ASK)?;
        for index in [INFLATE, DEFLATE, STATS, STATS + 1] {
            self.serve(index)?;
        }
        Ok(())
    }

    fn event(&mut self, token: u64, _watch: &Watch) -> Result<(), HandlerError> {
        match token {
            ASK => self.ask()?,
            index => self.serve(index as u16)?,
        }
        Ok(())
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        watch.remove(self.shared.ask.as_raw_fd());
        let report = self.report.take();
        for queue in &mut self.queues {
            watch.remove(queue.kick().as_raw_fd());
            if queue.index() == STATS && report.is_some() {
                // Popped again when the device goes on.
                queue.undo_pop();
            }
        }
        self.interrupt = None;
        std::mem::take(&mut self.queues)
    }
}
