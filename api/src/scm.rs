//! File descriptors that travel with bytes over UNIX sockets (`SCM_RIGHTS`, unix(7)).

use std::io::{self, IoSlice};
use std::mem::{size_of, zeroed};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

/// Most file descriptors in one message; Linux has the same limit (`SCM_MAX_FD`).
const MAX_FDS: usize = 253;

/// Room for one control message with the most file descriptors, aligned as one must be.
#[repr(C, align(8))]
struct Control([u8; 64 + MAX_FDS * size_of::<RawFd>()]);

impl Control {
    const fn new() -> Self {
        Self([0; 64 + MAX_FDS * size_of::<RawFd>()])
    }
}

/// Receives bytes into `buffer`, which may be uninitialised, and adds what file descriptors came with
/// them to `fds`. They are close-on-exec.
///
/// # Errors
/// What `recvmsg(2)` says, or `InvalidData` if more file descriptors came than a message may have.
pub(crate) fn recv_with_fds(
    socket: &impl AsRawFd,
    buffer: &mut [std::mem::MaybeUninit<u8>],
    fds: &mut Vec<OwnedFd>,
) -> io::Result<usize> {
    let mut control = Control::new();
    let mut iov = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: msghdr is plain data for which all zeroes is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = &raw mut iov;
    message.msg_iovlen = 1;
    message.msg_control = control.0.as_mut_ptr().cast();
    message.msg_controllen = control.0.len();
    // SAFETY: the message names `buffer` and `control` with their true lengths, and both outlive the call.
    let received = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut message, libc::MSG_CMSG_CLOEXEC) };
    let received = usize::try_from(received).map_err(|_| io::Error::last_os_error())?;
    // SAFETY: the kernel filled in the control messages that the header describes.
    let mut header = unsafe { libc::CMSG_FIRSTHDR(&raw const message) };
    while !header.is_null() {
        // SAFETY: the CMSG macros yield pointers to whole headers inside `control`.
        let head = unsafe { *header };
        if head.cmsg_level == libc::SOL_SOCKET && head.cmsg_type == libc::SCM_RIGHTS {
            // SAFETY: an SCM_RIGHTS message's data is an array of descriptors as long as its header says.
            let data = unsafe { libc::CMSG_DATA(header) }.cast::<RawFd>();
            // SAFETY: CMSG_LEN only computes.
            let overhead = unsafe { libc::CMSG_LEN(0) } as usize;
            let count = head.cmsg_len.saturating_sub(overhead) / size_of::<RawFd>();
            for i in 0..count {
                // SAFETY: `i` is below the number of descriptors; the kernel made each of them ours.
                fds.push(unsafe { OwnedFd::from_raw_fd(data.add(i).read_unaligned()) });
            }
        }
        // SAFETY: both pointers belong to the message that was received.
        header = unsafe { libc::CMSG_NXTHDR(&raw const message, header) };
    }
    if message.msg_flags & libc::MSG_CTRUNC != 0 {
        return Err(io::Error::new(io::ErrorKind::InvalidData, "too many file descriptors in one message"));
    }
    Ok(received)
}

/// Sends all of `data`; `fds` go with its first byte.
///
/// # Errors
/// What `sendmsg(2)` says, or `InvalidInput` for more file descriptors than a message may have.
pub(crate) fn send_with_fds(socket: &impl AsRawFd, data: &[u8], fds: &[RawFd]) -> io::Result<()> {
    if fds.len() > MAX_FDS {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "too many file descriptors"));
    }
    let mut sent = 0;
    while let Some(rest) = data.get(sent..).filter(|rest| !rest.is_empty()) {
        sent += send_once(socket, rest, if sent == 0 { fds } else { &[] })?;
    }
    Ok(())
}

fn send_once(socket: &impl AsRawFd, data: &[u8], fds: &[RawFd]) -> io::Result<usize> {
    let mut control = Control::new();
    let iov = IoSlice::new(data);
    // SAFETY: msghdr is plain data for which all zeroes is valid.
    let mut message: libc::msghdr = unsafe { zeroed() };
    message.msg_iov = (&raw const iov).cast_mut().cast();
    message.msg_iovlen = 1;
    if !fds.is_empty() {
        let bytes = size_of_val(fds) as libc::c_uint;
        message.msg_control = control.0.as_mut_ptr().cast();
        // SAFETY: CMSG_SPACE and CMSG_LEN only compute.
        let (space, len) = unsafe { (libc::CMSG_SPACE(bytes) as usize, libc::CMSG_LEN(bytes) as usize) };
        message.msg_controllen = space;
        // SAFETY: `control` has room for one header with MAX_FDS descriptors, and there are no more.
        unsafe {
            let header = libc::CMSG_FIRSTHDR(&raw const message);
            (*header).cmsg_level = libc::SOL_SOCKET;
            (*header).cmsg_type = libc::SCM_RIGHTS;
            (*header).cmsg_len = len;
            std::ptr::copy_nonoverlapping(fds.as_ptr().cast(), libc::CMSG_DATA(header), size_of_val(fds));
        }
    }
    // SAFETY: the message names `data` and `control`, which outlive the call.
    let sent = unsafe { libc::sendmsg(socket.as_raw_fd(), &raw const message, libc::MSG_NOSIGNAL) };
    usize::try_from(sent).map_err(|_| io::Error::last_os_error())
}
