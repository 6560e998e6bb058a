//! The x86 machine `q35`: an MCH and ICH9, as PC firmware and kernels know them.

mod files;
mod load;
pub mod plan;

use std::sync::Arc;

use holdfast_accel::IrqChip;
use holdfast_arch::x86_64::CpuidModel;
use holdfast_arch::x86_64::acpi::{ACPI_DISABLE, ACPI_ENABLE, SLEEP_TYPE_S5};
use holdfast_arch::x86_64::boot::Entry;
use holdfast_arch::x86_64::smbios::SmbiosConfig;
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_device::{BuildContext, BuildError, BusDevice, Device, ExtInt, FpuErrors};
use holdfast_devices::catalog::Board;
use holdfast_devices::fw_cfg::FwCfg;
use holdfast_devices::pci::{ConfigPorts, PciBus, PciBusSpec, RootPort};
use holdfast_devices::serial::Serial;
use holdfast_devices::x86::{
    AcpiPm, AcpiPmConfig, CmosConfig, DebugConsole, FPU_PORT, Gsi, Hpet, HpetConfig, I8042, I8042Config,
    IoApic, IoApicConfig, IrqTarget, LegacyGate, Lpc, Mch, PicPair, Pit, PitConfig, PostPort, ResetControl,
    Rtc, SleepTypes, SystemControlA, pirq_of,
};
use parking_lot::Mutex;

use crate::{
    Machine, MachineContext, MachineError, MachineModule, MachineRequest, Payload, RamRange, VirtioSlot,
};
use load::Firmware;
use plan::{NAME, Plan};

/// The machine's registration.
#[derive(Debug)]
pub struct Q35Module;

impl MachineModule for Q35Module {
    fn name(&self) -> &'static str {
        NAME
    }

    fn description(&self) -> &'static str {
        "PC with MCH and ICH9: PCI Express, ACPI, HPET; boots PC firmware or a kernel"
    }

    fn arch(&self) -> Arch {
        Arch::X86_64
    }

    fn max_vcpus(&self) -> u32 {
        plan::MAX_VCPUS
    }

    fn default_cpu(&self) -> CpuModel {
        CpuModel::X86_64(CpuidModel { name: "host".into(), ..CpuidModel::default() })
    }

    fn ram_layout(&self, request: &MachineRequest) -> Result<Vec<RamRange>, MachineError> {
        Ok(Plan::new(request)?.ram)
    }

    fn x86_tss_base(&self) -> Option<u64> {
        Some(plan::TSS.0)
    }

    fn build(
        &self,
        request: MachineRequest,
        context: MachineContext,
    ) -> Result<Box<dyn Machine>, MachineError> {
        let plan = Plan::new(&request)?;
        let build = |source| MachineError::Build { machine: NAME, source };
        let payload = &request.payload;
        let mut banks = Vec::new();
        let firmware = match (&payload.firmware, &payload.kernel, payload.flash.as_slice()) {
            (Some(path), None, []) => Some(Firmware::map(path, context.vm.as_ref())?),
            (None, Some(_), []) => None,
            (None, None, []) => {
                return Err(refuse("neither a kernel nor firmware to boot; give one of them"));
            }
            (None, None, flash) => load::flash_banks(flash, &context, &mut banks).map_err(build)?,
            (_, Some(_), _) => return Err(refuse("a kernel and firmware together; give one of them")),
            (Some(_), None, _) => return Err(refuse("firmware and flash together; give one of them")),
        };
        let mut parts = Parts::build(&plan, &request, &context).map_err(build)?;
        parts.devices.append(&mut banks);
        Ok(Box::new(Q35 {
            smbios: plan.smbios(&request),
            plan,
            payload: request.payload,
            firmware,
            parts,
            context,
            entry: Mutex::new(None),
        }))
    }
}

fn refuse(reason: &str) -> MachineError {
    MachineError::Request { machine: NAME, reason: reason.to_owned() }
}

/// The built machine.
#[derive(Debug)]
struct Q35 {
    plan: Plan,
    payload: Payload,
    smbios: SmbiosConfig,
    firmware: Option<Firmware>,
    parts: Parts,
    context: MachineContext,
    /// How the boot vCPU starts; `None`: at the reset vector.
    entry: Mutex<Option<Entry>>,
}

/// The devices.
#[derive(Debug)]
struct Parts {
    devices: Vec<Arc<dyn Device>>,
    pci: Arc<PciBus>,
    hotplug: Vec<Arc<RootPort>>,
    mch: Arc<Mch>,
    lpc: Arc<Lpc>,
    pm: Arc<AcpiPm>,
    fw_cfg: Arc<FwCfg>,
}

