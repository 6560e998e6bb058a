//! Registers, memory operands, operations and conditions.

/// A general register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Reg(pub u8);

/// A vector register.
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct Xmm(pub u8);

#[allow(missing_docs, reason = "the names are the documentation")]
impl Reg {
    pub const RAX: Reg = Reg(0);
    pub const RCX: Reg = Reg(1);
    pub const RDX: Reg = Reg(2);
    pub const RBX: Reg = Reg(3);
    pub const RSP: Reg = Reg(4);
    pub const RBP: Reg = Reg(5);
    pub const RSI: Reg = Reg(6);
    pub const RDI: Reg = Reg(7);
    pub const R8: Reg = Reg(8);
    pub const R9: Reg = Reg(9);
    pub const R10: Reg = Reg(10);
    pub const R11: Reg = Reg(11);
    pub const R12: Reg = Reg(12);
    pub const R13: Reg = Reg(13);
    pub const R14: Reg = Reg(14);
    pub const R15: Reg = Reg(15);
}

/// A memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub struct Mem {
    /// Base register; [`Mem::RIP`] for an offset from the start of the code.
    pub base: u8,
    /// Index register, or [`Mem::NONE`]; never rsp.
    pub index: u8,
    /// Log2 of the index scale.
    pub scale: u8,
    /// Displacement.
    pub disp: i32,
}

impl Mem {
    /// No index.
    pub const NONE: u8 = 0xff;
    /// Relative to the instruction pointer: `disp` is the distance from the start of the code buffer.
    pub const RIP: u8 = 0xfe;

    /// `[base + disp]`
    #[inline]
    pub const fn base(base: Reg, disp: i32) -> Mem {
        Mem { base: base.0, index: Mem::NONE, scale: 0, disp }
    }

    /// `[base + index << scale + disp]`
    #[inline]
    pub const fn index(base: Reg, index: Reg, scale: u8, disp: i32) -> Mem {
        Mem { base: base.0, index: index.0, scale, disp }
    }

    /// `[rbp + disp]`: the environment.
    #[inline]
    pub const fn env(disp: i32) -> Mem {
        Mem::base(Reg::RBP, disp)
    }
}

/// A register or memory operand.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Rm {
    /// General register (or the number of a vector register, where the instruction says so).
    R(u8),
    /// Memory.
    M(Mem),
}

impl From<Reg> for Rm {
    #[inline]
    fn from(r: Reg) -> Rm {
        Rm::R(r.0)
    }
}

impl From<Xmm> for Rm {
    #[inline]
    fn from(r: Xmm) -> Rm {
        Rm::R(r.0)
    }
}

impl From<Mem> for Rm {
    #[inline]
    fn from(m: Mem) -> Rm {
        Rm::M(m)
    }
}

/// The eight classic operations; the discriminant is the `/n` of group 1.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Alu {
    Add = 0,
    Or = 1,
    Adc = 2,
    Sbb = 3,
    And = 4,
    Sub = 5,
    Xor = 6,
    Cmp = 7,
}

/// Shifts and rotates; the discriminant is the `/n` of group 2.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Shift {
    Rol = 0,
    Ror = 1,
    Shl = 4,
    Shr = 5,
    Sar = 7,
}

/// Condition codes, as encoded.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
#[repr(u8)]
#[allow(missing_docs, reason = "the names are the documentation")]
pub enum Cc {
    O = 0,
    No = 1,
    B = 2,
    Ae = 3,
    E = 4,
    Ne = 5,
    Be = 6,
    A = 7,
    S = 8,
    Ns = 9,
    P = 10,
    Np = 11,
    L = 12,
    Ge = 13,
    Le = 14,
    G = 15,
}

impl Cc {
    /// The opposite condition.
    #[inline]
    pub const fn inverse(self) -> Cc {
        const ALL: [Cc; 16] = [
            Cc::O,
            Cc::No,
            Cc::B,
            Cc::Ae,
            Cc::E,
            Cc::Ne,
            Cc::Be,
            Cc::A,
            Cc::S,
            Cc::Ns,
            Cc::P,
            Cc::Np,
            Cc::L,
            Cc::Ge,
            Cc::Le,
            Cc::G,
        ];
        ALL[(self as usize ^ 1) & 15]
    }
}
