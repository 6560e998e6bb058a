//! A VM in KVM.

use std::collections::BTreeMap;
use std::io;
use std::sync::{Arc, OnceLock};

use holdfast_accel::{AccelError, IrqChip, RomWindow, Vcpu, Vm, VmSpec};
use holdfast_arch::CpuModel;
use holdfast_arch::x86_64::{CpuTopology, CpuidEntry, cpuid, features};
use holdfast_device::{Bus, CpuLines, ExtInt, IoEvents, IrqSink, MsiController, MsiMessage};
use holdfast_memory::{GuestMemory, GuestRegion};
use kvm_bindings::{
    KVM_CAP_DIRTY_LOG_RING, KVM_CAP_DIRTY_LOG_RING_ACQ_REL, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2,
    KVM_CAP_SPLIT_IRQCHIP, KVM_CAP_X2APIC_API, KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
    KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE,
    KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY, kvm_clock_data, kvm_dirty_gfn, kvm_enable_cap, kvm_irqchip,
    kvm_pit_config,
};
use kvm_ioctls::{Cap, Kvm, VmFd};
use parking_lot::{Mutex, RwLock};
use serde::{Deserialize, Serialize};

use crate::dirty::{Ring, collect_bitmaps};
use crate::ioevents::KvmIoEvents;
use crate::kick::{VcpuHandle, install_handler};
use crate::msi::{IOAPIC_PINS, KernelPins, Routes};
use crate::slots::Slots;
use crate::vcpu::KvmVcpu;
use crate::{DirtyLog, NAME, host, io_error, sys, unavailable, unsupported};

/// How the dirty log works in one VM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Log {
    Bitmap {
        /// Pages are protected again by us, after their bits were taken.
        manual: bool,
    },
    Ring {
        entries: u32,
    },
}

/// The pins of the vCPUs: 0 is LINT0 (the PIC's INTR), 1 is LINT1 (NMI).
#[derive(Debug, Default)]
pub(crate) struct Lines {
    pub(crate) handles: RwLock<BTreeMap<u32, Arc<VcpuHandle>>>,
}

impl CpuLines for Lines {
    fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
        let handle = self.handles.read().get(&vcpu).cloned();
        match (handle, pin) {
            // The vCPU asks the PIC itself before it enters the guest; it only has to come out.
            (Some(handle), 0) if level => handle.wake(),
            (Some(handle), 1) => handle.set_lint1(level),
            _ => {}
        }
    }
}

/// A VM, as its vCPUs and its maker see it.
pub struct KvmVm {
    pub(crate) fd: Arc<VmFd>,
    pub(crate) memory: GuestMemory,
    pub(crate) mmio: Arc<Bus>,
    pub(crate) pio: Arc<Bus>,
    pub(crate) irqchip: IrqChip,
    pub(crate) lines: Arc<Lines>,
    pub(crate) ext_int: OnceLock<Arc<dyn ExtInt>>,
    pub(crate) eoi: OnceLock<Arc<dyn Fn(u8) + Send + Sync>>,
    /// MSRs that are saved and restored.
    pub(crate) msrs: Vec<u32>,
    /// Bytes of a vCPU's XSAVE area.
    pub(crate) xsave_size: usize,
    /// Breakpoints in RAM.
    pub(crate) patches: crate::debug::Patches,
    slots: RwLock<Slots>,
    rings: Mutex<Vec<Arc<Ring>>>,
    routes: Arc<Routes>,
    log: Log,
    vcpus: u32,
    supported: Vec<CpuidEntry>,
}

impl std::fmt::Debug for KvmVm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("KvmVm")
            .field("irqchip", &self.irqchip)
            .field("log", &self.log)
            .finish_non_exhaustive()
    }
}

fn enable(vm: &VmFd, cap: u32, arg: u64) -> io::Result<()> {
    let request = kvm_enable_cap { cap, args: [arg, 0, 0, 0], ..Default::default() };
    vm.enable_cap(&request).map_err(io_error)
}

