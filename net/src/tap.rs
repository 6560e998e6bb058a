//! Linux tap interfaces.

use std::fs::{File, OpenOptions};
use std::io::{self, Read};
use std::net::IpAddr;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use crate::ifreq::{self, Interface};
use crate::{HEADER_LEN, MacAddr, Offloads, PacketBackend, PacketQueue};

const IFF_TAP: libc::c_short = 0x0002;
const IFF_NO_PI: libc::c_short = 0x1000;
const IFF_VNET_HDR: libc::c_short = 0x4000;
const IFF_MULTI_QUEUE: libc::c_short = 0x0100;
const IFF_ATTACH_QUEUE: libc::c_short = 0x0200;
const IFF_DETACH_QUEUE: libc::c_short = 0x0400;

/// `TUN_F_*` flags of linux/if_tun.h.
mod tun_f {
    pub(super) const CSUM: u32 = 1;
    pub(super) const TSO4: u32 = 2;
    pub(super) const TSO6: u32 = 4;
    pub(super) const TSO_ECN: u32 = 8;
    pub(super) const UFO: u32 = 16;
}

/// A tap that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TapError {
    /// The device node of all taps cannot be opened.
    #[error("cannot open /dev/net/tun")]
    Node(#[source] io::Error),
    /// The interface cannot be opened or made.
    #[error("cannot open tap `{name}`: it may be in use, or CAP_NET_ADMIN may be missing")]
    Open {
        /// Its name; empty if the host was to choose one.
        name: String,
        /// What the host said.
        #[source]
        source: io::Error,
    },
    /// A file descriptor that was handed over is no tap, or one of the wrong kind.
    #[error("file descriptor {fd} cannot be used as a tap: {reason}")]
    Descriptor {
        /// Its number.
        fd: RawFd,
        /// What is wrong.
        reason: String,
    },
    /// The interface cannot be configured.
    #[error("tap `{name}`: cannot set its {what}")]
    Configure {
        /// The interface.
        name: String,
        /// What was to be set.
        what: &'static str,
        /// What the host said.
        #[source]
        source: io::Error,
    },
}

/// Which tap to open and how to configure the host's end.
#[derive(Debug, Clone, Default)]
pub struct TapOptions {
    /// Interface name; the host chooses one if absent.
    pub name: Option<String>,
    /// Queues.
    pub queues: usize,
    /// Address of the host's end.
    pub ip: Option<IpAddr>,
    /// Its netmask.
    pub mask: Option<IpAddr>,
    /// MAC address of the host's end.
    pub host_mac: Option<MacAddr>,
    /// MTU.
    pub mtu: Option<u16>,
}

/// A tap interface.
#[derive(Debug)]
pub struct Tap {
    name: String,
    queues: Vec<Arc<TapQueue>>,
    multi_queue: bool,
}

/// One queue of a tap.
#[derive(Debug)]
pub struct TapQueue {
    file: File,
}

impl Tap {
    /// Opens a tap by name, or makes one, and configures it.
    ///
    /// # Errors
    /// [`TapError`] naming the interface and what failed.
    pub fn open(options: &TapOptions) -> Result<Arc<Self>, TapError> {
        let wanted = options.name.clone().unwrap_or_default();
        let queues = options.queues.max(1);
        let mut tap = Self { name: wanted.clone(), queues: Vec::new(), multi_queue: queues > 1 };
        for n in 0..queues {
            let name = if n == 0 { wanted.as_str() } else { tap.name.as_str() };
            let (file, name, multi_queue) = open_queue(name, tap.multi_queue)?;
            (tap.name, tap.multi_queue) = (name, multi_queue);
            tap.queues.push(Arc::new(TapQueue { file }));
        }
        tap.configure(options)?;
        Ok(Arc::new(tap))
    }

    /// Takes over open descriptors of one tap, one for each queue. The host's end is left as it is.
    ///
    /// # Errors
    /// [`TapError::Descriptor`] if one of them is no tap with packet headers.
    pub fn from_fds(fds: Vec<OwnedFd>) -> Result<Arc<Self>, TapError> {
        let mut tap = Self { name: String::new(), queues: Vec::new(), multi_queue: false };
        for fd in fds {
            let number = fd.as_raw_fd();
            let wrong = |reason: String| TapError::Descriptor { fd: number, reason };
            let (name, flags) = ifreq::tap_info(number).map_err(|e| wrong(format!("it is no tap: {e}")))?;
            if flags & IFF_TAP == 0 || flags & IFF_VNET_HDR == 0 {
                return Err(wrong("it must be opened with IFF_TAP and IFF_VNET_HDR".to_owned()));
            }
            if !tap.queues.is_empty() && tap.name != name {
                return Err(wrong(format!("it belongs to `{name}`, the first one to `{}`", tap.name)));
            }
            ifreq::set_header(number, HEADER_LEN).map_err(|e| wrong(e.to_string()))?;
            set_nonblocking(number).map_err(|e| wrong(e.to_string()))?;
            tap.name = name;
            tap.multi_queue = flags & IFF_MULTI_QUEUE != 0;
            tap.queues.push(Arc::new(TapQueue { file: File::from(fd) }));
        }
        Ok(Arc::new(tap))
    }

