//! The routes, in one table: what each takes, what runs it, what it answers.

use std::os::fd::OwnedFd;
use std::pin::Pin;

use bytes::Bytes;
use holdfast_config::{
    DiskConfig, FsConfig, GenericVhostUserConfig, NetConfig, PciDeviceInfo, ReceiveMigrationData,
    RecoverMigrationData, RestoreConfig, SendMigrationData, VmConfig, VmRemoveDevice, VmResize,
    VmSnapshotConfig, VsockConfig,
};
use holdfast_vmm::control::{ControlHandle, Counters, MigrationInfo, VmInfo};
use schemars::{JsonSchema, Schema, SchemaGenerator};

use super::HttpError;
use super::handlers::{self, VmmPingResponse};

/// A good answer.
pub(super) enum Answer {
    /// 204.
    NoContent,
    /// 200 without a body.
    Empty,
    /// 200 with this body.
    Json(String),
}

/// A request on its way to its handler.
pub(super) struct Call {
    pub(super) route: &'static Route,
    pub(super) handle: ControlHandle,
    pub(super) body: Bytes,
    pub(super) fds: Vec<OwnedFd>,
}

type Answering = Pin<Box<dyn Future<Output = Result<Answer, HttpError>> + Send>>;
type SchemaOf = fn(&mut SchemaGenerator) -> Schema;

/// A route.
pub(super) struct Route {
    /// Its last path element.
    pub(super) name: &'static str,
    /// One line for the OpenAPI description.
    pub(super) summary: &'static str,
    /// It takes GET, not PUT.
    pub(super) get: bool,
    /// Schema of the body that it must have.
    pub(super) body: Option<SchemaOf>,
    /// Schema of the answer of status 200.
    pub(super) reply: Option<SchemaOf>,
    /// Statuses that it answers.
    pub(super) statuses: &'static [u16],
    /// File descriptors may come with it.
    pub(super) takes_fds: bool,
    /// Says what failed, in the error's chain.
    pub(super) failure: &'static str,
    /// Runs it.
    pub(super) run: fn(Call) -> Answering,
}

fn schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The route called `name`.
pub(super) fn find(name: &str) -> Option<&'static Route> {
    ROUTES.iter().chain(UNSUPPORTED).find(|route| route.name == name)
}

macro_rules! route {
    ($name:literal, $summary:literal, $failure:literal, $run:expr, $statuses:expr $(, $field:ident: $value:expr)*) => {
        Route {
            $($field: $value,)*
            ..Route {
                name: $name,
                summary: $summary,
                get: false,
                body: None,
                reply: None,
                statuses: $statuses,
                takes_fds: false,
                failure: $failure,
                run: |call| Box::pin($run(call)),
            }
        }
    };
}

const PLAIN: &[u16] = &[204, 400, 404, 500];
const ADD: &[u16] = &[200, 204, 400, 404, 409, 500];

