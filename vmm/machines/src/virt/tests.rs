//! The machine on a VM that only remembers what it is told.

use std::path::{Path, PathBuf};

use holdfast_accel::Vm;
use holdfast_accel_still::{StillVm, Told};
use holdfast_arch::riscv64::State;
use holdfast_device::{BuildContext, SystemEvent};

use super::*;
use crate::Topology;

fn request(payload: Payload) -> MachineRequest {
    MachineRequest {
        boot_vcpus: 2,
        max_vcpus: 2,
        payload,
        ..MachineRequest::new(VirtModule.default_cpu(), 64 << 20)
    }
}

struct Rig {
    machine: Box<dyn Machine>,
    vm: Arc<StillVm>,
    build: BuildContext,
}

fn rig(payload: Payload) -> Rig {
    let request = request(payload);
    let ram = VirtModule.ram_layout(&request).expect("a plan");
    let vm = StillVm::new(Arch::Riscv64, request.irqchip, Told::default());
    let build = vm.context(&[(ram[0].gpa, ram[0].len)]);
    let context = MachineContext { build: build.clone(), vm: Arc::clone(&vm) as Arc<dyn Vm> };
    let machine = VirtModule.build(request, context).expect("a machine");
    Rig { machine, vm, build }
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.build.timers.stop();
    }
}

struct Files(PathBuf);
impl Files {
    fn new(name: &str) -> Self {
        let dir = std::env::temp_dir().join(format!("holdfast-virt-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).expect("a directory");
        Self(dir)
    }
    fn put(&self, name: &str, data: &[u8]) -> PathBuf {
        let path = self.0.join(name);
        std::fs::write(&path, data).expect("writable");
        path
    }
}
impl Drop for Files {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn image(size: usize) -> Vec<u8> {
    let mut image = vec![0x13; size];
    image[8..16].copy_from_slice(&(2u64 << 20).to_le_bytes());
    image[16..24].copy_from_slice(&(size as u64 + 4096).to_le_bytes());
    image[24..32].fill(0);
    image[56..60].copy_from_slice(b"RSC\x05");
    image
}

#[test]
fn a_kernel_is_loaded_behind_its_firmware_and_found_again_after_a_reset() {
    let files = Files::new("load");
    let kernel = files.put("Image", &image(10_000));
    let firmware = files.put("fw.bin", &[0x6f; 5000]);
    let initramfs = files.put("initrd", b"cpio");
    let payload = Payload {
        kernel: Some(kernel.clone()),
        firmware: Some(firmware),
        initramfs: Some(initramfs),
        cmdline: "console=ttyS0 quiet".into(),
        ..Payload::default()
    };
    let rig = rig(payload);
    assert!(rig.machine.take_mmio_slot().is_some());
    rig.machine.load().expect("loads");
    let rom = rig.vm.roms()[0].clone();
    let word = |at: u64| rom.region.read_obj::<u64>(MemoryRegionAddress(at)).expect("in the ROM");
    let (entry, fdt, next) = (word(0x38), word(0x40), word(0x58));
    assert_eq!((rom.gpa, entry, next), (0x1000, 0x8000_0000, 0x8020_0000));
    let memory = &rig.build.memory;
    assert_eq!(memory.read_obj::<u8>(GuestAddress(entry)).expect("RAM"), 0x6f);
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(next + 56)).expect("RAM"), *b"RSC\x05");
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(fdt - 4096)).expect("RAM"), *b"cpio");
    let tree = |at| {
        let mut head = [0; 8];
        memory.read_slice(&mut head, GuestAddress(at)).expect("RAM");
        let size = u32::from_be_bytes([head[4], head[5], head[6], head[7]]);
        let mut blob = vec![0; size as usize];
        memory.read_slice(&mut blob, GuestAddress(at)).expect("RAM");
        blob
    };
    let blob = tree(fdt);
    assert_eq!(blob[..4], [0xd0, 0x0d, 0xfe, 0xed]);
    let has = |text: &[u8]| blob.windows(text.len()).any(|w| w == text);
    assert!(has(b"console=ttyS0 quiet\0") && has(b"virtio_mmio@10001000\0") && has(b"riscv,sv57\0"));
    assert!(!has(b"virtio_mmio@10002000\0"), "only slots in use are shown");
    assert!(has(&(fdt - 4096).to_be_bytes()) && has(&(fdt - 4092).to_be_bytes()), "initramfs range");
    memory.write_slice(&[0; 64], GuestAddress(next)).expect("RAM");
    rig.machine.load().expect("loads again");
    assert_eq!(memory.read_obj::<[u8; 4]>(GuestAddress(next + 56)).expect("RAM"), *b"RSC\x05");
    assert_ne!(tree(fdt), blob, "the seed is fresh");
    let start = rig.machine.start_state(1, CpuState::Riscv64(Box::default()));
    let CpuState::Riscv64(start) = start else { panic!("a RISC-V state") };
    assert_eq!(*start, State { pc: 0x1000, hartid: 1, ..State::default() });
}

