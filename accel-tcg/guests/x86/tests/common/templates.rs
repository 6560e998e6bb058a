//! Every encoding of the instructions that are ours: found by decoding all opcodes with all prefixes.

use std::collections::{BTreeMap, HashMap};

use iced_x86::{Code, CpuidFeature, Decoder, DecoderOptions, EncodingKind, FlowControl, Mnemonic};

/// What stands before the opcode byte.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Head {
    /// Opcode map 0 to 3, 66/F3/F2 or 0, REX.W, and a 67 that the code needs.
    Legacy { map: u8, prefix: u8, wide: bool, address: bool },
    /// Map 1 to 3, pp, W and L.
    Vex { map: u8, pp: u8, wide: bool, long: bool },
    /// Map 1 to 3, pp, W, L'L, and b: a broadcast, or rounding or no exceptions. Masks are chosen later.
    Evex { map: u8, pp: u8, wide: bool, length: u8, b: bool },
}

/// A way to encode a code.
#[derive(Debug, Clone, Copy)]
pub struct Template {
    /// Prefixes and map.
    pub head: Head,
    /// The opcode byte.
    pub opcode: u8,
    /// ModRM has a memory operand (if there is a ModRM byte).
    pub memory: bool,
    /// The values that ModRM.reg may have, a bit each.
    pub regs: u8,
    /// The values that ModRM.rm may have.
    pub rms: u8,
}

/// All templates of 64- or 32-bit code.
pub struct Templates {
    /// 64 or 32.
    pub bits: u32,
    /// With AVX-512.
    pub wide: bool,
    /// The codes, in order.
    pub codes: Vec<Code>,
    by_code: HashMap<Code, Vec<Template>>,
}

impl Templates {
    /// Finds them, and those of AVX-512 too if `wide`.
    pub fn new(bits: u32, wide_too: bool) -> Self {
        let mut found: Found = BTreeMap::new();
        let scan = |bits: u32, head: Head, found: &mut Found| scan((bits, wide_too), head, found);
        for prefix in [0, 0x66, 0xf3, 0xf2] {
            for wide in [false, true] {
                if wide && bits == 32 {
                    continue;
                }
                for map in 0..4 {
                    let head = Head::Legacy { map, prefix, wide, address: false };
                    scan(bits, head, &mut found);
                }
            }
        }
        for wide in [false, true] {
            if !wide || bits == 64 {
                scan(bits, Head::Legacy { map: 0, prefix: 0, wide, address: true }, &mut found);
            }
        }
        for bits4 in 0..48 {
            let head =
                Head::Vex { map: 1 + bits4 / 16, pp: bits4 & 3, wide: bits4 & 4 != 0, long: bits4 & 8 != 0 };
            scan(bits, head, &mut found);
        }
        for n in 0..if wide_too { 144 } else { 0 } {
            let (pp, wide, b) = (n & 3, n & 4 != 0, n & 8 != 0);
            scan(bits, Head::Evex { map: 1 + n / 48, pp, wide, length: n / 16 % 3, b }, &mut found);
        }
        let mut by_code: HashMap<Code, Vec<Template>> = HashMap::new();
        for ((code, head, opcode, memory), (regs, rms)) in found {
            by_code.entry(code).or_default().push(Template { head, opcode, memory, regs, rms });
        }
        if let Ok(only) = std::env::var("HOLDFAST_FUZZ_ONLY") {
            by_code.retain(|code, _| only.split(',').any(|group| in_group(*code, group)));
        }
        let mut codes: Vec<Code> = by_code.keys().copied().collect();
        codes.sort_unstable();
        Self { bits, wide: wide_too, codes, by_code }
    }

    /// Leaves out all but what is `wanted`.
    pub fn retain(&mut self, wanted: impl Fn(Code) -> bool) {
        self.codes.retain(|c| wanted(*c));
    }

    /// The encodings of `code`.
    pub fn of(&self, code: Code) -> &[Template] {
        self.by_code.get(&code).map_or(&[], Vec::as_slice)
    }
}

