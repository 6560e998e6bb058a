//! Requests, replies and errors on the wire.

use holdfast_vmm::control::ControlError;
use serde_json::{Map, Value, json};

/// An error reply.
#[derive(Debug)]
pub(crate) struct QmpError {
    class: &'static str,
    description: String,
}

impl QmpError {
    pub(crate) fn generic(description: impl Into<String>) -> Self {
        Self { class: "GenericError", description: description.into() }
    }

    pub(crate) fn not_found(description: String) -> Self {
        Self { class: "CommandNotFound", description }
    }

    /// The message, with the request's `id`.
    pub(crate) fn message(self, id: Option<Value>) -> Value {
        with_id(json!({ "error": { "class": self.class, "desc": self.description } }), id)
    }
}

impl From<ControlError> for QmpError {
    fn from(error: ControlError) -> Self {
        Self { class: error.kind().qmp_class(), description: error.describe() }
    }
}

/// The message that carries `value`.
pub(crate) fn reply(value: Value, id: Option<Value>) -> Value {
    let message = Map::from_iter([("return".to_owned(), value)]);
    with_id(Value::Object(message), id)
}

fn with_id(mut message: Value, id: Option<Value>) -> Value {
    if let (Some(object), Some(id)) = (message.as_object_mut(), id) {
        object.insert("id".to_owned(), id);
    }
    message
}

/// A command to run.
#[derive(Debug)]
pub(crate) struct Request {
    pub(crate) command: String,
    pub(crate) arguments: Map<String, Value>,
    pub(crate) id: Option<Value>,
    /// It came as `exec-oob`: it does not wait for requests before it.
    pub(crate) oob: bool,
}

impl Request {
    /// Reads a request; an error comes with the `id` if there was one. `oob`: the client has enabled out-of-band
    /// execution.
    pub(crate) fn parse(text: &[u8], oob: bool) -> Result<Self, (Option<Value>, QmpError)> {
        let value: Value = serde_json::from_slice(text)
            .map_err(|error| (None, QmpError::generic(format!("JSON parse error, {error}"))))?;
        let Value::Object(mut object) = value else {
            return Err((None, QmpError::generic("QMP input must be a JSON object")));
        };
        let id = object.remove("id");
        Self::from_members(object, oob).map(|request| Self { id: id.clone(), ..request }).map_err(|e| (id, e))
    }

    fn from_members(mut object: Map<String, Value>, oob: bool) -> Result<Self, QmpError> {
        let in_band = object.remove("execute");
        let out_of_band = if oob { object.remove("exec-oob") } else { None };
        let (command, oob) = match (in_band, out_of_band) {
            (Some(_), Some(_)) => {
                return Err(QmpError::generic("QMP input member 'exec-oob' clashes with 'execute'"));
            }
            (Some(Value::String(command)), None) => (command, false),
            (None, Some(Value::String(command))) => (command, true),
            (Some(_), None) => return Err(QmpError::generic("QMP input member 'execute' must be a string")),
            (None, Some(_)) => return Err(QmpError::generic("QMP input member 'exec-oob' must be a string")),
            (None, None) if object.contains_key("exec-oob") => {
                return Err(QmpError::generic("QMP input member 'exec-oob' is unexpected"));
            }
            (None, None) => return Err(QmpError::generic("QMP input lacks member 'execute'")),
        };
        let arguments = match object.remove("arguments") {
            Some(Value::Object(arguments)) => arguments,
            Some(_) => return Err(QmpError::generic("QMP input member 'arguments' must be an object")),
            None => Map::new(),
        };
        match object.keys().next() {
            Some(member) => Err(QmpError::generic(format!("QMP input member '{member}' is unexpected"))),
            None => Ok(Self { command, arguments, id: None, oob }),
        }
    }
}

/// The capability of out-of-band execution.
pub(crate) const OOB: &str = "oob";

/// Checks the arguments of `qmp_capabilities`; whether out-of-band execution is enabled.
pub(crate) fn negotiate(arguments: &Map<String, Value>) -> Result<bool, QmpError> {
    if let Some(member) = arguments.keys().find(|member| *member != "enable") {
        return Err(QmpError::generic(format!("Parameter '{member}' is unexpected")));
    }
    match arguments.get("enable") {
        None => Ok(false),
        Some(Value::Array(capabilities)) => match capabilities.iter().find(|c| *c != OOB) {
            None => Ok(!capabilities.is_empty()),
            Some(capability) => {
                let name = capability.as_str().unwrap_or_default();
                Err(QmpError::generic(format!("Parameter 'enable' does not accept value '{name}'")))
            }
        },
        Some(_) => Err(QmpError::generic("Invalid parameter type for 'enable', expected: array")),
    }
}
