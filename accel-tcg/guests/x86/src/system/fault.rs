//! Exceptions as faults of the runtime: `cause` is the vector, `value` CR2, `aux` the error code and what follows.

use holdfast_tcg_runtime::Fault;

use super::regs::vector;

/// Bit of `aux`: there is an error code, in the low 32 bits.
pub(crate) const HAS_CODE: u64 = 1 << 32;

/// An exception without an error code.
pub(crate) fn plain(vector: u8) -> Fault {
    Fault { cause: u64::from(vector), value: 0, aux: 0 }
}

/// An exception with an error code.
pub(crate) fn coded(vector: u8, code: u32) -> Fault {
    Fault { cause: u64::from(vector), value: 0, aux: HAS_CODE | u64::from(code) }
}

/// #UD
pub(crate) fn ud() -> Fault {
    plain(vector::UD)
}

/// #GP
pub(crate) fn gp(code: u32) -> Fault {
    coded(vector::GP, code)
}

/// #SS
pub(crate) fn ss(code: u32) -> Fault {
    coded(vector::SS, code)
}

/// #NP
pub(crate) fn np(code: u32) -> Fault {
    coded(vector::NP, code)
}

/// #TS
pub(crate) fn ts(code: u32) -> Fault {
    coded(vector::TS, code)
}

/// #PF at `va`.
pub(crate) fn pf(va: u64, code: u32) -> Fault {
    Fault { cause: u64::from(vector::PF), value: va, aux: HAS_CODE | u64::from(code) }
}

/// #GP(0) of an access to `va`, which is not canonical; #SS(0) if it is by the stack segment.
pub(crate) fn non_canonical(va: u64) -> Fault {
    Fault { cause: u64::from(vector::GP), value: va, aux: HAS_CODE | NON_CANONICAL }
}

/// The error code of a fault, if it has one.
pub(crate) fn code(fault: &Fault) -> Option<u32> {
    (fault.aux & HAS_CODE != 0).then_some(fault.aux as u32)
}

/// Bit of `aux`: the pushed flags have RF set (instruction breakpoints).
pub(crate) const RESUME: u64 = 1 << 33;

/// Bit of `aux`: the address accessed, in `value`, is not canonical.
pub(crate) const NON_CANONICAL: u64 = 1 << 34;