/// Groups that a run can be limited to: `int`, `x87`, `mmx`, `vec`, or a part of the code's name.
fn in_group(code: Code, group: &str) -> bool {
    let named = |part: &[&str]| {
        code.cpuid_features().iter().any(|f| {
            let name = format!("{f:?}");
            part.iter().any(|p| name.starts_with(p))
        })
    };
    let x87 = named(&["FPU"]);
    let mmx =
        format!("{code:?}").contains("mm_") && !format!("{code:?}").contains("mm_mm_") && named(&["MMX"]);
    let vec = named(&["SSE", "SSSE", "AVX", "FMA", "F16C", "AES", "SHA", "PCLMUL"]);
    match group {
        "int" => !x87 && !vec && !named(&["MMX", "FXSR"]),
        "x87" => x87,
        "mmx" => mmx || named(&["MMX"]),
        "vec" => vec,
        part => format!("{code:?}").contains(part),
    }
}

/// The bytes before ModRM, for registers 0 to 7 and no operand in VEX.vvvv.
pub fn head_bytes(bits: u32, head: Head, opcode: u8) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(8);
    match head {
        Head::Legacy { map, prefix, wide, address } => {
            if address {
                bytes.push(0x67);
            }
            if prefix != 0 {
                bytes.push(prefix);
            }
            if wide && bits == 64 {
                bytes.push(0x48);
            }
            bytes.extend_from_slice([&[][..], &[0x0f], &[0x0f, 0x38], &[0x0f, 0x3a]][usize::from(map & 3)]);
        }
        Head::Vex { map, pp, wide, long } => {
            let last = u8::from(wide) << 7 | 0x78 | u8::from(long) << 2 | pp;
            bytes.extend_from_slice(&[0xc4, 0xe0 | map, last]);
        }
        Head::Evex { map, pp, wide, length, b } => {
            let last = length << 5 | u8::from(b) << 4 | 8;
            bytes.extend_from_slice(&[0x62, 0xf0 | map, u8::from(wide) << 7 | 0x7c | pp, last]);
        }
    }
    bytes.push(opcode);
    bytes
}

type Found = BTreeMap<(Code, Head, u8, bool), (u8, u8)>;

fn scan((bits, wide): (u32, bool), head: Head, found: &mut Found) {
    let evex = matches!(head, Head::Evex { .. });
    for opcode in 0..=255u8 {
        if !is_opcode(bits, head, opcode) {
            continue;
        }
        // Most there are not.
        let some = |mask| {
            (0..16u8)
                .any(|n| decode(bits, head, opcode, (((n & 1) * 0xc4) | ((n >> 1) << 3) | 4, mask)).is_some())
        };
        if evex && !some(0) && !some(1) {
            continue;
        }
        for modrm in 0..=255u8 {
            // A displacement changes nothing.
            if (0x40..0xc0).contains(&modrm) {
                continue;
            }
            for mask in 0..=u8::from(evex) {
                let Some(code) = decode(bits, head, opcode, (modrm, mask)) else { continue };
                if !wanted(code, wide) || code.op_code_is_prefix_only(bits, head) {
                    continue;
                }
                let entry = found.entry((code, head, opcode, modrm < 0xc0)).or_insert((0, 0));
                entry.0 |= 1 << (modrm >> 3 & 7);
                entry.1 |= 1 << (modrm & 7);
            }
        }
    }
}

/// What an opcode is with a ModRM byte and, with an EVEX prefix, a mask.
fn decode(bits: u32, head: Head, opcode: u8, (modrm, mask): (u8, u8)) -> Option<Code> {
    let mut bytes = head_bytes(bits, head, opcode);
    if let Some(last) = bytes.get_mut(3).filter(|_| mask != 0) {
        *last |= mask;
    }
    bytes.push(modrm);
    bytes.extend_from_slice(&[0x20, 0, 0, 0, 0, 0, 0, 0, 0]);
    let insn = Decoder::with_ip(bits, &bytes, 0x1000, DecoderOptions::NONE).decode();
    (!insn.is_invalid()).then_some(insn.code())
}

/// False for prefixes and escapes.
fn is_opcode(bits: u32, head: Head, opcode: u8) -> bool {
    let Head::Legacy { map, address, .. } = head else { return true };
    match map {
        // 67 changes the code of JCXZ and LOOP only.
        0 if address => (0xe0..=0xe3).contains(&opcode),
        0 => {
            !(matches!(opcode, 0x0f | 0x26 | 0x2e | 0x36 | 0x3e | 0x64..=0x67 | 0xf0 | 0xf2 | 0xf3)
                || bits == 64 && (0x40..0x50).contains(&opcode)
                || matches!(opcode, 0xc4 | 0xc5))
        }
        1 => !matches!(opcode, 0x38 | 0x3a | 0x0f),
        _ => true,
    }
}

