//! The second channel, on which the back end speaks by itself.
//!
//! The protocol's library keeps the descriptor that comes with `SET_BACKEND_REQ_FD` to itself and has no way to say
//! `CONFIG_CHANGE_MSG` on it. So each message is looked at before the library takes it.

use std::io::IoSliceMut;
use std::mem::MaybeUninit;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;

use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendFlags, SocketType, recv, recvmsg, send, sockopt,
};

/// Bytes of a message's header: request, flags, size.
const HEADER: usize = 12;
const SET_BACKEND_REQ_FD: u32 = 21;
const SET_VRING_ENABLE: u32 = 18;
/// Flags: an answer is wanted; version 1, and this is one.
const NEED_REPLY: u32 = 8;
const REPLY: u32 = 1 | 4;
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

/// A `SET_VRING_ENABLE` that waits: the ring, whether it is to be on, and whether an answer is wanted.
///
/// The library refuses it before `SET_FEATURES`, which is when QEMU's network cards say it.
pub(super) fn take_enable(connection: &UnixStream) -> Option<(u32, bool, bool)> {
    let mut message = [0; HEADER + 8];
    let got = recv(connection, &mut message[..], RecvFlags::PEEK).ok()?.0;
    let word = |at: usize| message.get(at..at + 4)?.first_chunk().map(|bytes| u32::from_le_bytes(*bytes));
    let (request, flags, size) = (word(0)?, word(4)?, word(8)?);
    // Anything odd is the library's affair.
    let whole = got == message.len() && flags & !NEED_REPLY == 1 && size == 8;
    let (ring, on) = (word(HEADER)?, word(HEADER + 4)?);
    if request != SET_VRING_ENABLE || !whole || on > 1 {
        return None;
    }
    let taken = recv(connection, &mut message[..], RecvFlags::empty()).ok()?.0;
    (taken == got).then_some((ring, on == 1, flags & NEED_REPLY != 0))
}

/// Answers it.
pub(super) fn answer_enable(connection: &UnixStream, done: bool) -> rustix::io::Result<()> {
    let answer = [SET_VRING_ENABLE, REPLY, 8, u32::from(!done), 0];
    let message: Vec<u8> = answer.iter().flat_map(|word| word.to_le_bytes()).collect();
    send(connection, &message, SendFlags::NOSIGNAL).map(drop)
}

/// Says that the config space is another one. Never blocks.
pub(super) fn say_config_changed(channel: &OwnedFd) -> rustix::io::Result<()> {
    let message: Vec<u8> = CONFIG_CHANGE.iter().flat_map(|word| word.to_le_bytes()).collect();
    send(channel, &message, SendFlags::DONTWAIT | SendFlags::NOSIGNAL).map(drop)
}
