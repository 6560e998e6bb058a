//! userfaultfd(2): the few ioctls that demand paging needs. Linux UAPI, `linux/userfaultfd.h`.

use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd};

use holdfast_memory::PAGE_SIZE;

const API: u64 = 0xaa;

/// `struct uffdio_api`.
#[repr(C)]
struct UffdioApi {
    api: u64,
    features: u64,
    ioctls: u64,
}

/// `struct uffdio_range`.
#[repr(C)]
struct UffdioRange {
    start: u64,
    len: u64,
}

/// `struct uffdio_register`.
#[repr(C)]
struct UffdioRegister {
    range: UffdioRange,
    mode: u64,
    ioctls: u64,
}

/// `struct uffdio_copy`.
#[repr(C)]
struct UffdioCopy {
    dst: u64,
    src: u64,
    len: u64,
    mode: u64,
    copy: i64,
}

/// `struct uffdio_zeropage`.
#[repr(C)]
struct UffdioZeropage {
    range: UffdioRange,
    mode: u64,
    zeropage: i64,
}

/// `struct uffd_msg`, page-fault variant.
#[repr(C)]
#[derive(Clone, Copy, Default)]
struct UffdMsg {
    event: u8,
    reserved: [u8; 7],
    flags: u64,
    address: u64,
    feat: u64,
}

/// `_IOWR(0xaa, nr, size)`, as asm-generic encodes it.
const fn iowr(nr: u64, size: usize) -> u64 {
    (3 << 30) | ((size as u64) << 16) | (0xaa << 8) | nr
}

/// `_IOR(0xaa, nr, size)`.
const fn ior(nr: u64, size: usize) -> u64 {
    (2 << 30) | ((size as u64) << 16) | (0xaa << 8) | nr
}

const UFFDIO_API: u64 = iowr(0x3f, size_of::<UffdioApi>());
const UFFDIO_REGISTER: u64 = iowr(0x00, size_of::<UffdioRegister>());
const UFFDIO_UNREGISTER: u64 = ior(0x01, size_of::<UffdioRange>());
const UFFDIO_COPY: u64 = iowr(0x03, size_of::<UffdioCopy>());
const UFFDIO_ZEROPAGE: u64 = iowr(0x04, size_of::<UffdioZeropage>());
const _: () = assert!(UFFDIO_API == 0xc018_aa3f && UFFDIO_COPY == 0xc028_aa03 && size_of::<UffdMsg>() == 32);

const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
const REGISTER_MISSING: u64 = 1;

/// A userfaultfd of this process.
#[derive(Debug)]
pub struct Userfault(File);

