//! Address spaces: memory-mapped and port I/O go to devices by range.
//!
//! One implementation serves MMIO and PIO. A miss reads as all ones, is logged once per page and is
//! never fatal. Ioeventfds are kept here for accelerators that have none of their own: a matching
//! write signals the eventfd and does not reach the device.

use std::collections::{BTreeMap, HashSet};
use std::fmt::Debug;
use std::io;
use std::sync::Arc;

use parking_lot::{Mutex, RwLock};
use vmm_sys_util::eventfd::EventFd;

/// One access, as a device sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Offset into the device's window.
    pub offset: u64,
    /// The address on the bus.
    pub address: u64,
    /// The vCPU that makes it; `None` for DMA and debuggers.
    pub vcpu: Option<u32>,
}

/// The register logic of a device. The length of `data` is the access size: 1, 2, 4 or 8 from vCPUs,
/// any length from debuggers. Bytes are in bus order (little-endian on all machines so far).
///
/// Guest input is hostile: an access that makes no sense reads as zero or all ones, as the hardware
/// would, and writes are dropped.
pub trait BusDevice: Send + Sync + Debug {
    /// Reads `data.len()` bytes.
    fn read(&self, access: Access, data: &mut [u8]);
    /// Writes `data`.
    fn write(&self, access: Access, data: &[u8]);
}

/// A window that cannot be attached or detached.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BusError {
    /// The window is empty or runs past the end of the address space.
    #[error("window {base:#x}+{len:#x} is empty or too long")]
    Range {
        /// Start.
        base: u64,
        /// Length in bytes.
        len: u64,
    },
    /// It overlaps a window that is there.
    #[error("window {base:#x}+{len:#x} overlaps `{other}` at {other_base:#x}")]
    Overlap {
        /// Start.
        base: u64,
        /// Length in bytes.
        len: u64,
        /// The name of the window in the way.
        other: String,
        /// Its start.
        other_base: u64,
    },
    /// No window starts there.
    #[error("no window starts at {0:#x}")]
    NotFound(u64),
}

/// Registration of ioeventfds, done by the accelerator where it can and by the [`Bus`] elsewhere.
pub trait IoEvents: Send + Sync + Debug {
    /// A guest write of `len` bytes (0: any size) to `address`, with value `datamatch` if given, only
    /// signals `fd`.
    ///
    /// # Errors
    /// The host's error.
    fn register(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()>;

    /// Undoes [`IoEvents::register`] with the same arguments.
    ///
    /// # Errors
    /// The host's error, or `NotFound`.
    fn unregister(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()>;
}

#[derive(Debug, Clone)]
struct Window {
    len: u64,
    name: String,
    device: Arc<dyn BusDevice>,
}

#[derive(Debug)]
struct IoEvent {
    len: u32,
    datamatch: Option<u64>,
    fd: EventFd,
}

/// A window on a bus, for `info mtree`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct WindowInfo {
    /// First address.
    pub base: u64,
    /// Length in bytes.
    pub len: u64,
    /// The device's name.
    pub name: String,
}

/// An address space of device windows.
#[derive(Debug)]
pub struct Bus {
    name: &'static str,
    windows: RwLock<BTreeMap<u64, Window>>,
    events: RwLock<BTreeMap<u64, Vec<IoEvent>>>,
    missed: Mutex<HashSet<u64>>,
    accelerated: RwLock<Option<Arc<dyn IoEvents>>>,
}

/// At most this many distinct pages are remembered for logging a miss once.
const MISSES_LOGGED: usize = 256;

impl Bus {
    /// An empty bus; `name` is for logs.
    pub fn new(name: &'static str) -> Arc<Self> {
        Arc::new(Self {
            name,
            windows: RwLock::default(),
            events: RwLock::default(),
            missed: Mutex::default(),
            accelerated: RwLock::default(),
        })
    }

    /// Lets the accelerator serve ioeventfds from now on. To be called before devices are built.
    pub fn accelerate(&self, events: Arc<dyn IoEvents>) {
        *self.accelerated.write() = Some(events);
    }

