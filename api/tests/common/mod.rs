//! A VM manager without a VM, for tests of the codecs.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::time::Duration;

use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, IdAllocator, NetConfig, PciDeviceInfo, RestoreConfig,
    VmConfig, VmRemoveDevice, VmResize, VmSnapshotConfig, VsockConfig, validate_disk, validate_fs,
    validate_generic_vhost_user, validate_net,
};
use holdfast_vmm::control::*;
use holdfast_vmm::storage::StorageRequest;

/// State and what was asked.
#[derive(Default)]
pub struct FakeManager {
    config: Option<Box<VmConfig>>,
    sockets: BTreeMap<String, BackEndSocket>,
    netdevs: Vec<Netdev>,
    running: Option<bool>,
    ids: IdAllocator,
    fds: BTreeMap<String, Vec<OwnedFd>>,
    quit: bool,
}

fn wrong(message: &str) -> ControlError {
    ControlError::new(ErrorKind::Failed, message)
}

/// A file in the destination of a snapshot that goes on while the file is there.
pub const HOLD: &str = "hold";

impl FakeManager {
    /// Serves until told to end.
    pub fn serve(mut self, inbox: &ControlInbox) -> io::Result<u8> {
        inbox.events().publish(Event::VmmStarting);
        EVENTS.with(|events| *events.borrow_mut() = Some(inbox.events().clone()));
        while !self.quit
            && let Some(request) = inbox.wait()
        {
            request.serve(&mut self);
        }
        inbox.events().publish(Event::VmmShutdown);
        Ok(0)
    }

    fn config(&mut self) -> Result<&mut VmConfig, ControlError> {
        self.config.as_deref_mut().ok_or_else(ControlError::not_created)
    }

    fn expect(&self, running: Option<bool>, message: &str) -> Result<(), ControlError> {
        match (&self.config, self.running == running) {
            (None, _) => Err(ControlError::not_created()),
            (_, false) => Err(wrong(message)),
            _ => Ok(()),
        }
    }

    fn turn(&mut self, from: Option<bool>, to: Option<bool>, says: [Event; 2]) -> Result<(), ControlError> {
        self.expect(from, "VM is not in the right state")?;
        let [before, after] = says;
        publish(before);
        self.running = to;
        publish(after);
        Ok(())
    }
}

thread_local! {
    static EVENTS: std::cell::RefCell<Option<EventBus>> = const { std::cell::RefCell::new(None) };
}

fn publish(event: Event) {
    EVENTS.with(|events| {
        if let Some(events) = &*events.borrow() {
            events.publish(event);
        }
    });
}

impl VmManager for FakeManager {
    fn create(&mut self, config: Box<VmConfig>) -> Result<(), ControlError> {
        config.validate()?;
        if self.config.is_some() {
            return Err(wrong("VM is already created"));
        }
        self.config = Some(config);
        Ok(())
    }

    fn delete(&mut self, reply: Responder<()>) {
        self.config = None;
        self.running = None;
        self.fds.clear();
        reply.respond(Ok(()));
    }

    fn boot(&mut self, reply: Responder<()>) {
        let result = self.expect(None, "VM is already running").and_then(|()| {
            self.config()?.validate_for_boot()?;
            self.turn(None, Some(true), [Event::Booting, Event::Booted])
        });
        if let (Ok(()), Some(config)) = (&result, &mut self.config) {
            self.ids.assign(config);
        }
        reply.respond(result);
    }

    fn pause(&mut self, reply: Responder<()>) {
        reply.respond(self.turn(Some(true), Some(false), [Event::Pausing, Event::Paused]));
    }

    fn resume(&mut self, reply: Responder<()>) {
        reply.respond(self.turn(Some(false), Some(true), [Event::Resuming, Event::Resumed]));
    }

    fn shutdown(&mut self, reply: Responder<()>) {
        let result = match self.running {
            Some(_) => self.config().map(|_| ()),
            None => self.expect(Some(true), "VM is not booted"),
        };
        if result.is_ok() {
            self.running = None;
            publish(Event::Shutdown(Origin::Host));
        }
        reply.respond(result);
    }

    fn reboot(&mut self, reply: Responder<()>) {
        let result = self.expect(Some(true), "VM is not running");
        if result.is_ok() {
            publish(Event::Rebooting);
            publish(Event::Rebooted(Origin::Host));
        }
        reply.respond(result);
    }

    fn power_button(&mut self) -> Result<(), ControlError> {
        self.expect(Some(true), "VM is not running")?;
        publish(Event::PowerButton);
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), ControlError> {
        self.expect(Some(true), "VM is not running")
    }

