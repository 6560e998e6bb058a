//! The machine that guests run in: RAM, the PC's interrupt controllers, and the devices through which a guest
//! speaks to its test.

use std::fmt::Write;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::thread::JoinHandle;

use holdfast_accel::{Accelerator, Exit, IrqChip, Kicker, Vcpu, Vm, VmSpec, Watchpoint};
use holdfast_arch::x86_64::{CpuidModel, State, features};
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_clock::{HostRandom, Timers, VmClock, host_monotonic};
use holdfast_device::{
    Access, BuildContext, Bus, BusDevice, CpuLines, Device, DeviceState, ExtInt, FpuErrors, IrqSink,
    MsiController, MsiMessage, MsiVector, SystemEvent, SystemSink,
};
use holdfast_devices::x86::{FPU_PORT, Gsi, IoApic, IoApicConfig, IrqTarget, PicPair, Pit, PitConfig};
use holdfast_memory::GuestMemory;
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

use crate::asm::{self, Image};
use crate::{Failure, LIMIT};

/// What guest and host share.
#[derive(Debug, Default)]
pub struct Shared {
    out: Mutex<String>,
    done: AtomicBool,
    stop: AtomicBool,
    boot: OnceLock<Arc<dyn Kicker>>,
}

impl Shared {
    /// Appends to the output.
    pub fn print(&self, text: &str) {
        self.out.lock().push_str(text);
    }

    fn interrupt(&self, flag: &AtomicBool) {
        flag.store(true, Ordering::SeqCst);
        if let Some(kicker) = self.boot.get() {
            kicker.kick();
        }
    }
}

fn hex(data: &[u8]) -> String {
    data.iter().rev().fold(String::new(), |mut s, b| {
        let _ = write!(s, "{b:02x}");
        s
    })
}

fn number(data: &[u8]) -> u64 {
    data.iter().rev().fold(0, |v, b| v << 8 | u64::from(*b))
}

/// The ports below 256 by which a guest speaks to its test.
#[derive(Debug)]
struct Console {
    shared: Arc<Shared>,
    gsi: Arc<Gsi>,
    lines: Arc<dyn CpuLines>,
}

impl BusDevice for Console {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, access: Access, data: &[u8]) {
        match access.address as u16 {
            asm::OUT => self.shared.print(&String::from_utf8_lossy(data)),
            asm::HEX => self.shared.print(&(hex(data) + " ")),
            asm::DONE => self.shared.interrupt(&self.shared.done),
            asm::STOP => self.shared.interrupt(&self.shared.stop),
            asm::GSI => {
                let value = number(data);
                self.gsi.set_level((value & 0x7f) as u32, value & 0x80 != 0);
            }
            asm::LINT1 => self.lines.set_cpu_pin(access.vcpu.unwrap_or(0), 1, number(data) & 1 != 0),
            _ => {}
        }
    }
}

/// Answers reads with a pattern and writes down every access.
#[derive(Debug)]
struct Echo(Arc<Shared>);

impl BusDevice for Echo {
    fn read(&self, access: Access, data: &mut [u8]) {
        for (n, byte) in (0u64..).zip(data.iter_mut()) {
            *byte = (0xa0 + access.offset + n) as u8;
        }
        self.0.print(&format!("r{}@{:x} ", data.len(), access.offset));
    }

    fn write(&self, access: Access, data: &[u8]) {
        self.0.print(&format!("w{}@{:x}={} ", data.len(), access.offset, hex(data)));
    }
}

/// One MSI vector under the guest's command.
#[derive(Debug)]
struct MsiDevice {
    shared: Arc<Shared>,
    controller: Arc<dyn MsiController>,
    vector: Box<dyn MsiVector>,
    message: Mutex<MsiMessage>,
}

