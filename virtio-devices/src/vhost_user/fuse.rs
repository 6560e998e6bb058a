//! What a guest hears of a FUSE session whose daemon has died.
//!
//! The numbers of inodes and open files in a guest's requests are those of the daemon that gave them out. Its
//! successor gives out the same numbers for other files, so it must never see them: whoever has the file system
//! mounted hears `ENOTCONN`, as from a FUSE daemon of the host that has died, until the driver begins a new session.

use crate::queue::{Chain, QueueError, VirtQueue, total_len};

/// Bytes of `struct fuse_in_header` and `struct fuse_out_header` (Linux, `include/uapi/linux/fuse.h`).
const IN_HEADER: usize = 40;
const OUT_HEADER: u32 = 16;
const FORGET: u32 = 2;
const INIT: u32 = 26;
const DESTROY: u32 = 38;
const BATCH_FORGET: u32 = 42;

/// What a request is to a device without a session.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Answer {
    /// It begins a session: a daemon's affair.
    Begins,
    /// It was answered with so many bytes.
    Given(u32),
}

/// Answers a request that is not to reach a daemon.
pub(super) fn answer(queue: &VirtQueue, chain: &Chain) -> Result<Answer, QueueError> {
    let mut header = [0; IN_HEADER];
    queue.reader(chain).read(&mut header)?;
    let [_, _, _, _, a, b, c, d, unique @ ..] = &header;
    let opcode = u32::from_le_bytes([*a, *b, *c, *d]);
    let error = match opcode {
        INIT => return Ok(Answer::Begins),
        // Nobody waits for an answer.
        FORGET | BATCH_FORGET => return Ok(Answer::Given(0)),
        // There is nothing left of it.
        DESTROY => 0,
        _ => -libc::ENOTCONN,
    };
    if total_len(&chain.writable) < u64::from(OUT_HEADER) {
        return Ok(Answer::Given(0));
    }
    let mut writer = queue.writer(chain);
    writer.write(&OUT_HEADER.to_le_bytes())?;
    writer.write(&error.to_le_bytes())?;
    writer.write(unique.first_chunk::<8>().unwrap_or(&[0; 8]))?;
    Ok(Answer::Given(OUT_HEADER))
}
