//! A virtio driver that plays by no rules, behind either transport.

use std::sync::Arc;
use std::time::{Duration, Instant};

use holdfast_device::{BuildContext, Device, IrqLine};
use holdfast_devices::pci::{PciBus, PciBusSpec, Windows};
use holdfast_virtio::transport::mmio::WINDOW;
use holdfast_virtio::{Slot, VirtioDevice, plug};
use vm_memory::{Bytes, GuestAddress};

use crate::rig::context;

/// First address of RAM.
pub const RAM: u64 = 0x8000_0000;
/// Bytes of RAM.
pub const RAM_SIZE: u64 = 1 << 20;
/// First address of the virtio-mmio windows.
const BASE: u64 = 0x1000_0000;
/// Bytes between two queues: descriptors at 0, avail ring at 0x400, used ring at 0x800, free from 0xc00.
pub const STRIDE: u64 = 0x1000;
/// Descriptors of a queue.
pub const SIZE: u16 = 16;

/// Offsets in a virtio-pci device's BAR.
mod bar {
    pub const DEVICE: u64 = 0x2000;
    pub const NOTIFY: u64 = 0x3000;
    pub const MSIX: u64 = 0x4000;
    pub const LEN: u64 = 0x8000;
}

/// How the driver reaches its device.
#[derive(Debug, Clone)]
enum Port {
    /// The window's address.
    Mmio(u64),
    /// The bus, the function, and where its BAR was put.
    Pci(Arc<PciBus>, u8, u64),
}

/// RAM and buses with devices on them.
#[derive(Debug)]
pub struct Board {
    /// What the devices are built with.
    pub context: BuildContext,
    pci: Arc<PciBus>,
    slots: u64,
}

impl Default for Board {
    fn default() -> Self {
        let context = context(&[(RAM, RAM_SIZE)]);
        let pci = PciBus::new(PciBusSpec {
            segment: 0,
            mmio: Arc::clone(&context.mmio),
            pio: Arc::clone(&context.pio),
            wires: Vec::new(),
            swizzle: |_, _| 0,
        });
        Self { context, pci, slots: 0 }
    }
}

impl Board {
    /// Plugs a device into virtio-mmio.
    pub fn plug_mmio(&mut self, device: Arc<dyn VirtioDevice>) -> Driver {
        let base = BASE + WINDOW * self.slots;
        let port = Port::Mmio(base);
        self.plug(device, Slot::Mmio { base, irq: IrqLine::unconnected() }, port)
    }

    /// Plugs a device into PCI.
    pub fn plug_pci(&mut self, device: Arc<dyn VirtioDevice>) -> Driver {
        let number = self.slots as u8;
        let port = Port::Pci(Arc::clone(&self.pci), number << 3, 0);
        let slot = Slot::Pci { bus: Arc::clone(&self.pci), device: Some(number) };
        self.plug(device, slot, port)
    }

    fn plug(&mut self, device: Arc<dyn VirtioDevice>, slot: Slot, port: Port) -> Driver {
        let queues = device.queue_sizes().len() as u64;
        let id = format!("_dev{}", self.slots);
        self.slots += 1;
        let device = plug(&id, device, slot, &self.context).expect("plugged");
        Driver { context: self.context.clone(), device, queues, port }
    }
}

/// The driver of one device.
#[derive(Debug)]
pub struct Driver {
    /// RAM and buses.
    pub context: BuildContext,
    /// The device, as its VM has it.
    pub device: Arc<dyn Device>,
    /// How many queues it has.
    pub queues: u64,
    port: Port,
}

impl Driver {
    /// First address of a queue's rings.
    pub fn ring(&self, queue: u64) -> u64 {
        RAM + STRIDE * (queue % self.queues)
    }

    /// Writes RAM. What lies outside cannot be written by a driver either.
    pub fn poke(&self, at: u64, bytes: &[u8]) {
        let _ = self.context.memory.write_slice(bytes, GuestAddress(at));
    }