impl BusDevice for MsiDevice {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, access: Access, data: &[u8]) {
        let value = number(data);
        let mut message = self.message.lock();
        let done = match (access.offset, value) {
            (0, _) => {
                message.address = value;
                Ok(())
            }
            (4, _) => {
                message.data = value as u32;
                Ok(())
            }
            (8, 0) => self.vector.set(None),
            (8, 1) => self.vector.set(Some(*message)),
            (8, 2) => self.vector.trigger(),
            (8, 3) => match self.vector.eventfd() {
                Some(fd) => fd.write(1),
                None => self.vector.trigger(),
            },
            (8, 4) => {
                self.shared.print(if self.vector.pending() { "pending " } else { "clear " });
                Ok(())
            }
            (8, 5) => self.controller.send(*message),
            _ => Ok(()),
        };
        if let Err(e) = done {
            self.shared.print(&format!("[{e}]"));
        }
    }
}

#[derive(Debug)]
struct NoSystem;

impl SystemSink for NoSystem {
    fn request(&self, _event: SystemEvent) {}
}

/// What a guest needs.
#[derive(Debug, Clone, Copy)]
pub struct Needs {
    /// vCPUs, 1 or 2.
    pub vcpus: u32,
}

/// Why a run came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The guest is done.
    Done,
    /// It asked the host to act.
    Asked,
    /// A debug exit at this address.
    Debug(u64),
    /// A watchpoint was hit before this address.
    Watch(u64, Watchpoint),
}

/// What was saved of a whole machine.
#[derive(Debug)]
pub struct Saved {
    cpu: String,
    vm: String,
    devices: Vec<DeviceState>,
    ram: Vec<u8>,
    now: u64,
    out: String,
}

/// A machine with a guest.
#[derive(Debug)]
pub struct Rig {
    /// The accelerator's VM.
    pub vm: Arc<dyn Vm>,
    /// The boot vCPU.
    pub vcpu: Box<dyn Vcpu>,
    /// RAM.
    pub memory: GuestMemory,
    /// Memory bus.
    pub mmio: Arc<Bus>,
    /// Port bus.
    pub pio: Arc<Bus>,
    /// Output and requests.
    pub shared: Arc<Shared>,
    context: BuildContext,
    devices: Vec<Arc<dyn Device>>,
    others: Vec<(Arc<dyn Kicker>, JoinHandle<()>)>,
    began: u64,
}

fn rig(e: impl std::fmt::Display) -> Failure {
    Failure::Rig(e.to_string())
}

/// The lines into the interrupt controllers, and what is saved of those.
type Wiring = (Arc<Gsi>, Vec<Arc<dyn Device>>);

/// The interrupt controllers, and the lines into them.
fn controllers(vm: &Arc<dyn Vm>, irqchip: IrqChip, context: &BuildContext) -> Result<Wiring, Failure> {
    if irqchip == IrqChip::On {
        let sink = vm.kernel_irq_sink().ok_or_else(|| rig("no kernel interrupt controllers"))?;
        return Ok((Gsi::new(IrqTarget::Kernel(sink)), Vec::new()));
    }
    let pic = PicPair::build(vm.cpu_lines(), context).map_err(rig)?;
    vm.connect_ext_int(Arc::clone(&pic) as Arc<dyn ExtInt>);
    let msi = context.msi.clone().ok_or_else(|| rig("the accelerator takes no MSIs"))?;
    let weak: Weak<dyn Vm> = Arc::downgrade(vm);
    let config = IoApicConfig {
        version: 0x20,
        id: 0,
        msi,
        routes: Some(Arc::new(move |routes| {
            if let Some(vm) = weak.upgrade() {
                vm.ioapic_routes_changed(routes);
            }
        })),
    };
    let ioapic = IoApic::build(config, context).map_err(rig)?;
    let receiver = Arc::downgrade(&ioapic);
    vm.connect_eoi(Arc::new(move |vector| {
        if let Some(ioapic) = receiver.upgrade() {
            ioapic.eoi(vector);
        }
    }));
    let target = IrqTarget::Split { pic: Arc::clone(&pic), ioapic: Arc::clone(&ioapic) };
    let gsi = Gsi::new(target);
    vm.connect_fpu_errors(Arc::clone(&gsi) as Arc<dyn FpuErrors>);
    context.pio.attach(FPU_PORT, 1, "fpu", Arc::clone(&gsi) as Arc<dyn BusDevice>).map_err(rig)?;
    let pit = Pit::build(PitConfig { irq: gsi.line(0) }, context).map_err(rig)?;
    Ok((Arc::clone(&gsi), vec![pic, ioapic, pit, gsi]))
}

