//! CPUID features by name, and switching them in a model. Names are QEMU's.

use serde::{Deserialize, Serialize};

use super::cpuid::{self, find};
use super::{CpuidEntry, CpuidModel};

/// A feature flag: leaf, index, register (0 EAX to 3 EDX), bit.
pub type Place = (u32, u32, usize, u32);

const EAX: usize = 0;
const EBX: usize = 1;
const ECX: usize = 2;
const EDX: usize = 3;
const EXT: u32 = 0x8000_0001;

/// All features that have a name.
pub const FEATURES: &[(&str, Place)] = &[
    ("pni", (1, 0, ECX, 0)),
    ("sse3", (1, 0, ECX, 0)),
    ("pclmulqdq", (1, 0, ECX, 1)),
    ("monitor", (1, 0, ECX, 3)),
    ("ssse3", (1, 0, ECX, 9)),
    ("fma", (1, 0, ECX, 12)),
    ("cx16", (1, 0, ECX, 13)),
    ("pdcm", (1, 0, ECX, 15)),
    ("pcid", (1, 0, ECX, 17)),
    ("sse4.1", (1, 0, ECX, 19)),
    ("sse4.2", (1, 0, ECX, 20)),
    ("x2apic", (1, 0, ECX, 21)),
    ("movbe", (1, 0, ECX, 22)),
    ("popcnt", (1, 0, ECX, 23)),
    ("tsc-deadline", (1, 0, ECX, 24)),
    ("aes", (1, 0, ECX, 25)),
    ("xsave", (1, 0, ECX, 26)),
    ("avx", (1, 0, ECX, 28)),
    ("f16c", (1, 0, ECX, 29)),
    ("rdrand", (1, 0, ECX, 30)),
    ("fpu", (1, 0, EDX, 0)),
    ("vme", (1, 0, EDX, 1)),
    ("de", (1, 0, EDX, 2)),
    ("pse", (1, 0, EDX, 3)),
    ("tsc", (1, 0, EDX, 4)),
    ("msr", (1, 0, EDX, 5)),
    ("pae", (1, 0, EDX, 6)),
    ("mce", (1, 0, EDX, 7)),
    ("cx8", (1, 0, EDX, 8)),
    ("apic", (1, 0, EDX, 9)),
    ("sep", (1, 0, EDX, 11)),
    ("mtrr", (1, 0, EDX, 12)),
    ("pge", (1, 0, EDX, 13)),
    ("mca", (1, 0, EDX, 14)),
    ("cmov", (1, 0, EDX, 15)),
    ("pat", (1, 0, EDX, 16)),
    ("pse36", (1, 0, EDX, 17)),
    ("clflush", (1, 0, EDX, 19)),
    ("mmx", (1, 0, EDX, 23)),
    ("fxsr", (1, 0, EDX, 24)),
    ("sse", (1, 0, EDX, 25)),
    ("sse2", (1, 0, EDX, 26)),
    ("ss", (1, 0, EDX, 27)),
    ("arat", (6, 0, EAX, 2)),
    ("fsgsbase", (7, 0, EBX, 0)),
    ("tsc-adjust", (7, 0, EBX, 1)),
    ("bmi1", (7, 0, EBX, 3)),
    ("hle", (7, 0, EBX, 4)),
    ("avx2", (7, 0, EBX, 5)),
    ("smep", (7, 0, EBX, 7)),
    ("bmi2", (7, 0, EBX, 8)),
    ("erms", (7, 0, EBX, 9)),
    ("invpcid", (7, 0, EBX, 10)),
    ("rtm", (7, 0, EBX, 11)),
    ("mpx", (7, 0, EBX, 14)),
    ("avx512f", (7, 0, EBX, 16)),
    ("avx512dq", (7, 0, EBX, 17)),
    ("rdseed", (7, 0, EBX, 18)),
    ("adx", (7, 0, EBX, 19)),
    ("smap", (7, 0, EBX, 20)),
    ("avx512ifma", (7, 0, EBX, 21)),
    ("clflushopt", (7, 0, EBX, 23)),
    ("clwb", (7, 0, EBX, 24)),
    ("avx512cd", (7, 0, EBX, 28)),
    ("sha-ni", (7, 0, EBX, 29)),
    ("avx512bw", (7, 0, EBX, 30)),
    ("avx512vl", (7, 0, EBX, 31)),
    ("avx512vbmi", (7, 0, ECX, 1)),
    ("avx512vbmi2", (7, 0, ECX, 6)),
    ("umip", (7, 0, ECX, 2)),
    ("pku", (7, 0, ECX, 3)),
    ("gfni", (7, 0, ECX, 8)),
    ("vaes", (7, 0, ECX, 9)),
    ("vpclmulqdq", (7, 0, ECX, 10)),
    ("avx512vnni", (7, 0, ECX, 11)),
    ("avx512bitalg", (7, 0, ECX, 12)),
    ("avx512-vpopcntdq", (7, 0, ECX, 14)),
    ("la57", (7, 0, ECX, 16)),
    ("rdpid", (7, 0, ECX, 22)),
    ("pks", (7, 0, ECX, 31)),
    ("fsrm", (7, 0, EDX, 4)),
    ("avx512-vp2intersect", (7, 0, EDX, 8)),
    ("avx512-fp16", (7, 0, EDX, 23)),
    ("spec-ctrl", (7, 0, EDX, 26)),
    ("stibp", (7, 0, EDX, 27)),
    ("arch-capabilities", (7, 0, EDX, 29)),
    ("ssbd", (7, 0, EDX, 31)),
    ("avx512-bf16", (7, 1, EAX, 5)),
    ("xsaveopt", (0xd, 1, EAX, 0)),
    ("xsavec", (0xd, 1, EAX, 1)),
    ("xgetbv1", (0xd, 1, EAX, 2)),
    ("xsaves", (0xd, 1, EAX, 3)),
    ("lahf-lm", (EXT, 0, ECX, 0)),
    ("svm", (EXT, 0, ECX, 2)),
    ("cr8legacy", (EXT, 0, ECX, 4)),
    ("abm", (EXT, 0, ECX, 5)),
    ("lzcnt", (EXT, 0, ECX, 5)),
    ("sse4a", (EXT, 0, ECX, 6)),
    ("misalignsse", (EXT, 0, ECX, 7)),
    ("3dnowprefetch", (EXT, 0, ECX, 8)),
    ("syscall", (EXT, 0, EDX, 11)),
    ("nx", (EXT, 0, EDX, 20)),
    ("mmxext", (EXT, 0, EDX, 22)),
    ("fxsr-opt", (EXT, 0, EDX, 25)),
    ("pdpe1gb", (EXT, 0, EDX, 26)),
    ("rdtscp", (EXT, 0, EDX, 27)),
    ("lm", (EXT, 0, EDX, 29)),
    ("invtsc", (0x8000_0007, 0, EDX, 8)),
    ("vmx", (1, 0, ECX, 5)),
];

