//! The modes that translations depend on.

use holdfast_tcg_runtime::{Cpu, Mode};

use super::regs::{cr0, cr4, dr, efer};
use crate::flags::rflags;
use crate::fpu::area;
use crate::key::{Key, idx};
use crate::state::{SegmentRegister, X86, seg};

/// Bits of [`SegmentRegister::attributes`].
pub(crate) mod attr {
    /// Accessed.
    pub const ACCESSED: u64 = 1;
    /// Data: writable; code: readable.
    pub const WRITABLE: u64 = 2;
    /// Data: expands down; code: conforming.
    pub const DOWN: u64 = 4;
    /// Code.
    pub const CODE: u64 = 8;
    /// No system segment.
    pub const S: u64 = 1 << 4;
    /// Position of DPL.
    pub const DPL_SHIFT: u32 = 5;
    /// Present.
    pub const P: u64 = 1 << 7;
    /// 64-bit code.
    pub const L: u64 = 1 << 13;
    /// Default size 32 bits.
    pub const DB: u64 = 1 << 14;
    /// Granularity.
    pub const G: u64 = 1 << 15;
}

impl X86 {
    /// Protected mode that is not virtual-8086 mode.
    pub(crate) fn protected(&self) -> bool {
        self.cr0 & cr0::PE != 0 && self.flags & rflags::VM == 0
    }

    /// Virtual-8086 mode.
    pub(crate) fn vm86(&self) -> bool {
        self.flags & rflags::VM != 0
    }

    /// Long mode: 64-bit or compatibility mode.
    pub(crate) fn long(&self) -> bool {
        self.efer & efer::LMA != 0
    }

    /// 64-bit mode.
    pub(crate) fn code64(&self) -> bool {
        self.long() && self.seg[seg::CS].attributes & attr::L != 0
    }

    /// IOPL.
    pub(crate) fn iopl(&self) -> u64 {
        (self.flags & rflags::IOPL) >> rflags::IOPL_SHIFT
    }

    /// CLI and STI work on VIF (SDM volume 3, sections 21.3.3.5 and 21.4).
    pub(crate) fn virtual_if(&self) -> bool {
        let enabled = if self.vm86() { cr4::VME } else { cr4::PVI };
        self.cr4 & enabled != 0 && self.cpl == 3 && self.iopl() < 3 && self.cr0 & cr0::PE != 0
    }

    /// MMU index of the loads and stores of instructions.
    pub(crate) fn data_idx(&self) -> u8 {
        if self.cpl == 3 {
            idx::USER
        } else if self.cr4 & cr4::SMAP != 0 && self.flags & rflags::AC != 0 {
            idx::KERNEL_AC
        } else {
            idx::KERNEL
        }
    }

    /// EIP or RIP of the linear address `pc`.
    pub(crate) fn ip_of(&self, pc: u64) -> u64 {
        if self.code64() { pc } else { pc.wrapping_sub(self.seg[seg::CS].base) & 0xffff_ffff }
    }

    /// The linear address of `ip` in the current code segment.
    pub(crate) fn pc_of(&self, ip: u64) -> u64 {
        if self.code64() { ip } else { self.seg[seg::CS].base.wrapping_add(ip) & 0xffff_ffff }
    }

    /// Bits of linear addresses.
    pub(crate) fn linear_bits(&self) -> u32 {
        if self.cr4 & cr4::LA57 != 0 { 57 } else { 48 }
    }

    /// True if registers that hold linear addresses take `va`: canonical for the widest addresses that the processor has,
    /// whatever CR4.LA57 says.
    pub(crate) fn canonical_base(&self, va: u64) -> bool {
        let shift = if self.cr4_bits & cr4::LA57 != 0 { 7 } else { 16 };
        ((va << shift) as i64 >> shift) as u64 == va
    }

    /// True if `va` is canonical.
    pub(crate) fn canonical(&self, va: u64) -> bool {
        let shift = 64 - self.linear_bits();
        ((va << shift) as i64 >> shift) as u64 == va
    }
}

/// Usable, base 0, limit 4 GiB, writable data that does not expand down.
fn flat(s: &SegmentRegister) -> bool {
    const MASK: u64 = attr::P | attr::S | attr::CODE | attr::DOWN | attr::WRITABLE;
    s.base == 0 && s.limit == 0xffff_ffff && s.attributes & MASK == attr::P | attr::S | attr::WRITABLE
}

pub(crate) fn step(s: &X86) -> bool {
    let dr7 = s.dr[dr::DR7];
    let fetch_breakpoint =
        dr7 & 0xff != 0 && (0..4).any(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 == 0);
    s.flags & rflags::TF != 0 || fetch_breakpoint
}

