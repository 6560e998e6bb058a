//! ACPI tables and their linker script: what firmware makes of the script is what a kernel that starts
//! directly gets, and every table is where a pointer says and sums up to zero.

use std::collections::BTreeMap;
use std::sync::OnceLock;

use arbitrary::{Arbitrary, Unstructured};
use holdfast_arch::x86_64::acpi::loader::{LOADER, RSDP, TABLES};
use holdfast_arch::x86_64::acpi::{AcpiConfig, build};
use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

#[derive(Debug)]
struct Wish {
    apic_ids: Vec<u8>,
    pm_base: u16,
    buses: u8,
    hpet: bool,
    fw_cfg: bool,
    mem32: u16,
    mem64: u16,
    swizzle: bool,
    base: u16,
    room: u32,
}

impl<'a> Arbitrary<'a> for Wish {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self {
            apic_ids: u.arbitrary()?,
            pm_base: u.arbitrary()?,
            buses: u.arbitrary()?,
            hpet: u.arbitrary()?,
            fw_cfg: u.arbitrary()?,
            mem32: u.arbitrary()?,
            mem64: u.arbitrary()?,
            swizzle: u.arbitrary()?,
            base: u.arbitrary()?,
            room: u.arbitrary()?,
        })
    }
}

static RAM: OnceLock<GuestMemory> = OnceLock::new();
const RAM_SIZE: usize = 1 << 20;

fn config(wish: &Wish) -> AcpiConfig {
    AcpiConfig {
        apic_ids: wish.apic_ids.iter().copied().take(255).collect(),
        pm_base: wish.pm_base & 0x7f80,
        ecam: (0xb000_0000, (u64::from(wish.buses) + 1) << 20),
        mem32: (0xc000_0000, (u64::from(wish.mem32) + 1) << 12),
        mem64: ((u64::from(wish.mem64) + 1) << 32, 1 << 35),
        ioapic: 0xfec0_0000,
        hpet: wish.hpet.then_some(0xfed0_0000),
        pirq_of: match wish.swizzle {
            true => |device, pin| 4 + (usize::from(device) + usize::from(pin)) % 4,
            false => |_, pin| usize::from(pin) % 8,
        },
        fw_cfg: wish.fw_cfg,
        hotplug: true,
    }
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().rev().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |sum, byte| sum.wrapping_add(*byte))
}

fn name(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned()
}

/// Does what firmware does with the script (QEMU's documentation of `etc/table-loader`).
fn link(script: &[u8], files: &mut BTreeMap<String, Vec<u8>>, addresses: &BTreeMap<String, u64>) {
    assert_eq!(script.len() % 128, 0);
    let mut allocated = Vec::new();
    for command in script.chunks_exact(128) {
        let (code, file) = (number(&command[..4]), name(&command[4..60]));
        match code {
            1 => {
                let align = number(&command[60..64]);
                assert!(align.is_power_of_two() && matches!(command[64], 1 | 2) && !allocated.contains(&file));
                allocated.push(file);
            }
            2 => {
                let (target, at, size) = (name(&command[60..116]), number(&command[116..120]), command[120]);
                assert!(allocated.contains(&file) && allocated.contains(&target), "{file} to {target}");
                let range = at as usize..at as usize + usize::from(size);
                let slot = &mut files.get_mut(&file).expect("a file")[range];
                let value = number(slot) + addresses[&target];
                assert!(size == 8 || value >> 32 == 0);
                slot.copy_from_slice(&value.to_le_bytes()[..usize::from(size)]);
            }
            3 => {
                let at = |n: usize| number(&command[n..n + 4]) as usize;
                let (at, start, len) = (at(60), at(64), at(68));
                let bytes = files.get_mut(&file).expect("a file");
                let rest = sum(&bytes[start..start + len]);
                assert!((start..start + len).contains(&at));
                bytes[at] = bytes[at].wrapping_sub(rest);
            }
            _ => panic!("command {code}"),
        }
    }
}

/// Follows all pointers as a guest does.
fn walk(rsdp: &[u8], tables: &[u8], base: u64, cpus: usize) {
    assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (b"RSD PTR ".as_slice(), 0, 0));
    let table = |address: u64| {
        let at = usize::try_from(address - base).expect("an offset");
        let len = number(&tables[at + 4..at + 8]) as usize;
        assert_eq!(sum(&tables[at..at + len]), 0, "{}", name(&tables[at..at + 4]));
        &tables[at..at + len]
    };
    let (rsdt, xsdt) = (table(number(&rsdp[16..20])), table(number(&rsdp[24..32])));
    assert_eq!((rsdt.len() - 36) / 4, (xsdt.len() - 36) / 8);
    for (short, long) in rsdt[36..].chunks_exact(4).zip(xsdt[36..].chunks_exact(8)) {
        assert_eq!(number(short), number(long));
        let found = table(number(long));
        if &found[..4] == b"APIC" {
            let (mut at, mut processors) = (44, 0);
            while at < found.len() {
                assert!(found[at + 1] >= 2, "an entry of {} bytes", found[at + 1]);
                processors += usize::from(matches!(found[at], 0 | 9));
                at += usize::from(found[at + 1]);
            }
            assert_eq!((at, processors), (found.len(), cpus));
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let Ok(wish) = Wish::arbitrary_take_rest(Unstructured::new(data)) else { return };
    let config = config(&wish);
    let linked = build(&config);
    let tables = 0x7ff0_0000 - (u64::from(wish.base) << 8);
    let mut files = BTreeMap::from([
        (RSDP.to_owned(), linked.rsdp.clone()),
        (TABLES.to_owned(), linked.tables.clone()),
        (LOADER.to_owned(), Vec::new()),
    ]);
    let addresses = BTreeMap::from([(RSDP.to_owned(), 0xf_0000), (TABLES.to_owned(), tables)]);
    link(&linked.script(), &mut files, &addresses);
    let (rsdp, all) = linked.relocated(tables);
    assert!(files[RSDP] == rsdp && files[TABLES] == all, "the script does what relocation does");
    walk(&rsdp, &all, tables, config.apic_ids.len());
    let memory = RAM.get_or_init(|| GuestMemory::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("RAM"));
    let (base, room) = (u64::from(wish.base) << 4, u64::from(wish.room) >> (wish.base & 15));
    if linked.place(memory, base, room).is_ok() {
        assert!((rsdp.len() + all.len()) as u64 <= room);
        let found: u64 = memory.read_obj(GuestAddress(base)).expect("placed");
        assert_eq!(found.to_le_bytes(), *b"RSD PTR ");
    }
}
