//! What the VM's manager can do.

use std::os::fd::OwnedFd;

use holdfast_accel::DebugControl;
use holdfast_arch::CpuState;
use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PciDeviceInfo, ReceiveMigrationData,
    RestoreConfig, SendMigrationData, VmConfig, VmRemoveDevice, VmResize, VmSnapshotConfig, VsockConfig,
};

use super::migration::{AnnounceParameters, MigrationCapabilityStatus, MigrationInfo, MigrationParameters};
use super::netdev::{BackEndSocket, Netdev, NetdevCard};
use super::reply::*;
use super::{ControlError, DebugListener, DebugTarget, MemoryRead, MemoryWrite, Responder};
use crate::storage::StorageRequest;

/// Serves all operations, on one thread. A method that returns a value answers at once; one that takes
/// a [`Responder`] may answer later from another thread, and must not keep this one waiting.
///
/// The states, as Cloud Hypervisor has them: nothing, `Created` by create and by shutdown, `Running`
/// by boot and resume, `Paused` by pause and restore. An operation in the wrong state fails with
/// [`ControlError::not_created`] if there is no VM and [`super::ErrorKind::Failed`] otherwise.
pub trait VmManager {
    /// Takes a configuration. It has been [read](VmConfig::from_json), not validated.
    ///
    /// # Errors
    /// [`super::ErrorKind::Invalid`], or `Failed` if there is a VM.
    fn create(&mut self, config: Box<VmConfig>) -> Result<(), ControlError>;
    /// Shuts the VM down if it runs and forgets it. Succeeds if there is none.
    fn delete(&mut self, reply: Responder<()>);
    /// Builds the VM and runs it.
    fn boot(&mut self, reply: Responder<()>);
    /// Stops all vCPUs. A second pause fails.
    fn pause(&mut self, reply: Responder<()>);
    /// Runs them again. Fails unless paused.
    fn resume(&mut self, reply: Responder<()>);
    /// Switches the VM off and goes back to `Created`.
    fn shutdown(&mut self, reply: Responder<()>);
    /// Resets a running VM.
    fn reboot(&mut self, reply: Responder<()>);
    /// Presses the power button; publishes [`super::Event::PowerButton`].
    ///
    /// # Errors
    /// Without a running VM, or when its machine has no button.
    fn power_button(&mut self) -> Result<(), ControlError>;
    /// Injects a non-maskable interrupt into every vCPU.
    ///
    /// # Errors
    /// Without a running VM, or when its CPUs have none.
    fn nmi(&mut self) -> Result<(), ControlError>;
    /// Configuration and state.
    ///
    /// # Errors
    /// Without a VM.
    fn info(&mut self) -> Result<VmInfo, ControlError>;
    /// Counters of the devices of a booted VM.
    ///
    /// # Errors
    /// [`super::ErrorKind::Failed`], never `NotCreated`, without a booted VM.
    fn counters(&mut self) -> Result<Counters, ControlError>;
    /// Changes sizes; refuses those that cannot change by name.
    ///
    /// # Errors
    /// Without a running VM, or when a size cannot be changed.
    fn resize(&mut self, resize: VmResize) -> Result<(), ControlError>;
    /// Adds a disk. Before boot the answer is `None`.
    ///
    /// # Errors
    /// [`super::ErrorKind::Invalid`], [`super::ErrorKind::Conflict`], `NotCreated`.
    fn add_disk(&mut self, disk: DiskConfig) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Adds a network device that uses `fds` as its tap, in place of `net.fds`. Before boot the answer
    /// is `None`.
    ///
    /// # Errors
    /// Like [`VmManager::add_disk`].
    fn add_net(&mut self, net: NetConfig, fds: Vec<OwnedFd>) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Names a network back end. Nothing is opened before a card uses it.
    ///
    /// # Errors
    /// [`super::ErrorKind::Conflict`] if the name is taken; what it says that is not there.
    fn netdev_add(&mut self, netdev: Netdev) -> Result<(), ControlError>;
    /// Forgets one.
    ///
    /// # Errors
    /// If it is not there or a card uses it.
    fn netdev_del(&mut self, id: String) -> Result<(), ControlError>;
    /// Adds a network device by such a back end. Before boot the answer is `None`.
    ///
    /// # Errors
    /// If the back end is not there or has a card; like [`VmManager::add_net`].
    fn add_card(&mut self, card: Box<NetdevCard>) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Adds a directory shared by a vhost-user back end. Before boot the answer is `None`.
    ///
    /// # Errors
    /// Like [`VmManager::add_disk`].
    fn add_fs(&mut self, fs: FsConfig) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Adds a device by a vhost-user back end. Before boot the answer is `None`.
    ///
    /// # Errors
    /// Like [`VmManager::add_disk`].
    fn add_generic_vhost_user(
        &mut self,
        device: GenericVhostUserConfig,
    ) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Adds sockets between the guest and the host. Before boot the answer is `None`.
    ///
    /// # Errors
    /// Like [`VmManager::add_disk`].
    fn add_vsock(&mut self, vsock: VsockConfig) -> Result<Option<PciDeviceInfo>, ControlError>;
    /// Names the UNIX socket of a device's back end.
    ///
    /// # Errors
    /// [`super::ErrorKind::Conflict`] if the name is taken.
    fn chardev_add(&mut self, label: String, socket: BackEndSocket) -> Result<(), ControlError>;
    /// Forgets one.
    ///
    /// # Errors
    /// If it is not there or a device uses it.
    fn chardev_remove(&mut self, label: String) -> Result<(), ControlError>;
    /// Where one is.
    fn chardev_socket(&mut self, label: String) -> Option<BackEndSocket>;
    /// Removes a device.
    ///
    /// # Errors
    /// [`super::ErrorKind::DeviceNotFound`], `NotCreated`.
    fn remove_device(&mut self, device: VmRemoveDevice) -> Result<(), ControlError>;
    /// Asks something of the storage graph.
    fn storage(&mut self, request: StorageRequest, reply: Responder<serde_json::Value>) {
        let _ = request;
        reply.respond(Err(ControlError::unsupported("the storage graph")));
    }
    /// Saves a paused VM.
    fn snapshot(&mut self, config: VmSnapshotConfig, reply: Responder<()>);
    /// Makes a VM from a snapshot. `fds` are the tap devices of `config.net_fds`, in that order; their
    /// number has been checked.
    fn restore(&mut self, config: RestoreConfig, fds: Vec<OwnedFd>, reply: Responder<()>);
    /// Moves the VM elsewhere. Until it has moved, every failure leaves it as it was.
    fn send_migration(&mut self, _data: SendMigrationData, reply: Responder<()>) {
        reply.respond(Err(ControlError::unsupported("migration")));
    }
    /// Takes a VM over from elsewhere. There must be none.
    fn receive_migration(&mut self, _data: ReceiveMigrationData, reply: Responder<()>) {
        reply.respond(Err(ControlError::unsupported("migration")));
    }
    /// Begins to move the VM.
    ///
    /// # Errors
    /// If it cannot begin.
    fn migrate(&mut self, _uri: String, _resume: bool, _blk: bool) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Begins to wait for a VM from elsewhere.
    ///
    /// # Errors
    /// If it cannot listen, or there is a VM.
    fn migrate_incoming(&mut self, _uri: Option<String>, _exit: bool) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Cancels the migration, if one is under way and it is not too late.
    ///
    /// # Errors
    /// Never without a migration.
    fn migrate_cancel(&mut self) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Interrupts a migration in post-copy.
    ///
    /// # Errors
    /// Without one.
    fn migrate_pause(&mut self) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Waits for an interrupted migration to go on.
    ///
    /// # Errors
    /// Without one.
    fn migrate_recover(&mut self, _uri: String) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Lets the guest go over before its RAM has.
    ///
    /// # Errors
    /// Without a migration that may.
    fn migrate_start_postcopy(&mut self) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Lets a migration go on that waits in `state`.
    ///
    /// # Errors
    /// If none does.
    fn migrate_continue(&mut self, _state: String) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Tells the network where the VM's devices are.
    ///
    /// # Errors
    /// If there is no VM, or a parameter is out of range.
    fn announce_self(&mut self, _how: AnnounceParameters) -> Result<(), ControlError> {
        Err(ControlError::unsupported("announce-self"))
    }
    /// The migration under way, or the last one.
    fn migration(&mut self) -> MigrationInfo {
        MigrationInfo::default()
    }
    /// Parameters of migrations.
    fn migration_parameters(&mut self) -> MigrationParameters {
        MigrationParameters::default()
    }
    /// Changes them.
    ///
    /// # Errors
    /// [`super::ErrorKind::Invalid`] naming the parameter.
    fn set_migration_parameters(&mut self, _new: MigrationParameters) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Capabilities of migrations.
    fn migration_capabilities(&mut self) -> Vec<MigrationCapabilityStatus> {
        Vec::new()
    }
    /// Changes them.
    ///
    /// # Errors
    /// Naming a capability that is not there.
    fn set_migration_capabilities(
        &mut self,
        _new: Vec<MigrationCapabilityStatus>,
    ) -> Result<(), ControlError> {
        Err(ControlError::unsupported("migration"))
    }
    /// Ends the process in order: answer first, then shut down the VM and leave the manager's loop.
    fn vmm_shutdown(&mut self, origin: super::Origin, reply: Responder<()>);

