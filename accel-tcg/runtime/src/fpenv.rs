//! The host's floating-point control register.

/// Runs `body` with the host's own MXCSR while the guest's is loaded.
#[inline]
pub fn with_host_fp<R>(body: impl FnOnce() -> R) -> R {
    let guest = swap(crate::env::MXCSR_DEFAULT);
    let result = body();
    swap(guest);
    result
}

#[cfg(target_arch = "x86_64")]
#[inline]
fn swap(new: u32) -> u32 {
    let mut old = 0_u32;
    // SAFETY: `stmxcsr` writes four bytes at a valid address; `ldmxcsr` loads a value whose reserved
    // bits are zero: the default or one that was in the register before.
    unsafe {
        std::arch::asm!(
            "stmxcsr [{old}]",
            "ldmxcsr [{new}]",
            old = in(reg) &mut old,
            new = in(reg) &new,
            options(nostack, preserves_flags)
        );
    }
    old
}

#[cfg(not(target_arch = "x86_64"))]
#[inline]
fn swap(new: u32) -> u32 {
    // Everything is interpreted here, and the interpreter keeps the guest's modes to itself.
    new
}
