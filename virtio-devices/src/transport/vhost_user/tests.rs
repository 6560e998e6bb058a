//! Our disk on both sides of a socket: the front end's relay in front, the same device behind.

use std::io::Write;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::sync::Arc;

use holdfast_memory::GuestMemory;
use vhost::vhost_user::Frontend;
use vhost::vhost_user::VhostUserFrontend;
use vhost::vhost_user::message::{VhostUserProtocolFeatures, VhostUserVirtioFeatures};
use vhost::{VhostBackend, VhostUserMemoryRegionInfo, VringConfigData};
use vm_memory::GuestMemoryBackend;
use vmm_sys_util::eventfd::EventFd;

use super::{Address, Server};
use crate::blk::config::DiskConfig;
use crate::blk::{self, bit};
use crate::device::{VirtioDevice, feature};
use crate::testing::{DATA, Rig, WRITE, context, eventually, shared_context};
use crate::vhost_user;

const STATUS: u64 = DATA + 0x100;
const BUF: u64 = DATA + 0x1000;
const SIZE: u64 = 64 * 512;

struct Disk {
    image: tempfile::NamedTempFile,
    device: Arc<blk::Blk>,
}

fn disk(queues: u16) -> Disk {
    let mut image = tempfile::NamedTempFile::new().expect("file");
    image.write_all(&vec![7; SIZE as usize]).expect("written");
    let path = Some(image.path().to_owned());
    let config = DiskConfig { path, num_queues: queues, queue_size: 64, ..DiskConfig::default() };
    let device = blk::build("disk", &config, &context()).expect("builds");
    Disk { image, device }
}

fn serve(disk: &Disk, socket: &Path) -> Server {
    let _ = std::fs::remove_file(socket);
    let address = Address::Listener(UnixListener::bind(socket).expect("binds"));
    let device: Arc<dyn VirtioDevice> = Arc::clone(&disk.device) as _;
    Server::start(device, address, &holdfast_threads::PlainSpawner).expect("starts")
}

fn front_end(socket: &Path, queues: u16) -> Rig {
    let config = DiskConfig {
        vhost_user: true,
        vhost_socket: Some(socket.display().to_string()),
        num_queues: queues,
        queue_size: 32,
        ..DiskConfig::default()
    };
    let context = shared_context();
    let device = vhost_user::blk::build("_disk0", &config, &context).expect("built");
    Rig::new(context, device)
}

/// Writes (`kind` 1) or reads (0) one sector.
fn sector(rig: &mut Rig, queue: u16, kind: u32, sector: u64) -> u8 {
    let mut header = u64::from(kind).to_le_bytes().to_vec();
    header.extend(sector.to_le_bytes());
    rig.poke(DATA, &header);
    rig.poke(STATUS, &[0xee]);
    let flags = if kind == 0 { WRITE } else { 0 };
    rig.request(queue, &[(DATA, 16, 0), (BUF, 512, flags), (STATUS, 1, WRITE)]);
    rig.peek(STATUS, 1)[0]
}

#[test]
fn a_disk_is_read_and_written_over_a_socket_and_grows() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(2);
    let server = serve(&disk, &socket);
    let mut rig = front_end(&socket, 2);
    assert_eq!(rig.config(0, 8), (SIZE / 512).to_le_bytes());
    assert_eq!(rig.config(12, 4), 30u32.to_le_bytes(), "what fits the front end's rings");
    assert_eq!(rig.config(34, 2), 2u16.to_le_bytes());
    rig.start(bit::FLUSH | bit::MQ | feature::EVENT_IDX);
    for queue in [0, 1] {
        rig.poke(BUF, &[0xa0 + queue as u8; 512]);
        assert_eq!(sector(&mut rig, queue, 1, 5 + u64::from(queue)), 0);
        rig.poke(BUF, &[0; 512]);
        assert_eq!(sector(&mut rig, queue, 0, 5 + u64::from(queue)), 0);
        assert_eq!(rig.peek(BUF, 512), [0xa0 + queue as u8; 512]);
    }
    let bytes = std::fs::read(disk.image.path()).expect("reads");
    assert_eq!((bytes[5 * 512], bytes[6 * 512], bytes[7 * 512]), (0xa0, 0xa1, 7));
    assert_eq!(sector(&mut rig, 0, 0, SIZE / 512), 1, "past the end");
    disk.image.as_file().set_len(2 * SIZE).expect("grows");
    assert!(disk.device.backend().refresh().expect("refreshes"));
    server.config_changed();
    eventually("the guest sees the new size", || rig.config(0, 8) == (2 * SIZE / 512).to_le_bytes());
    assert_eq!(sector(&mut rig, 0, 0, SIZE / 512), 0);
    // A reset, and all over again.
    rig.start(bit::FLUSH);
    assert_eq!(sector(&mut rig, 0, 0, 5), 0);
    assert_eq!(rig.peek(BUF, 1), [0xa0]);
}

