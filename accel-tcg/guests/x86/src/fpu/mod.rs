//! The vector and x87 units: what translated code leaves to Rust, and what they offer.

pub(crate) mod area;
mod evex;
mod masked;
pub(crate) mod simd;
pub(crate) mod x87;
mod x87_env;
mod x87_native;

use std::sync::LazyLock;

use holdfast_tcg_ir::{Effects, HelperId, HelperTable, Type};
use holdfast_tcg_runtime::{AccessKind, Cpu, Fault, faulting_helper, plain_helper};

use crate::flags::rflags;
use crate::state::X86;
use crate::system::fault;
use crate::system::regs::{cr0, vector};

pub use simd::{mxcsr, set_mxcsr};

/// Vector extensions of the host's processor that guests may use: their instructions are run by it.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs, reason = "the names are CPUID's")]
pub struct HostVector {
    pub sse3: bool,
    pub ssse3: bool,
    pub sse41: bool,
    pub sse42: bool,
    pub aes: bool,
    pub pclmulqdq: bool,
    pub sha: bool,
    pub avx: bool,
    pub avx2: bool,
    pub fma: bool,
    pub f16c: bool,
    pub gfni: bool,
    /// F, CD, BW, DQ and VL: what every processor has that kernels and libraries look for. Without one of them there is
    /// no AVX-512.
    pub avx512: bool,
    pub avx512ifma: bool,
    pub avx512vbmi: bool,
    pub avx512vbmi2: bool,
    pub avx512vnni: bool,
    pub avx512bitalg: bool,
    pub avx512vpopcntdq: bool,
    /// On more than 128 bits at once: elsewhere they are done half by half.
    pub vaes: bool,
    pub vpclmulqdq: bool,
}

static HOST: LazyLock<HostVector> = LazyLock::new(|| {
    let avx = is_x86_feature_detected!("avx");
    let avx512 = avx
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl");
    HostVector {
        sse3: is_x86_feature_detected!("sse3"),
        ssse3: is_x86_feature_detected!("ssse3"),
        sse41: is_x86_feature_detected!("sse4.1"),
        sse42: is_x86_feature_detected!("sse4.2"),
        aes: is_x86_feature_detected!("aes"),
        pclmulqdq: is_x86_feature_detected!("pclmulqdq"),
        sha: is_x86_feature_detected!("sha"),
        avx,
        avx2: avx && is_x86_feature_detected!("avx2"),
        fma: avx && is_x86_feature_detected!("fma"),
        f16c: avx && is_x86_feature_detected!("f16c"),
        gfni: is_x86_feature_detected!("gfni"),
        avx512,
        avx512ifma: avx512 && is_x86_feature_detected!("avx512ifma"),
        avx512vbmi: avx512 && is_x86_feature_detected!("avx512vbmi"),
        avx512vbmi2: avx512 && is_x86_feature_detected!("avx512vbmi2"),
        avx512vnni: avx512 && is_x86_feature_detected!("avx512vnni"),
        avx512bitalg: avx512 && is_x86_feature_detected!("avx512bitalg"),
        vaes: avx512 && is_x86_feature_detected!("vaes"),
        vpclmulqdq: avx512 && is_x86_feature_detected!("vpclmulqdq"),
        avx512vpopcntdq: avx512 && is_x86_feature_detected!("avx512vpopcntdq"),
    }
});

/// What this host has.
pub fn host() -> &'static HostVector {
    &HOST
}

/// CPUID bits of the extensions whose instructions the host runs for the guest.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OfferedFeatures {
    /// Leaf 1, ECX.
    pub leaf1_ecx: u32,
    /// Leaf 7, EBX.
    pub leaf7_ebx: u32,
    /// Leaf 7, ECX: GFNI; VAES and VPCLMULQDQ, which are done half by half.
    pub leaf7_ecx: u32,
}

/// What may be offered on this host.
pub fn offered_features() -> OfferedFeatures {
    let h = host();
    let bit = |on: bool, n: u32| u32::from(on) << n;
    OfferedFeatures {
        leaf1_ecx: bit(h.sse3, 0)
            | bit(h.pclmulqdq, 1)
            | bit(h.ssse3, 9)
            | bit(h.fma, 12)
            | bit(h.sse41, 19)
            | bit(h.sse42, 20)
            | bit(h.aes, 25)
            | bit(h.avx, 28)
            | bit(h.f16c, 29),
        leaf7_ebx: bit(h.avx2, 5) | bit(h.sha, 29),
        leaf7_ecx: bit(h.gfni, 8) | bit(h.avx && h.aes, 9) | bit(h.avx && h.pclmulqdq, 10),
    }
}