    fn configure(&self, options: &TapOptions) -> Result<(), TapError> {
        let fail = |what| move |source| TapError::Configure { name: self.name.clone(), what, source };
        for queue in &self.queues {
            ifreq::set_header(queue.fd(), HEADER_LEN).map_err(fail("header size"))?;
        }
        let interface = Interface::new(&self.name).map_err(fail("configuration"))?;
        if let Some(mac) = options.host_mac {
            interface.set_mac(mac).map_err(fail("MAC address"))?;
        }
        if let Some(mtu) = options.mtu {
            interface.set_mtu(mtu).map_err(fail("MTU"))?;
        }
        if let Some(ip) = options.ip {
            interface.set_address(ip, options.mask).map_err(fail("IP address"))?;
        }
        interface.set_up().map_err(fail("state to up"))
    }
}

/// A copy of the descriptor `fd`, which this process was started with or has been sent.
///
/// # Errors
/// [`TapError::Descriptor`] if there is no such descriptor.
pub fn duplicate(fd: RawFd) -> Result<OwnedFd, TapError> {
    // SAFETY: no memory is passed; a number that is no descriptor gives an error.
    let copy = unsafe { libc::fcntl(fd, libc::F_DUPFD_CLOEXEC, 3) };
    if copy < 0 {
        return Err(TapError::Descriptor { fd, reason: io::Error::last_os_error().to_string() });
    }
    // SAFETY: the descriptor is new and nobody else's.
    Ok(unsafe { OwnedFd::from_raw_fd(copy) })
}

fn set_nonblocking(fd: RawFd) -> io::Result<()> {
    // SAFETY: no memory is passed.
    let flags = unsafe { libc::fcntl(fd, libc::F_GETFL) };
    // SAFETY: no memory is passed.
    if flags < 0 || unsafe { libc::fcntl(fd, libc::F_SETFL, flags | libc::O_NONBLOCK) } < 0 {
        return Err(io::Error::last_os_error());
    }
    Ok(())
}

/// Opens one queue; returns the interface's name and whether it has several queues.
fn open_queue(name: &str, multi_queue: bool) -> Result<(File, String, bool), TapError> {
    let open = |multi: bool| -> Result<Result<(File, String, bool), io::Error>, TapError> {
        let flags = libc::O_NONBLOCK | libc::O_CLOEXEC;
        let mut node = OpenOptions::new();
        node.read(true).write(true).custom_flags(flags);
        let file = node.open("/dev/net/tun").map_err(TapError::Node)?;
        let mut request = match ifreq::named(name) {
            Ok(request) => request,
            Err(e) => return Ok(Err(e)),
        };
        let base = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR;
        request.ifr_ifru.ifru_flags = if multi { base | IFF_MULTI_QUEUE } else { base };
        Ok(ifreq::call(file.as_raw_fd(), ifreq::TUNSETIFF, &mut request)
            .map(|()| (file, ifreq::name_of(&request), multi)))
    };
    let result = match open(multi_queue)? {
        // A tap that was made with several queues can be opened only so, even for one.
        Err(e) if e.raw_os_error() == Some(libc::EINVAL) && !multi_queue => open(true)?,
        other => other,
    };
    result.map_err(|source| TapError::Open { name: name.to_owned(), source })
}

impl PacketBackend for Tap {
    fn name(&self) -> &str {
        &self.name
    }

    fn queues(&self) -> Vec<Arc<dyn PacketQueue>> {
        self.queues.iter().map(|q| Arc::clone(q) as Arc<dyn PacketQueue>).collect()
    }

    fn set_offloads(&self, offloads: Offloads) -> io::Result<()> {
        let bits = [
            (offloads.csum, tun_f::CSUM),
            // The kernel takes segmentation only together with checksums.
            (offloads.csum && offloads.tso4, tun_f::TSO4),
            (offloads.csum && offloads.tso6, tun_f::TSO6),
            (offloads.csum && offloads.ecn && (offloads.tso4 || offloads.tso6), tun_f::TSO_ECN),
            (offloads.csum && offloads.ufo, tun_f::UFO),
        ];
        let flags = bits.iter().filter(|(on, _)| *on).fold(0, |all, (_, bit)| all | bit);
        // Offloads are the interface's: any of its queues will do.
        self.queues.first().map_or(Ok(()), |q| ifreq::set_offload(q.fd(), flags))
    }