    /// Reads 16 bits of RAM, 0 outside.
    pub fn peek(&self, at: u64) -> u16 {
        self.context.memory.read_obj(GuestAddress(at)).unwrap_or(0)
    }

    /// Writes a descriptor.
    pub fn descriptor(&self, at: u64, (address, len): (u64, u32), flags: u16, next: u16) {
        self.poke(at, &address.to_le_bytes());
        self.poke(at + 8, &len.to_le_bytes());
        self.poke(at + 12, &flags.to_le_bytes());
        self.poke(at + 14, &next.to_le_bytes());
    }

    /// Writes a register: an offset in the virtio-mmio window or in the BAR.
    pub fn write(&self, offset: u64, bytes: &[u8]) {
        match self.port {
            Port::Mmio(base) => _ = self.context.mmio.write(Some(0), base + offset % WINDOW, bytes),
            Port::Pci(_, _, base) => _ = self.context.mmio.write(Some(0), base + offset % bar::LEN, bytes),
        }
    }

    /// Reads a register likewise.
    pub fn read(&self, offset: u64, bytes: &mut [u8]) {
        match self.port {
            Port::Mmio(base) => _ = self.context.mmio.read(Some(0), base + offset % WINDOW, bytes),
            Port::Pci(_, _, base) => _ = self.context.mmio.read(Some(0), base + offset % bar::LEN, bytes),
        }
    }

    /// Writes PCI configuration space, where there is one.
    pub fn write_pci(&self, offset: u16, bytes: &[u8]) {
        if let Port::Pci(bus, devfn, _) = &self.port {
            bus.write_config(0, *devfn, offset & 0xfff, bytes);
        }
    }

    /// Reads PCI configuration space, where there is one.
    pub fn read_pci(&self, offset: u16, bytes: &mut [u8]) {
        if let Port::Pci(bus, devfn, _) = &self.port {
            bus.read_config(0, *devfn, offset & 0xfff, bytes);
        }
    }

    /// Where the device's own config space is among its registers.
    pub fn config_at(&self) -> u64 {
        if matches!(self.port, Port::Mmio(_)) { 0x100 } else { bar::DEVICE }
    }

    /// Where the MSI-X table is among its registers, if it has one.
    pub fn msix_at(&self) -> Option<u64> {
        matches!(self.port, Port::Pci(..)).then_some(bar::MSIX)
    }

    fn set(&self, register: u64, value: u32) {
        self.write(register, &value.to_le_bytes());
    }

    fn get(&self, register: u64) -> u32 {
        let mut data = [0; 4];
        self.read(register, &mut data);
        u32::from_le_bytes(data)
    }

    /// Sets the device up with those of the features that it offers, and empty rings.
    pub fn start(&mut self, features: u64) {
        let zeroes = vec![0; (STRIDE * self.queues) as usize];
        self.poke(RAM, &zeroes);
        if let Port::Pci(bus, devfn, base) = &mut self.port {
            let windows = Windows { mem64: (0x40_0000_0000, 1 << 20), ..Windows::default() };
            bus.assign_resources(windows).expect("room");
            let mut halves = [0; 8];
            bus.read_config(0, *devfn, 0x20, &mut halves);
            *base = u64::from_le_bytes(halves) & !0xf;
            bus.write_config(0, *devfn, 4, &6u16.to_le_bytes());
            self.start_pci(features);
        } else {
            self.start_mmio(features);
        }
    }

    fn start_mmio(&self, features: u64) {
        [0, 1, 3].into_iter().for_each(|status| self.set(0x70, status));
        for (half, wanted) in [(0, features as u32), (1, (features >> 32) as u32 | 1)] {
            self.set(0x14, half);
            let offered = self.get(0x10);
            self.set(0x24, half);
            self.set(0x20, wanted & offered);
        }
        self.set(0x70, 11);
        for queue in 0..self.queues {
            self.set(0x30, queue as u32);
            self.set(0x38, u32::from(SIZE));
            for (register, at) in [(0x80, 0), (0x90, 0x400), (0xa0, 0x800)] {
                self.set(register, (self.ring(queue) + at) as u32);
                self.set(register + 4, 0);
            }
            self.set(0x44, 1);
        }
        self.set(0x70, 15);
    }

