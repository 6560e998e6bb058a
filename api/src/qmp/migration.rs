//! QMP's migration commands.

use holdfast_vmm::control::{
    self as ops, AnnounceParameters, ControlHandle, MigrationCapabilityStatus, MigrationInfo,
    MigrationParameters,
};
use schemars::JsonSchema;
use serde::Deserialize;
use serde_json::Value;

use super::commands::{Empty, Reply};
use super::request::QmpError;
use crate::call;

/// Arguments of `migrate`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Migrate {
    /// `tcp:HOST:PORT`, `unix:PATH`, `fd:N`.
    #[serde(default)]
    uri: Option<String>,
    /// Not there.
    #[serde(default)]
    channels: Option<Value>,
    /// Nothing: it never waits.
    #[serde(default)]
    detach: Option<bool>,
    /// The contents of writable disks go along: the destination has other storage.
    #[serde(default)]
    blk: Option<bool>,
    /// Go on with a post-copy migration whose connection was lost.
    #[serde(default)]
    resume: Option<bool>,
}

/// Arguments of `migrate-incoming`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Incoming {
    /// Where to listen.
    #[serde(default)]
    uri: Option<String>,
    /// Not there.
    #[serde(default)]
    channels: Option<Value>,
    /// The process ends if no VM comes; so it does unless this is false.
    #[serde(default)]
    exit_on_error: Option<bool>,
}

/// Arguments of `migrate-recover`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Recover {
    /// Where to listen.
    uri: String,
}

/// Arguments of `migrate-set-capabilities`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct SetCapabilities {
    /// What changes.
    capabilities: Vec<MigrationCapabilityStatus>,
}

/// Arguments of `migrate-continue`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Continue {
    /// `pre-switchover`.
    state: String,
}

fn address(uri: Option<String>, channels: Option<&Value>) -> Result<String, QmpError> {
    if channels.is_some() {
        let text = "Parameter 'channels' is not supported by this version; give 'uri'";
        return Err(QmpError::generic(text.to_owned()));
    }
    uri.ok_or_else(|| QmpError::generic("Parameter 'uri' is missing".to_owned()))
}

pub(super) async fn migrate(handle: ControlHandle, arguments: Migrate) -> Reply<Empty> {
    // As QEMU documents it: it has no meaning in this protocol.
    let _ = arguments.detach;
    let uri = address(arguments.uri, arguments.channels.as_ref())?;
    call(&handle, ops::Migrate(uri, arguments.resume.unwrap_or(false), arguments.blk.unwrap_or(false)))
        .await?;
    Ok(Empty {})
}

pub(super) async fn incoming(handle: ControlHandle, arguments: Incoming) -> Reply<Empty> {
    let uri = address(arguments.uri, arguments.channels.as_ref())?;
    call(&handle, ops::MigrateIncoming(Some(uri), arguments.exit_on_error.unwrap_or(true))).await?;
    Ok(Empty {})
}

pub(super) async fn cancel(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::MigrateCancel).await?;
    Ok(Empty {})
}

pub(super) async fn pause(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::MigratePause).await?;
    Ok(Empty {})
}

pub(super) async fn recover(handle: ControlHandle, arguments: Recover) -> Reply<Empty> {
    call(&handle, ops::MigrateRecover(arguments.uri)).await?;
    Ok(Empty {})
}

pub(super) async fn start_postcopy(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    call(&handle, ops::MigrateStartPostcopy).await?;
    Ok(Empty {})
}

pub(super) async fn go_on(handle: ControlHandle, arguments: Continue) -> Reply<Empty> {
    call(&handle, ops::MigrateContinue(arguments.state)).await?;
    Ok(Empty {})
}

pub(super) async fn announce(handle: ControlHandle, how: AnnounceParameters) -> Reply<Empty> {
    call(&handle, ops::AnnounceSelf(how)).await?;
    Ok(Empty {})
}

pub(super) async fn query(handle: ControlHandle, _: Empty) -> Reply<MigrationInfo> {
    Ok(call(&handle, ops::QueryMigrate).await?)
}

pub(super) async fn query_parameters(handle: ControlHandle, _: Empty) -> Reply<MigrationParameters> {
    Ok(call(&handle, ops::QueryMigrateParameters).await?)
}

pub(super) async fn set_parameters(handle: ControlHandle, new: MigrationParameters) -> Reply<Empty> {
    call(&handle, ops::MigrateSetParameters(new)).await?;
    Ok(Empty {})
}

pub(super) async fn query_capabilities(
    handle: ControlHandle,
    _: Empty,
) -> Reply<Vec<MigrationCapabilityStatus>> {
    Ok(call(&handle, ops::QueryMigrateCapabilities).await?)
}

pub(super) async fn set_capabilities(handle: ControlHandle, new: SetCapabilities) -> Reply<Empty> {
    call(&handle, ops::MigrateSetCapabilities(new.capabilities)).await?;
    Ok(Empty {})
}
