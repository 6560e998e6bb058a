//! Physical memory protection (privileged specification, section 3.7). Granularity is 4 bytes.

use crate::hart::{Hart, MAX_PMP, privilege};

/// Bits of a configuration byte.
pub mod cfg {
    /// Reads allowed.
    pub const R: u8 = 1;
    /// Writes allowed.
    pub const W: u8 = 2;
    /// Fetches allowed.
    pub const X: u8 = 4;
    /// Address matching, two bits: off, TOR, NA4, NAPOT.
    pub const A: u8 = 3 << 3;
    /// Top of range.
    pub const TOR: u8 = 1 << 3;
    /// Naturally aligned four bytes.
    pub const NA4: u8 = 2 << 3;
    /// Naturally aligned power of two.
    pub const NAPOT: u8 = 3 << 3;
    /// Locked, and binding for M-mode.
    pub const L: u8 = 1 << 7;
    /// Bits that exist.
    pub const ALL: u8 = R | W | X | A | L;
}

/// Bits of an address register that exist: physical addresses have 56 bits.
pub const ADDR_MASK: u64 = (1 << 54) - 1;

/// What PMP says of an access.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Verdict {
    /// Allowed: bits of [`mod@cfg`].
    pub allowed: u8,
    /// The same holds for all of the 4 KiB page.
    pub whole_page: bool,
}

const RWX: u8 = cfg::R | cfg::W | cfg::X;

fn count(hart: &Hart) -> usize {
    (hart.pmp_entries as usize).min(MAX_PMP)
}

fn config(hart: &Hart, i: usize) -> u8 {
    hart.pmpcfg.get(i).copied().unwrap_or(0)
}

fn address(hart: &Hart, i: usize) -> u64 {
    hart.pmpaddr.get(i).copied().unwrap_or(0)
}

/// The bytes that entry `i` matches: first and last; `None` if none.
fn range(hart: &Hart, i: usize) -> Option<(u64, u64)> {
    let addr = address(hart, i);
    match config(hart, i) & cfg::A {
        cfg::TOR => {
            let from = if i == 0 { 0 } else { address(hart, i - 1) };
            (from < addr).then(|| (from << 2, (addr << 2) - 1))
        }
        cfg::NA4 => Some((addr << 2, addr << 2 | 3)),
        cfg::NAPOT => {
            let ones = addr.trailing_ones().min(53);
            let low = (1u64 << (ones + 3)) - 1;
            let first = (addr << 2) & !low;
            Some((first, first | low))
        }
        _ => None,
    }
}

fn verdict(cfg_byte: u8, mode: u64, whole_page: bool) -> Verdict {
    let bound = mode != privilege::M || cfg_byte & cfg::L != 0;
    Verdict { allowed: if bound { cfg_byte & RWX } else { RWX }, whole_page }
}

/// Checks `size` bytes at `gpa` for an access of privilege `mode`. Without any entry implemented all is
/// allowed; else what no entry matches is M-mode's alone (section 3.7.1, "Priority and Matching Logic").
pub fn check(hart: &Hart, gpa: u64, size: u64, mode: u64) -> Verdict {
    if hart.pmp_entries == 0 {
        return Verdict { allowed: RWX, whole_page: true };
    }
    let (page, page_end) = (gpa & !0xfff, gpa | 0xfff);
    if page >= hart.pmp_open[0] && page_end.max(gpa.saturating_add(size)) <= hart.pmp_open[1] {
        return Verdict { allowed: RWX, whole_page: true };
    }
    let last = gpa.saturating_add(size.max(1) - 1);
    let mut whole_page = true;
    for i in 0..(hart.pmp_active as usize).min(MAX_PMP) {
        let Some((from, to)) = range(hart, i) else { continue };
        if to < page || from > last.max(page_end) {
            continue;
        }
        whole_page &= from <= page && to >= page_end;
        if to < gpa || from > last {
            continue;
        }
        if from > gpa || to < last {
            // It matches a part of the access only: that fails whatever it says.
            return Verdict { allowed: 0, whole_page: false };
        }
        return verdict(config(hart, i), mode, whole_page);
    }
    Verdict { allowed: if mode == privilege::M { RWX } else { 0 }, whole_page }
}

/// Reads `pmpcfgN`, N even.
pub fn read_cfg(hart: &Hart, n: usize) -> u64 {
    (0..8).fold(0, |v, i| v | u64::from(config(hart, n * 4 + i)) << (8 * i))
}

