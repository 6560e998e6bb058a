//! Devices whose kernel is this test: it looks at the rings that it was given when the test says so.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use holdfast_device::BuildContext;
use holdfast_memory::{GuestMemory, Tracked};
use holdfast_net::{HEADER_LEN, Offloads, PacketBackend, PacketQueue};
use parking_lot::Mutex;
use proptest::prelude::*;
use vhost::{VhostUserMemoryRegionInfo, VringConfigData};
use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::device::{VhostKernel, rings};
use super::kernel::{Kernel, Vhost};
use super::{net, vsock};
use crate::device::{VirtioDevice, feature};
use crate::net::bit;
use crate::net::config::NetConfig;
use crate::testing::{DATA, RAM, RAM_SIZE, Rig, WRITE, context, eventually, mischief, run_wild};
use crate::vhost_user::ring::{RingMemory, SharedRings};
use crate::vsock::config::VsockConfig;

#[derive(Debug, Default)]
struct State {
    log: Vec<String>,
    regions: Vec<(u64, u64, u64)>,
    rings: BTreeMap<u16, Queue>,
    bells: BTreeMap<u16, (EventFd, EventFd)>,
    /// Rings that it may look at.
    on: BTreeMap<u16, bool>,
    features: u64,
    /// The request that fails, and how.
    refuses: Option<(&'static str, i32)>,
}

/// A chain: its head, what it reads and where it writes.
type Taken = (u16, Vec<u8>, Vec<(u64, u32)>);

/// One device of the kernel.
#[derive(Debug, Clone)]
struct Fake {
    state: Arc<Mutex<State>>,
    memory: RingMemory,
}

impl Fake {
    fn new(rings: &SharedRings) -> Self {
        let state = State { features: feature::VERSION_1 | bit::MRG_RXBUF | 1 << 1, ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), memory: rings.memory().clone() }
    }

    fn note(&self, what: &'static str, detail: &str) -> io::Result<()> {
        let mut state = self.state.lock();
        state.log.push(format!("{what}{detail}"));
        match state.refuses {
            Some((refused, errno)) if refused == what => Err(io::Error::from_raw_os_error(errno)),
            _ => Ok(()),
        }
    }

    fn log(&self) -> Vec<String> {
        std::mem::take(&mut self.state.lock().log)
    }

    fn is_on(&self, ring: u16) -> bool {
        self.state.lock().on.get(&ring).copied().unwrap_or(false)
    }

    /// Takes the next chain of a ring that it may look at.
    fn take(&self, ring: u16, ram: &GuestMemory) -> Option<Taken> {
        let mut state = self.state.lock();
        if !state.on.get(&ring).copied().unwrap_or(false) {
            return None;
        }
        let queue = state.rings.get_mut(&ring)?;
        let chain = queue.iter(&self.memory).expect("a ring").next()?;
        let (head, mut text, mut room) = (chain.head_index(), Vec::new(), Vec::new());
        for d in chain {
            if d.is_write_only() {
                room.push((d.addr().0, d.len()));
            } else {
                let mut part = vec![0; d.len() as usize];
                ram.read_slice(&mut part, d.addr()).expect("in RAM");
                text.extend(part);
            }
        }
        Some((head, text, room))
    }

    /// As [`Fake::take`], once there is one.
    fn wait(&self, ring: u16, ram: &GuestMemory) -> Taken {
        let mut taken = None;
        eventually("a chain comes", || {
            taken = self.take(ring, ram);
            taken.is_some()
        });
        taken.expect("there is one")
    }

    /// Gives a chain back.
    fn give(&self, ring: u16, head: u16, len: u32) {
        let mut state = self.state.lock();
        let queue = state.rings.get_mut(&ring).expect("a ring");
        queue.add_used(&self.memory, head, len).expect("given back");
        state.bells[&ring].0.write(1).expect("rung");
    }

    fn kicked(&self, ring: u16) -> bool {
        self.state.lock().bells[&ring].1.read().is_ok()
    }
}

