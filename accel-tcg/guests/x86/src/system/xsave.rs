//! x87, SSE, AVX, MPX, AVX-512 and PKRU state as an XSAVE area in the standard format (SDM volume 1, section 13.4).

use holdfast_tcg_runtime::Cpu;

use super::mpx;
use crate::fpu::area;
use crate::state::X86;

const LEGACY: usize = 512;
const AVX: usize = 576;
const SIZE: usize = 832;
/// Where the bound registers are, and their configuration and status.
const BOUNDS: usize = 960;
const BOUNDS_CONFIG: usize = 1024;
/// Where the opmask registers are, the upper halves of ZMM0 to ZMM15, and ZMM16 to ZMM31.
const OPMASK: usize = 1088;
const ZMM_HIGH: usize = 1152;
const ZMM_UPPER: usize = 1664;
/// Where PKRU is, and its bit.
const PKRU: usize = 2688;
const PKRU_BIT: u64 = 1 << 9;
const MXCSR_MASK: u32 = 0xffff;

fn put(area: &mut [u8], at: usize, bytes: &[u8]) {
    if let Some(place) = area.get_mut(at..at + bytes.len()) {
        place.copy_from_slice(bytes);
    }
}

fn take<const N: usize>(area: &[u8], at: usize) -> [u8; N] {
    area.get(at..at + N).and_then(|b| b.try_into().ok()).unwrap_or([0; N])
}

fn u64_at(area: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(take(area, at))
}

/// The area: 832 bytes, 1040 with bounds, 2688 with AVX-512, 2696 with PKRU.
pub(crate) fn export(cpu: &mut Cpu<'_>) -> Vec<u8> {
    let mxcsr = crate::fpu::mxcsr(cpu);
    let s = cpu.state::<X86>();
    let mut a = vec![0; SIZE];
    let x = &s.x87;
    put(&mut a, 0, &(x.control as u16).to_le_bytes());
    put(&mut a, 2, &((x.status & !0x3800 | (x.top & 7) << 11) as u16).to_le_bytes());
    put(&mut a, 4, &[x.valid as u8]);
    put(&mut a, 6, &(x.opcode as u16).to_le_bytes());
    put(&mut a, 8, &x.ip.to_le_bytes());
    put(&mut a, 16, &x.dp.to_le_bytes());
    put(&mut a, 24, &mxcsr.to_le_bytes());
    put(&mut a, 28, &MXCSR_MASK.to_le_bytes());
    for n in 0..8 {
        // ST(n), not Rn.
        let r = x.r[(x.top as usize + n) & 7];
        put(&mut a, 32 + 16 * n, &r.significand.to_le_bytes());
        put(&mut a, 40 + 16 * n, &(r.sign_exponent as u16).to_le_bytes());
    }
    for (n, r) in s.ymm.iter().enumerate() {
        for (half, word) in r.iter().enumerate() {
            let at = if half < 2 { 160 + 16 * n + 8 * half } else { AVX + 16 * n + 8 * (half - 2) };
            put(&mut a, at, &word.to_le_bytes());
        }
    }
    // Bounds without XCR0 are in their initial state but after a change of XCR0, and cannot be seen then.
    if s.xcr0 & mpx::XCR0 != 0 {
        a.resize(BOUNDS_CONFIG + 16, 0);
        for (n, word) in s.bnd.as_flattened().iter().enumerate() {
            put(&mut a, BOUNDS + 8 * n, &word.to_le_bytes());
        }
        for (n, word) in s.bnd_user.iter().enumerate() {
            put(&mut a, BOUNDS_CONFIG + 8 * n, &word.to_le_bytes());
        }
    }
    if s.xcr0 & area::AVX512_ONLY != 0 {
        a.resize(PKRU, 0);
        let parts = [
            (OPMASK, &s.opmask[..]),
            (ZMM_HIGH, s.zmm_high.as_flattened()),
            (ZMM_UPPER, s.zmm_upper.as_flattened()),
        ];
        for (at, words) in parts {
            for (n, word) in words.iter().enumerate() {
                put(&mut a, at + 8 * n, &word.to_le_bytes());
            }
        }
    }
    if s.xcr0 & PKRU_BIT != 0 {
        a.resize(PKRU + 8, 0);
        put(&mut a, PKRU, &s.pkru.to_le_bytes());
    }
    put(&mut a, LEGACY, &(s.xcr0 & (7 | mpx::XCR0 | area::AVX512_ONLY | PKRU_BIT) | 3).to_le_bytes());
    a
}

