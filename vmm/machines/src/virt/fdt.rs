//! The device tree of `virt`, made from its plan (Devicetree Specification 0.4 and Linux's bindings).

use holdfast_arch::riscv64::boot::extensions;
use vm_fdt::{Error, FdtWriter};

use super::plan::{self, Plan, Window};

/// Device trees carry the seed of the guest's random number generator: this many bytes.
pub const SEED: usize = 32;

/// What only loading decides.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Chosen {
    /// Kernel command line.
    pub bootargs: String,
    /// First and one past the last address of the initramfs.
    pub initramfs: Option<(u64, u64)>,
    /// Fresh randomness.
    pub rng_seed: [u8; SEED],
    /// Fresh randomness.
    pub kaslr_seed: u64,
}

type Result = std::result::Result<(), Error>;

/// Handles by which nodes refer to each other.
struct Handles {
    plic: u32,
    syscon: u32,
}

impl Handles {
    fn cpu(hart: u32) -> u32 {
        2 * hart + 1
    }

    fn cpu_intc(hart: u32) -> u32 {
        2 * hart + 2
    }

    fn new(plan: &Plan) -> Self {
        Self { plic: 2 * plan.harts + 1, syscon: 2 * plan.harts + 2 }
    }
}

/// A cell of a PCI address: prefetchable, relocatable, ... and space (PCI Bus Binding, section 2.2.1).
const PCI_SPACE_IO: u32 = 0x0100_0000;
const PCI_SPACE_MEM32: u32 = 0x0200_0000;
const PCI_SPACE_MEM64: u32 = 0x0300_0000;

/// The finished blob.
///
/// # Errors
/// The writer's error, for example a NUL in the command line.
pub fn build(plan: &Plan, chosen: &Chosen) -> std::result::Result<Vec<u8>, Error> {
    let mut fdt = FdtWriter::new()?;
    let handles = Handles::new(plan);
    let root = fdt.begin_node("")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "riscv-virtio")?;
    fdt.property_string("model", "riscv-virtio,holdfast")?;
    chosen_node(&mut fdt, chosen)?;
    memory(&mut fdt, plan)?;
    cpus(&mut fdt, plan)?;
    power(&mut fdt, &handles)?;
    firmware_devices(&mut fdt)?;
    let soc = fdt.begin_node("soc")?;
    fdt.property_u32("#address-cells", 2)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_string("compatible", "simple-bus")?;
    fdt.property_null("ranges")?;
    interrupt_controllers(&mut fdt, plan, &handles)?;
    platform(&mut fdt, plan, &handles)?;
    pci(&mut fdt, plan, &handles)?;
    fdt.end_node(soc)?;
    fdt.end_node(root)?;
    fdt.finish()
}

fn chosen_node(fdt: &mut FdtWriter, chosen: &Chosen) -> Result {
    let node = fdt.begin_node("chosen")?;
    if !chosen.bootargs.is_empty() {
        fdt.property_string("bootargs", &chosen.bootargs)?;
    }
    fdt.property_string("stdout-path", &format!("/soc/serial@{:x}", plan::UART.base))?;
    if let Some((start, end)) = chosen.initramfs {
        fdt.property_u64("linux,initrd-start", start)?;
        fdt.property_u64("linux,initrd-end", end)?;
    }
    fdt.property("rng-seed", &chosen.rng_seed)?;
    fdt.property_u64("kaslr-seed", chosen.kaslr_seed)?;
    fdt.end_node(node)
}

fn memory(fdt: &mut FdtWriter, plan: &Plan) -> Result {
    let node = fdt.begin_node(&format!("memory@{:x}", plan.ram.gpa))?;
    fdt.property_string("device_type", "memory")?;
    fdt.property_array_u64("reg", &[plan.ram.gpa, plan.ram.len])?;
    fdt.end_node(node)
}