/// A feature that is to be there, or not to be there, whatever the model says.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Switch {
    /// Its name in [`FEATURES`].
    pub feature: String,
    /// Whether it is to be there.
    pub on: bool,
}

/// Text that describes no processor, or a processor that cannot be had.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ModelError {
    /// There is no such model.
    #[error("is `{0}`; there are {names}", names = super::models::NAMES.join(", "))]
    Unknown(String),
    /// There is no such feature.
    #[error("switches `{0}`, which is no known feature")]
    UnknownFeature(String),
    /// It is no switch.
    #[error("has `{0}`; write +FEATURE, -FEATURE, FEATURE=on, FEATURE=off or vendor=NAME")]
    Syntax(String),
    /// The vendor's name has the wrong length.
    #[error("has the vendor `{0}`; vendors are 12 characters long, such as GenuineIntel")]
    Vendor(String),
    /// A feature was asked for by its name and is not to be had.
    #[error("CPU model `{model}`: this accelerator has no `{feature}` on this host")]
    Unsupported {
        /// The model.
        model: String,
        /// The feature.
        feature: String,
    },
}

fn place(name: &str) -> Option<Place> {
    // QEMU takes underscores too.
    let name = name.replace('_', "-");
    FEATURES.iter().find(|(known, _)| *known == name).map(|(_, place)| *place)
}

