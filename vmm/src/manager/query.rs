//! What is shown of a VM. Texts follow the layout that users of QEMU's `info` commands know.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::ops::Range;

use holdfast_arch::{Arch, CpuState};
use holdfast_config::{CpuTopology, VmConfig};
use holdfast_devices::pci::{BarKind, class_name};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use super::Run;
use crate::control::{
    ChardevInfo, ControlError, Counters, CpuInfoFast, CpuInstanceProperties, DeviceNode, ErrorKind,
    MachineInfo, MemoryRead, PciDevice, PciDeviceClass, PciDeviceId, PciInfo, PciMemoryRegion, VmInfo,
    VmState,
};
use crate::vm::Vm;

/// A VM that has a config and is off.
pub(super) fn info_created(config: &VmConfig) -> VmInfo {
    VmInfo {
        config: config.clone(),
        state: VmState::Created,
        memory_actual_size: config.memory.size,
        device_tree: None,
    }
}

/// A VM that is built.
pub(super) fn info(vm: &Vm, run: Run, config: &VmConfig) -> VmInfo {
    let ram: u64 = vm.memory().iter().map(|r| r.len()).sum();
    let ballooned = vm.balloon().map_or(0, |b| b.actual());
    let state = match run {
        Run::Running => VmState::Running,
        Run::Paused | Run::IoError | Run::Moved { .. } => VmState::Paused,
        Run::Debug => VmState::BreakPoint,
        Run::Off | Run::Failed | Run::Panicked => VmState::Shutdown,
    };
    VmInfo {
        config: config.clone(),
        state,
        memory_actual_size: ram.saturating_sub(ballooned),
        device_tree: Some(device_tree(vm)),
    }
}

fn device_tree(vm: &Vm) -> BTreeMap<String, DeviceNode> {
    let leaf = |id: &str| DeviceNode {
        id: id.to_owned(),
        resources: Vec::new(),
        children: Vec::new(),
        pci_bdf: None,
    };
    let mut tree = BTreeMap::new();
    for device in vm.machine().devices() {
        tree.insert(device.id().to_owned(), leaf(device.id()));
    }
    for plugged in vm.plugged() {
        let id = plugged.id.as_str();
        tree.insert(id.to_owned(), leaf(id));
        if let Some(bdf) = &plugged.bdf {
            let wrapper = format!("_virtio-pci-{id}");
            let node =
                DeviceNode { children: vec![id.to_owned()], pci_bdf: Some(bdf.clone()), ..leaf(&wrapper) };
            tree.insert(wrapper, node);
        }
    }
    tree
}

pub(super) fn counters(vm: &Vm) -> Counters {
    let all = vm.plugged().into_iter().map(|p| (p.id.clone(), p.device.counters()));
    all.filter(|(_, counters)| !counters.is_empty()).collect()
}

pub(super) fn cpus(vm: &Vm) -> Vec<CpuInfoFast> {
    let topology = vm.config().cpus.topology;
    let cpu = |(index, thread_id)| CpuInfoFast {
        cpu_index: index as u32,
        qom_path: format!("/machine/unattached/device[{index}]"),
        thread_id,
        props: Some(place(index as u32, topology)),
        target: vm.arch().name().to_owned(),
    };
    vm.vcpus().thread_ids().into_iter().enumerate().map(cpu).collect()
}

/// Where vCPU `index` sits; without a topology every vCPU is a core of its own in one package.
fn place(index: u32, topology: Option<CpuTopology>) -> CpuInstanceProperties {
    let (threads, cores, dies) = match topology {
        Some(t) => (u32::from(t.threads_per_core), u32::from(t.cores_per_die), u32::from(t.dies_per_package)),
        None => (1, u32::MAX, 1),
    };
    let (threads, cores, dies) = (threads.max(1), cores.max(1), dies.max(1));
    let core = index / threads;
    let die = core / cores;
    CpuInstanceProperties {
        socket_id: Some(die / dies),
        die_id: topology.map(|_| die % dies),
        core_id: Some(core % cores),
        thread_id: Some(index % threads),
    }
}

pub(super) fn machines() -> Vec<MachineInfo> {
    let machine = |m: &&dyn holdfast_machines::MachineModule| MachineInfo {
        name: m.name().to_owned(),
        alias: None,
        is_default: Some(VmConfig { arch: Some(m.arch()), ..VmConfig::default() }.machine_name() == m.name()),
        cpu_max: m.max_vcpus(),
        hotpluggable_cpus: false,
        numa_mem_supported: false,
        deprecated: false,
        default_cpu_type: None,
        acpi: m.arch() == Arch::X86_64,
    };
    holdfast_machines::registry().iter().map(machine).collect()
}