    fn start_pci(&self, features: u64) {
        [0, 1, 3].into_iter().for_each(|status: u8| self.write(0x14, &[status]));
        for (half, wanted) in [(0, features as u32), (1, (features >> 32) as u32 | 1)] {
            self.set(0, half);
            let offered = self.get(4);
            self.set(8, half);
            self.set(0xc, wanted & offered);
        }
        self.write(0x14, &[11]);
        // MSI-X on, one vector for each queue and for the config.
        self.enable_msix(features & 1 == 0);
        self.write(0x10, &0u16.to_le_bytes());
        for queue in 0..self.queues {
            self.write(0x16, &(queue as u16).to_le_bytes());
            self.write(0x18, &SIZE.to_le_bytes());
            self.write(0x1a, &(queue as u16 + 1).to_le_bytes());
            for (register, at) in [(0x20, 0), (0x28, 0x400), (0x30, 0x800)] {
                self.set(register, (self.ring(queue) + at) as u32);
                self.set(register + 4, 0);
            }
            self.write(0x1c, &1u16.to_le_bytes());
        }
        self.write(0x14, &[15]);
    }

    /// Finds the MSI-X capability as a guest does, and switches it.
    fn enable_msix(&self, on: bool) {
        let mut at = [0x34, 0];
        self.read_pci(0x34, &mut at[..1]);
        for _ in 0..16 {
            let mut header = [0; 4];
            self.read_pci(u16::from(at[0]), &mut header);
            if header[0] == 0x11 {
                self.write_pci(u16::from(at[0]) + 2, &[header[2], u8::from(on) << 7]);
            }
            at[0] = header[1];
        }
        for vector in 0..=self.queues {
            self.write(bar::MSIX + 16 * vector, &0xfee0_0000u32.to_le_bytes());
            self.write(bar::MSIX + 16 * vector + 8, &(vector as u32).to_le_bytes());
            self.write(bar::MSIX + 16 * vector + 12, &0u32.to_le_bytes());
        }
    }

    /// Makes the chain with this head available.
    pub fn publish(&self, queue: u64, head: u16) {
        let at = self.ring(queue) + 0x400;
        let index = self.peek(at + 2);
        self.poke(at + 4 + 2 * u64::from(index % SIZE), &head.to_le_bytes());
        self.poke(at + 2, &index.wrapping_add(1).to_le_bytes());
    }

    /// Notifies, and lets the device's thread come to it.
    pub fn kick(&self, queue: u64) {
        let number = (queue % self.queues) as u32;
        match self.port {
            Port::Mmio(_) => self.set(0x50, number),
            Port::Pci(..) => {
                self.write(bar::NOTIFY + 4 * u64::from(number), &(number as u16).to_le_bytes());
            }
        }
        let ring = self.ring(queue);
        let start = Instant::now();
        while self.peek(ring + 0x402) != self.peek(ring + 0x802)
            && start.elapsed() < Duration::from_micros(200)
        {
            std::thread::yield_now();
        }
    }

    /// The device can be saved whatever was done to it, takes its own state back, and can be reset.
    pub fn check(&self) {
        self.device.pause();
        let state = self.device.save().expect("every state can be saved");
        self.device.restore(&state).expect("a device takes its own state");
        self.device.resume();
        self.device.reset();
        let mut status = [0; 4];
        let at = if matches!(self.port, Port::Mmio(_)) { 0x70 } else { 0x14 };
        self.read(at, &mut status[..if at == 0x70 { 4 } else { 1 }]);
        assert!(matches!(status, [0 | 0xff, _, _, _]), "it can be reset: {status:?}");
    }
}
