//! `ioctl`s on network interfaces: the only place that speaks `ifreq`.

use std::io;
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::{MacAddr, prefix_len};

/// `_IOW('T', 202, int)` and so on, of linux/if_tun.h.
pub(crate) const TUNSETIFF: libc::Ioctl = 0x4004_54ca;
const TUNGETIFF: libc::Ioctl = 0x8004_54d2;
pub(crate) const TUNSETQUEUE: libc::Ioctl = 0x4004_54d9;
const TUNSETOFFLOAD: libc::Ioctl = 0x4004_54d0;
const TUNSETVNETHDRSZ: libc::Ioctl = 0x4004_54d8;
const TUNSETVNETLE: libc::Ioctl = 0x4004_54dc;

fn check(rc: libc::c_int) -> io::Result<()> {
    if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

/// An `ifreq` that names an interface.
pub(crate) fn named(name: &str) -> io::Result<libc::ifreq> {
    // SAFETY: all-zero bytes are a valid `ifreq`.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    if name.len() >= request.ifr_name.len() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the interface's name is too long"));
    }
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes()) {
        *to = from as libc::c_char;
    }
    Ok(request)
}

/// The interface that an `ifreq` names.
pub(crate) fn name_of(request: &libc::ifreq) -> String {
    let bytes = request.ifr_name.iter().take_while(|c| **c != 0).map(|c| *c as u8);
    String::from_utf8_lossy(&bytes.collect::<Vec<u8>>()).into_owned()
}

/// `ioctl` with an `ifreq` in and out.
pub(crate) fn call(fd: RawFd, request: libc::Ioctl, ifreq: &mut libc::ifreq) -> io::Result<()> {
    // SAFETY: the requests used here read and write one `ifreq`, which `ifreq` is.
    check(unsafe { libc::ioctl(fd, request, std::ptr::from_mut(ifreq)) })
}

/// Name and flags of the tap behind `fd`.
pub(crate) fn tap_info(fd: RawFd) -> io::Result<(String, libc::c_short)> {
    let mut request = named("")?;
    call(fd, TUNGETIFF, &mut request)?;
    // SAFETY: TUNGETIFF fills in the flags.
    Ok((name_of(&request), unsafe { request.ifr_ifru.ifru_flags }))
}

/// Frames on `fd` carry little-endian headers of `len` bytes.
pub(crate) fn set_header(fd: RawFd, len: usize) -> io::Result<()> {
    let (len, one): (libc::c_int, libc::c_int) = (len as libc::c_int, 1);
    // SAFETY: both requests read one int.
    check(unsafe { libc::ioctl(fd, TUNSETVNETHDRSZ, &len) })?;
    // SAFETY: as above.
    check(unsafe { libc::ioctl(fd, TUNSETVNETLE, &one) })
}

/// Sets the `TUN_F_*` flags.
pub(crate) fn set_offload(fd: RawFd, flags: libc::c_uint) -> io::Result<()> {
    // SAFETY: the request takes its argument by value.
    check(unsafe { libc::ioctl(fd, TUNSETOFFLOAD, libc::c_ulong::from(flags)) })
}

/// An interface that is configured through a socket.
pub(crate) struct Interface<'a> {
    name: &'a str,
    socket: OwnedFd,
}

