//! `pci-testdev`: a PCI function whose BARs take test writes, with and without eventfds (QEMU
//! `docs/specs/pci-testdev.rst`).
//!
//! BAR 0 is memory, BAR 1 ports. Each begins with a header that selects one of three tests and says what to write where;
//! the writes are counted: those of the first test by the device, those of the others by an eventfd that takes any
//! value, or only the right one.

use std::fmt;
use std::io;
use std::sync::Arc;

use holdfast_device::{Access, BuildError, Bus, Device, DeviceState, IoEvents, StateError};
use parking_lot::Mutex;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use super::{Board, DeviceKind};
use crate::pci::{BarKind, ConfigBuilder, Identity, PciConfig, PciConfigState, PciDevice, PciError};

const KIND: &str = "pci-testdev";
/// Length of each BAR; test writes go to its second half.
const LENGTHS: [u64; 2] = [4096, 256];
const NAMES: [[&str; 3]; 2] = [
    ["mmio-no-eventfd", "mmio-wildcard-eventfd", "mmio-datamatch-eventfd"],
    ["portio-no-eventfd", "portio-wildcard-eventfd", "portio-datamatch-eventfd"],
];
/// The test without an eventfd.
const PLAIN: usize = 0;
/// The test whose eventfd takes one value only.
const DATAMATCH: usize = 2;
/// The value that is to be written.
const DATA: u8 = 0xfa;
/// Bytes of a test's header before its name.
const HEADER_LEN: usize = 16;

/// Where it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct PciTestdevConfig {
    /// PCI device number on the root bus, 1 to 31; the first that is free by default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub addr: Option<u8>,
}

fn pci_error(error: &PciError) -> BuildError {
    BuildError::Config { id: KIND.to_owned(), reason: error.to_string() }
}

impl DeviceKind for PciTestdevConfig {
    const NAME: &'static str = KIND;
    const SUMMARY: &'static str = "PCI function that counts test writes to memory and ports";

    fn problems(&self) -> Vec<(&'static str, String)> {
        let wrong = self.addr.filter(|addr| !(1..=31).contains(addr));
        wrong.map(|addr| ("addr", format!("is {addr}; PCI device numbers are 1 to 31"))).into_iter().collect()
    }

    fn build(&self, board: &Board<'_>) -> Result<Arc<dyn Device>, BuildError> {
        let slot = board.pci.reserve(self.addr).map_err(|e| pci_error(&e))?;
        let mut builder = ConfigBuilder::new(Identity {
            vendor: 0x1b36,
            device: 0x0005,
            // Unclassified, "other".
            class: 0x00_ff00,
            subsystem_vendor: 0x1af4,
            subsystem: 0x1100,
            ..Identity::default()
        });
        let [memory, ports] = LENGTHS;
        builder.bar(0, BarKind::Mem32, memory).map_err(|e| pci_error(&e))?;
        builder.bar(1, BarKind::Io, ports).map_err(|e| pci_error(&e))?;
        let fds =
            || -> io::Result<[EventFd; 2]> { Ok([EventFd::new(EFD_NONBLOCK)?, EventFd::new(EFD_NONBLOCK)?]) };
        let host = |source| BuildError::Host { id: KIND.to_owned(), what: "no eventfd".to_owned(), source };
        let device = Arc::new(PciTestdev {
            config: builder.build(),
            buses: [Arc::clone(&board.build.mmio), Arc::clone(&board.build.pio)],
            fds: [fds().map_err(host)?, fds().map_err(host)?],
            registered: Mutex::default(),
            tests: Mutex::default(),
        });
        board.pci.plug(&slot, Arc::clone(&device) as Arc<dyn PciDevice>).map_err(|e| pci_error(&e))?;
        Ok(device)
    }
}

/// What runs in one BAR.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
struct Test {
    /// The selected test, if there is such a one.
    selected: Option<u8>,
    /// Writes that have been counted.
    count: u32,
}

#[derive(Debug, Default, Serialize, Deserialize)]
#[serde(default)]
struct State {
    pci: PciConfigState,
    tests: [Test; 2],
}

/// The function.
pub struct PciTestdev {
    config: Arc<PciConfig>,
    /// The buses of the two BARs.
    buses: [Arc<Bus>; 2],
    /// By BAR, those of the second and third test.
    fds: [[EventFd; 2]; 2],
    /// Where the eventfds of each BAR are registered.
    registered: Mutex<[Option<u64>; 2]>,
    tests: Mutex<[Test; 2]>,
}

