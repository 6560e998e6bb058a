//! CPUID: what translation offers, and the instruction (SDM volume 2, CPUID; APM volume 3, appendix E).

use holdfast_arch::x86_64::features::{self, ModelError};
use holdfast_arch::x86_64::{CpuidEntry, CpuidModel, cpuid as tables};
use holdfast_tcg_runtime::{Cpu, Fault};

use super::regs::cr4;
use super::{monitor, mpx};
use crate::apic;
use crate::fpu::{self, area};
use crate::state::X86;

/// Leaf 1 EDX: everything up to SSE2 but PSN, DS, ACPI, SS, TM and PBE.
const BASE_EDX: u32 = 0x078b_fbff;
/// Leaf 1 ECX, done by translated code or helpers: MONITOR, CX16, PCID, x2APIC, MOVBE, POPCNT, TSC deadline, XSAVE, RDRAND.
const BASE_ECX: u32 = MONITOR | 1 << 13 | 1 << 17 | 1 << 21 | 1 << 22 | 1 << 23 | 1 << 24 | 1 << 26 | 1 << 30;
/// Leaf 1 ECX: MONITOR and MWAIT, which KVM does not offer and so models do not have that are to move there.
const MONITOR: u32 = 1 << 3;
/// Leaf 1 ECX, run by the host's processor: SSE3, PCLMULQDQ, SSSE3, FMA, SSE4.1, SSE4.2, AES, AVX, F16C.
const VECTOR_ECX: u32 = 1 | 1 << 1 | 1 << 9 | 1 << 12 | 1 << 19 | 1 << 20 | 1 << 25 | 1 << 28 | 1 << 29;
/// Leaf 7 EBX: FSGSBASE, TSC_ADJUST, BMI1, SMEP, BMI2, ERMS, INVPCID, RDSEED, ADX, SMAP, CLFLUSHOPT, CLWB.
const BASE_7_EBX: u32 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 7
    | 1 << 8
    | 1 << 9
    | 1 << 10
    | 1 << 18
    | 1 << 19
    | 1 << 20
    | 1 << 23
    | 1 << 24;
/// Leaf 7 EBX: MPX, which KVM on most hosts does not offer, as [`MONITOR`].
const MPX: u32 = 1 << 14;
/// Leaf 7 EBX, run by the host's: AVX2, SHA.
const VECTOR_7_EBX: u32 = 1 << 5 | 1 << 29;
/// Leaf 7 ECX: UMIP, PKU, RDPID, PKS.
const BASE_7_ECX: u32 = 1 << 2 | 1 << 3 | 1 << 22 | 1 << 31;
/// Leaf 7 ECX, run by the host's: GFNI, VAES, VPCLMULQDQ.
const VECTOR_7_ECX: u32 = 1 << 8 | 1 << 9 | 1 << 10;
/// AVX-512 in leaf 7 EBX: F, DQ, IFMA, CD, BW, VL. All of it is given to models that name it only: the registers are
/// large, and VEX instructions have more to clear.
const AVX512_7_EBX: u32 = 1 << 16 | 1 << 17 | 1 << 21 | 1 << 28 | 1 << 30 | 1 << 31;
/// In ECX: VBMI, VBMI2, VNNI, BITALG, VPOPCNTDQ.
const AVX512_7_ECX: u32 = 1 << 1 | 1 << 6 | 1 << 11 | 1 << 12 | 1 << 14;
/// Leaf 7 ECX: five-level paging, which costs every page walk and so is given to models that name it only.
const LA57: u32 = 1 << 16;
/// Leaf 7 EDX: fast short REP MOV, and with IA32_SPEC_CTRL and IA32_ARCH_CAPABILITIES that there is nothing to
/// mitigate: see [`AMD_IMMUNE`].
const BASE_7_EDX: u32 = 1 << 4 | 1 << 26 | 1 << 29;
/// IA32_ARCH_CAPABILITIES: not vulnerable to what the SDM lists (volume 4, table 2-2), and IBRS all the time.
pub(crate) const IMMUNE: u64 = 1
    | 1 << 1
    | 1 << 3
    | 1 << 4
    | 1 << 5
    | 1 << 6
    | 1 << 8
    | 1 << 13
    | 1 << 14
    | 1 << 15
    | 1 << 20
    | 1 << 24
    | 1 << 26
    | 1 << 27
    | 1 << 62;
