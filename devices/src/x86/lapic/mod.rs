//! Local APICs: xAPIC and x2APIC, SDM volume 3, chapter 11.
//!
//! An APIC is driven by its processor (registers, acknowledge), by the others (interprocessor interrupts), by
//! messages of the IOAPIC and of devices, by its pins, and by its timer. Whenever the processor has something to
//! look at, [`LapicBus`] calls the waker it was made with. It is for accelerators that have no local APIC of their own.

mod access;
mod regs;
mod transfer;

use std::collections::BTreeSet;
use std::fmt;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};

use holdfast_clock::{Timer, Timers};
use holdfast_device::{
    Access, Bus, BusDevice, BusError, ExtInt, FpuErrors, MsiController, MsiMessage, MsiVector,
};
use parking_lot::Mutex;
use vmm_sys_util::eventfd::EventFd;

pub use regs::LapicSignals;
use regs::{State, Vectors, error, get, lvt, mode, set};
pub use transfer::LapicState;

/// Where the registers are in xAPIC mode.
pub const LAPIC_BASE: u64 = 0xfee0_0000;
/// Length of their window.
pub const LAPIC_LEN: u64 = 0x1000;

/// Makes a vCPU look at its APIC.
pub type Waker = Arc<dyn Fn(u32) + Send + Sync>;
/// Hears of the end of level-triggered interrupts, with the vector.
pub type EoiReceiver = Arc<dyn Fn(u8) + Send + Sync>;

/// An interrupt on its way to APICs.
#[derive(Debug, Clone, Copy)]
struct Message {
    destination: u32,
    logical: bool,
    mode: u32,
    vector: u8,
    level: bool,
    assert: bool,
    /// The destination has eight bits: all ones are everyone.
    short: bool,
}

/// All local APICs of a VM.
pub struct LapicBus {
    apics: Vec<Arc<Lapic>>,
    waker: Waker,
    eoi: OnceLock<EoiReceiver>,
    ext_int: OnceLock<Arc<dyn ExtInt>>,
    fpu: OnceLock<Arc<dyn FpuErrors>>,
    /// Where the registers appear, so that they can appear elsewhere too.
    mmio: OnceLock<Weak<Bus>>,
    /// Pages where they do.
    pages: Mutex<BTreeSet<u64>>,
    me: Weak<LapicBus>,
    /// Where arbitration among equals begins.
    turn: std::sync::atomic::AtomicUsize,
}

impl fmt::Debug for LapicBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LapicBus").field("apics", &self.apics).finish_non_exhaustive()
    }
}

/// The local APIC of one vCPU.
pub struct Lapic {
    index: u32,
    state: Mutex<State>,
    /// There is a vector above the processor priority.
    ready: AtomicBool,
    /// There are signals.
    signalled: AtomicBool,
    /// LINT0 is high and passes external interrupts on.
    external: AtomicBool,
    /// The base in IA32_APIC_BASE.
    page: AtomicU64,
    timer: Timer,
    timers: Arc<Timers>,
    bus: Weak<LapicBus>,
}

impl fmt::Debug for Lapic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Lapic")
            .field("index", &self.index)
            .field("state", &*self.state.lock())
            .finish_non_exhaustive()
    }
}

/// What follows from a change of an APIC's state, done once its lock is free.
#[derive(Debug, Default)]
struct After {
    /// Level-triggered interrupt that ended.
    eoi: Option<u8>,
    /// Interrupt to send.
    send: Option<(Message, Shorthand)>,
}

/// Destination shorthands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Shorthand {
    None,
    Itself,
    All,
    Others,
}