    fn info(&mut self) -> Result<VmInfo, ControlError> {
        let state = match self.running {
            None => VmState::Created,
            Some(true) => VmState::Running,
            Some(false) => VmState::Paused,
        };
        let config = self.config()?.clone();
        let memory_actual_size = config.memory.size;
        Ok(VmInfo { config, state, memory_actual_size, device_tree: None })
    }

    fn counters(&mut self) -> Result<Counters, ControlError> {
        if self.running.is_none() {
            return Err(wrong("VM is not running"));
        }
        let mut counters = Counters::new();
        for (id, fds) in &self.fds {
            let numbers = fds.iter().map(|fd| (format!("inode{}", fd.as_raw_fd()), inode(fd)));
            counters.insert(id.clone(), numbers.collect());
        }
        Ok(counters)
    }

    fn resize(&mut self, resize: VmResize) -> Result<(), ControlError> {
        self.expect(Some(true), "VM is not running")?;
        if resize.desired_ram.is_some() {
            return Err(ControlError::unsupported("desired_ram"));
        }
        if resize.desired_vcpus.is_some() {
            return Err(ControlError::new(ErrorKind::Busy, "a vCPU removal is pending"));
        }
        Ok(())
    }

    fn add_disk(&mut self, mut disk: DiskConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        let booted = self.running.is_some();
        let config = self.config()?;
        validate_disk(&disk)?;
        if let Some(id) = disk.id.as_deref().filter(|id| config.device_ids().contains(id)) {
            return Err(ControlError::new(ErrorKind::Conflict, format!("device `{id}` exists")));
        }
        if booted && disk.id.is_none() {
            let taken: Vec<String> = config.device_ids().iter().map(ToString::to_string).collect();
            disk.id = Some(self.ids.allocate("_disk", |id| taken.iter().any(|other| other == id)));
        }
        let id = disk.id.clone();
        self.config()?.disks.get_or_insert_default().push(disk);
        let bdf = "0000:00:05.0".to_owned();
        Ok(id.filter(|_| booted).map(|id| PciDeviceInfo { id, bdf }))
    }

    fn add_net(&mut self, net: NetConfig, fds: Vec<OwnedFd>) -> Result<Option<PciDeviceInfo>, ControlError> {
        let config = self.config()?;
        validate_net(&net)?;
        let id = net.id.clone().unwrap_or_default();
        config.net.get_or_insert_default().push(net);
        self.fds.insert(id, fds);
        Ok(None)
    }

    fn netdev_add(&mut self, netdev: Netdev) -> Result<(), ControlError> {
        self.netdevs.push(netdev);
        Ok(())
    }

    fn netdev_del(&mut self, id: String) -> Result<(), ControlError> {
        let missing = || ControlError::new(ErrorKind::DeviceNotFound, format!("Device '{id}' not found"));
        self.netdevs.pop().map(drop).ok_or_else(missing)
    }

