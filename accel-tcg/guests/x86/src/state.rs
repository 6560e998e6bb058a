//! The state of a logical processor, laid out for translated code.

use std::mem::offset_of;

use holdfast_tcg_ir::{Slot, Type};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// A segment register, LDTR or TR with its hidden part.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct SegmentRegister {
    /// Base address.
    pub base: u64,
    /// Limit in bytes, granularity applied.
    pub limit: u64,
    /// Selector.
    pub selector: u64,
    /// Attributes as [`holdfast_arch::x86_64::Segment::attributes`] has them; 0 (not present) when unusable.
    pub attributes: u64,
}

/// Indexes of [`X86::seg`], as encoded in instructions.
pub mod seg {
    /// ES.
    pub const ES: usize = 0;
    /// CS.
    pub const CS: usize = 1;
    /// SS.
    pub const SS: usize = 2;
    /// DS.
    pub const DS: usize = 3;
    /// FS.
    pub const FS: usize = 4;
    /// GS.
    pub const GS: usize = 5;
}

/// An 80-bit x87 register in 16 bytes; the low half holds the significand, which is also the MMX register.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct X87Register {
    /// Significand.
    pub significand: u64,
    /// Sign and exponent in the low 16 bits; the rest is zero.
    pub sign_exponent: u64,
}

/// The x87 unit's own registers (SDM volume 1, chapter 8).
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct X87 {
    /// Physical registers R0 to R7 (not relative to TOP).
    pub r: [X87Register; 8],
    /// Control word.
    pub control: u64,
    /// Status word without TOP (bits 11 to 13 are zero).
    pub status: u64,
    /// TOP, 0 to 7.
    pub top: u64,
    /// A bit each for R0 to R7: not empty (the abridged tag word of FXSAVE).
    pub valid: u64,
    /// Last instruction pointer.
    pub ip: u64,
    /// Last operand pointer.
    pub dp: u64,
    /// Last opcode, 11 bits.
    pub opcode: u64,
}