fn cpus(fdt: &mut FdtWriter, plan: &Plan) -> Result {
    let node = fdt.begin_node("cpus")?;
    fdt.property_u32("#address-cells", 1)?;
    fdt.property_u32("#size-cells", 0)?;
    fdt.property_u32("timebase-frequency", plan.isa.timebase_hz as u32)?;
    for hart in 0..plan.harts {
        let cpu = fdt.begin_node(&format!("cpu@{hart:x}"))?;
        fdt.property_string("device_type", "cpu")?;
        fdt.property_u32("reg", hart)?;
        fdt.property_string("status", "okay")?;
        fdt.property_string("compatible", "riscv")?;
        fdt.property_string("riscv,isa", &plan.isa.isa)?;
        fdt.property_string("riscv,isa-base", "rv64i")?;
        fdt.property_string_list("riscv,isa-extensions", extensions(&plan.isa.isa))?;
        fdt.property_string("mmu-type", &format!("riscv,{}", plan.isa.mmu))?;
        fdt.property_phandle(Handles::cpu(hart))?;
        let intc = fdt.begin_node("interrupt-controller")?;
        fdt.property_string("compatible", "riscv,cpu-intc")?;
        fdt.property_null("interrupt-controller")?;
        fdt.property_u32("#interrupt-cells", 1)?;
        fdt.property_phandle(Handles::cpu_intc(hart))?;
        fdt.end_node(intc)?;
        fdt.end_node(cpu)?;
    }
    cpu_map(fdt, plan)?;
    fdt.end_node(node)
}

fn cpu_map(fdt: &mut FdtWriter, plan: &Plan) -> Result {
    let map = fdt.begin_node("cpu-map")?;
    let (threads, cores) = (plan.threads.max(1), plan.cores.max(1));
    for cluster in 0..plan.harts / (threads * cores) {
        let cluster_node = fdt.begin_node(&format!("cluster{cluster}"))?;
        for core in 0..cores {
            let core_node = fdt.begin_node(&format!("core{core}"))?;
            let first = (cluster * cores + core) * threads;
            if threads == 1 {
                fdt.property_u32("cpu", Handles::cpu(first))?;
            } else {
                for thread in 0..threads {
                    let thread_node = fdt.begin_node(&format!("thread{thread}"))?;
                    fdt.property_u32("cpu", Handles::cpu(first + thread))?;
                    fdt.end_node(thread_node)?;
                }
            }
            fdt.end_node(core_node)?;
        }
        fdt.end_node(cluster_node)?;
    }
    fdt.end_node(map)
}

fn power(fdt: &mut FdtWriter, handles: &Handles) -> Result {
    for (name, value) in
        [("poweroff", holdfast_devices::syscon::PASS), ("reboot", holdfast_devices::syscon::RESET)]
    {
        let node = fdt.begin_node(name)?;
        fdt.property_string("compatible", &format!("syscon-{name}"))?;
        fdt.property_u32("regmap", handles.syscon)?;
        fdt.property_u32("offset", 0)?;
        fdt.property_u32("value", value)?;
        fdt.end_node(node)?;
    }
    Ok(())
}

