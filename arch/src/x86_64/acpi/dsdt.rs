//! The DSDT: what cannot be found by looking at the hardware.

use acpi_tables::Aml;
use acpi_tables::AmlSink;
use acpi_tables::aml::*;
use acpi_tables::sdt::Sdt;

use super::tables::{bytes, sdt};
use super::{AcpiConfig, SLEEP_TYPE_S5};

/// AML that is bytes already.
struct Raw(Vec<u8>);

impl Aml for Raw {
    fn to_aml_bytes(&self, sink: &mut dyn AmlSink) {
        sink.vec(&self.0);
    }
}

/// Several terms, one after the other.
fn terms(parts: &[&dyn Aml]) -> Raw {
    Raw(parts.iter().flat_map(|p| bytes(*p)).collect())
}

const LINKS: [&str; 8] = ["LNKA", "LNKB", "LNKC", "LNKD", "LNKE", "LNKF", "LNKG", "LNKH"];
const ROUTES: [&str; 8] = ["PRQA", "PRQB", "PRQC", "PRQD", "PRQE", "PRQF", "PRQG", "PRQH"];
/// Interrupts to which a PCI line may be routed on the 8259s.
const LINK_IRQS: [u32; 3] = [5, 10, 11];

/// Extended interrupt descriptor: consumer, level, active high, shared.
fn link_irqs(irqs: &[u32]) -> Raw {
    let mut out = vec![0x89];
    out.extend((2 + 4 * irqs.len() as u16).to_le_bytes());
    out.extend([0x09, irqs.len() as u8]);
    irqs.iter().for_each(|n| out.extend(n.to_le_bytes()));
    Raw(out)
}

pub(super) fn dsdt(config: &AcpiConfig) -> Sdt {
    let sleep = Package::new(vec![&SLEEP_TYPE_S5, &SLEEP_TYPE_S5, &ZERO, &ZERO]);
    let picf = Path::new("PICF");
    let pic = terms(&[
        &Name::new("PICF".into(), &ZERO),
        // The guest says whether it uses the 8259s (0) or the IOAPIC (1).
        &Method::new("_PIC".into(), 1, false, vec![&Store::new(&picf, &Arg(0))]),
    ]);
    let mut body = bytes(&terms(&[&Name::new("_S5_".into(), &sleep), &pic]));
    body.extend(bytes(&Scope::new(
        "_SB_".into(),
        vec![&root_bridge(config), &links(), &processors(config), &boards(config)],
    )));
    sdt(*b"DSDT", 2, &body)
}

/// `\_SB.PCI0` with its windows, interrupt routing and the ISA bridge.
fn root_bridge(config: &AcpiConfig) -> Raw {
    let (ecam_len, (mem32, mem32_len), (mem64, mem64_len)) = (config.ecam.1, config.mem32, config.mem64);
    let last_bus = (ecam_len >> 20).clamp(1, 256) as u16 - 1;
    let buses = AddressSpace::new_bus_number(0u16, last_bus);
    let config_ports = IO::new(0xcf8, 0xcf8, 1, 8);
    let low_io = AddressSpace::new_io(0u16, 0x0cf7, None);
    let high_io = AddressSpace::new_io(0x0d00u16, 0xffff, None);
    let vga = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, 0xa_0000u32, 0xb_ffff, None);
    let low_last = mem32.saturating_add(mem32_len.max(1) - 1);
    let low = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        mem32 as u32,
        u32::try_from(low_last).unwrap_or(u32::MAX),
        None,
    );
    let high_last = mem64.saturating_add(mem64_len.max(1) - 1);
    let high = AddressSpace::new_memory(AddressSpaceCacheable::Cacheable, true, mem64, high_last, None);
    let mut windows: Vec<&dyn Aml> = vec![&buses, &config_ports, &low_io, &high_io, &vga, &low];
    if mem64_len != 0 {
        windows.push(&high);
    }
    let crs = ResourceTemplate::new(windows);
    let prt = routing(config.pirq_of);
    let osc = if config.hotplug { osc() } else { Raw(Vec::new()) };
    raw_device(
        "PCI0",
        &[
            &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
            &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
            &Name::new("_UID".into(), &ZERO),
            &Name::new("_SEG".into(), &ZERO),
            &Name::new("_BBN".into(), &ZERO),
            &Name::new("_CRS".into(), &crs),
            &prt,
            &osc,
            &isa_bridge(),
        ],
    )
}

