//! The translation key: what of a processor's mode changes the meaning of instructions.

use iced_x86::DecoderOptions;

/// The size of code, from CS.D, CS.L and EFER.LMA.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CodeSize {
    /// 16-bit operands and addresses by default.
    Bits16,
    /// 32-bit.
    Bits32,
    /// 64-bit mode.
    Bits64,
}

bitflags::bitflags! {
    /// Bits of a key (at most 31; see [`holdfast_tcg_runtime::Mode::key`]).
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub struct Key: u32 {
        /// CPL, two bits.
        const CPL = 3;
        /// 32-bit code.
        const CODE32 = 1 << 2;
        /// 64-bit mode.
        const CODE64 = 1 << 3;
        /// 32-bit stack pointer (SS.B); in 64-bit mode it is always 64.
        const STACK32 = 1 << 4;
        /// CR0.PE and not virtual-8086 mode.
        const PROTECTED = 1 << 5;
        /// Virtual-8086 mode.
        const VM86 = 1 << 6;
        /// EFER.LMA.
        const LONG = 1 << 7;
        /// The base of CS is 0, so that pc and EIP are the same.
        const CS_FLAT = 1 << 8;
        /// ES, SS and DS are usable, flat (base 0, limit 4 GiB), readable and writable: no checks are needed. Set in 64-bit mode.
        const DATA_FLAT = 1 << 9;
        /// RFLAGS.TF, or an enabled instruction breakpoint: one instruction a region.
        const STEP = 1 << 10;
        /// Behind STI or MOV SS: the region is one instruction that clears the shadow.
        const SHADOW = 1 << 11;
        /// CR0.TS
        const TS = 1 << 12;
        /// CR0.EM
        const EM = 1 << 13;
        /// CR0.MP
        const MP = 1 << 14;
        /// CR4.OSFXSR
        const OSFXSR = 1 << 15;
        /// CR4.OSXSAVE and XCR0 has SSE and AVX.
        const AVX = 1 << 16;
        /// IOPL allows CLI, STI and port I/O.
        const IOPL_OK = 1 << 17;
        /// MMU index of loads and stores, two bits: see [`idx`].
        const MMU_IDX = 3 << 18;
        /// The guest has unmasked SIMD floating-point exceptions ([`crate::state::X86::mxcsr_unmasked`] is not 0).
        const SIMD_TRAPS = 1 << 20;
        /// Alignment checks are on (CR0.AM, RFLAGS.AC, CPL 3).
        const ALIGN = 1 << 21;
        /// Any of DR7's data or I/O breakpoints is enabled.
        const WATCH = 1 << 22;
        /// CR4.UMIP and CPL above 0.
        const UMIP = 1 << 23;
        /// CLI and STI work on VIF: virtual-8086 mode under CR4.VME, or CPL 3 under CR4.PVI, where IOPL is below 3.
        const VIRTUAL_IF = 1 << 24;
        /// The limit of CS is below 4 GiB (not in 64-bit mode): near branches are checked.
        const CS_LIMIT = 1 << 25;
        /// It is below 64 KiB, so that 16-bit ones are too.
        const CS_SHORT = 1 << 26;
        /// MPX is on.
        const BOUNDS = 1 << 27;
        /// Near branches without the BND prefix reset the bounds.
        const RESET_BOUNDS = 1 << 28;
        /// CR4.OSXSAVE and XCR0 has all of AVX-512's state.
        const AVX512 = 1 << 29;
    }
}

/// MMU indexes.
pub mod idx {
    /// Supervisor, with SMAP in force if CR4 has it (RFLAGS.AC clear).
    pub const KERNEL: u8 = 0;
    /// User.
    pub const USER: u8 = 1;
    /// Supervisor with RFLAGS.AC set: user pages may be accessed.
    pub const KERNEL_AC: u8 = 2;
    /// Implicit supervisor accesses (descriptor tables, TSS, interrupt stacks of inner levels): SMAP is in force for
    /// them whatever RFLAGS.AC says.
    pub const SYSTEM: u8 = KERNEL;
    /// How many.
    pub const COUNT: u8 = 3;
}

impl Key {
    /// How instructions are decoded.
    pub fn decoder_options(self) -> u32 {
        if self.contains(Key::BOUNDS) { DecoderOptions::MPX } else { DecoderOptions::NONE }
    }

    /// Regions of one instruction, that begin with [`crate::system`]'s `begin` and end with an exit.
    pub const SINGLE: Key = Key::STEP.union(Key::SHADOW).union(Key::WATCH);

    /// The size of code.
    pub fn code_size(self) -> CodeSize {
        if self.contains(Key::CODE64) {
            CodeSize::Bits64
        } else if self.contains(Key::CODE32) {
            CodeSize::Bits32
        } else {
            CodeSize::Bits16
        }
    }

    /// CPL.
    pub fn cpl(self) -> u8 {
        (self.bits() & 3) as u8
    }

    /// MMU index of loads and stores.
    pub fn mmu_idx(self) -> u8 {
        (self.bits() >> 18 & 3) as u8
    }

    /// Nothing but the MMU index of loads and stores.
    pub fn of_mmu_idx(idx: u8) -> Self {
        Self::from_bits_truncate(u32::from(idx & 3) << 18)
    }
}