/// All of a processor that is architectural, apart from the linear pc (CS base + EIP) and MXCSR, which live in the
/// generic header, and the local APIC.
///
/// `FLAGS`: see [`crate::flags`].
#[repr(C, align(64))]
#[derive(Debug, Clone, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct X86 {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
    pub gpr: [u64; 16],
    /// How the status flags are recorded: a [`crate::flags::Kind`] with size and overlays. Read them by
    /// [`crate::flags::read`].
    pub cc_op: u64,
    /// First operand of the record.
    pub cc_dst: u64,
    /// Second operand; for [`crate::flags::Kind::Flags`] the six status flags in their places.
    pub cc_src: u64,
    /// Carry-in for ADC and SBB.
    pub cc_aux: u64,
    /// Result of a later INC or DEC.
    pub cc_inc: u64,
    /// Result of a later rotation, or a later carry.
    pub cc_rot: u64,
    /// RFLAGS without the six status flags (they are zero here); bit 1 is set.
    pub flags: u64,
    /// Segment registers by [`seg`].
    pub seg: [SegmentRegister; 6],
    /// LDTR.
    pub ldt: SegmentRegister,
    /// TR.
    pub tr: SegmentRegister,
    /// GDTR base and limit.
    pub gdt: [u64; 2],
    /// IDTR base and limit.
    pub idt: [u64; 2],
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// XCR0.
    pub xcr0: u64,
    /// IA32_XSS.
    pub xss: u64,
    /// DR0 to DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// PKRU.
    pub pkru: u64,
    /// IA32_STAR.
    pub star: u64,
    /// IA32_LSTAR.
    pub lstar: u64,
    /// IA32_CSTAR.
    pub cstar: u64,
    /// IA32_FMASK.
    pub fmask: u64,
    /// IA32_KERNEL_GS_BASE.
    pub kernel_gs_base: u64,
    /// IA32_TSC_AUX.
    pub tsc_aux: u64,
    /// IA32_SYSENTER_CS, ESP, EIP.
    pub sysenter: [u64; 3],
    /// IA32_PAT.
    pub pat: u64,
    /// IA32_MISC_ENABLE.
    pub misc_enable: u64,
    /// Added to scaled guest time to give the TSC (IA32_TSC_ADJUST and writes to IA32_TSC).
    pub tsc_offset: u64,
    /// IA32_TSC_ADJUST.
    pub tsc_adjust: u64,
    /// TSC frequency in kHz.
    pub tsc_khz: u64,
    /// IA32_SPEC_CTRL.
    pub spec_ctrl: u64,
    /// IA32_MTRR_DEF_TYPE.
    pub mtrr_def_type: u64,
    /// Fixed-range MTRRs: 0x250, 0x258, 0x259, 0x268 to 0x26f.
    pub mtrr_fixed: [u64; 11],
    /// Variable-range MTRRs: base and mask.
    pub mtrr_variable: [[u64; 2]; 8],
    /// IA32_SMBASE is not there; IA32_FEATURE_CONTROL.
    pub feature_control: u64,
    /// IA32_BNDCFGS.
    pub bndcfgs: u64,
    /// BNDCFGU, BNDSTATUS.
    pub bnd_user: [u64; 2],
    /// BND0 to BND3: lower bound, upper bound (one's complement).
    pub bnd: [[u64; 2]; 4],
    /// Interrupt shadow: 0 none, 1 behind STI, 2 behind MOV SS. Translated code ends a region behind the
    /// shadowed instruction and clears it.
    pub shadow: u64,
    /// An NMI is pending.
    pub nmi_pending: u64,
    /// NMIs are blocked until IRET.
    pub nmi_masked: u64,
    /// [`holdfast_arch::x86_64::MpState`] as 0 runnable, 1 uninitialised, 2 INIT received, 3 halted.
    pub mp_state: u64,
    /// Vector of a pending SIPI plus 1, or 0.
    pub sipi: u64,
    /// CPL.
    pub cpl: u64,
    /// Vector plus 1 of the exception being delivered, for double faults; 0 outside delivery.
    pub delivering: u64,
    /// Initial APIC id.
    pub apic_id: u64,
    /// XMM and YMM registers 0 to 15: bytes 0 to 15 are the XMM register, 16 to 31 the upper half.
    pub ymm: [[u64; 4]; 16],
    /// 32-byte scratch operands of vector code, not architectural.
    pub vec_scratch: [[u64; 4]; 4],
    /// Bits 256 to 511 of ZMM registers 0 to 15.
    pub zmm_high: [[u64; 4]; 16],
    /// ZMM registers 16 to 31.
    pub zmm_upper: [[u64; 8]; 16],
    /// Where AVX-512's instructions have their memory operand, and their result before it goes where it belongs. Not
    /// architectural, nor are the two below.
    pub evex_memory: [u64; 8],
    /// See [`X86::evex_memory`].
    pub evex_result: [u64; 8],
    /// Their operand in a general register or in 8 bytes of memory or fewer, and their result or flags; the rest is free.
    pub evex_small: [u64; 8],
    /// Opmask registers K0 to K7.
    pub opmask: [u64; 8],
    /// x87.
    pub x87: X87,
    /// Bits 7 to 12: SIMD floating-point exceptions that are unmasked in the guest's MXCSR (the host's has all masked);
    /// bit 15: FZ, when unmasked underflow makes it void. See `fpu::mxcsr`.
    pub mxcsr_unmasked: u64,
    /// The PDPTE registers of PAE paging (SDM volume 3, section 4.4.1).
    pub pdpte: [u64; 4],
    /// Bits of CR4 that this processor has.
    pub cr4_bits: u64,
    /// Bits of IA32_EFER that it has.
    pub efer_bits: u64,
    /// Bits of XCR0 that it has.
    pub xcr0_bits: u64,
    /// Width of physical addresses in bits.
    pub phys_bits: u64,
    /// Debug exceptions to raise behind the instruction that was just done: bits of DR6, 0 for none.
    pub debug_pending: u64,
    /// IA32_PKRS.
    pub pkrs: u64,
    /// The line that MONITOR named, and a checksum of what it held: see `system::monitor`.
    pub monitor: u64,
    /// See [`X86::monitor`].
    pub monitor_sum: u64,
    /// The line that MWAIT waits for, with how; 0 if the processor does not wait by MWAIT.
    pub mwait: u64,
    /// When it ends at the latest (guest-virtual nanoseconds).
    pub mwait_until: u64,
    /// How long it sleeps.
    pub mwait_sleep: u64,
    /// Machine-check banks: CTL, STATUS, ADDR, MISC.
    pub machine_check: [[u64; 4]; MC_BANKS],
    /// How many of `cpuid` there are.
    pub cpuid_count: u64,
    /// What CPUID says.
    pub cpuid: [CpuidLeaf; CPUID_LEAVES],
}

