//! What translated code calls for integer instructions.

pub(crate) mod arithmetic;
pub(crate) mod control;
pub(crate) mod segment;
pub(crate) mod string;

use holdfast_tcg_ir::{Effects, HelperId, HelperTable, Type};
use holdfast_tcg_runtime::{faulting_helper, plain_helper};

use crate::system;

/// The helpers' names in the IR.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Ids {
    /// Integer and control-flow instructions.
    pub int: Int,
    /// Vector and x87 instructions.
    pub fpu: crate::fpu::Ids,
    /// System instructions.
    pub sys: system::helpers::Ids,
}

/// Of integer instructions.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Int {
    /// (vector, error code or -1, pc): raises an exception.
    pub raise: HelperId,
    /// The status flags.
    pub status: HelperId,
    /// (condition): 1 if it holds.
    pub holds: HelperId,
    /// (segment | bytes << 8 | write << 24, offset): the linear address.
    pub segment: HelperId,
    /// (how): a repeated string instruction; see [`string::How`].
    pub string: HelperId,
    /// (kind | log2 size << 4, value, count): a rotation's result; it reads CF.
    pub rotate: HelperId,
    /// The same: the status flags after it.
    pub rotate_flags: HelperId,
    /// (high, low, divisor): the quotient.
    pub div64: HelperId,
    /// The same, signed.
    pub idiv64: HelperId,
    /// (value, mask)
    pub pdep: HelperId,
    /// (value, mask)
    pub pext: HelperId,
    /// (crc, data, log2 size)
    pub crc32: HelperId,
    /// (kind, base): decimal adjustments of AX and the flags.
    pub decimal: HelperId,
    /// (address, MMU index): 1 if it was equal.
    pub cmpxchg16b: HelperId,
}

/// Builds the table.
pub(crate) fn table() -> (HelperTable, Ids) {
    let mut t = HelperTable::new();
    let none = Effects::empty();
    let all = Effects::READS_SLOTS | Effects::WRITES_SLOTS | Effects::MAY_FLUSH;
    let both = Effects::READS_SLOTS | Effects::WRITES_SLOTS;
    let int = Int {
        raise: t.faulting("raise", raise, Type::Void, 3, none),
        status: t.plain("status", status, Type::I64, 0, none),
        holds: t.plain("holds", holds, Type::I64, 1, none),
        segment: t.faulting("segment", segment_address, Type::I64, 2, none),
        string: t.faulting("string", string_run, Type::Void, 2, all),
        rotate: t.plain("rotate", rotate, Type::I64, 3, none),
        rotate_flags: t.plain("rotate_flags", rotate_flags, Type::I64, 3, none),
        div64: t.faulting("div64", div64, Type::I64, 3, none),
        idiv64: t.faulting("idiv64", idiv64, Type::I64, 3, none),
        pdep: t.plain("pdep", pdep, Type::I64, 2, Effects::PURE),
        pext: t.plain("pext", pext, Type::I64, 2, Effects::PURE),
        crc32: t.plain("crc32", crc32, Type::I64, 3, Effects::PURE),
        decimal: t.faulting("decimal", decimal, Type::Void, 2, both),
        cmpxchg16b: t.faulting("cmpxchg16b", cmpxchg16b, Type::I64, 2, all),
    };
    let sys = system::helpers::register(&mut t);
    let fpu = crate::fpu::register(&mut t);
    (t, Ids { int, fpu, sys })
}

faulting_helper!(raise, control::raise);
plain_helper!(status, control::status);
plain_helper!(holds, control::holds);
faulting_helper!(segment_address, segment::address);
faulting_helper!(string_run, string::run);
plain_helper!(rotate, arithmetic::rotate);
plain_helper!(rotate_flags, arithmetic::rotate_flags);
faulting_helper!(div64, arithmetic::div64);
faulting_helper!(idiv64, arithmetic::idiv64);
plain_helper!(pdep, arithmetic::pdep);
plain_helper!(pext, arithmetic::pext);
plain_helper!(crc32, arithmetic::crc32);
faulting_helper!(decimal, arithmetic::decimal);
faulting_helper!(cmpxchg16b, control::cmpxchg16b);
