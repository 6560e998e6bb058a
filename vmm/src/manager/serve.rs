//! The manager's side of the control handle.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use holdfast_accel::DebugControl;
use holdfast_arch::{Arch, CpuState};
use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PciDeviceInfo, ReceiveMigrationData,
    RestoreConfig, SendMigrationData, VmConfig, VmRemoveDevice, VmResize, VmSnapshotConfig, VsockConfig,
    check_id, validate_disk, validate_fs, validate_generic_vhost_user, validate_net, validate_vsock,
};
use holdfast_devices::pci::Removal;

use super::jobs::Jobs;
use super::{Manager, Run, Stage, migrate, query};
use crate::confine;
use crate::control::{
    AnnounceParameters, BackEndSocket, ChardevInfo, ControlError, Counters, CpuInfoFast, DebugListener,
    DebugTarget, ErrorKind, Event, KvmInfo, MachineInfo, MemoryRead, MemoryWrite, MigrationCapabilityStatus,
    MigrationInfo, MigrationParameters, Netdev, NetdevCard, Origin, PciInfo, Responder, RunState, VmInfo,
    VmManager,
};
use crate::storage::StorageRequest;
use crate::vm::HotDevice;

impl Manager {
    /// The config, if devices can still be added to it.
    fn open_config(&mut self) -> Result<&mut VmConfig, ControlError> {
        self.idle()?;
        match self.stage {
            Stage::Nothing => Err(ControlError::not_created()),
            Stage::Created => Ok(&mut self.config),
            Stage::Built { .. } => {
                Err(ControlError::unsupported("adding or removing a device of a VM that has booted"))
            }
        }
    }

    /// Adds a device to a VM that is there; nothing is to be done before it has booted (`None`).
    fn add_hot(
        &mut self,
        device: HotDevice<'_>,
        failure: &str,
    ) -> Result<Option<PciDeviceInfo>, ControlError> {
        match &self.stage {
            Stage::Built { vm, .. } => vm.add(device).map(Some).map_err(|e| ControlError::failed(failure, e)),
            _ => self.open_config().map(|_| None),
        }
    }

    /// Asks the guest to let go of a device.
    fn ask_for(&mut self, id: &str) -> Result<(), ControlError> {
        let vm = Arc::clone(self.built()?);
        if !vm.plugged().iter().any(|p| p.id == id) {
            return Err(ControlError::new(ErrorKind::DeviceNotFound, format!("Device '{id}' not found")));
        }
        let wrong = |e| ControlError::failed(format!("Device '{id}' cannot be removed"), e);
        self.check_no_job_of(id)?;
        match vm.ask_for(id).map_err(wrong)? {
            Removal::Asked => {}
            Removal::Now => self.take_out(id),
            Removal::UnderWay => {
                let text = format!("Device {id} is already in the process of unplug");
                return Err(ControlError::new(ErrorKind::Failed, text));
            }
        }
        Ok(())
    }

    /// Takes a device out that the guest has let go of.
    pub(super) fn take_out(&mut self, id: &str) {
        self.end_jobs(Some(id));
        if self.built().is_ok_and(|vm| vm.take_out(id)) {
            self.config.remove_device(id);
            self.events.publish(Event::DeviceDeleted { id: id.to_owned() });
        }
    }

    /// Fails if Landlock keeps the process from what `config` names.
    fn in_reach(&self, config: &VmConfig) -> Result<(), ControlError> {
        confine::check(&self.options.sandbox, config, None)
            .map_err(|e| ControlError::failed("The VM is out of reach", e))
    }

    /// Checks or makes the id of a device that is added.
    fn name_device(&mut self, id: &mut Option<String>, prefix: &str) -> Result<(), ControlError> {
        let taken: Vec<String> = self.config.device_ids().into_iter().map(str::to_owned).collect();
        match id {
            Some(id) => {
                check_id(id).map_err(|e| ControlError::new(ErrorKind::Invalid, e))?;
                if taken.contains(id) {
                    let text = format!("There is a device `{id}` already");
                    return Err(ControlError::new(ErrorKind::Conflict, text));
                }
            }
            None => *id = Some(self.ids.allocate(prefix, |id| taken.iter().any(|t| t == id))),
        }
        Ok(())
    }
}

