//! The order in which bits are looked at.

use crate::spec::Encoding;

/// A step of decoding.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Node {
    /// Nothing fits.
    Nothing,
    /// The encoding at this index, if the word has `value` in `mask` (0: it surely has), else `other`.
    Test { mask: u64, value: u64, encoding: usize, other: Box<Node> },
    /// Goes on by the value of `bits` bits from `shift`; values that are not listed fit nothing.
    Switch { shift: u32, bits: u32, arms: Vec<(u64, Node)> },
}

/// A switch looks at no more bits than this, so that it can become a jump table.
const MAX_SWITCH: u32 = 7;

/// The tree for all `encodings`.
pub(crate) fn build(encodings: &[Encoding]) -> Node {
    let all: Vec<usize> = (0..encodings.len()).collect();
    grow(encodings, &all, 0)
}

/// The longest run of ones in `mask`, at most [`MAX_SWITCH`] long: (lowest bit, length).
fn longest_run(mask: u64) -> (u32, u32) {
    let mut best = (0, 0);
    let mut at = 0;
    while at < 64 {
        let run = (mask >> at).trailing_ones().min(MAX_SWITCH);
        if run > best.1 {
            best = (at, run);
        }
        at += run.max(1);
    }
    best
}

fn grow(encodings: &[Encoding], set: &[usize], known: u64) -> Node {
    let get = |i: usize| encodings.get(i);
    let Some(&first) = set.first() else { return Node::Nothing };
    let Some(head) = get(first) else { return Node::Nothing };
    let common = set.iter().filter_map(|&i| get(i)).fold(u64::MAX, |m, e| m & e.mask) & !known;
    let (shift, bits) = longest_run(common);
    if set.len() == 1 || bits == 0 {
        // Overlapping encodings (or the last one left): in their order.
        let mask = head.mask & !known;
        let rest = if mask == 0 { &[] } else { set.get(1..).unwrap_or(&[]) };
        let other = Box::new(grow(encodings, rest, known));
        return Node::Test { mask, value: head.value & mask, encoding: first, other };
    }
    let field = (1u64 << bits) - 1;
    let mut values: Vec<u64> = set.iter().filter_map(|&i| get(i)).map(|e| e.value >> shift & field).collect();
    values.sort_unstable();
    values.dedup();
    let arms = values.into_iter().map(|value| {
        let subset: Vec<usize> = set
            .iter()
            .copied()
            .filter(|&i| get(i).is_some_and(|e| e.value >> shift & field == value))
            .collect();
        (value, grow(encodings, &subset, known | field << shift))
    });
    Node::Switch { shift, bits, arms: arms.collect() }
}
