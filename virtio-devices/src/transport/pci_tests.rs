//! The PCI transport, driven through configuration space and BAR.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_device::{
    BuildContext, BuildError, Bus, Device, DeviceEvent, IrqLine, IrqSink, MsiController, MsiMessage,
    MsiVector, SystemEvent, SystemSink,
};
use holdfast_devices::pci::{PciBus, PciBusSpec, PciDevice, Removal, RootPort, Windows};
use parking_lot::Mutex;
use proptest::prelude::*;
use vmm_sys_util::eventfd::EventFd;

use crate::blk::config::DiskConfig;
use crate::device::feature;
use crate::registry::{Slot, plug};
use crate::rng::config::RngConfig;
use crate::testing::{DATA, Line, Ring, WRITE, context, eventually};

const WINDOW: u64 = 0x40_0000_0000;

type Log = Arc<Mutex<Vec<MsiMessage>>>;

#[derive(Debug, Default)]
struct Msi(Log);

#[derive(Debug)]
struct Vector {
    log: Log,
    state: Mutex<(Option<MsiMessage>, bool)>,
}

impl MsiController for Msi {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        self.0.lock().push(message);
        Ok(())
    }
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector { log: Arc::clone(&self.0), state: Mutex::default() }))
    }
}

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state.lock();
        state.0 = message;
        if let (Some(m), true) = *state {
            state.1 = false;
            self.log.lock().push(m);
        }
        Ok(())
    }
    fn trigger(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        match state.0 {
            Some(m) => self.log.lock().push(m),
            None => state.1 = true,
        }
        Ok(())
    }
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
    fn pending(&self) -> bool {
        self.state.lock().1
    }
}

struct Rig {
    context: BuildContext,
    bus: Arc<PciBus>,
    log: Log,
    line: Arc<Line>,
    device: Arc<dyn Device>,
    ring: Ring,
    base: u64,
}

impl Rig {
    fn new(msi: bool) -> Self {
        let mut context = context();
        let log = Log::default();
        if msi {
            context.msi = Some(Arc::new(Msi(Arc::clone(&log))));
        }
        let line = Arc::new(Line::default());
        let bus = PciBus::new(PciBusSpec {
            segment: 0,
            mmio: Arc::clone(&context.mmio),
            pio: Bus::new("pio"),
            wires: vec![IrqLine::new(Arc::clone(&line) as Arc<dyn IrqSink>, 0)],
            swizzle: |_, _| 0,
        });
        let rng = crate::rng::build("__rng", &RngConfig::default(), &context).expect("builds");
        let slot = Slot::Pci { bus: Arc::clone(&bus), device: Some(3) };
        let device = plug("__rng", rng, slot, &context).expect("plugged");
        bus.assign_resources(Windows { mem64: (WINDOW, 1 << 20), ..Windows::default() }).expect("room");
        let ring = Ring::new(0, &context.memory);
        Self { context, bus, log, line, device, ring, base: WINDOW }
    }

    fn config(&self, offset: u16, len: usize) -> u64 {
        let mut data = [0; 8];
        self.bus.read_config(0, 3 << 3, offset, &mut data[..len]);
        u64::from_le_bytes(data)
    }

    fn set_config(&self, offset: u16, data: &[u8]) {
        self.bus.write_config(0, 3 << 3, offset, data);
    }

    fn read(&self, offset: u64, len: usize) -> u64 {
        let mut data = [0; 8];
        assert!(self.context.mmio.read(Some(0), self.base + offset, &mut data[..len]), "the BAR is mapped");
        u64::from_le_bytes(data)
    }

    fn write(&self, offset: u64, value: u64, len: usize) {
        self.context.mmio.write(Some(0), self.base + offset, &value.to_le_bytes()[..len]);
    }

    /// Capabilities with `id` by virtio's `cfg_type` (0 for others): (type, offset in config space).
    fn capabilities(&self, id: u8) -> Vec<(u8, u16)> {
        let mut found = Vec::new();
        let mut at = self.config(0x34, 1) as u16;
        while at != 0 {
            if self.config(at, 1) as u8 == id {
                found.push((self.config(at + 3, 1) as u8, at));
            }
            at = self.config(at + 1, 1) as u16;
        }
        found
    }