impl VmManager for Manager {
    fn create(&mut self, mut config: Box<VmConfig>) -> Result<(), ControlError> {
        self.idle()?;
        if !matches!(self.stage, Stage::Nothing) {
            return Err(ControlError::new(ErrorKind::Failed, "VM is already created"));
        }
        config.validate()?;
        self.in_reach(&config)?;
        self.ids.assign(&mut config);
        self.config = *config;
        self.stage = Stage::Created;
        Ok(())
    }

    fn delete(&mut self, reply: Responder<()>) {
        let result = self.idle().map(|()| {
            if matches!(self.stage, Stage::Nothing) {
                return;
            }
            if matches!(self.stage, Stage::Built { .. }) {
                self.events.publish(Event::Shutdown(Origin::Host));
            }
            self.end_debugging(0);
            self.end_jobs(None);
            self.jobs = Jobs::default();
            self.stage = Stage::Nothing;
            self.config = VmConfig::default();
            self.forget_storage();
            self.ids = holdfast_config::IdAllocator::default();
            self.tap_fds.clear();
            self.events.publish(Event::Deleted);
        });
        reply.respond(result);
    }

    fn boot(&mut self, reply: Responder<()>) {
        self.start_boot(reply);
    }

    fn pause(&mut self, reply: Responder<()>) {
        reply.respond(self.pause_vm());
    }

    fn resume(&mut self, reply: Responder<()>) {
        reply.respond(self.resume_vm());
    }

    fn shutdown(&mut self, reply: Responder<()>) {
        reply.respond(self.switch_off(Origin::Host));
    }

    fn reboot(&mut self, reply: Responder<()>) {
        reply.respond(self.reset(Origin::Host));
    }

    fn power_button(&mut self) -> Result<(), ControlError> {
        let vm = self.built_and(Run::Running, "VM is not running")?;
        if !vm.press_power_button() {
            return Err(ControlError::new(
                ErrorKind::Failed,
                "The guest does not listen to its power button, a virtio input device: it needs the drivers \
                 virtio_input and evdev, and something like systemd-logind or acpid",
            ));
        }
        self.events.publish(Event::PowerButton);
        Ok(())
    }

    fn nmi(&mut self) -> Result<(), ControlError> {
        let vm = self.built_and(Run::Running, "VM is not running")?;
        if vm.arch() == Arch::Riscv64 {
            // As with QEMU's machine of this name. Resumable NMIs (Smrnmi) would need firmware that handles them.
            let text = "Machine `virt` does not provide NMIs: its RISC-V harts have none (no Smrnmi)";
            return Err(ControlError::new(ErrorKind::Failed, text));
        }
        vm.vcpus().nmi().map_err(|e| ControlError::failed("The NMI could not be injected", e))
    }

    fn info(&mut self) -> Result<VmInfo, ControlError> {
        match &self.stage {
            Stage::Nothing => Err(ControlError::not_created()),
            Stage::Created => Ok(query::info_created(&self.config)),
            Stage::Built { vm, run } => Ok(query::info(vm, *run, &self.config)),
        }
    }

    fn counters(&mut self) -> Result<Counters, ControlError> {
        match &self.stage {
            Stage::Built { vm, .. } => Ok(query::counters(vm)),
            _ => Err(ControlError::not_running()),
        }
    }