fn watch(s: &X86) -> bool {
    let dr7 = s.dr[dr::DR7];
    dr7 & 0xff != 0 && (0..4).any(|n| dr7 >> (2 * n) & 3 != 0 && dr7 >> (16 + 4 * n) & 3 != 0)
}

fn sizes(s: &X86) -> Key {
    let cs = &s.seg[seg::CS];
    let mut key = Key::empty();
    if s.code64() {
        return Key::CODE64 | Key::DATA_FLAT | Key::CS_FLAT;
    }
    key.set(Key::CODE32, cs.attributes & attr::DB != 0);
    key.set(Key::STACK32, s.seg[seg::SS].attributes & attr::DB != 0);
    key.set(Key::CS_FLAT, cs.base == 0);
    key.set(Key::CS_LIMIT, cs.limit < 0xffff_ffff);
    key.set(Key::CS_SHORT, cs.limit < 0xffff);
    key.set(Key::DATA_FLAT, [seg::ES, seg::SS, seg::DS].iter().all(|r| flat(&s.seg[*r])));
    key
}

/// The key of the state as it is.
pub(crate) fn key(s: &X86) -> Key {
    let mut key = sizes(s) | Key::from_bits_truncate(s.cpl as u32 & 3);
    key.set(Key::PROTECTED, s.protected());
    key.set(Key::VM86, s.vm86());
    key.set(Key::LONG, s.long());
    key.set(Key::STEP, step(s));
    key.set(Key::WATCH, watch(s));
    key.set(Key::SHADOW, s.shadow != 0);
    key.set(Key::TS, s.cr0 & cr0::TS != 0);
    key.set(Key::EM, s.cr0 & cr0::EM != 0);
    key.set(Key::MP, s.cr0 & cr0::MP != 0);
    key.set(Key::OSFXSR, s.cr4 & cr4::OSFXSR != 0);
    key.set(Key::AVX, s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & 6 == 6);
    key.set(Key::AVX512, s.cr4 & cr4::OSXSAVE != 0 && s.xcr0 & area::AVX512 == area::AVX512);
    let iopl_ok = if s.vm86() { s.iopl() == 3 } else { s.cr0 & cr0::PE == 0 || s.cpl <= s.iopl() };
    key.set(Key::IOPL_OK, iopl_ok);
    key.set(Key::VIRTUAL_IF, s.virtual_if());
    key.set(Key::BOUNDS, s.bounds());
    key.set(Key::RESET_BOUNDS, s.branches_reset_bounds());
    key.set(Key::ALIGN, s.cpl == 3 && s.cr0 & cr0::AM != 0 && s.flags & rflags::AC != 0);
    key.set(Key::SIMD_TRAPS, s.mxcsr_unmasked != 0);
    key.set(Key::UMIP, s.cpl > 0 && s.cr4 & cr4::UMIP != 0);
    key | Key::of_mmu_idx(s.data_idx())
}

/// The address space: the PCID, if there are any. Without, writes to CR3 flush what they go to.
pub(crate) fn space(s: &X86) -> u64 {
    if s.cr4 & cr4::PCIDE != 0 { 1 << 52 | s.cr3 & 0xfff } else { s.cr3 & 0x000f_ffff_ffff_f000 }
}

/// What modes depend on has changed.
pub(crate) fn changed(cpu: &mut Cpu<'_>) {
    let mode = mode(cpu.state());
    cpu.set_mode(mode);
}

/// The modes.
#[inline]
pub(crate) fn mode(s: &X86) -> Mode {
    let fetch_idx = if s.cpl == 3 { idx::USER } else { idx::KERNEL };
    Mode { key: key(s).bits(), fetch_idx, space: space(s) }
}

#[cfg(test)]
mod tests {
    use zerocopy::FromZeros;

    use super::*;

    /// What STAC and CLAC rely on.
    #[test]
    fn at_cpl_0_ac_changes_nothing_of_the_mode_but_the_mmu_index() {
        for cr0 in [cr0::PE, cr0::PE | cr0::AM] {
            let mut s = X86::new_zeroed();
            (s.cr0, s.cr4) = (cr0, cr4::SMAP);
            let off = mode(&s);
            s.flags |= rflags::AC;
            let on = mode(&s);
            let index = Key::of_mmu_idx(idx::KERNEL ^ idx::KERNEL_AC).bits();
            assert_eq!((on.key ^ off.key, on.fetch_idx, on.space), (index, off.fetch_idx, off.space));
        }
    }
}