impl Vhost for Fake {
    fn own(&self) -> io::Result<()> {
        self.note("own", "")
    }
    fn features(&self) -> io::Result<u64> {
        Ok(self.state.lock().features)
    }
    fn set_features(&self, features: u64) -> io::Result<()> {
        self.note("features", &format!(" {features:#x}"))
    }
    fn set_memory(&self, regions: &[VhostUserMemoryRegionInfo]) -> io::Result<()> {
        self.state.lock().regions =
            regions.iter().map(|r| (r.guest_phys_addr, r.memory_size, r.userspace_addr)).collect();
        self.note("memory", "")
    }
    fn set_ring(&self, ring: u16, place: &VringConfigData) -> io::Result<()> {
        let mut queue = Queue::new(place.queue_size).expect("a size");
        let halves = |addr: u64| (Some(addr as u32), Some((addr >> 32) as u32));
        let (low, high) = halves(place.desc_table_addr);
        queue.set_desc_table_address(low, high);
        let (low, high) = halves(place.avail_ring_addr);
        queue.set_avail_ring_address(low, high);
        let (low, high) = halves(place.used_ring_addr);
        queue.set_used_ring_address(low, high);
        queue.set_ready(true);
        assert!(queue.is_valid(&self.memory), "the ring is where it says");
        assert!(!self.is_on(ring), "a ring that is served cannot be changed (EBUSY)");
        self.state.lock().rings.insert(ring, queue);
        self.note("ring", &format!(" {ring}"))
    }
    fn set_bells(&self, ring: u16, call: &EventFd, kick: &EventFd) -> io::Result<()> {
        let bells = (call.try_clone().expect("a copy"), kick.try_clone().expect("a copy"));
        self.state.lock().bells.insert(ring, bells);
        Ok(())
    }
    fn set_backend(&self, ring: u16, tap: Option<RawFd>) -> io::Result<()> {
        self.state.lock().on.insert(ring, tap.is_some());
        self.note("backend", &format!(" {ring} {}", tap.is_some()))
    }
    fn set_guest_cid(&self, cid: u64) -> io::Result<()> {
        self.note("cid", &format!(" {cid}"))
    }
    fn set_running(&self, running: bool) -> io::Result<()> {
        for ring in 0..2 {
            self.state.lock().on.insert(ring, running);
        }
        self.note("running", &format!(" {running}"))
    }
}

/// An interface whose packets nobody here moves.
#[derive(Debug)]
struct Tap {
    queues: Vec<Arc<TapQueue>>,
    log: Mutex<Vec<String>>,
}

#[derive(Debug)]
struct TapQueue(EventFd, Mutex<Vec<u8>>);

impl PacketQueue for TapQueue {
    fn fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }
    fn receive(&self, _: &mut [u8]) -> io::Result<usize> {
        panic!("the kernel receives")
    }
    unsafe fn send(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        for p in parts {
            // SAFETY: the caller vouches for the parts.
            let bytes = unsafe { std::slice::from_raw_parts(p.iov_base.cast::<u8>(), p.iov_len) };
            self.1.lock().extend(bytes);
        }
        Ok(self.1.lock().len())
    }
}

impl PacketBackend for Tap {
    fn name(&self) -> &str {
        "fake"
    }
    fn queues(&self) -> Vec<Arc<dyn PacketQueue>> {
        self.queues.iter().map(|q| Arc::clone(q) as Arc<dyn PacketQueue>).collect()
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.log.lock().push(format!("csum {} tso4 {}", offloads.csum, offloads.tso4));
        Ok(())
    }
    fn enable_queues(&self, count: usize) -> io::Result<()> {
        self.log.lock().push(format!("queues {count}"));
        Ok(())
    }
    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }
}