    fn resize(&mut self, resize: VmResize) -> Result<(), ControlError> {
        let vm = Arc::clone(self.built()?);
        let refuse = |asked: bool, what: &str| {
            if asked {
                Err(ControlError::unsupported(format_args!("{what} of a running VM")))
            } else {
                Ok(())
            }
        };
        refuse(
            resize.desired_vcpus.is_some_and(|n| n as usize != vm.vcpus().len()),
            "changing desired_vcpus",
        )?;
        refuse(resize.desired_ram.is_some_and(|n| n != vm.config().memory.size), "changing desired_ram")?;
        let Some(size) = resize.desired_balloon else { return Ok(()) };
        let balloon =
            vm.balloon().ok_or_else(|| ControlError::new(ErrorKind::Failed, "The VM has no balloon"))?;
        refuse(size > vm.config().memory.size, "a balloon larger than RAM")?;
        self.events.publish(Event::Resizing);
        balloon.resize(size);
        if let Some(config) = &mut self.config.balloon {
            config.size = size;
        }
        self.events.publish(Event::Resized);
        Ok(())
    }

    fn add_disk(&mut self, mut disk: DiskConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.idle()?;
        validate_disk(&disk)?;
        self.in_reach(&VmConfig { disks: Some(vec![disk.clone()]), ..VmConfig::default() })?;
        self.name_device(&mut disk.id, "_disk")?;
        let place = self.add_hot(HotDevice::Disk(&mut disk), "The disk cannot be added")?;
        self.config.disks.get_or_insert_default().push(disk);
        Ok(place)
    }