#[test]
fn what_cannot_be_loaded_is_named() {
    let files = Files::new("errors");
    let good = files.put("Image", &image(10_000));
    let firmware = Some(files.put("fw.bin", &[0; 16]));
    let try_load = |payload: Payload| rig(payload).machine.load().expect_err("cannot load").to_string();
    let with = |kernel: Option<&Path>| Payload {
        kernel: kernel.map(Path::to_owned),
        firmware: firmware.clone(),
        ..Payload::default()
    };
    assert!(try_load(Payload::default()).contains("neither a kernel nor a firmware"));
    assert!(try_load(with(Some(Path::new("/nonexistent")))).contains("/nonexistent"));
    assert!(try_load(with(Some(Path::new("/")))).contains("not a file"));
    let gzip = files.put("Image.gz", &[0x1f, 0x8b, 8, 0]);
    assert!(try_load(with(Some(&gzip))).contains("gzip"));
    let empty = files.put("empty", b"");
    assert!(
        try_load(with(Some(&empty))).contains("nothing")
            || try_load(with(Some(&empty))).contains("something")
    );
    let mut huge = image(10_000);
    huge[16..24].copy_from_slice(&(1u64 << 30).to_le_bytes());
    let huge = files.put("huge", &huge);
    assert!(try_load(with(Some(&huge))).contains("does not fit"));
    let elf = files.put("fw.elf", b"\x7fELF....");
    let payload = Payload { firmware: Some(elf), kernel: Some(good), ..Payload::default() };
    assert!(try_load(payload).contains("ELF"));
    let payload = Payload { cmdline: "quiet".into(), ..with(None) };
    assert!(try_load(payload).contains("need a kernel"));
    rig(with(None)).machine.load().expect("firmware alone");
}

#[test]
fn requests_that_cannot_be_met_say_why() {
    let plan = |change: fn(&mut MachineRequest)| {
        let mut request = request(Payload::default());
        change(&mut request);
        Plan::new(&request).expect_err("cannot be").to_string()
    };
    assert!(plan(|r| r.boot_vcpus = 0).contains("0 vCPUs"));
    assert!(plan(|r| r.boot_vcpus = 65).contains("1 to 64"));
    assert!(plan(|r| r.max_vcpus = 4).contains("cannot be added later"));
    assert!(plan(|r| r.ram_size = 4096).contains("16 MiB"));
    assert!(plan(|r| r.ram_size = u64::MAX).contains("64 TiB"));
    assert!(plan(|r| r.debug_console_port = Some(0xe9)).contains("debug console"));
    let three = |r: &mut MachineRequest| {
        r.topology = Some(Topology { threads: 3, cores: 1, dies: 1, packages: 1 });
    };
    assert!(plan(three).contains("topology"));
}

