//! Register-level tests of the root bus and what hangs off it.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use holdfast_device::{
    Access, Bus, BusDevice, Device, IrqLine, IrqSink, MsiController, MsiMessage, MsiVector,
};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

use super::*;

#[derive(Debug, Default)]
struct Pins(AtomicU32);
impl IrqSink for Pins {
    fn set_level(&self, pin: u32, level: bool) {
        if level {
            self.0.fetch_or(1 << pin, Ordering::SeqCst);
        } else {
            self.0.fetch_and(!(1 << pin), Ordering::SeqCst);
        }
    }
}

#[derive(Debug)]
struct TestDevice {
    config: Arc<PciConfig>,
    msix: Option<Arc<Msix>>,
    moves: Mutex<Vec<(u8, Option<u64>)>>,
}

impl PciDevice for TestDevice {
    fn pci_name(&self) -> &str {
        "test0"
    }
    fn config(&self) -> &Arc<PciConfig> {
        &self.config
    }
    fn msix(&self) -> Option<&Arc<Msix>> {
        self.msix.as_ref()
    }
    fn read_bar(&self, bar: u8, access: Access, data: &mut [u8]) {
        data.fill(bar << 4 | access.offset as u8);
    }
    fn write_bar(&self, _bar: u8, _access: Access, _data: &[u8]) {}
    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        self.moves.lock().push((bar, base));
    }
}

struct Rig {
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    pins: Arc<Pins>,
    bus: Arc<PciBus>,
}

fn rig() -> Rig {
    let (mmio, pio, pins) = (Bus::new("mmio"), Bus::new("pio"), Arc::new(Pins::default()));
    let wires = (0..4).map(|n| IrqLine::new(Arc::clone(&pins) as Arc<dyn IrqSink>, n)).collect();
    let swizzle = |device: u8, pin: u8| usize::from(device + pin) % 4;
    let bus = PciBus::new(PciBusSpec {
        segment: 0,
        mmio: Arc::clone(&mmio),
        pio: Arc::clone(&pio),
        wires,
        swizzle,
    });
    Rig { mmio, pio, pins, bus }
}

fn identity() -> Identity {
    Identity { vendor: 0x1af4, device: 0x1042, revision: 1, class: 0x018000, ..Identity::default() }
}

fn plug(rig: &Rig, slot: &PciSlot) -> Arc<TestDevice> {
    let mut b = ConfigBuilder::new(identity());
    b.bar(0, BarKind::Io, 64).expect("free").bar(1, BarKind::Mem32, 4096).expect("free");
    b.bar(4, BarKind::Mem64 { prefetchable: true }, 0x4000).expect("free").intx(slot.intx(1));
    let device = Arc::new(TestDevice { config: b.build(), msix: None, moves: Mutex::default() });
    rig.bus.plug(slot, Arc::clone(&device) as Arc<dyn PciDevice>).expect("free");
    device
}

fn write(rig: &Rig, slot: &PciSlot, offset: u16, value: u32) {
    rig.bus.write_config(0, slot.bdf().devfn(), offset, &value.to_le_bytes());
}

fn read(rig: &Rig, slot: &PciSlot, offset: u16) -> u32 {
    let mut b = [0; 4];
    rig.bus.read_config(0, slot.bdf().devfn(), offset, &mut b);
    u32::from_le_bytes(b)
}

#[test]
fn addresses_print_and_parse() {
    let bdf: Bdf = "0000:00:1f.2".parse().expect("well formed");
    assert_eq!((bdf.device(), bdf.function(), bdf.requester()), (31, 2, 0xfa));
    assert_eq!(bdf.to_string(), "0000:00:1f.2");
    for bad in ["", "00:03.0", "0000:00:20.0", "0000:00:00.8", "0000:00:03", "0:0:0:0.0", "x:00:03.0"] {
        assert!(bad.parse::<Bdf>().is_err(), "{bad}");
    }
}

