//! Programs of register accesses, read from bytes.

use holdfast_device::Bus;

use crate::rig::Rig;

/// One access of 12 bytes: what (4 bits) and size (3 bits), window, 16 bits of offset, 64 of value.
#[derive(Debug, Clone, Copy)]
pub struct Step {
    /// What is done: 0 to 15.
    pub what: u8,
    /// Bytes of the access: mostly 1, 2, 4 or 8.
    pub size: usize,
    /// Where.
    pub window: usize,
    /// The offset there.
    pub offset: u64,
    /// What is written.
    pub value: [u8; 8],
}

/// The steps in `data`, at most 256.
pub fn steps(data: &[u8]) -> impl Iterator<Item = Step> {
    data.chunks_exact(12).take(256).map(|c| {
        let size = [1, 2, 4, 8, 4, 1, 3, 7][usize::from(c[0] >> 4 & 7)];
        let value: [u8; 8] = c[4..].try_into().expect("8 bytes");
        let offset = u64::from(u16::from_le_bytes([c[2], c[3]]));
        Step { what: c[0] & 15, size, window: usize::from(c[1]), offset, value }
    })
}

/// Runs steps as accesses to the windows of a bus that `wanted` names.
pub fn access_windows(rig: &Rig, bus: &Bus, wanted: impl Fn(&str) -> bool, data: &[u8]) {
    let windows: Vec<_> = bus.windows().into_iter().filter(|w| wanted(&w.name)).collect();
    for step in steps(data) {
        let window = &windows[step.window % windows.len()];
        // Wide windows have their registers far apart: the low four bits of `what` reach there.
        let wide = u64::from(step.what >> 2) << 16 << (step.what & 3);
        let offset = (step.offset + if window.len > 1 << 16 { wide } else { 0 }) % window.len;
        let mut out = [0; 8];
        match step.what % 8 {
            0..=3 => _ = bus.write(Some(0), window.base + offset, &step.value[..step.size]),
            4..=6 => {
                _ = bus.read(Some(u32::from(step.value[0] & 3)), window.base + offset, &mut out[..step.size])
            }
            _ => rig.advance(u64::from(u32::from_le_bytes([step.value[0], step.value[1], step.value[2], 0]))),
        }
    }
}
