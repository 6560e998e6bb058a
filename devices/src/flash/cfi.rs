//! What one chip says of itself.

use super::Chips;

/// Bytes of the query table, primary vendor table included.
pub(super) const LEN: usize = 0x40;

/// Manufacturer: Intel.
const MANUFACTURER: u8 = 0x89;
/// Device: a 16 MiB StrataFlash part.
const DEVICE: u8 = 0x18;

/// The query table (JESD68.01, section 4) of one of `chips` that make a bank of `size` bytes with a write buffer of
/// `buffer` bytes, a power of two. The table's size is a power of two: that of the bank or the next larger one.
pub(super) fn query(chips: Chips, size: u64, buffer: u64) -> [u8; LEN] {
    let log2 = |n: u64| n.max(1).next_power_of_two().ilog2() as u8;
    let (size, block, buffer) = (size / chips.count(), chips.block() / chips.count(), buffer / chips.count());
    let [blocks_low, blocks_high] = ((size / block).saturating_sub(1) as u16).to_le_bytes();
    let [size_low, size_high] = ((block / 256) as u16).to_le_bytes();
    let mut t = [0; LEN];
    t[0x10..0x13].copy_from_slice(b"QRY");
    // Primary command set 0x0001, its table at 0x31; no alternate one.
    t[0x13] = 0x01;
    t[0x15] = 0x31;
    // 4.5 to 5.5 V, no programming voltage.
    (t[0x1b], t[0x1c]) = (0x45, 0x55);
    // Typical times, two to the n: word and buffer 128 us, block erase 1 s; at most 16 times that.
    (t[0x1f], t[0x20], t[0x21]) = (7, 7, 10);
    (t[0x23], t[0x24], t[0x25]) = (4, 4, 4);
    t[0x27] = log2(size);
    // An interface of 16 bits, or of 8.
    t[0x28] = u8::from(chips == Chips::Pair16);
    t[0x2a] = log2(buffer);
    // One region of equal blocks.
    t[0x2c] = 1;
    (t[0x2d], t[0x2e], t[0x2f], t[0x30]) = (blocks_low, blocks_high, size_low, size_high);
    // Intel's extended table, version 1.0, without optional features.
    t[0x31..0x36].copy_from_slice(b"PRI10");
    t
}

/// What a chip answers in identifier mode at `word` (its own words), with blocks of `block` words.
pub(super) fn identifier(word: u64, block: u64, locked: bool) -> u8 {
    match word % block {
        0 => MANUFACTURER,
        1 => DEVICE,
        2 => u8::from(locked),
        _ => 0,
    }
}
