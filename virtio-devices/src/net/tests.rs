//! The network device over a fake interface, and over a real tap where the host lets us.

use std::collections::VecDeque;
use std::io;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::Arc;

use holdfast_net::{HEADER_LEN, MAX_FRAME, Offloads, PacketBackend, PacketQueue};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use proptest::prelude::*;

use super::config::NetConfig;
use super::{Net, bit};
use crate::device::feature;
use crate::testing::{DATA, Rig, WRITE, context, eventually, mischief, run_wild};

#[derive(Debug)]
struct FakeQueue {
    ready: EventFd,
    to_guest: Mutex<VecDeque<Vec<u8>>>,
    from_guest: Mutex<Vec<Vec<u8>>>,
}

impl PacketQueue for FakeQueue {
    fn fd(&self) -> RawFd {
        self.ready.as_raw_fd()
    }
    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        let frame = self.to_guest.lock().pop_front().ok_or(io::ErrorKind::WouldBlock)?;
        buf[..frame.len()].copy_from_slice(&frame);
        Ok(frame.len())
    }
    unsafe fn send(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        let mut frame = Vec::new();
        for p in parts {
            // SAFETY: the caller vouches for the parts.
            frame
                .extend_from_slice(unsafe { std::slice::from_raw_parts(p.iov_base.cast::<u8>(), p.iov_len) });
        }
        if frame[0] == 0xff {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        let n = frame.len();
        self.from_guest.lock().push(frame);
        Ok(n)
    }
}

#[derive(Debug)]
struct Fake {
    queues: Vec<Arc<FakeQueue>>,
    offloads: Mutex<Vec<Offloads>>,
    enabled: Mutex<usize>,
}

impl Fake {
    fn new(queues: usize) -> Arc<Self> {
        let queue = || FakeQueue {
            ready: EventFd::new(EFD_NONBLOCK).expect("eventfd"),
            to_guest: Mutex::default(),
            from_guest: Mutex::default(),
        };
        let queues = (0..queues).map(|_| Arc::new(queue())).collect();
        Arc::new(Self { queues, offloads: Mutex::default(), enabled: Mutex::default() })
    }

    fn arrive(&self, queue: usize, payload: &[u8]) {
        let mut frame = vec![0; HEADER_LEN];
        frame.extend(payload);
        self.queues[queue].to_guest.lock().push_back(frame);
        self.queues[queue].ready.write(1).expect("signalled");
    }
}

impl PacketBackend for Fake {
    fn name(&self) -> &str {
        "fake"
    }
    fn queues(&self) -> Vec<Arc<dyn PacketQueue>> {
        self.queues.iter().map(|q| Arc::clone(q) as Arc<dyn PacketQueue>).collect()
    }
    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        self.offloads.lock().push(offloads);
        Ok(())
    }
    fn enable_queues(&self, count: usize) -> io::Result<()> {
        *self.enabled.lock() = count;
        Ok(())
    }
    fn mtu(&self) -> Option<u16> {
        Some(1500)
    }
}

fn config(pairs: u16) -> NetConfig {
    let mac = Some("12:34:56:78:9a:bc".parse().expect("a MAC"));
    NetConfig { num_queues: 2 * pairs, mac, ..NetConfig::default() }
}

fn rig(pairs: u16, features: u64) -> (Rig, Arc<Fake>) {
    let context = context();
    let fake = Fake::new(usize::from(pairs));
    let net = Net::new("_net1", &config(pairs), Arc::clone(&fake) as Arc<dyn PacketBackend>, &context);
    let mut rig = Rig::new(context, net.expect("builds"));
    rig.start(features);
    (rig, fake)
}

fn frame(payload: &[u8]) -> Vec<u8> {
    let mut out = vec![0; HEADER_LEN];
    out.extend(payload);
    out
}

#[test]
fn frames_go_out_and_bad_ones_are_dropped() {
    let (mut rig, fake) = rig(1, feature::EVENT_IDX);
    rig.poke(DATA, &frame(b"hello host"));
    assert_eq!(rig.request(1, &[(DATA, 12, 0), (DATA + 12, 4, 0), (DATA + 16, 6, 0)]), 0);
    assert_eq!(*fake.queues[0].from_guest.lock(), [frame(b"hello host")]);
    rig.poke(DATA, &[0xff]);
    rig.request(1, &[(DATA, 20, 0)]);
    rig.request(1, &[(DATA, MAX_FRAME as u32 + 1, 0)]);
    let counters = rig.device.counters();
    assert_eq!((counters["tx_frames"], counters["tx_bytes"], counters["tx_dropped"]), (1, 10, 2));
    let head = rig.rings[1].chain(&[(DATA, 11, 0)]);
    rig.rings[1].publish(head);
    rig.kick(1);
    rig.expect_broken("half a header");
}