/// The helpers' names in the IR.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    /// Before an instruction that may raise unmasked SIMD exceptions.
    pub simd_begin: HelperId,
    /// After it: raises those found before the operation. The instruction then runs once more.
    pub simd_again: HelperId,
    /// (place, lanes): after that, of a conversion to half precision.
    pub simd_halves: HelperId,
    /// After that: raises the others.
    pub simd_check: HelperId,
    /// (value): loads MXCSR.
    pub ldmxcsr: HelperId,
    /// MXCSR.
    pub stmxcsr: HelperId,
    /// (address, data register | mask register << 8)
    pub maskmovdqu: HelperId,
    /// (address, mask, data): MMX.
    pub maskmovq: HelperId,
    /// (offset, [`masked::How`])
    pub mask_store: HelperId,
    /// (offset, [`masked::How`])
    pub mask_load: HelperId,
    /// (address, register): stores a YMM register.
    pub store_wide: HelperId,
    /// (base address, how)
    pub gather: HelperId,
    /// (offset, [`evex::How`], mask): loads AVX-512's memory operand.
    pub evex_load: HelperId,
    /// The same: stores it.
    pub evex_store: HelperId,
    /// (base address, how): AVX-512's gathers and scatters.
    pub evex_gather: HelperId,
    /// (opcode, address, offset, flags): an x87 instruction; gives the status flags after it.
    pub x87: HelperId,
    /// (what, address, offset): a control instruction; gives what goes to AX.
    pub x87_control: HelperId,
    /// (kind, address): FXSAVE and its kin.
    pub area: HelperId,
}

/// Adds the helpers to the table.
pub(crate) fn register(t: &mut HelperTable) -> Ids {
    let writes = Effects::WRITES_SLOTS | Effects::READS_SLOTS | Effects::MAY_FLUSH;
    let fp = Effects::USES_FP;
    Ids {
        simd_begin: t.plain("simd_begin", simd_begin, Type::Void, 0, fp),
        simd_again: t.faulting("simd_again", simd_again, Type::Void, 0, fp),
        simd_halves: t.plain("simd_halves", simd_halves, Type::Void, 2, fp | Effects::READS_SLOTS),
        simd_check: t.faulting("simd_check", simd_check, Type::Void, 0, fp),
        ldmxcsr: t.faulting("ldmxcsr", ldmxcsr, Type::Void, 1, fp | writes),
        stmxcsr: t.plain("stmxcsr", stmxcsr, Type::I64, 0, fp),
        maskmovdqu: t.faulting("maskmovdqu", maskmovdqu, Type::Void, 2, writes),
        maskmovq: t.faulting("maskmovq", maskmovq, Type::Void, 3, writes),
        mask_store: t.faulting("mask_store", mask_store, Type::Void, 2, writes),
        mask_load: t.faulting("mask_load", mask_load, Type::Void, 2, writes),
        store_wide: t.faulting("store_wide", store_wide, Type::Void, 2, writes),
        gather: t.faulting("gather", gather, Type::Void, 2, writes),
        evex_load: t.faulting("evex_load", evex_load, Type::Void, 3, writes),
        evex_store: t.faulting("evex_store", evex_store, Type::Void, 3, writes),
        evex_gather: t.faulting("evex_gather", evex_gather, Type::Void, 2, writes),
        x87: t.faulting("x87", x87_run, Type::I64, 4, writes),
        x87_control: t.faulting("x87_control", x87_control, Type::I64, 3, writes),
        area: t.faulting("area", save_area, Type::Void, 2, writes | fp),
    }
}

plain_helper!(simd_begin, simd::begin);
faulting_helper!(simd_again, simd::again);
plain_helper!(simd_halves, simd::halves);
faulting_helper!(simd_check, simd::check);
faulting_helper!(ldmxcsr, simd::ldmxcsr);
plain_helper!(stmxcsr, simd::stmxcsr);
faulting_helper!(maskmovdqu, masked::maskmovdqu);
faulting_helper!(maskmovq, masked::maskmovq);
faulting_helper!(mask_store, masked::store);
faulting_helper!(mask_load, masked::load);
faulting_helper!(store_wide, masked::store_wide);
faulting_helper!(gather, masked::gather);
faulting_helper!(evex_load, evex::load);
faulting_helper!(evex_store, evex::store);
faulting_helper!(evex_gather, evex::gather);
faulting_helper!(x87_run, x87::run);
faulting_helper!(x87_control, x87::control);
faulting_helper!(save_area, area::run);

/// Raises the fault that a store of `len` bytes (over two pages at most) would raise, before anything is changed.
fn probe(cpu: &mut Cpu<'_>, va: u64, len: u64) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    cpu.host_range(va, 1, AccessKind::Write, idx)?;
    let last = va.wrapping_add(len - 1);
    if (va ^ last) & !0xfff != 0 {
        cpu.host_range(last & !0xfff, 1, AccessKind::Write, idx)?;
    }
    Ok(())
}

/// Raises the fault that an access to the byte at `va` would raise.
fn touch(cpu: &mut Cpu<'_>, va: u64, kind: AccessKind) -> Result<(), Fault> {
    let s = cpu.state::<X86>();
    let (idx, va) = (s.data_idx(), if s.code64() { va } else { va & 0xffff_ffff });
    cpu.host_range(va, 1, kind, idx).map(drop)
}

/// #AC if alignment is checked and `va` is not a multiple of `align`.
fn check_alignment(s: &X86, va: u64, align: u64) -> Result<(), Fault> {
    let on = s.cpl == 3 && s.cr0 & cr0::AM != 0 && s.flags & rflags::AC != 0;
    // That the address is not canonical comes first, at the access.
    if on && (!s.long() || s.canonical(va)) && !va.is_multiple_of(align) {
        Err(fault::coded(vector::AC, 0))
    } else {
        Ok(())
    }
}