/// `_OSC`: the guest may drive hot-plug of the ports and their capability structures itself (PCI Firmware 3.0, section 4.5).
fn osc() -> Raw {
    /// Native hot-plug, and control of the PCI Express capability structure.
    const GRANTED: u32 = 0x11;
    let [first, third] = ["CDW1", "CDW3"].map(Path::new);
    let host_bridge = Uuid::new("33db4d5b-1ff7-401c-9657-7441c03dd766");
    let masked = And::new(&third, &third, &GRANTED);
    let unknown = Or::new(&first, &first, &4u8);
    Raw(bytes(&Method::new(
        "_OSC".into(),
        4,
        false,
        vec![
            &CreateDWordField::new(&first, &Arg(3), &ZERO),
            &If::new(
                &Equal::new(&Arg(0), &host_bridge),
                vec![&CreateDWordField::new(&third, &Arg(3), &8u8), &masked],
            ),
            &Else::new(vec![&unknown]),
            &Return::new(&Arg(3)),
        ],
    )))
}

fn raw_device(name: &str, parts: &[&dyn Aml]) -> Raw {
    Raw(bytes(&Device::new(name.into(), parts.to_vec())))
}

/// `_PRT`: on the IOAPIC the lines are inputs 16 to 23, on the 8259s they go through the links.
fn routing(pirq_of: fn(u8, u8) -> usize) -> Raw {
    let mut by_gsi = PackageBuilder::new();
    let mut by_link = PackageBuilder::new();
    // 32 devices of four pins fit: a package holds up to 255 elements.
    for device in 0..32u8 {
        for pin in 0..4u8 {
            let line = pirq_of(device, pin) & 7;
            let address = u32::from(device) << 16 | 0xffff;
            by_gsi.add_element(&Package::new(vec![&address, &pin, &ZERO, &(16 + line as u8)]));
            let link = Path::new(LINKS.get(line).copied().unwrap_or("LNKA"));
            by_link.add_element(&Package::new(vec![&address, &pin, &link, &ZERO]));
        }
    }
    let [apic, pic, picf] = ["PRTA", "PRTP", "PICF"].map(Path::new);
    terms(&[
        &Name::new("PRTA".into(), &by_gsi),
        &Name::new("PRTP".into(), &by_link),
        &Method::new(
            "_PRT".into(),
            0,
            false,
            vec![&If::new(&picf, vec![&Return::new(&apic)]), &Return::new(&pic)],
        ),
    ])
}

/// 00:1f.0, its PCI line routes, and the fixed devices behind it.
fn isa_bridge() -> Raw {
    let fields = |names: &[&str]| {
        names
            .iter()
            .map(|n| {
                let mut name = [b'_'; 4];
                name.iter_mut().zip(n.bytes()).for_each(|(to, from)| *to = from);
                FieldEntry::Named(name, 8)
            })
            .collect::<Vec<_>>()
    };
    let (low, high) = ROUTES.split_at(4);
    let mut entries = fields(low);
    entries.push(FieldEntry::Reserved(32));
    entries.extend(fields(high));
    let region = OpRegion::new("PIRQ".into(), OpRegionSpace::PCIConfig, &0x60u8, &0x0cu8);
    let field = Field::new(
        "PIRQ".into(),
        FieldAccessType::Byte,
        FieldLockRule::NoLock,
        FieldUpdateRule::Preserve,
        entries,
    );
    let edge = |irq| Interrupt::new(true, true, false, false, irq);
    raw_device(
        "ISA_",
        &[
            &Name::new("_ADR".into(), &0x001f_0000u32),
            &region,
            &field,
            &fixed("RTC_", "PNP0B00", &[&IO::new(0x70, 0x70, 1, 2), &edge(8)]),
            &fixed("KBD_", "PNP0303", &[&IO::new(0x60, 0x60, 1, 1), &IO::new(0x64, 0x64, 1, 1), &edge(1)]),
            &fixed("MOU_", "PNP0F13", &[&edge(12)]),
            &fixed("COM1", "PNP0501", &[&IO::new(0x3f8, 0x3f8, 1, 8), &edge(4)]),
        ],
    )
}

/// A device with fixed resources.
fn fixed(name: &str, hid: &str, resources: &[&dyn Aml]) -> Raw {
    raw_device(
        name,
        &[
            &Name::new("_HID".into(), &EISAName::new(hid)),
            &Name::new("_UID".into(), &ONE),
            &Name::new("_STA".into(), &0x0fu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(resources.to_vec())),
        ],
    )
}