impl LapicBus {
    /// Makes an APIC for each of `ids`, the APIC ids of vCPU 0, 1, ...; vCPU 0 is the bootstrap processor.
    pub fn new(ids: &[u32], timers: &Arc<Timers>, waker: Waker) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<LapicBus>| {
            let apics = (0..).zip(ids).map(|(index, id)| Lapic::new(index, *id, timers, me)).collect();
            Self {
                apics,
                waker,
                eoi: OnceLock::new(),
                ext_int: OnceLock::new(),
                fpu: OnceLock::new(),
                mmio: OnceLock::new(),
                pages: Mutex::default(),
                me: me.clone(),
                turn: std::sync::atomic::AtomicUsize::new(0),
            }
        })
    }

    /// The APIC of vCPU `index`.
    pub fn apic(&self, index: u32) -> Option<&Arc<Lapic>> {
        self.apics.get(index as usize)
    }

    /// The APIC that a processor reaches there.
    fn found(&self, access: Access) -> Option<&Arc<Lapic>> {
        let page = access.address.wrapping_sub(access.offset);
        self.apic(access.vcpu.unwrap_or(0)).filter(|apic| apic.page() == page)
    }

    /// Connects the IOAPIC. False if there is one already.
    pub fn connect_eoi(&self, receiver: EoiReceiver) -> bool {
        self.eoi.set(receiver).is_ok()
    }

    /// Connects the 8259 pair. False if there is one already.
    pub fn connect_ext_int(&self, source: Arc<dyn ExtInt>) -> bool {
        self.ext_int.set(source).is_ok()
    }

    /// Connects what takes x87 errors. False if there is something already.
    pub fn connect_fpu_errors(&self, sink: Arc<dyn FpuErrors>) -> bool {
        self.fpu.set(sink).is_ok()
    }

    /// Attaches the registers to the memory bus, where processors find them and may move them.
    ///
    /// # Errors
    /// [`BusError`] if something else is there.
    pub fn connect_memory(&self, mmio: &Arc<Bus>) -> Result<(), BusError> {
        // A second bus would be a bug of the machine; the first one stays.
        let _ = self.mmio.set(Arc::downgrade(mmio));
        self.attach_page(LAPIC_BASE)
    }

    fn attach_page(&self, base: u64) -> Result<(), BusError> {
        let mut pages = self.pages.lock();
        let (Some(mmio), Some(me)) = (self.mmio.get().and_then(Weak::upgrade), self.me.upgrade()) else {
            return Ok(());
        };
        if !pages.contains(&base) {
            mmio.attach(base, LAPIC_LEN, "lapic", me as Arc<dyn BusDevice>)?;
            pages.insert(base);
        }
        Ok(())
    }

    /// A processor has moved its registers to `base`: pages that no APIC uses any more are given up, but for the first.
    fn moved(&self, base: u64) {
        let used: BTreeSet<u64> = self.apics.iter().map(|a| a.page()).collect();
        let stale: Vec<u64> = {
            let mut pages = self.pages.lock();
            let stale = pages.iter().copied().filter(|p| *p != LAPIC_BASE && !used.contains(p)).collect();
            pages.retain(|p| *p == LAPIC_BASE || used.contains(p));
            stale
        };
        if let Some(mmio) = self.mmio.get().and_then(Weak::upgrade) {
            for page in stale {
                if let Err(error) = mmio.detach(page) {
                    tracing::warn!(%error, "the local APIC's page was not attached");
                }
            }
        }
        if let Err(error) = self.attach_page(base) {
            tracing::warn!(%error, "a guest moves its local APIC into the way");
        }
    }

    /// Sets a pin of a vCPU's APIC: 0 is LINT0, 1 is LINT1.
    pub fn set_pin(&self, index: u32, pin: u32, level: bool) {
        if let Some(apic) = self.apic(index) {
            apic.set_pin(pin, level);
        }
    }

    fn deliver(&self, message: Message) {
        let matching = self.apics.iter().filter(|a| a.matches(&message));
        if message.mode != mode::LOWEST {
            return matching.for_each(|a| a.accept(&message));
        }
        // The lowest processor priority; among equals, each in turn.
        let candidates: Vec<&Arc<Lapic>> = matching.filter(|a| a.state.lock().takes_vectors()).collect();
        if candidates.is_empty() {
            return;
        }
        let turn = self.turn.fetch_add(1, Ordering::Relaxed);
        let rotated = candidates.iter().cycle().skip(turn % candidates.len()).take(candidates.len());
        if let Some(apic) = rotated.min_by_key(|a| a.state.lock().ppr()) {
            apic.accept(&Message { mode: mode::FIXED, ..message });
        }
    }

    fn finish(&self, from: u32, after: &After) {
        if let Some(vector) = after.eoi
            && let Some(receiver) = self.eoi.get()
        {
            receiver(vector);
        }
        let Some((message, shorthand)) = &after.send else { return };
        match shorthand {
            Shorthand::None => self.deliver(*message),
            Shorthand::Itself => {
                if let Some(apic) = self.apic(from) {
                    apic.accept(message);
                }
            }
            Shorthand::All | Shorthand::Others => {
                for apic in &self.apics {
                    if *shorthand == Shorthand::All || apic.index != from {
                        apic.accept(message);
                    }
                }
            }
        }
    }
}

