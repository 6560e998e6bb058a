//! Register-level tests.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use holdfast_device::IrqSink;

use super::*;

#[derive(Debug, Default)]
struct Wire(AtomicBool, AtomicUsize);
impl IrqSink for Wire {
    fn set_level(&self, _pin: u32, level: bool) {
        if !self.0.swap(level, Ordering::SeqCst) && level {
            self.1.fetch_add(1, Ordering::SeqCst);
        }
    }
}

#[derive(Debug, Default)]
struct Back {
    sent: Mutex<Vec<u8>>,
    receiver: Mutex<Option<Arc<dyn CharReceiver>>>,
    ready: AtomicUsize,
}
impl CharBackend for Back {
    fn send(&self, data: &[u8]) {
        self.sent.lock().extend(data);
    }
    fn connect(&self, receiver: Arc<dyn CharReceiver>) {
        *self.receiver.lock() = Some(receiver);
    }
    fn receiver_ready(&self) {
        self.ready.fetch_add(1, Ordering::SeqCst);
    }
    fn label(&self) -> String {
        "test".into()
    }
}

struct Rig {
    serial: Arc<Serial>,
    wire: Arc<Wire>,
    back: Arc<Back>,
}

fn rig() -> Rig {
    let (wire, back) = (Arc::new(Wire::default()), Arc::new(Back::default()));
    let irq = IrqLine::new(Arc::clone(&wire) as Arc<dyn IrqSink>, 0);
    let serial = Serial::new("serial", irq, Some(Arc::clone(&back) as Arc<dyn CharBackend>));
    Rig { serial, wire, back }
}

impl Rig {
    fn read(&self, register: u64) -> u8 {
        let mut b = [0xaa];
        self.serial.read(Access { offset: register, address: register, vcpu: Some(0) }, &mut b);
        b[0]
    }
    fn write(&self, register: u64, value: u8) {
        self.serial.write(Access { offset: register, address: register, vcpu: Some(0) }, &[value]);
    }
    fn irq(&self) -> bool {
        self.wire.0.load(Ordering::SeqCst)
    }
    fn input(&self, data: &[u8]) {
        let receiver = self.back.receiver.lock().clone().expect("connected");
        receiver.receive(data);
    }
    fn room(&self) -> usize {
        self.back.receiver.lock().clone().expect("connected").capacity()
    }
}

#[test]
fn transmits_and_interrupts_with_an_edge_each_time() {
    let r = rig();
    r.write(0, b'a');
    assert!(!r.irq());
    r.write(1, 2);
    assert!(r.irq());
    assert_eq!(r.read(2), 2);
    assert!(!r.irq(), "reading IIR acknowledges");
    let edges = r.wire.1.load(Ordering::SeqCst);
    r.write(0, b'b');
    r.write(0, b'c');
    assert_eq!(r.wire.1.load(Ordering::SeqCst), edges + 2);
    assert_eq!(*r.back.sent.lock(), b"abc");
    assert_eq!(r.read(5), 0x60);
}

#[test]
fn receives_with_trigger_level_timeout_overrun_and_back_pressure() {
    let r = rig();
    assert_eq!(r.room(), 1, "no FIFO yet");
    r.write(2, 0x41);
    r.write(1, 5);
    assert_eq!(r.room(), 16);
    r.input(b"xyz");
    assert_eq!(r.read(2), 0xcc, "below the trigger level of 4: time-out");
    r.input(b"w");
    assert_eq!(r.read(2), 0xc4);
    r.input(&[b'.'; 12]);
    assert_eq!(r.room(), 0);
    r.input(b"!");
    assert_eq!(r.read(2), 0xc6, "overrun has priority");
    assert_eq!(r.read(5), 0x63);
    assert_eq!(r.read(5), 0x61, "errors clear on read");
    assert_eq!(r.back.ready.load(Ordering::SeqCst), 0);
    let text: Vec<u8> = (0..16).map(|_| r.read(0)).collect();
    assert_eq!(text, b"xyzw............");
    assert_eq!(r.back.ready.load(Ordering::SeqCst), 1);
    assert!(!r.irq());
    assert_eq!(r.read(0), 0);
}

#[test]
fn loopback_feeds_receiver_and_modem_inputs() {
    let r = rig();
    assert_eq!(r.read(6), 0xb0);
    r.write(4, 0x1a);
    assert_eq!(r.read(6) & 0xf0, 0x90, "RTS and OUT2 show as CTS and DCD");
    assert_eq!(r.room(), 0);
    r.write(0, 0x55);
    assert_eq!(r.read(0), 0x55);
    assert!(r.back.sent.lock().is_empty());
    r.read(6);
    r.write(1, 8);
    r.write(4, 0x18);
    assert!(r.irq(), "CTS has changed");
    assert_eq!(r.read(2), 0);
    assert_eq!(r.read(6), 0x81);
    assert!(!r.irq());
}

#[test]
fn divisor_latch_scratch_and_reset() {
    let r = rig();
    r.write(3, 0x83);
    r.write(0, 0x34);
    r.write(1, 0x12);
    assert_eq!((r.read(0), r.read(1)), (0x34, 0x12));
    r.write(3, 0x03);
    r.write(7, 0x5a);
    assert_eq!((r.read(1), r.read(7), r.read(3)), (0, 0x5a, 3));
    r.serial.reset();
    assert_eq!((r.read(7), r.read(3)), (0, 0));
}

#[test]
fn state_survives_and_bad_state_is_refused() {
    let r = rig();
    r.write(2, 1);
    r.write(1, 1);
    r.input(b"hi");
    let mut state = r.serial.save().expect("state");
    let other = rig();
    other.serial.restore(&state).expect("same kind");
    assert!(other.irq());
    assert_eq!((other.read(0), other.read(0)), (b'h', b'i'));
    state.data["received"] = serde_json::json!(vec![0; 17]);
    assert!(other.serial.restore(&state).is_err());
    state.version = 2;
    assert!(other.serial.restore(&state).is_err());
}

#[test]
fn odd_accesses_do_no_harm() {
    let r = rig();
    for offset in (0..256).chain([u64::MAX]) {
        for len in [0, 1, 2, 3, 4, 8, 64] {
            let mut data = vec![0xff; len];
            r.serial.write(Access { offset, address: 0, vcpu: None }, &data);
            r.serial.read(Access { offset, address: 0, vcpu: None }, &mut data);
            assert!(data.iter().skip(1).all(|&b| b == 0));
        }
    }
}
