//! Interrupt routes: MSI vectors with irqfds, and the routes that make the kernel report EOIs.
//!
//! With `kernel_irqchip=split` the kernel tells user space of an EOI (`KVM_EXIT_IOAPIC_EOI`) only for vectors that
//! one of the 24 reserved routes names as level-triggered. So every level-triggered message that is sent or
//! routed is also entered there; an IOAPIC with 24 pins never has more of them live.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::sync::Arc;

use holdfast_device::{IrqSink, MsiController, MsiMessage, MsiVector};
use kvm_bindings::{
    KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER,
    KVM_IRQCHIP_PIC_SLAVE, KvmIrqRouting, kvm_irq_routing_entry, kvm_irq_routing_irqchip,
    kvm_irq_routing_msi, kvm_msi,
};
use kvm_ioctls::VmFd;
use parking_lot::Mutex;
use vmm_sys_util::eventfd::{EFD_NONBLOCK, EventFd};

use crate::io_error;

/// IOAPIC pins: routes below this number are theirs.
pub const IOAPIC_PINS: u32 = 24;

#[derive(Debug, Default)]
struct Table {
    /// Routes of MSI vectors by GSI; `None`: allocated and without a message.
    vectors: BTreeMap<u32, Option<MsiMessage>>,
    /// Level-triggered messages in the order of last use, latest first. Split irqchip only.
    level: VecDeque<MsiMessage>,
}

/// All interrupt routes of a VM.
#[derive(Debug)]
pub struct Routes {
    vm: Arc<VmFd>,
    kernel_chips: bool,
    limit: u32,
    table: Mutex<Table>,
}

/// True for messages that interrupt controllers on the processors' bus take (SDM volume 3, 11.11.1).
fn deliverable(m: MsiMessage) -> bool {
    m.address >> 20 & 0xfff == 0xfee
}

/// Trigger mode level (SDM volume 3, 11.11.2).
fn is_level(m: MsiMessage) -> bool {
    m.data & 1 << 15 != 0
}

fn msi_entry(gsi: u32, m: MsiMessage) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_MSI, ..Default::default() };
    entry.u.msi = kvm_irq_routing_msi {
        address_lo: m.address as u32,
        address_hi: (m.address >> 32) as u32,
        data: m.data,
        ..Default::default()
    };
    entry
}

fn chip_entry(gsi: u32, irqchip: u32, pin: u32) -> kvm_irq_routing_entry {
    let mut entry = kvm_irq_routing_entry { gsi, type_: KVM_IRQ_ROUTING_IRQCHIP, ..Default::default() };
    entry.u.irqchip = kvm_irq_routing_irqchip { irqchip, pin };
    entry
}

/// The kernel's own controllers: GSI n is pin n of both, except that the PIT's GSI 0 is pin 2 of the IOAPIC, as
/// ACPI tables of PCs say.
fn chip_entries() -> Vec<kvm_irq_routing_entry> {
    let mut out = Vec::new();
    for gsi in 0..16 {
        let (chip, pin) =
            if gsi < 8 { (KVM_IRQCHIP_PIC_MASTER, gsi) } else { (KVM_IRQCHIP_PIC_SLAVE, gsi - 8) };
        if gsi != 2 {
            out.push(chip_entry(gsi, chip, pin));
        }
    }
    for gsi in (0..IOAPIC_PINS).filter(|gsi| *gsi != 2) {
        out.push(chip_entry(gsi, KVM_IRQCHIP_IOAPIC, if gsi == 0 { 2 } else { gsi }));
    }
    out
}

impl Routes {
    /// The routes of `vm`, of which it can have `limit`; `kernel_chips`: PIC and IOAPIC are in the kernel.
    pub fn new(vm: Arc<VmFd>, kernel_chips: bool, limit: u32) -> io::Result<Arc<Self>> {
        let routes = Self { vm, kernel_chips, limit, table: Mutex::default() };
        routes.commit(&routes.table.lock())?;
        Ok(Arc::new(routes))
    }

    fn commit(&self, table: &Table) -> io::Result<()> {
        let mut entries = if self.kernel_chips { chip_entries() } else { Vec::new() };
        entries.extend((0u32..).zip(&table.level).map(|(gsi, m)| msi_entry(gsi, *m)));
        entries.extend(table.vectors.iter().filter_map(|(gsi, m)| m.map(|m| msi_entry(*gsi, m))));
        let routing =
            KvmIrqRouting::from_entries(&entries).map_err(|e| io::Error::other(format!("{e:?}")))?;
        self.vm.set_gsi_routing(&routing).map_err(io_error)
    }

    /// Sees to it that the EOI of `m` will be reported. True if the routes must be committed.
    fn note_level(&self, table: &mut Table, m: MsiMessage) -> bool {
        if self.kernel_chips || !is_level(m) {
            return false;
        }
        let known = table.level.iter().position(|l| *l == m);
        if let Some(at) = known {
            table.level.remove(at);
        }
        table.level.push_front(m);
        table.level.truncate(IOAPIC_PINS as usize);
        known.is_none()
    }