    fn enable_queues(&self, count: usize) -> io::Result<()> {
        if !self.multi_queue || self.queues.len() < 2 {
            return Ok(());
        }
        for (n, queue) in self.queues.iter().enumerate() {
            let mut request = ifreq::named("")?;
            request.ifr_ifru.ifru_flags = if n < count { IFF_ATTACH_QUEUE } else { IFF_DETACH_QUEUE };
            match ifreq::call(queue.fd(), ifreq::TUNSETQUEUE, &mut request) {
                // Already so.
                Err(e) if e.raw_os_error() == Some(libc::EINVAL) => {}
                other => other?,
            }
        }
        Ok(())
    }

    fn mtu(&self) -> Option<u16> {
        let mtu = Interface::new(&self.name).and_then(|i| i.mtu()).ok()?;
        u16::try_from(mtu).ok()
    }
}

impl PacketQueue for TapQueue {
    fn fd(&self) -> RawFd {
        self.file.as_raw_fd()
    }

    fn receive(&self, buf: &mut [u8]) -> io::Result<usize> {
        (&self.file).read(buf)
    }

    unsafe fn send(&self, parts: &[libc::iovec]) -> io::Result<usize> {
        let count = libc::c_int::try_from(parts.len()).map_err(|_| io::ErrorKind::InvalidInput)?;
        // SAFETY: the caller vouches for the parts; `writev` reads them only.
        let n = unsafe { libc::writev(self.file.as_raw_fd(), parts.as_ptr(), count) };
        usize::try_from(n).map_err(|_| io::Error::last_os_error())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Taps need CAP_NET_ADMIN; where it is missing there is nothing to test.
    fn tap(options: &TapOptions) -> Option<Arc<Tap>> {
        match Tap::open(options) {
            Ok(tap) => Some(tap),
            Err(TapError::Open { source, .. } | TapError::Node(source))
                if matches!(source.kind(), io::ErrorKind::PermissionDenied | io::ErrorKind::NotFound) =>
            {
                eprintln!("skipped: {source}");
                None
            }
            Err(e) => panic!("{e}: {:?}", std::error::Error::source(&e)),
        }
    }

    fn sysfs(name: &str, file: &str) -> String {
        std::fs::read_to_string(format!("/sys/class/net/{name}/{file}")).expect("in sysfs").trim().to_owned()
    }

    #[test]
    fn a_tap_is_made_and_configured() {
        let options = TapOptions {
            name: Some("hft-test%d".to_owned()),
            queues: 1,
            ip: Some("192.168.231.1".parse().expect("an address")),
            mask: Some("255.255.255.0".parse().expect("a mask")),
            host_mac: Some("02:00:00:00:00:77".parse().expect("a MAC")),
            mtu: Some(1400),
        };
        let Some(tap) = tap(&options) else { return };
        assert!(tap.name().starts_with("hft-test"));
        assert_eq!(sysfs(tap.name(), "address"), "02:00:00:00:00:77");
        assert_eq!(sysfs(tap.name(), "mtu"), "1400");
        assert_eq!(tap.mtu(), Some(1400));
        let all = Offloads { csum: true, tso4: true, tso6: true, ecn: true, ufo: true };
        tap.set_offloads(all).expect("all offloads");
        tap.set_offloads(Offloads::default()).expect("no offloads");
        let mut buf = vec![0; crate::MAX_FRAME];
        // What arrives first on a new interface is the host's own chatter, or nothing.
        let queue = &tap.queues()[0];
        loop {
            match queue.receive(&mut buf) {
                Ok(n) => assert!(n > HEADER_LEN),
                Err(e) => break assert_eq!(e.kind(), io::ErrorKind::WouldBlock),
            }
        }
    }

    #[test]
    fn queues_of_a_tap_are_switched_and_its_descriptors_taken_over() {
        let options = TapOptions { queues: 2, ..TapOptions::default() };
        let Some(tap) = tap(&options) else { return };
        assert_eq!(tap.queues().len(), 2);
        tap.enable_queues(1).expect("one");
        tap.enable_queues(1).expect("one again");
        tap.enable_queues(2).expect("both");
        let copies = tap.queues().iter().map(|q| duplicate(q.fd()).expect("a copy")).collect();
        let again = Tap::from_fds(copies).expect("taps");
        assert_eq!(again.name(), tap.name());
    }

    #[test]
    fn what_is_no_tap_is_refused() {
        assert!(duplicate(-1).is_err());
        let file = File::open("/dev/null").expect("there");
        let error = Tap::from_fds(vec![file.into()]).expect_err("no tap");
        assert!(matches!(error, TapError::Descriptor { .. }), "{error}");
    }
}
