//! The console with one and with several ports.

use std::sync::Arc;

use holdfast_devices::chardev::{CharBackend, CharReceiver};
use parking_lot::Mutex;

use proptest::prelude::*;

use super::{Console, PortArgs, bit};
use crate::device::feature::INDIRECT_DESC;
use crate::testing::{DATA, Rig, WRITE, context, eventually, mischief, run_wild};

#[derive(Debug, Default)]
struct Loopback {
    sent: Mutex<Vec<u8>>,
    receiver: Mutex<Option<Arc<dyn CharReceiver>>>,
    ready: Mutex<u32>,
}

impl Loopback {
    /// Types as much as the front end takes.
    fn type_in(&self, data: &[u8]) -> usize {
        let receiver = self.receiver.lock().clone().expect("connected");
        let n = receiver.capacity().min(data.len());
        receiver.receive(&data[..n]);
        n
    }
}

impl CharBackend for Loopback {
    fn send(&self, data: &[u8]) {
        self.sent.lock().extend(data);
    }
    fn connect(&self, receiver: Arc<dyn CharReceiver>) {
        *self.receiver.lock() = Some(receiver);
    }
    fn receiver_ready(&self) {
        *self.ready.lock() += 1;
    }
    fn label(&self) -> String {
        "loopback".to_owned()
    }
}

struct Test {
    rig: Rig,
    console: Arc<Console>,
    backends: Vec<Arc<Loopback>>,
}

fn test(names: &[Option<&str>], features: u64) -> Test {
    let context = context();
    let backends: Vec<Arc<Loopback>> = names.iter().map(|_| Arc::default()).collect();
    let ports = names.iter().zip(&backends).map(|(name, backend)| PortArgs {
        name: name.map(ToOwned::to_owned),
        is_console: name.is_none(),
        backend: Arc::clone(backend) as Arc<dyn CharBackend>,
    });
    let console = Console::new("__console", ports.collect(), &context).expect("builds");
    let mut rig = Rig::new(context, Arc::clone(&console) as Arc<dyn crate::VirtioDevice>);
    rig.start(features);
    Test { rig, console, backends }
}

fn message(port: u32, event: u16, value: u16) -> Vec<u8> {
    let mut out = port.to_le_bytes().to_vec();
    out.extend(event.to_le_bytes());
    out.extend(value.to_le_bytes());
    out
}

#[test]
fn a_simple_console_carries_bytes_both_ways() {
    let mut t = test(&[None], bit::SIZE);
    t.rig.poke(DATA, b"hello world");
    assert_eq!(t.rig.request(1, &[(DATA, 6, 0), (DATA + 6, 5, 0)]), 0);
    eventually("sent", || *t.backends[0].sent.lock() == b"hello world");
    assert_eq!(t.backends[0].type_in(b"input"), 5);
    let len = t.rig.request(0, &[(DATA + 0x1000, 3, WRITE), (DATA + 0x2000, 64, WRITE)]);
    assert_eq!(len, 5);
    assert_eq!(t.rig.peek(DATA + 0x1000, 3), b"inp");
    assert_eq!(t.rig.peek(DATA + 0x2000, 2), b"ut");
    assert!(*t.backends[0].ready.lock() > 0);
    t.console.resize(132, 43);
    assert_eq!(t.rig.config(0, 4), [132, 0, 43, 0]);
    eventually("config interrupt", || t.rig.read32(0x60) & 2 != 0);
    let counters = t.rig.device.counters();
    assert_eq!((counters["rx_bytes"], counters["tx_bytes"]), (5, 11));
}

#[test]
fn input_is_bounded_and_none_is_lost() {
    let mut t = test(&[None], 0);
    let text: Vec<u8> = (0..10_000u32).map(|i| i as u8).collect();
    let mut typed = t.backends[0].type_in(&text);
    assert_eq!(typed, super::INPUT);
    let mut got = Vec::new();
    while got.len() < text.len() {
        let n = t.rig.request(0, &[(DATA, 1000, WRITE)]) as usize;
        got.extend(t.rig.peek(DATA, n));
        typed += t.backends[0].type_in(&text[typed..]);
    }
    assert_eq!(got, text);
}

/// Gives the control queue `n` buffers and returns the messages that come.
fn messages(t: &mut Test, n: u64) -> Vec<Vec<u8>> {
    for i in 0..n {
        let head = t.rig.rings[2].chain(&[(DATA + 0x10_0000 + 64 * i, 64, WRITE)]);
        t.rig.rings[2].publish(head);
    }
    t.rig.kick(2);
    (0..n)
        .map(|i| {
            let (_, len) = t.rig.rings[2].wait_used();
            t.rig.peek(DATA + 0x10_0000 + 64 * i, len as usize)
        })
        .collect()
}

