//! Commands of the storage graph.

use std::borrow::Cow;
use std::marker::PhantomData;

use holdfast_config::BlockdevOptions;
use holdfast_vmm::control::{self as ops, ControlHandle};
use holdfast_vmm::storage::shown::{BlockDeviceInfo, BlockExportInfo, BlockInfo, BlockStats};
use holdfast_vmm::storage::{
    BlockIoThrottle, ExportOptions, HistogramSet, NodeOrDevice, ServerOptions, StorageRequest,
};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::commands::Empty;
use super::request::QmpError;
use crate::call;

type Reply<T> = Result<T, QmpError>;

async fn ask(handle: &ControlHandle, request: StorageRequest) -> Reply<Value> {
    Ok(call(handle, ops::Storage(request)).await?)
}

async fn tell(handle: &ControlHandle, request: StorageRequest) -> Reply<Empty> {
    ask(handle, request).await.map(|_| Empty {})
}

/// Any JSON.
#[derive(Debug, Serialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct Any(Value);

/// What the graph shows of itself: the JSON of a `T`.
#[derive(Debug, Serialize)]
#[serde(transparent)]
pub(super) struct Shown<T> {
    json: Value,
    #[serde(skip)]
    of: PhantomData<T>,
}

impl<T: JsonSchema> JsonSchema for Shown<T> {
    fn inline_schema() -> bool {
        T::inline_schema()
    }

    fn schema_name() -> Cow<'static, str> {
        T::schema_name()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        T::json_schema(generator)
    }
}

pub(super) async fn show<T>(handle: &ControlHandle, request: StorageRequest) -> Reply<Shown<T>> {
    ask(handle, request).await.map(|json| Shown { json, of: PhantomData })
}

/// A node's options: which there are depends on `driver`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct Options(pub(super) BlockdevOptions);

/// Arguments of `blockdev-del`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct NodeName {
    node_name: String,
}

/// Arguments of `blockdev-reopen`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Reopen {
    options: Vec<BlockdevOptions>,
}

/// Arguments of `query-named-block-nodes`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Flat {
    /// Leave backing images out of images.
    #[serde(default)]
    flat: Option<bool>,
}

/// Arguments of `query-blockstats`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Stats {
    /// Nodes rather than disks.
    #[serde(default)]
    query_nodes: Option<bool>,
}

/// Arguments of `block_resize`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Resize {
    #[serde(default)]
    device: Option<String>,
    #[serde(default)]
    node_name: Option<String>,
    size: i64,
}

/// Arguments of `block-set-write-threshold`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(rename_all = "kebab-case")]
pub(super) struct Threshold {
    node_name: String,
    write_threshold: u64,
}

/// Arguments of `object-add`: which others there are depends on `qom-type`.
#[derive(Debug, Deserialize, JsonSchema)]
#[serde(transparent)]
pub(super) struct Object(pub(super) Map<String, Value>);

/// Arguments of commands that take an id.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct Id {
    pub(super) id: String,
}

/// Arguments of `qom-get`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct QomGet {
    path: String,
    property: String,
}

/// Arguments of `qom-set`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct QomSet {
    path: String,
    property: String,
    value: Map<String, Value>,
}

/// What becomes of an export that has clients.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub(super) enum RemoveMode {
    /// It stays, and that is an error.
    Safe,
    /// They are sent away.
    Hard,
}

/// Arguments of `block-export-del`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ExportDel {
    id: String,
    #[serde(default)]
    mode: Option<RemoveMode>,
}

/// Arguments of `nbd-server-add`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ServerAdd {
    /// Name of the node.
    device: String,
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    description: Option<String>,
    #[serde(default)]
    writable: Option<bool>,
    #[serde(default)]
    bitmap: Option<String>,
}

/// Arguments of `nbd-server-remove`.
#[derive(Debug, Deserialize, JsonSchema)]
pub(super) struct ServerRemove {
    name: String,
    #[serde(default)]
    mode: Option<RemoveMode>,
}

pub(super) async fn blockdev_add(handle: ControlHandle, options: Options) -> Reply<Empty> {
    tell(&handle, StorageRequest::Add(Box::new(options.0))).await
}

pub(super) async fn blockdev_del(handle: ControlHandle, arguments: NodeName) -> Reply<Empty> {
    tell(&handle, StorageRequest::Delete(arguments.node_name)).await
}

pub(super) async fn blockdev_reopen(handle: ControlHandle, arguments: Reopen) -> Reply<Empty> {
    tell(&handle, StorageRequest::Reopen(arguments.options)).await
}

