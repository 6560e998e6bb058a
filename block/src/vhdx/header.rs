//! The two headers, of which one is always whole, and checksums.

use std::io;

use crate::mapped::{bad, le16, le32, le64, put, read_part};
use crate::{BlockError, BlockNode};

const PLACES: [u64; 2] = [64 << 10, 128 << 10];
/// Bytes of a header.
const LEN: u64 = 4096;

const fn table() -> [u32; 256] {
    let mut out = [0; 256];
    let mut n = 0;
    while n < 256 {
        let (mut crc, mut bit) = (n as u32, 0);
        while bit < 8 {
            crc = crc >> 1 ^ (0x82f6_3b78 & (crc & 1).wrapping_neg());
            bit += 1;
        }
        out[n] = crc;
        n += 1;
    }
    out
}

static TABLE: [u32; 256] = table();

/// CRC-32C (Castagnoli), with the four bytes from `skip` on taken as zeroes.
pub(super) fn crc32c(b: &[u8], skip: usize) -> u32 {
    let step = |crc: u32, (n, byte): (usize, &u8)| {
        let byte = if (skip..skip + 4).contains(&n) { 0 } else { *byte };
        crc >> 8 ^ TABLE.get((crc as u8 ^ byte) as usize).copied().unwrap_or(0)
    };
    !b.iter().enumerate().fold(!0, step)
}

/// True if a structure with its checksum at byte 4 is whole.
pub(super) fn whole(b: &[u8]) -> bool {
    crc32c(b, 4) == le32(b, 4)
}

/// Puts the checksum of a structure at its byte 4.
pub(super) fn seal(b: &mut [u8]) {
    let sum = crc32c(b, 4);
    put(b, 4, &sum.to_le_bytes());
}

pub(super) fn guid_at(b: &[u8], at: usize) -> u128 {
    u128::from(le64(b, at)) | u128::from(le64(b, at + 8)) << 64
}

/// The header that counts.
#[derive(Debug, Clone)]
pub(super) struct Header {
    /// Its bytes, with what is not known here.
    bytes: Vec<u8>,
    /// Which of the two it is.
    slot: usize,
    sequence: u64,
    /// What log entries must have to count; 0 if there is no log.
    pub(super) log_guid: u128,
    /// Where the log is, and how long.
    pub(super) log: (u64, u64),
}

impl Header {
    /// Reads the header that counts.
    pub(super) fn read(file: &dyn BlockNode) -> Result<Self, BlockError> {
        let mut best: Option<(u64, usize, Vec<u8>)> = None;
        for (slot, at) in PLACES.into_iter().enumerate() {
            let h = read_part(file, at, LEN, "Could not read the VHDX header")?;
            let newer = best.as_ref().is_none_or(|(n, ..)| *n < le64(&h, 8));
            if h.starts_with(b"head") && newer && whole(&h) {
                best = Some((le64(&h, 8), slot, h));
            }
        }
        let Some((sequence, slot, bytes)) = best else { return bad("No valid VHDX header found") };
        if le16(&bytes, 66) != 1 {
            let text = format!("VHDX version {} is not supported", le16(&bytes, 66));
            return Err(BlockError::Unsupported(text));
        }
        let log = (le64(&bytes, 72), u64::from(le32(&bytes, 68)));
        let log_guid = guid_at(&bytes, 48);
        if log_guid != 0 && le16(&bytes, 64) != 0 {
            let text = format!("VHDX log of version {} is not supported", le16(&bytes, 64));
            return Err(BlockError::Unsupported(text));
        }
        Ok(Self { bytes, slot, sequence, log_guid, log })
    }

    /// The header of a new image.
    pub(super) fn new(log: (u64, u64), guids: [[u8; 16]; 2]) -> Self {
        let mut bytes = vec![0; LEN as usize];
        put(&mut bytes, 0, b"head");
        put(&mut bytes, 16, &guids[0]);
        put(&mut bytes, 32, &guids[1]);
        put(&mut bytes, 66, &1u16.to_le_bytes());
        put(&mut bytes, 68, &(log.1 as u32).to_le_bytes());
        put(&mut bytes, 72, &log.0.to_le_bytes());
        Self { bytes, slot: 1, sequence: 0, log_guid: 0, log }
    }

    /// Says that the file and its contents change from now on.
    pub(super) fn touch(&mut self, guids: [[u8; 16]; 2]) {
        put(&mut self.bytes, 16, &guids[0]);
        put(&mut self.bytes, 32, &guids[1]);
    }

    /// Writes both headers, one after the other is durable.
    pub(super) fn store(&mut self, file: &dyn BlockNode) -> io::Result<()> {
        put(&mut self.bytes, 48, &self.log_guid.to_le_bytes());
        for _ in PLACES {
            self.slot ^= 1;
            self.sequence = self.sequence.wrapping_add(1);
            put(&mut self.bytes, 8, &self.sequence.to_le_bytes());
            seal(&mut self.bytes);
            file.write_at(PLACES.get(self.slot).copied().unwrap_or_default(), &self.bytes)?;
            file.flush()?;
        }
        Ok(())
    }
}
