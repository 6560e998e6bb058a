//! MPX: bounds, and where they are looked up (SDM volume 1, chapter 17 of editions that have it).

use holdfast_tcg_runtime::{Cpu, Fault, HelperResult};

use super::fault::plain;
use super::regs::{cr4, vector};
use crate::state::X86;

/// XCR0: bound registers, and their configuration and status.
pub(crate) const XCR0: u64 = 3 << 3;
/// Bits of BNDCFGU and IA32_BNDCFGS.
mod config {
    /// MPX is on.
    pub const ENABLE: u64 = 1;
    /// Branches without the BND prefix leave the bounds.
    pub const PRESERVE: u64 = 2;
    /// Bits that have to be zero; above them is the address of the bound directory.
    pub const RESERVED: u64 = 0xffc;
}
/// BNDSTATUS: a bound was broken; an entry of the bound directory is not valid (its address is above).
const BROKEN: u64 = 1;
const NO_ENTRY: u64 = 2;

/// What an instruction does, in [`run`]'s first argument above the number of the bound register.
pub(crate) mod what {
    /// BNDMK: (lower bound, address of the upper one).
    pub const MAKE: u64 = 0;
    /// BNDCL: (address).
    pub const LOWER: u64 = 1 << 8;
    /// BNDCU: the same.
    pub const UPPER: u64 = 2 << 8;
    /// BNDCN: the same, the upper bound as it is.
    pub const NOT: u64 = 3 << 8;
    /// BNDLDX: (linear address of the pointer, the pointer).
    pub const LOAD: u64 = 4 << 8;
    /// BNDSTX: the same.
    pub const STORE: u64 = 5 << 8;
    /// Flag: 64-bit mode.
    pub const LONG: u64 = 1 << 16;
}

impl X86 {
    /// BNDCFGU or IA32_BNDCFGS, whichever holds, where MPX is on; else 0.
    fn bound_config(&self) -> u64 {
        let on = self.cr4 & cr4::OSXSAVE != 0 && self.xcr0 & XCR0 == XCR0;
        let config = if self.cpl == 3 { self.bnd_user[0] } else { self.bndcfgs };
        if on && config & config::ENABLE != 0 { config } else { 0 }
    }

    /// MPX is on.
    pub(crate) fn bounds(&self) -> bool {
        self.bound_config() != 0
    }

    /// Near branches without the BND prefix reset the bounds.
    pub(crate) fn branches_reset_bounds(&self) -> bool {
        let config = self.bound_config();
        config != 0 && config & config::PRESERVE == 0
    }

    /// Whether BNDCFGU or IA32_BNDCFGS can hold `value`.
    pub(crate) fn bound_config_fits(&self, value: u64) -> bool {
        value & config::RESERVED == 0 && self.canonical_base(value)
    }
}

/// #BR, with what BNDSTATUS tells of it.
fn broken(s: &mut X86, status: u64) -> Fault {
    s.bnd_user[1] = status;
    plain(vector::BR)
}

/// The entry of the bound table for the pointer at `at`, found by the bound directory; `unit`: bytes of an address.
fn table_entry(cpu: &mut Cpu<'_>, at: u64, unit: u8, idx: u8) -> Result<u64, Fault> {
    let directory = cpu.state::<X86>().bound_config() & !0xfff;
    let entry = if unit == 8 {
        directory.wrapping_add((at >> 20 & 0xfff_ffff) << 3)
    } else {
        (directory & 0xffff_ffff).wrapping_add((at >> 12 & 0xf_ffff) << 2) & 0xffff_ffff
    };
    let table = cpu.load(entry, unit, idx)?;
    if table & 1 == 0 {
        return Err(broken(cpu.state(), entry | NO_ENTRY));
    }
    Ok(if unit == 8 {
        (table & !7).wrapping_add((at >> 3 & 0x1_ffff) << 5)
    } else {
        (table & !3).wrapping_add((at >> 2 & 0x3ff) << 4) & 0xffff_ffff
    })
}

fn load(cpu: &mut Cpu<'_>, n: usize, at: u64, pointer: u64, unit: u8) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    let entry = table_entry(cpu, at, unit, idx)?;
    let mut words = [0; 3];
    for (word, k) in words.iter_mut().zip(0..) {
        *word = cpu.load(entry.wrapping_add(k * u64::from(unit)), unit, idx)?;
    }
    let [lower, upper, stored] = words;
    if let Some(bound) = cpu.state::<X86>().bnd.get_mut(n) {
        *bound = if stored == pointer { [lower, upper] } else { [0, 0] };
    }
    Ok(())
}

fn store(cpu: &mut Cpu<'_>, n: usize, at: u64, pointer: u64, unit: u8) -> Result<(), Fault> {
    let idx = cpu.state::<X86>().data_idx();
    let entry = table_entry(cpu, at, unit, idx)?;
    let [lower, upper] = cpu.state::<X86>().bnd.get(n).copied().unwrap_or_default();
    for (word, k) in [lower, upper, pointer].into_iter().zip(0..) {
        cpu.store(entry.wrapping_add(k * u64::from(unit)), unit, idx, word)?;
    }
    Ok(())
}

/// An MPX instruction but BNDMOV, where MPX is on: ([`what`], operands).
pub(crate) fn run(cpu: &mut Cpu<'_>, [what, a, b, ..]: [u64; 5]) -> HelperResult {
    let n = (what & 3) as usize;
    let (unit, mask) = if what & what::LONG != 0 { (8, u64::MAX) } else { (4, 0xffff_ffff) };
    let s = cpu.state::<X86>();
    let [lower, upper] = s.bnd.get(n).map_or([0; 2], |bound| bound.map(|v| v & mask));
    let address = a & mask;
    let fails = match what & 0xff00 {
        what::MAKE => {
            if let Some(bound) = s.bnd.get_mut(n) {
                *bound = [a & mask, !b & mask];
            }
            false
        }
        what::LOWER => address < lower,
        what::UPPER => address > !upper & mask,
        what::NOT => address > upper,
        what::LOAD => {
            load(cpu, n, address, b & mask, unit)?;
            false
        }
        _ => {
            store(cpu, n, address, b & mask, unit)?;
            false
        }
    };
    if fails { Err(broken(cpu.state(), BROKEN).into()) } else { Ok(0) }
}
