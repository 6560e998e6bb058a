//! A driver for tests: it operates a device through its registers and rings, well or badly.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_device::{BuildContext, Bus, Device, IrqLine, IrqSink, MemoryWindows, SystemEvent, SystemSink};
use holdfast_memory::{GuestMemory, GuestRegion};
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion};

use crate::device::VirtioDevice;
use crate::registry::{Slot, plug};

pub(crate) const RAM: u64 = 0x8000_0000;
pub(crate) const RAM_SIZE: usize = 8 << 20;
/// Free for buffers: above the rings.
pub(crate) const DATA: u64 = RAM + 0x40_0000;
const BASE: u64 = 0x1000_0000;
const QUEUE_STRIDE: u64 = 0x1_0000;

pub(crate) const NEXT: u16 = 1;
pub(crate) const WRITE: u16 = 2;
pub(crate) const INDIRECT: u16 = 4;

#[derive(Debug)]
struct NoSystem;
impl SystemSink for NoSystem {
    fn request(&self, _event: SystemEvent) {}
}

/// An interrupt line that remembers.
#[derive(Debug, Default)]
pub(crate) struct Line {
    pub(crate) level: AtomicBool,
    pub(crate) raised: AtomicU32,
}

impl IrqSink for Line {
    fn set_level(&self, _pin: u32, level: bool) {
        if !self.level.swap(level, Ordering::SeqCst) && level {
            self.raised.fetch_add(1, Ordering::SeqCst);
        }
    }
}

/// Memory of devices that the guest is shown, by address.
#[derive(Debug, Default)]
pub(crate) struct Shown(Mutex<BTreeMap<u64, (Arc<GuestRegion>, bool)>>);

impl Shown {
    /// Addresses, lengths, whether they are writable.
    pub(crate) fn list(&self) -> Vec<(u64, u64, bool)> {
        let shown = self.0.lock();
        shown.iter().map(|(gpa, (region, writable))| (*gpa, region.len(), *writable)).collect()
    }

    pub(crate) fn region(&self, gpa: u64) -> Option<Arc<GuestRegion>> {
        self.0.lock().get(&gpa).map(|(region, _)| Arc::clone(region))
    }
}

impl MemoryWindows for Shown {
    fn show(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> std::io::Result<()> {
        assert!(self.0.lock().insert(gpa, (Arc::clone(region), writable)).is_none(), "it is taken");
        Ok(())
    }

    fn hide(&self, gpa: u64) {
        assert!(self.0.lock().remove(&gpa).is_some(), "nothing is there");
    }
}

pub(crate) fn context() -> BuildContext {
    let clock = VmClock::stopped_at(0);
    let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM), RAM_SIZE)]).expect("RAM");
    let spawner = PlainSpawner::shared();
    BuildContext {
        memory,
        mmio: Bus::new("mmio"),
        pio: Bus::new("pio"),
        timers: Timers::start(Arc::clone(&clock), &*spawner).expect("timers"),
        clock,
        random: Arc::new(HostRandom),
        spawner,
        system: Arc::new(NoSystem),
        msi: None,
        windows: None,
    }
}

/// As [`context`], with RAM that other processes can map and a clock that runs.
pub(crate) fn shared_context() -> BuildContext {
    let mut context = context();
    let file = tempfile::tempfile().expect("file");
    file.set_len(RAM_SIZE as u64).expect("room");
    let ranges = [(GuestAddress(RAM), RAM_SIZE, Some(vm_memory::FileOffset::new(file, 0)))];
    context.memory = GuestMemory::from_ranges_with_files(ranges).expect("RAM");
    context.clock.resume();
    context
}

