//! Building a VM from its config: RAM, accelerator, machine, devices, vCPUs.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::os::fd::OwnedFd;
use std::os::unix::fs::OpenOptionsExt;
use std::sync::Arc;

use holdfast_accel::{Accelerator, CodeLog, IrqChip, Vm as AccelVm, VmSpec};
use holdfast_arch::CpuModel;
use holdfast_arch::x86_64::{CpuTopology, features};
use holdfast_clock::{HostRandom, Timers, VmClock};
use holdfast_config::{
    ConsoleMode, CpusConfig, IrqChipMode, MemoryConfig, PflashConfig, VirtioTransport, VmConfig,
};
use holdfast_device::{BuildContext, Bus, SystemSink};
use holdfast_devices::chardev::{self, CharBackend, CharContext, CharSpec};
use holdfast_machines::{
    FlashImage, Machine, MachineContext, MachineModule, MachineRequest, Payload, Topology, VirtioSlot,
    registry,
};
use holdfast_threads::Spawner;
use holdfast_virtio::console::PortArgs;
use parking_lot::RwLock;

use super::plug::Plugs;
use super::vcpus::{VcpuEvents, VcpuSetup, Vcpus};
use super::windows::Windows;
use super::{Vm, VmError};
use crate::accel;
use crate::control::EventBus;
use crate::ram::{self, RamSpec};
use crate::storage::Storage;

/// What a VM is given by the process around it.
pub struct Host {
    /// Starts all threads.
    pub spawner: Arc<dyn Spawner>,
    /// Takes what the guest asks.
    pub system: Arc<dyn SystemSink>,
    /// Hears of vCPU failures.
    pub vcpu_events: Arc<dyn VcpuEvents>,
    /// Where events are published.
    pub events: EventBus,
    /// Called when the terminal's escape is typed.
    pub quit: Arc<dyn Fn() + Send + Sync>,
    /// Tap devices that came with requests, by device id.
    pub tap_fds: BTreeMap<String, Vec<OwnedFd>>,
    /// The VM comes from elsewhere.
    pub incoming: bool,
    /// RAM that a migration on this host brought, a file for each range; empty otherwise.
    pub ram_files: Vec<std::fs::File>,
    /// The storage graph that disks are in.
    pub storage: Arc<Storage>,
    /// Runs the guest instead of what the config asks for: a test's own accelerator.
    pub accelerator: Option<Arc<dyn Accelerator>>,
}

impl std::fmt::Debug for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Host").field("tap_fds", &self.tap_fds).finish_non_exhaustive()
    }
}

/// A character device of the VM.
#[derive(Debug, Clone)]
pub(super) struct Chardev {
    /// `serial0`, `console0`, `debugcon0`.
    pub(super) id: String,
    /// Its other end.
    pub(super) backend: Arc<dyn CharBackend>,
}

/// The character devices of a config.
#[derive(Debug, Default)]
struct Chardevs {
    serial: Option<Arc<dyn CharBackend>>,
    console: Option<Arc<dyn CharBackend>>,
    debug: Option<Arc<dyn CharBackend>>,
    /// Further ports of the virtio console, with their names.
    ports: Vec<(String, Arc<dyn CharBackend>)>,
}