#[test]
fn slots_are_given_once() {
    let rig = rig();
    assert_eq!(rig.bus.reserve(Some(3)).expect("free").bdf().device(), 3);
    assert_eq!(rig.bus.reserve(Some(3)).err(), Some(PciError::SlotTaken { device: 3, function: 0 }));
    assert!(matches!(rig.bus.reserve(Some(32)), Err(PciError::NoSuchSlot { .. })));
    for n in (0..32).filter(|&n| n != 3) {
        assert_eq!(rig.bus.reserve(None).expect("free").bdf().device(), n);
    }
    assert_eq!(rig.bus.reserve(None).err(), Some(PciError::Full));
}

#[test]
fn sizing_and_moving_bars() {
    let rig = rig();
    let slot = rig.bus.reserve(None).expect("free");
    let device = plug(&rig, &slot);
    assert_eq!(read(&rig, &slot, 0), 0x1042_1af4);
    assert_eq!(read(&rig, &slot, 8), 0x0180_0001);
    for (bar, mask) in [(0, 0xffff_ffc1), (1, 0xffff_f000), (2, 0), (4, 0xffff_c00c), (5, 0xffff_ffff)] {
        write(&rig, &slot, 0x10 + 4 * bar, u32::MAX);
        assert_eq!(read(&rig, &slot, 0x10 + 4 * bar), mask, "BAR {bar}");
    }
    assert!(rig.mmio.windows().is_empty(), "nothing is decoded yet");
    write(&rig, &slot, 0x10, 0xc000);
    write(&rig, &slot, 0x14, 0x4000_0000);
    write(&rig, &slot, 0x20, 0x0010_0000);
    write(&rig, &slot, 0x24, 4);
    write(&rig, &slot, 4, 3);
    let at = |bus: &Bus| bus.windows().iter().map(|w| w.base).collect::<Vec<_>>();
    assert_eq!(at(&rig.mmio), [0x4000_0000, 0x4_0010_0000]);
    assert_eq!(at(&rig.pio), [0xc000]);
    let mut b = [0; 2];
    rig.mmio.read(None, 0x4_0010_0006, &mut b);
    assert_eq!(b, [0x46; 2]);
    write(&rig, &slot, 0x14, 0x5000_0000);
    assert_eq!(at(&rig.mmio), [0x5000_0000, 0x4_0010_0000]);
    write(&rig, &slot, 4, 1);
    assert!(rig.mmio.windows().is_empty());
    assert_eq!(device.moves.lock().last(), Some(&(4, None)));
    device.config.reset();
    assert!(rig.pio.windows().is_empty());
    assert_eq!(read(&rig, &slot, 0x10), 1);
}

#[test]
fn a_bar_in_the_way_of_another_waits_for_its_turn() {
    let rig = rig();
    let (a, b) = (rig.bus.reserve(None).expect("free"), rig.bus.reserve(None).expect("free"));
    let (_da, db) = (plug(&rig, &a), plug(&rig, &b));
    for slot in [&a, &b] {
        write(&rig, slot, 0x14, 0x4000_0000);
        write(&rig, slot, 4, 2);
    }
    assert!(db.moves.lock().is_empty());
    write(&rig, &a, 0x14, 0x4000_1000);
    assert_eq!(db.moves.lock().as_slice(), [(1, Some(0x4000_0000))]);
    assert_eq!(rig.mmio.windows().len(), 2);
    rig.bus.unplug(b.bdf()).expect("there");
    assert_eq!(rig.mmio.windows().len(), 1);
    assert_eq!(read(&rig, &b, 0), u32::MAX);
}

#[test]
fn resources_are_assigned_without_overlap() {
    let rig = rig();
    for _ in 0..3 {
        let slot = rig.bus.reserve(None).expect("free");
        plug(&rig, &slot);
    }
    let windows =
        Windows { io: (0xc000, 0x1000), mem32: (0x4000_0000, 0x10_0000), mem64: (1 << 34, 1 << 30) };
    rig.bus.assign_resources(windows).expect("there is room");
    assert_eq!((rig.mmio.windows().len(), rig.pio.windows().len()), (6, 3));
    let none = Windows { io: (0xc000, 0x40), ..windows };
    assert!(matches!(rig.bus.assign_resources(none), Err(PciError::NoRoom { bar: 0, .. })));
    let info = rig.bus.info();
    assert_eq!((info.len(), info[1].class, info[1].irq_pin, info[1].regions.len()), (3, 0x0180, 1, 3));
}

