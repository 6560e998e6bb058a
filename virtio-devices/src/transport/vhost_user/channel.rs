//! The second channel, on which the back end speaks by itself.
//!
//! The protocol's library keeps the descriptor that comes with `SET_BACKEND_REQ_FD` to itself and has no way to say
//! `CONFIG_CHANGE_MSG` on it. So each message is looked at before the library takes it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType, recvmsg, send, sockopt,
};

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
/// `VHOST_USER_BACKEND_CONFIG_CHANGE_MSG`, version 1, without a payload.
const CONFIG_CHANGE: [u32; 3] = [2, 1, 0];

/// Waits for the next message, which stays where it is. The descriptor that came with it, if it is one for the
/// second channel.
pub(super) fn look(connection: &UnixStream) -> Option<OwnedFd> {
    let mut header = [0; HEADER];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let flags = RecvFlags::PEEK | RecvFlags::CMSG_CLOEXEC;
    let got = recvmsg(connection, &mut [IoSliceMut::new(&mut header)], &mut control, flags);
    // What is wrong is met again by who takes the message.
    let request = header.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    if got.is_err() || request != Some(SET_BACKEND_REQ_FD) {
        return None;
    }
    let mut fds = control.drain().filter_map(|message| match message {
        RecvAncillaryMessage::ScmRights(fds) => Some(fds),
        _ => None,
    });
    let fd = fds.next()?.next()?;
    sockopt::socket_type(&fd).is_ok_and(|kind| kind == SocketType::STREAM).then_some(fd)
}

/// Says that the config space is another one. Never blocks.
pub(super) fn say_config_changed(channel: &OwnedFd) -> rustix::io::Result<()> {
    let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_le_bytes()).collect();
    send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
}