/// Leaf 0x80000021 EAX: no nested data breakpoints, LFENCE serializes, null selectors clear the base, automatic IBRS,
/// SRSO_NO. What guests do against speculation has no effect on translated code and much on its speed: a retpoline is a
/// jump through the translator's own cache. Isolation is the host's business, whose mitigations apply.
const AMD_IMMUNE: u32 = 1 | 1 << 2 | 1 << 6 | 1 << 8 | 1 << 29;
/// Leaf 0x80000008 EBX: SSB_NO, BTC_NO.
const AMD_IMMUNE_8: u32 = 1 << 26 | 1 << 29;
/// Leaf 0x80000001 ECX: LAHF, CR8 in 32-bit mode, LZCNT, PREFETCHW.
const EXT_ECX: u32 = 1 | 1 << 4 | 1 << 5 | 1 << 8;
/// Leaf 0x80000001 EDX, besides the copies of leaf 1: SYSCALL, NX, 1 GiB pages, RDTSCP, long mode.
const EXT_EDX: u32 = 1 << 11 | 1 << 20 | 1 << 26 | 1 << 27 | 1 << 29;
/// The bits of leaf 1 EDX that AMD's processors repeat there.
const EXT_COPIES: u32 = 0x0183_f3ff;

/// EBX of leaf 0 of AMD's processors: "Auth".
const AMD: u32 = 0x6874_7541;
/// The same of Intel's: "Genu".
const INTEL: u32 = 0x756e_6547;

/// Leaf 0xd, index 1, EAX: XSAVEOPT, XSAVEC, XGETBV with ECX 1, XSAVES.
const XSAVE_FORMS: u32 = 0xf;

#[cfg(target_arch = "x86_64")]
fn host(function: u32, index: u32) -> [u32; 4] {
    let r = std::arch::x86_64::__cpuid_count(function & 0x8000_0000, 0);
    if function > r.eax {
        return [0; 4];
    }
    let r = std::arch::x86_64::__cpuid_count(function, index);
    [r.eax, r.ebx, r.ecx, r.edx]
}

/// On other hosts vector instructions are not run: there are those of x86-64's base only.
#[cfg(not(target_arch = "x86_64"))]
fn host(function: u32, _index: u32) -> [u32; 4] {
    match function {
        0 => [0xd, 0x756e_6547, 0x6c65_746e, 0x4965_6e69],
        1 => [0x0006_0fb1, 0x800, 0, 0],
        0x8000_0008 => [0x3028, 0, 0, 0],
        _ => [0; 4],
    }
}

fn entry(function: u32, regs: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index: 0, indexed: false, regs }
}

fn sub(function: u32, index: u32, regs: [u32; 4]) -> CpuidEntry {
    CpuidEntry { function, index, indexed: true, regs }
}

/// Most bits of physical addresses: 1 TiB. Firmware lays out page tables for as much as a processor says, and
/// Debian 12's OVMF does so with 2-MiB pages: 48 bits would be more page tables than most guests have RAM.
const PHYS_BITS: u32 = 40;