/// Puts the interrupt controllers where they are wanted. Before the first vCPU.
fn make_irqchip(vm: &VmFd, irqchip: IrqChip) -> Result<(), AccelError> {
    match irqchip {
        IrqChip::Split => {
            if !vm.check_extension(Cap::SplitIrqchip) {
                return Err(unavailable(
                    "the host's KVM lacks KVM_CAP_SPLIT_IRQCHIP".into(),
                    "use `kernel_irqchip=on` or `--accel tcg`",
                ));
            }
            enable(vm, KVM_CAP_SPLIT_IRQCHIP, u64::from(IOAPIC_PINS))
                .map_err(|e| host("cannot split the interrupt controllers", e))
        }
        IrqChip::On => {
            vm.create_irq_chip().map_err(|e| host("cannot make the interrupt controllers", io_error(e)))?;
            let config = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
            vm.create_pit2(config).map_err(|e| host("cannot make the interval timer", io_error(e)))
        }
        IrqChip::Off => Err(unsupported(
            "`kernel_irqchip=off` (a local APIC in user space; `split` and `on` are supported, and `--accel tcg` \
             has all controllers in user space)",
        )),
    }
}

/// Chooses the dirty log that is wanted. Before the first vCPU.
fn make_log(vm: &VmFd, wanted: DirtyLog) -> Result<Log, AccelError> {
    let DirtyLog::Ring(entries) = wanted else {
        let bits = vm.check_extension_raw(KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.into()) as u32;
        // Without KVM_DIRTY_LOG_INITIALLY_SET: the log must hold what was written and nothing else.
        let manual = bits & KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE != 0
            && enable(vm, KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2, KVM_DIRTY_LOG_MANUAL_PROTECT_ENABLE.into())
                .is_ok();
        return Ok(Log::Bitmap { manual });
    };
    let offered = |cap: u32| (vm.check_extension_raw(cap.into()).max(0) as u64, cap);
    let (bytes, cap) = offered(KVM_CAP_DIRTY_LOG_RING_ACQ_REL).max(offered(KVM_CAP_DIRTY_LOG_RING));
    let size = u64::from(entries) * size_of::<kvm_dirty_gfn>() as u64;
    if size == 0 || !size.is_power_of_two() || size > bytes {
        return Err(unsupported(format!(
            "a dirty ring of {entries} entries (a power of two up to {} is)",
            bytes / size_of::<kvm_dirty_gfn>() as u64
        )));
    }
    enable(vm, cap, size).map_err(|e| host("cannot enable the dirty ring", e))?;
    Ok(Log::Ring { entries })
}

fn entries_of(table: &kvm_bindings::CpuId) -> Vec<CpuidEntry> {
    let entry = |e: &kvm_bindings::kvm_cpuid_entry2| CpuidEntry {
        function: e.function,
        index: e.index,
        indexed: e.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX != 0,
        regs: [e.eax, e.ebx, e.ecx, e.edx],
    };
    table.as_slice().iter().map(entry).collect()
}

/// What guests can be shown: KVM's table, and the timer mode that it leaves to the caller.
fn supported_cpuid(kvm: &Kvm) -> Result<Vec<CpuidEntry>, AccelError> {
    let table = kvm
        .get_supported_cpuid(KVM_MAX_CPUID_ENTRIES)
        .map_err(|e| host("cannot read the supported CPUID", io_error(e)))?;
    let mut table = entries_of(&table);
    for entry in table.iter_mut().filter(|e| e.function == 1) {
        entry.regs[2] |= cpuid::X2APIC;
        if kvm.check_extension(Cap::TscDeadlineTimer) {
            entry.regs[2] |= cpuid::TSC_DEADLINE;
        }
    }
    Ok(table)
}

