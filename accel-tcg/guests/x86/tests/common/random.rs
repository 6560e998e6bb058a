//! Random numbers and interesting values. Frozen: the corpus names states by their seeds.

/// xorshift64*.
#[derive(Debug, Clone)]
pub struct Random(u64);

impl Random {
    /// A generator; seeds that are close give streams that are not.
    pub fn new(seed: u64) -> Self {
        let mut z = seed.wrapping_add(0x9e37_79b9_7f4a_7c15);
        z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        Self((z ^ z >> 31) | 1)
    }

    /// 64 bits.
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    /// Below `n`.
    pub fn below(&mut self, n: u64) -> u64 {
        ((u128::from(self.next()) * u128::from(n)) >> 64) as u64
    }

    /// True in `percent` of cases.
    pub fn percent(&mut self, percent: u64) -> bool {
        self.below(100) < percent
    }

    /// One of `all`.
    pub fn pick<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len() as u64) as usize]
    }

    /// A 64-bit integer that is likely to matter.
    pub fn integer(&mut self) -> u64 {
        const EDGES: [u64; 16] = [
            0,
            1,
            u64::MAX,
            1 << 63,
            i64::MAX as u64,
            0xffff_ffff_8000_0000,
            0x7fff_ffff,
            0x8000_0000,
            0xffff_ffff,
            0x80,
            0x7f,
            0x8000,
            0x7fff,
            0xff,
            0xffff,
            0x10,
        ];
        match self.below(8) {
            0..4 => self.next(),
            4 | 5 => self.pick(&EDGES),
            6 => {
                let bit = 1u64 << self.below(64);
                bit.wrapping_add(self.below(3)).wrapping_sub(1)
            }
            _ => self.next() >> self.below(64),
        }
    }

    /// The bits of an f64.
    pub fn double(&mut self) -> u64 {
        const EDGES: [u64; 14] = [
            0,
            1 << 63,
            0x3ff0_0000_0000_0000,
            0xbff0_0000_0000_0000,
            0x7ff0_0000_0000_0000,
            0xfff0_0000_0000_0000,
            0x7ff8_0000_0000_0000,
            0xfff8_0000_0000_1234,
            0x7ff0_0000_0000_0001,
            1,
            0x000f_ffff_ffff_ffff,
            0x7fef_ffff_ffff_ffff,
            0x41df_ffff_ffff_ffff,
            0x43e0_0000_0000_0000,
        ];
        match self.below(8) {
            0 | 1 => self.pick(&EDGES),
            2 => self.next(),
            3 => ((self.next() % 2000) as f64 - 1000.0).to_bits(),
            4 => self.next() & 0x800f_ffff_ffff_ffff,
            _ => {
                let exponent = 1023 - 40 + self.below(80);
                self.next() & 0x800f_ffff_ffff_ffff | exponent << 52
            }
        }
    }

    /// The bits of an f32.
    pub fn single(&mut self) -> u32 {
        const EDGES: [u32; 14] = [
            0,
            1 << 31,
            0x3f80_0000,
            0xbf80_0000,
            0x7f80_0000,
            0xff80_0000,
            0x7fc0_0000,
            0xffc0_1234,
            0x7f80_0001,
            1,
            0x007f_ffff,
            0x7f7f_ffff,
            0x4eff_ffff,
            0x4f00_0000,
        ];
        match self.below(8) {
            0 | 1 => self.pick(&EDGES),
            2 => self.next() as u32,
            3 => ((self.next() % 2000) as f32 - 1000.0).to_bits(),
            4 => self.next() as u32 & 0x807f_ffff,
            _ => {
                let exponent = 127 - 30 + self.below(60) as u32;
                self.next() as u32 & 0x807f_ffff | exponent << 23
            }
        }
    }

    /// An x87 register: significand, sign and exponent.
    pub fn extended(&mut self) -> (u64, u16) {
        let sign = (self.next() as u16) & 0x8000;
        match self.below(10) {
            0 => (0, sign),
            1 => (1 << 63, sign | 0x7fff),
            2 => (self.next() | 3 << 62, sign | 0x7fff),
            3 => (self.next() >> 1, sign),
            4 => (self.next(), self.next() as u16),
            5 => {
                let small = self.below(1000) + 1;
                let shift = small.leading_zeros();
                (small << shift, sign | (0x3fff + 63 - shift as u16))
            }
            _ => (self.next() | 1 << 63, sign | (0x3fff - 70 + self.below(140) as u16)),
        }
    }

    /// 64 bits of a vector of some element type.
    pub fn lane(&mut self, kind: u64) -> u64 {
        match kind {
            0 => self.next(),
            1 => self.double(),
            2 => u64::from(self.single()) << 32 | u64::from(self.single()),
            3 => self.below(200) << 32 | self.below(200),
            4 => self.below(1000),
            5 => {
                let mut bytes = [0u8; 8];
                bytes.iter_mut().for_each(|b| *b = self.integer() as u8);
                u64::from_le_bytes(bytes)
            }
            _ => self.integer(),
        }
    }
}
