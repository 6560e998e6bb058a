//! The RISC-V machine `virt`.

pub mod fdt;
mod load;
pub mod plan;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use holdfast_accel::RomWindow;
use holdfast_arch::riscv64::IsaModel;
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_device::{BuildError, BusDevice, Device, IrqLine, IrqSink};
use holdfast_devices::catalog::Board;
use holdfast_devices::flash::{Chips, Flash, FlashSpec};
use holdfast_devices::fw_cfg::{self, FwCfg};
use holdfast_devices::goldfish_rtc::GoldfishRtc;
use holdfast_devices::pci::{
    ConfigBuilder, Ecam, Identity, IoWindow, PciBus, PciBusSpec, PciConfig, PciDevice, RootPort,
};
use holdfast_devices::riscv::{Aclint, AclintSpec, Plic, PlicSpec};
use holdfast_devices::serial::Serial;
use holdfast_devices::syscon::Syscon;
use holdfast_memory::GuestRegion;
use vm_memory::{Bytes, GuestAddress, MemoryRegionAddress};

use crate::{
    Machine, MachineContext, MachineError, MachineModule, MachineRequest, Payload, RamRange, VirtioSlot,
    flash,
};
use plan::{Plan, Window};

/// The machine's registration.
#[derive(Debug)]
pub struct VirtModule;

impl MachineModule for VirtModule {
    fn name(&self) -> &'static str {
        plan::NAME
    }

    fn description(&self) -> &'static str {
        "RISC-V board with PLIC, ACLINT, PCI Express and virtio-mmio, laid out like QEMU's"
    }

    fn arch(&self) -> Arch {
        Arch::Riscv64
    }

    fn max_vcpus(&self) -> u32 {
        plan::MAX_HARTS
    }

    fn default_cpu(&self) -> CpuModel {
        CpuModel::Riscv64(IsaModel::default())
    }

    fn ram_layout(&self, request: &MachineRequest) -> Result<Vec<RamRange>, MachineError> {
        Ok(vec![Plan::new(request)?.ram])
    }

    fn build(
        &self,
        request: MachineRequest,
        context: MachineContext,
    ) -> Result<Box<dyn Machine>, MachineError> {
        let plan = Plan::new(&request)?;
        let build = |source| MachineError::Build { machine: plan::NAME, source };
        Ok(Box::new(Virt::new(plan, request, context).map_err(build)?))
    }
}

/// The built machine.
#[derive(Debug)]
struct Virt {
    plan: Plan,
    payload: Payload,
    context: MachineContext,
    devices: Vec<Arc<dyn Device>>,
    plic: Arc<Plic>,
    pci: Arc<PciBus>,
    ports: Vec<Arc<RootPort>>,
    rom: Arc<GuestRegion>,
    slots_taken: AtomicU32,
}

/// The PCI host bridge, as device 0: nothing but its identity.
#[derive(Debug)]
struct HostBridge(Arc<PciConfig>);

impl PciDevice for HostBridge {
    fn pci_name(&self) -> &str {
        "host-bridge"
    }

    fn config(&self) -> &Arc<PciConfig> {
        &self.0
    }
}

impl Virt {
    fn new(plan: Plan, request: MachineRequest, context: MachineContext) -> Result<Self, BuildError> {
        let lines = context.vm.cpu_lines();
        let build = &context.build;
        let plic = Plic::new(PlicSpec {
            harts: plan.harts,
            sources: plan::PLIC_SOURCES,
            lines: Arc::clone(&lines),
            edge: Vec::new(),
        });
        let wire = |source| IrqLine::new(Arc::clone(&plic) as Arc<dyn IrqSink>, source);
        let aclint = Aclint::new(AclintSpec {
            harts: plan.harts,
            timebase_hz: plan.isa.timebase_hz,
            lines,
            timers: Arc::clone(&build.timers),
        });
        let serial = Serial::new("serial", wire(plan::UART_IRQ), request.serial);
        let rtc = GoldfishRtc::new(wire(plan::RTC_IRQ), Arc::clone(&build.timers));
        let syscon = Syscon::new(Arc::clone(&build.system));
        let pci = PciBus::new(PciBusSpec {
            segment: 0,
            mmio: Arc::clone(&build.mmio),
            pio: Arc::clone(&build.pio),
            wires: (0..plan::PCI_WIRES).map(|n| wire(plan::PCI_IRQ + n)).collect(),
            swizzle: plan::pci_wire,
        });
        add_host_bridge(&pci)?;
        let attach = |window: Window, name: &str, device: Arc<dyn BusDevice>| {
            let attached = build.mmio.attach(window.base, window.len, name, device);
            attached.map_err(|source| BuildError::Bus { id: name.to_owned(), source })
        };
        attach(plan::PLIC, "plic", Arc::clone(&plic) as Arc<dyn BusDevice>)?;
        attach(plan::ACLINT, "aclint", Arc::clone(&aclint) as Arc<dyn BusDevice>)?;
        attach(plan::UART, "serial", Arc::clone(&serial) as Arc<dyn BusDevice>)?;
        attach(plan::RTC, "rtc", Arc::clone(&rtc) as Arc<dyn BusDevice>)?;
        attach(plan::SYSCON, "syscon", Arc::clone(&syscon) as Arc<dyn BusDevice>)?;
        attach(plan::PCI_ECAM, "pci-ecam", Ecam::new(Arc::clone(&pci)))?;
        attach(plan::PCI_IO, "pci-io", IoWindow::new(Arc::clone(&build.pio)))?;
        let fw_cfg = fw_cfg(&plan, request.uuid, &context);
        attach(plan::FW_CFG, "fw-cfg", fw_cfg.mmio())?;
        let rom = map_rom(&context)?;
        let mut devices: Vec<Arc<dyn Device>> = vec![plic.clone(), aclint, serial, rtc, syscon, fw_cfg];
        for bank in 0..2 {
            let window = plan::flash_bank(bank);
            let id = format!("flash{bank}");
            let device = Flash::new(FlashSpec {
                gpa: window.base,
                chips: Chips::Pair16,
                size: window.len,
                backing: flash::backing(&id, request.payload.flash.get(bank as usize))?,
                id,
                rom: Some(Arc::new(flash::VmRom(Arc::clone(&context.vm)))),
            })?;
            attach(window, "flash", Arc::clone(&device) as Arc<dyn BusDevice>)?;
            devices.push(device);
        }
        let board = Board { build, pci: &pci, isa: None };
        for device in &request.board {
            devices.push(device.build(&board)?);
        }
        let ports = crate::hotplug_ports(request.hotplug_ports, &pci, build)?;
        devices.extend(ports.iter().map(|p| Arc::clone(p) as Arc<dyn Device>));
        Ok(Self {
            plan,
            payload: request.payload,
            devices,
            plic,
            pci,
            ports,
            rom,
            slots_taken: AtomicU32::new(0),
            context,
        })
    }
}