/// Reads a model with switches as QEMU's `-cpu` has them: `Nehalem,+x2apic,-vme,pcid=on,vendor=GenuineIntel`.
///
/// # Errors
/// [`ModelError`].
pub fn parse(text: &str) -> Result<CpuidModel, ModelError> {
    let mut parts = text.split(',');
    let name = parts.next().unwrap_or_default();
    let mut model = super::models::named(name).ok_or_else(|| ModelError::Unknown(name.to_owned()))?;
    for part in parts {
        let syntax = || ModelError::Syntax(part.to_owned());
        let (feature, on) = match (part.strip_prefix('+'), part.strip_prefix('-'), part.split_once('=')) {
            (Some(feature), ..) => (feature, true),
            (_, Some(feature), _) => (feature, false),
            (_, _, Some(("vendor", vendor))) => {
                let bytes: [u8; 12] =
                    vendor.as_bytes().try_into().map_err(|_| ModelError::Vendor(vendor.to_owned()))?;
                model.vendor = Some(bytes);
                continue;
            }
            (_, _, Some((feature, "on"))) => (feature, true),
            (_, _, Some((feature, "off"))) => (feature, false),
            _ => return Err(syntax()),
        };
        if place(feature).is_none() {
            return Err(ModelError::UnknownFeature(feature.to_owned()));
        }
        model.switches.push(Switch { feature: feature.to_owned(), on });
    }
    Ok(model)
}

/// Makes the table of `model` of what the accelerator supports: what of the model is supported, with the switches; who
/// asks for a feature by its name gets it or an error.
///
/// # Errors
/// [`ModelError::Unsupported`], [`ModelError::UnknownFeature`].
pub fn resolve(supported: &[CpuidEntry], model: &CpuidModel) -> Result<Vec<CpuidEntry>, ModelError> {
    let mut table = cpuid::intersect(supported, &model.entries);
    for switch in &model.switches {
        let at = place(&switch.feature).ok_or_else(|| ModelError::UnknownFeature(switch.feature.clone()))?;
        set(supported, &mut table, at, switch.on).ok_or_else(|| ModelError::Unsupported {
            model: model.name.clone(),
            feature: switch.feature.clone(),
        })?;
    }
    if let Some(vendor) = model.vendor {
        let word = |at: usize| vendor.iter().skip(at).take(4).rev().fold(0, |w, b| w << 8 | u32::from(*b));
        for e in table.iter_mut().filter(|e| matches!(e.function, 0 | 0x8000_0000)) {
            let [_, b, c, d] = &mut e.regs;
            (*b, *d, *c) = (word(0), word(4), word(8));
        }
    }
    avx512_follows(&mut table);
    xsave_follows(supported, &mut table);
    monitor_follows(supported, &mut table);
    linear_bits_follow(&mut table);
    Ok(table)
}

/// Leaf 0x80000008 says how many bits linear addresses have: 57 with five-level paging. (Linux takes addresses for wrong ones
/// by it, those of its own data among them.)
fn linear_bits_follow(table: &mut [CpuidEntry]) {
    let bits = if has(table, "la57") { 57 } else { 48 };
    for e in table.iter_mut().filter(|e| e.function == 0x8000_0008 && e.regs[EAX] != 0) {
        e.regs[EAX] = e.regs[EAX] & !0xff00 | bits << 8;
    }
}