impl Vm {
    /// Builds the VM that `config` describes. Nothing runs yet.
    ///
    /// # Errors
    /// [`VmError`]; all that was made is taken down again.
    pub fn build(mut config: VmConfig, mut host: Host) -> Result<Self, VmError> {
        let module = find_machine(&config).and_then(|module| take_images(&host).map(|()| module))?;
        let chardevs = open_chardevs(&mut config, &host)?;
        let request = machine_request(&config, module, &chardevs);
        let files = std::mem::take(&mut host.ram_files);
        let memory = ram::allocate_on(&module.ram_layout(&request)?, &ram_spec(&config.memory), files)?;
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), host.spawner.as_ref())
            .map_err(|source| VmError::Host { what: "no timer thread".into(), source })?;
        let (mmio, pio) = (Bus::new("memory"), Bus::new("I/O"));
        let spec = VmSpec {
            arch: module.arch(),
            memory: memory.clone(),
            mmio: Arc::clone(&mmio),
            pio: Arc::clone(&pio),
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            vcpus: config.cpus.boot_vcpus,
            irqchip: request.irqchip,
            code_cache: 0,
            x86_tss_base: module.x86_tss_base(),
        };
        let vm = match &host.accelerator {
            Some(accelerator) => accelerator.create_vm(spec)?,
            None => accel::create_vm(&config.accel, &spec)?,
        };
        start_log(&config, vm.as_ref())?;
        if let Some((memory_events, port_events)) = vm.io_events() {
            mmio.accelerate(memory_events);
            pio.accelerate(port_events);
        }
        let build = BuildContext {
            memory: memory.clone(),
            mmio: Arc::clone(&mmio),
            pio: Arc::clone(&pio),
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            random: Arc::new(HostRandom),
            spawner: Arc::clone(&host.spawner),
            system: Arc::clone(&host.system),
            msi: vm.msi(),
            windows: Some(Arc::new(Windows::new(&vm))),
        };
        let cpu = request.cpu.clone();
        let machine = module.build(request, MachineContext { build: build.clone(), vm: Arc::clone(&vm) })?;
        let Plugs { devices, balloon, power_button, disks, .. } =
            plug_all(&config, &mut host, &build, machine.as_ref(), chardevs.console_ports())?;
        let affinity = affinity(&config.cpus);
        let vcpus = Vcpus::start(&VcpuSetup {
            vm: &vm,
            count: config.cpus.boot_vcpus,
            model: &cpu,
            affinity: &affinity,
            spawner: host.spawner.as_ref(),
            events: Arc::clone(&host.vcpu_events),
            system: Arc::clone(&host.system),
        })?;
        Ok(Self {
            arch: module.arch(),
            config,
            module,
            memory,
            mmio,
            pio,
            clock,
            timers,
            accel: vm,
            vcpus,
            machine,
            plugged: RwLock::new(devices),
            disks: RwLock::new(disks),
            build,
            storage: host.storage,
            balloon,
            power_button,
            chardevs: chardevs.list(),
            pager: None,
            arriving: None,
        })
    }
}

/// Images that are here already are this VM's, unless it comes from elsewhere: then they are the other VM's still.
fn take_images(host: &Host) -> Result<(), VmError> {
    let nodes = host.storage.nodes();
    if host.incoming {
        return Ok(());
    }
    nodes.activate().map_err(|source| VmError::Images { source })
}

fn find_machine(config: &VmConfig) -> Result<&'static dyn MachineModule, VmError> {
    let (name, arch) = (config.machine_name(), config.guest_arch());
    let of_arch = || registry().iter().filter(|m| m.arch() == arch);
    let found = of_arch().find(|m| m.name() == name);
    found.copied().ok_or_else(|| VmError::UnknownMachine {
        name: name.to_owned(),
        arch,
        known: of_arch().map(|m| m.name()).collect::<Vec<_>>().join(", "),
    })
}

fn machine_request(config: &VmConfig, module: &dyn MachineModule, chardevs: &Chardevs) -> MachineRequest {
    let payload = config.payload.clone().unwrap_or_default();
    let topology = config.cpus.topology.map(|t| Topology {
        threads: u32::from(t.threads_per_core),
        cores: u32::from(t.cores_per_die),
        dies: u32::from(t.dies_per_package),
        packages: u32::from(t.packages),
    });
    MachineRequest {
        boot_vcpus: config.cpus.boot_vcpus,
        max_vcpus: config.cpus.max(),
        topology,
        ram_size: config.memory.size,
        payload: Payload {
            kernel: payload.kernel,
            firmware: payload.firmware,
            initramfs: payload.initramfs,
            cmdline: payload.cmdline.unwrap_or_default(),
            flash: config.pflash().iter().map(flash_image).collect(),
        },
        cpu: cpu_model(module, config.cpus.profile.as_deref(), topology),
        irqchip: match config.machine.kernel_irqchip {
            IrqChipMode::Split => IrqChip::Split,
            IrqChipMode::On => IrqChip::On,
            IrqChipMode::Off => IrqChip::Off,
        },
        uuid: config.uuid().map(uuid::Uuid::into_bytes),
        debug_console_port: match config.debug_console.mode {
            ConsoleMode::Off => None,
            _ => config.debug_console.iobase,
        },
        hotplug_ports: config.machine.hotplug_ports.unwrap_or(0),
        board: config.board_devices(),
        serial: chardevs.serial.clone(),
        debug_console: chardevs.debug.clone(),
    }
}

