//! Floating-point operations that generated code leaves to softfp.
//!
//! All have [`holdfast_tcg_ir::Effects::USES_FP`], so the guest's MXCSR is in the header while they run.

use holdfast_softfp::{self as soft, Format, Int, NanRule, Rounding, Tininess, Unit};
use holdfast_tcg_ir::env::header;
use holdfast_tcg_ir::{FpMode, NanPolicy, Op};

/// What a call does, packed into its last argument: the opcode, the mode, whether operand and result are wide.
#[derive(Clone, Copy)]
pub(crate) struct Request {
    pub(crate) op: Op,
    pub(crate) mode: FpMode,
    /// The operand is an `F64` or `I64`.
    pub(crate) wide_in: bool,
    /// The result is an `F64` or `I64`.
    pub(crate) wide_out: bool,
}

impl Request {
    pub(crate) fn pack(self) -> u64 {
        self.op as u64
            | u64::from(self.mode.0) << 8
            | u64::from(self.wide_in) << 24
            | u64::from(self.wide_out) << 25
    }
}

/// The operations that may be asked for, by opcode.
const OPS: [Op; 14] = [
    Op::FAdd,
    Op::FSub,
    Op::FMul,
    Op::FDiv,
    Op::FSqrt,
    Op::FMulAdd,
    Op::FMin,
    Op::FMax,
    Op::FCvtFF,
    Op::FCvtToS,
    Op::FCvtToU,
    Op::FCvtFromS,
    Op::FCvtFromU,
    Op::FClass,
];

fn rounding(mode: FpMode, mxcsr: u32) -> Rounding {
    use holdfast_tcg_ir::Round as R;
    match mode.round() {
        R::NearestEven => Rounding::NearestEven,
        R::Zero => Rounding::Zero,
        R::Down => Rounding::Down,
        R::Up => Rounding::Up,
        R::NearestAway => Rounding::NearestAway,
        R::Dynamic => match mxcsr >> 13 & 3 {
            0 => Rounding::NearestEven,
            1 => Rounding::Down,
            2 => Rounding::Up,
            _ => Rounding::Zero,
        },
    }
}

/// The sticky bits of MXCSR for `flags` of softfp. (MXCSR: 0 invalid, 2 zero, 3 overflow, 4 underflow, 5 inexact.)
const fn sticky(flags: u8) -> u32 {
    let f = flags as u32;
    f >> 4 & 1 | (f & 8) >> 1 | (f & 4) << 1 | (f & 2) << 3 | (f & 1) << 5
}

/// Performs a packed request.
///
/// # Safety
/// `env` points into a vCPU environment that no other thread runs.
pub(crate) unsafe extern "C" fn soft_fp(env: *mut u8, a: u64, b: u64, c: u64, request: u64, _: u64) -> u64 {
    // SAFETY: by this function's contract.
    let mxcsr = unsafe { &mut (*header(env)).mxcsr };
    let Some(op) = OPS.into_iter().find(|o| *o as u64 == request & 0xff) else { return 0 };
    let mode = FpMode((request >> 8) as u16);
    let nan = if mode.nan() == NanPolicy::Canonical { NanRule::Canonical } else { NanRule::FirstOperand };
    let mut u = Unit { rounding: rounding(mode, *mxcsr), nan, tininess: Tininess::AfterRounding, flags: 0 };
    let r = perform(&mut u, op, [a, b, c], (mode, request));
    *mxcsr |= sticky(u.flags);
    r
}

fn perform(u: &mut Unit, op: Op, [a, b, c]: [u64; 3], (mode, request): (FpMode, u64)) -> u64 {
    let (wide_in, wide_out) = (request >> 24 & 1 != 0, request >> 25 & 1 != 0);
    let format = |wide: bool| if wide { Format::F64 } else { Format::F32 };
    let (from, to) = (format(wide_in), format(wide_out));
    let int = |wide: bool, signed: bool| match (wide, signed) {
        (false, true) => Int::I32,
        (false, false) => Int::U32,
        (true, true) => Int::I64,
        (true, false) => Int::U64,
    };
    let (a, b, c) = if op == Op::FCvtFromS || op == Op::FCvtFromU {
        (a, b, c)
    } else {
        (a & from.mask(), b & from.mask(), c & from.mask())
    };
    match op {
        Op::FAdd => u.add(from, a, b),
        Op::FSub => u.sub(from, a, b),
        Op::FMul => u.mul(from, a, b),
        Op::FDiv => u.div(from, a, b),
        Op::FSqrt => u.sqrt(from, a),
        Op::FMin => u.min(from, a, b),
        Op::FMax => u.max(from, a, b),
        Op::FMulAdd => u.mul_add(from, [a, b, c], mode.neg_product(), mode.neg_addend()),
        Op::FCvtFF => u.convert(from, to, a),
        Op::FCvtToS => u.to_int(from, int(wide_out, true), a),
        Op::FCvtToU => u.to_int(from, int(wide_out, false), a),
        Op::FCvtFromS => u.from_int(to, int(wide_in, true), a),
        Op::FCvtFromU => u.from_int(to, int(wide_in, false), a),
        Op::FClass => u64::from(soft::class(from, a)),
        _ => 0,
    }
}