/// Switches one feature; `None`: it is not supported.
fn set(supported: &[CpuidEntry], table: &mut Vec<CpuidEntry>, at: Place, on: bool) -> Option<()> {
    let (function, index, register, bit) = at;
    let mask = 1u32 << bit;
    let have =
        find(supported, function, index).and_then(|e| e.regs.get(register)).is_some_and(|r| r & mask != 0);
    if on && !have {
        return None;
    }
    let found = table.iter_mut().find(|e| e.function == function && (!e.indexed || e.index == index));
    match found {
        Some(e) => {
            let r = e.regs.get_mut(register)?;
            *r = if on { *r | mask } else { *r & !mask };
        }
        None if on => {
            // A leaf that the model does not have: with this flag alone, and within the highest leaf.
            let template = find(supported, function, index)?;
            let mut regs = [0; 4];
            *regs.get_mut(register)? = mask;
            table.push(CpuidEntry { regs, ..*template });
            let first = function & 0x8000_0000;
            for e in table.iter_mut().filter(|e| e.function == first) {
                e.regs[EAX] = e.regs[EAX].max(function);
            }
            // Leaf 7 says itself how many of it there are.
            for e in table.iter_mut().filter(|e| (e.function, e.index, function) == (7, 0, 7)) {
                e.regs[EAX] = e.regs[EAX].max(index);
            }
        }
        None => {}
    }
    Some(())
}

fn has(table: &[CpuidEntry], name: &str) -> bool {
    let Some((function, index, register, bit)) = place(name) else { return false };
    find(table, function, index).and_then(|e| e.regs.get(register)).is_some_and(|r| r >> bit & 1 != 0)
}

/// Leaf 5, which describes MONITOR and MWAIT, is there if they are.
fn monitor_follows(supported: &[CpuidEntry], table: &mut Vec<CpuidEntry>) {
    if !has(table, "monitor") {
        table.iter_mut().filter(|e| e.function == 5).for_each(|e| e.regs = [0; 4]);
    } else if find(table, 5, 0).is_none() {
        table.extend(supported.iter().filter(|e| e.function == 5));
    }
}

/// Extensions of AVX-512 are there with its foundation only, and that with AVX only (SDM volume 1, section 15.2).
fn avx512_follows(table: &mut [CpuidEntry]) {
    if has(table, "avx512f") && has(table, "avx") && has(table, "xsave") {
        return;
    }
    let all = FEATURES.iter().filter(|(name, _)| name.starts_with("avx512"));
    for (_, (function, index, register, bit)) in all {
        for e in table.iter_mut().filter(|e| (e.function, e.index) == (*function, *index)) {
            if let Some(r) = e.regs.get_mut(*register) {
                *r &= !(1 << bit);
            }
        }
    }
}

/// Components of XCR0 are there if the features are that have them.
fn xsave_follows(supported: &[CpuidEntry], table: &mut Vec<CpuidEntry>) {
    let have = find(supported, 0xd, 0).map_or(0, |e| e.regs[EAX]);
    let owners = [("avx", 1 << 2), ("mpx", 3 << 3), ("avx512f", 7 << 5), ("pku", 1 << 9)];
    let mut components = 3;
    for (name, bits) in owners {
        if has(table, name) {
            components |= bits;
        }
    }
    let components = if has(table, "xsave") { components & have } else { 0 };
    if components != 0 && find(table, 0xd, 0).is_none() {
        table.extend(supported.iter().filter(|e| e.function == 0xd && e.index != 1));
    }
    if components != 0 {
        for e in table.iter_mut().filter(|e| e.function == 0) {
            e.regs[EAX] = e.regs[EAX].max(0xd);
        }
    }
    // Each has a leaf that says where it is.
    let there = |table: &[CpuidEntry], n: u32| table.iter().any(|e| e.function == 0xd && e.index == n);
    for n in (2..32).filter(|n| components >> n & 1 != 0) {
        if !there(table, n) {
            table.extend(supported.iter().filter(|e| e.function == 0xd && e.index == n));
        }
    }
    for e in table.iter_mut().filter(|e| e.function == 0xd) {
        match e.index {
            _ if components == 0 => e.regs = [0; 4],
            // The sizes with everything enabled are those of the highest component.
            0 => {
                e.regs[EAX] = e.regs[EAX] & !0x2ff | components & 0x2ff;
                e.regs[ECX] = area_size(supported, e.regs[EAX]);
            }
            1 => {}
            n if n < 32 && components & 1 << n == 0 => e.regs = [0; 4],
            _ => {}
        }
    }
}