impl MsiController for LapicBus {
    fn send(&self, message: MsiMessage) -> io::Result<()> {
        if message.address >> 20 & 0xfff != 0xfee {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                format!("no interrupt controller at {:#x}", message.address),
            ));
        }
        let low = (message.address >> 12 & 0xff) as u32;
        let high = (message.address >> 32) as u32 & 0xffff_ff00;
        self.deliver(Message {
            destination: high | low,
            logical: message.address >> 2 & 1 != 0,
            mode: message.data >> 8 & 7,
            vector: message.data as u8,
            level: message.data >> 15 & 1 != 0,
            assert: true,
            short: high == 0,
        });
        Ok(())
    }

    fn vector(self: Arc<Self>) -> io::Result<Box<dyn MsiVector>> {
        Ok(Box::new(Vector { bus: self, state: Mutex::default() }))
    }
}

#[derive(Debug, Default)]
struct VectorState {
    message: Option<MsiMessage>,
    pending: bool,
}

/// A device's message-signalled interrupt.
#[derive(Debug)]
struct Vector {
    bus: Arc<LapicBus>,
    state: Mutex<VectorState>,
}

impl MsiVector for Vector {
    fn set(&self, message: Option<MsiMessage>) -> io::Result<()> {
        let mut state = self.state.lock();
        state.message = message;
        let due = match message {
            Some(_) if state.pending => {
                state.pending = false;
                message
            }
            _ => None,
        };
        drop(state);
        due.map_or(Ok(()), |m| self.bus.send(m))
    }

    fn trigger(&self) -> io::Result<()> {
        let mut state = self.state.lock();
        let Some(message) = state.message else {
            state.pending = true;
            return Ok(());
        };
        drop(state);
        self.bus.send(message)
    }

    fn eventfd(&self) -> Option<&EventFd> {
        None
    }

    fn pending(&self) -> bool {
        self.state.lock().pending
    }
}

/// The window of registers: each vCPU sees its own.
impl BusDevice for LapicBus {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0xff);
        if let Some(apic) = self.found(access) {
            data.fill(0);
            apic.mmio_read(access.offset, data);
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if let Some(apic) = self.found(access) {
            apic.mmio_write(access.offset, data);
        }
    }
}

impl Lapic {
    fn new(index: u32, id: u32, timers: &Arc<Timers>, bus: &Weak<LapicBus>) -> Arc<Self> {
        Arc::new_cyclic(|me: &Weak<Lapic>| {
            let weak = me.clone();
            let timer = timers.vcpu_timer(move || {
                if let Some(apic) = weak.upgrade() {
                    apic.expired();
                }
            });
            let this = Self {
                index,
                state: Mutex::new(State::new(id, index == 0)),
                ready: AtomicBool::new(false),
                signalled: AtomicBool::new(false),
                external: AtomicBool::new(false),
                page: AtomicU64::new(LAPIC_BASE),
                timer,
                timers: Arc::clone(timers),
                bus: bus.clone(),
            };
            this.publish(&this.state.lock());
            this
        })
    }

    /// The page of its registers.
    fn page(&self) -> u64 {
        self.page.load(Ordering::Relaxed)
    }

    fn now(&self) -> u64 {
        self.timers.clock().now()
    }

    /// Publishes what the processor asks often.
    fn publish(&self, s: &State) -> bool {
        let ready = s.deliverable().is_some();
        let external = s.pins[0] && s.passes_ext_int();
        self.page.store(s.base & regs::base::ADDRESS, Ordering::Relaxed);
        self.ready.store(ready, Ordering::SeqCst);
        self.external.store(external, Ordering::SeqCst);
        self.signalled.store(s.signals.any(), Ordering::SeqCst);
        ready || external || s.signals.any()
    }

    /// Changes the state, and makes the processor look if it has to.
    fn change<T>(&self, change: impl FnOnce(&mut State) -> T) -> T {
        let mut s = self.state.lock();
        let result = change(&mut s);
        let look = self.publish(&s);
        drop(s);
        if look && let Some(bus) = self.bus.upgrade() {
            (bus.waker)(self.index);
        }
        result
    }