/// Writes `pmpcfgN`, N even. Locked entries keep their value.
pub fn write_cfg(hart: &mut Hart, n: usize, value: u64) {
    let entries = count(hart);
    for (i, byte) in value.to_le_bytes().into_iter().enumerate() {
        let entry = n * 4 + i;
        if entry >= entries {
            break;
        }
        if let Some(slot) = hart.pmpcfg.get_mut(entry)
            && *slot & cfg::L == 0
        {
            let mut byte = byte & cfg::ALL;
            if byte & (cfg::R | cfg::W) == cfg::W {
                byte &= !cfg::W; // reserved combination
            }
            *slot = byte;
        }
    }
    let active = hart.pmpcfg.iter().rposition(|c| c & cfg::A != 0).map_or(0, |last| last + 1);
    hart.pmp_active = active as u64;
    hart.pmp_open = open_area(hart);
}

/// The largest area in which the first entry that matches allows everything. Kernels have their RAM there, and what is in it needs
/// no search.
fn open_area(hart: &Hart) -> [u64; 2] {
    let ranges: Vec<Option<(u64, u64)>> =
        (0..(hart.pmp_active as usize).min(MAX_PMP)).map(|i| range(hart, i)).collect();
    let mut largest = [1_u64, 0];
    for (i, &whole) in ranges.iter().enumerate() {
        let Some(whole) = whole.filter(|_| config(hart, i) & RWX == RWX) else { continue };
        let mut parts = vec![whole];
        for &(from, to) in ranges.iter().take(i).flatten() {
            parts = parts.into_iter().flat_map(|part| without(part, (from, to))).collect();
        }
        for (from, to) in parts {
            if to - from > largest[1].saturating_sub(largest[0]) {
                largest = [from, to];
            }
        }
    }
    largest
}

/// What is left of `part` without `hole`; both with first and last byte.
fn without(part: (u64, u64), hole: (u64, u64)) -> impl Iterator<Item = (u64, u64)> {
    let below = (part.0 < hole.0).then(|| (part.0, part.1.min(hole.0.saturating_sub(1))));
    let above = (part.1 > hole.1).then(|| (part.0.max(hole.1.saturating_add(1)), part.1));
    [below, above].into_iter().flatten()
}

