use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};
use zerocopy::FromZeros;

use super::*;
use crate::system::regs::vector;

const P: u64 = 1;
const W: u64 = 2;
const U: u64 = 4;
const A: u64 = 1 << 5;
const D: u64 = 1 << 6;
const PS: u64 = 1 << 7;
const NX: u64 = 1 << 63;

/// A processor in long mode with four levels of tables at 0x1000 to 0x4000.
struct Rig {
    s: Box<X86>,
    memory: GuestMemory,
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 0x40_0000)]).expect("RAM");
        let mut s: Box<X86> = Box::new(X86::new_zeroed());
        s.cr0 = cr0::PG | cr0::PE | cr0::WP;
        s.cr4 = cr4::PAE | cr4::PGE;
        s.efer = efer::LMA | efer::LME | efer::NXE;
        s.cr3 = 0x1000;
        s.phys_bits = 40;
        let rig = Self { s, memory };
        rig.put(0x1000, 0x2000 | P | W | U);
        rig.put(0x2000, 0x3000 | P | W | U);
        rig.put(0x3000, 0x4000 | P | W | U);
        rig
    }

    fn put(&self, at: u64, entry: u64) {
        self.memory.write_obj(entry, GuestAddress(at)).expect("RAM");
    }

    fn entry(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).expect("RAM")
    }

    fn walk(&self, gva: u64, kind: AccessKind, mmu_idx: u8) -> Result<Translation, (u64, u32)> {
        let phys = PhysMemory::new(&self.memory);
        translate(&self.s, &phys, &Access { gva, size: 1, kind, mmu_idx })
            .map_err(|f| (f.cause, fault::code(&f).expect("an error code")))
    }
}

fn page_fault(code: u32) -> Result<(), (u64, u32)> {
    Err((u64::from(vector::PF), code))
}

use AccessKind::{Fetch, Read, Write};

#[test]
fn accessed_and_dirty_bits_are_set_as_needed() {
    let rig = Rig::new();
    rig.put(0x4000, 0x5000 | P | W | U);
    let t = rig.walk(0x123, Read, idx::USER).expect("mapped");
    assert_eq!((t.gpa, t.page_bits, t.write), (0x5123, 12, false), "a clean page is not written unnoticed");
    assert_eq!(rig.entry(0x4000) & (A | D), A);
    assert!([0x1000, 0x2000, 0x3000].iter().all(|at| rig.entry(*at) & (A | D) == A));
    assert!(rig.walk(0x123, Write, idx::USER).expect("writable").write);
    assert_eq!(rig.entry(0x4000) & (A | D), A | D);
}

#[test]
fn rights_of_all_levels_count() {
    let rig = Rig::new();
    rig.put(0x4000, 0x5000 | P | U | NX);
    rig.put(0x4008, 0x5000 | P | W);
    assert_eq!(rig.walk(0, Write, idx::USER).map(|_| ()), page_fault(7));
    assert_eq!(rig.walk(0, Write, idx::KERNEL).map(|_| ()), page_fault(3), "CR0.WP");
    assert_eq!(rig.walk(0, Fetch, idx::USER).map(|_| ()), page_fault(0x15));
    assert_eq!(rig.walk(0x1000, Read, idx::USER).map(|_| ()), page_fault(5));
    assert!(rig.walk(0x1000, Write, idx::KERNEL).is_ok());
    assert_eq!(rig.walk(0x2000, Read, idx::KERNEL).map(|_| ()), page_fault(0));
    rig.put(0x3000, 0x4000 | P | U);
    assert_eq!(rig.walk(0x1000, Write, idx::KERNEL).map(|_| ()), page_fault(3), "the level above forbids it");
}

#[test]
fn supervisors_are_kept_from_user_pages() {
    let mut rig = Rig::new();
    rig.put(0x4000, 0x5000 | P | W | U);
    assert!(rig.walk(0, Fetch, idx::KERNEL).is_ok());
    rig.s.cr4 |= cr4::SMEP | cr4::SMAP;
    assert_eq!(rig.walk(0, Fetch, idx::KERNEL).map(|_| ()), page_fault(0x11));
    assert_eq!(rig.walk(0, Read, idx::KERNEL).map(|_| ()), page_fault(1));
    assert!(rig.walk(0, Read, idx::KERNEL_AC).is_ok());
    assert!(rig.walk(0, Read, idx::USER).is_ok());
}