/// Waits until `what` is so; panics after a while.
pub(crate) fn eventually(what: &str, mut is_so: impl FnMut() -> bool) {
    let start = Instant::now();
    while !is_so() {
        assert!(start.elapsed() < Duration::from_secs(10), "never: {what}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

/// One descriptor: address, length, flags.
pub(crate) type Desc = (u64, u32, u16);

/// The driver's side of a queue.
#[derive(Debug)]
pub(crate) struct Ring {
    index: u16,
    pub(crate) size: u16,
    memory: GuestMemory,
    next_desc: u16,
    avail: u16,
    used: u16,
}

impl Ring {
    /// The ring of queue `index`, with 16 descriptors.
    pub(crate) fn new(index: u16, memory: &GuestMemory) -> Self {
        Self { index, size: 16, memory: memory.clone(), next_desc: 0, avail: 0, used: 0 }
    }

    /// The driver goes on in another RAM with the same contents.
    pub(crate) fn move_to(&mut self, memory: &GuestMemory) {
        self.memory = memory.clone();
    }

    pub(crate) fn base(&self) -> u64 {
        RAM + QUEUE_STRIDE * u64::from(self.index)
    }

    pub(crate) fn avail_ring(&self) -> u64 {
        self.base() + 0x4000
    }

    pub(crate) fn used_ring(&self) -> u64 {
        self.base() + 0x8000
    }

    pub(crate) fn desc_at(&self, index: u16) -> u64 {
        self.base() + 16 * u64::from(index)
    }

    pub(crate) fn put_desc(&self, at: u64, (addr, len, flags): Desc, next: u16) {
        let mut bytes = addr.to_le_bytes().to_vec();
        bytes.extend(len.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        bytes.extend(next.to_le_bytes());
        self.memory.write_slice(&bytes, GuestAddress(at)).expect("in RAM");
    }

    /// Puts descriptors one after the other and links them; returns the first.
    pub(crate) fn chain(&mut self, descs: &[Desc]) -> u16 {
        let head = self.next_desc;
        for (n, d) in descs.iter().enumerate() {
            let at = self.next_desc;
            self.next_desc = (at + 1) % self.size;
            let more = if n + 1 < descs.len() { NEXT } else { 0 };
            self.put_desc(self.desc_at(at), (d.0, d.1, d.2 | more), self.next_desc);
        }
        head
    }

    /// Makes a chain available without a notification.
    pub(crate) fn publish(&mut self, head: u16) {
        let slot = self.avail_ring() + 4 + 2 * u64::from(self.avail % self.size);
        self.memory.write_obj(head, GuestAddress(slot)).expect("in RAM");
        self.avail = self.avail.wrapping_add(1);
        self.set_avail(self.avail);
    }

    pub(crate) fn set_avail(&self, index: u16) {
        self.memory.store(index, GuestAddress(self.avail_ring() + 2), Ordering::Release).expect("in RAM");
    }

    /// `used_event`: interrupt when this many were used.
    pub(crate) fn set_used_event(&self, index: u16) {
        let at = self.avail_ring() + 4 + 2 * u64::from(self.size);
        self.memory.store(index, GuestAddress(at), Ordering::Release).expect("in RAM");
    }

    pub(crate) fn used_index(&self) -> u16 {
        self.memory.load(GuestAddress(self.used_ring() + 2), Ordering::Acquire).expect("in RAM")
    }

    /// The next used element, waited for: chain and length.
    pub(crate) fn wait_used(&mut self) -> (u16, u32) {
        eventually("a chain is used", || self.used_index() != self.used);
        let at = self.used_ring() + 4 + 8 * u64::from(self.used % self.size);
        self.used = self.used.wrapping_add(1);
        let id: u32 = self.memory.read_obj(GuestAddress(at)).expect("in RAM");
        let len: u32 = self.memory.read_obj(GuestAddress(at + 4)).expect("in RAM");
        (id as u16, len)
    }
}

/// A device behind virtio-mmio with a driver.
#[derive(Debug)]
pub(crate) struct Rig {
    pub(crate) context: BuildContext,
    pub(crate) device: Arc<dyn Device>,
    pub(crate) line: Arc<Line>,
    pub(crate) rings: Vec<Ring>,
}

impl Rig {
    pub(crate) fn new(context: BuildContext, device: Arc<dyn VirtioDevice>) -> Self {
        let line = Arc::new(Line::default());
        let irq = IrqLine::new(Arc::clone(&line) as Arc<dyn IrqSink>, 1);
        let sizes = device.queue_sizes();
        let device = plug("_dev0", device, Slot::Mmio { base: BASE, irq }, &context).expect("plugged");
        let rings = (0..sizes.len()).map(|n| Ring::new(n as u16, &context.memory)).collect();
        Self { context, device, line, rings }
    }

    pub(crate) fn read32(&self, offset: u64) -> u32 {
        let mut data = [0; 4];
        self.context.mmio.read(Some(0), BASE + offset, &mut data);
        u32::from_le_bytes(data)
    }

    pub(crate) fn write32(&self, offset: u64, value: u32) {
        self.context.mmio.write(Some(0), BASE + offset, &value.to_le_bytes());
    }

    pub(crate) fn config(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut data = vec![0; len];
        self.context.mmio.read(Some(0), BASE + 0x100 + offset, &mut data);
        data
    }

    pub(crate) fn write_config(&self, offset: u64, data: &[u8]) {
        self.context.mmio.write(Some(0), BASE + 0x100 + offset, data);
    }

    pub(crate) fn status(&self) -> u32 {
        self.read32(0x70)
    }

    pub(crate) fn offered(&self) -> u64 {
        self.write32(0x14, 0);
        let low = u64::from(self.read32(0x10));
        self.write32(0x14, 1);
        low | u64::from(self.read32(0x10)) << 32
    }

    /// Negotiates `features` and sets up all queues with 16 descriptors.
    pub(crate) fn start(&mut self, features: u64) {
        self.set_up(features);
        self.write32(0x70, 15);
    }

    /// As [`Rig::start`], with a last change to the last queue.
    pub(crate) fn start_with(&mut self, change: impl FnOnce(&Self)) {
        self.set_up(0);
        change(self);
        self.write32(0x70, 15);
    }

    fn set_up(&mut self, features: u64) {
        self.write32(0x70, 0);
        self.write32(0x70, 1);
        self.write32(0x70, 3);
        let features = features | crate::device::feature::VERSION_1;
        self.write32(0x24, 0);
        self.write32(0x20, features as u32);
        self.write32(0x24, 1);
        self.write32(0x20, (features >> 32) as u32);
        self.write32(0x70, 11);
        assert_eq!(self.status(), 11, "features accepted");
        for ring in &mut self.rings {
            let zero = vec![0; QUEUE_STRIDE as usize];
            self.context.memory.write_slice(&zero, GuestAddress(ring.base())).expect("in RAM");
            (ring.avail, ring.used, ring.next_desc) = (0, 0, 0);
        }
        for ring in &self.rings {
            self.write32(0x30, u32::from(ring.index));
            self.write32(0x38, u32::from(ring.size));
            for (at, addr) in [(0x80, ring.base()), (0x90, ring.avail_ring()), (0xa0, ring.used_ring())] {
                self.write32(at, addr as u32);
                self.write32(at + 4, (addr >> 32) as u32);
            }
            self.write32(0x44, 1);
        }
    }

    pub(crate) fn kick(&self, queue: u16) {
        self.write32(0x50, u32::from(queue));
    }

    /// Makes a chain available, notifies, waits for it; returns the used length.
    pub(crate) fn request(&mut self, queue: u16, descs: &[Desc]) -> u32 {
        let ring = &mut self.rings[usize::from(queue)];
        let head = ring.chain(descs);
        ring.publish(head);
        self.kick(queue);
        let (id, len) = self.rings[usize::from(queue)].wait_used();
        assert_eq!(id, head);
        len
    }

    pub(crate) fn poke(&self, addr: u64, bytes: &[u8]) {
        self.context.memory.write_slice(bytes, GuestAddress(addr)).expect("in RAM");
    }

    pub(crate) fn peek(&self, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.context.memory.read_slice(&mut bytes, GuestAddress(addr)).expect("in RAM");
        bytes
    }

    /// The device asks for a reset, and works again after it.
    pub(crate) fn expect_broken(&mut self, why: &str) {
        eventually(why, || self.status() & 64 != 0);
        assert_ne!(self.read32(0x60) & 2, 0, "a config interrupt says so");
        self.write32(0x70, 0);
        assert_eq!(self.status(), 0);
    }
}

/// One thing a hostile driver does: which, and four numbers to do it with.
pub(crate) type Mischief = (u8, u64, u32, u16, u16);

pub(crate) fn mischief() -> impl proptest::strategy::Strategy<Value = Vec<Mischief>> {
    use proptest::prelude::*;
    let address = prop_oneof![
        4 => DATA..DATA + 0x1000,
        2 => RAM..RAM + RAM_SIZE as u64,
        1 => Just(RAM + RAM_SIZE as u64 - 8),
        1 => any::<u64>(),
    ];
    let len = prop_oneof![4 => 1..600u32, 1 => Just(0u32), 1 => Just(u32::MAX), 2 => (1..40u32).prop_map(|n| n * 16)];
    let one = (0..8u8, address, len, any::<u16>(), any::<u16>());
    prop::collection::vec(one, 1..80)
}

/// Lets a driver run wild, then checks that the device can be reset, saved and restored.
pub(crate) fn run_wild(rig: &mut Rig, features: u64, what: &[Mischief]) {
    rig.start(features);
    let queues = rig.rings.len();
    for &(kind, addr, len, a, b) in what {
        let queue = usize::from(a) % queues;
        let ring = &mut rig.rings[queue];
        match kind {
            // Mostly flags that make sense, and links that stay in the table.
            0..=3 => ring.put_desc(ring.desc_at(b % 16), (addr, len, a >> 3 & 7), a >> 6 & 15),
            4 | 5 => {
                ring.publish(b % 17);
                rig.kick(queue as u16);
            }
            6 => rig.poke(DATA + u64::from(b % 0x1000), &addr.to_le_bytes()),
            _ => rig.write_config(u64::from(b % 64), &len.to_le_bytes()[..1 + usize::from(a % 4)]),
        }
    }
    for queue in 0..queues {
        rig.kick(queue as u16);
    }
    rig.device.pause();
    let state = rig.device.save().expect("saves");
    rig.device.resume();
    rig.write32(0x70, 0);
    assert_eq!(rig.status(), 0, "it can be reset");
    rig.device.restore(&state).expect("restores what it saved");
    rig.device.resume();
    rig.device.reset();
    rig.start(features);
}