    fn start(&mut self) {
        for status in [0, 1, 3] {
            self.write(0x14, status, 1);
        }
        self.write(0x08, 1, 4);
        self.write(0x0c, feature::VERSION_1 >> 32, 4);
        self.write(0x14, 11, 1);
        assert_eq!(self.read(0x14, 1), 11);
        self.ring = Ring::new(0, &self.context.memory);
        self.ring.set_avail(0);
        vm_memory::Bytes::write_slice(
            &self.context.memory,
            &[0; 16],
            vm_memory::GuestAddress(self.ring.used_ring()),
        )
        .expect("in RAM");
        self.write(0x16, 0, 2);
        self.write(0x18, 16, 2);
        self.write(0x20, self.ring.base(), 8);
        // Halves are as good as the whole.
        self.write(0x28, self.ring.avail_ring() & 0xffff_ffff, 4);
        self.write(0x2c, self.ring.avail_ring() >> 32, 4);
        self.write(0x30, self.ring.used_ring(), 8);
        self.write(0x1c, 1, 2);
        self.write(0x14, 15, 1);
    }

    fn request(&mut self) -> u32 {
        let head = self.ring.chain(&[(DATA, 64, WRITE)]);
        self.ring.publish(head);
        self.write(0x3000, 0, 2);
        let (id, len) = self.ring.wait_used();
        assert_eq!(id, head);
        len
    }

    fn enable_msix(&self, control: u16) {
        let (_, at) = self.capabilities(0x11)[0];
        self.set_config(at + 2, &control.to_le_bytes());
    }

    fn set_entry(&self, vector: u64, address: u64, data: u32, mask: u32) {
        self.write(0x4000 + 16 * vector, address, 8);
        self.write(0x4008 + 16 * vector, u64::from(data), 4);
        self.write(0x400c + 16 * vector, u64::from(mask), 4);
    }
}

#[test]
fn identity_and_capabilities_are_as_the_specification_says() {
    let rig = Rig::new(true);
    assert_eq!(rig.config(0, 4), 0x1044_1af4, "entropy source, modern");
    assert_eq!(rig.config(8, 1), 1, "revision");
    let mut types: Vec<u8> = rig.capabilities(9).into_iter().map(|(t, _)| t).collect();
    types.sort_unstable();
    assert_eq!(types, [1, 2, 3, 4, 5]);
    for (_, at) in rig.capabilities(9) {
        assert_eq!(rig.config(at + 2, 1), if matches!(rig.config(at + 3, 1), 2 | 5) { 20 } else { 16 });
    }
    let (_, notify) = rig.capabilities(9).into_iter().find(|(t, _)| *t == 2).expect("there");
    assert_eq!((rig.config(notify + 4, 1), rig.config(notify + 16, 4)), (4, 4));
    assert_eq!(rig.read(0x12, 2), 1, "queues");
    assert_eq!(rig.read(0x00, 8) >> 32, u64::from(feature::QUEUES as u32));
    assert!(Rig::new(false).capabilities(0x11).is_empty());
}

#[test]
fn msix_messages_go_where_they_are_sent_and_wait_while_masked() {
    let mut rig = Rig::new(true);
    rig.enable_msix(0x8000);
    rig.set_entry(0, 0xfee0_0000, 0x41, 0);
    rig.set_entry(1, 0xfee0_1000, 0x42, 0);
    rig.write(0x1a, 9, 2);
    assert_eq!(rig.read(0x1a, 2), 0xffff, "there is no vector 9");
    rig.start();
    rig.write(0x10, 0, 2);
    rig.write(0x16, 0, 2);
    rig.write(0x1a, 1, 2);
    assert_eq!(rig.read(0x1a, 2), 1);
    assert_eq!(rig.request(), 64);
    let message = MsiMessage { address: 0xfee0_1000, data: 0x42, device: 3 << 3 };
    eventually("the message", || *rig.log.lock() == [message]);
    assert!(!rig.line.level.load(Ordering::SeqCst), "the pin is quiet");
    rig.set_entry(1, 0xfee0_1000, 0x43, 1);
    rig.request();
    eventually("pending", || rig.read(0x6000, 8) == 0b10);
    assert_eq!(rig.log.lock().len(), 1);
    rig.set_entry(1, 0xfee0_1000, 0x43, 0);
    assert_eq!(rig.read(0x6000, 8), 0);
    assert_eq!(rig.log.lock().last().map(|m| m.data), Some(0x43));
    // A broken ring is reported through the config vector.
    rig.ring.set_avail(5000);
    rig.write(0x3000, 0, 2);
    eventually("needs reset", || rig.read(0x14, 1) == 15 | 64);
    eventually("told so", || rig.log.lock().last().map(|m| m.data) == Some(0x43 - 2));
}

