//! The machine on a VM that only remembers what it is told.

use std::path::PathBuf;

use holdfast_accel_still::{StillVm, Told};
use holdfast_arch::x86_64::State;
use holdfast_arch::x86_64::boot::{ACPI_AREA, SMBIOS_AREA};
use holdfast_device::{Bus, SystemEvent};
use holdfast_devices::catalog::isa_debug_exit::IsaDebugExitConfig;
use vm_memory::{Bytes, GuestAddress, GuestMemoryRegion, MemoryRegionAddress};

use super::*;
use crate::FlashImage;

fn request(payload: Payload, irqchip: IrqChip) -> MachineRequest {
    MachineRequest {
        boot_vcpus: 2,
        max_vcpus: 2,
        payload,
        irqchip,
        uuid: Some([7; 16]),
        debug_console_port: Some(0x402),
        board: vec![IsaDebugExitConfig { iobase: 0xf4, iosize: 4 }.into()],
        ..MachineRequest::new(Q35Module.default_cpu(), 64 << 20)
    }
}

struct Rig {
    machine: Box<dyn Machine>,
    vm: Arc<StillVm>,
    build: BuildContext,
    dir: tempfile::TempDir,
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.build.timers.stop();
    }
}

/// A rig whose payload is made from the files' contents.
fn try_rig(kernel: Option<&[u8]>, firmware: Option<&[u8]>, irqchip: IrqChip) -> Result<Rig, MachineError> {
    let dir = tempfile::tempdir().expect("directory");
    let file = |name: &str, bytes: Option<&[u8]>| -> Option<PathBuf> {
        let path = dir.path().join(name);
        std::fs::write(&path, bytes?).expect("writable");
        Some(path)
    };
    let payload = Payload {
        kernel: file("kernel", kernel),
        firmware: file("firmware", firmware),
        initramfs: None,
        cmdline: "quiet".into(),
        ..Payload::default()
    };
    rig_of(payload, irqchip, Some(dir))
}

fn rig_of(payload: Payload, irqchip: IrqChip, dir: Option<tempfile::TempDir>) -> Result<Rig, MachineError> {
    let dir = dir.unwrap_or_else(|| tempfile::tempdir().expect("directory"));
    let request = request(payload, irqchip);
    let vm = StillVm::new(Arch::X86_64, irqchip, Told::default());
    let build = vm.context(&[(0, 64 << 20)]);
    let context = MachineContext { build: build.clone(), vm: vm.clone() };
    let machine = Q35Module.build(request, context)?;
    Ok(Rig { machine, vm, build, dir })
}

/// A bzImage that is nothing but a header.
fn kernel() -> Vec<u8> {
    let mut k = vec![0; 2048];
    k[0x1f1] = 1;
    k[0x1fe..0x200].copy_from_slice(&[0x55, 0xaa]);
    k[0x200..0x202].copy_from_slice(&[0xeb, 0x6a]);
    k[0x202..0x206].copy_from_slice(b"HdrS");
    k[0x206..0x208].copy_from_slice(&0x020fu16.to_le_bytes());
    k[0x211] = 1;
    k[0x22c..0x230].copy_from_slice(&0x7fff_ffffu32.to_le_bytes());
    k[0x236] = 1;
    k[0x238..0x23c].copy_from_slice(&2047u32.to_le_bytes());
    k
}

fn split_kernel() -> Rig {
    try_rig(Some(&kernel()), None, IrqChip::Split).expect("a machine")
}

fn read(bus: &Bus, address: u64, len: usize) -> u64 {
    let mut data = [0; 8];
    bus.read(Some(0), address, &mut data[..len]);
    u64::from_le_bytes(data)
}

fn write(bus: &Bus, address: u64, value: u32, len: usize) {
    bus.write(Some(0), address, &value.to_le_bytes()[..len]);
}

#[test]
fn ram_leaves_room_for_pci_below_4_gib() {
    let layout = |size: u64| {
        let request = MachineRequest { ram_size: size, ..request(Payload::default(), IrqChip::Split) };
        Q35Module.ram_layout(&request).map(|v| v.iter().map(|r| (r.gpa, r.len)).collect::<Vec<_>>())
    };
    assert_eq!(layout(0xb000_0000).expect("fits"), [(0, 0xb000_0000)]);
    assert_eq!(layout(0xb000_1000).expect("fits"), [(0, 0x8000_0000), (1 << 32, 0x3000_1000)]);
    for wrong in [0, 1 << 20, (64 << 20) + 1] {
        assert!(matches!(layout(wrong), Err(MachineError::Request { .. })));
    }
}