#[test]
fn interrupt_pins_are_swizzled_shared_and_disabled() {
    let rig = rig();
    let (a, b) = (rig.bus.reserve(Some(1)).expect("free"), rig.bus.reserve(Some(5)).expect("free"));
    let (da, db) = (plug(&rig, &a), plug(&rig, &b));
    da.config.set_intx(true);
    db.config.set_intx(true);
    assert_eq!(rig.pins.0.load(Ordering::SeqCst), 2, "devices 1 and 5 share wire 1");
    da.config.set_intx(false);
    assert_eq!(rig.pins.0.load(Ordering::SeqCst), 2);
    write(&rig, &b, 4, 0x400);
    assert_eq!(rig.pins.0.load(Ordering::SeqCst), 0, "Interrupt Disable");
    assert_ne!(read(&rig, &b, 4) & 0x8_0000, 0, "but Interrupt Status stays");
    let saved = db.config.save();
    db.config.reset();
    db.config.restore(&saved).expect("own state");
    write(&rig, &b, 4, 0);
    assert_eq!(rig.pins.0.load(Ordering::SeqCst), 2);
}

#[test]
fn saved_registers_come_back_and_foreign_ones_are_refused() {
    let rig = rig();
    let slot = rig.bus.reserve(None).expect("free");
    let device = plug(&rig, &slot);
    write(&rig, &slot, 0x14, 0x4000_0000);
    write(&rig, &slot, 4, 6);
    let mut saved = device.config.save();
    device.config.reset();
    assert!(rig.mmio.windows().is_empty());
    device.config.restore(&saved).expect("own state");
    assert_eq!(rig.mmio.windows()[0].base, 0x4000_0000);
    assert!(device.config.bus_master());
    saved.regs[0] = 1;
    assert!(device.config.restore(&saved).is_err());
    assert!(device.config.restore(&PciConfigState { regs: vec![0; 5000], intx: false }).is_err());
}

#[test]
fn front_ends_agree_and_take_hostile_accesses() {
    let rig = rig();
    let slot = rig.bus.reserve(Some(2)).expect("free");
    plug(&rig, &slot);
    let ports = ConfigPorts::new(Arc::clone(&rig.bus), None);
    rig.mmio.attach(0x3000_0000, 1 << 28, "ecam", Ecam::new(Arc::clone(&rig.bus))).expect("free");
    rig.pio.attach(0xcf8, 8, "ports", Arc::clone(&ports) as Arc<dyn BusDevice>).expect("free");
    let mut word = [0; 4];
    rig.mmio.read(None, 0x3000_0000 + (2 << 15), &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x1042_1af4);
    rig.pio.write(None, 0xcf8, &0x8000_1000u32.to_le_bytes());
    rig.pio.read(None, 0xcfc, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x1042_1af4);
    let mut half = [0; 2];
    rig.pio.read(None, 0xcfe, &mut half);
    assert_eq!(u16::from_le_bytes(half), 0x1042);
    rig.pio.write(None, 0xcf8, &[0x12]);
    let saved = ports.save().expect("state");
    ports.reset();
    rig.pio.read(None, 0xcfc, &mut word);
    assert_eq!(word, [0xff; 4], "not enabled");
    ports.restore(&saved).expect("own state");
    rig.pio.read(None, 0xcf8, &mut word);
    assert_eq!(u32::from_le_bytes(word), 0x8000_1000);
    for (at, len) in [(0x3000_0000u64 + 0xffd, 4), (0x3fff_ffff, 1), (0x3000_0000 + (2 << 15) + 0xffc, 8)] {
        let mut b = vec![0; len];
        rig.mmio.read(None, at, &mut b);
        assert!(b.iter().all(|&x| x == 0xff), "{at:#x}");
        rig.mmio.write(None, at, &b);
    }
    rig.pio.write(None, 0xcfe, &[0; 4]);
}