#[test]
fn devices_are_where_the_tree_says_and_wired_as_it_says() {
    let rig = rig(Payload::default());
    let mmio = &rig.build.mmio;
    let write = |at: u64, value: u32| assert!(mmio.write(Some(0), at, &value.to_le_bytes()), "{at:#x}");
    let read = |at: u64| {
        let mut b = [0; 4];
        assert!(mmio.read(Some(0), at, &mut b), "{at:#x}");
        u32::from_le_bytes(b)
    };
    write(plan::SYSCON.base, 0x7777);
    assert_eq!(rig.vm.told().events(), [SystemEvent::Reset]);
    assert_eq!(read(plan::PCI_ECAM.base), 0x0008_1b36);
    mmio.write(Some(0), plan::FW_CFG.base + 8, &[0, 5]);
    assert_eq!(read(plan::FW_CFG.base), 2, "number of vCPUs");
    write(plan::flash_bank(1).base, 0x0098_0098);
    assert_eq!(read(plan::flash_bank(1).base + 0x40), 0x0051_0051);
    assert_eq!(read(plan::flash_bank(0).base), u32::MAX);
    // The transmitter-empty interrupt of the 16550, through PLIC source 10 to hart 0 in S mode.
    write(plan::PLIC.base + 4 * 10, 1);
    write(plan::PLIC.base + 0x2080, 1 << 10);
    mmio.write(Some(0), plan::UART.base + 1, &[2]);
    assert_eq!(rig.vm.told().pin(0, 9), Some(true));
    assert_eq!(read(plan::PLIC.base + 0x20_1004), 10);
    write(plan::ACLINT.base + 4, 1);
    assert_eq!(rig.vm.told().pin(1, 3), Some(true));
    let slots: Vec<_> = std::iter::from_fn(|| rig.machine.take_mmio_slot()).collect();
    assert_eq!(slots.len(), 8);
    assert!(matches!(&slots[7], VirtioSlot::Mmio { base: 0x1000_8000, irq } if irq.pin() == 8));
    for device in rig.machine.devices() {
        let state = device.save().expect("state");
        device.reset();
        device.restore(&state).unwrap_or_else(|e| panic!("{}: {e}", device.id()));
    }
}

#[test]
fn every_topology_gives_a_tree() {
    for (threads, cores, packages) in [(1, 1, 1), (2, 2, 2), (1, 8, 1), (4, 1, 2)] {
        let harts = threads * cores * packages;
        let mut request = request(Payload::default());
        (request.boot_vcpus, request.max_vcpus) = (harts, harts);
        request.topology = Some(Topology { threads, cores, dies: 1, packages });
        let plan = Plan::new(&request).expect("a plan");
        let blob = fdt::build(&plan, &fdt::Chosen::default()).expect("a tree");
        let count = |text: &[u8]| blob.windows(text.len()).filter(|w| *w == text).count();
        assert_eq!(count(b"cpu@"), harts as usize);
        assert_eq!(count(b"cluster"), packages as usize);
    }
    let plan = Plan::new(&request(Payload::default())).expect("a plan");
    let nul = fdt::Chosen { bootargs: "a\0b".into(), ..fdt::Chosen::default() };
    assert!(fdt::build(&plan, &nul).is_err());
}

/// A small generator (xorshift64*), so that a failure can be repeated.
struct Random(u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
    fn below(&mut self, n: u64) -> u64 {
        self.next() % n
    }
}

#[test]
fn random_accesses_to_every_window_do_no_harm() {
    let rig = rig(Payload::default());
    let windows = rig.build.mmio.windows();
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..100_000 {
        let window = &windows[random.below(windows.len() as u64) as usize];
        // Registers are at the start; the rest is tried too.
        let span = if random.below(4) == 0 { window.len } else { window.len.min(64) };
        let address = window.base + random.below(span);
        let len = [1, 2, 4, 4, 4, 8, 3, 16][random.below(8) as usize];
        let mut data = vec![0; len];
        if random.below(2) == 0 {
            rig.build.mmio.read(Some(0), address, &mut data);
        } else {
            let value = random.next() >> random.below(64);
            data.iter_mut().zip(value.to_le_bytes()).for_each(|(d, v)| *d = v);
            rig.build.mmio.write(Some(0), address, &data);
        }
        if round % 10_000 == 0 {
            for device in rig.machine.devices() {
                let state = device.save().expect("state");
                device.restore(&state).unwrap_or_else(|e| panic!("{}: {e}", device.id()));
            }
        }
    }
}

#[test]
fn harts_wait_for_opensbi_and_enter_other_firmware_at_once() {
    let files = Files::new("harts");
    let mut opensbi = vec![0x6f; 5000];
    opensbi[3000..3018].copy_from_slice(b"\nOpenSBI v%d.%d\n\0\0");
    for (firmware, waits) in [(vec![0x6f; 5000], false), (opensbi, true)] {
        let firmware = Some(files.put("fw.bin", &firmware));
        let rig = rig(Payload { firmware, ..Payload::default() });
        rig.machine.load().expect("loads");
        let rom = rig.vm.roms()[0].clone();
        let third = rom.region.read_obj::<u32>(MemoryRegionAddress(8)).expect("in the ROM");
        // `beqz a0` or `j`
        assert_eq!(third & 0x7f, if waits { 0x63 } else { 0x6f });
    }
}