#[test]
fn what_cannot_be_is_refused_by_name() {
    let plan = |change: fn(&mut MachineRequest)| {
        let mut r = request(Payload::default(), IrqChip::Split);
        change(&mut r);
        Plan::new(&r).expect_err("refused").to_string()
    };
    assert!(plan(|r| r.max_vcpus = 4).contains("max=4"));
    assert!(plan(|r| (r.boot_vcpus, r.max_vcpus) = (256, 256)).contains("256 vCPUs"));
    assert!(plan(|r| r.cpu = CpuModel::Riscv64(Default::default())).contains("x86_64"));
    let both = try_rig(Some(b"k"), Some(b"f"), IrqChip::Split).err().expect("refused").to_string();
    assert!(both.contains("kernel and firmware"), "{both}");
    let none = try_rig(None, None, IrqChip::Split).err().expect("refused").to_string();
    assert!(none.contains("neither"), "{none}");
    let odd = try_rig(None, Some(&[0; 1000]), IrqChip::Split).err().expect("refused").to_string();
    assert!(odd.contains("1000 bytes"), "{odd}");
}

#[test]
fn a_kernel_finds_tables_pci_and_power_management_without_firmware() {
    let rig = split_kernel();
    rig.machine.load().expect("loads");
    let mut signature = [0; 8];
    rig.build.memory.read_slice(&mut signature, GuestAddress(ACPI_AREA.0)).expect("RAM");
    assert_eq!(&signature, b"RSD PTR ");
    rig.build.memory.read_slice(&mut signature[..4], GuestAddress(SMBIOS_AREA.0.into())).expect("RAM");
    assert_eq!(&signature[..4], b"_SM_");
    assert_eq!(read(&rig.build.mmio, 0xb000_0000, 4), 0x29c0_8086);
    assert_eq!(read(&rig.build.mmio, 0xb00f_8000, 4), 0x2918_8086);
    write(&rig.build.pio, 0xcf8, 0x8000_f800, 4);
    assert_eq!(read(&rig.build.pio, 0xcfc, 4), 0x2918_8086);
    assert_eq!(read(&rig.build.pio, 0x604, 2), 0);

    let CpuState::X86_64(bsp) = rig.machine.start_state(0, CpuState::X86_64(Box::default())) else {
        panic!("x86 state");
    };
    assert_eq!((bsp.rip, bsp.efer), (0x10_0200, 0x500));
    let mut reset = State { rip: 0xfff0, ..State::default() };
    reset.msrs.insert(0x2ff, 0);
    let CpuState::X86_64(ap) = rig.machine.start_state(1, CpuState::X86_64(Box::new(reset))) else {
        panic!("x86 state");
    };
    assert_eq!((ap.rip, ap.msrs[&0x2ff]), (0xfff0, 0x806));
}

#[test]
fn a_reset_and_a_second_load_give_the_same_again() {
    let rig = split_kernel();
    rig.machine.load().expect("loads");
    let before: Vec<_> = rig.build.pio.windows();
    let mut ram = vec![0; 0x2_0000];
    rig.build.memory.read_slice(&mut ram, GuestAddress(0xe_0000)).expect("RAM");
    rig.build.memory.write_slice(&vec![0; 0x2_0000], GuestAddress(0xe_0000)).expect("RAM");
    rig.machine.devices().iter().for_each(|d| d.reset());
    assert_eq!(read(&rig.build.mmio, 0xb000_0000, 4), 0xffff_ffff, "no window after a reset");
    rig.machine.load().expect("loads again");
    assert_eq!(rig.build.pio.windows(), before);
    let mut again = vec![0; 0x2_0000];
    rig.build.memory.read_slice(&mut again, GuestAddress(0xe_0000)).expect("RAM");
    assert!(ram == again);
    std::fs::remove_file(rig.dir.path().join("kernel")).expect("was there");
    let error = rig.machine.load().expect_err("gone");
    assert!(matches!(error, MachineError::Load { what: "kernel", .. }), "{error}");
}