impl KvmVm {
    /// Makes a VM from `spec`.
    pub(crate) fn new(kvm: &Kvm, spec: VmSpec, log: DirtyLog) -> Result<Arc<Self>, AccelError> {
        install_handler().map_err(|e| host("cannot install the kick signal's handler", e))?;
        let most = kvm.get_max_vcpus();
        if spec.vcpus as usize > most {
            return Err(unsupported(format!("a VM of {} vCPUs (the host allows {most})", spec.vcpus)));
        }
        if spec.vcpus as usize > kvm.get_nr_vcpus() {
            tracing::warn!(
                "{} vCPUs are more than the {} that KVM recommends",
                spec.vcpus,
                kvm.get_nr_vcpus()
            );
        }
        let fd = make_fd(kvm)?;
        if let Some(base) = spec.x86_tss_base {
            fd.set_identity_map_address(base)
                .map_err(|e| host("cannot place the identity map", io_error(e)))?;
            fd.set_tss_address((base + 0x1000) as usize)
                .map_err(|e| host("cannot place the TSS", io_error(e)))?;
        }
        make_irqchip(&fd, spec.irqchip)?;
        if spec.vcpus > 255 {
            // 32-bit APIC ids in messages and in the local APIC's state.
            enable(&fd, KVM_CAP_X2APIC_API, 3).map_err(|e| host("cannot use 32-bit APIC ids", e))?;
        }
        let log = make_log(&fd, log)?;
        let fd = Arc::new(fd);
        let slots = Slots::new(&fd, &spec.memory, kvm.get_nr_memslots() as u32)?;
        let limit = fd.check_extension_int(Cap::IrqRouting).clamp(0, 4096) as u32;
        let routes = Routes::new(Arc::clone(&fd), spec.irqchip == IrqChip::On, limit)
            .map_err(|e| host("cannot set interrupt routes", e))?;
        let msrs = kvm
            .get_msr_index_list()
            .map_err(|e| host("cannot list model-specific registers", io_error(e)))?;
        let xsave = fd.check_extension_int(Cap::Xsave2).max(0) as usize;
        Ok(Arc::new(Self {
            supported: supported_cpuid(kvm)?,
            msrs: msrs.as_slice().to_vec(),
            xsave_size: xsave.max(size_of::<kvm_bindings::kvm_xsave>()),
            fd,
            memory: spec.memory,
            mmio: spec.mmio,
            pio: spec.pio,
            irqchip: spec.irqchip,
            lines: Arc::default(),
            ext_int: OnceLock::new(),
            eoi: OnceLock::new(),
            slots: RwLock::new(slots),
            patches: crate::debug::Patches::default(),
            rings: Mutex::default(),
            routes,
            log,
            vcpus: spec.vcpus,
        }))
    }

    /// The CPUID table of vCPU `index` and its APIC id.
    fn cpuid_for(&self, index: u32, model: &CpuModel) -> Result<(Vec<CpuidEntry>, u32), AccelError> {
        let CpuModel::X86_64(model) = model else {
            return Err(unsupported("a CPU model of another architecture"));
        };
        let lacking = cpuid::missing(&self.supported, &model.entries);
        if !lacking.is_empty() && index == 0 {
            let list: Vec<String> = lacking
                .iter()
                .map(|(leaf, sub, reg, bits)| {
                    format!("{leaf:#x}.{sub}.{}:{bits:#x}", ["eax", "ebx", "ecx", "edx"][*reg])
                })
                .collect();
            tracing::info!("CPU model `{}`: the host lacks {}", model.name, list.join(", "));
        }
        let topology = model.topology.unwrap_or_else(|| CpuTopology::flat(self.vcpus));
        let apic_id = topology.apic_id(index);
        let mut table = features::resolve(&self.supported, model).map_err(|e| unsupported(e.to_string()))?;
        cpuid::place(&mut table, topology, apic_id);
        Ok((table, apic_id))
    }

    /// Collects all rings and gives their entries back.
    pub(crate) fn collect_rings(&self) -> Result<(), AccelError> {
        let rings = self.rings.lock();
        let slots = self.slots.read();
        let taken: u32 = rings.iter().map(|ring| ring.collect(&slots)).sum();
        if taken > 0 {
            sys::reset_dirty_rings(&self.fd).map_err(|e| host("cannot reset the dirty rings", e))?;
        }
        Ok(())
    }
}

