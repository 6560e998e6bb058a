//! Tests on the host's KVM. `HOLDFAST_NO_KVM=1` skips them where there is none; otherwise its absence fails.

use std::sync::Arc;
use std::time::Duration;

use holdfast_accel::{Accelerator, DebugControl, Exit, IrqChip, RomWindow, Vcpu, Vm, VmSpec};
use holdfast_accel_kvm::{DirtyLog, KvmAccelerator, KvmOptions};
use holdfast_arch::x86_64::{CpuidModel, Segment, State};
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_clock::{Timers, VmClock};
use holdfast_device::{Access, Bus, BusDevice};
use holdfast_memory::{GuestMemory, GuestRegion, tracker_at};
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

/// Where code is put and started in real mode.
const CODE: u64 = 0x1000;
/// Output port.
const OUT: u64 = 0xe9;
/// A memory-mapped device.
const MMIO: u64 = 0x20_0000;

#[derive(Debug, Default)]
struct Console(Mutex<Vec<u8>>);

impl BusDevice for Console {
    fn read(&self, a: Access, data: &mut [u8]) {
        for (n, b) in data.iter_mut().enumerate() {
            *b = 0x10 + (a.offset as u8) + n as u8;
        }
    }
    fn write(&self, a: Access, data: &[u8]) {
        assert_eq!(a.vcpu, Some(0));
        self.0.lock().extend_from_slice(data);
    }
}

struct Guest {
    vm: Arc<dyn Vm>,
    vcpu: Box<dyn Vcpu>,
    memory: GuestMemory,
    console: Arc<Console>,
}

fn absent() -> bool {
    let absent = std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1");
    if absent {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
    }
    absent
}

fn guest(code: &[u8], irqchip: IrqChip, dirty_log: DirtyLog) -> Guest {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x10_0000)]).expect("RAM");
    memory.write_slice(code, GuestAddress(CODE)).expect("code");
    let (mmio, pio) = (Bus::new("mmio"), Bus::new("pio"));
    let console = Arc::new(Console::default());
    pio.attach(OUT, 1, "console", Arc::clone(&console) as Arc<dyn BusDevice>).expect("free");
    pio.attach(0x100, 8, "console", Arc::clone(&console) as Arc<dyn BusDevice>).expect("free");
    mmio.attach(MMIO, 0x1000, "console", Arc::clone(&console) as Arc<dyn BusDevice>).expect("free");
    let spec = VmSpec {
        arch: Arch::X86_64,
        memory: memory.clone(),
        mmio,
        pio,
        clock: VmClock::stopped_at(0),
        timers: Timers::start(VmClock::stopped_at(0), &holdfast_threads::PlainSpawner).expect("timers"),
        vcpus: 1,
        irqchip,
        code_cache: 0,
        x86_tss_base: Some(0xfeff_c000),
    };
    let kvm = KvmAccelerator::new(KvmOptions { dirty_log, ..KvmOptions::default() });
    let vm = kvm.create_vm(spec).expect("this test needs /dev/kvm; HOLDFAST_NO_KVM=1 skips it");
    let mut vcpu = vm.create_vcpu(0, &CpuModel::X86_64(CpuidModel::default())).expect("vCPU");
    let CpuState::X86_64(mut s) = vcpu.state().expect("state") else { panic!("x86 state") };
    s.rip = CODE;
    s.segments[1].selector = 0;
    s.segments[1].base = 0;
    vcpu.set_state(&CpuState::X86_64(s)).expect("start state");
    Guest { vm, vcpu, memory, console }
}

fn split(code: &[u8]) -> Guest {
    guest(code, IrqChip::Split, DirtyLog::Bitmap)
}

/// Runs until the guest has halted: it is kicked out of its HLT.
fn run_to_halt(g: &mut Guest) {
    let kicker = g.vcpu.kicker();
    let timer = std::thread::spawn(move || {
        std::thread::sleep(Duration::from_millis(300));
        kicker.kick();
    });
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    timer.join().expect("timer");
}

fn state_of(g: &mut Guest) -> State {
    match g.vcpu.state().expect("state") {
        CpuState::X86_64(s) => *s,
        CpuState::Riscv64(_) => panic!("x86 state"),
    }
}

