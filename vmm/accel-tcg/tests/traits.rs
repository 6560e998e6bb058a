//! A translated RISC-V VM through the accelerator traits, with hand-assembled programs.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use holdfast_accel::{Accelerator, DebugControl, Exit, IrqChip, Kicker, RomWindow, Vcpu, Vm, VmSpec};
use holdfast_accel_tcg::TcgAccelerator;
use holdfast_arch::{Arch, CpuModel, CpuState, riscv64};
use holdfast_clock::{Timers, VmClock};
use holdfast_device::{Access, Bus, BusDevice};
use holdfast_memory::{GuestMemory, GuestRegion, RamTracker};
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

const RAM: u64 = 0x8000_0000;
const DEVICE: u64 = 0x1000_0000;
const ROM: u64 = 0x2000_0000;

/// Keeps what was written, kicks the vCPU, and does something to the VM on a write of 9.
#[derive(Debug, Default)]
struct Device {
    last: AtomicU64,
    kicker: Mutex<Option<Arc<dyn Kicker>>>,
    unmap: Mutex<Option<Arc<dyn Vm>>>,
}

impl BusDevice for Device {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(access.offset as u8 + 1);
    }

    fn write(&self, _access: Access, data: &[u8]) {
        let mut bytes = [0; 8];
        bytes[..data.len()].copy_from_slice(data);
        let value = u64::from_le_bytes(bytes);
        if value == 9 {
            let vm = self.unmap.lock().clone().expect("VM");
            vm.unmap_rom(ROM).expect("mapped");
            return;
        }
        self.last.store(value, Ordering::SeqCst);
        if let Some(kicker) = &*self.kicker.lock() {
            kicker.kick();
        }
    }
}

struct Guest {
    memory: GuestMemory,
    device: Arc<Device>,
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
}

impl Guest {
    fn new(program: &[u32]) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM), 1 << 20)]).expect("RAM");
        for (n, insn) in program.iter().enumerate() {
            memory.write_obj(*insn, GuestAddress(RAM + 4 * n as u64)).expect("in RAM");
        }
        let clock = VmClock::stopped_at(0);
        clock.resume();
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
        let (mmio, device) = (Bus::new("mmio"), Arc::new(Device::default()));
        mmio.attach(DEVICE, 0x100, "device", Arc::clone(&device) as Arc<dyn BusDevice>).expect("free");
        let vm = TcgAccelerator::default()
            .create_vm(VmSpec {
                arch: Arch::Riscv64,
                memory: memory.clone(),
                mmio,
                pio: Bus::new("pio"),
                clock,
                timers,
                vcpus: 1,
                irqchip: IrqChip::Off,
                code_cache: 0,
                x86_tss_base: None,
            })
            .expect("VM");
        let model = CpuModel::Riscv64(riscv64::IsaModel::default());
        let vcpu = vm.create_vcpu(0, &model).expect("vCPU");
        *device.kicker.lock() = Some(vcpu.kicker());
        let mut this = Self { memory, device, vm, vcpu };
        this.change(|s| {
            s.pc = RAM;
            s.x[11] = DEVICE;
            s.x[12] = ROM;
        });
        this
    }

    fn state(&mut self) -> Box<riscv64::State> {
        match self.vcpu.state().expect("state") {
            CpuState::Riscv64(state) => state,
            other => panic!("not RISC-V: {other:?}"),
        }
    }

    fn change(&mut self, f: impl FnOnce(&mut riscv64::State)) {
        let mut state = self.state();
        f(&mut state);
        self.vcpu.set_state(&CpuState::Riscv64(state)).expect("fits");
    }

    fn rom(&self, insns: &[u32]) -> RomWindow {
        let mapping = MmapRegionBuilder::new_with_bitmap(0x1000, RamTracker::default())
            .with_mmap_prot(libc_prot())
            .build()
            .expect("mapping");
        let region = GuestRegion::new(mapping, GuestAddress(ROM)).expect("region");
        for (n, insn) in insns.iter().enumerate() {
            region.write_obj(*insn, MemoryRegionAddress(4 * n as u64)).expect("in ROM");
        }
        assert_eq!(region.len(), 0x1000);
        RomWindow { gpa: ROM, region: Arc::new(region) }
    }
}