impl fmt::Debug for PciTestdev {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PciTestdev").field("tests", &*self.tests.lock()).finish_non_exhaustive()
    }
}

/// Offset of a test's writes in its BAR.
fn target(bar: usize, test: usize) -> u64 {
    LENGTHS.get(bar).map_or(0, |len| len / 2) + test as u64
}

/// What a test's eventfd matches.
fn datamatch(test: usize) -> Option<u64> {
    (test == DATAMATCH).then_some(DATA.into())
}

impl PciTestdev {
    /// Adds what the eventfds of `bar` have counted to the selected test, or forgets it.
    fn collect(&self, bar: usize, test: &mut Test) {
        for (n, fd) in self.fds.get(bar).into_iter().flatten().enumerate() {
            // Nothing counted reads as an error.
            let counted = fd.read().unwrap_or(0);
            if test.selected.map(usize::from) == Some(n + 1) {
                test.count = test.count.saturating_add(u32::try_from(counted).unwrap_or(u32::MAX));
            }
        }
    }

    /// The header of the selected test as the guest reads it.
    fn header(bar: usize, test: &Test) -> Vec<u8> {
        let Some(n) = test.selected.map(usize::from) else { return vec![0; HEADER_LEN] };
        let name = NAMES.get(bar).and_then(|names| names.get(n)).copied().unwrap_or_default();
        let mut header = vec![n as u8, 1, 0, 0];
        header.extend((target(bar, n) as u32).to_le_bytes());
        header.extend(u32::from(DATA).to_le_bytes());
        header.extend(test.count.to_le_bytes());
        header.extend(name.bytes());
        header
    }

    fn event_windows(&self, bar: usize, base: u64) -> impl Iterator<Item = (&EventFd, u64, Option<u64>)> {
        let fds = self.fds.get(bar).into_iter().flatten().enumerate();
        fds.map(move |(n, fd)| (fd, base + target(bar, n + 1), datamatch(n + 1)))
    }
}

impl PciDevice for PciTestdev {
    fn pci_name(&self) -> &str {
        KIND
    }

    fn config(&self) -> &Arc<PciConfig> {
        &self.config
    }

    fn read_bar(&self, bar: u8, access: Access, data: &mut [u8]) {
        let bar = usize::from(bar);
        data.fill(0);
        let mut tests = self.tests.lock();
        let Some(test) = tests.get_mut(bar) else { return };
        self.collect(bar, test);
        let header = Self::header(bar, test);
        let start = usize::try_from(access.offset).unwrap_or(usize::MAX);
        let bytes = header.get(start..).unwrap_or_default();
        data.iter_mut().zip(bytes).for_each(|(to, from)| *to = *from);
    }

    fn write_bar(&self, bar: u8, access: Access, data: &[u8]) {
        let bar = usize::from(bar);
        let Some(&first) = data.first() else { return };
        let mut tests = self.tests.lock();
        let Some(test) = tests.get_mut(bar) else { return };
        if access.offset == 0 {
            let known = NAMES.get(bar).is_some_and(|names| usize::from(first) < names.len());
            self.collect(bar, test);
            *test = Test { selected: known.then_some(first), count: 0 };
        } else if test.selected == Some(PLAIN as u8) && access.offset == target(bar, PLAIN) && first == DATA {
            test.count = test.count.saturating_add(1);
        }
    }

    fn bar_moved(&self, bar: u8, base: Option<u64>) {
        let bar = usize::from(bar);
        let mut registered = self.registered.lock();
        let (Some(bus), Some(place)) = (self.buses.get(bar), registered.get_mut(bar)) else { return };
        if let Some(old) = place.take() {
            for (fd, at, value) in self.event_windows(bar, old) {
                if let Err(error) = bus.unregister(fd, at, 1, value) {
                    tracing::warn!(%error, "{KIND}: an eventfd cannot be taken back");
                }
            }
        }
        let Some(new) = base else { return };
        for (fd, at, value) in self.event_windows(bar, new) {
            if let Err(error) = bus.register(fd, at, 1, value) {
                tracing::warn!(%error, "{KIND}: an eventfd cannot be registered");
            }
        }
        *place = Some(new);
    }
}