pub(super) fn chardevs(vm: &Vm) -> Vec<ChardevInfo> {
    let chardev = |(label, filename)| ChardevInfo { label, filename, frontend_open: true };
    vm.chardevs().into_iter().map(chardev).collect()
}

pub(super) fn pci(vm: &Vm) -> Vec<PciInfo> {
    let Some(bus) = vm.machine().pci_bus() else { return Vec::new() };
    let devices = bus.info().into_iter().map(|info| PciDevice {
        bus: i64::from(info.bdf.bus()),
        slot: i64::from(info.bdf.device()),
        function: i64::from(info.bdf.function()),
        class_info: PciDeviceClass {
            desc: Some(class_name(info.class).to_owned()),
            class: i64::from(info.class),
        },
        id: PciDeviceId {
            device: i64::from(info.device),
            vendor: i64::from(info.vendor),
            subsystem: Some(i64::from(info.subsystem)),
            subsystem_vendor: Some(i64::from(info.subsystem_vendor)),
        },
        irq: (info.irq_pin != 0).then_some(i64::from(info.irq)),
        irq_pin: i64::from(info.irq_pin),
        qdev_id: info.name,
        regions: info.regions.iter().map(region).collect(),
    });
    vec![PciInfo { bus: 0, devices: devices.collect() }]
}

fn region(region: &holdfast_devices::pci::RegionInfo) -> PciMemoryRegion {
    let (kind, prefetch, wide) = match region.kind {
        BarKind::Io => ("io", None, None),
        BarKind::Mem32 => ("memory", Some(false), Some(false)),
        BarKind::Mem64 { prefetchable } => ("memory", Some(prefetchable), Some(true)),
    };
    PciMemoryRegion {
        bar: i64::from(region.bar),
        kind: kind.to_owned(),
        address: if region.address == 0 { -1 } else { region.address as i64 },
        size: region.size as i64,
        prefetch,
        mem_type_64: wide,
    }
}

/// `info mtree`.
pub(super) fn memory_tree(vm: &Vm) -> String {
    let mut text = String::new();
    for (name, bus) in vm.buses() {
        let mut windows: Vec<(u64, u64, String)> =
            bus.windows().into_iter().map(|w| (w.base, w.len, format!("i/o: {}", w.name))).collect();
        if name == "memory" {
            windows.extend(
                crate::snapshot::ram::ranges(vm.memory())
                    .into_iter()
                    .map(|r| (r.gpa, r.len, "ram: ram".into())),
            );
        } else if windows.is_empty() {
            continue;
        }
        windows.sort();
        // Writing to a String cannot fail.
        let _ = writeln!(text, "address-space: {name}");
        for (base, len, what) in windows {
            let _ = writeln!(text, "  {base:016x}-{:016x} (prio 0, {what})", base + (len - 1));
        }
        text.push('\n');
    }
    text
}

/// `info qtree`.
pub(super) fn device_tree_text(vm: &Vm) -> String {
    let mut text = String::from("bus: main-system-bus\n  type System\n");
    for device in vm.machine().devices() {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "  dev: {}", device.id());
    }
    if vm.machine().pci_bus().is_some() {
        text.push_str("  bus: pci.0\n    type PCI\n");
    }
    for plugged in vm.plugged() {
        let at = plugged.bdf.as_ref().map(|bdf| format!(", addr {bdf}")).unwrap_or_default();
        let _ = writeln!(text, "    dev: {}, id \"{}\"{at}", plugged.kind, plugged.id);
    }
    text
}

/// Runs `with` while the vCPUs stand, if `running` makes that necessary.
fn standing<T>(
    vm: &Vm,
    running: bool,
    with: impl FnOnce() -> Result<T, crate::vm::vcpus::VcpuError>,
) -> Result<T, ControlError> {
    let fail = |e| ControlError::failed("The vCPUs do not answer", e);
    if running {
        vm.vcpus().pause().map_err(fail)?;
    }
    let result = with().map_err(fail);
    if running {
        vm.vcpus().run().map_err(fail)?;
    }
    result
}

/// `info registers`.
pub(super) fn registers(vm: &Vm, vcpu: Option<u32>, running: bool) -> Result<String, ControlError> {
    let count = vm.vcpus().len();
    let indexes = match vcpu {
        Some(index) if (index as usize) < count => index as usize..index as usize + 1,
        Some(index) => return Err(ControlError::new(ErrorKind::Failed, format!("There is no vCPU {index}"))),
        None => 0..count,
    };
    let states = standing(vm, running, || {
        indexes.clone().map(|i| vm.vcpus().state(i)).collect::<Result<Vec<_>, _>>()
    })?;
    let mut text = String::new();
    for (index, state) in indexes.zip(states) {
        // Writing to a String cannot fail.
        let _ = writeln!(text, "CPU#{index}");
        match state {
            CpuState::X86_64(state) => x86_registers(&mut text, &state),
            CpuState::Riscv64(state) => riscv_registers(&mut text, &state),
        }
        text.push('\n');
    }
    Ok(text)
}