fn socket(family: libc::c_int) -> io::Result<OwnedFd> {
    // SAFETY: no memory is passed.
    let fd = unsafe { libc::socket(family, libc::SOCK_DGRAM | libc::SOCK_CLOEXEC, 0) };
    check(fd)?;
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[repr(C)]
struct In6Ifreq {
    address: libc::in6_addr,
    prefix_len: u32,
    index: libc::c_int,
}

impl<'a> Interface<'a> {
    pub(crate) fn new(name: &'a str) -> io::Result<Self> {
        Ok(Self { name, socket: socket(libc::AF_INET)? })
    }

    fn call(&self, request: libc::Ioctl, ifreq: &mut libc::ifreq) -> io::Result<()> {
        call(self.socket.as_raw_fd(), request, ifreq)
    }

    pub(crate) fn mtu(&self) -> io::Result<i32> {
        let mut request = named(self.name)?;
        self.call(libc::SIOCGIFMTU, &mut request)?;
        // SAFETY: SIOCGIFMTU fills in the MTU.
        Ok(unsafe { request.ifr_ifru.ifru_mtu })
    }

    pub(crate) fn set_mtu(&self, mtu: u16) -> io::Result<()> {
        let mut request = named(self.name)?;
        request.ifr_ifru.ifru_mtu = libc::c_int::from(mtu);
        self.call(libc::SIOCSIFMTU, &mut request)
    }

    pub(crate) fn set_mac(&self, mac: MacAddr) -> io::Result<()> {
        let mut request = named(self.name)?;
        // SAFETY: all-zero bytes are a valid `sockaddr`.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::ARPHRD_ETHER;
        for (to, from) in address.sa_data.iter_mut().zip(mac.0) {
            *to = from as libc::c_char;
        }
        request.ifr_ifru.ifru_hwaddr = address;
        self.call(libc::SIOCSIFHWADDR, &mut request)
    }

    pub(crate) fn set_up(&self) -> io::Result<()> {
        let mut request = named(self.name)?;
        self.call(libc::SIOCGIFFLAGS, &mut request)?;
        // SAFETY: SIOCGIFFLAGS fills in the flags.
        let flags = unsafe { request.ifr_ifru.ifru_flags };
        request.ifr_ifru.ifru_flags = flags | (libc::IFF_UP | libc::IFF_RUNNING) as libc::c_short;
        self.call(libc::SIOCSIFFLAGS, &mut request)
    }

    /// Sets the address, and the netmask if one is given.
    pub(crate) fn set_address(&self, ip: IpAddr, mask: Option<IpAddr>) -> io::Result<()> {
        match ip {
            IpAddr::V4(_) => {
                self.set_v4(libc::SIOCSIFADDR, ip)?;
                mask.map_or(Ok(()), |mask| self.set_v4(libc::SIOCSIFNETMASK, mask))
            }
            IpAddr::V6(v6) => {
                let prefix = mask.and_then(prefix_len).unwrap_or(64);
                let mut request = named(self.name)?;
                self.call(libc::SIOCGIFINDEX, &mut request)?;
                // SAFETY: SIOCGIFINDEX fills in the index.
                let index = unsafe { request.ifr_ifru.ifru_ifindex };
                let address = libc::in6_addr { s6_addr: v6.octets() };
                let ifreq = In6Ifreq { address, prefix_len: u32::from(prefix), index };
                let socket = socket(libc::AF_INET6)?;
                // SAFETY: on an AF_INET6 socket SIOCSIFADDR reads one `in6_ifreq`.
                let rc = unsafe { libc::ioctl(socket.as_raw_fd(), libc::SIOCSIFADDR, &ifreq) };
                match check(rc) {
                    Err(e) if e.raw_os_error() == Some(libc::EEXIST) => Ok(()),
                    other => other,
                }
            }
        }
    }

    fn set_v4(&self, request: libc::Ioctl, ip: IpAddr) -> io::Result<()> {
        let IpAddr::V4(v4) = ip else { return Err(io::ErrorKind::InvalidInput.into()) };
        let mut ifreq = named(self.name)?;
        // SAFETY: all-zero bytes are a valid `sockaddr`.
        let mut address: libc::sockaddr = unsafe { std::mem::zeroed() };
        address.sa_family = libc::AF_INET as libc::sa_family_t;
        // `sockaddr_in`: the address follows the port.
        for (to, from) in address.sa_data.iter_mut().skip(2).zip(v4.octets()) {
            *to = from as libc::c_char;
        }
        ifreq.ifr_ifru.ifru_addr = address;
        self.call(request, &mut ifreq)
    }
}