fn control(t: &mut Test, port: u32, event: u16, value: u16) {
    t.rig.poke(DATA, &message(port, event, value));
    t.rig.request(3, &[(DATA, 8, 0)]);
}

#[test]
fn ports_are_announced_named_and_opened() {
    let mut t = test(&[None, Some("org.example.agent")], bit::MULTIPORT | bit::SIZE);
    assert_eq!(t.rig.config(4, 4), 2u32.to_le_bytes());
    t.console.resize(80, 25);
    control(&mut t, u32::MAX, 0, 1);
    assert_eq!(messages(&mut t, 2), [message(0, 1, 1), message(1, 1, 1)]);
    control(&mut t, 0, 3, 1);
    let mut resize = message(0, 5, 0);
    resize.extend([80, 0, 25, 0]);
    assert_eq!(messages(&mut t, 3), [message(0, 4, 1), resize, message(0, 6, 1)]);
    control(&mut t, 1, 3, 1);
    let mut name = message(1, 7, 1);
    name.extend(b"org.example.agent");
    assert_eq!(messages(&mut t, 2), [name, message(1, 6, 1)]);

    // Nobody has port 1 open yet: its input is dropped, like that of a line without a listener.
    t.backends[1].type_in(b"lost");
    eventually("dropped", || *t.backends[1].ready.lock() > 0);
    control(&mut t, 1, 6, 1);
    t.backends[1].type_in(b"found");
    assert_eq!(t.rig.request(4, &[(DATA, 64, WRITE)]), 5);
    assert_eq!(t.rig.peek(DATA, 5), b"found");
    t.rig.poke(DATA, b"answer");
    t.rig.request(5, &[(DATA, 6, 0)]);
    eventually("sent", || *t.backends[1].sent.lock() == b"answer");
    assert!(t.backends[0].sent.lock().is_empty());

    t.console.resize(81, 25);
    let mut resize = message(0, 5, 0);
    resize.extend([81, 0, 25, 0]);
    assert_eq!(messages(&mut t, 1), [resize]);
}

#[test]
fn hostile_control_messages_are_bounded_or_break_the_device() {
    let mut t = test(&[None], bit::MULTIPORT);
    for _ in 0..400 {
        control(&mut t, 0, 3, 1);
    }
    control(&mut t, 77, 3, 1);
    control(&mut t, 0, 99, 9);
    let kept = t.console.shared.control.lock().clone();
    assert_eq!(kept.clone().bounded(), kept);
    assert_eq!(t.rig.status(), 15);
    let head = t.rig.rings[2].chain(&[(DATA, 4, WRITE)]);
    t.rig.rings[2].publish(head);
    t.rig.kick(2);
    t.rig.expect_broken("no room for a message");
    t.rig.start(bit::MULTIPORT);
    let head = t.rig.rings[3].chain(&[(DATA, 7, 0)]);
    t.rig.rings[3].publish(head);
    t.rig.kick(3);
    t.rig.expect_broken("half a message");
}

#[test]
fn unread_input_and_open_ports_survive() {
    let mut t = test(&[None, Some("p")], bit::MULTIPORT);
    control(&mut t, 0, 3, 1);
    t.backends[0].type_in(b"kept");
    t.rig.device.pause();
    let state = t.rig.device.save().expect("saves");
    let mut copy = test(&[None, Some("p")], 0);
    copy.rig.device.reset();
    copy.rig.context.memory = t.rig.context.memory.clone();
    copy.rig.device.restore(&state).expect("restores");
    assert_eq!(copy.console.shared.ports[0].take(9), b"kept");
    let states = copy.console.shared.control.lock().states.clone();
    assert!(states[0].ready && states[0].open && !states[1].ready);
    let other = test(&[None], 0);
    other.rig.device.reset();
    assert!(other.rig.device.restore(&state).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_driver_can_be_outlived(what in mischief(), typed in prop::collection::vec(any::<u8>(), 0..5000)) {
        let mut t = test(&[None, Some("p")], 0);
        t.backends[0].type_in(&typed);
        t.backends[1].type_in(&typed);
        run_wild(&mut t.rig, bit::MULTIPORT | INDIRECT_DESC, &what);
        t.backends[0].sent.lock().clear();
        t.rig.poke(DATA, b"alive");
        t.rig.request(1, &[(DATA, 5, 0)]);
        eventually("sent", || *t.backends[0].sent.lock() == b"alive");
    }
}