/// Everything that translation offers on this host.
pub(crate) fn supported() -> Vec<CpuidEntry> {
    let [_, b0, c0, d0] = host(0, 0);
    let [a1, _, c1, _] = host(1, 0);
    let [_, b7, c7, _] = host(7, 0);
    let [a8, ..] = host(0x8000_0008, 0);
    let vectors = c1 & VECTOR_ECX;
    let avx = vectors >> 28 & 1 != 0;
    let avx512 = fpu::host().avx512;
    let (wide_ebx, wide_ecx) = if avx512 { (b7 & AVX512_7_EBX, c7 & AVX512_7_ECX) } else { (0, 0) };
    // x87, SSE, AVX, bounds, PKRU.
    let xcr0 = if avx { 7 } else { 3 } | mpx::XCR0 as u32 | 1 << 9;
    let xcr0 = if avx512 { xcr0 | area::AVX512_ONLY as u32 } else { xcr0 };
    let (standard, compact) = area::sizes(xcr0.into(), 0);
    let ecx7 = BASE_7_ECX | c7 & VECTOR_7_ECX | LA57 | wide_ecx;
    let amd = b0 == AMD;
    let mut out = vec![
        entry(0, [if amd { 0x10 } else { 0x1f }, b0, c0, d0]),
        // CLFLUSH works on 64 bytes.
        entry(1, [a1, 8 << 8, BASE_ECX | vectors, BASE_EDX]),
        entry(2, [0x0000_0001, 0, 0, 0]),
        sub(4, 0, [0x0000_0121, 0x01c0_003f, 63, 0]),
        sub(4, 1, [0x0000_0122, 0x01c0_003f, 63, 0]),
        sub(4, 2, [0x0000_0143, 0x01c0_003f, 1023, 0]),
        sub(4, 3, [0x0000_0163, 0x03c0_003f, 0x3fff, 4]),
        sub(4, 4, [0; 4]),
        // Lines of 64 bytes; interrupts end MWAIT even if masked; no C-states, so that kernels idle by HLT.
        entry(5, [64, 64, 3, 0]),
        entry(6, [4, 0, 0, 0]), // the APIC timer always runs
        sub(7, 0, [0, BASE_7_EBX | MPX | b7 & VECTOR_7_EBX | wide_ebx, ecx7, BASE_7_EDX]),
        sub(0xd, 0, [xcr0, standard, standard, 0]),
        sub(0xd, 1, [XSAVE_FORMS, compact, 0, 0]),
    ];
    let components = area::component_leaves().filter(|(n, ..)| xcr0 >> n & 1 != 0);
    out.extend(components.map(|(n, len, at)| sub(0xd, n, [len, at, 0, 0])));
    // The TSC runs at a crystal of 25 MHz times 40.
    out.push(entry(0x15, [1, 40, 25_000_000, 0]));
    out.push(entry(0x16, [1000, 1000, 25, 0]));
    out.push(entry(0x4000_0000, [0x4000_0010, 0x6466_6c48, 0x2054_6166, 0x2020_4743]));
    // The frequencies of TSC and APIC bus in kHz.
    out.push(entry(0x4000_0010, [1_000_000, 1_000_000, 0, 0]));
    extended(&mut out, a1, a8, (b0, c0, d0));
    out
}

fn extended(out: &mut Vec<CpuidEntry>, a1: u32, a8: u32, (b0, c0, d0): (u32, u32, u32)) {
    let amd = b0 == AMD;
    let top = if amd { 0x8000_0021 } else { 0x8000_0008 };
    out.push(entry(0x8000_0000, [top, b0, c0, d0]));
    let copies = if amd { BASE_EDX & EXT_COPIES } else { 0 };
    out.push(entry(0x8000_0001, [a1, 0, EXT_ECX, EXT_EDX | copies]));
    for function in 0x8000_0002..=0x8000_0004 {
        out.push(entry(function, host(function, 0)));
    }
    out.push(entry(0x8000_0005, [0x01ff_01ff, 0x01ff_01ff, 0x2008_0140, 0x2008_0140]));
    out.push(entry(0x8000_0006, [0, 0x4200_4200, 0x0200_8140, 0]));
    out.push(entry(0x8000_0007, [0, 0, 0, 1 << 8])); // the TSC is invariant
    let bits = if a8 & 0xff == 0 { PHYS_BITS } else { (a8 & 0xff).clamp(36, PHYS_BITS) };
    out.push(entry(0x8000_0008, [0x3000 | bits, if amd { AMD_IMMUNE_8 } else { 0 }, 0, 0]));
    if amd {
        out.push(entry(0x8000_001e, [0; 4]));
        // Nor to transient scheduler attacks.
        out.push(entry(0x8000_0021, [AMD_IMMUNE, 0, 1 << 1 | 1 << 2, 0]));
    }
}