/// `LNKA` to `LNKH`, each with a unique `_UID` (older Windows merges links whose UIDs are equal).
fn links() -> Raw {
    let parts: Vec<_> = LINKS.iter().zip(ROUTES).enumerate().map(|(n, (l, r))| link(n as u8, l, r)).collect();
    Raw(parts.into_iter().flat_map(|p| p.0).collect())
}

fn link(uid: u8, name: &str, route: &str) -> Raw {
    let route = Path::new(&format!("\\_SB_.PCI0.ISA_.{route}"));
    let possible = ResourceTemplate::new(vec![&link_irqs(&LINK_IRQS) as &dyn Aml]).to_raw();
    let none = ResourceTemplate::new(vec![&link_irqs(&[0]) as &dyn Aml]).to_raw();
    let [buffer, irq] = ["BUF0", "IRQW"].map(Path::new);
    // The interrupt number is at byte 5 of the descriptor.
    let number = CreateDWordField::new(&irq, &buffer, &5u8);
    let chosen = CreateDWordField::new(&irq, &Arg(0), &5u8);
    raw_device(
        name,
        &[
            &Name::new("_HID".into(), &EISAName::new("PNP0C0F")),
            &Name::new("_UID".into(), &uid),
            &Name::new("_PRS".into(), &possible),
            &Method::new(
                "_STA".into(),
                0,
                false,
                vec![
                    &If::new(&And::new(&ZERO, &route, &0x80u8), vec![&Return::new(&0x09u8)]),
                    &Return::new(&0x0bu8),
                ],
            ),
            &Method::new("_DIS".into(), 0, false, vec![&Or::new(&route, &route, &0x80u8)]),
            &Method::new(
                "_CRS".into(),
                0,
                true,
                vec![
                    &Name::new("BUF0".into(), &none),
                    &number,
                    &If::new(&LessThan::new(&route, &0x80u8), vec![&Store::new(&irq, &route)]),
                    &Return::new(&buffer),
                ],
            ),
            &Method::new("_SRS".into(), 1, true, vec![&chosen, &Store::new(&route, &irq)]),
        ],
    )
}

trait ToRaw {
    fn to_raw(&self) -> Raw;
}

impl ToRaw for ResourceTemplate<'_> {
    fn to_raw(&self) -> Raw {
        Raw(bytes(self))
    }
}

/// The processors of the MADT, by UID.
fn processors(config: &AcpiConfig) -> Raw {
    let mut out = Vec::new();
    for uid in 0..config.apic_ids.len() {
        let name = format!("C{uid:03X}");
        let hid = Name::new("_HID".into(), &"ACPI0007");
        out.extend(raw_device(&name, &[&hid, &Name::new("_UID".into(), &(uid as u16))]).0);
    }
    Raw(out)
}

/// What the board decodes besides: the configuration window, system ports, HPET, fw_cfg.
fn boards(config: &AcpiConfig) -> Raw {
    let ecam = Memory32Fixed::new(true, config.ecam.0 as u32, config.ecam.1 as u32);
    let ports = [(0x61, 1), (0x80, 1), (0x92, 1), (0xb2, 2), (0x4d0, 2)];
    let ports = ports.map(|(at, len)| IO::new(at, at, 1, len));
    let timers = [0x20, 0xa0, 0x40].map(|at| IO::new(at, at, 1, if at == 0x40 { 4 } else { 2 }));
    let pm = IO::new(config.pm_base, config.pm_base, 1, 0x80);
    let mut resources: Vec<&dyn Aml> = vec![&ecam, &pm];
    resources.extend(ports.iter().chain(&timers).map(|io| io as &dyn Aml));
    let mut out = fixed("MBRD", "PNP0C02", &resources).0;
    if let Some(hpet) = config.hpet {
        let window = Memory32Fixed::new(false, hpet as u32, 0x400);
        out.extend(fixed("HPET", "PNP0103", &[&window]).0);
    }
    if config.fw_cfg {
        let parts: [&dyn Aml; 3] = [
            &Name::new("_HID".into(), &"QEMU0002"),
            &Name::new("_STA".into(), &0x0bu8),
            &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&IO::new(0x510, 0x510, 1, 12)])),
        ];
        out.extend(raw_device("FWCF", &parts).0);
    }
    Raw(out)
}