impl Rig {
    /// A machine for `image`, which starts in real mode at 0:[`asm::ENTRY`].
    ///
    /// # Errors
    /// [`Failure`].
    pub fn new(
        accel: &dyn Accelerator,
        irqchip: IrqChip,
        image: &Image,
        needs: Needs,
    ) -> Result<Self, Failure> {
        let mut rig = Self::empty(accel, irqchip, needs, CpuidModel::default())?;
        rig.load(image)?;
        Ok(rig)
    }

    /// The same with one vCPU of a model, written as on the command line.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn of_model(
        accel: &dyn Accelerator,
        irqchip: IrqChip,
        image: &Image,
        model: &str,
    ) -> Result<Self, Failure> {
        let model = features::parse(model).map_err(self::rig)?;
        let mut rig = Self::empty(accel, irqchip, Needs { vcpus: 1 }, model)?;
        rig.load(image)?;
        Ok(rig)
    }

    fn load(&mut self, image: &Image) -> Result<(), Failure> {
        for (at, bytes) in &image.0 {
            self.memory.write_slice(bytes, GuestAddress(*at)).map_err(rig)?;
        }
        self.start_at_entry()
    }

    /// Makes the boot vCPU, in its reset state, start at 0:[`asm::ENTRY`].
    ///
    /// # Errors
    /// [`Failure`].
    pub fn start_at_entry(&mut self) -> Result<(), Failure> {
        let mut state = self.state()?;
        state.rip = asm::ENTRY;
        if let Some(cs) = state.segments.get_mut(1) {
            (cs.selector, cs.base) = (0, 0);
        }
        self.vcpu.set_state(&CpuState::X86_64(Box::new(state)))?;
        Ok(())
    }

    /// Has the next run end as if the guest had asked, after `delay`.
    ///
    /// # Errors
    /// [`Failure::Rig`] if there is no thread for it.
    pub fn ask_after(&self, delay: std::time::Duration) -> Result<(), Failure> {
        let shared = Arc::clone(&self.shared);
        let body = move || {
            std::thread::sleep(delay);
            shared.interrupt(&shared.stop);
        };
        std::thread::Builder::new().name("asker".into()).spawn(body).map(|_| ()).map_err(rig)
    }

    fn empty(
        accel: &dyn Accelerator,
        irqchip: IrqChip,
        needs: Needs,
        model: CpuidModel,
    ) -> Result<Self, Failure> {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), asm::RAM as usize)]).map_err(rig)?;
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).map_err(rig)?;
        let (mmio, pio) = (Bus::new("mmio"), Bus::new("pio"));
        let vm = accel.create_vm(VmSpec {
            arch: Arch::X86_64,
            memory: memory.clone(),
            mmio: Arc::clone(&mmio),
            pio: Arc::clone(&pio),
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            vcpus: needs.vcpus,
            irqchip,
            code_cache: 0,
            x86_tss_base: Some(0xfeff_c000),
        })?;
        if let Some((mmio_events, pio_events)) = vm.io_events() {
            mmio.accelerate(mmio_events);
            pio.accelerate(pio_events);
        }
        let context = BuildContext {
            memory: memory.clone(),
            mmio: Arc::clone(&mmio),
            pio: Arc::clone(&pio),
            clock,
            timers,
            random: Arc::new(HostRandom),
            spawner: PlainSpawner::shared(),
            system: Arc::new(NoSystem),
            msi: vm.msi(),
            windows: None,
        };
        let (gsi, devices) = controllers(&vm, irqchip, &context)?;
        let shared = Arc::new(Shared::default());
        attach_test_devices(&vm, &context, gsi, &shared)?;
        let model = CpuModel::X86_64(model);
        let vcpu = vm.create_vcpu(0, &model)?;
        let _ = shared.boot.set(vcpu.kicker());
        let mut others = Vec::new();
        for index in 1..needs.vcpus {
            others.push(start_other(vm.create_vcpu(index, &model)?, &shared)?);
        }
        let began = host_monotonic();
        Ok(Self { vm, vcpu, memory, mmio, pio, shared, context, devices, others, began })
    }

    /// Runs the boot vCPU until the guest is done or the host is wanted.
    ///
    /// # Errors
    /// [`Failure`] if the guest hangs, dies or its accelerator fails.
    pub fn run(&mut self) -> Result<Stop, Failure> {
        self.context.clock.resume();
        let over = Arc::new(AtomicBool::new(false));
        let watchdog = self.watch(Arc::clone(&over))?;
        let result = self.run_watched();
        over.store(true, Ordering::SeqCst);
        watchdog.thread().unpark();
        let _ = watchdog.join();
        result
    }

    fn watch(&self, over: Arc<AtomicBool>) -> Result<JoinHandle<()>, Failure> {
        let kicker = self.vcpu.kicker();
        let left = LIMIT.saturating_sub(std::time::Duration::from_nanos(host_monotonic() - self.began));
        let body = move || {
            let end = host_monotonic() + left.as_nanos() as u64;
            while !over.load(Ordering::SeqCst) {
                let now = host_monotonic();
                if now >= end {
                    kicker.kick();
                }
                let wait = end.saturating_sub(now).clamp(50_000_000, 1_000_000_000);
                std::thread::park_timeout(std::time::Duration::from_nanos(wait));
            }
        };
        std::thread::Builder::new().name("watchdog".into()).spawn(body).map_err(rig)
    }

    fn run_watched(&mut self) -> Result<Stop, Failure> {
        loop {
            match self.vcpu.run()? {
                Exit::Kicked if self.shared.stop.swap(false, Ordering::SeqCst) => return Ok(Stop::Asked),
                Exit::Kicked if self.shared.done.load(Ordering::SeqCst) => return Ok(Stop::Done),
                Exit::Kicked if u128::from(host_monotonic() - self.began) >= LIMIT.as_nanos() => {
                    let rip = self.state()?.rip;
                    return Err(Failure::Hung(format!("{} (RIP {rip:#x})", self.output())));
                }
                Exit::Kicked => {}
                Exit::Debug(pc) => return Ok(Stop::Debug(pc)),
                Exit::Watch(pc, hit) => return Ok(Stop::Watch(pc, hit)),
                exit => return Err(Failure::Exit { exit, output: self.output() }),
            }
        }
    }

    /// Runs to the end and returns the output.
    ///
    /// # Errors
    /// [`Failure`] if anything else comes first.
    pub fn finish(&mut self) -> Result<String, Failure> {
        match self.run()? {
            Stop::Done => Ok(self.output()),
            other => Err(rig(format!("the guest was to end, but {other:?} came, after {:?}", self.output()))),
        }
    }

    /// Runs until the guest asks for the host.
    ///
    /// # Errors
    /// [`Failure`] if anything else comes first.
    pub fn until_asked(&mut self) -> Result<(), Failure> {
        match self.run()? {
            Stop::Asked => Ok(()),
            other => Err(rig(format!("the guest was to ask, but {other:?} came, after {:?}", self.output()))),
        }
    }

    /// What the guest and the host wrote.
    pub fn output(&self) -> String {
        self.shared.out.lock().clone()
    }

    /// The boot vCPU's state.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn state(&mut self) -> Result<State, Failure> {
        match self.vcpu.state()? {
            CpuState::X86_64(state) => Ok(*state),
            CpuState::Riscv64(_) => Err(rig("the vCPU is of another architecture")),
        }
    }

    /// Stops time and saves everything of a machine with one vCPU.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn save(&mut self) -> Result<Saved, Failure> {
        self.context.clock.pause();
        let devices: Result<Vec<_>, _> = self.devices.iter().map(|d| d.save()).collect();
        let mut ram = vec![0; asm::RAM as usize];
        self.memory.read_slice(&mut ram, GuestAddress(0)).map_err(rig)?;
        Ok(Saved {
            cpu: serde_json::to_string(&self.vcpu.state()?).map_err(rig)?,
            vm: self.vm.save()?.to_string(),
            devices: devices.map_err(rig)?,
            ram,
            now: self.context.clock.now(),
            out: self.output(),
        })
    }

    /// A new machine with the saved state.
    ///
    /// # Errors
    /// [`Failure`].
    pub fn restore(accel: &dyn Accelerator, irqchip: IrqChip, saved: &Saved) -> Result<Self, Failure> {
        let mut new = Self::empty(accel, irqchip, Needs { vcpus: 1 }, CpuidModel::default())?;
        new.memory.write_slice(&saved.ram, GuestAddress(0)).map_err(rig)?;
        new.context.clock.set(saved.now);
        new.vm.restore(&serde_json::from_str(&saved.vm).map_err(rig)?)?;
        for (device, state) in new.devices.iter().zip(&saved.devices) {
            device.restore(state).map_err(rig)?;
        }
        new.vcpu.set_state(&serde_json::from_str(&saved.cpu).map_err(rig)?)?;
        new.shared.print(&saved.out);
        Ok(new)
    }
}

