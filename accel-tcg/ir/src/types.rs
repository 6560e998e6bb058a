//! Types, values and slots.

use std::fmt;

/// The type of a value or slot.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, Default)]
#[repr(u8)]
pub enum Type {
    /// No value.
    #[default]
    Void,
    /// 32-bit integer; the upper half of the register that holds it is undefined.
    I32,
    /// 64-bit integer.
    I64,
    /// IEEE 754 binary32.
    F32,
    /// IEEE 754 binary64.
    F64,
    /// 128-bit vector.
    V128,
}

impl Type {
    /// Size in bytes; 0 for [`Type::Void`].
    #[inline]
    pub const fn bytes(self) -> u32 {
        match self {
            Type::Void => 0,
            Type::I32 | Type::F32 => 4,
            Type::I64 | Type::F64 => 8,
            Type::V128 => 16,
        }
    }

    /// Size in bits.
    #[inline]
    pub const fn bits(self) -> u32 {
        self.bytes() * 8
    }

    /// Whether it is an integer.
    #[inline]
    pub const fn is_int(self) -> bool {
        matches!(self, Type::I32 | Type::I64)
    }

    /// Whether the host holds it in a vector register.
    #[inline]
    pub const fn in_vector(self) -> bool {
        matches!(self, Type::F32 | Type::F64 | Type::V128)
    }

    /// Whether it is floating point.
    #[inline]
    pub const fn is_float(self) -> bool {
        matches!(self, Type::F32 | Type::F64)
    }

    /// The type with discriminant `n`, [`Type::Void`] when there is none.
    #[inline]
    pub const fn from_index(n: u8) -> Type {
        match n {
            1 => Type::I32,
            2 => Type::I64,
            3 => Type::F32,
            4 => Type::F64,
            5 => Type::V128,
            _ => Type::Void,
        }
    }
}

impl fmt::Display for Type {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Type::Void => "void",
            Type::I32 => "i32",
            Type::I64 => "i64",
            Type::F32 => "f32",
            Type::F64 => "f64",
            Type::V128 => "v128",
        })
    }
}

/// An SSA value: the index of the instruction that defines it.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash, PartialOrd, Ord)]
pub struct Val(pub u32);

impl Val {
    /// Its index as `usize`.
    #[inline]
    pub const fn index(self) -> usize {
        self.0 as usize
    }
}

impl fmt::Display for Val {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "v{}", self.0)
    }
}

/// Number of values of [`Slot::index`].
pub const SLOT_INDEXES: usize = 128;

/// A piece of guest state: `ty` at `offset` bytes from the start of the guest part of the vCPU's environment.
///
/// Two slots are the same or disjoint: they never overlap in part, and a given offset has one type only.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Slot {
    /// Bytes from the environment pointer; a multiple of the type's size.
    pub offset: u32,
    /// What is there.
    pub ty: Type,
}

impl Slot {
    /// Its place in tables that are direct mapped by slot, of [`SLOT_INDEXES`] entries. Vectors have a part of their own.
    #[inline]
    pub const fn index(self) -> usize {
        match self.ty {
            Type::V128 => 64 + (self.offset as usize / 16) % 64,
            _ => (self.offset as usize / 8) % 64,
        }
    }

    /// A slot of any type.
    #[inline]
    pub const fn new(offset: u32, ty: Type) -> Self {
        Self { offset, ty }
    }

    /// A 64-bit integer slot.
    #[inline]
    pub const fn i64(offset: usize) -> Self {
        Self { offset: offset as u32, ty: Type::I64 }
    }

    /// A binary64 slot; binary32 values are NaN-boxed in it.
    #[inline]
    pub const fn f64(offset: usize) -> Self {
        Self { offset: offset as u32, ty: Type::F64 }
    }
}