trait Redundant {
    /// F2 or F3 that mean nothing.
    fn op_code_is_prefix_only(self, bits: u32, head: Head) -> bool;
}

impl Redundant for Code {
    fn op_code_is_prefix_only(self, bits: u32, head: Head) -> bool {
        // Processors disagree on VEX.W of these outside 64-bit mode.
        if bits == 32
            && matches!(head, Head::Vex { wide: true, .. } | Head::Evex { wide: true, .. })
            && matches!(
                self.mnemonic(),
                Mnemonic::Vpextrd | Mnemonic::Vpinsrd | Mnemonic::Kmovd | Mnemonic::Vmovd
            )
        {
            return true;
        }
        let Head::Legacy { map, prefix, .. } = head else { return false };
        // Processors disagree on 66 before near branches of 64-bit code.
        if bits == 64 && prefix == 0x66 && self.flow_control() != FlowControl::Next {
            return true;
        }
        map == 0 && matches!(prefix, 0xf2 | 0xf3) && !is_string(self.mnemonic()) && self != Code::Pause
    }
}

/// String instructions, which REP goes with.
pub fn is_string(mnemonic: Mnemonic) -> bool {
    use Mnemonic as M;
    matches!(
        mnemonic,
        M::Movsb
            | M::Movsw
            | M::Movsd
            | M::Movsq
            | M::Stosb
            | M::Stosw
            | M::Stosd
            | M::Stosq
            | M::Lodsb
            | M::Lodsw
            | M::Lodsd
            | M::Lodsq
            | M::Scasb
            | M::Scasw
            | M::Scasd
            | M::Scasq
            | M::Cmpsb
            | M::Cmpsw
            | M::Cmpsd
            | M::Cmpsq
    )
}

/// True if both processors have the instruction and it gives the same on both.
pub fn wanted(code: Code, wide: bool) -> bool {
    let kind = code.encoding();
    (kind == EncodingKind::Legacy || kind == EncodingKind::VEX || wide && kind == EncodingKind::EVEX)
        && code.cpuid_features().iter().all(|f| is_ours(*f) || wide && is_avx512(*f))
        && !differs(code)
}

/// Whether the host has all of AVX-512 that guests may be offered.
pub fn all_of_avx512() -> bool {
    is_x86_feature_detected!("avx512ifma")
        && is_x86_feature_detected!("avx512vbmi")
        && is_x86_feature_detected!("avx512vbmi2")
        && is_x86_feature_detected!("avx512vnni")
        && is_x86_feature_detected!("avx512bitalg")
        && is_x86_feature_detected!("avx512vpopcntdq")
        && is_x86_feature_detected!("vaes")
        && is_x86_feature_detected!("vpclmulqdq")
}

/// The same of AVX-512.
fn is_avx512(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    match feature {
        F::AVX512F | F::AVX512CD | F::AVX512BW | F::AVX512DQ | F::AVX512VL => true,
        F::AVX512_IFMA
        | F::AVX512_VBMI
        | F::AVX512_VBMI2
        | F::AVX512_VNNI
        | F::AVX512_BITALG
        | F::AVX512_VPOPCNTDQ => all_of_avx512(),
        _ => false,
    }
}

/// Features that translation offers and the host has.
fn is_ours(feature: CpuidFeature) -> bool {
    use CpuidFeature as F;
    if feature == F::GFNI {
        return is_x86_feature_detected!("gfni");
    }
    matches!(
        feature,
        F::INTEL8086
            | F::INTEL8086_ONLY
            | F::INTEL186
            | F::INTEL286
            | F::INTEL286_ONLY
            | F::INTEL386
            | F::INTEL386_ONLY
            | F::INTEL486
            | F::X64
            | F::ADX
            | F::AES
            | F::AVX
            | F::AVX2
            | F::BMI1
            | F::BMI2
            | F::CLFLUSHOPT
            | F::CLFSH
            | F::CLWB
            | F::CMOV
            | F::CMPXCHG16B
            | F::CX8
            | F::F16C
            | F::FMA
            | F::FPU
            | F::FPU287
            | F::FPU387
            | F::FSGSBASE
            | F::FXSR
            | F::LZCNT
            | F::MMX
            | F::MOVBE
            | F::MULTIBYTENOP
            | F::PAUSE
            | F::PCLMULQDQ
            | F::POPCNT
            | F::PREFETCHW
            | F::SHA
            | F::SSE
            | F::SSE2
            | F::SSE3
            | F::SSE4_1
            | F::SSE4_2
            | F::SSSE3
            | F::VAES
            | F::VPCLMULQDQ
    )
}

