//! The operations: one request type, one reply type each.

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
use crate::storage::StorageRequest;

use super::{ControlError, DebugListener, DebugTarget, MemoryWrite, Origin, Responder, VmManager};

/// Something that can be asked of the manager.
pub trait Operation: Send + 'static {
    /// What comes back.
    type Reply: Send + 'static;
    /// For logs.
    const NAME: &'static str;
    /// Lets `manager` do it.
    fn serve(self, manager: &mut dyn VmManager, reply: Responder<Self::Reply>);
}

/// Operations that the manager answers at once.
macro_rules! quick {
    ($($(#[$doc:meta])* $name:ident $(($($field:ident: $ty:ty),*))? -> $reply:ty = $method:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name $(($(pub $ty),*))?;
        impl Operation for $name {
            type Reply = $reply;
            const NAME: &'static str = stringify!($name);
            fn serve(self, manager: &mut dyn VmManager, reply: Responder<$reply>) {
                let Self $(($($field),*))? = self;
                reply.respond(manager.$method($($($field),*)?).into_reply());
            }
        }
    )*};
}

/// Operations that may be answered later.
macro_rules! deferred {
    ($($(#[$doc:meta])* $name:ident $(($($field:ident: $ty:ty),*))? -> $reply:ty = $method:ident;)*) => {$(
        $(#[$doc])*
        #[derive(Debug)]
        pub struct $name $(($(pub $ty),*))?;
        impl Operation for $name {
            type Reply = $reply;
            const NAME: &'static str = stringify!($name);
            fn serve(self, manager: &mut dyn VmManager, reply: Responder<$reply>) {
                let Self $(($($field),*))? = self;
                manager.$method($($($field,)*)? reply);
            }
        }
    )*};
}

/// Lets methods that cannot fail be served like those that can.
trait IntoReply<T> {
    fn into_reply(self) -> Result<T, ControlError>;
}

impl<T> IntoReply<T> for Result<T, ControlError> {
    fn into_reply(self) -> Self {
        self
    }
}

macro_rules! infallible {
    ($($ty:ty),*) => {$(
        impl IntoReply<$ty> for $ty {
            fn into_reply(self) -> Result<$ty, ControlError> {
                Ok(self)
            }
        }
    )*};
}

infallible!(
    RunState,
    KvmInfo,
    Vec<CpuInfoFast>,
    Vec<MachineInfo>,
    Vec<ChardevInfo>,
    Option<BackEndSocket>,
    Vec<PciInfo>,
    MigrationInfo,
    MigrationParameters,
    Vec<MigrationCapabilityStatus>
);

quick! {
    /// Takes a configuration.
    Create(config: Box<VmConfig>) -> () = create;
    /// Presses the power button.
    PowerButton -> () = power_button;
    /// Injects a non-maskable interrupt.
    Nmi -> () = nmi;
    /// Configuration and state.
    Info -> VmInfo = info;
    /// Counters of the devices.
    GetCounters -> Counters = counters;
    /// Changes sizes.
    Resize(resize: VmResize) -> () = resize;
    /// Adds a disk.
    AddDisk(disk: DiskConfig) -> Option<PciDeviceInfo> = add_disk;
    /// Adds a network device, with its tap file descriptors.
    AddNet(net: NetConfig, fds: Vec<OwnedFd>) -> Option<PciDeviceInfo> = add_net;
    /// Names a network back end.
    NetdevAdd(netdev: Netdev) -> () = netdev_add;
    /// Forgets one that no card uses.
    NetdevDel(id: String) -> () = netdev_del;
    /// Adds a network device by such a back end.
    AddCard(card: Box<NetdevCard>) -> Option<PciDeviceInfo> = add_card;
    /// Adds a directory shared by a vhost-user back end.
    AddFs(fs: FsConfig) -> Option<PciDeviceInfo> = add_fs;
    /// Adds a device by a vhost-user back end.
    AddGenericVhostUser(device: GenericVhostUserConfig) -> Option<PciDeviceInfo> = add_generic_vhost_user;
    /// Adds sockets between the guest and the host.
    AddVsock(vsock: VsockConfig) -> Option<PciDeviceInfo> = add_vsock;
    /// Removes a device.
    RemoveDevice(device: VmRemoveDevice) -> () = remove_device;
    /// Run state as QEMU names it.
    QueryStatus -> RunState = run_state;
    /// Whether KVM is there and used.
    QueryKvm -> KvmInfo = kvm;
    /// The vCPUs.
    QueryCpus -> Vec<CpuInfoFast> = cpus;
    /// The machines.
    QueryMachines -> Vec<MachineInfo> = machines;
    /// Names the UNIX socket of a device's back end.
    ChardevAdd(label: String, socket: BackEndSocket) -> () = chardev_add;
    /// Forgets one that no device uses.
    ChardevRemove(label: String) -> () = chardev_remove;
    /// Where one is.
    ChardevSocket(label: String) -> Option<BackEndSocket> = chardev_socket;
    /// The character back ends.
    QueryChardev -> Vec<ChardevInfo> = chardevs;
    /// The PCI buses.
    QueryPci -> Vec<PciInfo> = pci;
    /// Begins to move the VM to a URI. The first `true` goes on with a migration that was interrupted, the second one takes the contents of
    /// disks along.
    Migrate(uri: String, resume: bool, blk: bool) -> () = migrate;
    /// Begins to wait for a VM at a URI, or for being told where (`None`); `true` ends the process if none comes.
    MigrateIncoming(uri: Option<String>, exit: bool) -> () = migrate_incoming;
    /// Cancels the migration, if one is under way.
    MigrateCancel -> () = migrate_cancel;
    /// Interrupts a migration in post-copy.
    MigratePause -> () = migrate_pause;
    /// Waits at a URI for an interrupted migration to go on.
    MigrateRecover(uri: String) -> () = migrate_recover;
    /// Lets the guest go over before its RAM has.
    MigrateStartPostcopy -> () = migrate_start_postcopy;
    /// Lets a migration that waits in this state go on.
    MigrateContinue(state: String) -> () = migrate_continue;
    /// The migration under way, or the last one.
    QueryMigrate -> MigrationInfo = migration;
    /// Parameters of migrations.
    QueryMigrateParameters -> MigrationParameters = migration_parameters;
    /// Changes them.
    MigrateSetParameters(new: MigrationParameters) -> () = set_migration_parameters;
    /// Capabilities of migrations.
    QueryMigrateCapabilities -> Vec<MigrationCapabilityStatus> = migration_capabilities;
    /// Changes them.
    MigrateSetCapabilities(new: Vec<MigrationCapabilityStatus>) -> () = set_migration_capabilities;
    /// Tells the network where the VM's devices are.
    AnnounceSelf(parameters: AnnounceParameters) -> () = announce_self;
    /// The address spaces, as text.
    MemoryTree -> String = memory_tree;
    /// The devices, as text.
    DeviceTree -> String = device_tree;
    /// The translator's figures, as text.
    Jit -> String = jit;
    /// Attaches a debugger and stops the guest.
    DebugAttach(listener: DebugListener) -> DebugTarget = debug_attach;
    /// Stops the guest for its debugger.
    DebugStop -> () = debug_stop;
    /// Tells vCPUs, by index, where to stop; `None` leaves one as it is.
    DebugSet(controls: Vec<Option<DebugControl>>) -> () = debug_set;
    /// As [`DebugSet`], and lets those vCPUs run that there is something for.
    DebugRun(controls: Vec<Option<DebugControl>>) -> () = debug_run;
    /// Lets the guest go on without the debugger.
    DebugDetach -> () = debug_detach;
    /// The state of a vCPU that stands.
    GetCpuState(vcpu: u32) -> CpuState = cpu_state;
    /// Replaces the state of a vCPU that stands.
    SetCpuState(vcpu: u32, state: CpuState) -> () = set_cpu_state;
    /// Writes guest memory while the guest stands.
    WriteMemory(write: MemoryWrite) -> () = write_memory;
}

deferred! {
    /// Forgets the VM.
    Delete -> () = delete;
    /// Builds the VM and runs it.
    Boot -> () = boot;
    /// Stops all vCPUs.
    Pause -> () = pause;
    /// Runs them again.
    Resume -> () = resume;
    /// Switches the VM off.
    Shutdown -> () = shutdown;
    /// Resets the VM.
    Reboot -> () = reboot;
    /// Asks something of the storage graph; the answer is QEMU's JSON.
    Storage(request: StorageRequest) -> serde_json::Value = storage;
    /// Saves the VM.
    Snapshot(config: VmSnapshotConfig) -> () = snapshot;
    /// Makes a VM from a snapshot, with the tap file descriptors of its network devices.
    Restore(config: RestoreConfig, fds: Vec<OwnedFd>) -> () = restore;
    /// Moves the VM elsewhere; answers when it has moved.
    SendMigration(data: SendMigrationData) -> () = send_migration;
    /// Takes a VM over from elsewhere; answers when it is here.
    ReceiveMigration(data: ReceiveMigrationData) -> () = receive_migration;
    /// Ends the process.
    VmmShutdown(origin: Origin) -> () = vmm_shutdown;
    /// Registers of all vCPUs or of one, as text.
    Registers(vcpu: Option<u32>) -> String = registers;
    /// Reads guest memory.
    ReadMemory(read: MemoryRead) -> Vec<u8> = read_memory;
}

/// A piece of guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct MemoryRead {
    /// First address.
    pub address: u64,
    /// Bytes; the codecs ask for at most 1 MiB.
    pub len: usize,
    /// The vCPU whose virtual addresses are meant; `None` for guest-physical ones.
    pub vcpu: Option<u32>,
}