#[test]
fn protection_keys() {
    let mut rig = Rig::new();
    rig.put(0x4000, 0x5000 | P | W | U | 3 << 59);
    rig.s.cr4 |= cr4::PKE;
    rig.s.pkru = 2 << 6;
    assert!(rig.walk(0, Read, idx::USER).is_ok());
    assert_eq!(rig.walk(0, Write, idx::USER).map(|_| ()), page_fault(0x27));
    rig.s.pkru = 1 << 6;
    assert_eq!(rig.walk(0, Read, idx::USER).map(|_| ()), page_fault(0x25));
    assert!(rig.walk(0, Fetch, idx::USER).is_ok(), "fetches have no key");
}

#[test]
fn reserved_bits_and_large_pages() {
    let mut rig = Rig::new();
    rig.put(0x3008, 0x20_0000 | P | W | U | PS);
    let t = rig.walk(0x20_1234, Read, idx::USER).expect("mapped");
    assert_eq!((t.gpa, t.page_bits), (0x20_1234, 21));
    rig.put(0x3008, 0x20_2000 | P | W | U | PS);
    assert_eq!(rig.walk(0x20_1234, Read, idx::USER).map(|_| ()), page_fault(0xd));
    rig.put(0x4000, 0x5000 | P | 1 << 45);
    assert_eq!(rig.walk(0, Read, idx::KERNEL).map(|_| ()), page_fault(9), "beyond the address width");
    rig.s.efer &= !efer::NXE;
    rig.put(0x4000, 0x5000 | P | NX);
    assert_eq!(rig.walk(0, Read, idx::KERNEL).map(|_| ()), page_fault(9));
    assert_eq!(rig.walk(1 << 47, Read, idx::KERNEL).map(|_| ()), Err((u64::from(vector::GP), 0)));
}

#[test]
fn five_levels() {
    let mut rig = Rig::new();
    rig.s.cr4 |= cr4::LA57;
    rig.s.cr3 = 0x6000;
    rig.put(0x6000 + 8, 0x1000 | P | W | U);
    rig.put(0x4000, 0x5000 | P | W | U);
    assert_eq!(rig.walk(1 << 48, Read, idx::USER).expect("mapped").gpa, 0x5000);
    assert_eq!(rig.walk(0, Read, idx::USER).map(|_| ()), page_fault(4));
}

#[test]
fn tables_of_32_bit_entries() {
    let mut rig = Rig::new();
    rig.s.cr4 = cr4::PSE;
    rig.s.efer = 0;
    let put = |at: u64, entry: u32| rig.memory.write_obj(entry, GuestAddress(at)).expect("RAM");
    put(0x1000 + 4, 0x2000 | 7);
    put(0x2000 + 8, 0x7000 | 5);
    put(0x1000 + 8, 0x80 | 3);
    let t = rig.walk(0x40_2abc, Read, idx::USER).expect("mapped");
    assert_eq!(t.gpa, 0x7abc);
    assert_eq!(rig.walk(0x40_2abc, Write, idx::USER).map(|_| ()), page_fault(7));
    let t = rig.walk(0x80_1234, Write, idx::KERNEL).expect("4 MiB page");
    assert_eq!((t.gpa, t.page_bits), (0x1234, 22));
    assert_eq!(rig.memory.read_obj::<u32>(GuestAddress(0x1008)).expect("RAM"), 0x80 | 3 | 0x60);
}

#[test]
fn pae_has_four_registers() {
    let mut rig = Rig::new();
    rig.s.efer = 0;
    rig.put(0x1000, 0x3000 | P);
    rig.put(0x1008, 0);
    let phys = PhysMemory::new(&rig.memory);
    rig.s.pdpte = load_pdptes(&rig.s, &phys, 0x1000).expect("valid");
    rig.put(0x4000, 0x5000 | P | W | U);
    assert_eq!(rig.walk(0x10, Read, idx::USER).expect("mapped").gpa, 0x5010);
    assert_eq!(rig.walk(0x4000_0000, Read, idx::USER).map(|_| ()), page_fault(4));
    rig.put(0x1000, 0x3000 | P | W);
    assert_eq!(load_pdptes(&rig.s, &phys, 0x1000), None, "writable is reserved there");
}