impl Device for PciTestdev {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {
        self.config.reset();
        let mut tests = self.tests.lock();
        for (bar, test) in tests.iter_mut().enumerate() {
            *test = Test::default();
            self.collect(bar, test);
        }
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let mut tests = self.tests.lock();
        for (bar, test) in tests.iter_mut().enumerate() {
            self.collect(bar, test);
        }
        DeviceState::new(KIND, 1, &State { pci: self.config.save(), tests: *tests })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let new: State = state.parse(KIND, 1)?;
        if new.tests.iter().any(|t| t.selected.is_some_and(|n| usize::from(n) >= NAMES[0].len())) {
            return Err(StateError::Invalid { kind: KIND, reason: "a test that there is not".to_owned() });
        }
        self.config.restore(&new.pci)?;
        *self.tests.lock() = new.tests;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::Windows;
    use crate::x86::testing::root_bus;

    const MEM: u64 = 0xe000_0000;
    const IO: u64 = 0x1000;

    fn rig() -> (Arc<dyn Device>, Arc<crate::pci::PciBus>, holdfast_device::BuildContext) {
        let (pci, context, _) = root_bus();
        let board = Board { build: &context, pci: &pci, isa: None };
        let device = PciTestdevConfig { addr: Some(3) }.build(&board).expect("build");
        let windows = Windows { io: (IO, 0x1000), mem32: (MEM, 1 << 20), mem64: (0, 0) };
        pci.assign_resources(windows).expect("room");
        (device, pci, context)
    }

    fn word(bus: &Bus, at: u64) -> u32 {
        let mut data = [0; 4];
        assert!(bus.read(None, at, &mut data));
        u32::from_le_bytes(data)
    }

    /// What kvm-unit-tests do: all tests of a BAR, with their names.
    fn run(bus: &Bus, base: u64) -> Vec<String> {
        let mut names = Vec::new();
        for n in 0.. {
            bus.write(None, base, &[n]);
            assert_eq!(word(bus, base + 12), 0);
            if word(bus, base) >> 8 & 0xff != 1 {
                break;
            }
            let (at, value) = (base + u64::from(word(bus, base + 4)), word(bus, base + 8) as u8);
            for _ in 0..16 {
                bus.write(None, at, &[value]);
            }
            assert_eq!(word(bus, base + 12), 16, "test {n}");
            bus.write(None, at, &[value + 1]);
            assert_eq!(word(bus, base + 12), if n == 1 { 17 } else { 16 }, "another value, test {n}");
            let name = (0..).map(|i| word(bus, base + 16 + i) as u8).take_while(|c| *c != 0);
            names.push(name.map(char::from).collect());
        }
        names
    }

    #[test]
    fn all_tests_count_their_writes() {
        let (_, pci, c) = rig();
        assert_eq!(run(&c.mmio, MEM), NAMES[0]);
        assert_eq!(run(&c.pio, IO), NAMES[1]);
        // Elsewhere too.
        pci.write_config(0, 3 << 3, 0x10, &0xe008_0000u32.to_le_bytes());
        assert_eq!(run(&c.mmio, 0xe008_0000), NAMES[0]);
    }

    #[test]
    fn counts_are_saved_and_reset() {
        let (device, _, c) = rig();
        c.mmio.write(None, MEM, &[1]);
        c.mmio.write(None, MEM + 2049, &[5]);
        let state = device.save().expect("saves");
        device.reset();
        device.restore(&state).expect("restores");
        assert_eq!(word(&c.mmio, MEM + 12), 1);
        let wrong = State { tests: [Test { selected: Some(3), count: 0 }; 2], ..State::default() };
        assert!(device.restore(&DeviceState::new(KIND, 1, &wrong).expect("state")).is_err());
    }

    #[test]
    fn device_numbers_are_checked() {
        let (pci, context, _) = root_bus();
        let board = Board { build: &context, pci: &pci, isa: None };
        PciTestdevConfig { addr: Some(9) }.build(&board).expect("free");
        let taken = PciTestdevConfig { addr: Some(9) }.build(&board).expect_err("taken");
        assert!(taken.to_string().contains("taken") || format!("{taken:?}").contains("taken"));
        assert_eq!(PciTestdevConfig { addr: Some(32) }.problems().len(), 1);
    }
}
