//! Named CPU models: what processors of their kind have, as far as a virtual machine can have it.
//!
//! A model is a wish: [`super::cpuid::intersect`] leaves of it what the accelerator supports.

use super::{CpuidEntry, CpuidModel};

/// The names, in the order in which they are listed for people.
pub const NAMES: [&str; 6] = ["host", "max", "qemu64", "Nehalem", "Skylake-Server", "EPYC"];

/// What tells one model from another.
struct Model {
    name: &'static str,
    /// EBX, EDX, ECX of leaf 0, as text.
    vendor: &'static [u8; 12],
    /// Leaves 0x80000002 to 0x80000004.
    brand: &'static str,
    /// EAX of leaf 1.
    signature: u32,
    /// Highest basic leaf.
    level: u32,
    /// ECX and EDX of leaf 1.
    leaf1: [u32; 2],
    /// EBX, ECX, EDX of leaf 7.
    leaf7: [u32; 3],
    /// EAX of leaf 0xd, index 0: components of XCR0.
    xcr0: u32,
    /// EAX of leaf 0xd, index 1.
    xsave: u32,
    /// ECX and EDX of leaf 0x80000001.
    extended: [u32; 2],
}

/// Leaf 1 EDX of every 64-bit processor: FPU to SSE2, without VME, PSN, DS, ACPI, SS, HTT, TM, PBE.
const BASE: u32 = 0x078b_fbfd;
/// Leaf 1 EDX: virtual-8086 mode extensions.
const VME: u32 = 1 << 1;
/// The bits of leaf 1 EDX that AMD repeats in leaf 0x80000001.
const COPIES: u32 = 0x0183_f3ff;
/// Leaf 0x80000001 EDX: SYSCALL, NX, long mode.
const LONG: u32 = 1 << 11 | 1 << 20 | 1 << 29;
/// The same with 1 GiB pages and RDTSCP.
const LONG_NEW: u32 = LONG | 1 << 26 | 1 << 27;
/// Leaf 1 ECX: SSE3, CX16, x2APIC.
const OLD_ECX: u32 = 1 | 1 << 13 | 1 << 21;
/// Leaf 1 ECX: SSSE3, SSE4.1, SSE4.2, POPCNT.
const SSE4_ECX: u32 = 1 << 9 | 1 << 19 | 1 << 20 | 1 << 23;
/// Leaf 1 ECX: PCLMULQDQ, FMA, MOVBE, AES, XSAVE, AVX, F16C, RDRAND.
const AVX_ECX: u32 = 1 << 1 | 1 << 12 | 1 << 22 | 1 << 25 | 1 << 26 | 1 << 28 | 1 << 29 | 1 << 30;
/// Leaf 7 EBX: FSGSBASE, BMI1, AVX2, SMEP, BMI2, RDSEED, ADX, SMAP, CLFLUSHOPT.
const AVX2_EBX: u32 = 1 | 1 << 3 | 1 << 5 | 1 << 7 | 1 << 8 | 1 << 18 | 1 << 19 | 1 << 20 | 1 << 23;

const MODELS: [Model; 4] = [
    Model {
        name: "qemu64",
        vendor: b"AuthenticAMD",
        brand: "QEMU Virtual CPU version 2.5+",
        signature: 0x0006_0fb1,
        level: 0xd,
        leaf1: [OLD_ECX, BASE],
        leaf7: [0; 3],
        xcr0: 0,
        xsave: 0,
        extended: [1 << 0, LONG | BASE & COPIES],
    },
    Model {
        name: "Nehalem",
        vendor: b"GenuineIntel",
        brand: "Intel Core i7 9xx (Nehalem Class Core i7)",
        signature: 0x0001_06a3,
        level: 0xb,
        leaf1: [OLD_ECX | SSE4_ECX, BASE | VME],
        leaf7: [0; 3],
        xcr0: 0,
        xsave: 0,
        extended: [1 << 0, LONG],
    },
    Model {
        name: "Skylake-Server",
        vendor: b"GenuineIntel",
        brand: "Intel Xeon Processor (Skylake)",
        signature: 0x0005_0654,
        level: 0x16,
        // With PCID and the TSC deadline.
        leaf1: [OLD_ECX | SSE4_ECX | AVX_ECX | 1 << 17 | 1 << 24, BASE | VME],
        // With ERMS, INVPCID, CLWB and AVX-512 F, DQ, CD, BW, VL; PKU.
        leaf7: [
            AVX2_EBX | 1 << 9 | 1 << 10 | 1 << 24 | 1 << 16 | 1 << 17 | 1 << 28 | 1 << 30 | 1 << 31,
            1 << 3,
            0,
        ],
        xcr0: 0x2e7,
        xsave: 7,
        extended: [1 | 1 << 5 | 1 << 8, LONG_NEW],
    },
    Model {
        name: "EPYC",
        vendor: b"AuthenticAMD",
        brand: "AMD EPYC Processor",
        signature: 0x0080_0f12,
        level: 0xd,
        leaf1: [OLD_ECX | SSE4_ECX | AVX_ECX, BASE | VME],
        leaf7: [AVX2_EBX | 1 << 29, 0, 0],
        xcr0: 7,
        xsave: 7,
        // LAHF, CR8, LZCNT, SSE4A, misaligned SSE, PREFETCHW.
        extended: [
            1 | 1 << 4 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 8,
            LONG_NEW | 1 << 22 | 1 << 25 | (BASE | VME) & COPIES,
        ],
    },
];