/// The routes that there are.
pub(super) static ROUTES: &[Route] = &[
    route!("vmm.ping", "Check that the API server is there", "The VMM does not answer", handlers::ping, &[200, 400],
        get: true, reply: Some(schema::<VmmPingResponse>)),
    route!(
        "vmm.shutdown",
        "End the VMM",
        "The VMM could not shut down",
        handlers::vmm_shutdown,
        &[200, 400, 500]
    ),
    route!("vm.info", "Configuration and state of the VM", "The VM info is not available", handlers::info,
        &[200, 400, 404, 500], get: true, reply: Some(schema::<VmInfo>)),
    route!("vm.counters", "Counters of the VM's devices", "The VM counters are not available", handlers::counters,
        &[200, 400, 500], get: true, reply: Some(schema::<Counters>)),
    route!("vm.create", "Create a VM; it is not booted", "The VM could not be created", handlers::create,
        &[204, 400, 500], body: Some(schema::<VmConfig>)),
    route!("vm.delete", "Delete the VM", "The VM could not be deleted", handlers::delete, &[204, 400, 500]),
    route!("vm.boot", "Boot the VM", "The VM could not boot", handlers::boot, PLAIN),
    route!("vm.pause", "Pause the VM", "The VM could not be paused", handlers::pause, PLAIN),
    route!("vm.resume", "Resume the VM", "The VM could not be resumed", handlers::resume, PLAIN),
    route!("vm.shutdown", "Switch the VM off", "The VM could not be shut down", handlers::shutdown, PLAIN),
    route!("vm.reboot", "Reboot the VM", "The VM could not be rebooted", handlers::reboot, PLAIN),
    route!(
        "vm.power-button",
        "Press the VM's power button",
        "The power button could not be triggered",
        handlers::power_button,
        PLAIN
    ),
    route!(
        "vm.nmi",
        "Inject a non-maskable interrupt",
        "The NMI could not be injected",
        handlers::nmi,
        PLAIN
    ),
    route!("vm.resize", "Resize the VM", "The VM could not be resized", handlers::resize,
        &[204, 400, 404, 429, 500], body: Some(schema::<VmResize>)),
    route!("vm.add-disk", "Add a disk", "The disk could not be added to the VM", handlers::add_disk, ADD,
        body: Some(schema::<DiskConfig>), reply: Some(schema::<PciDeviceInfo>)),
    route!("vm.add-net", "Add a network device", "The network device could not be added to the VM",
        handlers::add_net, ADD, body: Some(schema::<NetConfig>), reply: Some(schema::<PciDeviceInfo>), takes_fds: true),
    route!("vm.add-fs", "Add a shared directory", "The file system could not be added to the VM", handlers::add_fs, ADD,
        body: Some(schema::<FsConfig>), reply: Some(schema::<PciDeviceInfo>)),
    route!("vm.add-generic-vhost-user", "Add a device of a vhost-user back end",
        "The generic vhost-user device could not be added to the VM", handlers::add_generic_vhost_user, ADD,
        body: Some(schema::<GenericVhostUserConfig>), reply: Some(schema::<PciDeviceInfo>)),
    route!("vm.add-vsock", "Add sockets between guest and host", "The vsock device could not be added to the VM",
        handlers::add_vsock, ADD, body: Some(schema::<VsockConfig>), reply: Some(schema::<PciDeviceInfo>)),
    route!("vm.remove-device", "Remove a device", "The device could not be removed from the VM",
        handlers::remove_device, PLAIN, body: Some(schema::<VmRemoveDevice>)),
    route!("vm.snapshot", "Save the VM", "The VM could not be snapshotted", handlers::snapshot, PLAIN,
        body: Some(schema::<VmSnapshotConfig>)),
    route!("vm.restore", "Restore a VM from a snapshot", "The VM could not be restored", handlers::restore,
        &[204, 400, 404, 409, 500], body: Some(schema::<RestoreConfig>), takes_fds: true),
    route!("vm.send-migration", "Send a VM migration to URL", "The VM could not be migrated", handlers::send_migration,
        &[204, 400, 404, 429, 500], body: Some(schema::<SendMigrationData>)),
    route!("vm.receive-migration", "Receive a VM migration from URL", "The VM could not be received",
        handlers::receive_migration, &[204, 400, 429, 500], body: Some(schema::<ReceiveMigrationData>)),
    route!("vm.migration-progress", "Where the migration under way is, or how the last one ended",
        "The progress of the migration is not available", handlers::migration_progress, &[200, 400, 500],
        get: true, reply: Some(schema::<MigrationInfo>)),
    route!(
        "vm.cancel-migration",
        "Let the VM go on here; without effect once it has gone over",
        "The migration could not be cancelled",
        handlers::cancel_migration,
        &[204, 400, 500]
    ),
    route!(
        "vm.pause-migration",
        "Interrupt a post-copy migration",
        "The migration could not be interrupted",
        handlers::pause_migration,
        &[204, 400, 500]
    ),
    route!("vm.recover-migration", "Go on with an interrupted post-copy migration, at the destination first",
        "The migration could not be recovered", handlers::recover_migration, &[204, 400, 500],
        body: Some(schema::<RecoverMigrationData>)),
];

macro_rules! unsupported {
    ($($name:literal)*) => {
        &[$(route!($name, "", "", handlers::unsupported, &[], body: Some(schema::<serde_json::Value>), takes_fds: true)),*]
    };
}

/// Cloud Hypervisor's routes that are not there: they say so.
static UNSUPPORTED: &[Route] = unsupported!(
    "vm.add-device" "vm.add-pmem" "vm.add-user-device" "vm.add-vdpa" "vm.coredump" "vm.resize-disk"
    "vm.resize-zone"
);
