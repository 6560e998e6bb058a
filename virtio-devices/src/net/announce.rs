//! Telling the network where the guest is: by frames of our own, and by asking its driver (section 5.1.6.5.4).

use std::io;
use std::sync::Arc;

use holdfast_net::{HEADER_LEN, MacAddr, PacketQueue};

use super::{Net, bit};
use crate::device::Interrupt;

/// Length of an Ethernet frame without its checksum at least.
const FRAME: usize = 60;

/// The driver, while it is there.
#[derive(Debug)]
pub(super) struct Driver {
    pub(super) features: u64,
    pub(super) interrupt: Arc<dyn Interrupt>,
}

/// A reverse ARP request (RFC 903) as `mac` would send it, with the header of the interface's frames: bridges and switches learn from
/// it on which port `mac` is, and nobody answers.
fn rarp(mac: MacAddr) -> [u8; HEADER_LEN + FRAME] {
    let mut frame = [0; HEADER_LEN + FRAME];
    let mut at = HEADER_LEN;
    let mut put = |bytes: &[u8]| {
        for (to, from) in frame.iter_mut().skip(at).zip(bytes) {
            *to = *from;
        }
        at += bytes.len();
    };
    put(&[0xff; 6]);
    put(&mac.0);
    // Ethertype; hardware and protocol with the lengths of their addresses; request.
    put(&[0x80, 0x35, 0, 1, 8, 0, 6, 4, 0, 3]);
    put(&mac.0);
    put(&[0; 4]);
    put(&mac.0);
    frame
}

/// Sends a frame that says that `mac` is behind `queue`.
pub(crate) fn send(queue: &dyn PacketQueue, mac: [u8; 6]) -> io::Result<()> {
    let frame = rarp(MacAddr(mac));
    let part = libc::iovec { iov_base: frame.as_ptr().cast_mut().cast(), iov_len: frame.len() };
    // SAFETY: the part is `frame`, which outlives the call and is only read.
    unsafe { queue.send(&[part]) }.map(drop)
}

impl Net {
    /// Announces the device once.
    pub(super) fn announce_now(&self) {
        let Some(queue) = self.shared.backend.queues().into_iter().next() else { return };
        if let Err(error) = send(&*queue, self.mac().0) {
            tracing::warn!(interface = self.interface(), %error, "the device cannot be announced");
        }
        let driver = self.driver.lock();
        if let Some(driver) = driver.as_ref().filter(|d| d.features & bit::GUEST_ANNOUNCE != 0) {
            self.shared.state.lock().announce = true;
            driver.interrupt.config_changed();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_frame_says_who_is_here() {
        let mac = MacAddr([2, 0, 0, 1, 2, 3]);
        let frame = rarp(mac);
        assert_eq!(frame[..HEADER_LEN], [0; HEADER_LEN]);
        let ethernet = &frame[HEADER_LEN..];
        assert_eq!(
            (&ethernet[..6], &ethernet[6..12], &ethernet[12..14]),
            (&[255; 6][..], &mac.0[..], &[0x80, 0x35][..])
        );
        assert_eq!(ethernet[14..22], [0, 1, 8, 0, 6, 4, 0, 3]);
        assert_eq!(
            (&ethernet[22..28], &ethernet[32..38], &ethernet[38..]),
            (&mac.0[..], &mac.0[..], &[0; 22][..])
        );
    }
}