fn make_fd(kvm: &Kvm) -> Result<VmFd, AccelError> {
    loop {
        match kvm.create_vm() {
            Ok(fd) => return Ok(fd),
            // A signal while the kernel registers its notifiers.
            Err(e) if e.errno() == libc::EINTR => {}
            Err(e) => return Err(host("cannot create a VM", io_error(e))),
        }
    }
}

/// What is saved of the kernel's own devices.
#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct SavedVm {
    /// The paravirtual clock in nanoseconds.
    clock: Option<u64>,
    /// PIC master, PIC slave and IOAPIC, as the kernel gives them.
    chips: Vec<Vec<u8>>,
    /// The PIT, likewise.
    pit: Option<kvm_bindings::kvm_pit_state2>,
}

const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

impl KvmVm {
    fn save_chips(&self, saved: &mut SavedVm) -> Result<(), AccelError> {
        for chip_id in CHIPS {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            self.fd
                .get_irqchip(&mut chip)
                .map_err(|e| host("cannot save an interrupt controller", io_error(e)))?;
            // SAFETY: `dummy` spans the whole union, and every bit pattern is a valid byte.
            let bytes = unsafe { chip.chip.dummy };
            saved.chips.push(bytes.iter().map(|b| *b as u8).collect());
        }
        saved.pit =
            Some(self.fd.get_pit2().map_err(|e| host("cannot save the interval timer", io_error(e)))?);
        Ok(())
    }

    fn restore_chips(&self, saved: &SavedVm) -> Result<(), AccelError> {
        for (chip_id, bytes) in CHIPS.into_iter().zip(&saved.chips) {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            let mut dummy = [0; 512];
            for (to, from) in dummy.iter_mut().zip(bytes) {
                *to = *from as std::ffi::c_char;
            }
            chip.chip.dummy = dummy;
            self.fd
                .set_irqchip(&chip)
                .map_err(|e| host("cannot restore an interrupt controller", io_error(e)))?;
        }
        if let Some(pit) = &saved.pit {
            self.fd.set_pit2(pit).map_err(|e| host("cannot restore the interval timer", io_error(e)))?;
        }
        Ok(())
    }
}

/// A VM as the trait gives it out: the vCPUs need to share it.
#[derive(Debug)]
pub(crate) struct VmRef(pub(crate) Arc<KvmVm>);