#[test]
fn without_msix_the_pin_is_used() {
    for msi in [false, true] {
        let mut rig = Rig::new(msi);
        rig.start();
        rig.request();
        eventually("the pin", || rig.line.level.load(Ordering::SeqCst));
        assert_eq!(rig.read(0x1000, 1), 1, "the cause");
        assert!(!rig.line.level.load(Ordering::SeqCst), "reading it acknowledges");
        assert_eq!(rig.read(0x1000, 1), 0);
        rig.request();
        eventually("the pin", || rig.line.level.load(Ordering::SeqCst));
        rig.device.reset();
        assert!(!rig.line.level.load(Ordering::SeqCst));
    }
}

#[test]
fn registers_can_be_reached_without_the_bar() {
    let rig = Rig::new(false);
    let (_, cap) = rig.capabilities(9).into_iter().find(|(t, _)| *t == 5).expect("there");
    rig.set_config(cap + 4, &[4]);
    rig.set_config(cap + 8, &0x14u32.to_le_bytes());
    rig.set_config(cap + 12, &1u32.to_le_bytes());
    rig.set_config(cap + 16, &[3]);
    assert_eq!(rig.read(0x14, 1), 3);
    rig.write(0x14, 0, 1);
    assert_eq!(rig.config(cap + 16, 1), 0);
    rig.set_config(cap + 8, &0x12u32.to_le_bytes());
    rig.set_config(cap + 12, &2u32.to_le_bytes());
    assert_eq!(rig.config(cap + 16, 2), 1, "number of queues");
    for (bar, offset, len) in [(0u8, 0u32, 4u32), (4, 0x7ffe, 4), (4, u32::MAX, 4), (4, 0x14, 3)] {
        rig.set_config(cap + 4, &[bar]);
        rig.set_config(cap + 8, &offset.to_le_bytes());
        rig.set_config(cap + 12, &len.to_le_bytes());
        rig.set_config(cap + 16, &[0xff; 4]);
        rig.config(cap + 16, 4);
    }
    assert_eq!(rig.read(0x14, 1), 0, "impossible accesses do nothing");
}

#[test]
fn a_moved_bar_takes_its_notifications_along() {
    let mut rig = Rig::new(false);
    rig.start();
    rig.request();
    rig.set_config(0x20, &(WINDOW as u32 + 0x8_0000).to_le_bytes());
    rig.base += 0x8_0000;
    rig.request();
    let mut data = [0];
    assert!(!rig.context.mmio.read(None, WINDOW + 0x14, &mut data), "nothing is left behind");
    assert!(!rig.context.mmio.write(None, WINDOW + 0x3000, &[0, 0]), "not even an ioeventfd");
}

