//! The translation key: what of a hart's mode changes the meaning of instructions.

use holdfast_tcg_ir::Round;
use holdfast_tcg_runtime::Mode;

use crate::hart::Hart;
use crate::mmu;

/// Bits 0-1: privilege. 2: floating point on. 4-5: what `frm` is. 6-8: MMU index of loads and stores.
///
/// Whether FS is dirty already is left out: that would have most user code translated twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Key(pub u32);

/// What of the key SUM changes in S-mode.
pub const SUM: u32 = (mmu::idx::S ^ mmu::idx::S_SUM) as u32 * (1 << DATA);

/// Where the MMU index of loads and stores begins.
const DATA: u32 = 6;

impl Key {
    /// The key of `hart` now.
    pub fn of(hart: &Hart) -> Self {
        let fp = u32::from(hart.fp_enabled());
        let frm = match hart.frm {
            0..=3 => 0,
            4 => 1,
            _ => 2,
        };
        Self(hart.privilege as u32 & 3 | fp << 2 | frm << 4 | u32::from(mmu::data_index(hart)) << DATA)
    }

    /// Privilege.
    pub fn privilege(self) -> u64 {
        u64::from(self.0 & 3)
    }

    /// Floating-point instructions are not illegal.
    pub fn fp_on(self) -> bool {
        self.0 >> 2 & 1 != 0
    }

    /// MMU index of loads and stores.
    pub fn data_idx(self) -> u8 {
        (self.0 >> DATA & 7) as u8
    }

    /// The rounding mode of an instruction with `rm`; `None` if it is illegal (unprivileged
    /// specification, section 20.2).
    pub fn round(self, rm: u32) -> Option<Round> {
        Some(match rm {
            0 => Round::NearestEven,
            1 => Round::Zero,
            2 => Round::Down,
            3 => Round::Up,
            4 => Round::NearestAway,
            7 => match self.0 >> 4 & 3 {
                0 => Round::Dynamic,
                1 => Round::NearestAway,
                _ => return None,
            },
            _ => return None,
        })
    }
}

/// MODE and ASID of a `satp`: what the TLB tells address spaces apart by.
pub fn space(satp: u64) -> u64 {
    satp >> 44
}

/// The modes of `hart` now.
pub fn mode(hart: &Hart) -> Mode {
    Mode { key: Key::of(hart).0, fetch_idx: mmu::fetch_index(hart), space: space(hart.satp) }
}