    fn add_net(
        &mut self,
        mut net: NetConfig,
        fds: Vec<OwnedFd>,
    ) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.idle()?;
        validate_net(&net)?;
        self.in_reach(&VmConfig { net: Some(vec![net.clone()]), ..VmConfig::default() })?;
        self.name_device(&mut net.id, "_net")?;
        let place = match matches!(self.stage, Stage::Built { .. }) {
            true => self.add_hot(HotDevice::Net(&mut net, fds), "The network device cannot be added")?,
            false => {
                self.open_config()?;
                if !fds.is_empty() {
                    self.tap_fds.insert(net.id.clone().unwrap_or_default(), fds);
                }
                None
            }
        };
        self.config.net.get_or_insert_default().push(net);
        Ok(place)
    }

    fn netdev_add(&mut self, netdev: Netdev) -> Result<(), ControlError> {
        self.netdevs.add(netdev, &self.sockets)
    }

    fn netdev_del(&mut self, id: String) -> Result<(), ControlError> {
        self.netdevs.remove(&id, &self.config)
    }

    fn add_card(&mut self, card: Box<NetdevCard>) -> Result<Option<PciDeviceInfo>, ControlError> {
        let net = self.netdevs.card(&card, &self.sockets, &self.config)?;
        let place = self.add_net(net, Vec::new())?;
        let made = self.config.net().last().and_then(|net| net.id.clone());
        self.netdevs.made(&card.netdev, made);
        Ok(place)
    }

    fn add_fs(&mut self, mut fs: FsConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.idle()?;
        validate_fs(&fs)?;
        self.name_device(&mut fs.id, "_fs")?;
        let place = self.add_hot(HotDevice::Fs(&mut fs), "The shared directory cannot be added")?;
        self.config.fs.get_or_insert_default().push(fs);
        Ok(place)
    }

    fn add_generic_vhost_user(
        &mut self,
        mut device: GenericVhostUserConfig,
    ) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.idle()?;
        validate_generic_vhost_user(&device)?;
        self.name_device(&mut device.id, "_generic_vhost_user")?;
        let place = self.add_hot(HotDevice::Generic(&mut device), "The device cannot be added")?;
        self.config.generic_vhost_user.get_or_insert_default().push(device);
        Ok(place)
    }

    fn add_vsock(&mut self, mut vsock: VsockConfig) -> Result<Option<PciDeviceInfo>, ControlError> {
        self.idle()?;
        if self.config.vsock.is_some() {
            let text = "The VM has sockets (vsock) already; there can be one such device";
            return Err(ControlError::new(ErrorKind::Invalid, text));
        }
        validate_vsock(&vsock)?;
        self.in_reach(&VmConfig { vsock: Some(vsock.clone()), ..VmConfig::default() })?;
        self.name_device(&mut vsock.id, "_vsock")?;
        let place = self.add_hot(HotDevice::Vsock(&mut vsock), "The sockets cannot be added")?;
        self.config.vsock = Some(vsock);
        Ok(place)
    }

    fn chardev_add(&mut self, label: String, socket: BackEndSocket) -> Result<(), ControlError> {
        self.sockets.add(label, socket)
    }

    fn chardev_remove(&mut self, label: String) -> Result<(), ControlError> {
        self.sockets.remove(&label, &self.config, &self.netdevs)
    }

    fn chardev_socket(&mut self, label: String) -> Option<BackEndSocket> {
        self.sockets.get(&label)
    }

    fn remove_device(&mut self, device: VmRemoveDevice) -> Result<(), ControlError> {
        self.idle()?;
        if matches!(self.stage, Stage::Built { .. }) {
            return self.ask_for(&device.id);
        }
        let config = self.open_config()?;
        if !config.remove_device(&device.id) {
            let text = format!("There is no device `{}`", device.id);
            return Err(ControlError::new(ErrorKind::DeviceNotFound, text));
        }
        self.tap_fds.remove(&device.id);
        Ok(())
    }

    fn storage(&mut self, request: StorageRequest, reply: Responder<serde_json::Value>) {
        self.serve_storage(request, reply);
    }

    fn snapshot(&mut self, config: VmSnapshotConfig, reply: Responder<()>) {
        self.start_snapshot(config.directory().as_deref(), reply);
    }

    fn restore(&mut self, config: RestoreConfig, fds: Vec<OwnedFd>, reply: Responder<()>) {
        self.start_restore(config, fds, reply);
    }

    fn send_migration(&mut self, data: SendMigrationData, reply: Responder<()>) {
        self.start_send(&data, reply);
    }

    fn receive_migration(&mut self, data: ReceiveMigrationData, reply: Responder<()>) {
        self.start_receive(&data, reply);
    }

    fn migrate(&mut self, uri: String, resume: bool, blk: bool) -> Result<(), ControlError> {
        self.migrate_to(&uri, resume, blk)
    }

    fn migrate_incoming(&mut self, uri: Option<String>, exit: bool) -> Result<(), ControlError> {
        self.migrate_from(uri.as_deref(), exit)
    }

    fn migrate_cancel(&mut self) -> Result<(), ControlError> {
        self.cancel_migration();
        Ok(())
    }

    fn migrate_pause(&mut self) -> Result<(), ControlError> {
        self.pause_migration()
    }

    fn migrate_recover(&mut self, uri: String) -> Result<(), ControlError> {
        self.recover_migration(&uri)
    }

    fn migrate_start_postcopy(&mut self) -> Result<(), ControlError> {
        self.start_postcopy()
    }

    fn migrate_continue(&mut self, state: String) -> Result<(), ControlError> {
        self.continue_migration(&state)
    }

    fn announce_self(&mut self, how: AnnounceParameters) -> Result<(), ControlError> {
        self.announce(how)
    }

    fn migration(&mut self) -> MigrationInfo {
        self.migration_info()
    }

    fn migration_parameters(&mut self) -> MigrationParameters {
        self.migration.parameters()
    }

    fn set_migration_parameters(&mut self, new: MigrationParameters) -> Result<(), ControlError> {
        self.migration.set_parameters(&new)
    }

    fn migration_capabilities(&mut self) -> Vec<MigrationCapabilityStatus> {
        self.migration.capabilities()
    }

    fn set_migration_capabilities(
        &mut self,
        new: Vec<MigrationCapabilityStatus>,
    ) -> Result<(), ControlError> {
        self.set_capabilities(&new)
    }

    fn vmm_shutdown(&mut self, origin: Origin, reply: Responder<()>) {
        if matches!(self.stage, Stage::Built { .. }) {
            self.events.publish(Event::Shutdown(origin));
        }
        self.exit = Some(0);
        reply.respond(Ok(()));
    }

    fn run_state(&mut self) -> RunState {
        match (&self.stage, self.job) {
            (Stage::Nothing | Stage::Created, Some("restore")) => RunState::RestoreVm,
            (Stage::Nothing | Stage::Created, Some(migrate::RECEIVE)) => RunState::Inmigrate,
            (Stage::Nothing | Stage::Created, _) if self.migration.expected() => RunState::Inmigrate,
            (Stage::Nothing | Stage::Created, _) => RunState::Prelaunch,
            (Stage::Built { .. }, Some("snapshot")) => RunState::SaveVm,
            (Stage::Built { run, .. }, _) => match run {
                Run::Running => RunState::Running,
                Run::Paused if self.migration.finishing() => RunState::FinishMigrate,
                Run::Moved { .. } => RunState::Postmigrate,
                Run::Paused => RunState::Paused,
                Run::Debug => RunState::Debug,
                Run::Off => RunState::Shutdown,
                Run::Failed => RunState::InternalError,
                Run::Panicked => RunState::GuestPanicked,
                Run::IoError => RunState::IoError,
            },
        }
    }

    fn kvm(&mut self) -> KvmInfo {
        let enabled = self.built().is_ok_and(|vm| vm.accel().accel() == "kvm");
        KvmInfo { enabled, present: std::path::Path::new("/dev/kvm").exists() }
    }

    fn cpus(&mut self) -> Vec<CpuInfoFast> {
        self.built().map(|vm| query::cpus(vm)).unwrap_or_default()
    }

    fn machines(&mut self) -> Vec<MachineInfo> {
        query::machines()
    }

    fn chardevs(&mut self) -> Vec<ChardevInfo> {
        let mut all = self.built().map(|vm| query::chardevs(vm)).unwrap_or_default();
        all.extend(self.sockets.shown(&self.config));
        all
    }

    fn pci(&mut self) -> Vec<PciInfo> {
        self.built().map(|vm| query::pci(vm)).unwrap_or_default()
    }

    fn registers(&mut self, vcpu: Option<u32>, reply: Responder<String>) {
        let running = matches!(self.stage, Stage::Built { run: Run::Running, .. });
        reply.respond(self.idle().and_then(|()| query::registers(self.built()?, vcpu, running)));
    }

    fn memory_tree(&mut self) -> Result<String, ControlError> {
        Ok(query::memory_tree(self.built()?))
    }

    fn device_tree(&mut self) -> Result<String, ControlError> {
        Ok(query::device_tree_text(self.built()?))
    }

    fn jit(&mut self) -> Result<String, ControlError> {
        let vm = self.built()?;
        let accel = vm.accel().accel();
        vm.accel().jit_info().ok_or_else(|| {
            ControlError::new(
                ErrorKind::Failed,
                format!("Nothing is translated under the accelerator `{accel}`"),
            )
        })
    }

    fn read_memory(&mut self, read: MemoryRead, reply: Responder<Vec<u8>>) {
        let running = matches!(self.stage, Stage::Built { run: Run::Running, .. });
        reply.respond(self.idle().and_then(|()| query::read_memory(self.built()?, read, running)));
    }

    fn debug_attach(&mut self, listener: DebugListener) -> Result<DebugTarget, ControlError> {
        self.attach_debugger(listener)
    }

    fn debug_stop(&mut self) -> Result<(), ControlError> {
        self.stop_debugged()
    }

    fn debug_set(&mut self, controls: Vec<Option<DebugControl>>) -> Result<(), ControlError> {
        self.set_debug(&controls)
    }

    fn debug_run(&mut self, controls: Vec<Option<DebugControl>>) -> Result<(), ControlError> {
        self.run_debugged(&controls)
    }

    fn debug_detach(&mut self) -> Result<(), ControlError> {
        self.detach_debugger()
    }

    fn cpu_state(&mut self, vcpu: u32) -> Result<CpuState, ControlError> {
        self.vcpu_state(vcpu)
    }

    fn set_cpu_state(&mut self, vcpu: u32, state: CpuState) -> Result<(), ControlError> {
        self.set_vcpu_state(vcpu, state)
    }

    fn write_memory(&mut self, write: MemoryWrite) -> Result<(), ControlError> {
        self.write(&write)
    }
}