#[test]
fn firmware_is_rom_below_4_gib_and_ram_below_1_mib() {
    let image: Vec<u8> = (0..256u32 << 10).map(|n| (n >> 10) as u8).collect();
    let rig = try_rig(None, Some(&image), IrqChip::Split).expect("a machine");
    rig.machine.load().expect("loads");
    let roms = rig.vm.roms();
    assert_eq!((roms.len(), roms[0].gpa, roms[0].region.len()), (1, 0xfffc_0000, 256 << 10));
    let mut bytes = [0; 2];
    roms[0].region.read_slice(&mut bytes[..1], MemoryRegionAddress((128 << 10) + 5)).expect("ROM");
    rig.build.memory.read_slice(&mut bytes[1..], GuestAddress(0xe_0005)).expect("RAM");
    assert_eq!(bytes, [128; 2]);
    let reset = CpuState::X86_64(Box::new(State { rip: 0xfff0, ..State::default() }));
    assert_eq!(rig.machine.start_state(0, reset.clone()), reset, "starts at the reset vector");
    // fw_cfg: signature, then the number of vCPUs.
    write(&rig.build.pio, 0x510, 0, 2);
    assert_eq!([0; 4].map(|_: u8| read(&rig.build.pio, 0x511, 1) as u8), *b"QEMU");
    write(&rig.build.pio, 0x510, 5, 2);
    assert_eq!(read(&rig.build.pio, 0x511, 1), 2);
}

#[test]
fn flash_banks_end_at_4_gib_and_keep_what_is_written() {
    let dir = tempfile::tempdir().expect("directory");
    let (code, vars) = (dir.path().join("code"), dir.path().join("vars"));
    let image: Vec<u8> = (0..204u32 << 10).map(|n| (n >> 10) as u8).collect();
    std::fs::write(&code, &image).expect("file");
    std::fs::write(&vars, [0xff; 12 << 10]).expect("file");
    let flash = |path: &PathBuf, readonly| FlashImage { path: path.clone(), readonly };
    let flash = vec![flash(&code, true), flash(&vars, false)];
    let rig = rig_of(Payload { flash: flash.clone(), ..Payload::default() }, IrqChip::Split, None);
    let rig = rig.expect("a machine");
    rig.machine.load().expect("loads");
    let roms: Vec<_> = rig.vm.roms().iter().map(|r| (r.gpa, r.region.len())).collect();
    assert_eq!(roms, [(0xfffc_d000, 204 << 10), (0xfffc_a000, 12 << 10)]);
    let mut byte = [0];
    rig.build.memory.read_slice(&mut byte, GuestAddress(0xe_0405)).expect("RAM");
    assert_eq!(byte, [204 - 128 + 1]);
    // Commands, a byte each; the file has the datum.
    for command in [0x10, 0x5a, 0xff] {
        write(&rig.build.mmio, 0xfffc_a123, command, 1);
        write(&rig.build.mmio, 0xfffc_d123, command, 1);
    }
    assert_eq!(std::fs::read(&vars).expect("file")[0x123], 0x5a);
    assert!(std::fs::read(&code).expect("file") == image);
    let refused = |payload| {
        let error = rig_of(payload, IrqChip::Split, None).err().expect("refused");
        std::iter::successors(Some(&error as &dyn std::error::Error), |e| e.source())
            .map(ToString::to_string)
            .collect::<Vec<_>>()
            .join(": ")
    };
    let both = refused(Payload { flash: flash.clone(), firmware: Some(code.clone()), ..Payload::default() });
    assert!(both.contains("firmware and flash"), "{both}");
    std::fs::File::options().write(true).open(&vars).and_then(|f| f.set_len(16 << 20)).expect("file");
    let large = refused(Payload { flash, ..Payload::default() });
    assert!(large.contains("flash1") || large.contains("16 MiB"), "{large}");
}

