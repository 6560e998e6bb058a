//! What is to be known of a vector instruction beyond iced's tables.

use std::sync::{LazyLock, OnceLock};

use holdfast_tcg_ir::{VecEncoding, VecForm, VecInsn};
use iced_x86::{Code, CpuidFeature, EncodingKind, Instruction, MandatoryPrefix, Mnemonic, OpCodeTableKind};

/// How an instruction is translated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// As itself, lane by lane.
    Generic,
    /// The same, and the legacy form does not read its destination.
    Unary,
    /// A whole register moves.
    Move,
    /// By hand: see [`super::moves`] and [`super::wide`].
    Special,
}

/// An instruction's entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct Entry {
    pub kind: Kind,
    /// As [`name()`] gives it.
    pub name: &'static str,
    /// It may raise SIMD floating-point exceptions.
    pub fp: bool,
}

/// Legacy forms with two operands that only write the first.
const UNARY: &[&str] = &[
    "sqrtps",
    "sqrtpd",
    "rcpps",
    "rsqrtps",
    "cvtdq2ps",
    "cvtdq2pd",
    "cvtps2dq",
    "cvttps2dq",
    "cvtpd2dq",
    "cvttpd2dq",
    "cvtps2pd",
    "cvtpd2ps",
    "pshufd",
    "pshuflw",
    "pshufhw",
    "movddup",
    "movshdup",
    "movsldup",
    "pabsb",
    "pabsw",
    "pabsd",
    "phminposuw",
    "aesimc",
    "aeskeygenassist",
    "roundps",
    "roundpd",
    "pmovsxbw",
    "pmovsxbd",
    "pmovsxbq",
    "pmovsxwd",
    "pmovsxwq",
    "pmovsxdq",
    "pmovzxbw",
    "pmovzxbd",
    "pmovzxbq",
    "pmovzxwd",
    "pmovzxwq",
    "pmovzxdq",
];

const MOVES: &[&str] = &[
    "movaps", "movapd", "movups", "movupd", "movdqa", "movdqu", "lddqu", "movntps", "movntpd", "movntdq",
    "movntdqa",
];

/// What raises no floating-point exceptions, besides everything that begins with "p" or "mov".
const PURE: &[&str] = &[
    "and",
    "or",
    "xor",
    "shuf",
    "unpck",
    "blend",
    "insert",
    "extract",
    "aes",
    "sha",
    "broadcast",
    "test",
    "rcp",
    "rsqrt",
    "cvtdq2pd",
    "mpsadbw",
    "lddqu",
    "gf2p8",
];

/// Made once for each instruction that occurs: its name stays.
fn entry(name: String) -> Entry {
    let name: &'static str = name.leak();
    let kind = if MOVES.contains(&name) {
        Kind::Move
    } else if super::special(name) {
        Kind::Special
    } else if UNARY.contains(&name) {
        Kind::Unary
    } else {
        Kind::Generic
    };
    let pure = name.starts_with('p') || name.starts_with("mov") || PURE.iter().any(|p| name.starts_with(p));
    Entry { kind, name, fp: !pure }
}

/// Name in lower case, without the `v` of VEX forms.
fn name(m: Mnemonic, vex: bool) -> String {
    let name = format!("{m:?}").to_lowercase();
    match name.strip_prefix('v') {
        Some(rest) if vex => rest.to_owned(),
        _ => name,
    }
}

/// Of legacy and of VEX forms, by mnemonic.
static ENTRIES: LazyLock<Vec<[OnceLock<Entry>; 2]>> =
    LazyLock::new(|| Mnemonic::values().map(|_| [const { OnceLock::new() }; 2]).collect());

/// The entry of an instruction.
pub(super) fn get(code: Code) -> Option<Entry> {
    let (m, vex) = (code.mnemonic(), code.encoding() == EncodingKind::VEX);
    let entries = ENTRIES.get(m as usize)?;
    Some(*entries[usize::from(vex)].get_or_init(|| entry(name(m, vex))))
}