    /// What `query-status` shows. Without a VM: `prelaunch`.
    fn run_state(&mut self) -> RunState;
    /// The accelerators.
    fn kvm(&mut self) -> KvmInfo;
    /// The vCPUs; none without a booted VM.
    fn cpus(&mut self) -> Vec<CpuInfoFast>;
    /// All machines.
    fn machines(&mut self) -> Vec<MachineInfo>;
    /// The character back ends of a booted VM.
    fn chardevs(&mut self) -> Vec<ChardevInfo>;
    /// The PCI buses of a booted VM.
    fn pci(&mut self) -> Vec<PciInfo>;
    /// `info registers`, of all vCPUs or of one.
    fn registers(&mut self, vcpu: Option<u32>, reply: Responder<String>);
    /// `info mtree`: the address spaces.
    ///
    /// # Errors
    /// Without a booted VM.
    fn memory_tree(&mut self) -> Result<String, ControlError>;
    /// `info qtree`: the devices.
    ///
    /// # Errors
    /// Without a booted VM.
    fn device_tree(&mut self) -> Result<String, ControlError>;
    /// `info jit`: the translator's figures.
    ///
    /// # Errors
    /// Without a booted VM, or when nothing is translated.
    fn jit(&mut self) -> Result<String, ControlError>;
    /// Reads guest memory for `x` and `xp`.
    fn read_memory(&mut self, read: MemoryRead, reply: Responder<Vec<u8>>);