#[test]
fn everything_survives_a_restore() {
    let mut rig = Rig::new(true);
    rig.enable_msix(0x8000);
    rig.set_entry(1, 0xfee0_2000, 0x55, 1);
    rig.start();
    rig.write(0x1a, 1, 2);
    rig.request();
    eventually("pending", || rig.read(0x6000, 8) == 0b10);
    rig.device.pause();
    let state = rig.device.save().expect("saves");

    let mut copy = Rig::new(true);
    // The same RAM, as a restored VM would have it.
    let bytes = {
        let mut bytes = vec![0; crate::testing::RAM_SIZE];
        let at = vm_memory::GuestAddress(crate::testing::RAM);
        vm_memory::Bytes::read_slice(&rig.context.memory, &mut bytes, at).expect("RAM");
        vm_memory::Bytes::write_slice(&copy.context.memory, &bytes, at).expect("RAM");
        bytes
    };
    assert!(!bytes.is_empty());
    copy.device.restore(&state).expect("restores");
    copy.device.resume();
    assert_eq!(copy.read(0x14, 1), 15);
    assert_eq!(copy.read(0x1a, 2), 1);
    assert_eq!(copy.read(0x6000, 8), 0b10, "still pending");
    copy.set_entry(1, 0xfee0_2000, 0x55, 0);
    assert_eq!(copy.log.lock().last().map(|m| m.data), Some(0x55));
    std::mem::swap(&mut copy.ring, &mut rig.ring);
    copy.ring.move_to(&copy.context.memory);
    copy.request();
    eventually("a message", || copy.log.lock().len() == 2);
    let other = Rig::new(false);
    assert!(other.device.restore(&state).is_err(), "no MSI-X there");
}

#[test]
fn places_that_are_taken_are_refused() {
    let rig = Rig::new(false);
    let rng = crate::rng::build("rng1", &RngConfig::default(), &rig.context).expect("builds");
    let slot = Slot::Pci { bus: Arc::clone(&rig.bus), device: Some(3) };
    let error = plug("rng1", rng, slot, &rig.context).expect_err("taken");
    assert!(matches!(error, BuildError::Config { .. }), "{error}");
}

#[test]
fn a_disk_is_free_again_when_its_vm_is_gone() {
    let file = tempfile::NamedTempFile::new().expect("file");
    file.as_file().set_len(4096).expect("sized");
    let config = DiskConfig { path: Some(file.path().to_owned()), ..DiskConfig::default() };
    let rig = Rig::new(true);
    let disk = crate::blk::build("_disk1", &config, &rig.context).expect("builds");
    let slot = Slot::Pci { bus: Arc::clone(&rig.bus), device: None };
    let disk = plug("_disk1", disk, slot, &rig.context).expect("plugged");
    let windows = Windows { mem64: (WINDOW, 1 << 20), ..Windows::default() };
    rig.bus.assign_resources(windows).expect("room");
    assert!(crate::blk::build("_disk1", &config, &rig.context).is_err(), "in use");
    // The bus holds the BAR's device, which holds the bus.
    rig.context.mmio.clear();
    drop((disk, rig));
    crate::blk::build("_disk1", &config, &context()).expect("free again");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]
    #[test]
    fn no_access_of_any_kind_does_harm(accesses in prop::collection::vec(
        (any::<bool>(), 0..0x8000u64, 1..17usize, any::<u64>()), 1..60)
    ) {
        let rig = Rig::new(true);
        for (config, offset, len, value) in accesses {
            let offset = if value & 1 == 0 { offset & 0x3f } else { offset };
            let data: Vec<u8> = value.to_le_bytes().into_iter().cycle().take(len).collect();
            if config {
                rig.set_config((offset & 0xff) as u16, &data);
                rig.config((offset & 0xff) as u16, len.min(8));
            } else {
                rig.context.mmio.write(Some(0), WINDOW + offset, &data);
                rig.context.mmio.read(Some(0), WINDOW + offset, &mut vec![0; len]);
            }
        }
        rig.device.pause();
        let state = rig.device.save().expect("saves");
        rig.device.reset();
        rig.device.restore(&state).expect("restores what it saved");
    }
}

#[derive(Debug, Default)]
struct Told(Mutex<Vec<(String, DeviceEvent)>>);

impl SystemSink for Told {
    fn request(&self, _: SystemEvent) {}
    fn device_event(&self, id: &str, event: DeviceEvent) {
        self.0.lock().push((id.to_owned(), event));
    }
}

