//! Which elements of a memory operand are accessed under a mask (SDM volume 1, section 15.6, and volume 2, sections 2.6.11
//! and 2.8).

use iced_x86::{Instruction, Mnemonic, OpKind, Register};

/// What a mask means for a memory operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Masked {
    /// Nothing: all of it is accessed.
    All,
    /// An element is accessed if its bit is set.
    Each,
    /// Elements are used again and again, for so many bits, and one is accessed if any of its bits is set.
    Repeated(u32),
    /// As many elements are accessed as bits are set.
    Packed,
}

/// The elements of a memory operand.
#[derive(Debug, Clone, Copy)]
pub(super) struct Elements {
    /// Which of them are accessed.
    masked: Masked,
    /// Bytes of one.
    size: u32,
    count: u32,
    /// Faults are raised as if all were accessed.
    whole: bool,
    /// Only to see whether they can be stored.
    probe: bool,
    /// The operand has to be aligned.
    aligned: bool,
}

impl Elements {
    /// Of an instruction with a memory operand.
    pub fn of(insn: &Instruction) -> Self {
        let memory = insn.memory_size();
        let code = insn.code().op_code();
        let bytes = memory.size() as u32;
        let size = if code.can_broadcast() {
            // The size of what is broadcast, which for a product of pairs or quadruples is theirs.
            if code.w() == 1 { 8 } else { 4 }
        } else {
            memory.element_size() as u32
        };
        let size = size.min(bytes).max(1);
        let whole = whole(insn);
        let masked = match insn.op_mask() {
            Register::None => Masked::All,
            _ if whole && insn.op0_kind() != OpKind::Memory => Masked::All,
            _ => masked(insn, size),
        };
        Self { masked, size, count: bytes / size, whole, probe: false, aligned: aligned(insn.mnemonic()) }
    }

    /// All of them, whatever the mask is.
    pub fn all(self) -> Self {
        Self { masked: Masked::All, ..self }
    }

    /// Only to see whether they can be stored.
    pub fn probed(self) -> Self {
        Self { probe: true, ..self }
    }

    /// The mask means nothing.
    pub fn is_all(self) -> bool {
        self.masked == Masked::All
    }

    /// As [`crate::fpu`]'s helpers take them.
    pub fn bits(self) -> i64 {
        let (kind, needed) = match self.masked {
            Masked::All => (0, 0),
            Masked::Each => (1, 0),
            Masked::Repeated(bits) => (2, bits),
            Masked::Packed => (3, 0),
        };
        i64::from(self.size.trailing_zeros())
            | i64::from(self.count) << 2
            | kind << 9
            | i64::from(needed) << 11
            | i64::from(self.probe) << 18
            | i64::from(self.whole) << 19
            | i64::from(self.aligned) << 26
    }
}

fn masked(insn: &Instruction, size: u32) -> Masked {
    use Mnemonic::*;
    let m = insn.mnemonic();
    if insn.is_broadcast() {
        return Masked::Repeated(broadcast_count(insn, size));
    }
    match m {
        Vexpandps | Vexpandpd | Vpexpandb | Vpexpandw | Vpexpandd | Vpexpandq | Vcompressps | Vcompresspd
        | Vpcompressb | Vpcompressw | Vpcompressd | Vpcompressq => Masked::Packed,
        Vpbroadcastb | Vpbroadcastw | Vpbroadcastd | Vpbroadcastq | Vbroadcastss | Vbroadcastsd
        | Vbroadcastf32x2 | Vbroadcasti32x2 | Vbroadcastf32x4 | Vbroadcasti32x4 | Vbroadcastf32x8
        | Vbroadcasti32x8 | Vbroadcastf64x2 | Vbroadcasti64x2 | Vbroadcastf64x4 | Vbroadcasti64x4 => {
            let element = match m {
                Vpbroadcastb => 1,
                Vpbroadcastw => 2,
                _ if insn.code().op_code().w() == 1 => 8,
                _ => 4,
            };
            Masked::Repeated(insn.op0_register().size() as u32 / element)
        }
        _ => Masked::Each,
    }
}