    fn add_card(&mut self, card: Box<NetdevCard>) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.config()?.net.get_or_insert_default().push(card.card);
        Ok(None)
    }

    fn chardev_add(&mut self, label: String, socket: BackEndSocket) -> Result<(), ControlError> {
        self.sockets.insert(label, socket);
        Ok(())
    }

    fn chardev_remove(&mut self, label: String) -> Result<(), ControlError> {
        let missing = || ControlError::new(ErrorKind::Failed, format!("Chardev '{label}' not found"));
        self.sockets.remove(&label).map(drop).ok_or_else(missing)
    }

    fn chardev_socket(&mut self, label: String) -> Option<BackEndSocket> {
        self.sockets.get(&label).cloned()
    }

    fn add_vsock(&mut self, vsock: VsockConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.config()?.vsock = Some(vsock);
        Ok(None)
    }

    fn add_fs(&mut self, fs: FsConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        validate_fs(&fs)?;
        self.config()?.fs.get_or_insert_default().push(fs);
        Ok(None)
    }

    fn add_generic_vhost_user(
        &mut self,
        device: GenericVhostUserConfig,
    ) -> Result<Option<PciDeviceInfo>, ControlError> {
        validate_generic_vhost_user(&device)?;
        self.config()?.generic_vhost_user.get_or_insert_default().push(device);
        Ok(None)
    }

    fn remove_device(&mut self, device: VmRemoveDevice) -> Result<(), ControlError> {
        if self.config()?.remove_device(&device.id) {
            return Ok(());
        }
        Err(ControlError::new(ErrorKind::DeviceNotFound, format!("there is no device `{}`", device.id)))
    }

    fn snapshot(&mut self, config: VmSnapshotConfig, reply: Responder<()>) {
        let ready = self.expect(Some(false), "VM is not paused").and_then(|()| {
            let wrong = || ControlError::new(ErrorKind::Invalid, "destination_url is no file:// URL");
            config.directory().ok_or_else(wrong)
        });
        // As long as a test likes, which can see whether anything else waits for it.
        std::thread::spawn(move || {
            let hold = ready.as_ref().ok().map(|directory| directory.join(HOLD));
            while hold.as_ref().is_some_and(|hold| hold.exists()) {
                std::thread::sleep(Duration::from_millis(5));
            }
            reply.respond(ready.map(drop));
        });
    }

    fn restore(&mut self, config: RestoreConfig, fds: Vec<OwnedFd>, reply: Responder<()>) {
        if self.config.is_some() {
            return reply.respond(Err(wrong("VM is already created")));
        }
        if config.directory().is_none() {
            let error = ControlError::new(ErrorKind::Invalid, "source_url is no file:// URL");
            return reply.respond(Err(error));
        }
        self.config = Some(Box::default());
        self.running = Some(config.resume);
        self.fds.insert("restored".to_owned(), fds);
        reply.respond(Ok(()));
    }

    fn vmm_shutdown(&mut self, origin: Origin, reply: Responder<()>) {
        self.quit = true;
        if self.running.is_some() {
            publish(Event::Shutdown(origin));
        }
        reply.respond(Ok(()));
    }

    fn run_state(&mut self) -> RunState {
        match self.running {
            None => RunState::Prelaunch,
            Some(true) => RunState::Running,
            Some(false) => RunState::Paused,
        }
    }

    fn kvm(&mut self) -> KvmInfo {
        KvmInfo { enabled: false, present: true }
    }

    fn cpus(&mut self) -> Vec<CpuInfoFast> {
        let props = CpuInstanceProperties { core_id: Some(0), ..CpuInstanceProperties::default() };
        let qom_path = "/machine/unattached/device[0]".to_owned();
        let target = "riscv64".to_owned();
        vec![CpuInfoFast { cpu_index: 0, qom_path, thread_id: 1, props: Some(props), target }]
    }

    fn machines(&mut self) -> Vec<MachineInfo> {
        vec![MachineInfo {
            name: "virt".to_owned(),
            alias: None,
            is_default: Some(true),
            cpu_max: 8,
            hotpluggable_cpus: false,
            numa_mem_supported: false,
            deprecated: false,
            default_cpu_type: None,
            acpi: false,
        }]
    }

    fn chardevs(&mut self) -> Vec<ChardevInfo> {
        let (label, filename) = ("serial0".to_owned(), "stdio".to_owned());
        vec![ChardevInfo { label, filename, frontend_open: true }]
    }

    fn storage(&mut self, request: StorageRequest, reply: Responder<serde_json::Value>) {
        reply.respond(match request {
            StorageRequest::Block => Ok(serde_json::json!([])),
            other => Err(wrong(&format!("{other:?}"))),
        });
    }

    fn pci(&mut self) -> Vec<PciInfo> {
        vec![PciInfo { bus: 0, devices: Vec::new() }]
    }

    fn registers(&mut self, vcpu: Option<u32>, reply: Responder<String>) {
        match vcpu {
            Some(0) | None => reply.respond(Ok("CPU#0\n pc 0000000080000000".to_owned())),
            Some(other) => reply.respond(Err(wrong(&format!("there is no vCPU {other}")))),
        }
    }

    fn memory_tree(&mut self) -> Result<String, ControlError> {
        Ok("memory".to_owned())
    }

    fn device_tree(&mut self) -> Result<String, ControlError> {
        Ok("bus: main".to_owned())
    }

    fn jit(&mut self) -> Result<String, ControlError> {
        Err(wrong("nothing is translated"))
    }

    fn read_memory(&mut self, read: MemoryRead, reply: Responder<Vec<u8>>) {
        let in_range = read.address < 0x1000;
        let bytes = (0..read.len).map(|i| i as u8).collect();
        reply.respond(if in_range { Ok(bytes) } else { Err(wrong("no RAM there")) });
    }
}

/// Which file a descriptor is, wherever it has travelled.
pub fn inode(fd: &impl AsRawFd) -> u64 {
    use std::os::unix::fs::MetadataExt;
    std::fs::metadata(format!("/proc/self/fd/{}", fd.as_raw_fd())).map_or(0, |metadata| metadata.ino())
}
