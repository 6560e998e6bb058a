//! Runs a q35 on KVM without the rest of the VMM, for work on the machine itself. Serial output goes to the
//! terminal, the debug console (port 0x402) to standard error.

use std::io::Write;
use std::sync::Arc;
use std::sync::mpsc::{Sender, channel};
use std::time::Duration;

use holdfast_accel::{Accelerator, Exit, IrqChip, VmSpec};
use holdfast_accel_kvm::KvmAccelerator;
use holdfast_arch::Arch;
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_device::{BuildContext, Bus, SystemEvent, SystemSink};
use holdfast_devices::chardev::{CharBackend, CharReceiver};
use holdfast_machines::{MachineContext, MachineRequest, Payload, registry};
use holdfast_memory::GuestMemory;
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::GuestAddress;

#[derive(Debug)]
struct Print(bool);

impl CharBackend for Print {
    fn send(&self, data: &[u8]) {
        let done = if self.0 {
            std::io::stderr().write_all(data)
        } else {
            let mut out = std::io::stdout();
            out.write_all(data).and_then(|()| out.flush())
        };
        if let Err(error) = done {
            eprintln!("output is lost: {error}");
        }
    }
    fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "print".into()
    }
}

#[derive(Debug)]
struct Events(Mutex<Sender<String>>);

impl SystemSink for Events {
    fn request(&self, event: SystemEvent) {
        let _ = self.0.lock().send(format!("{event:?}"));
    }
}

#[derive(Debug, Default)]
struct Options {
    payload: Payload,
    cpus: u32,
    memory: u64,
    kernel_irqchip: bool,
    disk: Option<String>,
    seconds: u64,
    debug: bool,
}

fn options() -> Options {
    let mut o = Options { cpus: 1, memory: 512 << 20, seconds: 60, ..Options::default() };
    let mut args = std::env::args().skip(1);
    while let Some(name) = args.next() {
        let mut value = || args.next().unwrap_or_default();
        match name.as_str() {
            "--kernel" => o.payload.kernel = Some(value().into()),
            "--initramfs" => o.payload.initramfs = Some(value().into()),
            "--firmware" => o.payload.firmware = Some(value().into()),
            "--cmdline" => o.payload.cmdline = value(),
            "--cpus" => o.cpus = value().parse().expect("a number"),
            "--memory" => o.memory = value().parse::<u64>().expect("MiB") << 20,
            "--disk" => o.disk = Some(value()),
            "--seconds" => o.seconds = value().parse().expect("a number"),
            "--on" => o.kernel_irqchip = true,
            "--debug" => o.debug = true,
            other => panic!("unknown option {other}"),
        }
    }
    o
}

fn main() {
    let o = options();
    let q35 = registry().iter().find(|m| m.name() == "q35").expect("registered");
    let request = MachineRequest {
        boot_vcpus: o.cpus,
        max_vcpus: o.cpus,
        topology: None,
        ram_size: o.memory,
        payload: o.payload,
        cpu: q35.default_cpu(),
        irqchip: if o.kernel_irqchip { IrqChip::On } else { IrqChip::Split },
        uuid: None,
        debug_console_port: Some(0x402),
        debug_exit_port: Some(0xf4),
        serial: Some(Arc::new(Print(false))),
        debug_console: o.debug.then(|| Arc::new(Print(true)) as Arc<dyn CharBackend>),
    };
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
        irqchip: request.irqchip,
        code_cache: 0,
        x86_tss_base: q35.x86_tss_base(),
    };
    let vm = KvmAccelerator::default().create_vm(spec).expect("KVM");
    if let Some((memory_events, port_events)) = vm.io_events() {
        mmio.accelerate(memory_events);
        pio.accelerate(port_events);
    }
    let (tx, rx) = channel();
    let build = BuildContext {
        memory,
        mmio,
        pio,
        clock: Arc::clone(&clock),
        timers: Arc::clone(&timers),
        random: Arc::new(HostRandom),
        spawner: PlainSpawner::shared(),
        system: Arc::new(Events(Mutex::new(tx.clone()))),
        msi: vm.msi(),
    };
    let cpu = request.cpu.clone();
    let context = MachineContext { build: build.clone(), vm: Arc::clone(&vm) };
    let machine = q35.build(request, context).unwrap_or_else(|e| panic!("{e:?}"));
    if let Some(path) = o.disk {
        let module = holdfast_virtio::registry::find("virtio-blk").expect("registered");
        let config = serde_json::json!({ "path": path, "image_type": "Raw" });
        let args = holdfast_virtio::registry::BuildArgs { id: "_disk0".into(), config, ..Default::default() };
        let device = (module.build)(args, &build).unwrap_or_else(|e| panic!("{e:?}"));
        let bus = machine.pci_bus().expect("PCI");
        let slot = holdfast_virtio::Slot::Pci { bus, device: None };
        holdfast_virtio::plug("_disk0", device, slot, &build).unwrap_or_else(|e| panic!("{e:?}"));
    }
    let mut vcpus: Vec<_> = (0..o.cpus).map(|n| vm.create_vcpu(n, &cpu).expect("vCPU")).collect();
    machine.load().unwrap_or_else(|e| panic!("{e}"));
    for (n, vcpu) in vcpus.iter_mut().enumerate() {
        let state = vcpu.state().expect("state");
        vcpu.set_state(&machine.start_state(n as u32, state)).expect("start state");
    }
    clock.resume();
    timers.clock_changed();
    for (n, mut vcpu) in vcpus.into_iter().enumerate() {
        let tx = tx.clone();
        std::thread::spawn(move || {
            loop {
                match vcpu.run() {
                    Ok(Exit::Kicked) => {}
                    other => {
                        let _ = tx.send(format!("vCPU {n}: {other:?}"));
                        return;
                    }
                }
            }
        });
    }
    let end = rx.recv_timeout(Duration::from_secs(o.seconds));
    println!("\n[{}]", end.unwrap_or_else(|_| "time is over".into()));
}
