//! Commands of block jobs.

use holdfast_vmm::control::{self as ops, ControlHandle};
use holdfast_vmm::storage::StorageRequest;
use holdfast_vmm::storage::jobs::mirror::MirrorOptions;
use holdfast_vmm::storage::jobs::{BlockJobInfo, JobInfo, JobVerb};
use schemars::JsonSchema;
use serde::Deserialize;

use super::block::{Id, Shown, show};
use super::commands::{Empty, Reply};
use crate::call;

/// Arguments of commands that take a block job, which they call a device.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Device {
    device: String,
}

/// Arguments of `block-job-cancel`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Cancel {
    device: String,
    #[serde(default)]
    force: Option<bool>,
}

/// Arguments of `block-job-set-speed`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct SetSpeed {
    device: String,
    speed: i64,
}

async fn tell(handle: &ControlHandle, request: StorageRequest) -> Reply<Empty> {
    call(handle, ops::Storage(request)).await?;
    Ok(Empty {})
}

async fn job(handle: &ControlHandle, id: String, verb: JobVerb) -> Reply<Empty> {
    tell(handle, StorageRequest::Job(id, verb, false)).await
}

async fn block_job(handle: &ControlHandle, id: String, verb: JobVerb) -> Reply<Empty> {
    tell(handle, StorageRequest::Job(id, verb, true)).await
}

pub(super) async fn mirror(handle: ControlHandle, options: MirrorOptions) -> Reply<Empty> {
    tell(&handle, StorageRequest::Mirror(Box::new(options))).await
}

pub(super) async fn query(handle: ControlHandle, _: Empty) -> Reply<Shown<Vec<JobInfo>>> {
    show(&handle, StorageRequest::Jobs).await
}

pub(super) async fn query_block(handle: ControlHandle, _: Empty) -> Reply<Shown<Vec<BlockJobInfo>>> {
    show(&handle, StorageRequest::BlockJobs).await
}

// QEMU's generic command always means it.
pub(super) async fn cancel(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Cancel { force: true }).await
}

pub(super) async fn pause(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Pause).await
}

pub(super) async fn resume(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Resume).await
}

pub(super) async fn complete(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Complete).await
}

pub(super) async fn finalize(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Finalize).await
}

pub(super) async fn dismiss(handle: ControlHandle, of: Id) -> Reply<Empty> {
    job(&handle, of.id, JobVerb::Dismiss).await
}

pub(super) async fn block_cancel(handle: ControlHandle, of: Cancel) -> Reply<Empty> {
    block_job(&handle, of.device, JobVerb::Cancel { force: of.force.unwrap_or(false) }).await
}

pub(super) async fn block_pause(handle: ControlHandle, of: Device) -> Reply<Empty> {
    block_job(&handle, of.device, JobVerb::Pause).await
}

pub(super) async fn block_resume(handle: ControlHandle, of: Device) -> Reply<Empty> {
    block_job(&handle, of.device, JobVerb::Resume).await
}

pub(super) async fn block_set_speed(handle: ControlHandle, of: SetSpeed) -> Reply<Empty> {
    block_job(&handle, of.device, JobVerb::SetSpeed(of.speed)).await
}

pub(super) async fn block_complete(handle: ControlHandle, of: Device) -> Reply<Empty> {
    block_job(&handle, of.device, JobVerb::Complete).await
}

pub(super) async fn block_finalize(handle: ControlHandle, of: Id) -> Reply<Empty> {
    block_job(&handle, of.id, JobVerb::Finalize).await
}

pub(super) async fn block_dismiss(handle: ControlHandle, of: Id) -> Reply<Empty> {
    block_job(&handle, of.id, JobVerb::Dismiss).await
}