#[test]
fn frames_come_in_and_wait_for_buffers() {
    let (mut rig, fake) = rig(1, 0);
    fake.arrive(0, b"early");
    std::thread::sleep(std::time::Duration::from_millis(10));
    assert_eq!(rig.request(0, &[(DATA, 1526, WRITE)]), 17);
    assert_eq!(rig.peek(DATA + 10, 7), b"\x01\0early");
    fake.arrive(0, &[9; 2000]);
    fake.arrive(0, b"fits");
    assert_eq!(rig.request(0, &[(DATA, 12, WRITE), (DATA + 0x1000, 64, WRITE)]), 16, "the long one is lost");
    assert_eq!(rig.peek(DATA + 0x1000, 4), b"fits");
    eventually("counted", || rig.device.counters()["rx_dropped"] == 1);
    assert_eq!(rig.device.counters()["rx_frames"], 2);
    let head = rig.rings[0].chain(&[(DATA, 11, WRITE)]);
    rig.rings[0].publish(head);
    fake.arrive(0, b"x");
    rig.expect_broken("no room for the header");
}

#[test]
fn long_frames_are_spread_over_several_buffers() {
    for features in [bit::MRG_RXBUF, bit::MRG_RXBUF | feature::EVENT_IDX] {
        let (mut rig, fake) = rig(1, features);
        let payload: Vec<u8> = (0..1000u32).map(|i| i as u8).collect();
        fake.arrive(0, &payload);
        // Buffers come one by one: too few of them must not be mistaken for none.
        let mut heads = Vec::new();
        for n in 0..3u64 {
            let head = rig.rings[0].chain(&[(DATA + n * 0x1000, 400, WRITE)]);
            heads.push(head);
            rig.rings[0].publish(head);
            rig.kick(0);
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        let lens = [400, 400, 212];
        for (head, len) in heads.into_iter().zip(lens) {
            assert_eq!(rig.rings[0].wait_used(), (head, len));
        }
        assert_eq!(rig.peek(DATA + 10, 2), [3, 0], "three buffers");
        let mut got = rig.peek(DATA + 12, 388);
        got.extend(rig.peek(DATA + 0x1000, 400));
        got.extend(rig.peek(DATA + 0x2000, 212));
        assert_eq!(got, payload);
    }
}

/// A control command; returns the acknowledgement.
fn control(rig: &mut Rig, queue: u16, command: &[u8]) -> u8 {
    rig.poke(DATA, command);
    rig.poke(DATA + 0x100, &[0xee]);
    assert_eq!(rig.request(queue, &[(DATA, command.len() as u32, 0), (DATA + 0x100, 1, WRITE)]), 1);
    rig.peek(DATA + 0x100, 1)[0]
}

const CONTROL: u64 = bit::CTRL_VQ | bit::CTRL_RX | bit::CTRL_MAC_ADDR | bit::CTRL_GUEST_OFFLOADS;

#[test]
fn the_driver_sets_mac_modes_and_offloads() {
    let (mut rig, fake) = rig(1, CONTROL | bit::GUEST_CSUM | bit::GUEST_TSO4);
    let set = Offloads { csum: true, tso4: true, ..Offloads::default() };
    eventually("offloads set", || fake.offloads.lock().last() == Some(&set));
    assert_eq!(rig.config(0, 6), [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);
    assert_eq!(rig.config(6, 2), [1, 0], "link up");
    assert_eq!(control(&mut rig, 2, &[1, 1, 2, 0, 0, 0, 0, 5]), 0);
    assert_eq!(rig.config(0, 6), [2, 0, 0, 0, 0, 5]);
    assert_eq!(control(&mut rig, 2, &[1, 1, 1, 0, 0, 0, 0, 5]), 1, "a multicast address");
    assert_eq!(control(&mut rig, 2, &[0, 0, 1]), 0, "promiscuous");
    assert_eq!(control(&mut rig, 2, &[0, 9, 1]), 1, "no such mode");
    assert_eq!(control(&mut rig, 2, &[1, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0, "MAC table");
    assert_eq!(control(&mut rig, 2, &[4, 0, 1, 0]), 1, "multi-queue was not negotiated");
    let mut offloads = vec![5, 0];
    offloads.extend(bit::GUEST_CSUM.to_le_bytes());
    assert_eq!(control(&mut rig, 2, &offloads), 0);
    let set = Offloads { csum: true, ..Offloads::default() };
    assert_eq!(fake.offloads.lock().last(), Some(&set));
    offloads[2..].copy_from_slice(&bit::GUEST_UFO.to_le_bytes());
    assert_eq!(control(&mut rig, 2, &offloads), 1, "not negotiated");
    assert_eq!(control(&mut rig, 2, &[5]), 1, "cut off");
    assert_eq!(control(&mut rig, 2, &[77, 0]), 1, "unknown");
    rig.write32(0x70, 0);
    assert_eq!(rig.config(0, 1), [0x12], "a reset brings the MAC back");
}

#[test]
fn queue_pairs_are_switched_and_all_carry_frames() {
    let (mut rig, fake) = rig(2, CONTROL | bit::MQ);
    assert_eq!(rig.config(8, 2), [2, 0]);
    eventually("one pair", || *fake.enabled.lock() == 1);
    assert_eq!(control(&mut rig, 4, &[4, 0, 2, 0]), 0);
    assert_eq!(*fake.enabled.lock(), 2);
    assert_eq!(control(&mut rig, 4, &[4, 0, 3, 0]), 1);
    assert_eq!(control(&mut rig, 4, &[4, 0, 0, 0]), 1);
    fake.arrive(1, b"second");
    assert_eq!(rig.request(2, &[(DATA, 100, WRITE)]), 18);
    rig.poke(DATA, &frame(b"out"));
    rig.request(3, &[(DATA, 15, 0)]);
    assert_eq!(fake.queues[1].from_guest.lock().len(), 1);

    rig.device.pause();
    let state = rig.device.save().expect("saves");
    let (copy, fake) = self::rig(2, 0);
    copy.device.reset();
    copy.device.restore(&state).expect("restores");
    copy.device.resume();
    eventually("two pairs again", || *fake.enabled.lock() == 2);
    let (small, _) = self::rig(1, 0);
    small.device.reset();
    assert!(small.device.restore(&state).is_err());
}

#[test]
fn offers_follow_the_config() {
    let context = context();
    let fake = || Fake::new(1) as Arc<dyn PacketBackend>;
    let all = Net::new("_net1", &config(1), fake(), &context).expect("builds");
    let segmentation = bit::HOST_TSO4 | bit::HOST_TSO6 | bit::GUEST_TSO4 | bit::GUEST_TSO6;
    assert_eq!(crate::VirtioDevice::features(&*all) & segmentation, segmentation);
    let plain = NetConfig { offload_csum: false, mtu: Some(9000), mac: None, ..config(1) };
    let plain = Net::new("_net1", &plain, fake(), &context).expect("builds");
    let features = crate::VirtioDevice::features(&*plain);
    assert_eq!(features & (segmentation | bit::CSUM | bit::GUEST_CSUM | bit::MQ), 0);
    assert_ne!(features & bit::MTU, 0);
    assert!(!plain.mac().is_multicast());
    let mut mtu = [0; 2];
    crate::VirtioDevice::read_config(&*plain, 10, &mut mtu);
    assert_eq!(u16::from_le_bytes(mtu), 9000);
    assert!(Net::new("_net1", &config(2), fake(), &context).is_err(), "too few queues");
}

/// An ICMP echo from the host's kernel over a real tap: the guest's side of ARP and ping by hand.
#[test]
fn the_hosts_kernel_answers_over_a_tap() {
    let context = context();
    let config = NetConfig {
        ip: Some("192.168.232.1".parse().expect("an address")),
        mask: Some("255.255.255.0".parse().expect("a mask")),
        ..config(1)
    };
    let net = match super::build("_net1", &config, Vec::new(), &context) {
        Ok(net) => net,
        Err(e) if e.to_string().contains("ermi") || e.to_string().contains("No such") => {
            return eprintln!("skipped: {e}");
        }
        Err(e) => panic!("{e}"),
    };
    let mut rig = Rig::new(context, net);
    rig.start(bit::MRG_RXBUF);
    // Who has 192.168.232.1? Tell 192.168.232.2.
    let mut arp = vec![0xff; 6];
    arp.extend([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 8, 6, 0, 1, 8, 0, 6, 4, 0, 1]);
    arp.extend([0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc, 192, 168, 232, 2, 0, 0, 0, 0, 0, 0, 192, 168, 232, 1]);
    rig.poke(DATA, &frame(&arp));
    rig.request(1, &[(DATA, (HEADER_LEN + arp.len()) as u32, 0)]);
    for _ in 0..20 {
        let n = rig.request(0, &[(DATA + 0x1000, 2000, WRITE)]) as usize;
        let got = rig.peek(DATA + 0x1000, n);
        let got = &got[HEADER_LEN..];
        // Other things may be said on a new interface; the answer is an ARP reply from that address.
        if got[12..14] == [8, 6] && got[20..22] == [0, 2] {
            assert_eq!(got[28..32], [192, 168, 232, 1]);
            assert_eq!(got[0..6], [0x12, 0x34, 0x56, 0x78, 0x9a, 0xbc]);
            return;
        }
    }
    panic!("no answer");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]
    #[test]
    fn any_driver_can_be_outlived(what in mischief(), frames in prop::collection::vec(1..3000usize, 0..20)) {
        let (mut rig, fake) = rig(2, 0);
        for len in frames {
            fake.arrive(len & 1, &vec![7; len]);
        }
        let features = CONTROL | bit::MQ | bit::MRG_RXBUF | feature::INDIRECT_DESC | feature::EVENT_IDX;
        run_wild(&mut rig, features, &what);
        for queue in &fake.queues {
            queue.to_guest.lock().clear();
        }
        rig.write32(0x70, 0);
        rig.start(CONTROL);
        fake.arrive(0, b"alive");
        prop_assert_eq!(rig.request(0, &[(DATA, 1526, WRITE)]), 17);
    }
}
