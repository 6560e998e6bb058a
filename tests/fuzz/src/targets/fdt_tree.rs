//! Device trees of the RISC-V machine, from plans that users can ask for, before a strict reader.

use std::collections::BTreeSet;

use arbitrary::{Arbitrary, Unstructured};
use holdfast_accel::IrqChip;
use holdfast_arch::CpuModel;
use holdfast_arch::riscv64::IsaModel;
use holdfast_machines::virt::fdt::{Chosen, build};
use holdfast_machines::virt::plan::Plan;
use holdfast_machines::{MachineRequest, Topology};

use crate::fdt::{Node, parse};

#[derive(Debug)]
struct Wish {
    harts: u8,
    more: bool,
    topology: Option<[u8; 4]>,
    pages: u64,
    timebase: u64,
    isa: u16,
    mmu: u8,
    slots: u8,
    initramfs: Option<(u32, u32)>,
    seed: u64,
    cmdline: String,
}

impl<'a> Arbitrary<'a> for Wish {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self {
            harts: u.arbitrary()?,
            more: u.arbitrary()?,
            topology: u.arbitrary()?,
            pages: u.arbitrary()?,
            timebase: u.arbitrary()?,
            isa: u.arbitrary()?,
            mmu: u.arbitrary()?,
            slots: u.arbitrary()?,
            initramfs: u.arbitrary()?,
            seed: u.arbitrary()?,
            cmdline: u.arbitrary()?,
        })
    }
}

fn request(wish: &Wish) -> MachineRequest {
    let extensions = ["zicsr", "zifencei", "zba", "zbb", "zbs", "sstc", "svinval", "x"];
    let chosen = extensions.iter().enumerate().filter(|(n, _)| wish.isa >> n & 1 != 0);
    let isa = IsaModel {
        isa: chosen.fold("rv64imafdc".into(), |isa, (_, name)| format!("{isa}_{name}")),
        mmu: ["sv39", "sv48", "sv57"][usize::from(wish.mmu % 3)].into(),
        pmp_entries: 16,
        timebase_hz: wish.timebase >> 33,
    };
    let harts = u32::from(wish.harts % 80);
    MachineRequest {
        boot_vcpus: harts,
        max_vcpus: harts + u32::from(wish.more && wish.seed & 7 == 0),
        topology: wish.topology.map(|t| {
            let [threads, cores, dies, packages] = t.map(u32::from);
            match threads % 4 {
                0 => Topology { threads, cores, dies, packages },
                n => Topology { threads: n, cores: harts / n, dies: 1, packages: 1 },
            }
        }),
        ram_size: (wish.pages >> (18 + (wish.seed & 31))).wrapping_mul(4096),
        irqchip: IrqChip::Off,
        ..MachineRequest::new(CpuModel::Riscv64(isa), 0)
    }
}

/// `reg` as address and length, by the parent's cells.
fn regions(parent: &Node, node: &Node) -> Vec<(u64, u64)> {
    let Some(reg) = node.cells("reg") else { return Vec::new() };
    let size = |name| parent.cells(name).map_or(0, |cells| cells[0] as usize);
    let (address, length) = (size("#address-cells"), size("#size-cells"));
    assert!(address > 0 && reg.len() % (address + length) == 0, "`reg` of `{}`", node.name);
    let number = |cells: &[u32]| cells.iter().fold(0u64, |n, cell| n << 32 | u64::from(*cell));
    let pair = |entry: &[u32]| (number(&entry[..address]), number(&entry[address..]));
    reg.chunks_exact(address + length).map(pair).collect()
}

fn check_addresses(parent: &Node) {
    for node in &parent.children {
        let regions = regions(parent, node);
        match (node.name.split_once('@'), regions.first()) {
            (Some((_, unit)), Some((first, _))) => assert_eq!(unit, format!("{first:x}"), "`{}`", node.name),
            // A node without registers has no unit address.
            (Some(_), None) => panic!("`{}` has no `reg`", node.name),
            (None, Some(_)) => panic!("`{}` has a `reg`", node.name),
            (None, None) => {}
        }
        check_addresses(node);
    }
}

fn check_handles(root: &Node) {
    let mut handles = BTreeSet::new();
    for node in root.all() {
        if let Some(handle) = node.cells("phandle") {
            assert!(handle[0] != 0 && handles.insert(handle[0]), "handle {} twice", handle[0]);
        }
    }
    for node in root.all() {
        for (name, stride) in [("interrupt-parent", 1), ("interrupts-extended", 2), ("cpu", 1), ("regmap", 1)] {
            let cells = node.cells(name).unwrap_or_default();
            assert_eq!(cells.len() % stride, 0, "`{name}` of `{}`", node.name);
            for handle in cells.iter().step_by(stride) {
                assert!(handles.contains(handle), "`{name}` of `{}` leads nowhere: {handle}", node.name);
            }
        }
    }
}

fn check(root: &Node, plan: &Plan, chosen: &Chosen) {
    check_addresses(root);
    check_handles(root);
    let memory = root.child("memory").expect("memory");
    assert_eq!(regions(root, memory), [(plan.ram.gpa, plan.ram.len)]);
    let cpus = root.child("cpus").expect("cpus");
    let count = cpus.children.iter().filter(|c| c.name.starts_with("cpu@")).count();
    assert_eq!(count, plan.harts as usize);
    let bootargs = root.child("chosen").expect("chosen").get("bootargs").unwrap_or(b"\0");
    assert_eq!(bootargs.strip_suffix(b"\0"), Some(chosen.bootargs.as_bytes()));
    // Nothing lies over anything else.
    let soc = root.child("soc").expect("soc");
    let mut all: Vec<_> = soc.children.iter().flat_map(|node| regions(soc, node)).collect();
    all.push((plan.ram.gpa, plan.ram.len));
    all.push((plan.pci_high.base, plan.pci_high.len));
    all.sort_unstable();
    assert!(all.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0), "{all:x?}");
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let Ok(wish) = Wish::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let Ok(plan) = Plan::new(&request(&wish)) else { return };
    let plan = Plan { virtio_slots: u32::from(wish.slots % 9), ..plan };
    let chosen = Chosen {
        bootargs: wish.cmdline,
        initramfs: wish.initramfs.map(|(a, b)| (plan.ram.gpa + u64::from(a), plan.ram.gpa + u64::from(b))),
        rng_seed: [wish.seed as u8; 32],
        kaslr_seed: wish.seed,
    };
    match build(&plan, &chosen) {
        Ok(blob) => check(&parse(&blob).expect("a tree"), &plan, &chosen),
        // The only text that comes from outside.
        Err(error) => assert!(chosen.bootargs.contains('\0'), "{error}"),
    }
}