#[test]
fn needs_kvm_real_mode_guest_writes_to_ports_of_every_width() {
    if absent() {
        return;
    }
    for chip in [IrqChip::Split, IrqChip::On] {
        let code = [
            0xb0, b'H', // mov al, 'H'
            0xe6, OUT as u8, // out 0xe9, al
            0xba, 0x00, 0x01, // mov dx, 0x100
            0xb8, b'o', b'l', // mov ax, "ol"
            0xef, // out dx, ax
            0x66, 0xb8, b'd', b'f', b'a', b's', // mov eax, "dfas"
            0x66, 0xef, // out dx, eax
            0xbe, 0x1d, 0x10, // mov si, 0x101d
            0xb9, 0x03, 0x00, // mov cx, 3
            0xf3, 0x6e, // rep outsb
            0xf4, // hlt
            0x90, b't', b'!', b'\n',
        ];
        let mut g = guest(&code, chip, DirtyLog::Bitmap);
        run_to_halt(&mut g);
        assert_eq!(String::from_utf8_lossy(&g.console.0.lock()), "Holdfast!\n");
    }
}

#[test]
fn needs_kvm_a_kick_before_the_run_is_not_lost() {
    if absent() {
        return;
    }
    let mut g = split(&[0xeb, 0xfe]); // jmp $
    g.vcpu.kicker().kick();
    assert_eq!(g.vcpu.run().expect("run"), Exit::Kicked);
    run_to_halt(&mut g);
}

#[test]
fn needs_kvm_dirty_log_names_exactly_the_pages_written() {
    if absent() {
        return;
    }
    let code = [
        0xbb, 0x00, 0x40, // mov bx, 0x4000
        0xc6, 0x07, 0x55, // mov byte [bx], 0x55
        0xbb, 0xff, 0x7f, // mov bx, 0x7fff
        0xc7, 0x07, 0x55, 0x55, // mov word [bx], 0x5555
        0xf4, // hlt
    ];
    for log in [DirtyLog::Bitmap, DirtyLog::Ring(4096)] {
        let mut g = guest(&code, IrqChip::Split, log);
        let (tracker, _) = tracker_at(&g.memory, 0).expect("RAM");
        tracker.start_log();
        g.vm.start_dirty_log().expect("start");
        run_to_halt(&mut g);
        g.vm.sync_dirty_log().expect("sync");
        assert_eq!(tracker.take_dirty()[0], 1 << 4 | 1 << 7 | 1 << 8, "{log:?}");
        g.vm.sync_dirty_log().expect("sync");
        assert_eq!(tracker.take_dirty()[0], 0, "{log:?}: nothing was written since");
        g.vm.stop_dirty_log().expect("stop");
    }
}

/// A guest that prints the byte at 0x100010, writes `w` there and prints it again.
fn reader() -> Guest {
    let code = [
        0xb8, 0x00, 0xff, // mov ax, 0xff00
        0x8e, 0xd8, // mov ds, ax
        0xa0, 0x10, 0x10, // mov al, [0x1010]: linear 0x100010
        0xe6, OUT as u8, // out 0xe9, al
        0xc6, 0x06, 0x10, 0x10, b'w', // mov byte [0x1010], 'w'
        0xa0, 0x10, 0x10, // mov al, [0x1010]
        0xe6, OUT as u8, // out 0xe9, al
        0xf4,
    ];
    split(&code)
}

#[test]
fn needs_kvm_memory_of_a_device_is_read_and_written_if_it_is_writable() {
    if absent() {
        return;
    }
    for writable in [true, false] {
        let mut g = reader();
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0x10_0000), 0x1000)]).expect("memory");
        memory.write_obj(b'd', GuestAddress(0x10_0010)).expect("memory");
        let region = memory.find_region(GuestAddress(0x10_0000)).expect("region");
        let region = arc_of(&memory, region);
        g.vm.map_shared(0x10_0000, &region, writable).expect("map");
        assert!(g.vm.map_shared(0x10_0000, &region, writable).is_err(), "it is taken");
        run_to_halt(&mut g);
        let text: &[u8] = if writable { b"dw" } else { b"dd" };
        assert_eq!(&g.console.0.lock()[..], text);
        g.vm.unmap_shared(0x10_0000).expect("unmap");
        assert!(g.vm.unmap_shared(0x10_0000).is_err());
    }
}