fn flash_image(config: &PflashConfig) -> FlashImage {
    FlashImage { path: config.path.clone(), readonly: config.readonly }
}

/// The CPU model the user named or else the machine's default, arranged as the user wants it.
fn cpu_model(module: &dyn MachineModule, profile: Option<&str>, topology: Option<Topology>) -> CpuModel {
    let mut cpu = module.default_cpu();
    if let (CpuModel::X86_64(model), Some(named)) =
        (&mut cpu, profile.and_then(|text| features::parse(text).ok()))
    {
        *model = named;
    }
    if let (CpuModel::X86_64(model), Some(t)) = (&mut cpu, topology) {
        model.topology = Some(CpuTopology { threads: t.threads, cores: t.cores, dies: t.dies });
    }
    cpu
}

fn ram_spec(config: &MemoryConfig) -> RamSpec {
    RamSpec {
        shared: config.shared,
        hugepages: config.hugepages,
        hugepage_size: config.hugepage_size,
        prefault: config.prefault,
        thp: config.thp,
        mergeable: false,
    }
}

fn affinity(cpus: &CpusConfig) -> Vec<Vec<usize>> {
    let mut all = vec![Vec::new(); cpus.boot_vcpus as usize];
    for entry in cpus.affinity.iter().flatten() {
        if let Some(slot) = all.get_mut(entry.vcpu as usize) {
            slot.clone_from(&entry.host_cpus);
        }
    }
    all
}

impl Chardevs {
    fn list(self) -> Vec<Chardev> {
        let named = [("serial0", self.serial), ("console0", self.console), ("debugcon0", self.debug)];
        let some =
            |(id, backend): (&str, Option<_>)| backend.map(|backend| Chardev { id: id.to_owned(), backend });
        let ports = self.ports.into_iter().map(|(id, backend)| Chardev { id, backend });
        named.into_iter().filter_map(some).chain(ports).collect()
    }

    /// The ports of the virtio console: the terminal first, then the named ones.
    fn console_ports(&self) -> Vec<PortArgs> {
        let Some(terminal) = self.console.clone() else { return Vec::new() };
        let mut ports = vec![PortArgs { name: None, is_console: true, backend: terminal }];
        for (name, backend) in &self.ports {
            let (name, backend) = (Some(name.clone()), Arc::clone(backend));
            ports.push(PortArgs { name, is_console: false, backend });
        }
        ports
    }
}

/// Opens the character devices and notes the paths of pseudo-terminals in the config.
fn open_chardevs(config: &mut VmConfig, host: &Host) -> Result<Chardevs, VmError> {
    let open = |id: &str, spec: Option<CharSpec>| -> Result<Option<Arc<dyn CharBackend>>, VmError> {
        let Some(spec) = spec else { return Ok(None) };
        let quit = Arc::clone(&host.quit);
        let context = CharContext { id, spawner: &host.spawner, quit, keep: host.incoming };
        Ok(Some(chardev::open(&spec, &context)?))
    };
    let serial = &mut config.serial;
    let spec = char_spec(serial.mode, serial.file.as_ref(), serial.socket.as_ref());
    let serial_backend = open("serial", spec)?;
    let console = &mut config.console;
    let spec = char_spec(console.mode, console.file.as_ref(), console.socket.as_ref());
    // The first port of a console is a terminal, whether it is used or not.
    let unused = config.console_ports.as_ref().is_some_and(|p| !p.is_empty()).then_some(CharSpec::Null);
    let console_backend = open("console", spec.or(unused))?;
    let debug = &mut config.debug_console;
    let debug_backend = open("debugcon", char_spec(debug.mode, debug.file.as_ref(), None))?;
    let published = [
        (&serial_backend, &mut serial.file),
        (&console_backend, &mut console.file),
        (&debug_backend, &mut debug.file),
    ];
    for (backend, file) in published {
        if let Some(path) = backend.as_ref().and_then(|b| b.pty_path()) {
            *file = Some(path);
        }
    }
    let mut ports = Vec::new();
    for port in config.console_ports.iter_mut().flatten() {
        let spec = char_spec(port.mode, port.file.as_ref(), port.socket.as_ref());
        let Some(backend) = open("port", spec)? else { continue };
        if let Some(path) = backend.pty_path() {
            port.file = Some(path);
        }
        ports.push((port.name.clone(), backend));
    }
    Ok(Chardevs { serial: serial_backend, console: console_backend, debug: debug_backend, ports })
}