/// Slot Control and Slot Status of a port, by way of its PCI Express capability.
fn slot(bus: &PciBus, port: &RootPort) -> (u16, u16, u16) {
    let at = port.config().find_capability(0x10).expect("a capability");
    let mut both = [0; 4];
    bus.read_config(0, port.devfn(), at + 0x18, &mut both);
    (at + 0x18, u16::from_le_bytes([both[0], both[1]]), u16::from_le_bytes([both[2], both[3]]))
}

#[test]
fn a_device_is_plugged_into_a_root_port_and_leaves_it_when_the_guest_lets_go() {
    let told = Arc::new(Told::default());
    let context = BuildContext { system: Arc::clone(&told) as Arc<dyn SystemSink>, ..context() };
    let line = Arc::new(Line::default());
    let bus = PciBus::new(PciBusSpec {
        segment: 0,
        mmio: Arc::clone(&context.mmio),
        pio: Arc::clone(&context.pio),
        wires: vec![IrqLine::new(Arc::clone(&line) as Arc<dyn IrqSink>, 0)],
        swizzle: |_, _| 0,
    });
    let port = RootPort::build("hp0", (&bus, 0x10, 1), &context).expect("builds");
    let mut word = [0; 4];
    bus.write_config(0, port.devfn(), 0x18, &[0, 5, 5]);
    bus.read_config(5, 0, 0, &mut word);
    assert_eq!(word, [0xff; 4], "nothing is there");
    let (at, control, status) = slot(&bus, &port);
    assert_eq!((control & 1 << 10 != 0, status & 1 << 6), (true, 0), "no power, no card");
    assert_eq!(port.remove(), Removal::Now);
    // The guest listens: presence, link and button, with interrupts.
    bus.write_config(
        0,
        port.devfn(),
        at,
        &(1u16 << 12 | 1 << 10 | 3 << 8 | 3 << 6 | 1 << 5 | 1 << 3 | 1).to_le_bytes(),
    );
    let rng = crate::rng::build("r0", &RngConfig::default(), &context).expect("builds");
    plug("r0", rng, Slot::Port { bus: Arc::clone(&bus), port: port.devfn() }, &context).expect("plugged");
    port.plugged("r0", true);
    assert!(line.level.load(Ordering::SeqCst), "the guest is told");
    let (_, _, status) = slot(&bus, &port);
    assert_eq!(status, 1 << 8 | 1 << 6 | 1 << 3);
    bus.read_config(5, 0, 0, &mut word);
    assert_eq!(word, [0xf4, 0x1a, 0x44, 0x10]);
    bus.read_config(5, 8, 0, &mut word);
    assert_eq!(word, [0xff; 4], "there is one device");
    bus.write_config(0, port.devfn(), at + 2, &0x0108u16.to_le_bytes());
    assert!(!line.level.load(Ordering::SeqCst), "acknowledged");
    // Power on, then the button, then power off.
    bus.write_config(
        0,
        port.devfn(),
        at,
        &(1u16 << 12 | 1 << 8 | 3 << 6 | 1 << 5 | 1 << 3 | 1).to_le_bytes(),
    );
    assert_eq!(port.remove(), Removal::Asked);
    assert!(line.level.load(Ordering::SeqCst));
    assert_eq!(port.remove(), Removal::UnderWay);
    bus.write_config(0, port.devfn(), at + 2, &1u16.to_le_bytes());
    assert_eq!(*told.0.lock(), []);
    bus.write_config(
        0,
        port.devfn(),
        at,
        &(1u16 << 12 | 1 << 10 | 3 << 8 | 3 << 6 | 1 << 5 | 1 << 3 | 1).to_le_bytes(),
    );
    assert_eq!(*told.0.lock(), [("r0".to_owned(), DeviceEvent::Ejected)]);
    bus.read_config(5, 0, 0, &mut word);
    assert_eq!(word, [0xff; 4]);
    assert!(bus.unplug_behind(port.devfn()).is_some());
    port.emptied();
    // A saved port comes back as it was.
    let state = port.save().expect("saves");
    port.reset();
    port.restore(&state).expect("restores");
    assert_eq!(port.save().expect("saves").data, state.data);
}