/// Writes `pmpaddrN`. It is locked with its own entry, and with the next one if that is TOR.
pub fn write_addr(hart: &mut Hart, n: usize, value: u64) {
    let next = config(hart, n + 1);
    let locked = config(hart, n) & cfg::L != 0 || next & cfg::L != 0 && next & cfg::A == cfg::TOR;
    if n < count(hart)
        && !locked
        && let Some(slot) = hart.pmpaddr.get_mut(n)
    {
        *slot = value & ADDR_MASK;
        hart.pmp_open = open_area(hart);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::hart::reset_state;
    use privilege::{M, S, U};

    fn allowed(hart: &Hart, gpa: u64, size: u64, mode: u64) -> u8 {
        check(hart, gpa, size, mode).allowed
    }

    #[test]
    fn without_a_match_only_machine_mode_passes_unless_nothing_is_implemented() {
        let mut hart = reset_state();
        assert_eq!(check(&hart, 0x8000_0000, 8, M), Verdict { allowed: RWX, whole_page: true });
        assert_eq!(allowed(&hart, 0x8000_0000, 8, S), 0);
        hart.pmp_entries = 0;
        assert_eq!(check(&hart, 0x8000_0000, 8, U), Verdict { allowed: RWX, whole_page: true });
        write_addr(&mut hart, 0, 5);
        write_cfg(&mut hart, 0, 0xff);
        assert_eq!((hart.pmpaddr[0], read_cfg(&hart, 0)), (0, 0));
    }

    #[test]
    fn the_first_match_decides_and_must_match_all_bytes() {
        let mut hart = reset_state();
        write_addr(&mut hart, 0, 0x8000_1000 >> 2);
        write_addr(&mut hart, 1, 0x8000_2000 >> 2 | 0x1ff); // 4 KiB
        write_addr(&mut hart, 2, u64::MAX); // everything
        write_cfg(
            &mut hart,
            0,
            u64::from(cfg::NA4 | cfg::R)
                | u64::from(cfg::NAPOT | cfg::R | cfg::X) << 8
                | u64::from(cfg::NAPOT | RWX) << 16,
        );
        assert_eq!(hart.pmpaddr[2], ADDR_MASK);
        assert_eq!(check(&hart, 0x8000_1000, 4, S), Verdict { allowed: cfg::R, whole_page: false });
        assert_eq!(check(&hart, 0x8000_1000, 8, S), Verdict { allowed: 0, whole_page: false });
        assert_eq!(allowed(&hart, 0x8000_1000, 8, M), 0, "a part of an access fails for M-mode too");
        assert_eq!(check(&hart, 0x8000_1004, 4, U), Verdict { allowed: RWX, whole_page: false });
        assert_eq!(check(&hart, 0x8000_2008, 8, U), Verdict { allowed: cfg::R | cfg::X, whole_page: true });
        assert_eq!(allowed(&hart, 0x8000_2008, 8, M), RWX);
        assert_eq!(check(&hart, 0x9000_0000, 8, U), Verdict { allowed: RWX, whole_page: true });
    }

    #[test]
    fn top_of_range_and_locks() {
        let mut hart = reset_state();
        write_addr(&mut hart, 0, 0x8000_0000 >> 2);
        write_addr(&mut hart, 1, 0x8000_4000 >> 2);
        write_cfg(&mut hart, 0, u64::from(cfg::L | cfg::TOR | cfg::R) << 8);
        assert_eq!(check(&hart, 0x8000_3ff8, 8, M), Verdict { allowed: cfg::R, whole_page: true });
        assert_eq!(allowed(&hart, 0x8000_4000, 8, S), 0);
        write_addr(&mut hart, 0, 0);
        write_addr(&mut hart, 1, 0);
        write_cfg(&mut hart, 0, 0);
        assert_eq!(hart.pmpaddr[0], 0x2000_0000, "locked with the entry above it");
        assert_eq!(hart.pmpaddr[1], 0x2000_1000);
        assert_eq!(read_cfg(&hart, 0), u64::from(cfg::L | cfg::TOR | cfg::R) << 8);
        write_cfg(&mut hart, 2, u64::from(cfg::W));
        assert_eq!(read_cfg(&hart, 2), 0, "write without read is reserved");
    }

    #[test]
    fn what_lies_in_the_open_area_needs_no_search() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let mut open = 0;
        for _ in 0..2_000 {
            let mut hart = reset_state();
            for n in 0..6 {
                // Some small, some large, most near each other.
                let ones = (1 << (next() % 40)) - 1;
                let addr = 0x2000_0000 + next() % 0x4000;
                write_addr(&mut hart, n, if n == 5 { u64::MAX } else { addr & !ones | ones >> 1 });
            }
            let everything = u64::from(cfg::NAPOT | RWX) << 40;
            let others = next() & 0x1f_1f1f_1f1f;
            write_cfg(&mut hart, 0, others | (everything * (next() & 1)));
            let mut searched = hart.clone();
            searched.pmp_open = [1, 0];
            for _ in 0..50 {
                let (gpa, size) = ((0x2000_0000 + next() % 0x4400) << 2 | next() & 3, 1 << (next() % 5));
                for mode in [U, S, M] {
                    assert_eq!(
                        check(&hart, gpa, size, mode),
                        check(&searched, gpa, size, mode),
                        "{gpa:#x} {hart:x?}"
                    );
                }
                open += usize::from((hart.pmp_open[0]..=hart.pmp_open[1]).contains(&gpa));
            }
        }
        assert!(open > 1_000, "{open} accesses in open areas");
    }

    #[test]
    fn firmware_at_the_start_of_ram_leaves_the_rest_open() {
        let mut hart = reset_state();
        write_addr(&mut hart, 0, 0x8000_0000 >> 2 | 0x7fff); // 256 KiB
        write_addr(&mut hart, 1, u64::MAX);
        write_cfg(&mut hart, 0, u64::from(cfg::NAPOT) | u64::from(cfg::NAPOT | RWX) << 8);
        assert_eq!(hart.pmp_open, [0x8004_0000, (1 << 56) - 1]);
        write_addr(&mut hart, 0, 0);
        assert_eq!(hart.pmp_open, [8, (1 << 56) - 1]);
        write_cfg(&mut hart, 0, 0);
        assert_eq!(hart.pmp_open, [1, 0]);
    }
}
