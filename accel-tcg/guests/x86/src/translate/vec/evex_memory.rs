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
        let size = size.min(bytes);
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

/// Exception types E4NF, E5NF and E6NF: all of the memory operand may fault, whatever the mask is.
fn whole(insn: &Instruction) -> bool {
    use Mnemonic::*;
    match insn.mnemonic() {
        // By a count in 16 bytes of memory.
        Vpsllw | Vpslld | Vpsllq | Vpsrlw | Vpsrld | Vpsrlq | Vpsraw | Vpsrad | Vpsraq => {
            insn.op_count() == 3 && insn.op2_kind() == OpKind::Memory
        }
        m => matches!(
            m,
            Valignd
                | Valignq
                | Vdbpsadbw
                | Vextractf32x4
                | Vextractf32x8
                | Vextractf64x2
                | Vextractf64x4
                | Vextracti32x4
                | Vextracti32x8
                | Vextracti64x2
                | Vextracti64x4
                | Vinsertf32x4
                | Vinsertf32x8
                | Vinsertf64x2
                | Vinsertf64x4
                | Vinserti32x4
                | Vinserti32x8
                | Vinserti64x2
                | Vinserti64x4
                | Vmovddup
                | Vmovshdup
                | Vmovsldup
                | Vpackssdw
                | Vpacksswb
                | Vpackusdw
                | Vpackuswb
                | Vpalignr
                | Vpconflictd
                | Vpconflictq
                | Vpermb
                | Vpermd
                | Vpermi2b
                | Vpermi2d
                | Vpermi2pd
                | Vpermi2ps
                | Vpermi2q
                | Vpermi2w
                | Vpermilpd
                | Vpermilps
                | Vpermpd
                | Vpermps
                | Vpermq
                | Vpermt2b
                | Vpermt2d
                | Vpermt2pd
                | Vpermt2ps
                | Vpermt2q
                | Vpermt2w
                | Vpermw
                | Vpmaddubsw
                | Vpmaddwd
                | Vpmultishiftqb
                | Vpshufb
                | Vpshufd
                | Vpshufhw
                | Vpshuflw
                | Vpunpckhbw
                | Vpunpckhdq
                | Vpunpckhqdq
                | Vpunpckhwd
                | Vpunpcklbw
                | Vpunpckldq
                | Vpunpcklqdq
                | Vpunpcklwd
                | Vshuff32x4
                | Vshuff64x2
                | Vshufi32x4
                | Vshufi64x2
                | Vshufpd
                | Vshufps
                | Vunpckhpd
                | Vunpckhps
                | Vunpcklpd
                | Vunpcklps
        ),
    }
}

/// Moves that need their operand aligned.
pub(super) fn aligned(m: Mnemonic) -> bool {
    use Mnemonic::*;
    matches!(m, Vmovaps | Vmovapd | Vmovdqa32 | Vmovdqa64 | Vmovntps | Vmovntpd | Vmovntdq | Vmovntdqa)
}