    fn finish(&self, after: &After) {
        if (after.eoi.is_some() || after.send.is_some())
            && let Some(bus) = self.bus.upgrade()
        {
            bus.finish(self.index, after);
        }
    }

    fn matches(&self, m: &Message) -> bool {
        let s = self.state.lock();
        if !s.on() {
            return false;
        }
        let broadcast = if m.short { m.destination & 0xff == 0xff } else { m.destination == u32::MAX };
        if broadcast {
            return true;
        }
        if !m.logical {
            let id = if s.x2apic() { s.x2id } else { u32::from(s.id) };
            return id == m.destination;
        }
        if s.x2apic() {
            let ldr = s.x2_ldr();
            return ldr >> 16 == m.destination >> 16 && ldr & m.destination & 0xffff != 0;
        }
        let (ldr, destination) = (s.ldr >> 24, m.destination & 0xff);
        match s.dfr >> 28 {
            0xf => ldr & destination != 0,
            0 => {
                let cluster = destination >> 4;
                (cluster == 0xf || cluster == ldr >> 4) && ldr & destination & 0xf != 0
            }
            _ => false,
        }
    }

    fn accept(&self, m: &Message) {
        self.change(|s| match m.mode {
            mode::FIXED | mode::LOWEST => s.request(m.vector, m.level),
            mode::NMI => s.signals.add_nmi(),
            mode::INIT if m.assert => {
                s.signals = LapicSignals { init: true, sipi: None, nmi: s.signals.nmi };
            }
            mode::STARTUP => s.signals.sipi = Some(m.vector),
            _ => {}
        });
    }

    fn set_pin(&self, pin: u32, level: bool) {
        self.change(|s| {
            let Some(place) = s.pins.get_mut(pin as usize) else { return };
            let rose = level && !*place;
            *place = level;
            let entry = s.lvt[if pin == 0 { lvt::LINT0 } else { lvt::LINT1 }];
            if rose && entry & lvt::MASKED == 0 {
                match entry >> 8 & 7 {
                    mode::FIXED => s.request(entry as u8, entry >> 15 & 1 != 0),
                    mode::NMI => s.signals.add_nmi(),
                    mode::INIT => s.signals.init = true,
                    _ => {}
                }
            }
        });
    }

    /// The timer is due.
    fn expired(&self) {
        let now = self.now();
        self.change(|s| {
            if s.due.is_none_or(|at| at > now) {
                return;
            }
            match s.timer_mode() {
                2 => s.deadline = (0, 0),
                1 => {}
                _ => s.fired = true,
            }
            s.local(lvt::TIMER);
        });
        self.arm();
    }

    /// Sets the alarm. The state stays locked meanwhile: of the processor and the timer thread, the one that looked
    /// last has to set it last.
    fn arm(&self) {
        let now = self.now();
        let mut s = self.state.lock();
        s.due = s.expiry(now);
        match s.due {
            Some(at) => self.timer.arm(at),
            None => self.timer.disarm(),
        }
    }
}

/// What the processor asks of its APIC.
impl Lapic {
    /// The (x2)APIC id.
    pub fn id(&self) -> u32 {
        self.state.lock().x2id
    }

    /// Gives the APIC another id, before its processor runs.
    pub fn set_id(&self, id: u32) {
        self.change(|s| *s = State::new(id, self.index == 0));
    }

    /// True if [`Lapic::acknowledge`] would give a vector.
    #[inline]
    pub fn has_interrupt(&self) -> bool {
        self.ready.load(Ordering::SeqCst) || self.external.load(Ordering::SeqCst)
    }

    /// True if there are signals to take.
    #[inline]
    pub fn has_signal(&self) -> bool {
        self.signalled.load(Ordering::SeqCst)
    }

    /// Takes the most urgent interrupt into service: its vector.
    pub fn acknowledge(&self) -> Option<u8> {
        if self.external.load(Ordering::SeqCst)
            && let Some(bus) = self.bus.upgrade()
            && let Some(source) = bus.ext_int.get()
            && source.pending()
        {
            return Some(source.acknowledge());
        }
        let mut s = self.state.lock();
        let vector = s.deliverable();
        if let Some(vector) = vector {
            set(&mut s.irr, vector, false);
            set(&mut s.isr, vector, true);
        }
        self.publish(&s);
        vector
    }