/// Machine-check banks.
pub const MC_BANKS: usize = 10;
/// Most leaves that CPUID has.
pub const CPUID_LEAVES: usize = 80;

/// A CPUID leaf.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, FromBytes, IntoBytes, KnownLayout, Immutable)]
pub struct CpuidLeaf {
    /// Input EAX.
    pub function: u32,
    /// Input ECX.
    pub index: u32,
    /// 1 if ECX selects it, else 0.
    pub indexed: u32,
    /// Zero.
    pub pad: u32,
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

const _: () = assert!(offset_of!(X86, ymm).is_multiple_of(64));
const _: () = assert!(offset_of!(X86, zmm_high).is_multiple_of(64));
const _: () = assert!(offset_of!(X86, evex_memory).is_multiple_of(64));
const _: () = assert!(offset_of!(X86, x87).is_multiple_of(16));

/// Slots of the fields that translated code works on.
pub mod slot {
    use super::*;

    /// A general register, 64 bits.
    pub const fn gpr(r: usize) -> Slot {
        Slot::i64(offset_of!(X86, gpr) + 8 * (r & 15))
    }
    /// [`X86::cc_op`]
    pub const CC_OP: Slot = Slot::i64(offset_of!(X86, cc_op));
    /// [`X86::cc_dst`]
    pub const CC_DST: Slot = Slot::i64(offset_of!(X86, cc_dst));
    /// [`X86::cc_src`]
    pub const CC_SRC: Slot = Slot::i64(offset_of!(X86, cc_src));
    /// [`X86::cc_aux`]
    pub const CC_AUX: Slot = Slot::i64(offset_of!(X86, cc_aux));
    /// [`X86::cc_inc`]
    pub const CC_INC: Slot = Slot::i64(offset_of!(X86, cc_inc));
    /// [`X86::cc_rot`]
    pub const CC_ROT: Slot = Slot::i64(offset_of!(X86, cc_rot));
    /// [`X86::flags`]
    pub const FLAGS: Slot = Slot::i64(offset_of!(X86, flags));