    /// Attaches `device` at `base`.
    ///
    /// # Errors
    /// [`BusError`] if the window is empty, wraps, or overlaps another.
    pub fn attach(
        &self,
        base: u64,
        len: u64,
        name: &str,
        device: Arc<dyn BusDevice>,
    ) -> Result<(), BusError> {
        let last = match len.checked_sub(1).and_then(|l| base.checked_add(l)) {
            Some(last) => last,
            None => return Err(BusError::Range { base, len }),
        };
        let mut windows = self.windows.write();
        if let Some((&other_base, other)) = windows.range(..=last).next_back()
            && other_base + (other.len - 1) >= base
        {
            return Err(BusError::Overlap { base, len, other: other.name.clone(), other_base });
        }
        windows.insert(base, Window { len, name: name.to_owned(), device });
        Ok(())
    }

    /// Detaches the window that starts at `base` (a moved BAR, an unplugged device).
    ///
    /// # Errors
    /// [`BusError::NotFound`].
    pub fn detach(&self, base: u64) -> Result<(), BusError> {
        self.windows.write().remove(&base).map(|_| ()).ok_or(BusError::NotFound(base))
    }

    /// Detaches everything, when the VM ends: devices hold buses and buses hold devices, and this is
    /// where the circle is cut, so that guest RAM and open files go away.
    pub fn clear(&self) {
        self.events.write().clear();
        *self.accelerated.write() = None;
        // Devices are dropped outside of the lock: some unregister things on the way.
        let windows = std::mem::take(&mut *self.windows.write());
        drop(windows);
    }

    /// All windows in address order.
    pub fn windows(&self) -> Vec<WindowInfo> {
        let windows = self.windows.read();
        windows.iter().map(|(&base, w)| WindowInfo { base, len: w.len, name: w.name.clone() }).collect()
    }

    /// The device whose window holds all `len` bytes at `address`, and the offset into it.
    fn find(&self, address: u64, len: usize) -> Option<(Arc<dyn BusDevice>, u64)> {
        let windows = self.windows.read();
        let (&base, w) = windows.range(..=address).next_back()?;
        let offset = address - base;
        (offset < w.len && w.len - offset >= len as u64).then(|| (Arc::clone(&w.device), offset))
    }

    /// A read by `vcpu`. Returns false, and all ones, if nothing is there.
    pub fn read(&self, vcpu: Option<u32>, address: u64, data: &mut [u8]) -> bool {
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.read(Access { offset, address, vcpu }, data);
                true
            }
            None => {
                data.fill(0xff);
                self.log_miss("read", address, data.len());
                false
            }
        }
    }

    /// A write by `vcpu`. Returns false if nothing is there.
    pub fn write(&self, vcpu: Option<u32>, address: u64, data: &[u8]) -> bool {
        if self.signal_event(address, data) {
            return true;
        }
        match self.find(address, data.len()) {
            Some((device, offset)) => {
                device.write(Access { offset, address, vcpu }, data);
                true
            }
            None => {
                self.log_miss("write", address, data.len());
                false
            }
        }
    }

    fn signal_event(&self, address: u64, data: &[u8]) -> bool {
        let events = self.events.read();
        let Some(list) = events.get(&address) else { return false };
        let mut bytes = [0; 8];
        let n = data.len().min(8);
        bytes[..n].copy_from_slice(&data[..n]);
        let value = u64::from_le_bytes(bytes);
        let hit = list
            .iter()
            .find(|e| (e.len == 0 || e.len as usize == data.len()) && e.datamatch.is_none_or(|d| d == value));
        let Some(event) = hit else { return false };
        if let Err(error) = event.fd.write(1) {
            tracing::error!(bus = self.name, address, %error, "ioeventfd cannot be signalled");
        }
        true
    }

    fn log_miss(&self, what: &str, address: u64, len: usize) {
        let mut missed = self.missed.lock();
        if missed.len() < MISSES_LOGGED && missed.insert(address >> 12) {
            tracing::info!("{} {what} of {len} bytes at {address:#x}: no device", self.name);
        }
    }
}