fn char_spec(
    mode: ConsoleMode,
    file: Option<&std::path::PathBuf>,
    socket: Option<&std::path::PathBuf>,
) -> Option<CharSpec> {
    match mode {
        ConsoleMode::Off => None,
        ConsoleMode::Null => Some(CharSpec::Null),
        ConsoleMode::Tty => Some(CharSpec::Tty),
        ConsoleMode::Pty => Some(CharSpec::Pty),
        // Validation has seen to it that the paths are there.
        ConsoleMode::File => file.cloned().map(CharSpec::File),
        ConsoleMode::Socket => socket.cloned().map(CharSpec::Socket),
    }
}

/// Plugs the virtio devices in, in Cloud Hypervisor's order: console, disks, network, rng, shared directories, other
/// back ends, sockets, balloon; then the power button of machines that have none of their own.
fn plug_all<'a>(
    config: &VmConfig,
    host: &mut Host,
    build: &'a BuildContext,
    machine: &dyn Machine,
    console: Vec<PortArgs>,
) -> Result<Plugs<'a>, VmError> {
    let transport = config.machine.virtio;
    let slot = || -> Result<VirtioSlot, VmError> {
        let slot = match transport {
            VirtioTransport::Pci => machine.pci_bus().map(VirtioSlot::Pci),
            VirtioTransport::Mmio => machine.take_mmio_slot(),
        };
        let none = || format!("the machine has no slot left for another virtio device (virtio={transport})");
        slot.ok_or_else(|| VmError::Unsupported(none()))
    };
    for options in config.blockdevs() {
        let name = options.node_name.clone().unwrap_or_default();
        host.storage.ensure(options).map_err(|source| VmError::Node { name, source })?;
    }
    let mut plugs = Plugs::new(build);
    if !console.is_empty() {
        plugs.console(&config.console, console, slot()?)?;
    }
    let place = |bus: &Option<String>| match bus {
        Some(name) => port(machine, name),
        None => slot(),
    };
    for disk in config.disks() {
        plugs.disk(disk, &host.storage, place(&disk.bus)?)?;
    }
    for net in config.net() {
        let fds = net.id.as_ref().and_then(|id| host.tap_fds.remove(id)).unwrap_or_default();
        plugs.net(net, fds, place(&net.bus)?)?;
    }
    plugs.rng(&config.rng, slot()?)?;
    for fs in config.fs() {
        plugs.fs(fs, place(&fs.bus)?)?;
    }
    for device in config.generic_vhost_user() {
        plugs.generic_vhost_user(device, place(&device.bus)?)?;
    }
    if let Some(vsock) = &config.vsock {
        plugs.vsock(vsock, place(&vsock.bus)?)?;
    }
    if let Some(balloon) = &config.balloon {
        plugs.balloon(balloon, slot()?)?;
    }
    if !machine.has_power_button() {
        plugs.power_button(slot()?)?;
    }
    Ok(plugs)
}

/// The place behind the hot-plug port `name`.
fn port(machine: &dyn Machine, name: &str) -> Result<VirtioSlot, VmError> {
    let found = machine.ports().into_iter().find(|p| p.name() == name).zip(machine.pci_bus());
    let (port, bus) = found.ok_or_else(|| {
        VmError::Unsupported(format!("there is no hot-plug port `{name}` (machine.hotplug_ports)"))
    })?;
    Ok(VirtioSlot::Port(bus, port))
}

/// Starts the map and the log of translations, if there are to be any.
fn start_log(config: &VmConfig, vm: &dyn AccelVm) -> Result<(), VmError> {
    if config.perf_map {
        vm.start_perf_map()?;
    }
    let Some(log) = &config.tcg_log else { return Ok(()) };
    let what = CodeLog {
        guest: log.guest,
        ir: log.ir,
        host: log.host,
        interrupts: log.int,
        filter: log.range().map_err(VmError::Unsupported)?,
        limit: log.limit,
    };
    let mut options = OpenOptions::new();
    let file = options.write(true).create(true).truncate(true).mode(0o600).open(&log.file);
    let failed =
        |source| VmError::Host { what: format!("tcg_log: `{}` cannot be made", log.file.display()), source };
    Ok(vm.start_code_log(file.map_err(failed)?, &what)?)
}