pub(super) async fn named_nodes(
    handle: ControlHandle,
    arguments: Flat,
) -> Reply<Shown<Vec<BlockDeviceInfo>>> {
    show(&handle, StorageRequest::Nodes(arguments.flat.unwrap_or(false))).await
}

pub(super) async fn query_block(handle: ControlHandle, _: Empty) -> Reply<Shown<Vec<BlockInfo>>> {
    show(&handle, StorageRequest::Block).await
}

pub(super) async fn query_blockstats(
    handle: ControlHandle,
    arguments: Stats,
) -> Reply<Shown<Vec<BlockStats>>> {
    show(&handle, StorageRequest::Stats(arguments.query_nodes.unwrap_or(false))).await
}

pub(super) async fn set_throttle(handle: ControlHandle, arguments: BlockIoThrottle) -> Reply<Empty> {
    tell(&handle, StorageRequest::Throttle(Box::new(arguments))).await
}

pub(super) async fn set_histogram(handle: ControlHandle, arguments: HistogramSet) -> Reply<Empty> {
    tell(&handle, StorageRequest::Histogram(arguments)).await
}

pub(super) async fn block_resize(handle: ControlHandle, arguments: Resize) -> Reply<Empty> {
    let size = u64::try_from(arguments.size)
        .map_err(|_| QmpError::generic("Parameter 'size' expects a positive number"))?;
    let which = NodeOrDevice { device: arguments.device, node_name: arguments.node_name };
    tell(&handle, StorageRequest::Resize(which, size)).await
}

pub(super) async fn set_threshold(handle: ControlHandle, arguments: Threshold) -> Reply<Empty> {
    tell(&handle, StorageRequest::Threshold(arguments.node_name, arguments.write_threshold)).await
}

pub(super) async fn object_add(handle: ControlHandle, arguments: Object) -> Reply<Empty> {
    tell(&handle, StorageRequest::ObjectAdd(arguments.0)).await
}

pub(super) async fn object_del(handle: ControlHandle, arguments: Id) -> Reply<Empty> {
    tell(&handle, StorageRequest::ObjectDelete(arguments.id)).await
}

/// The object of a path, whose only property is `limits`.
fn group(path: &str, property: &str) -> Reply<String> {
    if property != "limits" {
        return Err(QmpError::generic(format!("Property '{path}.{property}' not found")));
    }
    Ok(path.strip_prefix("/objects/").unwrap_or(path).to_owned())
}

pub(super) async fn qom_get(handle: ControlHandle, arguments: QomGet) -> Reply<Any> {
    let id = group(&arguments.path, &arguments.property)?;
    ask(&handle, StorageRequest::GetLimits(id)).await.map(Any)
}

pub(super) async fn qom_set(handle: ControlHandle, arguments: QomSet) -> Reply<Empty> {
    let id = group(&arguments.path, &arguments.property)?;
    tell(&handle, StorageRequest::SetLimits(id, arguments.value)).await
}

pub(super) async fn nbd_start(handle: ControlHandle, arguments: ServerOptions) -> Reply<Empty> {
    tell(&handle, StorageRequest::ServerStart(arguments)).await
}

pub(super) async fn nbd_stop(handle: ControlHandle, _: Empty) -> Reply<Empty> {
    tell(&handle, StorageRequest::ServerStop).await
}

pub(super) async fn nbd_add(handle: ControlHandle, arguments: ServerAdd) -> Reply<Empty> {
    let name = arguments.name.unwrap_or_else(|| arguments.device.clone());
    let options = ExportOptions {
        kind: "nbd".to_owned(),
        id: name.clone(),
        node_name: arguments.device,
        writable: arguments.writable,
        name: Some(name),
        description: arguments.description,
        bitmaps: arguments.bitmap.map(|b| vec![b]),
        ..ExportOptions::default()
    };
    tell(&handle, StorageRequest::ExportAdd(options)).await
}

pub(super) async fn nbd_remove(handle: ControlHandle, arguments: ServerRemove) -> Reply<Empty> {
    let hard = arguments.mode == Some(RemoveMode::Hard);
    tell(&handle, StorageRequest::ExportDelete(arguments.name, hard)).await
}

pub(super) async fn export_add(handle: ControlHandle, arguments: ExportOptions) -> Reply<Empty> {
    tell(&handle, StorageRequest::ExportAdd(arguments)).await
}

pub(super) async fn export_del(handle: ControlHandle, arguments: ExportDel) -> Reply<Empty> {
    let hard = arguments.mode == Some(RemoveMode::Hard);
    tell(&handle, StorageRequest::ExportDelete(arguments.id, hard)).await
}

pub(super) async fn query_exports(handle: ControlHandle, _: Empty) -> Reply<Shown<Vec<BlockExportInfo>>> {
    show(&handle, StorageRequest::Exports).await
}