impl Vm for VmRef {
    fn accel(&self) -> &'static str {
        NAME
    }

    fn can_debug(&self) -> Result<(), AccelError> {
        if self.0.fd.check_extension(Cap::SetGuestDebug) {
            return Ok(());
        }
        Err(unavailable("the host's KVM lacks KVM_CAP_SET_GUEST_DEBUG".into(), "use `--accel tcg` to debug"))
    }

    fn create_vcpu(&self, index: u32, model: &CpuModel) -> Result<Box<dyn Vcpu>, AccelError> {
        let vm = &self.0;
        if index >= vm.vcpus {
            return Err(unsupported(format!("vCPU {index} in a VM of {}", vm.vcpus)));
        }
        let (table, apic_id) = vm.cpuid_for(index, model)?;
        let vcpu = KvmVcpu::new(Arc::clone(vm), index, apic_id, &table)?;
        if let Log::Ring { entries } = vm.log {
            let map =
                sys::RingMap::new(vcpu.raw_fd(), entries).map_err(|e| host("cannot map a dirty ring", e))?;
            vm.rings.lock().push(Ring::new(map));
        }
        vm.lines.handles.write().insert(index, vcpu.handle());
        Ok(Box::new(vcpu))
    }

    fn map_rom(&self, rom: &RomWindow) -> Result<(), AccelError> {
        self.0.slots.write().map_rom(&self.0.fd, rom)
    }

    fn map_shared(&self, gpa: u64, region: &Arc<GuestRegion>, writable: bool) -> Result<(), AccelError> {
        self.0.slots.write().map(&self.0.fd, (gpa, region), writable)
    }

    fn unmap_shared(&self, gpa: u64) -> Result<(), AccelError> {
        self.unmap_rom(gpa)
    }

    fn unmap_rom(&self, gpa: u64) -> Result<(), AccelError> {
        self.0.slots.write().unmap_rom(&self.0.fd, gpa)
    }

    fn cpu_lines(&self) -> Arc<dyn CpuLines> {
        Arc::clone(&self.0.lines) as Arc<dyn CpuLines>
    }

    fn msi(&self) -> Option<Arc<dyn MsiController>> {
        Some(Arc::clone(&self.0.routes) as Arc<dyn MsiController>)
    }

    fn kernel_irq_sink(&self) -> Option<Arc<dyn IrqSink>> {
        (self.0.irqchip == IrqChip::On)
            .then(|| Arc::new(KernelPins(Arc::clone(&self.0.fd))) as Arc<dyn IrqSink>)
    }

    fn io_events(&self) -> Option<(Arc<dyn IoEvents>, Arc<dyn IoEvents>)> {
        let fd = &self.0.fd;
        Some((KvmIoEvents::new(Arc::clone(fd), false), KvmIoEvents::new(Arc::clone(fd), true)))
    }

    fn connect_ext_int(&self, source: Arc<dyn ExtInt>) {
        if self.0.ext_int.set(source).is_err() {
            tracing::warn!("a second source of external interrupts is ignored");
        }
    }

    fn connect_eoi(&self, receiver: Arc<dyn Fn(u8) + Send + Sync>) {
        if self.0.eoi.set(receiver).is_err() {
            tracing::warn!("a second receiver of EOI broadcasts is ignored");
        }
    }

    fn ioapic_routes_changed(&self, routes: &[Option<MsiMessage>; 24]) {
        self.0.routes.note_ioapic(routes);
    }

    fn start_dirty_log(&self) -> Result<(), AccelError> {
        self.0.slots.read().log(&self.0.fd, true)
    }

    fn sync_dirty_log(&self) -> Result<(), AccelError> {
        match self.0.log {
            Log::Bitmap { manual } => collect_bitmaps(&self.0.fd, &self.0.slots.read(), manual),
            Log::Ring { .. } => self.0.collect_rings(),
        }
    }

    fn stop_dirty_log(&self) -> Result<(), AccelError> {
        self.0.slots.read().log(&self.0.fd, false)
    }

    fn save(&self) -> Result<serde_json::Value, AccelError> {
        let clock = self.0.fd.get_clock().map_err(|e| host("cannot save the clock", io_error(e)))?;
        let mut saved = SavedVm { clock: Some(clock.clock), ..SavedVm::default() };
        if self.0.irqchip == IrqChip::On {
            self.0.save_chips(&mut saved)?;
        }
        let value =
            serde_json::to_value(&saved).map_err(|e| host("cannot save the VM", io::Error::other(e)))?;
        Ok(serde_json::json!({ NAME: value }))
    }

    fn restore(&self, state: &serde_json::Value) -> Result<(), AccelError> {
        let Some(own) = state.get(NAME) else { return Ok(()) };
        let saved = SavedVm::deserialize(own)
            .map_err(|e| AccelError::State { accel: NAME, reason: e.to_string() })?;
        if let Some(clock) = saved.clock {
            let data = kvm_clock_data { clock, ..Default::default() };
            self.0.fd.set_clock(&data).map_err(|e| host("cannot restore the clock", io_error(e)))?;
        }
        match (self.0.irqchip, saved.chips.len()) {
            (IrqChip::On, 3) => self.0.restore_chips(&saved),
            (IrqChip::On, _) => Err(AccelError::State {
                accel: NAME,
                reason: "it has no kernel interrupt controllers; restore with `kernel_irqchip=split`".into(),
            }),
            (_, 0) => Ok(()),
            _ => Err(AccelError::State {
                accel: NAME,
                reason: "its interrupt controllers were in the kernel; restore with `kernel_irqchip=on`"
                    .into(),
            }),
        }
    }
}