#[derive(Debug, Default)]
struct Controller(Mutex<Vec<MsiMessage>>);
#[derive(Debug)]
struct Vector(Arc<Controller>, Mutex<Option<MsiMessage>>, AtomicBool);
impl MsiController for Controller {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        self.0.lock().push(message);
        Ok(())
    }
    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector(self, Mutex::new(None), AtomicBool::new(false))))
    }
}
impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        *self.1.lock() = message;
        if message.is_some() && self.2.swap(false, Ordering::SeqCst) {
            self.trigger()?;
        }
        Ok(())
    }
    fn trigger(&self) -> io::Result<()> {
        match *self.1.lock() {
            Some(m) => self.0.send(m),
            None => {
                self.2.store(true, Ordering::SeqCst);
                Ok(())
            }
        }
    }
    fn eventfd(&self) -> Option<&EventFd> {
        None
    }
    fn pending(&self) -> bool {
        self.2.load(Ordering::SeqCst)
    }
}

#[test]
fn msix_masks_pends_and_delivers() {
    let rig = rig();
    let slot = rig.bus.reserve(Some(4)).expect("free");
    let controller = Arc::new(Controller::default());
    let as_dyn: Arc<dyn MsiController> = Arc::clone(&controller) as Arc<dyn MsiController>;
    let msix = Msix::new(&as_dyn, 3, slot.bdf()).expect("vectors");
    let mut b = ConfigBuilder::new(identity());
    b.bar(1, BarKind::Mem32, 4096).expect("free");
    let at = msix.add_capability(&mut b, 1, 0, 0x800).expect("room");
    let device = TestDevice { config: b.build(), msix: Some(Arc::clone(&msix)), moves: Mutex::default() };
    let config = Arc::clone(&device.config);
    rig.bus.plug(&slot, Arc::new(device)).expect("free");
    assert_eq!(read(&rig, &slot, at), 0x0002_0011);
    msix.trigger(0);
    assert!(!msix.enabled() && !msix.vector(0).expect("there").pending(), "disabled: dropped");
    write(&rig, &slot, at, 0x8000_0000);
    assert!(msix.enabled());
    msix.write_table(16, &0xfee0_0000u64.to_le_bytes());
    msix.write_table(24, &0x41u32.to_le_bytes());
    msix.trigger(1);
    let mut pba = [0; 8];
    msix.read_pba(0, &mut pba);
    assert_eq!(pba[0], 2);
    let (table_state, config_state) = (msix.save(), config.save());
    msix.write_table(28, &0u32.to_le_bytes());
    let message = MsiMessage { address: 0xfee0_0000, data: 0x41, device: 4 << 3 };
    assert_eq!(*controller.0.lock(), [message], "unmasking delivers what was pending");
    msix.reset();
    config.reset();
    assert!(!msix.enabled());
    config.restore(&config_state).expect("own state");
    msix.restore(&table_state, &config).expect("own state");
    msix.write_table(28, &0u32.to_le_bytes());
    assert_eq!(controller.0.lock().len(), 2, "pending survives save and restore");
    for (offset, len) in [(47, 4), (48, 4), (u64::MAX, 8), (20, 8), (0, 3)] {
        let mut data = vec![0; len];
        msix.write_table(offset, &data);
        msix.read_table(offset, &mut data);
        msix.read_pba(offset, &mut data);
    }
    msix.trigger(3);
    assert!(msix.restore(&MsixState::default(), &config).is_err());
}

#[test]
fn malformed_layouts_are_refused() {
    let mut b = ConfigBuilder::new(identity());
    assert!(b.bar(0, BarKind::Mem32, 24).is_err());
    assert!(b.bar(5, BarKind::Mem64 { prefetchable: false }, 4096).is_err());
    assert!(b.bar(6, BarKind::Mem32, 4096).is_err());
    b.bar(0, BarKind::Mem64 { prefetchable: false }, 4096).expect("free");
    assert!(b.bar(1, BarKind::Mem32, 4096).is_err(), "the upper half of BAR 0");
    for _ in 0..12 {
        b.capability(cap::VENDOR, &[0; 14], &[]).expect("room");
    }
    assert!(b.capability(cap::VENDOR, &[0; 14], &[]).is_err());
}
