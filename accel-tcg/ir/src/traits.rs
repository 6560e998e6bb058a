//! What the passes ask of each instruction again and again, as a table.

use crate::op::Op;

impl Op {
    const fn effect(self) -> bool {
        match self {
            Op::Load | Op::Store | Op::AtomicRmw | Op::AtomicCas | Op::Fence | Op::Call | Op::SetSlot => true,
            Op::FAdd | Op::FSub | Op::FMul | Op::FDiv | Op::FSqrt | Op::FMulAdd | Op::FMin | Op::FMax => true,
            Op::FCmp | Op::FCvtFF | Op::FCvtToS | Op::FCvtToU | Op::FCvtFromS | Op::FCvtFromU => true,
            Op::InsnStart | Op::Label | Op::BrCond | Op::VecFp | Op::Host => true,
            _ => self.is_terminator(),
        }
    }

    const fn value_operands(self) -> u8 {
        match self {
            Op::SetSlot | Op::ExitReg => 0b010,
            Op::SetCond | Op::Store | Op::AtomicRmw | Op::BrCond => 0b011,
            Op::FAdd | Op::FSub | Op::FMul | Op::FDiv | Op::FMin | Op::FMax => 0b011,
            Op::FSgnj | Op::FSgnjn | Op::FSgnjx | Op::FCmp => 0b011,
            Op::Select | Op::AtomicCas | Op::FMulAdd | Op::Vec | Op::VecFp => 0b111,
            Op::SExt | Op::ZExt | Op::Trunc | Op::Load | Op::FSqrt | Op::FClass | Op::FCvtFF => 0b001,
            Op::FCvtToS | Op::FCvtToU | Op::FCvtFromS | Op::FCvtFromU | Op::FMoveToInt | Op::FMoveFromInt => {
                0b001
            }
            Op::FUnbox | Op::FBox | Op::GotoReg => 0b001,
            _ if self.is_int_binary() => 0b011,
            _ if self.is_int_unary() => 0b001,
            _ => 0,
        }
    }
}

/// Every operation, by rising discriminant.
const ALL: [Op; 82] = {
    use Op::*;
    [
        Nop,
        InsnStart,
        Const,
        GetSlot,
        SetSlot,
        Add,
        Sub,
        And,
        Or,
        Xor,
        Andn,
        Shl,
        ShrU,
        ShrS,
        RotL,
        RotR,
        Mul,
        MulHS,
        MulHU,
        MulHSU,
        DivS,
        DivU,
        RemS,
        RemU,
        MinS,
        MaxS,
        MinU,
        MaxU,
        Neg,
        Not,
        Clz,
        Ctz,
        Popcnt,
        Bswap,
        Ext8S,
        Ext16S,
        Ext8U,
        Ext16U,
        SExt,
        ZExt,
        Trunc,
        SetCond,
        Select,
        Load,
        Store,
        AtomicRmw,
        AtomicCas,
        Fence,
        FAdd,
        FSub,
        FMul,
        FDiv,
        FSqrt,
        FMulAdd,
        FMin,
        FMax,
        FSgnj,
        FSgnjn,
        FSgnjx,
        FCmp,
        FClass,
        FCvtFF,
        FCvtToS,
        FCvtToU,
        FCvtFromS,
        FCvtFromU,
        FMoveToInt,
        FMoveFromInt,
        FUnbox,
        FBox,
        Call,
        Vec,
        VecFp,
        Host,
        Label,
        Br,
        BrCond,
        GotoPc,
        GotoReg,
        Exit,
        ExitReg,
        ExitAsIs,
    ]
};

// None is missing.
const _: () = assert!(ALL.len() == Op::ExitAsIs as usize + 1 && ALL[ALL.len() - 1] as usize == ALL.len() - 1);

/// In [`TRAITS`]: the operands that are values.
pub(crate) const OPERANDS: u8 = 7;
/// In [`TRAITS`]: it is not to be dropped.
pub(crate) const EFFECT: u8 = 8;

/// What the passes ask of each instruction again and again, by discriminant.
pub(crate) const TRAITS: [u8; 256] = {
    let mut traits = [0; 256];
    let mut n = 0;
    while n < ALL.len() {
        let effect = if ALL[n].effect() { EFFECT } else { 0 };
        traits[ALL[n] as usize] = ALL[n].value_operands() | effect;
        n += 1;
    }
    traits
};
