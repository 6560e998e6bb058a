//! Pages without their empty lines, as [`Kind::Sparse`](crate::frame::Kind::Sparse) carries them.

use holdfast_memory::PAGE_SIZE;

use crate::MigrationError;
use crate::frame::MAX_RAM;

/// Bytes of a line.
const LINE: usize = 64;
/// Bytes of a page.
const PAGE: usize = PAGE_SIZE as usize;
const _: () = assert!(PAGE / LINE == 64);
/// Bytes of a page's mask.
pub(crate) const MASK: usize = 8;

/// Which lines of `page` are not all zeroes; bit 0 is the first.
pub(crate) fn mask(page: &[u8; PAGE]) -> u64 {
    let (lines, _) = page.as_chunks::<LINE>();
    // From the last one on, so that each takes but one shift by one.
    lines.iter().rev().fold(0, |mask, line| mask << 1 | u64::from(!is_empty(line)))
}

fn is_empty(line: &[u8; LINE]) -> bool {
    let (words, _) = line.as_chunks::<8>();
    words.iter().fold(0, |all, word| all | u64::from_ne_bytes(*word)) == 0
}

/// Leaves the empty lines out of the page that begins behind the first [`MASK`] bytes of `place`, whose mask is `mask` and goes there.
/// Returns how many bytes it takes then.
pub(crate) fn pack(place: &mut [u8], mask: u64) -> usize {
    let Some((head, page)) = place.split_first_chunk_mut::<MASK>() else { return 0 };
    *head = mask.to_le_bytes();
    if mask != u64::MAX {
        let (lines, _) = page.as_chunks_mut::<LINE>();
        let mut next = 0;
        for n in 0..lines.len().min(64) {
            if mask >> n & 1 != 0 {
                if let Some(line) = lines.get(n).copied()
                    && let Some(to) = lines.get_mut(next)
                {
                    *to = line;
                }
                next += 1;
            }
        }
    }
    MASK + mask.count_ones() as usize * LINE
}

/// Puts their masks between the `count` pages at the start of `place`, of which no line is empty, and moves the page behind them as far.
pub(crate) fn loosen(place: &mut [u8], count: usize) {
    for n in (0..=count).rev() {
        let to = n * (MASK + PAGE);
        if place.len() < to + MASK + PAGE {
            return;
        }
        place.copy_within(n * PAGE..(n + 1) * PAGE, to + MASK);
        if let Some(mask) = place.get_mut(to..to + MASK) {
            mask.fill(0xff);
        }
    }
}

/// Gives `put` each page out of the payload of a frame; returns how many there were.
///
/// # Errors
/// [`MigrationError::Protocol`] if it is none; those of `put`.
pub(crate) fn for_each(
    mut payload: &[u8],
    mut put: impl FnMut(&[u8; PAGE]) -> Result<(), MigrationError>,
) -> Result<u64, MigrationError> {
    let wrong = || MigrationError::Protocol("sparse RAM that makes no sense".into());
    let (mut page, mut count) = ([0; PAGE], 0);
    while let Some((mask, rest)) = payload.split_first_chunk::<8>() {
        let mask = u64::from_le_bytes(*mask);
        let (lines, rest) = rest.split_at_checked(mask.count_ones() as usize * LINE).ok_or_else(wrong)?;
        if count >= (MAX_RAM / PAGE) as u64 {
            return Err(wrong());
        }
        payload = rest;
        count += 1;
        if let Ok(whole) = lines.try_into() {
            put(whole)?;
            continue;
        }
        let mut lines = lines.as_chunks::<LINE>().0.iter();
        for (n, to) in page.as_chunks_mut::<LINE>().0.iter_mut().enumerate() {
            *to = *(if mask >> n & 1 != 0 { lines.next() } else { None }).unwrap_or(&[0; LINE]);
        }
        put(&page)?;
    }
    if payload.is_empty() && count > 0 { Ok(count) } else { Err(wrong()) }
}

/// Whole pages out of the payload of a frame.
///
/// # Errors
/// [`MigrationError::Protocol`] if it is none.
pub(crate) fn expand(payload: &[u8]) -> Result<Vec<u8>, MigrationError> {
    let mut pages = Vec::with_capacity(payload.len());
    for_each(payload, |page| {
        pages.extend_from_slice(page);
        Ok(())
    })?;
    Ok(pages)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_byte_of_a_line_counts() {
        for at in (0..PAGE).step_by(7) {
            let mut page = [0; PAGE];
            page[at] = 1;
            assert_eq!(mask(&page), 1 << (at / LINE), "{at}");
            let mut page = [1; PAGE];
            let line = at / LINE * LINE;
            page[line..line + LINE].fill(0);
            assert_eq!(mask(&page), !(1 << (at / LINE)), "all but the line of {at}");
            page[at] = 1;
            assert_eq!(mask(&page), u64::MAX, "{at}");
        }
    }

    #[test]
    fn pages_come_back_whole() {
        let mut pages = [[0_u8; PAGE]; 4];
        pages[0].fill(7);
        pages[1][4095] = 1;
        pages[2][64..192].fill(9);
        let mut payload = Vec::new();
        for page in &pages {
            let mut place = [&[0; MASK][..], page].concat();
            let len = pack(&mut place, mask(page));
            payload.extend_from_slice(&place[..len]);
        }
        // A page, a line, two lines, none.
        assert_eq!(payload.len(), 4 * 8 + PAGE + 3 * LINE);
        assert_eq!(expand(&payload).expect("ours"), pages.concat());
        for cut in 1..payload.len() {
            let whole = [8 + PAGE, 16 + PAGE + LINE, 24 + PAGE + 3 * LINE].contains(&cut);
            assert_eq!(expand(&payload[..cut]).is_ok(), whole, "{cut}");
        }
        // Whole pages, found out too late that another has empty lines.
        let whole = [[1_u8; PAGE], [2; PAGE]].concat();
        let mut place = [&whole[..], &pages[2], &[0; 3 * MASK]].concat();
        loosen(&mut place, 2);
        let begin = 2 * (MASK + PAGE);
        let len = pack(&mut place[begin..], mask(&pages[2]));
        assert_eq!(len, MASK + 2 * LINE);
        assert_eq!(expand(&place[..begin + len]).expect("ours"), [&whole[..], &pages[2]].concat());
        expand(&[]).expect_err("nothing");
        expand(&[0; MAX_RAM / 512]).expect("as much as there may be");
        expand(&[0; MAX_RAM / 512 + 8]).expect_err("too much");
    }
}