fn firmware_devices(fdt: &mut FdtWriter) -> Result {
    let fw_cfg = fdt.begin_node(&format!("fw-cfg@{:x}", plan::FW_CFG.base))?;
    fdt.property_string("compatible", "qemu,fw-cfg-mmio")?;
    reg(fdt, plan::FW_CFG)?;
    fdt.property_null("dma-coherent")?;
    fdt.end_node(fw_cfg)?;

    let flash = fdt.begin_node(&format!("flash@{:x}", plan::FLASH.base))?;
    fdt.property_string("compatible", "cfi-flash")?;
    let banks = [plan::flash_bank(0), plan::flash_bank(1)];
    fdt.property_array_u64("reg", &banks.map(|w| [w.base, w.len]).concat())?;
    fdt.property_u32("bank-width", 4)?;
    fdt.end_node(flash)
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn reg(fdt: &mut FdtWriter, window: Window) -> Result {
    fdt.property_array_u64("reg", &[window.base, window.len])
}

fn interrupt(fdt: &mut FdtWriter, handles: &Handles, source: u32) -> Result {
    fdt.property_u32("interrupts", source)?;
    fdt.property_u32("interrupt-parent", handles.plic)
}

fn interrupt_controllers(fdt: &mut FdtWriter, plan: &Plan, handles: &Handles) -> Result {
    use holdfast_devices::riscv::pin;
    let targets = |pins: [u32; 2]| -> Vec<u32> {
        (0..plan.harts).flat_map(|hart| pins.map(|pin| [Handles::cpu_intc(hart), pin])).flatten().collect()
    };
    let clint = fdt.begin_node(&format!("clint@{:x}", plan::ACLINT.base))?;
    fdt.property_string_list("compatible", strings(&["sifive,clint0", "riscv,clint0"]))?;
    reg(fdt, plan::ACLINT)?;
    fdt.property_array_u32("interrupts-extended", &targets([pin::MSIP, pin::MTIP]))?;
    fdt.end_node(clint)?;

    let plic = fdt.begin_node(&format!("plic@{:x}", plan::PLIC.base))?;
    fdt.property_string_list("compatible", strings(&["sifive,plic-1.0.0", "riscv,plic0"]))?;
    reg(fdt, plan::PLIC)?;
    fdt.property_null("interrupt-controller")?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("#address-cells", 0)?;
    fdt.property_u32("riscv,ndev", plan::PLIC_SOURCES)?;
    fdt.property_array_u32("interrupts-extended", &targets([pin::MEIP, pin::SEIP]))?;
    fdt.property_phandle(handles.plic)?;
    fdt.end_node(plic)
}

fn platform(fdt: &mut FdtWriter, plan: &Plan, handles: &Handles) -> Result {
    let test = fdt.begin_node(&format!("test@{:x}", plan::SYSCON.base))?;
    fdt.property_string_list("compatible", strings(&["sifive,test1", "sifive,test0", "syscon"]))?;
    reg(fdt, plan::SYSCON)?;
    fdt.property_phandle(handles.syscon)?;
    fdt.end_node(test)?;

    let rtc = fdt.begin_node(&format!("rtc@{:x}", plan::RTC.base))?;
    fdt.property_string("compatible", "google,goldfish-rtc")?;
    reg(fdt, plan::RTC)?;
    interrupt(fdt, handles, plan::RTC_IRQ)?;
    fdt.end_node(rtc)?;

    let serial = fdt.begin_node(&format!("serial@{:x}", plan::UART.base))?;
    fdt.property_string("compatible", "ns16550a")?;
    reg(fdt, plan::UART)?;
    interrupt(fdt, handles, plan::UART_IRQ)?;
    fdt.property_u32("clock-frequency", 3_686_400)?;
    fdt.end_node(serial)?;

    for index in 0..plan.virtio_slots {
        let (window, source) = Plan::virtio_slot(index);
        let node = fdt.begin_node(&format!("virtio_mmio@{:x}", window.base))?;
        fdt.property_string("compatible", "virtio,mmio")?;
        reg(fdt, window)?;
        interrupt(fdt, handles, source)?;
        fdt.property_null("dma-coherent")?;
        fdt.end_node(node)?;
    }
    Ok(())
}

fn pci(fdt: &mut FdtWriter, plan: &Plan, handles: &Handles) -> Result {
    let node = fdt.begin_node(&format!("pci@{:x}", plan::PCI_ECAM.base))?;
    fdt.property_string("compatible", "pci-host-ecam-generic")?;
    fdt.property_string("device_type", "pci")?;
    fdt.property_u32("#address-cells", 3)?;
    fdt.property_u32("#size-cells", 2)?;
    fdt.property_u32("#interrupt-cells", 1)?;
    fdt.property_u32("linux,pci-domain", 0)?;
    fdt.property_array_u32("bus-range", &[0, (plan::PCI_ECAM.len >> 20) as u32 - 1])?;
    fdt.property_null("dma-coherent")?;
    reg(fdt, plan::PCI_ECAM)?;
    // Child address (three cells), parent address (two), size (two).
    let range = |space: u32, child: u64, window: Window| {
        let halves = |n: u64| [(n >> 32) as u32, n as u32];
        let cells = [halves(child), halves(window.base), halves(window.len)];
        std::iter::once(space).chain(cells.into_iter().flatten())
    };
    let ranges: Vec<u32> = range(PCI_SPACE_IO, 0, plan::PCI_IO)
        .chain(range(PCI_SPACE_MEM32, plan::PCI_MMIO.base, plan::PCI_MMIO))
        .chain(range(PCI_SPACE_MEM64, plan.pci_high.base, plan.pci_high))
        .collect();
    fdt.property_array_u32("ranges", &ranges)?;
    // The wiring repeats every four devices: two bits of the device number matter.
    fdt.property_array_u32("interrupt-map-mask", &[0x1800, 0, 0, 7])?;
    let mut map = Vec::new();
    for device in 0..plan::PCI_WIRES as u8 {
        for pin in 0..4u8 {
            let source = plan::PCI_IRQ + plan::pci_wire(device, pin) as u32;
            map.extend([u32::from(device) << 11, 0, 0, u32::from(pin) + 1, handles.plic, source]);
        }
    }
    fdt.property_array_u32("interrupt-map", &map)?;
    fdt.end_node(node)
}
