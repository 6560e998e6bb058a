//! Checks that a region is well formed. Tests run it on everything; release builds of the translator do not.

use crate::helper::{Helper, HelperId, HelperTable};
use crate::op::{Inst, Op};
use crate::region::Region;
use crate::types::Type;
use crate::vec::{VecForm, VecInsn};

/// What is wrong with a region.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum VerifyError {
    /// No instructions, or the last one is no terminator.
    #[error("the region does not end with a terminator")]
    Unterminated,
    /// Instructions behind a terminator without a label.
    #[error("instruction {0} is unreachable: no label after the terminator before it")]
    Unreachable(usize),
    /// An operand is not a value, not yet defined, or of an earlier block.
    #[error("instruction {at}: operand v{val} is not a value of this block")]
    Operand {
        /// Instruction index.
        at: usize,
        /// Operand.
        val: u32,
    },
    /// Types do not fit the instruction.
    #[error("instruction {at} ({op:?}): types do not fit")]
    Types {
        /// Instruction index.
        at: usize,
        /// Its opcode.
        op: Op,
    },
    /// A label is unknown, not placed, or placed twice.
    #[error("label {0} is not placed exactly once")]
    Label(u32),
    /// A label that is jumped to backward has no guest pc.
    #[error("label {0} is the target of a backward branch and has no pc")]
    BackwardWithoutPc(u32),
    /// An access before the first guest instruction began.
    #[error("instruction {0} may fault but no guest instruction has begun")]
    NoPc(usize),
    /// No such vector instruction or host code.
    #[error("instruction {0}: no such template")]
    Template(usize),
    /// A truncation or zero extension is not in the region's list of them, or something else is.
    #[error("instruction {0} is missing in the list of casts, or does not belong there")]
    Cast(usize),
    /// Unknown helper or wrong number of arguments.
    #[error("instruction {0}: no such helper, or wrong arguments")]
    Call(usize),
}

/// Checks `r`.
pub fn verify(r: &Region, helpers: &HelperTable) -> Result<(), VerifyError> {
    if !r.insts.last().is_some_and(|i| i.op.is_terminator()) {
        return Err(VerifyError::Unterminated);
    }
    let mut block_start = 0;
    let mut has_pc = false;
    let mut placed = vec![0u32; r.labels.len()];
    let mut casts = r.casts.iter().map(|at| *at as usize).peekable();
    for (at, i) in r.insts.iter().enumerate() {
        if casts.next_if_eq(&at).is_some() != matches!(i.op, Op::Trunc | Op::ZExt) {
            return Err(VerifyError::Cast(at));
        }
        if at > 0 && r.insts[at - 1].op.is_terminator() && i.op != Op::Label {
            return Err(VerifyError::Unreachable(at));
        }
        let args = if i.op == Op::Call { check_call(r, helpers, at, i)? } else { &[] };
        for v in i.uses().chain(args.iter().copied()) {
            let ok = v.index() < at && v.index() >= block_start && defines(r.def(v));
            if !ok {
                return Err(VerifyError::Operand { at, val: v.0 });
            }
        }
        if !types_fit(r, i) {
            return Err(VerifyError::Types { at, op: i.op });
        }
        match i.op {
            Op::InsnStart => has_pc = true,
            Op::Vec | Op::VecFp if r.vec(i).is_none() => return Err(VerifyError::Template(at)),
            Op::Host if r.host(i).is_none() => return Err(VerifyError::Template(at)),
            Op::Load | Op::Store | Op::AtomicRmw | Op::AtomicCas if !has_pc => {
                return Err(VerifyError::NoPc(at));
            }
            Op::Label => {
                block_start = at;
                *placed.get_mut(i.a as usize).ok_or(VerifyError::Label(i.a))? += 1;
            }
            _ => {}
        }
    }
    for (n, l) in r.labels.iter().enumerate() {
        if placed[n] > 1 || (placed[n] == 0 && l.refs > 0) {
            return Err(VerifyError::Label(n as u32));
        }
        if l.backward && l.pc.is_none() {
            return Err(VerifyError::BackwardWithoutPc(n as u32));
        }
    }
    Ok(())
}

fn check_call<'a>(
    r: &'a Region,
    helpers: &HelperTable,
    at: usize,
    i: &Inst,
) -> Result<&'a [crate::Val], VerifyError> {
    let args = r.call_args(i);
    match helpers.get(HelperId(i.a)) {
        Some(h) if usize::from(h.args) == args.len() && args.len() <= Helper::MAX_ARGS && h.ret == i.ty => {
            if args.iter().any(|v| r.insts.get(v.index()).is_none_or(|d| d.ty == Type::V128)) {
                return Err(VerifyError::Types { at, op: i.op });
            }
            Ok(args)
        }
        _ => Err(VerifyError::Call(at)),
    }
}