impl IoEvents for Bus {
    fn register(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()> {
        if let Some(accel) = self.accelerated.read().as_ref() {
            return accel.register(fd, address, len, datamatch);
        }
        let fd = fd.try_clone()?;
        self.events.write().entry(address).or_default().push(IoEvent { len, datamatch, fd });
        Ok(())
    }

    fn unregister(&self, fd: &EventFd, address: u64, len: u32, datamatch: Option<u64>) -> io::Result<()> {
        if let Some(accel) = self.accelerated.read().as_ref() {
            return accel.unregister(fd, address, len, datamatch);
        }
        let mut events = self.events.write();
        let list = events.get_mut(&address).ok_or(io::ErrorKind::NotFound)?;
        let at = list.iter().position(|e| e.len == len && e.datamatch == datamatch);
        list.remove(at.ok_or(io::ErrorKind::NotFound)?);
        if list.is_empty() {
            events.remove(&address);
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, Default)]
    struct Ram(Mutex<[u8; 16]>);
    impl BusDevice for Ram {
        fn read(&self, a: Access, data: &mut [u8]) {
            let at = a.offset as usize;
            data.copy_from_slice(&self.0.lock()[at..at + data.len()]);
        }
        fn write(&self, a: Access, data: &[u8]) {
            let at = a.offset as usize;
            self.0.lock()[at..at + data.len()].copy_from_slice(data);
        }
    }

    #[test]
    fn accesses_reach_the_right_device_and_misses_read_as_ones() {
        let bus = Bus::new("test");
        bus.attach(0x1000, 16, "a", Arc::new(Ram::default())).expect("free");
        bus.attach(0x1010, 16, "b", Arc::new(Ram::default())).expect("free");
        assert!(bus.write(None, 0x100c, &[1, 2, 3, 4]));
        let mut word = [0; 4];
        assert!(bus.read(None, 0x100c, &mut word));
        assert_eq!(word, [1, 2, 3, 4]);
        assert!(!bus.read(None, 0x100e, &mut word), "an access across two windows hits neither");
        assert_eq!(word, [0xff; 4]);
        assert!(!bus.write(None, 0xfff, &[0]));
        assert!(!bus.read(None, u64::MAX, &mut word));
    }

    #[test]
    fn overlapping_and_wrapping_windows_are_refused() {
        let bus = Bus::new("test");
        bus.attach(0x1000, 16, "a", Arc::new(Ram::default())).expect("free");
        let overlap = bus.attach(0xfff, 2, "b", Arc::new(Ram::default()));
        assert!(matches!(overlap, Err(BusError::Overlap { other_base: 0x1000, .. })));
        assert!(matches!(
            bus.attach(u64::MAX, 2, "c", Arc::new(Ram::default())),
            Err(BusError::Range { .. })
        ));
        bus.attach(u64::MAX, 1, "top", Arc::new(Ram::default())).expect("the last byte can be used");
        bus.detach(0x1000).expect("there");
        bus.attach(0xfff, 2, "b", Arc::new(Ram::default())).expect("free now");
    }

    #[test]
    fn a_cleared_bus_lets_its_devices_go() {
        let bus = Bus::new("test");
        let ram = Arc::new(Ram::default());
        bus.attach(0, 16, "a", Arc::clone(&ram) as Arc<dyn BusDevice>).expect("free");
        bus.clear();
        assert_eq!(Arc::strong_count(&ram), 1);
        assert!(bus.windows().is_empty() && !bus.write(None, 0, &[1]));
    }

    #[test]
    fn an_ioeventfd_takes_the_write_that_matches_and_no_other() {
        let bus = Bus::new("test");
        let ram = Arc::new(Ram::default());
        bus.attach(0, 16, "a", Arc::clone(&ram) as Arc<dyn BusDevice>).expect("free");
        let fd = EventFd::new(libc_nonblock()).expect("eventfd");
        bus.register(&fd, 4, 2, Some(7)).expect("register");
        bus.write(None, 4, &[7, 0]);
        assert_eq!(fd.read().expect("signalled"), 1);
        bus.write(None, 4, &[8, 0]);
        assert!(fd.read().is_err());
        assert_eq!(ram.0.lock()[4], 8);
        bus.unregister(&fd, 4, 2, Some(7)).expect("was there");
        assert!(bus.unregister(&fd, 4, 2, Some(7)).is_err());
    }

    #[test]
    fn a_cleared_bus_holds_no_device() {
        let bus = Bus::new("test");
        let ram = Arc::new(Ram::default());
        bus.attach(0, 16, "a", Arc::clone(&ram) as Arc<dyn BusDevice>).expect("free");
        bus.clear();
        assert_eq!(Arc::strong_count(&ram), 1);
        assert!(!bus.read(None, 0, &mut [0]));
    }

    fn libc_nonblock() -> i32 {
        vmm_sys_util::eventfd::EFD_NONBLOCK
    }
}