/// Instructions whose effect is not the same everywhere, leaves the process, or is proven by the conformance suite.
fn differs(code: Code) -> bool {
    use Mnemonic as M;
    // 16-bit operands of BSWAP are undefined; memory images of the x87 unit have pointers that processors keep
    // differently.
    matches!(
        code,
        Code::Bswap_r16
            | Code::Movsxd_r16_rm16
            | Code::Mov_r32_tr
            | Code::Mov_tr_r32
            | Code::Int_imm8
            | Code::Loadall286
    ) || matches!(
        code.mnemonic(),
        M::Syscall
            | M::Sysret
            | M::Sysretq
            | M::Sysenter
            | M::Sysexit
            | M::Sysexitq
            | M::Int1
            | M::Int
            | M::Iret
            | M::Iretd
            | M::Iretq
            | M::Retf
            | M::Sgdt
            | M::Sidt
            | M::Sldt
            | M::Str
            | M::Smsw
            | M::Lar
            | M::Lsl
            | M::Verr
            | M::Verw
            | M::Lds
            | M::Les
            | M::Lfs
            | M::Lgs
            | M::Lss
            | M::Cpuid
            | M::Wrfsbase
            | M::Wrgsbase
            | M::Ud0
            | M::Ud1
            | M::Fnstenv
            | M::Fstenv
            | M::Fnsave
            | M::Fsave
            | M::Fxsave
            | M::Fxsave64
            | M::Loadall
            | M::Storeall
            | M::Reservednop
            | M::Ibts
            | M::Xbts
            | M::Umov
            | M::Rdpmc
            | M::Rsm
            | M::Vmmcall
            | M::Vmcall
    ) || is_far(code)
        || loads_segment(code)
}

/// Why a code always raises an exception in code at CPL 3 with IOPL 0, as both processors run it here; `None` if some
/// state takes it to its end. What these do at CPL 0 is the conformance suite's and the client suites' affair.
pub fn never_ends(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    match code.mnemonic() {
        M::In | M::Insb | M::Insw | M::Insd | M::Out | M::Outsb | M::Outsw | M::Outsd => {
            Some("ports are not open to CPL 3")
        }
        M::Cli | M::Sti => Some("IOPL is 0"),
        M::Hlt | M::Invd | M::Wbinvd | M::Invlpg | M::Clts | M::Swapgs => Some("for CPL 0 only"),
        M::Lgdt | M::Lidt | M::Lldt | M::Ltr | M::Lmsw => Some("loads a system register: for CPL 0 only"),
        M::Mov if moves_system_register(code) => Some("moves a control or debug register: for CPL 0 only"),
        M::Ud2 => Some("its purpose"),
        _ => None,
    }
}

fn moves_system_register(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Mov_r32_cr
            | C::Mov_r64_cr
            | C::Mov_cr_r32
            | C::Mov_cr_r64
            | C::Mov_r32_dr
            | C::Mov_r64_dr
            | C::Mov_dr_r32
            | C::Mov_dr_r64
    )
}

fn is_far(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Call_ptr1616
            | C::Call_ptr1632
            | C::Jmp_ptr1616
            | C::Jmp_ptr1632
            | C::Call_m1616
            | C::Call_m1632
            | C::Call_m1664
            | C::Jmp_m1616
            | C::Jmp_m1632
            | C::Jmp_m1664
    )
}

fn loads_segment(code: Code) -> bool {
    use Code as C;
    matches!(
        code,
        C::Mov_Sreg_rm16
            | C::Mov_Sreg_r32m16
            | C::Mov_Sreg_r64m16
            | C::Popw_ES
            | C::Popd_ES
            | C::Popw_CS
            | C::Popw_SS
            | C::Popd_SS
            | C::Popw_DS
            | C::Popd_DS
            | C::Popw_FS
            | C::Popd_FS
            | C::Popq_FS
            | C::Popw_GS
            | C::Popd_GS
            | C::Popq_GS
    )
}
