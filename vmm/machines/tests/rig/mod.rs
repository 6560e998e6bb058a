//! A q35 on KVM without the rest of the VMM.

use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use holdfast_accel::{Accelerator, Exit, IrqChip, Kicker, Vm, VmSpec};
use holdfast_accel_kvm::KvmAccelerator;
use holdfast_arch::{Arch, CpuModel};
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_device::{BuildContext, Bus, Device, SystemEvent, SystemSink};
use holdfast_devices::catalog::isa_debug_exit::IsaDebugExitConfig;
use holdfast_devices::chardev::CharBackend;
use holdfast_machines::{Machine, MachineContext, MachineModule, MachineRequest, Payload, registry};
use holdfast_memory::GuestMemory;
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::GuestAddress;

/// How a run ended.
#[derive(Debug, PartialEq, Eq)]
pub enum End {
    /// The guest asked for it.
    Asked(SystemEvent),
    /// A vCPU stopped.
    Vcpu(String),
    /// Time was over.
    Late,
}

#[derive(Debug)]
struct Events(Mutex<Sender<End>>);

impl SystemSink for Events {
    fn request(&self, event: SystemEvent) {
        // Nobody may be waiting any more.
        let _ = self.0.lock().send(End::Asked(event));
    }
}

/// What to run.
#[derive(Debug)]
pub struct Options {
    pub payload: Payload,
    pub cpus: u32,
    /// MiB.
    pub memory: u64,
    pub irqchip: IrqChip,
    pub disk: Option<String>,
    pub serial: Option<Arc<dyn CharBackend>>,
    pub debug_console: Option<Arc<dyn CharBackend>>,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            payload: Payload::default(),
            cpus: 1,
            memory: 512,
            irqchip: IrqChip::Split,
            disk: None,
            serial: None,
            debug_console: None,
        }
    }
}

/// A machine that can be run.
pub struct Rig {
    vm: Arc<dyn Vm>,
    machine: Box<dyn Machine>,
    build: BuildContext,
    cpu: CpuModel,
    cpus: u32,
    plugged: Vec<Arc<dyn Device>>,
    events: (Sender<End>, Receiver<End>),
}

fn request(o: &Options, module: &dyn MachineModule) -> MachineRequest {
    MachineRequest {
        boot_vcpus: o.cpus,
        max_vcpus: o.cpus,
        payload: o.payload.clone(),
        irqchip: o.irqchip,
        debug_console_port: Some(0x402),
        board: vec![IsaDebugExitConfig { iobase: 0xf4, iosize: 4 }.into()],
        serial: o.serial.clone(),
        debug_console: o.debug_console.clone(),
        ..MachineRequest::new(module.default_cpu(), o.memory << 20)
    }
}

impl Rig {
    /// Builds the machine. Panics with the reason if that fails.
    pub fn new(o: &Options) -> Self {
        let q35 = *registry().iter().find(|m| m.name() == "q35").expect("registered");
        let request = request(o, q35);
        let layout = q35.ram_layout(&request).expect("layout");
        let ranges: Vec<_> = layout.iter().map(|r| (GuestAddress(r.gpa), r.len as usize)).collect();
        let memory = GuestMemory::from_ranges(&ranges).expect("RAM");
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
        let (mmio, pio) = (Bus::new("mmio"), Bus::new("pio"));
        let spec = VmSpec {
            arch: Arch::X86_64,
            memory: memory.clone(),
            mmio: Arc::clone(&mmio),
            pio: Arc::clone(&pio),
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            vcpus: o.cpus,
            irqchip: o.irqchip,
            code_cache: 0,
            x86_tss_base: q35.x86_tss_base(),
        };
        let vm = KvmAccelerator::default().create_vm(spec).unwrap_or_else(|e| panic!("KVM: {e}"));
        if let Some((memory_events, port_events)) = vm.io_events() {
            mmio.accelerate(memory_events);
            pio.accelerate(port_events);
        }
        let events = channel();
        let build = BuildContext {
            memory,
            mmio,
            pio,
            clock,
            timers,
            random: Arc::new(HostRandom),
            spawner: PlainSpawner::shared(),
            system: Arc::new(Events(Mutex::new(events.0.clone()))),
            msi: vm.msi(),
            windows: None,
        };
        let cpu = request.cpu.clone();
        let context = MachineContext { build: build.clone(), vm: Arc::clone(&vm) };
        let machine = q35.build(request, context).unwrap_or_else(|e| panic!("{e:?}"));
        let mut rig = Self { vm, machine, build, cpu, cpus: o.cpus, plugged: Vec::new(), events };
        if let Some(path) = &o.disk {
            let disk = rig.plug_disk(path);
            rig.plugged.push(disk);
        }
        rig
    }

    fn plug_disk(&self, path: &str) -> Arc<dyn Device> {
        let module = holdfast_virtio::registry::find("virtio-blk").expect("registered");
        let config = serde_json::json!({ "path": path, "image_type": "Raw" });
        let args = holdfast_virtio::registry::BuildArgs { id: "_disk0".into(), config, ..Default::default() };
        let device = (module.build)(args, &self.build).unwrap_or_else(|e| panic!("{e:?}"));
        let bus = self.machine.pci_bus().expect("PCI");
        let slot = holdfast_virtio::Slot::Pci { bus, device: None };
        holdfast_virtio::plug("_disk0", device, slot, &self.build).unwrap_or_else(|e| panic!("{e:?}"))
    }

    /// Boots and runs until the guest ends it or `limit` has passed.
    pub fn run(self, limit: Duration) -> End {
        let cpus = 0..self.cpus;
        let mut vcpus: Vec<_> = cpus.map(|n| self.vm.create_vcpu(n, &self.cpu).expect("vCPU")).collect();
        self.machine.load().unwrap_or_else(|e| panic!("{e}"));
        for (n, vcpu) in vcpus.iter_mut().enumerate() {
            let state = vcpu.state().expect("state");
            vcpu.set_state(&self.machine.start_state(n as u32, state)).expect("start state");
        }
        self.build.clock.resume();
        self.build.timers.clock_changed();
        let kickers: Vec<Arc<dyn Kicker>> = vcpus.iter().map(|v| v.kicker()).collect();
        let stop = Arc::new(std::sync::atomic::AtomicBool::new(false));
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let (tx, stop) = (self.events.0.clone(), Arc::clone(&stop));
                std::thread::spawn(move || {
                    loop {
                        match vcpu.run() {
                            Ok(Exit::Kicked) if stop.load(std::sync::atomic::Ordering::SeqCst) => return,
                            Ok(Exit::Kicked) => {}
                            other => {
                                let _ = tx.send(End::Vcpu(format!("{other:?}")));
                                return;
                            }
                        }
                    }
                })
            })
            .collect();
        let end = match self.events.1.recv_timeout(limit) {
            Ok(end) => end,
            Err(RecvTimeoutError::Timeout | RecvTimeoutError::Disconnected) => End::Late,
        };
        stop.store(true, std::sync::atomic::Ordering::SeqCst);
        for (kicker, thread) in kickers.iter().zip(threads) {
            kicker.kick();
            thread.join().expect("vCPU thread");
        }
        self.build.timers.stop();
        // A device in use is held by its worker; after a reset nobody uses it.
        self.plugged.iter().for_each(|d| d.reset());
        self.build.mmio.clear();
        self.build.pio.clear();
        end
    }
}