fn card(pairs: u16, context: &BuildContext) -> (Arc<VhostKernel>, Vec<Fake>, Arc<Tap>) {
    let queue = || Arc::new(TapQueue(EventFd::new(EFD_NONBLOCK).expect("eventfd"), Mutex::default()));
    let tap = Arc::new(Tap { queues: (0..pairs).map(|_| queue()).collect(), log: Mutex::default() });
    let rings = rings("_net1", 2 * usize::from(pairs)).expect("rings");
    let fakes: Vec<Fake> = (0..pairs).map(|_| Fake::new(&rings)).collect();
    let kernels = fakes.iter().map(|fake| Box::new(fake.clone()) as Box<dyn Vhost>).collect();
    let mac = Some("12:34:56:78:9a:bc".parse().expect("a MAC"));
    let config = NetConfig { num_queues: 2 * pairs, mac, vhost: true, ..NetConfig::default() };
    let interface = Arc::clone(&tap) as Arc<dyn PacketBackend>;
    let device = net::on("_net1", &config, interface, (kernels, rings), context).expect("builds");
    (device, fakes, tap)
}

fn sockets(context: &BuildContext) -> (Arc<VhostKernel>, Fake) {
    let rings = rings("_vsock2", 2).expect("rings");
    let fake = Fake::new(&rings);
    let kernels: Vec<Box<dyn Vhost>> = vec![Box::new(fake.clone())];
    let config = VsockConfig { vhost: true, ..VsockConfig::new(42, "".into()) };
    (vsock::on("_vsock2", &config, (kernels, rings), context).expect("builds"), fake)
}

fn rig_of_card(pairs: u16) -> (Rig, Vec<Fake>, Arc<Tap>) {
    let context = context();
    let (device, fakes, tap) = card(pairs, &context);
    (Rig::new(context, device), fakes, tap)
}

#[test]
fn a_card_is_set_up_and_its_packets_go_through_the_kernel() {
    let (mut rig, fakes, tap) = rig_of_card(1);
    let fake = &fakes[0];
    assert_eq!(fake.log(), ["own"]);
    assert_eq!(tap.log.lock().pop(), Some("queues 1".to_owned()));
    assert_eq!(rig.offered() & (bit::MRG_RXBUF | bit::CSUM | bit::MQ), bit::MRG_RXBUF | bit::CSUM);
    assert_eq!(rig.offered() & feature::INDIRECT_DESC, 0, "a chain fits the kernel's ring");
    rig.start(bit::MRG_RXBUF | bit::CSUM | bit::GUEST_CSUM | bit::GUEST_TSO4);
    eventually("it is served", || fake.is_on(1));
    let accepted = format!("features {:#x}", feature::VERSION_1 | bit::MRG_RXBUF);
    let expected = [&accepted, "memory", "ring 0", "ring 1", "backend 0 true", "backend 1 true"];
    assert_eq!(fake.log(), expected);
    assert!(tap.log.lock().contains(&"csum true tso4 true".to_owned()), "{:?}", tap.log);
    let regions = fake.state.lock().regions.clone();
    let ram = rig.context.memory.get_host_address(GuestAddress(RAM)).expect("RAM") as u64;
    assert_eq!(regions[0], (RAM, RAM_SIZE as u64, ram));
    assert_eq!(regions.len(), 2, "RAM and the rings");

    // From the guest.
    rig.poke(DATA, b"a packet");
    let head = rig.rings[1].chain(&[(DATA, 8, 0)]);
    rig.rings[1].publish(head);
    rig.kick(1);
    let (at, text, room) = fake.wait(1, &rig.context.memory);
    assert_eq!((text.as_slice(), room.len()), (&b"a packet"[..], 0));
    assert!(fake.kicked(1));
    fake.give(1, at, 0);
    assert_eq!(rig.rings[1].wait_used(), (head, 0));
    // To the guest; what the kernel wrote is known.
    let head = rig.rings[0].chain(&[(DATA + 0x1000, 64, WRITE)]);
    rig.rings[0].publish(head);
    rig.kick(0);
    let (at, _, room) = fake.wait(0, &rig.context.memory);
    assert_eq!(room, [(DATA + 0x1000, 64)]);
    let tracker = rig.context.memory.iter().next().expect("RAM").bitmap_tracker();
    tracker.start_log();
    fake.give(0, at, 20);
    assert_eq!(rig.rings[0].wait_used(), (head, 20));
    let page = (DATA + 0x1000 - RAM) / holdfast_memory::PAGE_SIZE;
    assert!(tracker.is_dirty(page), "the kernel's write is marked");
}