#[test]
fn the_timer_reaches_the_processor_through_both_controllers() {
    let rig = split_kernel();
    let (mmio, pio) = (&rig.build.mmio, &rig.build.pio);
    for (port, value) in [(0x20, 0x11), (0x21, 0x20), (0x21, 4), (0x21, 1), (0x21, 0xfe)] {
        write(pio, port, value, 1);
    }
    write(mmio, 0xfec0_0000, 0x14, 4);
    write(mmio, 0xfec0_0010, 0x31, 4);
    assert_eq!(rig.vm.told().routes().last(), Some(&1));
    // Mode 0: high when the count is over. A low edge comes first.
    write(pio, 0x43, 0x30, 1);
    write(pio, 0x40, 10, 1);
    write(pio, 0x40, 0, 1);
    rig.build.clock.resume();
    rig.build.timers.clock_changed();
    let ext_int = rig.vm.ext_int().expect("connected");
    for _ in 0..1000 {
        if ext_int.pending() && !rig.vm.told().messages().is_empty() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    assert_eq!(rig.vm.told().messages().first().map(|m| m.data & 0xff), Some(0x31));
    assert_eq!(rig.vm.told().pins().first(), Some(&(0, 0, true)));
    assert_eq!(ext_int.acknowledge(), 0x20);
}

#[test]
fn an_eoi_lets_a_level_fire_again() {
    let rig = split_kernel();
    let (mmio, pio) = (&rig.build.mmio, &rig.build.pio);
    rig.machine.load().expect("loads");
    write(mmio, 0xfec0_0000, 0x10 + 18, 4);
    write(mmio, 0xfec0_0010, 0x8033, 4);
    // The power button holds the SCI.
    write(pio, 0xb2, 2, 1);
    write(pio, 0x602, 0x100, 2);
    assert!(rig.machine.power_button());
    assert_eq!(rig.vm.told().messages().len(), 1);
    assert!(rig.vm.eoi(0x33), "connected");
    assert_eq!(rig.vm.told().messages().len(), 2);
    write(pio, 0x600, 0x100, 2);
    rig.vm.eoi(0x33);
    assert_eq!(rig.vm.told().messages().len(), 2);
}

#[test]
fn kernel_controllers_take_everything_and_there_is_no_pit_or_hpet() {
    let rig = try_rig(Some(&kernel()), None, IrqChip::On).expect("a machine");
    for address in [0xfec0_0000, 0xfed0_0000] {
        assert!(!rig.build.mmio.read(None, address, &mut [0; 4]));
    }
    assert!(!rig.build.pio.read(None, 0x40, &mut [0]) && !rig.build.pio.read(None, 0x20, &mut [0]));
    rig.machine.load().expect("loads");
    write(&rig.build.pio, 0xb2, 2, 1);
    write(&rig.build.pio, 0x602, 0x100, 2);
    rig.machine.power_button();
    assert_eq!(rig.vm.told().levels().last(), Some(&(9, true)));
}

#[test]
fn guests_ask_for_power_off_reset_and_exit() {
    let rig = split_kernel();
    rig.machine.load().expect("loads");
    let pio = &rig.build.pio;
    write(pio, 0x604, 0x2000, 2);
    write(pio, 0xcf9, 6, 1);
    write(pio, 0x64, 0xfe, 1);
    write(pio, 0xf4, 3, 1);
    let expected = [SystemEvent::Shutdown, SystemEvent::Reset, SystemEvent::Reset, SystemEvent::Exit(7)];
    assert_eq!(rig.vm.told().events(), expected);
}

#[test]
fn states_move_to_another_machine() {
    let rig = split_kernel();
    rig.machine.load().expect("loads");
    let pio = &rig.build.pio;
    write(pio, 0xb2, 2, 1);
    write(pio, 0x43, 0x34, 1);
    write(pio, 0x40, 0, 1);
    write(pio, 0x40, 0x40, 1);
    let ids: std::collections::HashSet<_> = rig.machine.devices().iter().map(|d| d.id().to_owned()).collect();
    assert_eq!(ids.len(), rig.machine.devices().len(), "ids are unique");
    let states: Vec<_> = rig.machine.devices().iter().map(|d| d.save().expect("saves")).collect();
    let other = split_kernel();
    for (device, state) in other.machine.devices().iter().zip(&states) {
        device.restore(state).expect("restores");
    }
    assert_eq!(read(&other.build.mmio, 0xb000_0000, 4), 0x29c0_8086);
    assert_eq!(read(&other.build.pio, 0x604, 2), 1);
    let again: Vec<_> = other.machine.devices().iter().map(|d| d.save().expect("saves")).collect();
    for (a, b) in states.iter().zip(&again) {
        assert_eq!(a.kind, b.kind);
        // The clock follows the host's time of day, and a second may have begun meanwhile; its own tests have a time of theirs.
        assert!(a == b || a.kind == "mc146818", "{a:?} came back as {b:?}");
    }
}

#[test]
fn accesses_anywhere_are_survived() {
    let rig = split_kernel();
    rig.machine.load().expect("loads");
    let windows = [&rig.build.pio, &rig.build.mmio].map(|bus| (bus, bus.windows()));
    for (bus, windows) in windows {
        for window in windows {
            for at in (0..window.len.min(0x400)).chain([window.len - 1]) {
                for len in [1, 2, 4, 8] {
                    bus.write(Some(0), window.base + at, &[0xa5; 8][..len]);
                    bus.read(Some(0), window.base + at, &mut [0; 8][..len]);
                }
            }
        }
    }
}
