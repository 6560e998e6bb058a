use std::process::Command;

use super::loader::{LOADER, RSDP};
use super::*;
use vm_memory::{Bytes, GuestAddress};

fn config(cpus: u8) -> AcpiConfig {
    AcpiConfig {
        apic_ids: (0..cpus).collect(),
        pm_base: 0x600,
        ecam: (0xb000_0000, 256 << 20),
        mem32: (0xc000_0000, 0x3ec0_0000),
        mem64: (0x2_0000_0000, 1 << 35),
        ioapic: 0xfec0_0000,
        hpet: Some(0xfed0_0000),
        pirq_of: |device, pin| 4 + usize::from(device + pin) % 4,
        fw_cfg: true,
        hotplug: true,
    }
}

fn sum(bytes: &[u8]) -> u8 {
    bytes.iter().fold(0, |s, b| s.wrapping_add(*b))
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(bytes[at..at + 4].try_into().expect("4 bytes"))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().expect("8 bytes"))
}

/// The tables of a relocated set by signature, found as a guest finds them.
fn walk(rsdp: &[u8], tables: &[u8], base: u64) -> Vec<(String, Vec<u8>)> {
    assert_eq!((&rsdp[..8], sum(&rsdp[..20]), sum(rsdp)), (b"RSD PTR ".as_slice(), 0, 0));
    let table = |address: u64| {
        let at = usize::try_from(address - base).expect("offset");
        let len = u32_at(tables, at + 4) as usize;
        tables[at..at + len].to_vec()
    };
    let (rsdt, xsdt) = (table(u32_at(rsdp, 16).into()), table(u64_at(rsdp, 24)));
    let mut found = Vec::new();
    for n in 0..(xsdt.len() - 36) / 8 {
        let address = u64_at(&xsdt, 36 + 8 * n);
        assert_eq!(u64::from(u32_at(&rsdt, 36 + 4 * n)), address);
        found.push(table(address));
    }
    let fadt = found[0].clone();
    assert_eq!(u64::from(u32_at(&fadt, 40)), u64_at(&fadt, 140));
    found.push(table(u64_at(&fadt, 140)));
    found.extend([rsdt, xsdt]);
    assert_eq!(table(u32_at(&fadt, 36).into())[..4], *b"FACS");
    assert_eq!(u32_at(&fadt, 36) % 64, 0);
    assert!(found.iter().all(|t| sum(t) == 0), "checksums");
    found.into_iter().map(|t| (String::from_utf8_lossy(&t[..4]).into_owned(), t)).collect()
}

#[test]
fn a_guest_finds_every_table() {
    for base in [0xe_0040, 0x7fff_0000] {
        let (rsdp, tables) = build(&config(2)).relocated(base);
        let names: Vec<_> = walk(&rsdp, &tables, base).into_iter().map(|(name, _)| name).collect();
        assert_eq!(names, ["FACP", "APIC", "MCFG", "HPET", "DSDT", "RSDT", "XSDT"]);
    }
}

#[test]
fn the_madt_lists_the_processors_and_overrides() {
    let madt = tables::madt(&config(3));
    assert_eq!(madt[44..52], [0, 8, 0, 0, 1, 0, 0, 0]);
    assert_eq!(madt[60..68], [0, 8, 2, 2, 1, 0, 0, 0]);
    assert_eq!(madt[68], 1, "then the IOAPIC");
    assert_eq!(madt[80..90], [2, 10, 0, 0, 2, 0, 0, 0, 0, 0], "timer on input 2");
}

/// Does what firmware does with the script, and compares.
#[test]
fn the_script_gives_what_relocation_gives() {
    let linked = build(&config(2));
    let (base, rsdp_base) = (0x7ffe_0000u64, 0xf_1230u64);
    let mut files = [(RSDP, linked.rsdp.clone(), rsdp_base), (TABLES, linked.tables.clone(), base)];
    let script = linked.script();
    assert_eq!(script.len() % 128, 0);
    let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim_end_matches('\0').to_owned();
    for c in script.chunks(128) {
        let index = files.iter().position(|f| f.0 == name(&c[4..60])).expect("a known file");
        match u32_at(c, 0) {
            1 => assert!(matches!((index, c[64]), (0, 2) | (1, 1)), "zones"),
            2 => {
                let source = files.iter().find(|f| f.0 == name(&c[60..116])).expect("a known file").2;
                let (at, size) = (u32_at(c, 116) as usize, usize::from(c[120]));
                let mut value = [0; 8];
                value[..size].copy_from_slice(&files[index].1[at..at + size]);
                let value = u64::from_le_bytes(value) + source;
                files[index].1[at..at + size].copy_from_slice(&value.to_le_bytes()[..size]);
            }
            3 => {
                let (at, start, len) = (u32_at(c, 60), u32_at(c, 64), u32_at(c, 68));
                let file = &mut files[index].1;
                let s = sum(&file[start as usize..(start + len) as usize]);
                // SeaBIOS subtracts the sum, OVMF stores its negative: that is the same for 0 only.
                assert_eq!(file[at as usize], 0);
                file[at as usize] = 0u8.wrapping_sub(s);
            }
            other => panic!("command {other}"),
        }
    }
    let (rsdp, tables) = linked.relocated(base);
    assert!(files[0].1 == rsdp && files[1].1 == tables);
    assert_eq!(LOADER, "etc/table-loader");
}

#[test]
fn tables_are_placed_in_ram_or_refused() {
    use holdfast_memory::GuestMemory;
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory");
    let linked = build(&config(255));
    linked.place(&memory, 0xe_0000, 0x1_0000).expect("fits");
    let mut signature = [0; 8];
    memory.read_slice(&mut signature, GuestAddress(0xe_0000)).expect("RAM");
    assert_eq!(&signature, b"RSD PTR ");
    assert!(matches!(linked.place(&memory, 0xe_0000, 100), Err(loader::PlaceError::TooLong { .. })));
    assert!(matches!(linked.place(&memory, 3 << 20, 0x1_0000), Err(loader::PlaceError::Memory(_))));
}

/// Asks ACPICA what it thinks of the tables: they disassemble, and the DSDT compiles again without
/// errors or warnings. Nothing is checked where the compiler is not installed.
#[test]
fn acpica_agrees() {
    let Ok(probe) = Command::new("iasl").arg("-v").output() else { return };
    assert!(probe.status.success());
    let dir = tempfile::tempdir().expect("directory");
    let base = 0xe_0040;
    let (rsdp, tables) = build(&config(4)).relocated(base);
    for (name, table) in walk(&rsdp, &tables, base) {
        let file = dir.path().join(format!("{name}.aml"));
        std::fs::write(&file, table).expect("write");
        let out = Command::new("iasl").arg("-d").arg(&file).output().expect("iasl");
        let text = String::from_utf8_lossy(&out.stderr).into_owned() + &String::from_utf8_lossy(&out.stdout);
        assert!(
            out.status.success() && !text.contains("Error") && !text.contains("Warning"),
            "{name}: {text}"
        );
        let text = std::fs::read_to_string(file.with_extension("dsl")).expect("disassembly");
        assert!(!text.contains("Invalid") && !text.contains("rror"), "{name}: {text}");
        if name == "DSDT" {
            let uids = text.matches("EisaId (\"PNP0C0F\")").count();
            assert_eq!(uids, 8, "eight interrupt links");
        }
    }
    let out = Command::new("iasl").arg("-tc").arg(dir.path().join("DSDT.dsl")).output();
    let out = out.expect("iasl");
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    assert!(out.status.success() && text.contains(" 0 Errors, 0 Warnings"), "{text}");
}