#[test]
fn pairs_are_switched_and_a_paused_card_is_the_kernels_no_more() {
    let (mut rig, fakes, tap) = rig_of_card(2);
    rig.start(bit::MQ | bit::CTRL_VQ | bit::MRG_RXBUF);
    eventually("the first pair is served", || fakes[0].is_on(0) && fakes[0].is_on(1));
    assert!(!fakes[1].is_on(0), "the second pair has to wait");
    let command = |pairs: u8| [4, 0, pairs, 0];
    rig.poke(DATA, &command(2));
    assert_eq!(rig.request(4, &[(DATA, 4, 0), (DATA + 16, 1, WRITE)]), 1);
    assert_eq!(rig.peek(DATA + 16, 1), [0]);
    eventually("the second pair is served", || fakes[1].is_on(0) && fakes[1].is_on(1));
    assert!(tap.log.lock().contains(&"queues 2".to_owned()));

    // Two buffers of the second pair wait for packets, in their order.
    for n in [1u64, 0] {
        let head = rig.rings[2].chain(&[(DATA + 0x1000 * (n + 1), 64, WRITE)]);
        rig.rings[2].publish(head);
    }
    rig.kick(2);
    let (first, _, room) = fakes[1].wait(0, &rig.context.memory);
    assert_eq!((first, room), (first, vec![(DATA + 0x2000, 64)]));
    rig.device.pause();
    assert!(fakes.iter().all(|fake| !fake.is_on(0) && !fake.is_on(1)), "nobody looks at the rings");
    let state = rig.device.save().expect("saves");
    rig.device.resume();
    eventually("it goes on", || fakes[1].is_on(0));
    assert_eq!(
        fakes[1].wait(0, &rig.context.memory).2,
        [(DATA + 0x2000, 64)],
        "the first is the first again"
    );
    assert_eq!(fakes[1].wait(0, &rig.context.memory).2, [(DATA + 0x1000, 64)]);

    // Another process goes on with the same RAM.
    let mut context = context();
    context.memory = rig.context.memory.clone();
    let (device, fakes, tap) = card(2, &context);
    let moved = Rig::new(context, Arc::clone(&device) as Arc<dyn VirtioDevice>);
    moved.device.restore(&state).expect("restores");
    moved.device.resume();
    eventually("it is served there", || fakes[1].is_on(0) && fakes[0].is_on(1));
    let (head, _, room) = fakes[1].wait(0, &moved.context.memory);
    assert_eq!(room, [(DATA + 0x2000, 64)]);
    fakes[1].give(0, head, 32);
    rig.rings[2].wait_used();
    assert_eq!(tap.log.lock().last().map(String::as_str), Some("queues 2"));
    device.announce();
    let frame = tap.queues[0].1.lock().clone();
    assert_eq!(frame[HEADER_LEN + 6..HEADER_LEN + 12], [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);
}

#[test]
fn sockets_have_their_address_and_a_restored_guest_hears_that_its_connections_are_lost() {
    let context = context();
    let (device, fake) = sockets(&context);
    let mut rig = Rig::new(context, device);
    assert_eq!(fake.log(), ["own", "cid 42"]);
    assert_eq!(rig.config(0, 8), 42u64.to_le_bytes());
    rig.start(1 << 1);
    eventually("it runs", || fake.is_on(1));
    let accepted = format!("features {:#x}", feature::VERSION_1 | 1 << 1);
    assert_eq!(fake.log(), [&accepted, "memory", "ring 0", "ring 1", "running true"]);
    // The kernel never sees the event queue.
    let event = rig.rings[2].chain(&[(DATA, 4, WRITE)]);
    rig.rings[2].publish(event);
    rig.kick(2);
    rig.poke(DATA + 0x100, b"hello");
    let head = rig.rings[1].chain(&[(DATA + 0x100, 5, 0)]);
    rig.rings[1].publish(head);
    rig.kick(1);
    let (at, text, _) = fake.wait(1, &rig.context.memory);
    assert_eq!(text, b"hello");
    fake.give(1, at, 0);
    rig.rings[1].wait_used();
    assert_eq!(rig.rings[2].used_index(), 0, "nothing is lost");
    rig.device.pause();
    assert!(!fake.is_on(0));
    let state = rig.device.save().expect("saves");

    let mut context = crate::testing::context();
    context.memory = rig.context.memory.clone();
    let (device, fake) = sockets(&context);
    let moved = Rig::new(context, device);
    moved.device.restore(&state).expect("restores");
    moved.device.resume();
    eventually("it runs there", || fake.is_on(1));
    assert_eq!(rig.rings[2].wait_used(), (event, 4));
    assert_eq!(moved.peek(DATA, 4), [0; 4], "VIRTIO_VSOCK_EVENT_TRANSPORT_RESET");
    moved.device.reset();
    assert!(!fake.is_on(1), "a reset device is left");
}

#[test]
fn what_the_kernel_refuses_is_said() {
    let context = context();
    let config = VsockConfig { vhost: true, ..VsockConfig::new(42, "".into()) };
    let refused = |change: fn(&mut State)| {
        let rings = rings("v", 2).expect("rings");
        let fake = Fake::new(&rings);
        change(&mut fake.state.lock());
        vsock::on("v", &config, (vec![Box::new(fake)], rings), &context).expect_err("refused").to_string()
    };
    let taken = refused(|state| state.refuses = Some(("cid", libc::EADDRINUSE)));
    assert!(taken.contains("cannot have cid 42"), "{taken}");
    let owned = refused(|state| state.refuses = Some(("own", libc::EBUSY)));
    assert!(owned.contains("does not answer"), "{owned}");
    assert!(refused(|state| state.features = 0).contains("lacks virtio 1"));
    // A driver finds a device that stands still.
    let (mut rig, fakes, _) = rig_of_card(1);
    fakes[0].state.lock().refuses = Some(("memory", libc::E2BIG));
    rig.start(0);
    rig.expect_broken("the kernel takes no memory");
    fakes[0].state.lock().refuses = None;
    rig.start(0);
    eventually("it works again", || fakes[0].is_on(1));
}

#[test]
fn what_is_no_vhost_device_is_refused() {
    let rings = rings("v", 2).expect("rings");
    let gone = Kernel::open("/nonexistent/vhost".as_ref(), &rings).expect_err("nothing is there");
    assert_eq!(gone.kind(), io::ErrorKind::NotFound);
    let null = Kernel::open("/dev/null".as_ref(), &rings).expect("a file");
    let place = rings.place(1, 256);
    let region = VhostUserMemoryRegionInfo {
        guest_phys_addr: 0,
        memory_size: 4096,
        userspace_addr: 0,
        mmap_offset: 0,
        mmap_handle: -1,
    };
    let bell = EventFd::new(0).expect("eventfd");
    // Each request is made, and the file knows none of them.
    for result in [
        null.own(),
        Vhost::features(&null).map(drop),
        Vhost::set_features(&null, 0),
        null.set_memory(&[region]),
        null.set_ring(1, &place),
        null.set_bells(1, &bell, &bell),
        null.set_backend(0, None),
        null.set_guest_cid(3),
        null.set_running(true),
    ] {
        assert_eq!(result.expect_err("refused").raw_os_error(), Some(libc::ENOTTY));
    }
    let config = VsockConfig { vhost: true, vhostfd: Some(9999), ..VsockConfig::new(42, "".into()) };
    let closed = vsock::build("v", &config, &context()).expect_err("not open").to_string();
    assert!(closed.contains("9999"), "{closed}");
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, ..ProptestConfig::default() })]
    #[test]
    fn a_wild_driver_breaks_nothing(what in mischief()) {
        let (mut rig, _, _) = rig_of_card(2);
        run_wild(&mut rig, bit::MQ | bit::CTRL_VQ, &what);
        let context = context();
        let (device, _) = sockets(&context);
        run_wild(&mut Rig::new(context, device), 0, &what);
    }
}