fn x86_registers(text: &mut String, s: &holdfast_arch::x86_64::State) {
    const NAMES: [&str; 16] = [
        "RAX", "RCX", "RDX", "RBX", "RSP", "RBP", "RSI", "RDI", "R8 ", "R9 ", "R10", "R11", "R12", "R13",
        "R14", "R15",
    ];
    for (row, names) in NAMES.chunks(4).enumerate() {
        let cells: Vec<_> =
            names.iter().enumerate().map(|(i, name)| format!("{name}={:016x}", s.gpr[row * 4 + i])).collect();
        let _ = writeln!(text, "{}", cells.join(" "));
    }
    let _ = writeln!(
        text,
        "RIP={:016x} RFL={:08x} HLT={}",
        s.rip,
        s.rflags,
        u8::from(s.mp_state != Default::default())
    );
    for (name, seg) in
        ["ES", "CS", "SS", "DS", "FS", "GS", "LDT", "TR"].iter().zip(s.segments.iter().chain([&s.ldt, &s.tr]))
    {
        let _ = writeln!(
            text,
            "{name:<3}={:04x} {:016x} {:08x} {:04x}",
            seg.selector, seg.base, seg.limit, seg.attributes
        );
    }
    let _ = writeln!(text, "GDT=     {:016x} {:08x}", s.gdt.base, s.gdt.limit);
    let _ = writeln!(text, "IDT=     {:016x} {:08x}", s.idt.base, s.idt.limit);
    let _ =
        writeln!(text, "CR0={:08x} CR2={:016x} CR3={:016x} CR4={:08x}", s.cr[0], s.cr[1], s.cr[2], s.cr[3]);
    let _ = writeln!(text, "EFER={:016x}", s.efer);
}

fn riscv_registers(text: &mut String, s: &holdfast_arch::riscv64::State) {
    const NAMES: [&str; 32] = [
        "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5",
        "a6", "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6",
    ];
    let _ = writeln!(text, " pc       {:016x}  priv {}", s.pc, s.privilege);
    for (number, value) in &s.csrs {
        let _ = writeln!(text, " csr {number:03x}  {value:016x}");
    }
    for row in 0..8 {
        let cells: Vec<_> =
            (row * 4..row * 4 + 4).map(|i| format!("x{i}/{:<5}{:016x}", NAMES[i], s.x[i])).collect();
        let _ = writeln!(text, " {}", cells.join(" "));
    }
}

/// The guest-virtual page size that translations are asked for by, in bytes.
const PAGE: u64 = 4096;

/// An access to an address at which there is no RAM.
pub(super) fn cannot_access(address: u64) -> ControlError {
    ControlError::new(ErrorKind::Failed, format!("Cannot access memory at address {address:#x}"))
}

/// Where `len` bytes at `address` are, page by page if virtual: guest-physical addresses and what part is there.
pub(super) fn places(
    vm: &Vm,
    vcpu: Option<u32>,
    address: u64,
    len: usize,
) -> Result<Vec<(u64, Range<usize>)>, ControlError> {
    let mut all = Vec::new();
    let mut done = 0;
    while done < len {
        let at = address.checked_add(done as u64).ok_or_else(|| cannot_access(address))?;
        let n = ((PAGE - at % PAGE) as usize).min(len - done);
        let gpa = match vcpu {
            None => at,
            Some(vcpu) => {
                let page = vm.vcpus().translate(vcpu as usize, at);
                let page = page.map_err(|e| ControlError::failed("The vCPUs do not answer", e))?;
                page.ok_or_else(|| cannot_access(at))?
            }
        };
        all.push((gpa, done..done + n));
        done += n;
    }
    Ok(all)
}

/// Reads guest memory.
pub(super) fn read_memory(vm: &Vm, read: MemoryRead, running: bool) -> Result<Vec<u8>, ControlError> {
    let mut data = vec![0; read.len];
    let mut at = Ok(Vec::new());
    standing(vm, running && read.vcpu.is_some(), || {
        at = places(vm, read.vcpu, read.address, read.len);
        Ok(())
    })?;
    for (gpa, range) in at? {
        let cannot = |_| cannot_access(read.address.wrapping_add(range.start as u64));
        vm.memory().read_slice(&mut data[range.clone()], GuestAddress(gpa)).map_err(cannot)?;
    }
    Ok(data)
}