fn attach(
    context: &BuildContext,
    base: u64,
    len: u64,
    name: &str,
    device: Arc<dyn BusDevice>,
) -> Result<(), BuildError> {
    let attached = context.pio.attach(base, len, name, device);
    attached.map_err(|source| BuildError::Bus { id: name.to_owned(), source })
}

/// The interrupt controllers: in user space, or the kernel's. Adds those of ours to `devices`.
fn interrupts(
    request: &MachineRequest,
    context: &MachineContext,
    devices: &mut Vec<Arc<dyn Device>>,
) -> Result<Arc<Gsi>, BuildError> {
    let config = |reason: &str| BuildError::Config { id: "ioapic".into(), reason: reason.to_owned() };
    if request.irqchip == IrqChip::On {
        let sink = context.vm.kernel_irq_sink();
        let sink = sink.ok_or_else(|| config("this accelerator has no interrupt controllers of its own"))?;
        let gsi = Gsi::new(IrqTarget::Kernel(sink));
        devices.push(gsi.clone());
        return Ok(gsi);
    }
    let msi =
        context.vm.msi().ok_or_else(|| config("this accelerator takes no message-signalled interrupts"))?;
    let vm = Arc::clone(&context.vm);
    let routes = Arc::new(move |table: &_| vm.ioapic_routes_changed(table));
    let ioapic = IoApicConfig { version: 0x20, id: 0, msi, routes: Some(routes) };
    let ioapic = IoApic::build(ioapic, &context.build)?;
    let receiver = Arc::downgrade(&ioapic);
    context.vm.connect_eoi(Arc::new(move |vector| {
        if let Some(ioapic) = receiver.upgrade() {
            ioapic.eoi(vector);
        }
    }));
    let pic = PicPair::build(context.vm.cpu_lines(), &context.build)?;
    context.vm.connect_ext_int(Arc::clone(&pic) as Arc<dyn ExtInt>);
    let gsi = Gsi::new(IrqTarget::Split { pic: Arc::clone(&pic), ioapic: Arc::clone(&ioapic) });
    context.vm.connect_fpu_errors(Arc::clone(&gsi) as Arc<dyn FpuErrors>);
    attach(&context.build, FPU_PORT, 1, "fpu", Arc::clone(&gsi) as Arc<dyn BusDevice>)?;
    devices.extend([gsi.clone() as Arc<dyn Device>, pic, ioapic]);
    Ok(gsi)
}

/// The timers: with a kernel's interrupt controllers comes its PIT, and then there is no HPET.
fn timers(
    plan: &Plan,
    request: &MachineRequest,
    gsi: &Arc<Gsi>,
    context: &BuildContext,
    devices: &mut Vec<Arc<dyn Device>>,
) -> Result<(), BuildError> {
    let gate = LegacyGate::new(gsi.line(0), gsi.line(8));
    if request.irqchip != IrqChip::On {
        devices.push(Pit::build(PitConfig { irq: gate.line(0) }, context)?);
    }
    if plan.hpet {
        let config = HpetConfig { gsi: Arc::clone(gsi), gate: Arc::clone(&gate) };
        devices.push(Hpet::build(config, context)?);
    }
    let (ram_below_4g, ram_above_4g) = plan.ram_split();
    let cmos =
        CmosConfig { irq: gate.line(1), ram_below_4g, ram_above_4g, boot_vcpus: plan.boot_vcpus, wall: None };
    devices.push(Rtc::build(cmos, context)?);
    Ok(())
}

/// The serial port, the keyboard controller and the single ports.
fn super_io(
    request: &MachineRequest,
    gsi: &Arc<Gsi>,
    context: &BuildContext,
    devices: &mut Vec<Arc<dyn Device>>,
) -> Result<(), BuildError> {
    let serial = Serial::new("serial", gsi.line(4), request.serial.clone());
    attach(context, 0x3f8, 8, "serial", Arc::clone(&serial) as Arc<dyn BusDevice>)?;
    let keyboard = I8042Config { keyboard_irq: gsi.line(1), mouse_irq: gsi.line(12) };
    devices.extend([
        serial as Arc<dyn Device>,
        I8042::build(keyboard, context)?,
        PostPort::build(context)?,
        SystemControlA::build(context)?,
    ]);
    if let Some(port) = request.debug_console_port {
        devices.push(DebugConsole::build(port, request.debug_console.clone(), context)?);
    }
    Ok(())
}