fn attach_test_devices(
    vm: &Arc<dyn Vm>,
    context: &BuildContext,
    gsi: Arc<Gsi>,
    shared: &Arc<Shared>,
) -> Result<(), Failure> {
    let console = Arc::new(Console { shared: Arc::clone(shared), gsi, lines: vm.cpu_lines() });
    for (base, len) in
        [(asm::OUT, 1), (asm::HEX, 4), (asm::DONE, 1), (asm::STOP, 1), (asm::GSI, 1), (asm::LINT1, 1)]
    {
        let device = Arc::clone(&console) as Arc<dyn BusDevice>;
        context.pio.attach(base.into(), len, "console", device).map_err(rig)?;
    }
    let echo = Arc::new(Echo(Arc::clone(shared)));
    context
        .pio
        .attach(asm::ECHO.into(), 0x40, "echo", Arc::clone(&echo) as Arc<dyn BusDevice>)
        .map_err(rig)?;
    context.mmio.attach(asm::ECHO_MMIO, 0x1000, "echo", echo).map_err(rig)?;
    if let Some(controller) = context.msi.clone() {
        let vector = Arc::clone(&controller).vector().map_err(rig)?;
        let shared = Arc::clone(shared);
        let device = MsiDevice { shared, controller, vector, message: Mutex::default() };
        context.pio.attach(asm::MSI.into(), 12, "msi", Arc::new(device)).map_err(rig)?;
    }
    Ok(())
}

/// Runs another vCPU on its own thread until the guest is done.
fn start_other(
    mut vcpu: Box<dyn Vcpu>,
    shared: &Arc<Shared>,
) -> Result<(Arc<dyn Kicker>, JoinHandle<()>), Failure> {
    let kicker = vcpu.kicker();
    let shared = Arc::clone(shared);
    let body = move || {
        while !shared.done.load(Ordering::SeqCst) {
            match vcpu.run() {
                Ok(Exit::Kicked) => {}
                other => {
                    shared.print(&format!("[another vCPU stopped: {other:?}]"));
                    shared.interrupt(&shared.done);
                }
            }
        }
    };
    let thread = std::thread::Builder::new().name("vcpu1".into()).spawn(body).map_err(rig)?;
    Ok((kicker, thread))
}

impl Drop for Rig {
    fn drop(&mut self) {
        self.shared.done.store(true, Ordering::SeqCst);
        for (kicker, thread) in self.others.drain(..) {
            kicker.kick();
            let _ = thread.join();
        }
        self.context.timers.stop();
    }
}