/// How many elements one is broadcast to.
fn broadcast_count(insn: &Instruction, size: u32) -> u32 {
    let name = format!("{:?}", insn.memory_size());
    let digits = name.trim_start_matches("Broadcast");
    let bits: u32 = digits.split('_').next().and_then(|d| d.parse().ok()).unwrap_or(512);
    bits / 8 / size
}

/// Instructions of exception types E4NF, E5NF and E6NF.
const WHOLE: &[Mnemonic] = &[
    Mnemonic::Valignd,
    Mnemonic::Valignq,
    Mnemonic::Vdbpsadbw,
    Mnemonic::Vextractf32x4,
    Mnemonic::Vextractf32x8,
    Mnemonic::Vextractf64x2,
    Mnemonic::Vextractf64x4,
    Mnemonic::Vextracti32x4,
    Mnemonic::Vextracti32x8,
    Mnemonic::Vextracti64x2,
    Mnemonic::Vextracti64x4,
    Mnemonic::Vgf2p8affineinvqb,
    Mnemonic::Vgf2p8affineqb,
    Mnemonic::Vinsertf32x4,
    Mnemonic::Vinsertf32x8,
    Mnemonic::Vinsertf64x2,
    Mnemonic::Vinsertf64x4,
    Mnemonic::Vinserti32x4,
    Mnemonic::Vinserti32x8,
    Mnemonic::Vinserti64x2,
    Mnemonic::Vinserti64x4,
    Mnemonic::Vmovddup,
    Mnemonic::Vmovshdup,
    Mnemonic::Vmovsldup,
    Mnemonic::Vpackssdw,
    Mnemonic::Vpacksswb,
    Mnemonic::Vpackusdw,
    Mnemonic::Vpackuswb,
    Mnemonic::Vpalignr,
    Mnemonic::Vpconflictd,
    Mnemonic::Vpconflictq,
    Mnemonic::Vpermb,
    Mnemonic::Vpermd,
    Mnemonic::Vpermi2b,
    Mnemonic::Vpermi2d,
    Mnemonic::Vpermi2pd,
    Mnemonic::Vpermi2ps,
    Mnemonic::Vpermi2q,
    Mnemonic::Vpermi2w,
    Mnemonic::Vpermilpd,
    Mnemonic::Vpermilps,
    Mnemonic::Vpermpd,
    Mnemonic::Vpermps,
    Mnemonic::Vpermq,
    Mnemonic::Vpermt2b,
    Mnemonic::Vpermt2d,
    Mnemonic::Vpermt2pd,
    Mnemonic::Vpermt2ps,
    Mnemonic::Vpermt2q,
    Mnemonic::Vpermt2w,
    Mnemonic::Vpermw,
    Mnemonic::Vpmaddubsw,
    Mnemonic::Vpmaddwd,
    Mnemonic::Vpmultishiftqb,
    Mnemonic::Vpshufb,
    Mnemonic::Vpshufd,
    Mnemonic::Vpshufhw,
    Mnemonic::Vpshuflw,
    Mnemonic::Vpunpckhbw,
    Mnemonic::Vpunpckhdq,
    Mnemonic::Vpunpckhqdq,
    Mnemonic::Vpunpckhwd,
    Mnemonic::Vpunpcklbw,
    Mnemonic::Vpunpckldq,
    Mnemonic::Vpunpcklqdq,
    Mnemonic::Vpunpcklwd,
    Mnemonic::Vshuff32x4,
    Mnemonic::Vshuff64x2,
    Mnemonic::Vshufi32x4,
    Mnemonic::Vshufi64x2,
    Mnemonic::Vshufpd,
    Mnemonic::Vshufps,
    Mnemonic::Vunpckhpd,
    Mnemonic::Vunpckhps,
    Mnemonic::Vunpcklpd,
    Mnemonic::Vunpcklps,
];

/// All of the memory operand may fault, whatever the mask is.
fn whole(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        // By a count in 16 bytes of memory.
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq => {
            insn.op_count() == 3 && insn.op2_kind() == OpKind::Memory
        }
        m => WHOLE.contains(&m),
    }
}

/// Moves that need their operand aligned.
pub(super) fn aligned(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Vmovaps | Vmovapd | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa)
}