    /// Attaches a debugger and stops the guest; its state is `debug` then. There is one debugger at most.
    ///
    /// # Errors
    /// Without a booted VM, [`super::ErrorKind::Conflict`] if there is one.
    fn debug_attach(&mut self, _listener: DebugListener) -> Result<DebugTarget, ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Stops the guest for its debugger. One that stands stays as it is.
    ///
    /// # Errors
    /// Without a booted VM.
    fn debug_stop(&mut self) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Tells vCPUs that stand what the debugger wants.
    ///
    /// # Errors
    /// Without a debugger, or if a vCPU cannot do it.
    fn debug_set(&mut self, _controls: Vec<Option<DebugControl>>) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Lets vCPUs run under a debugger.
    ///
    /// # Errors
    /// As [`VmManager::debug_set`]; the guest stands then.
    fn debug_run(&mut self, _controls: Vec<Option<DebugControl>>) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Takes all breakpoints out and lets the guest go on as before.
    ///
    /// # Errors
    /// If it cannot.
    fn debug_detach(&mut self) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// The state of a vCPU that stands.
    ///
    /// # Errors
    /// If the guest runs, or there is no such vCPU.
    fn cpu_state(&mut self, _vcpu: u32) -> Result<CpuState, ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Replaces it.
    ///
    /// # Errors
    /// As [`VmManager::cpu_state`], or if the state does not fit.
    fn set_cpu_state(&mut self, _vcpu: u32, _state: CpuState) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
    /// Writes RAM of a guest that stands.
    ///
    /// # Errors
    /// If the guest runs, or there is no RAM; what was written before stays.
    fn write_memory(&mut self, _write: MemoryWrite) -> Result<(), ControlError> {
        Err(ControlError::unsupported("debugging the guest"))
    }
}
