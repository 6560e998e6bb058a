//! What the routes do: read the body, call the handle, write the reply.

use holdfast_config::{ConfigError, NetConfig, RecoverMigrationData, RestoreConfig, VmConfig, parse_json};
use holdfast_vmm::control::{self as ops, ControlError, ErrorKind, Operation, Origin};
use hyper::StatusCode;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use super::HttpError;
use super::routes::{Answer, Call};
use crate::call;

/// The version of Cloud Hypervisor's API that is served.
const API_VERSION: &str = "54.0.0";

/// Virtual Machine Monitor information.
#[derive(Debug, Serialize, Deserialize, JsonSchema)]
pub(super) struct VmmPingResponse {
    /// What is running.
    build_version: String,
    /// Version of Cloud Hypervisor whose API is served.
    version: String,
    /// Process identifier.
    pid: i64,
    /// Accelerators that were built in.
    features: Vec<String>,
}

impl Call {
    fn read<T: DeserializeOwned>(&self) -> Result<T, HttpError> {
        parse_json(&self.body).map_err(unreadable)
    }

    fn refuse(&self, error: &ControlError) -> HttpError {
        let status = StatusCode::from_u16(error.kind().http_status());
        let mut chain = vec!["Error from API".to_owned(), self.route.failure.to_owned()];
        chain.extend(error.chain());
        // Where the manager says what failed in the same words, once is enough.
        chain.dedup();
        HttpError::new(status.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR), chain)
    }

    async fn perform<O: Operation>(&self, operation: O) -> Result<O::Reply, HttpError> {
        call(&self.handle, operation).await.map_err(|error| self.refuse(&error))
    }

    async fn done<O: Operation<Reply = ()>>(self, operation: O) -> Result<Answer, HttpError> {
        self.perform(operation).await.map(|()| Answer::NoContent)
    }

    async fn report<O: Operation<Reply: Serialize>>(self, operation: O) -> Result<Answer, HttpError> {
        json(&self.perform(operation).await?)
    }
}

fn unreadable(error: ConfigError) -> HttpError {
    let error = ControlError::caused(ErrorKind::Invalid, "Failed to deserialize JSON", error);
    HttpError::new(StatusCode::BAD_REQUEST, error.chain())
}

fn json<T: Serialize>(value: &T) -> Result<Answer, HttpError> {
    let text = serde_json::to_string(value);
    text.map(Answer::Json).map_err(|error| {
        let chain = vec!["Internal Server Error".to_owned(), error.to_string()];
        HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, chain)
    })
}

pub(super) async fn ping(_: Call) -> Result<Answer, HttpError> {
    json(&VmmPingResponse {
        build_version: concat!("holdfast v", env!("CARGO_PKG_VERSION")).to_owned(),
        version: API_VERSION.to_owned(),
        pid: std::process::id().into(),
        features: vec!["kvm".to_owned(), "tcg".to_owned()],
    })
}

pub(super) async fn vmm_shutdown(call: Call) -> Result<Answer, HttpError> {
    call.perform(ops::VmmShutdown(Origin::HostQuit)).await.map(|()| Answer::Empty)
}

pub(super) async fn info(call: Call) -> Result<Answer, HttpError> {
    call.report(ops::Info).await
}

pub(super) async fn counters(call: Call) -> Result<Answer, HttpError> {
    call.report(ops::GetCounters).await
}

pub(super) async fn create(call: Call) -> Result<Answer, HttpError> {
    let config = match VmConfig::from_json(&call.body) {
        Ok(config) => config,
        Err(error @ (ConfigError::NotJson { .. } | ConfigError::Syntax { .. })) => {
            return Err(unreadable(error));
        }
        Err(error) => return Err(call.refuse(&error.into())),
    };
    let mut config = Box::new(config);
    config.machine.expect_hot_plug();
    call.done(ops::Create(config)).await
}

pub(super) async fn delete(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Delete).await
}

pub(super) async fn boot(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Boot).await
}

pub(super) async fn pause(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Pause).await
}

pub(super) async fn resume(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Resume).await
}

pub(super) async fn shutdown(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Shutdown).await
}

pub(super) async fn reboot(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Reboot).await
}

pub(super) async fn power_button(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::PowerButton).await
}

pub(super) async fn nmi(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::Nmi).await
}

pub(super) async fn resize(call: Call) -> Result<Answer, HttpError> {
    let resize = call.read()?;
    call.done(ops::Resize(resize)).await
}