impl Userfault {
    /// Opens one, non-blocking. Faults taken in the kernel (KVM, io_uring, vhost) are served too.
    ///
    /// # Errors
    /// The host's error, for instance when `vm.unprivileged_userfaultfd` forbids it.
    pub fn open() -> io::Result<Self> {
        // SAFETY: userfaultfd takes flags only and returns a new descriptor.
        let fd = unsafe { libc::syscall(libc::SYS_userfaultfd, libc::O_CLOEXEC | libc::O_NONBLOCK) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: the descriptor was just created and is owned by nobody else.
        let this = Self(unsafe { File::from_raw_fd(fd as i32) });
        let mut api = UffdioApi { api: API, features: 0, ioctls: 0 };
        this.ioctl(UFFDIO_API, &mut api)?;
        Ok(this)
    }

    fn ioctl<T>(&self, request: u64, argument: &mut T) -> io::Result<()> {
        // SAFETY: every caller passes the struct that `request` is defined for; the kernel reads and
        // writes within it. Addresses in it are checked by the kernel against registered ranges.
        let rc = unsafe { libc::ioctl(self.0.as_raw_fd(), request, std::ptr::from_mut(argument)) };
        if rc < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
    }

    /// Asks for faults on missing pages of `[start, start + len)`, host-virtual and page aligned.
    ///
    /// # Errors
    /// The host's error.
    pub fn register(&self, start: u64, len: u64) -> io::Result<()> {
        let range = UffdioRange { start, len };
        self.ioctl(UFFDIO_REGISTER, &mut UffdioRegister { range, mode: REGISTER_MISSING, ioctls: 0 })
    }

    /// Ends it; missing pages read as zero from then on.
    ///
    /// # Errors
    /// The host's error.
    pub fn unregister(&self, start: u64, len: u64) -> io::Result<()> {
        self.ioctl(UFFDIO_UNREGISTER, &mut UffdioRange { start, len })
    }

    /// Fills the missing pages at `start` with `data` and wakes who waits for them. A page that has
    /// arrived meanwhile is left alone.
    ///
    /// # Errors
    /// The host's error.
    pub fn fill(&self, start: u64, data: &[u8]) -> io::Result<()> {
        self.fill_pages(start, data, PAGE_SIZE)
    }

    /// As [`Userfault::fill`] where the host's pages are `page` bytes long; `data` is whole pages.
    ///
    /// # Errors
    /// The host's error.
    pub fn fill_pages(&self, start: u64, data: &[u8], page: u64) -> io::Result<()> {
        let mut done = 0;
        while done < data.len() {
            let mut copy = UffdioCopy {
                dst: start + done as u64,
                src: data[done..].as_ptr() as u64,
                len: (data.len() - done) as u64,
                mode: 0,
                copy: 0,
            };
            match self.ioctl(UFFDIO_COPY, &mut copy) {
                Ok(()) => return Ok(()),
                Err(e) => done += partial(&e, copy.copy, data.len() - done, page)?,
            }
        }
        Ok(())
    }

    /// Maps zeroes at the missing pages of `[start, start + len)`.
    ///
    /// # Errors
    /// The host's error.
    pub fn zero(&self, start: u64, len: u64) -> io::Result<()> {
        let mut done = 0;
        while done < len {
            let range = UffdioRange { start: start + done, len: len - done };
            let mut zero = UffdioZeropage { range, mode: 0, zeropage: 0 };
            match self.ioctl(UFFDIO_ZEROPAGE, &mut zero) {
                Ok(()) => return Ok(()),
                Err(e) => done += partial(&e, zero.zeropage, (len - done) as usize, PAGE_SIZE)? as u64,
            }
        }
        Ok(())
    }

    /// The next fault's page-aligned host-virtual address; `None` if `timeout_ms` pass without one.
    ///
    /// # Errors
    /// The host's error.
    pub fn next_fault(&self, timeout_ms: i32) -> io::Result<Option<u64>> {
        let (fault, _) = self.wait(None, timeout_ms)?;
        if fault { self.take_fault() } else { Ok(None) }
    }

    /// Waits until there may be a fault, or something to read from `other`, and says which.
    ///
    /// # Errors
    /// The host's error.
    pub fn wait(&self, other: Option<BorrowedFd<'_>>, timeout_ms: i32) -> io::Result<(bool, bool)> {
        let polled = |fd| libc::pollfd { fd, events: libc::POLLIN, revents: 0 };
        // A negative descriptor is passed over.
        let mut fds = [polled(self.0.as_raw_fd()), polled(other.map_or(-1, |fd| fd.as_raw_fd()))];
        // SAFETY: two valid pollfds.
        if unsafe { libc::poll(fds.as_mut_ptr(), 2, timeout_ms) } < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::Interrupted { Ok((false, false)) } else { Err(error) };
        }
        Ok((fds[0].revents != 0, fds[1].revents != 0))
    }

    /// The next fault's page-aligned host-virtual address, if there is one.
    ///
    /// # Errors
    /// The host's error.
    pub fn take_fault(&self) -> io::Result<Option<u64>> {
        let mut msg = UffdMsg::default();
        // SAFETY: the kernel writes at most one message of exactly this size.
        let n = unsafe {
            libc::read(self.0.as_raw_fd(), std::ptr::from_mut(&mut msg).cast(), size_of::<UffdMsg>())
        };
        if n < 0 {
            let error = io::Error::last_os_error();
            return if error.kind() == io::ErrorKind::WouldBlock { Ok(None) } else { Err(error) };
        }
        Ok((msg.event == UFFD_EVENT_PAGEFAULT).then_some(msg.address & !4095))
    }
}

/// How far an interrupted or overtaken request came, in bytes to skip.
fn partial(error: &io::Error, done: i64, rest: usize, page: u64) -> io::Result<usize> {
    match error.raw_os_error() {
        // One page was there already: step over it.
        Some(libc::EEXIST) => Ok((page as usize).min(rest)),
        Some(libc::EAGAIN) if done > 0 => Ok((done as usize).min(rest)),
        Some(libc::EAGAIN) => Ok(0),
        _ => Err(io::Error::from_raw_os_error(error.raw_os_error().unwrap_or(libc::EIO))),
    }
}