    /// The user-space IOAPIC's pins send these messages now. Those of masked pins are kept: an interrupt in
    /// service whose pin the guest masks must still report its EOI.
    pub fn note_ioapic(&self, messages: &[Option<MsiMessage>]) {
        let mut table = self.table.lock();
        let news: Vec<bool> = messages.iter().flatten().map(|m| self.note_level(&mut table, *m)).collect();
        if news.contains(&true)
            && let Err(e) = self.commit(&table)
        {
            tracing::warn!("cannot set the IOAPIC's routes: {e}");
        }
    }

    fn allocate(&self) -> io::Result<u32> {
        let mut table = self.table.lock();
        let gsi = (IOAPIC_PINS..self.limit).find(|gsi| !table.vectors.contains_key(gsi));
        let gsi =
            gsi.ok_or_else(|| io::Error::new(io::ErrorKind::StorageFull, "no interrupt route is left"))?;
        table.vectors.insert(gsi, None);
        Ok(gsi)
    }

    fn route(&self, gsi: u32, m: MsiMessage) -> io::Result<()> {
        let mut table = self.table.lock();
        let new = table.vectors.insert(gsi, Some(m)) != Some(Some(m));
        if self.note_level(&mut table, m) || new {
            self.commit(&table)?;
        }
        Ok(())
    }

    fn free(&self, gsi: u32) {
        let mut table = self.table.lock();
        if let Some(Some(_)) = table.vectors.remove(&gsi)
            && let Err(e) = self.commit(&table)
        {
            tracing::warn!("cannot remove interrupt route {gsi}: {e}");
        }
    }

    fn signal(&self, m: MsiMessage) -> io::Result<()> {
        if !deliverable(m) {
            tracing::debug!("an MSI to {:#x} goes to no interrupt controller", m.address);
            return Ok(());
        }
        if is_level(m) {
            let mut table = self.table.lock();
            if self.note_level(&mut table, m) {
                self.commit(&table)?;
            }
        }
        let msi = kvm_msi {
            address_lo: m.address as u32,
            address_hi: (m.address >> 32) as u32,
            data: m.data,
            ..Default::default()
        };
        // Zero means that the guest's local APIC did not take it, which is the guest's business.
        self.vm.signal_msi(msi).map(|_| ()).map_err(io_error)
    }
}

impl MsiController for Routes {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        self.signal(message)
    }

    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        let fd = EventFd::new(EFD_NONBLOCK | libc::EFD_CLOEXEC)?;
        let gsi = self.allocate()?;
        Ok(Box::new(Vector { routes: self, gsi, fd, state: Mutex::default() }))
    }
}

#[derive(Debug, Default)]
struct VectorState {
    message: Option<MsiMessage>,
    /// The eventfd is connected to the route.
    connected: bool,
    /// Triggered while masked.
    pending: bool,
}

/// One vector: a route and the eventfd that triggers it.
#[derive(Debug)]
struct Vector {
    routes: Arc<Routes>,
    gsi: u32,
    fd: EventFd,
    state: Mutex<VectorState>,
}

impl Vector {
    fn disconnect(&self, state: &mut VectorState) -> io::Result<()> {
        if state.connected {
            self.routes.vm.unregister_irqfd(&self.fd, self.gsi).map_err(io_error)?;
            state.connected = false;
        }
        Ok(())
    }
}

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state.lock();
        let Some(m) = message.filter(|m| deliverable(*m)) else {
            // The route stays: a level-triggered interrupt in service must still report its EOI.
            state.message = message;
            return self.disconnect(&mut state);
        };
        self.routes.route(self.gsi, m)?;
        state.message = Some(m);
        if !state.connected {
            // The kernel looks at the eventfd now: what was written while masked is delivered.
            self.routes.vm.register_irqfd(&self.fd, self.gsi).map_err(io_error)?;
            state.connected = true;
        }
        if std::mem::take(&mut state.pending) {
            self.routes.signal(m)?;
        }
        Ok(())
    }

    fn trigger(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        match state.message {
            Some(m) => self.routes.signal(m),
            None => {
                state.pending = true;
                Ok(())
            }
        }
    }

    fn eventfd(&self) -> Option<&EventFd> {
        Some(&self.fd)
    }

    fn pending(&self) -> bool {
        let mut state = self.state.lock();
        if state.message.is_none() && self.fd.read().is_ok() {
            state.pending = true;
        }
        state.message.is_none() && state.pending
    }
}

impl Drop for Vector {
    fn drop(&mut self) {
        let state = self.state.get_mut();
        if state.connected
            && let Err(e) = self.routes.vm.unregister_irqfd(&self.fd, self.gsi)
        {
            tracing::warn!("cannot disconnect interrupt route {}: {e}", self.gsi);
        }
        self.routes.free(self.gsi);
    }
}

/// The input pins of the kernel's PIC and IOAPIC, by GSI.
#[derive(Debug)]
pub struct KernelPins(pub Arc<VmFd>);

impl IrqSink for KernelPins {
    fn set_level(&self, pin: u32, level: bool) {
        if let Err(e) = self.0.set_irq_line(pin, level) {
            tracing::warn!("cannot set interrupt line {pin}: {e}");
        }
    }
}