pub(super) async fn add_disk(call: Call) -> Result<Answer, HttpError> {
    let disk = call.read()?;
    match call.perform(ops::AddDisk(disk)).await? {
        Some(device) => json(&device),
        None => Ok(Answer::NoContent),
    }
}

pub(super) async fn add_net(mut call: Call) -> Result<Answer, HttpError> {
    let mut net: NetConfig = call.read()?;
    // Numbers in the body are the sender's own; only what came with the message counts.
    net.fds = None;
    let fds = std::mem::take(&mut call.fds);
    if !fds.is_empty() && fds.len() != usize::from(net.queue_pairs()) {
        let (came, pairs) = (fds.len(), net.queue_pairs());
        let reason = format!("{came} file descriptors came for {pairs} queue pairs (num_queues / 2)");
        return Err(call.refuse(&ControlError::new(ErrorKind::Invalid, reason)));
    }
    match call.perform(ops::AddNet(net, fds)).await? {
        Some(device) => json(&device),
        None => Ok(Answer::NoContent),
    }
}

pub(super) async fn add_fs(call: Call) -> Result<Answer, HttpError> {
    let fs = call.read()?;
    match call.perform(ops::AddFs(fs)).await? {
        Some(device) => json(&device),
        None => Ok(Answer::NoContent),
    }
}

pub(super) async fn add_generic_vhost_user(call: Call) -> Result<Answer, HttpError> {
    let device = call.read()?;
    match call.perform(ops::AddGenericVhostUser(device)).await? {
        Some(device) => json(&device),
        None => Ok(Answer::NoContent),
    }
}

pub(super) async fn add_vsock(call: Call) -> Result<Answer, HttpError> {
    let vsock = call.read()?;
    match call.perform(ops::AddVsock(vsock)).await? {
        Some(device) => json(&device),
        None => Ok(Answer::NoContent),
    }
}

pub(super) async fn remove_device(call: Call) -> Result<Answer, HttpError> {
    let device = call.read()?;
    call.done(ops::RemoveDevice(device)).await
}

pub(super) async fn snapshot(call: Call) -> Result<Answer, HttpError> {
    let snapshot = call.read()?;
    call.done(ops::Snapshot(snapshot)).await
}

pub(super) async fn restore(mut call: Call) -> Result<Answer, HttpError> {
    let restore: RestoreConfig = call.read()?;
    let fds = std::mem::take(&mut call.fds);
    let nets = restore.net_fds.iter().flatten();
    let expected = nets.fold(0_usize, |sum, net| sum.saturating_add(net.num_fds));
    if expected != fds.len() {
        let reason = format!("net_fds speaks of {expected} file descriptors, and {} came", fds.len());
        return Err(call.refuse(&ControlError::new(ErrorKind::Invalid, reason)));
    }
    call.done(ops::Restore(restore, fds)).await
}

pub(super) async fn send_migration(call: Call) -> Result<Answer, HttpError> {
    let data = call.read()?;
    call.done(ops::SendMigration(data)).await
}

pub(super) async fn receive_migration(call: Call) -> Result<Answer, HttpError> {
    let data = call.read()?;
    call.done(ops::ReceiveMigration(data)).await
}

pub(super) async fn migration_progress(call: Call) -> Result<Answer, HttpError> {
    call.report(ops::QueryMigrate).await
}

pub(super) async fn cancel_migration(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::MigrateCancel).await
}

pub(super) async fn pause_migration(call: Call) -> Result<Answer, HttpError> {
    call.done(ops::MigratePause).await
}

pub(super) async fn recover_migration(call: Call) -> Result<Answer, HttpError> {
    match call.read()? {
        RecoverMigrationData { receiver_url: Some(url), destination_url: None } => {
            call.done(ops::MigrateRecover(url)).await
        }
        RecoverMigrationData { receiver_url: None, destination_url: Some(url) } => {
            call.done(ops::Migrate(url, true, false)).await
        }
        _ => {
            let reason = "`receiver_url` at the destination or `destination_url` at the source is needed";
            Err(call.refuse(&ControlError::new(ErrorKind::Invalid, reason)))
        }
    }
}

pub(super) async fn unsupported(call: Call) -> Result<Answer, HttpError> {
    let error = ControlError::unsupported(call.route.name);
    let chain = std::iter::once("Error from API".to_owned()).chain(error.chain()).collect();
    Err(HttpError::new(StatusCode::INTERNAL_SERVER_ERROR, chain))
}
