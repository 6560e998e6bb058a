//! Exceptions, flags, and the widest atomic.

use holdfast_tcg_runtime::{AccessKind, Cpu, HelperResult};

use crate::flags;
use crate::state::X86;
use crate::system::fault;

/// (vector, error code or -1, pc): raises an exception of the instruction at `pc`.
pub(crate) fn raise(cpu: &mut Cpu<'_>, [vector, code, pc, ..]: [u64; 5]) -> HelperResult {
    cpu.set_pc(pc);
    let fault =
        if code as i64 == -1 { fault::plain(vector as u8) } else { fault::coded(vector as u8, code as u32) };
    Err(fault.into())
}

/// The status flags.
pub(crate) fn status(cpu: &mut Cpu<'_>, _: [u64; 5]) -> u64 {
    flags::status(cpu.state())
}

/// 1 if a condition holds.
pub(crate) fn holds(cpu: &mut Cpu<'_>, [code, ..]: [u64; 5]) -> u64 {
    u64::from(flags::holds(code as u8, flags::status(cpu.state())))
}

/// CMPXCHG16B at an aligned address; 1 if it was equal. ZF is the caller's.
pub(crate) fn cmpxchg16b(cpu: &mut Cpu<'_>, [at, idx, ..]: [u64; 5]) -> HelperResult {
    let idx = idx as u8;
    let join = |high: u64, low: u64| u128::from(high) << 64 | u128::from(low);
    let s = cpu.state::<X86>();
    let [rax, rcx, rdx, rbx, ..] = s.gpr;
    let (expected, new) = (join(rdx, rax), join(rcx, rbx));
    let old = match cpu.host_range(at, 16, AccessKind::Write, idx)? {
        Some(host) => wide_compare_exchange(host, expected, new),
        None => {
            // Devices and pages with code: nobody can tell that it is not one access.
            let old = join(cpu.load(at.wrapping_add(8), 8, idx)?, cpu.load(at, 8, idx)?);
            let value = if old == expected { new } else { old };
            cpu.store(at, 8, idx, value as u64)?;
            cpu.store(at.wrapping_add(8), 8, idx, (value >> 64) as u64)?;
            old
        }
    };
    if old != expected {
        let s = cpu.state::<X86>();
        s.gpr[0] = old as u64;
        s.gpr[2] = (old >> 64) as u64;
    }
    Ok(u64::from(old == expected))
}

#[cfg(target_arch = "x86_64")]
fn wide_compare_exchange(host: *mut u8, expected: u128, new: u128) -> u128 {
    if std::is_x86_feature_detected!("cmpxchg16b") {
        let (mut low, mut high) = (expected as u64, (expected >> 64) as u64);
        // SAFETY: the host has the instruction; the pointer is to 16 bytes of guest RAM, aligned like the guest address.
        // rbx, which the compiler keeps for itself, is exchanged and put back.
        unsafe {
            std::arch::asm!(
                "xchg rbx, rsi",
                "lock cmpxchg16b [rdi]",
                "mov rbx, rsi",
                inout("rsi") new as u64 => _,
                in("rdi") host,
                in("rcx") (new >> 64) as u64,
                inout("rax") low,
                inout("rdx") high,
                options(nostack),
            );
        }
        return u128::from(high) << 64 | u128::from(low);
    }
    plain_compare_exchange(host, expected, new)
}

#[cfg(not(target_arch = "x86_64"))]
fn wide_compare_exchange(host: *mut u8, expected: u128, new: u128) -> u128 {
    plain_compare_exchange(host, expected, new)
}

/// For hosts without such an instruction: not atomic against other vCPUs.
fn plain_compare_exchange(host: *mut u8, expected: u128, new: u128) -> u128 {
    let at = host.cast::<u128>();
    // SAFETY: 16 bytes of guest RAM, aligned like the guest address; volatile because others may write it.
    let old = unsafe { at.read_volatile() };
    if old == expected {
        // SAFETY: as above.
        unsafe { at.write_volatile(new) };
    }
    old
}