#[test]
fn needs_kvm_rom_reads_come_from_it_and_writes_go_to_the_bus() {
    if absent() {
        return;
    }
    let mut g = reader();
    let rom = GuestMemory::from_ranges(&[(GuestAddress(0x10_0000), 0x1000)]).expect("ROM");
    rom.write_obj(b'r', GuestAddress(0x10_0010)).expect("ROM");
    let region = rom.find_region(GuestAddress(0x10_0000)).expect("region");
    let rom = RomWindow { gpa: 0x10_0000, region: arc_of(&rom, region) };
    g.vm.map_rom(&rom).expect("map");
    assert!(g.vm.map_rom(&rom).is_err(), "a second window there is refused");
    run_to_halt(&mut g);
    assert_eq!(&g.console.0.lock()[..], b"rr");
    g.vm.unmap_rom(0x10_0000).expect("unmap");
    assert!(g.vm.unmap_rom(0x10_0000).is_err());
}

/// The region as the shared object that windows hold.
fn arc_of(memory: &GuestMemory, region: &GuestRegion) -> Arc<GuestRegion> {
    use vm_memory::GuestMemoryRegion;
    let (_, arc) = memory.remove_region(region.start_addr(), region.len()).expect("there");
    arc
}

#[test]
fn needs_kvm_ioeventfds_take_the_write_and_the_device_does_not_see_it() {
    if absent() {
        return;
    }
    let code = [0xb8, 0x34, 0x12, 0xba, 0x00, 0x01, 0xef, 0xb0, b'x', 0xe6, OUT as u8, 0xf4]; // out dx, ax; out 0xe9
    let mut g = split(&code);
    let (mmio, pio) = g.vm.io_events().expect("KVM has ioeventfds");
    let fd = EventFd::new(EFD_NONBLOCK).expect("eventfd");
    pio.register(&fd, 0x100, 2, Some(0x1234)).expect("register");
    mmio.register(&fd, 0x100, 4, None).expect("the memory bus is another address space");
    assert!(pio.register(&fd, 0x100, 3, None).is_err());
    run_to_halt(&mut g);
    assert_eq!(fd.read().expect("signalled"), 1);
    assert_eq!(&g.console.0.lock()[..], b"x");
    pio.unregister(&fd, 0x100, 2, Some(0x1234)).expect("was there");
    assert!(pio.unregister(&fd, 0x100, 2, Some(0x1234)).is_err());
}

#[test]
fn needs_kvm_single_step_and_hardware_breakpoints_stop_where_they_should() {
    if absent() {
        return;
    }
    let code = [0x90, 0x40, 0x40, 0x40, 0x40, 0xeb, 0xf9]; // nop; 4 x inc ax; jmp CODE
    let mut g = split(&code);
    g.vcpu
        .set_debug(&DebugControl { single_step: true, breakpoints: vec![], ..DebugControl::default() })
        .expect("debug");
    assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(CODE + 1));
    assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(CODE + 2));
    let control =
        DebugControl { single_step: false, breakpoints: vec![CODE + 1, CODE + 4], ..DebugControl::default() };
    g.vcpu.set_debug(&control).expect("debug");
    for round in 0..3 {
        assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(CODE + 4), "round {round}");
        assert_eq!(g.vcpu.run().expect("run"), Exit::Debug(CODE + 1), "round {round}");
    }
    assert_eq!(state_of(&mut g).gpr[0] & 0xffff, 12);
    g.vcpu.set_debug(&DebugControl::default()).expect("debug off");
    run_to_halt(&mut g);
}