/// Takes over an area, of a guest whose XCR0 this processor can have. Parts that its header marks as initial are initialised.
///
/// # Errors
/// A text that says what does not fit.
pub(crate) fn import(cpu: &mut Cpu<'_>, area: &[u8]) -> Result<(), String> {
    if area.is_empty() {
        return Ok(());
    }
    if area.len() < AVX {
        return Err(format!("an XSAVE area of {} bytes", area.len()));
    }
    // XCR0 is within these bits, so the guest has no other components: a KVM may hand out what its host has in use, though.
    let present = u64_at(area, LEGACY) & cpu.state::<X86>().xcr0_bits;
    let mxcsr = u32::from_le_bytes(take(area, 24));
    crate::fpu::set_mxcsr(cpu, if present & 6 != 0 { mxcsr & MXCSR_MASK } else { 0x1f80 });
    let s = cpu.state::<X86>();
    let x = &mut s.x87;
    *x = crate::state::X87 { control: 0x37f, ..crate::state::X87::default() };
    if present & 1 != 0 {
        x.control = u64::from(u16::from_le_bytes(take(area, 0)));
        let status = u64::from(u16::from_le_bytes(take(area, 2)));
        x.status = status & !0x3800;
        x.top = status >> 11 & 7;
        x.valid = u64::from(take::<1>(area, 4)[0]);
        x.opcode = u64::from(u16::from_le_bytes(take(area, 6)) & 0x7ff);
        x.ip = u64_at(area, 8);
        x.dp = u64_at(area, 16);
        for n in 0..8 {
            let r = &mut x.r[(x.top as usize + n) & 7];
            r.significand = u64_at(area, 32 + 16 * n);
            r.sign_exponent = u64::from(u16::from_le_bytes(take(area, 40 + 16 * n)));
        }
    }
    let bounds = |n: usize, bit: u64| if present & bit != 0 { u64_at(area, n) } else { 0 };
    for (n, word) in s.bnd.as_flattened_mut().iter_mut().enumerate() {
        *word = bounds(BOUNDS + 8 * n, 1 << 3);
    }
    for (n, word) in s.bnd_user.iter_mut().enumerate() {
        *word = bounds(BOUNDS_CONFIG + 8 * n, 1 << 4);
    }
    let parts = [
        (5, OPMASK, &mut s.opmask[..]),
        (6, ZMM_HIGH, s.zmm_high.as_flattened_mut()),
        (7, ZMM_UPPER, s.zmm_upper.as_flattened_mut()),
    ];
    for (bit, at, words) in parts {
        for (n, word) in words.iter_mut().enumerate() {
            *word = if present & 1 << bit != 0 { u64_at(area, at + 8 * n) } else { 0 };
        }
    }
    s.pkru = if present & PKRU_BIT != 0 { u64_at(area, PKRU) & 0xffff_ffff } else { 0 };
    for (n, r) in s.ymm.iter_mut().enumerate() {
        *r = [0; 4];
        if present & 2 != 0 {
            r[0] = u64_at(area, 160 + 16 * n);
            r[1] = u64_at(area, 168 + 16 * n);
        }
        if present & 4 != 0 {
            r[2] = u64_at(area, AVX + 16 * n);
            r[3] = u64_at(area, AVX + 16 * n + 8);
        }
    }
    Ok(())
}