#[test]
fn a_back_end_that_comes_again_goes_on() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(1);
    let mut server = serve(&disk, &socket);
    let mut rig = front_end(&socket, 1);
    rig.start(bit::FLUSH);
    for round in 0..5u8 {
        rig.poke(BUF, &[round; 512]);
        assert_eq!(sector(&mut rig, 0, 1, u64::from(round)), 0);
        server.stop();
        server = serve(&disk, &socket);
    }
    let bytes = std::fs::read(disk.image.path()).expect("reads");
    assert_eq!((0..5).map(|n| bytes[n * 512]).collect::<Vec<_>>(), [0, 1, 2, 3, 4]);
}

#[test]
fn what_a_back_end_lacks_is_refused_by_name() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(1);
    let _server = serve(&disk, &socket);
    let build = |queues, readonly| {
        let vhost_socket = Some(socket.display().to_string());
        let config = DiskConfig {
            vhost_user: true,
            vhost_socket,
            num_queues: queues,
            readonly,
            ..DiskConfig::default()
        };
        vhost_user::blk::build("d", &config, &shared_context()).expect_err("refused").to_string()
    };
    assert!(build(1, true).contains("lets the guest write"));
    assert!(build(2, false).contains("1 queues, 2 are asked for"));
}

/// A front end that says what it likes.
struct Wild {
    front: Frontend,
    memory: GuestMemory,
}

impl Wild {
    fn connect(socket: &Path) -> Self {
        let mut front = Frontend::connect(socket, 4).expect("connects");
        front.set_owner().expect("owner");
        front.get_features().expect("features");
        front.get_protocol_features().expect("protocol features");
        let protocol = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
        front.set_protocol_features(protocol).expect("protocol features");
        front.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        Self { front, memory: shared_context().memory }
    }

    fn region(&self) -> VhostUserMemoryRegionInfo {
        let region = self.memory.iter().next().expect("RAM");
        VhostUserMemoryRegionInfo::from_guest_region(region).expect("shared")
    }
}

#[test]
fn wild_front_ends_are_answered_or_dropped_and_the_next_one_is_served() {
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(1);
    let _server = serve(&disk, &socket);
    // Garbage, and half a message.
    for bytes in [&[0xffu8; 64][..], &[1, 0, 0, 0, 1][..], &[]] {
        let mut stream = std::os::unix::net::UnixStream::connect(&socket).expect("connects");
        stream.write_all(bytes).expect("written");
    }
    // More RAM than the file has, rings out of RAM, features that are not there, rings that are not there.
    let wild = Wild::connect(&socket);
    let long = VhostUserMemoryRegionInfo { memory_size: 1 << 40, ..wild.region() };
    assert!(wild.front.set_mem_table(&[long]).is_err());
    drop(wild);
    let wild = Wild::connect(&socket);
    assert!(wild.front.set_features(1 << 60).is_err());
    drop(wild);
    let mut wild = Wild::connect(&socket);
    let features = feature::VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    wild.front.set_features(features).expect("features");
    assert!(wild.front.set_vring_num(0, 4096).is_err());
    assert!(wild.front.set_vring_num(3, 16).is_err());
    wild.front.set_vring_num(0, 16).expect("a ring");
    let region = wild.region();
    wild.front.set_mem_table(&[region]).expect("RAM");
    let outside = VringConfigData {
        queue_max_size: 16,
        queue_size: 16,
        flags: 0,
        desc_table_addr: 0x1000,
        used_ring_addr: 0x2000,
        avail_ring_addr: 0x3000,
        log_addr: None,
    };
    wild.front.set_vring_addr(0, &outside).expect("nothing looks there yet");
    let kick = EventFd::new(0).expect("eventfd");
    wild.front.set_vring_enable(0, true).expect("enabled");
    assert!(wild.front.set_vring_kick(0, &kick).is_err(), "not in RAM");
    drop(wild);
    let mut rig = front_end(&socket, 1);
    rig.start(bit::FLUSH);
    assert_eq!(sector(&mut rig, 0, 0, 1), 0);
}