    /// The base of segment register `s`.
    pub const fn seg_base(s: usize) -> Slot {
        Slot::i64(offset_of!(X86, seg) + s * size_of::<SegmentRegister>())
    }
    /// The limit of segment register `s`.
    pub const fn seg_limit(s: usize) -> Slot {
        Slot::i64(
            offset_of!(X86, seg) + s * size_of::<SegmentRegister>() + offset_of!(SegmentRegister, limit),
        )
    }
    /// The selector of segment register `s`.
    pub const fn seg_selector(s: usize) -> Slot {
        Slot::i64(
            offset_of!(X86, seg) + s * size_of::<SegmentRegister>() + offset_of!(SegmentRegister, selector),
        )
    }
    /// The lower (`part` 0) or upper (1) bound in bound register `n`.
    pub const fn bnd(n: usize, part: usize) -> Slot {
        Slot::i64(offset_of!(X86, bnd) + 16 * (n & 3) + 8 * (part & 1))
    }
    /// The low half of vector register `r` (XMM).
    pub const fn xmm(r: usize) -> Slot {
        vector(r & 15, 0)
    }
    /// 16 bytes of [`X86::vec_scratch`], 0 to 7.
    pub const fn scratch(n: usize) -> Slot {
        Slot::new((offset_of!(X86, vec_scratch) + 16 * (n & 7)) as u32, Type::V128)
    }
    /// 8 bytes of [`X86::vec_scratch`], 4 to 15: apart from `scratch(0)` and `scratch(1)`.
    pub const fn scratch64(n: usize) -> Slot {
        Slot::i64(offset_of!(X86, vec_scratch) + 8 * (n & 15))
    }
    /// [`X86::x87`]'s TOP.
    pub const X87_TOP: Slot = Slot::i64(offset_of!(X86, x87) + offset_of!(X87, top));
    /// [`X86::x87`]'s tags.
    pub const X87_VALID: Slot = Slot::i64(offset_of!(X86, x87) + offset_of!(X87, valid));
    /// [`X86::x87`]'s status word.
    pub const X87_STATUS: Slot = Slot::i64(offset_of!(X86, x87) + offset_of!(X87, status));
    /// The significand of x87 register `r` (physical), which is MMX register `r`.
    pub const fn mmx(r: usize) -> Slot {
        Slot::i64(offset_of!(X86, x87) + 16 * (r & 7))
    }
    /// Sign and exponent of x87 register `r` (physical).
    pub const fn x87_exponent(r: usize) -> Slot {
        Slot::i64(offset_of!(X86, x87) + 16 * (r & 7) + 8)
    }
    /// The upper half of YMM register `r`.
    pub const fn ymm_high(r: usize) -> Slot {
        vector(r & 15, 1)
    }
    /// 16 bytes of vector register `r`, 0 to 31: bits `128 * quarter` and up.
    pub const fn vector(r: usize, quarter: usize) -> Slot {
        let at = match (r, quarter) {
            (0..16, 0..2) => offset_of!(X86, ymm) + 32 * r + 16 * quarter,
            (0..16, _) => offset_of!(X86, zmm_high) + 32 * r + 16 * (quarter & 1),
            _ => offset_of!(X86, zmm_upper) + 64 * (r & 15) + 16 * (quarter & 3),
        };
        Slot::new(at as u32, Type::V128)
    }
    /// An opmask register.
    pub const fn opmask(k: usize) -> Slot {
        Slot::i64(offset_of!(X86, opmask) + 8 * (k & 7))
    }
    /// 16 bytes of [`X86::evex_memory`].
    pub const fn evex_memory(quarter: usize) -> Slot {
        Slot::new((offset_of!(X86, evex_memory) + 16 * (quarter & 3)) as u32, Type::V128)
    }
    /// 16 bytes of [`X86::evex_result`].
    pub const fn evex_result(quarter: usize) -> Slot {
        Slot::new((offset_of!(X86, evex_result) + 16 * (quarter & 3)) as u32, Type::V128)
    }
    /// [`X86::evex_small`]: 0 goes in, 1 comes out.
    pub const fn evex_small(n: usize) -> Slot {
        Slot::i64(offset_of!(X86, evex_small) + 8 * (n & 1))
    }
}

impl X86 {
    /// A vector register, 0 to 31.
    pub fn vector(&self, r: usize) -> [u64; 8] {
        if r & 16 != 0 {
            return self.zmm_upper[r & 15];
        }
        let ([a, b, c, d], [e, f, g, h]) = (self.ymm[r & 15], self.zmm_high[r & 15]);
        [a, b, c, d, e, f, g, h]
    }

    /// Sets one.
    pub fn set_vector(&mut self, r: usize, value: [u64; 8]) {
        if r & 16 != 0 {
            self.zmm_upper[r & 15] = value;
            return;
        }
        let [a, b, c, d, e, f, g, h] = value;
        self.ymm[r & 15] = [a, b, c, d];
        self.zmm_high[r & 15] = [e, f, g, h];
    }
}
