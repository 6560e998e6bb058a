//! The C library's allocator, which would open files behind our back.

/// Arenas of the allocator. Threads keep small blocks to themselves anyway.
const ARENAS: libc::c_int = 1;

/// Fixes the number of arenas. Left to itself, glibc opens a file under `/sys` on whichever thread first wants
/// one arena more than it likes, to count the host's CPUs, and one under `/proc` on whichever first gives memory
/// of a further arena back; no thread's allow-list has that.
pub fn fix_arenas() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets a number of the allocator, under the allocator's own lock.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, ARENAS);
    }
}