    /// Takes the signals.
    pub fn take_signals(&self) -> LapicSignals {
        let mut s = self.state.lock();
        let signals = std::mem::take(&mut s.signals);
        self.publish(&s);
        signals
    }

    /// The processor drives `FERR#`, which is no pin of the APIC but goes the same way to the chipset. True if it is to
    /// ignore the error (`IGNNE#`), which it is where nothing takes it.
    pub fn set_ferr(&self, level: bool) -> bool {
        self.bus.upgrade().and_then(|bus| bus.fpu.get().map(|sink| sink.set_ferr(level))).unwrap_or(true)
    }

    /// Sends an interrupt of the vector and delivery mode in `icr` (bits 0 to 10 of the interrupt command) to the APIC with
    /// `id`. False if there is none that is on.
    pub fn send_ipi(&self, id: u32, icr: u32) -> bool {
        let Some(bus) = self.bus.upgrade() else { return false };
        let message = Message {
            destination: id,
            logical: false,
            mode: icr >> 8 & 7,
            vector: icr as u8,
            level: false,
            assert: true,
            short: false,
        };
        let target = bus.apics.iter().find(|apic| apic.id() == id && apic.state.lock().on());
        if let Some(apic) = target {
            apic.accept(&message);
        }
        target.is_some()
    }

    /// Latches an NMI.
    pub fn raise_nmi(&self) {
        self.change(|s| s.signals.add_nmi());
    }

    /// CR8.
    pub fn cr8(&self) -> u8 {
        (self.state.lock().tpr >> 4) as u8 & 15
    }

    /// Sets CR8.
    pub fn set_cr8(&self, value: u8) {
        self.change(|s| s.tpr = u32::from(value & 15) << 4);
    }

    /// IA32_TSC_DEADLINE.
    pub fn tsc_deadline(&self) -> u64 {
        let s = self.state.lock();
        if s.timer_mode() == 2 { s.deadline.0 } else { 0 }
    }

    /// Writes IA32_TSC_DEADLINE, which is due at `at`.
    pub fn set_tsc_deadline(&self, value: u64, at: u64) {
        {
            let mut s = self.state.lock();
            if s.timer_mode() != 2 {
                return;
            }
            s.deadline = (value, at);
        }
        if value != 0 && at <= self.now() {
            // Already past: the processor finds the interrupt behind its write.
            self.change(|s| {
                s.deadline = (0, 0);
                s.local(lvt::TIMER);
            });
        }
        self.arm();
    }

    /// After power-up, or INIT (`init`), which keeps the base.
    pub fn reset(&self, init: bool) {
        self.timer.disarm();
        self.change(|s| {
            if init {
                s.clear();
            } else {
                let pins = s.pins;
                *s = State { pins, ..State::new(s.x2id, self.index == 0) };
            }
        });
    }
}

impl State {
    /// A vectored interrupt arrives.
    fn request(&mut self, vector: u8, level: bool) {
        if !self.takes_vectors() {
            return;
        }
        if vector < 16 {
            return self.note(error::RECEIVE_VECTOR);
        }
        set(&mut self.irr, vector, true);
        set(&mut self.tmr, vector, level);
    }

    /// An entry of the local vector table fires.
    fn local(&mut self, n: usize) {
        let Some(entry) = self.lvt.get(n).copied() else { return };
        if entry & lvt::MASKED != 0 {
            return;
        }
        if n == lvt::TIMER || entry >> 8 & 7 == mode::FIXED {
            self.request(entry as u8, false);
        } else if entry >> 8 & 7 == mode::NMI {
            self.signals.add_nmi();
        }
    }

    /// An error was found.
    fn note(&mut self, what: u32) {
        let fresh = self.errors & what == 0;
        self.errors |= what;
        let entry = self.lvt[lvt::ERROR];
        if fresh && entry & lvt::MASKED == 0 && entry & 0xff >= 16 && self.takes_vectors() {
            set(&mut self.irr, entry as u8, true);
            set(&mut self.tmr, entry as u8, false);
        }
    }

    /// The end of the interrupt in service; the vector to broadcast, if it was level-triggered.
    fn end_of_interrupt(&mut self) -> Option<u8> {
        let vector = regs::highest(&self.isr)?;
        set(&mut self.isr, vector, false);
        get(&self.tmr, vector).then_some(vector)
    }

    fn words(v: &Vectors, register: u32, first: u32) -> u32 {
        v.get((register - first) as usize).copied().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests;