#[test]
fn needs_kvm_state_survives_a_round_trip_into_another_vm() {
    if absent() {
        return;
    }
    let code = [
        0x66, 0xb8, 0x78, 0x56, 0x34, 0x12, // mov eax, 0x12345678
        0xbb, 0x00, 0x30, // mov bx, 0x3000
        0xfb, // sti
        0xeb, 0xfe, // jmp $
    ];
    let mut g = split(&code);
    run_to_halt(&mut g);
    let before = state_of(&mut g);
    assert_eq!((before.gpr[0], before.gpr[3] & 0xffff, before.rip), (0x1234_5678, 0x3000, CODE + 10));
    let text = serde_json::to_string(&CpuState::X86_64(Box::new(before.clone()))).expect("json");
    let mut h = split(&code);
    h.vcpu.set_state(&serde_json::from_str(&text).expect("json")).expect("set");
    let after = state_of(&mut h);
    let strip = |mut s: State| {
        s.msrs.remove(&0x10);
        s
    };
    assert_eq!(strip(before), strip(after));
    run_to_halt(&mut h);
    h.vcpu.reset().expect("reset");
    let reset = state_of(&mut h);
    assert_eq!((reset.rip, reset.segments[1].base), (0xfff0, 0xffff_0000));
}

#[test]
fn needs_kvm_a_triple_fault_shuts_down() {
    if absent() {
        return;
    }
    // lidt [0x3000], which is zero; ud2. In protected mode, since some KVMs do not check the limit in real mode.
    let mut g = split(&[0x0f, 0x01, 0x1d, 0x00, 0x30, 0x00, 0x00, 0x0f, 0x0b]);
    let mut s = state_of(&mut g);
    s.cr[0] |= 1;
    for (n, segment) in s.segments.iter_mut().enumerate() {
        let attributes = if n == 1 { 0xc09b } else { 0xc093 };
        *segment = Segment { selector: 8, base: 0, limit: 0xffff_ffff, attributes, unusable: false };
    }
    g.vcpu.set_state(&CpuState::X86_64(Box::new(s))).expect("protected mode");
    assert_eq!(g.vcpu.run().expect("run"), Exit::Shutdown);
}

#[test]
fn needs_kvm_translate_follows_the_guest() {
    if absent() {
        return;
    }
    let mut g = split(&[0xf4]);
    assert_eq!(g.vcpu.translate(0x1234).expect("translate"), Some(0x1234));
}

#[test]
fn needs_kvm_irqchip_off_and_foreign_cpus_are_refused_by_name() {
    if absent() {
        return;
    }
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x1000)]).expect("RAM");
    let spec = VmSpec {
        arch: Arch::X86_64,
        memory,
        mmio: Bus::new("mmio"),
        pio: Bus::new("pio"),
        clock: VmClock::stopped_at(0),
        timers: Timers::start(VmClock::stopped_at(0), &holdfast_threads::PlainSpawner).expect("timers"),
        vcpus: 1,
        irqchip: IrqChip::Off,
        code_cache: 0,
        x86_tss_base: None,
    };
    let text = KvmAccelerator::default().create_vm(spec).expect_err("refused").to_string();
    assert!(text.contains("kernel_irqchip=off") && text.contains("split"), "{text}");
    let g = split(&[0xf4]);
    let text =
        g.vm.create_vcpu(1, &CpuModel::X86_64(CpuidModel::default())).expect_err("refused").to_string();
    assert!(text.contains("vCPU 1 in a VM of 1"), "{text}");
}

#[test]
fn needs_kvm_the_paravirtual_clock_goes_on_where_it_was_saved() {
    if absent() {
        return;
    }
    let clock = |g: &Guest| g.vm.save().expect("save")["kvm"]["clock"].as_u64().expect("a clock");
    let mut g = split(&[0xf4]);
    run_to_halt(&mut g);
    let saved = g.vm.save().expect("save");
    let (before, cpu) = (clock(&g), g.vcpu.state().expect("state"));
    std::thread::sleep(Duration::from_secs(1));
    let mut h = split(&[0xf4]);
    h.vm.restore(&saved).expect("restore");
    let restored = clock(&h);
    assert!(restored.abs_diff(before) < 500_000_000, "{before} -> {restored} ns");
    h.vcpu.set_state(&cpu).expect("state");
    let set = clock(&h);
    assert!(set.abs_diff(before) < 500_000_000, "{before} -> {set} ns once the vCPU's state is set");
}