fn word(bytes: &[u8], at: usize) -> u32 {
    let byte = |n: usize| u32::from(bytes.get(at + n).copied().unwrap_or(0)) << (8 * n);
    byte(0) | byte(1) | byte(2) | byte(3)
}

fn entry(function: u32, regs: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index: 0, indexed: false, regs }
}

fn sub(function: u32, index: u32, regs: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index, indexed: true, regs }
}

impl Model {
    fn entries(&self) -> Vec<CpuidEntry> {
        let vendor = [word(self.vendor, 0), word(self.vendor, 8), word(self.vendor, 4)];
        let [b, c, d] = vendor;
        let [ecx1, edx1] = self.leaf1;
        let [b7, c7, d7] = self.leaf7;
        let [ecx, edx] = self.extended;
        let mut out = vec![
            entry(0, [self.level, b, c, d]),
            entry(1, [self.signature, 8 << 8, ecx1, edx1]),
            entry(6, [4, 0, 0, 0]),
            sub(7, 0, [0, b7, c7, d7]),
        ];
        if self.xcr0 != 0 {
            out.push(sub(0xd, 0, [self.xcr0, 0, 0, 0]));
            out.push(sub(0xd, 1, [self.xsave, 0, 0, 0]));
            out.push(sub(0xd, 2, [0; 4]));
        }
        out.push(entry(0x8000_0000, [0x8000_0008, b, c, d]));
        out.push(entry(0x8000_0001, [self.signature, 0, ecx, edx]));
        for (n, function) in (0..).zip(0x8000_0002..=0x8000_0004) {
            let at = n * 16;
            let text = self.brand.as_bytes();
            out.push(entry(function, [0, 4, 8, 12].map(|o| word(text, at + o))));
        }
        // 40 bits of physical, 48 of linear addresses.
        out.push(entry(0x8000_0008, [0x3028, 0, 0, 0]));
        out
    }
}

/// The model called `name`; `host` and `max` (and `Host`) are everything that the accelerator supports. `None` if
/// there is no such model.
pub fn named(name: &str) -> Option<CpuidModel> {
    if matches!(name, "host" | "Host" | "max") {
        return Some(CpuidModel { name: name.to_lowercase(), ..CpuidModel::default() });
    }
    let model = MODELS.iter().find(|m| m.name == name)?;
    Some(CpuidModel { name: name.to_owned(), entries: model.entries(), ..CpuidModel::default() })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86_64::cpuid;

    #[test]
    fn every_name_has_a_model_and_no_other_has() {
        for name in NAMES {
            let model = named(name).expect(name);
            assert_eq!(model.entries.is_empty(), matches!(name, "host" | "max"), "{name}");
        }
        assert_eq!(named("Penryn-v9"), None);
    }

    #[test]
    fn a_model_is_cut_to_what_is_supported() {
        let model = named("Skylake-Server").expect("there");
        let supported = named("Nehalem").expect("there").entries;
        let table = cpuid::intersect(&supported, &model.entries);
        let leaf = |f| table.iter().find(|e| e.function == f).expect("leaf").regs;
        assert_eq!(leaf(0)[1..], [0x756e_6547, 0x6c65_746e, 0x4965_6e69], "GenuineIntel in EBX, ECX, EDX");
        assert_eq!(leaf(1)[2], OLD_ECX | SSE4_ECX);
        assert_eq!(leaf(7), [0; 4]);
        assert_eq!(leaf(0xd), [0; 4], "no XSAVE state remains");
        assert!(!cpuid::missing(&supported, &model.entries).is_empty());
    }
}