/// Whether an instruction yields a value.
pub fn defines(i: &Inst) -> bool {
    i.ty != Type::Void && !matches!(i.op, Op::SetSlot | Op::Store | Op::BrCond)
}

fn types_fit(r: &Region, i: &Inst) -> bool {
    let t = |v: u32| r.insts.get(v as usize).map_or(Type::Void, |d| d.ty);
    let (a, b, c) = (t(i.a), t(i.b), t(i.c));
    let size_ok = |ty: Type| match ty {
        Type::I32 | Type::I64 => i.mem().bytes() <= ty.bytes(),
        Type::V128 => (2..=4).contains(&i.mem().log2()),
        _ => i.mem().bytes() == ty.bytes(),
    };
    match i.op {
        _ if i.op.is_int_binary() => i.ty.is_int() && a == i.ty && b == i.ty,
        _ if i.op.is_int_unary() => i.ty.is_int() && a == i.ty,
        Op::SetSlot => b == i.ty,
        Op::SExt | Op::ZExt => a == Type::I32 && i.ty == Type::I64,
        Op::Trunc => a == Type::I64 && i.ty == Type::I32,
        Op::SetCond => a.is_int() && a == b && i.ty == Type::I64,
        Op::BrCond => a.is_int() && a == b,
        Op::Select => a.is_int() && b == i.ty && c == i.ty,
        Op::Load => a == Type::I64 && size_ok(i.ty),
        Op::Store => a == Type::I64 && size_ok(b) && b == i.ty,
        Op::AtomicRmw => a == Type::I64 && b == i.ty && i.ty.is_int() && size_ok(i.ty),
        Op::AtomicCas => a == Type::I64 && b == i.ty && c == i.ty && i.ty.is_int() && size_ok(i.ty),
        Op::FAdd
        | Op::FSub
        | Op::FMul
        | Op::FDiv
        | Op::FMin
        | Op::FMax
        | Op::FSgnj
        | Op::FSgnjn
        | Op::FSgnjx => i.ty.is_float() && a == i.ty && b == i.ty,
        Op::FMulAdd => i.ty.is_float() && a == i.ty && b == i.ty && c == i.ty,
        Op::FSqrt => i.ty.is_float() && a == i.ty,
        Op::FCmp => a.is_float() && a == b && i.ty == Type::I64,
        Op::FClass => a.is_float() && i.ty == Type::I64,
        Op::FCvtFF => a.is_float() && i.ty.is_float() && a != i.ty,
        Op::FCvtToS | Op::FCvtToU => a.is_float() && i.ty.is_int(),
        Op::FCvtFromS | Op::FCvtFromU => a.is_int() && i.ty.is_float(),
        Op::FMoveToInt => a.is_float() && i.ty.is_int() && a.bytes() == i.ty.bytes(),
        Op::FMoveFromInt => a.is_int() && i.ty.is_float() && a.bytes() == i.ty.bytes(),
        Op::FUnbox => a == Type::F64 && i.ty == Type::F32,
        Op::FBox => a == Type::F32 && i.ty == Type::F64,
        Op::Vec | Op::VecFp => r.vec(i).is_some_and(|v| vec_types_fit(v, i.ty, [a, b, c])),
        Op::GotoReg => a == Type::I64,
        Op::ExitReg => b == Type::I64,
        _ => true,
    }
}

fn vec_types_fit(v: &VecInsn, ty: Type, [a, b, c]: [Type; 3]) -> bool {
    let vector = |t: Type| t == Type::V128;
    match v.form {
        VecForm::Unary => (vector(a) || a.is_int()) && (vector(ty) || ty.is_int() && vector(a)),
        VecForm::Binary => vector(ty) && vector(a) && (vector(b) || b.is_int()),
        VecForm::Merge => vector(ty) && vector(a) && vector(b),
        VecForm::Ternary | VecForm::Is4 => vector(ty) && vector(a) && vector(b) && vector(c),
        VecForm::ShiftImm => vector(ty) && vector(a),
        VecForm::Extract => (ty.is_int() || vector(ty)) && vector(a),
        VecForm::Flags => ty == Type::I64 && vector(a) && vector(b),
    }
}