/// The table of a model: what of it translation offers.
///
/// # Errors
/// [`ModelError`]: a feature was asked for by its name and is not there.
pub(crate) fn table(model: &CpuidModel) -> Result<Vec<CpuidEntry>, ModelError> {
    let supported = supported();
    let mut model = model.clone();
    if model.entries.is_empty() && model.name != "max" {
        // Everything that costs nothing to offer.
        model.entries = supported.clone();
        for e in &mut model.entries {
            match (e.function, e.index) {
                (1, _) => e.regs[2] &= !MONITOR,
                (7, 0) => {
                    e.regs[1] &= !(MPX | AVX512_7_EBX);
                    e.regs[2] &= !(LA57 | AVX512_7_ECX);
                }
                _ => {}
            }
        }
        model.entries.retain(|e| e.function != 5);
    }
    features::resolve(&supported, &model)
}

/// EAX of leaf 1: family, model and stepping.
pub(crate) fn signature(s: &X86) -> u32 {
    find(s, 1, 0).unwrap_or_default()[0]
}

fn find(s: &X86, function: u32, index: u32) -> Option<[u32; 4]> {
    let count = (s.cpuid_count as usize).min(s.cpuid.len());
    let all = s.cpuid.get(..count)?;
    all.iter().find(|e| e.function == function && (e.indexed == 0 || e.index == index)).map(|e| e.regs)
}

/// Whether the processor shows a feature: leaf, index, register (0 EAX to 3 EDX), bit.
pub(crate) fn has(s: &X86, (function, index, register, bit): (u32, u32, usize, u32)) -> bool {
    let word = find(s, function, index).and_then(|regs| regs.get(register).copied());
    word.is_some_and(|word| word >> bit & 1 != 0)
}

/// Whether the vendor is Intel.
pub(crate) fn is_intel(s: &X86) -> bool {
    find(s, 0, 0).is_some_and(|[_, vendor, ..]| vendor == INTEL)
}

/// The leaf that answers `function`: beyond the highest, the highest basic one does (as Intel's processors have it;
/// AMD's give zeros).
fn answering(s: &X86, function: u32, index: u32) -> [u32; 4] {
    if let Some(regs) = find(s, function, index) {
        return regs;
    }
    let [max, vendor, ..] = find(s, 0, 0).unwrap_or_default();
    let basic = function < 0x4000_0000;
    // An index that a leaf does not have gives zeros, and so does a leaf in range.
    if vendor == INTEL && basic && function > max { find(s, max, index).unwrap_or_default() } else { [0; 4] }
}

/// CPUID: reads EAX and ECX, sets EAX, EBX, ECX and EDX.
pub(crate) fn cpuid(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    let enabled = apic::of(cpu).is_some_and(|a| a.base() >> 11 & 1 != 0);
    let s = cpu.state::<X86>();
    let (function, index) = (s.gpr[0] as u32, s.gpr[1] as u32);
    let mut regs = answering(s, function, index);
    match function {
        1 => {
            regs[2] =
                regs[2] & !tables::OSXSAVE | if s.cr4 & cr4::OSXSAVE != 0 { tables::OSXSAVE } else { 0 };
            if !enabled {
                regs[3] &= !(1 << 9);
            }
            if !monitor::offered(s) {
                regs[2] &= !MONITOR;
            }
        }
        7 if index == 0 && s.cr4 & cr4::PKE != 0 => regs[2] |= 1 << 4,
        0xd if index == 0 && find(s, 0xd, 0).is_some() => {
            regs[1] = area::sizes(s.xcr0, 0).0;
        }
        // With XSAVEC or XSAVES.
        0xd if index == 1 && regs[0] & 0xa != 0 => regs[1] = area::sizes(s.xcr0, s.xss).1,
        _ => {}
    }
    let [a, b, c, d] = regs.map(u64::from);
    s.gpr[0] = a;
    s.gpr[3] = b;
    s.gpr[1] = c;
    s.gpr[2] = d;
    Ok(())
}