fn fw_cfg(plan: &Plan, uuid: Option<[u8; 16]>, context: &MachineContext) -> Arc<FwCfg> {
    let device = FwCfg::new(context.build.memory.clone());
    device.add_item(fw_cfg::key::UUID, uuid.unwrap_or_default().to_vec());
    device.add_item(fw_cfg::key::RAM_SIZE, plan.ram.len.to_le_bytes().to_vec());
    device.add_item(fw_cfg::key::NO_GRAPHIC, 1u16.to_le_bytes().to_vec());
    let harts = plan.harts as u16;
    device.add_item(fw_cfg::key::CPUS, harts.to_le_bytes().to_vec());
    device.add_item(fw_cfg::key::MAX_CPUS, harts.to_le_bytes().to_vec());
    device
}

fn add_host_bridge(pci: &Arc<PciBus>) -> Result<(), BuildError> {
    let config = |reason: String| BuildError::Config { id: "host-bridge".into(), reason };
    let slot = pci.reserve(Some(0)).map_err(|e| config(e.to_string()))?;
    // Red Hat's generic PCI Express host, which guests know to need no driver.
    let identity = Identity { vendor: 0x1b36, device: 0x0008, class: 0x06_0000, ..Identity::default() };
    let bridge = Arc::new(HostBridge(ConfigBuilder::new(identity).build()));
    pci.plug(&slot, bridge).map_err(|e| config(e.to_string()))
}

fn map_rom(context: &MachineContext) -> Result<Arc<GuestRegion>, BuildError> {
    let host =
        |source| BuildError::Host { id: "rom".into(), what: "the reset ROM cannot be mapped".into(), source };
    let region = GuestRegion::from_range(GuestAddress(plan::ROM.base), plan::ROM.len as usize, None)
        .map_err(|e| host(std::io::Error::other(e)))?;
    let region = Arc::new(region);
    let window = RomWindow { gpa: plan::ROM.base, region: Arc::clone(&region) };
    context.vm.map_rom(&window).map_err(|e| host(std::io::Error::other(e)))?;
    Ok(region)
}

impl Machine for Virt {
    fn devices(&self) -> Vec<Arc<dyn Device>> {
        self.devices.clone()
    }

    fn pci_bus(&self) -> Option<Arc<PciBus>> {
        Some(Arc::clone(&self.pci))
    }

    fn ports(&self) -> Vec<Arc<RootPort>> {
        self.ports.clone()
    }

    fn take_mmio_slot(&self) -> Option<VirtioSlot> {
        let more = |n| (n < plan::VIRTIO_SLOTS).then_some(n + 1);
        let index = self.slots_taken.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).ok()?;
        let (window, source) = Plan::virtio_slot(index);
        let irq = IrqLine::new(Arc::clone(&self.plic) as Arc<dyn IrqSink>, source);
        Some(VirtioSlot::Mmio { base: window.base, irq })
    }

    fn load(&self) -> Result<(), MachineError> {
        let plan = Plan { virtio_slots: self.slots_taken.load(Ordering::SeqCst), ..self.plan.clone() };
        let build = &self.context.build;
        let rom = load::load(&plan, &self.payload, &build.memory, build.random.as_ref())?;
        self.rom.write_slice(&rom, MemoryRegionAddress(0)).map_err(|e| MachineError::Request {
            machine: plan::NAME,
            reason: format!("the reset ROM cannot be written: {e}"),
        })
    }

    fn start_state(&self, index: u32, reset: CpuState) -> CpuState {
        match reset {
            CpuState::Riscv64(mut state) => {
                state.pc = plan::ROM.base;
                state.hartid = u64::from(index);
                CpuState::Riscv64(state)
            }
            other => other,
        }
    }

    fn power_button(&self) -> bool {
        false
    }

    fn has_power_button(&self) -> bool {
        false
    }
}

#[cfg(test)]
mod tests;