/// Whether an instruction belongs to the extensions that are translated by the host's own instructions and that this
/// host has.
pub(in crate::translate) fn available(code: Code) -> bool {
    if !matches!(code.encoding(), EncodingKind::Legacy | EncodingKind::VEX) {
        return false;
    }
    let host = crate::fpu::host();
    code.cpuid_features().iter().all(|f| match f {
        CpuidFeature::MMX | CpuidFeature::SSE | CpuidFeature::SSE2 => true,
        CpuidFeature::SSE3 => host.sse3,
        CpuidFeature::SSSE3 => host.ssse3,
        CpuidFeature::SSE4_1 => host.sse41,
        CpuidFeature::SSE4_2 => host.sse42,
        CpuidFeature::AES => host.aes,
        CpuidFeature::PCLMULQDQ => host.pclmulqdq,
        CpuidFeature::SHA => host.sha,
        CpuidFeature::AVX => host.avx,
        CpuidFeature::AVX2 => host.avx2,
        CpuidFeature::FMA => host.fma,
        CpuidFeature::F16C => host.f16c,
        CpuidFeature::GFNI => host.gfni,
        CpuidFeature::VAES => host.avx && host.aes,
        CpuidFeature::VPCLMULQDQ => host.avx && host.pclmulqdq,
        _ => false,
    })
}

/// Whether an instruction with an EVEX prefix belongs to the extensions that this host has and that guests may use.
pub(super) fn available_evex(code: Code) -> bool {
    let host = crate::fpu::host();
    code.cpuid_features().iter().all(|f| match f {
        CpuidFeature::AVX512F
        | CpuidFeature::AVX512CD
        | CpuidFeature::AVX512BW
        | CpuidFeature::AVX512DQ
        | CpuidFeature::AVX512VL => host.avx512,
        CpuidFeature::AVX512_IFMA => host.avx512ifma,
        CpuidFeature::AVX512_VBMI => host.avx512vbmi,
        CpuidFeature::AVX512_VBMI2 => host.avx512vbmi2,
        CpuidFeature::AVX512_VNNI => host.avx512vnni,
        CpuidFeature::AVX512_BITALG => host.avx512bitalg,
        CpuidFeature::AVX512_VPOPCNTDQ => host.avx512vpopcntdq,
        CpuidFeature::GFNI => host.gfni && host.avx512,
        CpuidFeature::VAES => host.vaes,
        CpuidFeature::VPCLMULQDQ => host.vpclmulqdq,
        _ => false,
    })
}

/// The template of an instruction in the given form, without W and immediate.
pub(super) fn template(insn: &Instruction, form: VecForm) -> VecInsn {
    let info = insn.code().op_code();
    let vex = info.encoding() == EncodingKind::VEX;
    let pp = match info.mandatory_prefix() {
        MandatoryPrefix::P66 => 1,
        MandatoryPrefix::PF3 => 2,
        MandatoryPrefix::PF2 => 3,
        _ => 0,
    };
    let map = match info.table() {
        OpCodeTableKind::T0F38 => 2,
        OpCodeTableKind::T0F3A => 3,
        _ => 1,
    };
    let legacy_only = insn.code().cpuid_features().contains(&CpuidFeature::SHA);
    // Their VEX forms, which run in place of the others, have W set.
    let affine = matches!(
        insn.mnemonic(),
        Mnemonic::Gf2p8affineqb
            | Mnemonic::Gf2p8affineinvqb
            | Mnemonic::Vgf2p8affineqb
            | Mnemonic::Vgf2p8affineinvqb
    );
    VecInsn {
        form,
        encoding: match (vex, legacy_only) {
            (true, _) => VecEncoding::Vex,
            (_, true) => VecEncoding::Legacy,
            _ => VecEncoding::Either,
        },
        pp,
        map,
        opcode: info.op_code() as u8,
        w: affine || vex && info.w() == 1 && !info.is_wig(),
        ext: if info.group_index() >= 0 { info.group_index() as u8 } else { 0 },
        imm: None,
    }
}

/// A template that is not the instruction's own.
pub(super) const fn raw(form: VecForm, pp: u8, map: u8, opcode: u8) -> VecInsn {
    VecInsn { form, encoding: VecEncoding::Either, pp, map, opcode, w: false, ext: 0, imm: None }
}

/// The immediate of an instruction on 256 bits for one of its halves (`high`).
pub(super) fn lane_imm(m: Mnemonic, imm: u8, high: bool) -> u8 {
    match m {
        Mnemonic::Vblendps | Mnemonic::Vpblendd if high => imm >> 4,
        Mnemonic::Vblendpd | Mnemonic::Vshufpd | Mnemonic::Vpermilpd if high => imm >> 2,
        Mnemonic::Vmpsadbw if high => imm >> 3,
        _ => imm,
    }
}
