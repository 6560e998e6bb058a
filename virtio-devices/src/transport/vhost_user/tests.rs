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
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
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
        let front = Self::connect_with(socket, VhostUserProtocolFeatures::empty());
        Self { front, memory: shared_context().memory }
    }

    /// With these protocol features more.
    fn connect_with(socket: &Path, more: VhostUserProtocolFeatures) -> Frontend {
        let mut front = Frontend::connect(socket, 4).expect("connects");
        front.set_owner().expect("owner");
        front.get_features().expect("features");
        front.get_protocol_features().expect("protocol features");
        let protocol = VhostUserProtocolFeatures::REPLY_ACK | VhostUserProtocolFeatures::CONFIG;
        front.set_protocol_features(protocol | more).expect("protocol features");
        front.set_hdr_flags(vhost::vhost_user::message::VhostUserHeaderFlag::NEED_REPLY);
        front
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

/// A front end with one ring of the disk in RAM of its own.
struct Ringed {
    front: Frontend,
    file: std::fs::File,
    memory: vm_memory::GuestMemoryMmap<()>,
    kick: EventFd,
    call: EventFd,
}

const RING: u16 = 16;
const DESC_AT: u64 = 0;
const AVAIL_AT: u64 = 0x1000;
const USED_AT: u64 = 0x2000;

impl Ringed {
    fn connect(socket: &Path, file: std::fs::File) -> Self {
        let front = Wild::connect_with(
            socket,
            VhostUserProtocolFeatures::INFLIGHT_SHMFD | VhostUserProtocolFeatures::LOG_SHMFD,
        );
        let features = feature::VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
        front.set_features(features).expect("features");
        let offset = vm_memory::FileOffset::new(file.try_clone().expect("fd"), 0);
        let memory =
            vm_memory::GuestMemoryMmap::from_ranges_with_files([(GuestAddress(0), 0x10_0000, Some(offset))]);
        let memory = memory.expect("maps");
        let eventfd = || EventFd::new(0).expect("eventfd");
        Self { front, file, memory, kick: eventfd(), call: eventfd() }
    }

    /// Starts the ring from `base`.
    fn start(&mut self, base: u16) {
        use vm_memory::GuestMemoryRegion;
        let region = self.memory.iter().next().expect("RAM");
        let at = region.get_host_address(vm_memory::MemoryRegionAddress(0)).expect("mapped") as u64;
        let info = VhostUserMemoryRegionInfo::from_guest_region(region).expect("shared");
        self.front.set_mem_table(&[info]).expect("RAM");
        let ring = VringConfigData {
            queue_max_size: RING,
            queue_size: RING,
            flags: 0,
            desc_table_addr: at + DESC_AT,
            used_ring_addr: at + USED_AT,
            avail_ring_addr: at + AVAIL_AT,
            log_addr: None,
        };
        self.front.set_vring_num(0, RING).expect("size");
        self.front.set_vring_addr(0, &ring).expect("addresses");
        self.front.set_vring_base(0, base).expect("base");
        self.front.set_vring_call(0, &self.call).expect("call");
        self.front.set_vring_kick(0, &self.kick).expect("kick");
        self.front.set_vring_enable(0, true).expect("enabled");
    }

    /// Puts a read of sector `n` at descriptors 3n to 3n+2 and slot `n`.
    fn read_sector(&self, n: u16) {
        let header = 0x4000 + 0x1000 * u64::from(n);
        self.memory.write_slice(&[0; 8], GuestAddress(header)).expect("RAM");
        self.memory.write_obj(u64::from(n).to_le(), GuestAddress(header + 8)).expect("RAM");
        let parts = [(header, 16u32, 1u16), (header + 0x200, 512, 3), (header + 0x800, 1, 2)];
        for (k, (addr, len, flags)) in (0..).zip(parts) {
            let index = 3 * n + k;
            let at = GuestAddress(DESC_AT + 16 * u64::from(index));
            let words = addr.to_le_bytes().into_iter().chain(len.to_le_bytes());
            let words = words.chain(flags.to_le_bytes()).chain((index + 1).to_le_bytes());
            self.memory.write_slice(&words.collect::<Vec<_>>(), at).expect("RAM");
        }
        self.memory.write_obj((3 * n).to_le(), GuestAddress(AVAIL_AT + 4 + 2 * u64::from(n))).expect("RAM");
        self.memory.write_obj((n + 1).to_le(), GuestAddress(AVAIL_AT + 2)).expect("RAM");
    }

    fn used(&self) -> u16 {
        self.memory.read_obj(GuestAddress(USED_AT + 2)).expect("RAM")
    }

    fn status(&self, n: u16) -> u8 {
        self.memory.read_obj(GuestAddress(0x4800 + 0x1000 * u64::from(n))).expect("RAM")
    }
}

fn memfd(len: u64) -> std::fs::File {
    let fd = rustix::fs::memfd_create("ram", rustix::fs::MemfdFlags::CLOEXEC).expect("memfd");
    let file = std::fs::File::from(fd);
    file.set_len(len).expect("length");
    file
}

#[test]
fn a_front_end_that_shortens_its_ram_loses_its_connection_and_nobody_else_does() {
    let dir = tempfile::tempdir().expect("dir");
    let (socket, other) = (dir.path().join("s"), dir.path().join("t"));
    let (first, second) = (disk(1), disk(1));
    let (_server, _other) = (serve(&first, &socket), serve(&second, &other));
    let mut rig = front_end(&other, 1);
    rig.start(bit::FLUSH);
    let mut ringed = Ringed::connect(&socket, memfd(0x10_0000));
    ringed.start(0);
    ringed.read_sector(0);
    ringed.kick.write(1).expect("kick");
    eventually("the first request is served", || ringed.used() == 1);
    ringed.file.set_len(0).expect("shortened");
    // From here on this process must not touch that memory either.
    ringed.kick.write(1).expect("kick");
    eventually("the connection is closed", || ringed.front.get_features().is_err());
    assert_eq!(sector(&mut rig, 0, 0, 5), 0, "the other front end's disk");
    let mut next = front_end(&socket, 1);
    next.start(bit::FLUSH);
    assert_eq!(sector(&mut next, 0, 0, 5), 0, "the next front end's");
}

#[test]
fn a_front_end_that_moves_its_vm_learns_what_was_written() {
    use std::os::fd::AsRawFd;
    use vhost::VhostUserDirtyLogRegion;
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(1);
    let _server = serve(&disk, &socket);
    let mut ringed = Ringed::connect(&socket, memfd(0x10_0000));
    ringed.start(0);
    ringed.read_sector(0);
    ringed.kick.write(1).expect("kick");
    eventually("it is served", || ringed.used() == 1);
    let log = memfd(4096);
    let wrong = VhostUserDirtyLogRegion { mmap_size: 8192, mmap_offset: 0, mmap_handle: log.as_raw_fd() };
    let part = VhostUserDirtyLogRegion { mmap_size: 32, ..wrong };
    ringed.front.set_log_base(0, Some(part)).expect("a log");
    let features = feature::VERSION_1
        | (VhostUserVirtioFeatures::PROTOCOL_FEATURES | VhostUserVirtioFeatures::LOG_ALL).bits();
    ringed.front.set_features(features).expect("logs");
    let noted = || {
        use std::os::unix::fs::FileExt;
        let mut bytes = [0; 32];
        log.read_exact_at(&mut bytes, 0).expect("the log");
        (0..256u64).filter(|page| bytes[*page as usize / 8] >> (page % 8) & 1 != 0).collect::<Vec<_>>()
    };
    // Nothing but what the back end writes into the used ring last, to be told of the next request.
    assert!(noted().iter().all(|page| *page == USED_AT / 4096), "{:?}", noted());
    ringed.read_sector(1);
    ringed.kick.write(1).expect("kick");
    eventually("it is served", || ringed.used() == 2);
    ringed.front.get_vring_base(0).expect("stands");
    let pages = noted();
    // Data and status; the used ring.
    assert_eq!(pages, [USED_AT / 4096, 0x5000 / 4096]);
    assert!(ringed.front.set_log_base(0, Some(wrong)).is_err(), "more than the file has");
}

#[test]
fn requests_that_a_killed_back_end_left_are_served_by_its_successor() {
    use crate::in_flight::InFlightArea;
    use vhost::vhost_user::message::VhostUserInflight;
    let dir = tempfile::tempdir().expect("dir");
    let socket = dir.path().join("s");
    let disk = disk(1);
    let _server = serve(&disk, &socket);
    let mut ringed = Ringed::connect(&socket, memfd(0x10_0000));
    let (inflight, area) =
        ringed.front.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, RING)).expect("an area");
    for n in 0..4 {
        ringed.read_sector(n);
        ringed.memory.write_obj(0xeeu8, GuestAddress(0x4800 + 0x1000 * u64::from(n))).expect("RAM");
    }
    // The one that died had taken three of the four and finished the second: the used ring alone cannot say which.
    let copy = area.try_clone().expect("fd");
    let mapped = InFlightArea::map(copy, (0, inflight.mmap_size), 1, RING).expect("maps");
    let mut died = mapped.queue(0, RING).expect("a part");
    assert!(died.left(0).is_empty());
    for head in [0, 3, 6] {
        died.begin(head);
    }
    died.finishing(3);
    ringed.memory.write_obj(3u32.to_le(), GuestAddress(USED_AT + 4)).expect("RAM");
    ringed.memory.write_obj(1u16.to_le(), GuestAddress(USED_AT + 2)).expect("RAM");
    drop(ringed.front);
    ringed.front = Wild::connect_with(&socket, VhostUserProtocolFeatures::INFLIGHT_SHMFD);
    let features = feature::VERSION_1 | VhostUserVirtioFeatures::PROTOCOL_FEATURES.bits();
    ringed.front.set_features(features).expect("features");
    let unsealed = memfd(4096);
    let mut wrong = inflight;
    wrong.mmap_size = 4096;
    assert!(ringed.front.set_inflight_fd(&wrong, std::os::fd::AsRawFd::as_raw_fd(&unsealed)).is_err());
    ringed.front.set_inflight_fd(&inflight, std::os::fd::AsRawFd::as_raw_fd(&area)).expect("taken");
    // What QEMU begins again with: where the used ring stands.
    ringed.start(1);
    eventually("all are given back", || ringed.used() == 4);
    assert_eq!([0, 1, 2, 3].map(|n| ringed.status(n)), [0, 0xee, 0, 0], "the finished one is not done again");
    let mut heads: Vec<u32> = (1..4)
        .map(|slot| ringed.memory.read_obj(GuestAddress(USED_AT + 4 + 8 * slot)).expect("RAM"))
        .collect();
    heads.sort_unstable();
    assert_eq!(heads, [0, 6, 9]);
    assert!(mapped.queue(0, RING).expect("a part").left(4).is_empty(), "nothing is under way");
    assert!(ringed.front.get_inflight_fd(&VhostUserInflight::new(0, 0, 1, 4096)).is_err(), "too large");
}