/// Size of the standard XSAVE area with `components`.
pub fn area_size(supported: &[CpuidEntry], components: u32) -> u32 {
    let ends = (2..32).filter(|n| components >> n & 1 != 0).filter_map(|n| find(supported, 0xd, n));
    ends.map(|e| e.regs[EAX].saturating_add(e.regs[EBX])).max().unwrap_or(0).max(576)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(function: u32, index: u32, regs: [u32; 4]) -> CpuidEntry {
        CpuidEntry { function, index, indexed: matches!(function, 7 | 0xd), regs }
    }

    fn supported() -> Vec<CpuidEntry> {
        vec![
            entry(0, 0, [0x1f, 1, 2, 3]),
            entry(1, 0, [1, 2, 1 << 21 | 1 << 26 | 1 << 28 | 1, u32::MAX]),
            entry(7, 0, [0, 1 << 7 | 1 << 14, 1 << 3, 0]),
            entry(0xd, 0, [0x21f, 1096, 1096, 0]),
            entry(0xd, 1, [15, 0, 0, 0]),
            entry(0xd, 2, [256, 576, 0, 0]),
            entry(0xd, 3, [64, 960, 0, 0]),
            entry(0xd, 4, [64, 1024, 0, 0]),
            entry(0xd, 9, [8, 2688, 0, 0]),
            entry(0x8000_0000, 0, [0x8000_0008, 1, 2, 3]),
            entry(EXT, 0, [0, 0, 1, 1 << 29]),
        ]
    }

    fn reg(table: &[CpuidEntry], function: u32, index: u32, register: usize) -> u32 {
        find(table, function, index).map_or(0, |e| e.regs[register])
    }

    #[test]
    fn switches_are_read_as_with_qemu() {
        let model = parse("qemu64,+x2apic,-lm,smep=on,vme=off,vendor=GenuineIntel").expect("reads");
        let got: Vec<_> = model.switches.iter().map(|s| (s.feature.as_str(), s.on)).collect();
        assert_eq!(got, [("x2apic", true), ("lm", false), ("smep", true), ("vme", false)]);
        assert_eq!(model.vendor, Some(*b"GenuineIntel"));
        let text = |s| parse(s).expect_err("refused").to_string();
        assert!(text("Pentium").contains("`Pentium`; there are host"));
        assert_eq!(text("max,+flux"), "switches `flux`, which is no known feature");
        assert!(text("max,x2apic").contains("+FEATURE"));
        assert!(text("max,vendor=Intel").contains("12 characters"));
    }

    #[test]
    fn switches_change_the_table_and_what_cannot_be_had_is_refused() {
        let table =
            resolve(&supported(), &parse("qemu64,+smep,-x2apic,+pku,+xsave").expect("reads")).expect("had");
        assert_eq!(reg(&table, 1, 0, ECX) >> 21 & 1, 0);
        assert_eq!((reg(&table, 7, 0, EBX), reg(&table, 7, 0, ECX)), (1 << 7, 1 << 3));
        assert!(reg(&table, 0, 0, EAX) >= 0xd);
        assert_eq!(reg(&table, 0xd, 0, EAX), 0x203, "x87, SSE and PKRU");
        assert_eq!(reg(&table, 0xd, 0, ECX), 2696);
        let error = resolve(&supported(), &parse("max,+la57").expect("reads")).expect_err("not there");
        assert!(error.to_string().contains("no `la57`"), "{error}");
        let plain = resolve(&supported(), &parse("max").expect("reads")).expect("had");
        assert_eq!(reg(&plain, 0xd, 0, EAX), 0x21f);
        let without = resolve(&supported(), &parse("max,-mpx,-pku,-avx").expect("reads")).expect("had");
        assert_eq!((reg(&without, 0xd, 0, EAX), reg(&without, 0xd, 3, EAX)), (3, 0));
        let none = resolve(&supported(), &parse("max,-xsave").expect("reads")).expect("had");
        assert_eq!((reg(&none, 0xd, 0, EAX), reg(&none, 0xd, 1, EAX)), (0, 0));
    }

    #[test]
    fn avx_512_comes_with_its_registers_and_its_extensions_go_with_it() {
        let mut supported = supported();
        supported[2].regs = [0, 1 << 16 | 1 << 30 | 1 << 31, 1 << 1 | 1 << 11, 0];
        supported[3].regs = [0x2e7, 2696, 2696, 0];
        supported.extend([
            entry(0xd, 5, [64, 1088, 0, 0]),
            entry(0xd, 6, [512, 1152, 0, 0]),
            entry(0xd, 7, [1024, 1664, 0, 0]),
        ]);
        let resolved = |text| resolve(&supported, &parse(text).expect("reads")).expect("had");
        // A model that has none of the leaves gets them.
        let table = resolved("Skylake-Server");
        assert_eq!(reg(&table, 0xd, 0, EAX), 0xe7);
        assert_eq!([5, 6, 7].map(|n| reg(&table, 0xd, n, EBX)), [1088, 1152, 1664]);
        assert_eq!(reg(&table, 0xd, 0, ECX), 2688);
        for text in ["max,-avx512f", "max,-avx", "max,-xsave"] {
            let table = resolved(text);
            assert_eq!((reg(&table, 7, 0, EBX), reg(&table, 7, 0, ECX)), (0, 0), "{text}");
            assert_eq!(reg(&table, 0xd, 0, EAX) & 0xe0, 0, "{text}");
        }
        assert_eq!(reg(&resolved("max,-avx512bw"), 7, 0, EBX), 1 << 16 | 1 << 31);
        for name in ["avx512-bf16", "avx512-fp16", "avx512-vp2intersect"] {
            let model = parse(&format!("max,+{name}")).expect("reads");
            let error = resolve(&supported, &model).expect_err("not there").to_string();
            assert!(error.contains(&format!("no `{name}`")), "{error}");
        }
        supported.push(entry(7, 1, [1 << 5, 0, 0, 0]));
        let left = |text| reg(&resolve(&supported, &parse(text).expect("reads")).expect("had"), 7, 1, EAX);
        assert_eq!((left("max"), left("max,-avx512f")), (1 << 5, 0));
        let table = resolve(&supported, &parse("Skylake-Server,+avx512-bf16").expect("reads")).expect("had");
        assert_eq!((reg(&table, 7, 0, EAX), reg(&table, 7, 1, EAX)), (1, 1 << 5));
    }

    #[test]
    fn linear_addresses_have_as_many_bits_as_paging_has_levels() {
        let mut supported = supported();
        supported[2].regs[ECX] |= 1 << 16;
        supported.push(entry(0x8000_0008, 0, [0x3028, 0, 0, 0]));
        let bits = |text| {
            let table = resolve(&supported, &parse(text).expect("reads")).expect("had");
            reg(&table, 0x8000_0008, 0, EAX)
        };
        assert_eq!((bits("max"), bits("max,-la57"), bits("qemu64,+la57")), (0x3928, 0x3028, 0x3928));
    }

    #[test]
    fn monitor_comes_with_its_leaf() {
        let mut supported = supported();
        supported[1].regs[ECX] |= 1 << 3;
        supported.push(entry(5, 0, [64, 64, 3, 0]));
        let resolved = |text| resolve(&supported, &parse(text).expect("reads")).expect("had");
        let line = |text| reg(&resolved(text), 5, 0, EAX);
        assert_eq!(
            [line("max"), line("max,-monitor"), line("qemu64"), line("qemu64,+monitor")],
            [64, 0, 0, 64]
        );
    }

    #[test]
    fn vendors_are_shown_in_both_leaves() {
        let table = resolve(&supported(), &parse("max,vendor=AuthenticAMD").expect("reads")).expect("had");
        for function in [0, 0x8000_0000] {
            assert_eq!(reg(&table, function, 0, EBX), 0x6874_7541);
            assert_eq!(reg(&table, function, 0, EDX), 0x6974_6e65);
            assert_eq!(reg(&table, function, 0, ECX), 0x444d_4163);
        }
    }
}