impl Parts {
    fn build(plan: &Plan, request: &MachineRequest, context: &MachineContext) -> Result<Self, BuildError> {
        let build = &context.build;
        let mut devices = Vec::new();
        let gsi = interrupts(request, context, &mut devices)?;
        timers(plan, request, &gsi, build, &mut devices)?;
        super_io(request, &gsi, build, &mut devices)?;
        // States list what is added by name behind the single ports, before the chipset.
        let place = devices.len();

        let pci = PciBus::new(PciBusSpec {
            segment: 0,
            mmio: Arc::clone(&build.mmio),
            pio: Arc::clone(&build.pio),
            wires: (16..24).map(|n| gsi.line(n)).collect(),
            swizzle: pirq_of,
        });
        let reset = ResetControl::new(build);
        let ports = ConfigPorts::new(Arc::clone(&pci), Some(Arc::clone(&reset) as Arc<dyn BusDevice>));
        attach(build, 0xcf8, 8, "pci-config", Arc::clone(&ports) as Arc<dyn BusDevice>)?;
        let pm = AcpiPmConfig {
            sci: gsi.line(9),
            sleep: SleepTypes { s5: SLEEP_TYPE_S5 },
            acpi_enable: ACPI_ENABLE,
            acpi_disable: ACPI_DISABLE,
        };
        let pm = AcpiPm::build(pm, build)?;
        let mch = Mch::build(&pci, build)?;
        let lpc = Lpc::build(&pci, Arc::clone(&pm), Arc::clone(&gsi))?;
        let fw_cfg = FwCfg::new(build.memory.clone());
        files::fill(&fw_cfg, plan, request)?;
        attach(build, 0x510, 12, "fw_cfg", fw_cfg.port_io())?;
        devices.extend([
            reset as Arc<dyn Device>,
            ports,
            pm.clone(),
            mch.clone(),
            lpc.clone(),
            fw_cfg.clone(),
        ]);
        let isa = |n| gsi.line(n);
        let board = Board { build, pci: &pci, isa: Some(&isa) };
        let added = request.board.iter().map(|device| device.build(&board)).collect::<Result<Vec<_>, _>>()?;
        devices.splice(place..place, added);
        let hotplug = crate::hotplug_ports(request.hotplug_ports, &pci, build)?;
        devices.extend(hotplug.iter().map(|p| Arc::clone(p) as Arc<dyn Device>));
        Ok(Self { devices, pci, hotplug, mch, lpc, pm, fw_cfg })
    }
}

impl Machine for Q35 {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.parts.devices.clone()
    }

    fn pci_bus(&self) -> Option<Arc<PciBus>> {
        Some(Arc::clone(&self.parts.pci))
    }

    fn ports(&self) -> Vec<Arc<RootPort>> {
        self.parts.hotplug.clone()
    }

    fn take_mmio_slot(&self) -> Option<VirtioSlot> {
        None
    }

    fn load(&self) -> Result<(), MachineError> {
        let memory = &self.context.build.memory;
        self.parts.fw_cfg.set_file(files::BOOT_ORDER, files::boot_order(&self.parts.pci));
        if let Some(firmware) = &self.firmware {
            *self.entry.lock() = None;
            return firmware.shadow(memory);
        }
        let Some(path) = &self.payload.kernel else { return Err(refuse("no kernel to boot")) };
        let entry = load::kernel(path, &self.payload, &self.plan, &self.smbios, memory)?;
        // What firmware would have left behind.
        self.parts.mch.enable_ecam();
        self.parts.lpc.program();
        let assigned = self.parts.pci.assign_resources(self.plan.windows());
        assigned.map_err(|e| MachineError::Request { machine: NAME, reason: e.to_string() })?;
        *self.entry.lock() = Some(entry);
        Ok(())
    }

    fn start_state(&self, index: u32, reset: CpuState) -> CpuState {
        let (CpuState::X86_64(mut state), Some(entry)) = (reset.clone(), *self.entry.lock()) else {
            return reset;
        };
        // Firmware would have made RAM cacheable on every processor: MTRRs on, write-back by default.
        if let Some(mtrr) = state.msrs.get_mut(&0x2ff) {
            *mtrr = 0x806;
        }
        if index == 0 {
            *state = entry.apply(*state);
        }
        CpuState::X86_64(state)
    }

    fn power_button(&self) -> bool {
        self.parts.pm.press_power_button();
        true
    }

    fn has_power_button(&self) -> bool {
        true
    }
}

#[cfg(test)]
mod tests;