fn libc_prot() -> i32 {
    // PROT_READ | PROT_WRITE
    3
}

const LOOP: u32 = 0x0000_006f;
const SD_A0_DEVICE: u32 = 0x00a5_b023;

fn li(rd: u32, imm: u32) -> u32 {
    imm << 20 | rd << 7 | 0x13
}

#[test]
fn devices_are_served_on_the_bus_and_a_kick_ends_the_run() {
    // lw a0, 4(a1); sd a0, 0(a1)
    let mut g = Guest::new(&[0x0045_a503, SD_A0_DEVICE, LOOP]);
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    assert_eq!(g.device.last.load(Ordering::SeqCst), 0x0505_0505);
    assert!(g.vm.jit_info().expect("translated").contains("regions translated"));
}

#[test]
fn a_kick_before_the_run_is_not_lost_and_one_from_outside_ends_a_loop() {
    let mut g = Guest::new(&[LOOP]);
    let kicker = g.vcpu.kicker();
    kicker.kick();
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    let thread = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(5));
        kicker.kick();
    });
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    thread.join().expect("kicker");
}

#[test]
fn rom_runs_until_a_device_unmaps_it_under_the_vcpu() {
    // jalr ra, a2; then a load from the ROM and a store of what it gave
    let mut g = Guest::new(&[0x0006_00e7, 0x0006_3503, SD_A0_DEVICE, LOOP]);
    // li a0, 7; sd a0, 0(a1) kicks; li a0, 9; sd a0, 0(a1) unmaps; the next load faults.
    let rom = g.rom(&[li(10, 7), SD_A0_DEVICE, 0x0000_8067]);
    g.vm.map_rom(&rom).expect("free");
    assert!(g.vm.map_rom(&rom).is_err(), "it is there already");
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    assert_eq!(g.device.last.load(Ordering::SeqCst), 7);

    *g.device.unmap.lock() = Some(Arc::clone(&g.vm));
    // ld a0, 0(a2); li a0, 9; sd a0, 0(a1); ld a3, 0(a2)
    for (n, insn) in [0x0006_3503, li(10, 9), SD_A0_DEVICE, 0x0006_3683, LOOP].iter().enumerate() {
        g.memory.write_obj(*insn, GuestAddress(RAM + 0x100 + 4 * n as u64)).expect("in RAM");
    }
    // The trap handler: csrr a0, mcause; sd a0, 0(a1)
    for (n, insn) in [0x3420_2573, SD_A0_DEVICE, LOOP].iter().enumerate() {
        g.memory.write_obj(*insn, GuestAddress(RAM + 0x200 + 4 * n as u64)).expect("in RAM");
    }
    g.change(|s| {
        s.pc = RAM + 0x100;
        s.csrs.insert(0x305, RAM + 0x200);
    });
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    assert_eq!(g.device.last.load(Ordering::SeqCst), 5, "a load access fault");
    *g.device.unmap.lock() = None;
    assert!(g.vm.unmap_rom(ROM).is_err(), "it is gone");
}

#[test]
fn steps_and_breakpoints_come_through() {
    let mut g = Guest::new(&[li(10, 1), li(10, 2), li(10, 3), LOOP]);
    g.vcpu
        .set_debug(&DebugControl { single_step: true, breakpoints: vec![], ..DebugControl::default() })
        .expect("set");
    assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(RAM + 4));
    assert_eq!(g.state().x[10], 1);
    g.vcpu
        .set_debug(&DebugControl {
            single_step: false,
            breakpoints: vec![RAM + 12],
            ..DebugControl::default()
        })
        .expect("set");
    assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(RAM + 12));
    assert_eq!(g.state().x[10], 3);
    assert_eq!(g.vcpu.translate(RAM + 8).expect("read"), Some(RAM + 8));
}

#[test]
fn every_architecture_is_there_and_second_vcpus_of_one_number_are_refused() {
    for arch in Arch::ALL {
        TcgAccelerator::default().probe(arch).expect("every architecture is translated");
    }
    let g = Guest::new(&[LOOP]);
    let model = CpuModel::Riscv64(riscv64::IsaModel::default());
    assert!(g.vm.create_vcpu(0, &model).is_err());
    assert!(g.vm.create_vcpu(1, &model).is_err());
}
