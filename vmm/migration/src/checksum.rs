//! A checksum that keeps up with the network: four lanes of multiply and rotate over 64-bit words. It finds accidents and
//! careless tampering; against an attacker there is TLS.

const PRIMES: [u64; 4] =
    [0x9e37_79b1_85eb_ca87, 0xc2b2_ae3d_27d4_eb4f, 0x1656_67b1_9e37_79f9, 0x85eb_ca77_c2b2_ae63];

fn word(bytes: &[u8]) -> u64 {
    let mut le = [0; 8];
    for (to, from) in le.iter_mut().zip(bytes) {
        *to = *from;
    }
    u64::from_le_bytes(le)
}

/// The checksum of `head` followed by `data`.
pub fn checksum(head: &[u8; 16], data: &[u8]) -> u64 {
    let mut lanes = PRIMES;
    lanes[0] ^= word(&head[..8]);
    lanes[1] ^= word(&head[8..]);
    let (blocks, rest) = data.as_chunks::<32>();
    for block in blocks {
        let (words, _) = block.as_chunks::<8>();
        for ((lane, prime), bytes) in lanes.iter_mut().zip(PRIMES).zip(words) {
            *lane = (*lane ^ u64::from_le_bytes(*bytes)).wrapping_mul(prime).rotate_left(31);
        }
    }
    for (bytes, lane) in rest.chunks(8).zip(&mut lanes) {
        *lane = (*lane ^ word(bytes)).wrapping_mul(PRIMES[0]).rotate_left(29);
    }
    let mut sum = (data.len() as u64).wrapping_mul(PRIMES[2]);
    for lane in lanes {
        sum = (sum ^ lane).wrapping_mul(PRIMES[1]);
        sum ^= sum >> 32;
    }
    sum
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_bit_counts() {
        let mut data: Vec<u8> = (0..200u8).collect();
        let whole = checksum(&[7; 16], &data);
        for i in 0..data.len() {
            for bit in 0..8 {
                data[i] ^= 1 << bit;
                assert_ne!(checksum(&[7; 16], &data), whole, "byte {i} bit {bit}");
                data[i] ^= 1 << bit;
            }
        }
        for i in 0..16 {
            let mut head = [7; 16];
            head[i] ^= 1;
            assert_ne!(checksum(&head, &data), whole, "head byte {i}");
        }
        assert_ne!(checksum(&[7; 16], &data[..199]), whole);
        data.push(0);
        assert_ne!(checksum(&[7; 16], &data), whole, "a zero at the end");
    }
}
