//! RAM in huge pages, which the host brings in whole: parts wait until all of a page are here.

use std::collections::HashMap;

use holdfast_memory::PAGE_SIZE;

/// Huge pages of which something has come, by guest-physical address. Never more than RAM is long.
#[derive(Debug, Default)]
pub(crate) struct Gathered(HashMap<u64, Part>);

#[derive(Debug)]
struct Part {
    data: Vec<u8>,
    /// Which pages have come.
    there: Vec<bool>,
    lacks: usize,
}

impl Gathered {
    /// `len` bytes at `offset` of the page of `unit` bytes at `start` have come: `data`, or zeroes if that is empty. Offset and
    /// length are whole pages within it. Returns the page once it is whole.
    pub(crate) fn add(
        &mut self,
        start: u64,
        unit: u64,
        offset: u64,
        len: u64,
        data: &[u8],
    ) -> Option<Vec<u8>> {
        let pages = (unit / PAGE_SIZE) as usize;
        let new = || Part { data: vec![0; unit as usize], there: vec![false; pages], lacks: pages };
        let part = self.0.entry(start).or_insert_with(new);
        let place = part.data.get_mut(offset as usize..(offset + len) as usize)?;
        if data.is_empty() {
            place.fill(0);
        } else {
            place.copy_from_slice(data.get(..place.len())?);
        }
        let range = (offset / PAGE_SIZE) as usize..((offset + len) / PAGE_SIZE) as usize;
        for there in part.there.get_mut(range)? {
            part.lacks -= usize::from(!std::mem::replace(there, true));
        }
        if part.lacks > 0 {
            return None;
        }
        self.0.remove(&start).map(|part| part.data)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_whole_when_all_of_it_has_come() {
        let (mut gathered, unit) = (Gathered::default(), 4 * PAGE_SIZE);
        let page = |byte| vec![byte; PAGE_SIZE as usize];
        assert_eq!(gathered.add(0, unit, PAGE_SIZE, PAGE_SIZE, &page(7)), None);
        assert_eq!(gathered.add(unit, unit, 0, 2 * PAGE_SIZE, &[]), None, "another one");
        // Some came over both connections.
        assert_eq!(gathered.add(0, unit, 0, 2 * PAGE_SIZE, &[page(6), page(7)].concat()), None);
        let whole = gathered.add(0, unit, 2 * PAGE_SIZE, 2 * PAGE_SIZE, &[]).expect("all is there");
        assert_eq!(whole, [page(6), page(7), page(0), page(0)].concat());
        assert_eq!(gathered.add(0, unit, 3 * PAGE_SIZE, 2 * PAGE_SIZE, &[]), None, "outside");
    }
}
