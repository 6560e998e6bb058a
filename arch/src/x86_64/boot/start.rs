//! The state in which the boot processor enters.

use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::{BootError, layout};
use crate::x86_64::{MpState, Segment, State, Table};

/// Descriptors at [`layout::GDT`]: selectors 0x10 code and 0x18 data as Linux wants them, then a TSS.
const CODE64: u64 = 0x00af_9b00_0000_ffff;
const CODE32: u64 = 0x00cf_9b00_0000_ffff;
const DATA: u64 = 0x00cf_9300_0000_ffff;
const TSS: u64 = 0x0000_8b00_0000_0067;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME_LMA: u64 = 0x500;

/// What a Multiboot image finds in EAX.
const MULTIBOOT_EAX: u64 = 0x2bad_b002;

/// Indices into [`State::gpr`].
const RAX: usize = 0;
const RBX: usize = 3;
const RSI: usize = 6;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    Long,
    FlatLinux,
    Pvh,
    Multiboot,
}

/// How the boot processor enters the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    mode: Mode,
    rip: u64,
    /// The boot parameters or start information.
    parameters: u64,
}

fn segment(selector: u16, attributes: u16, limit: u32) -> Segment {
    Segment { selector, base: 0, limit, attributes, unusable: false }
}

impl Entry {
    /// Long mode with the first 4 GiB mapped to themselves; RSI points to the boot parameters.
    pub(super) fn long_mode(memory: &GuestMemory, rip: u64, parameters: u64) -> Result<Self, BootError> {
        write_words(memory, layout::GDT, &[0, 0, CODE64, DATA, TSS])?;
        let (pml4, pdpt, first) =
            (layout::PAGE_TABLES, layout::PAGE_TABLES + 0x1000, layout::PAGE_TABLES + 0x2000);
        write_words(memory, pml4, &[pdpt | 3])?;
        // Present and writable; bit 7: 2 MiB pages.
        let directories: Vec<u64> = (0..4).map(|n| (first + n * 0x1000) | 3).collect();
        write_words(memory, pdpt, &directories)?;
        let pages: Vec<u64> = (0..4 * 512).map(|n| n << 21 | 0x83).collect();
        write_words(memory, first, &pages)?;
        Ok(Self { mode: Mode::Long, rip, parameters })
    }

    /// Protected mode without paging; ESI points to the boot parameters.
    pub(super) fn flat_linux(memory: &GuestMemory, rip: u64, parameters: u64) -> Result<Self, BootError> {
        write_words(memory, layout::GDT, &[0, 0, CODE32, DATA, TSS])?;
        Ok(Self { mode: Mode::FlatLinux, rip, parameters })
    }

    /// Protected mode without paging; EBX points to the start information.
    pub(super) fn pvh(rip: u32, parameters: u64) -> Self {
        Self { mode: Mode::Pvh, rip: rip.into(), parameters }
    }

    /// Protected mode without paging; EBX points to the Multiboot information.
    pub(super) fn multiboot(rip: u32, parameters: u64) -> Self {
        Self { mode: Mode::Multiboot, rip: rip.into(), parameters }
    }

    /// The state in which the boot processor starts, given its reset state.
    pub fn apply(&self, mut s: State) -> State {
        s.gpr = [0; 16];
        let register = if matches!(self.mode, Mode::Pvh | Mode::Multiboot) { RBX } else { RSI };
        if self.mode == Mode::Multiboot {
            s.gpr[RAX] = MULTIBOOT_EAX;
        }
        s.gpr[register] = self.parameters;
        s.rip = self.rip;
        s.rflags = 2;
        s.mp_state = MpState::Runnable;
        let code = match self.mode {
            Mode::Long => segment(0x10, 0xa09b, u32::MAX),
            Mode::FlatLinux | Mode::Pvh | Mode::Multiboot => segment(0x10, 0xc09b, u32::MAX),
        };
        let data = segment(0x18, 0xc093, u32::MAX);
        s.segments = [data, code, data, data, data, data];
        s.tr = segment(0x20, 0x008b, 0x67);
        s.ldt = Segment { unusable: true, ..Segment::default() };
        s.idt = Table::default();
        // PVH and Multiboot promise no GDT; the selectors only matter once the kernel has its own.
        s.gdt = match self.mode {
            Mode::Pvh | Mode::Multiboot => Table::default(),
            Mode::Long | Mode::FlatLinux => Table { base: layout::GDT, limit: 5 * 8 - 1 },
        };
        let [cr0, _, cr3, cr4, _] = &mut s.cr;
        (*cr0, *cr3, *cr4) = (CR0_PE | CR0_ET, 0, 0);
        s.efer = 0;
        if self.mode == Mode::Long {
            (*cr0, *cr3, *cr4) = (CR0_PE | CR0_ET | CR0_PG, layout::PAGE_TABLES, CR4_PAE);
            s.efer = EFER_LME_LMA;
        }
        s
    }
}

fn write_words(memory: &GuestMemory, at: u64, words: &[u64]) -> Result<(), BootError> {
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    memory.write_slice(&bytes, GuestAddress(at))?;
    Ok(())
}
