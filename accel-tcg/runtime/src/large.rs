//! Where the guest has large pages in the TLB.
//!
//! The TLB holds pieces of 4 KiB. Flushing one address of a large page has to flush all of its pieces, so the
//! runtime remembers where large pages were used: not each of them, for a kernel's map of all RAM has hundreds, but a
//! few ranges that cover them. An address outside of all ranges lies in no large page.

/// Ranges that are kept apart.
const RANGES: usize = 8;
/// Ranges nearer than this are joined.
const NEAR: u64 = 64 << 20;

/// Ranges of addresses, first and last, that hold all large pages seen.
#[derive(Debug, Clone, Default)]
pub struct LargePages {
    ranges: Vec<(u64, u64)>,
}

/// The distance between two ranges; 0 if they touch.
fn gap(a: (u64, u64), b: (u64, u64)) -> u64 {
    b.0.saturating_sub(a.1).max(a.0.saturating_sub(b.1))
}

impl LargePages {
    /// Notes the page of `1 << bits` bytes that `va` lies in.
    pub fn note(&mut self, va: u64, bits: u8) {
        let low = if bits >= 64 { u64::MAX } else { (1 << bits) - 1 };
        let page = (va & !low, va | low);
        if self.ranges.iter().any(|r| r.0 <= page.0 && page.1 <= r.1) {
            return;
        }
        self.ranges.push(page);
        // The new one may close the gap between two, or be one too many.
        while let Some((distance, i, j)) = self.nearest()
            && (distance < NEAR || self.ranges.len() > RANGES)
        {
            let b = self.ranges.swap_remove(j);
            if let Some(a) = self.ranges.get_mut(i) {
                *a = (a.0.min(b.0), a.1.max(b.1));
            }
        }
    }

    /// The two ranges that are nearest to each other, and their distance.
    fn nearest(&self) -> Option<(u64, usize, usize)> {
        let pairs =
            self.ranges.iter().enumerate().flat_map(|(j, b)| {
                self.ranges.iter().take(j).enumerate().map(move |(i, a)| (gap(*a, *b), i, j))
            });
        pairs.min()
    }

    /// False if `va` lies in no large page that was noted.
    #[inline]
    pub fn may_hold(&self, va: u64) -> bool {
        self.ranges.iter().any(|r| (r.0..=r.1).contains(&va))
    }

    /// Forgets all: the TLB is empty.
    pub fn clear(&mut self) {
        self.ranges.clear();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_map_of_all_ram_is_one_range_and_far_ones_are_not_joined() {
        let mut large = LargePages::default();
        let (linear, kernel) = (0xff60_0000_0000_0000, 0xffff_ffff_8000_0000);
        for n in [5, 200, 3, 100, 101, 0, 255] {
            large.note(linear + (n << 21) + 0x1234, 21);
            large.note(kernel + ((n % 8) << 21), 21);
        }
        assert!(large.ranges.len() <= RANGES);
        for n in [5, 200, 3, 100, 0, 255] {
            assert!(large.may_hold(linear + (n << 21) + 0x1f_ffff));
        }
        assert!(large.may_hold(kernel) && large.may_hold(kernel + (7 << 21)));
        for va in [0x1000, linear - 1, linear + (256 << 21), kernel - 1, 0xff20_0000_0000_0000, u64::MAX] {
            assert!(!large.may_hold(va), "{va:#x}");
        }
        large.clear();
        assert!(!large.may_hold(linear));
    }

    #[test]
    fn any_number_of_pages_anywhere_stays_covered_by_few_ranges() {
        let mut large = LargePages::default();
        let at = |n: u64| n.wrapping_mul(0x9e37_79b9_7f4a_7c15);
        for n in 0..1000 {
            large.note(at(n), [21, 30, 39][n as usize % 3]);
            assert!(large.ranges.len() <= RANGES);
        }
        assert!((0..1000).all(|n| large.may_hold(at(n))));
        large.note(7, 64);
        assert!(large.may_hold(u64::MAX) && large.may_hold(0));
    }
}
