//! Objects that other options name: secrets, TLS credentials, lists of who may connect, and throttle groups, as `--object secret,id=…` and
//! `object-add` make them; and which helpers' state moves with the VM.
//!
//! What is secret is overwritten when it is let go, and no `Debug`, error or log shows it.

pub mod authz;
mod keys;
pub mod pairs;
mod secret;
pub mod throttle;
pub mod tls;
pub mod vmstate;

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;
use serde_json::{Map, Value};

pub use authz::Authz;
pub use secret::Secret;
pub use throttle::ThrottleGroup;
pub use tls::TlsCreds;
pub use vmstate::DbusVmState;

/// An object that cannot be made, or is not there.
#[derive(Debug, thiserror::Error)]
pub enum ObjectError {
    /// The options are not right.
    #[error("{0}")]
    Option(String),
    /// A file that it names cannot be read.
    #[error("Unable to read {path}: {source}")]
    Read {
        /// The file.
        path: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
}

pub(crate) fn bad(text: impl Into<String>) -> ObjectError {
    ObjectError::Option(text.into())
}

/// The objects of a program, by their ids.
#[derive(Debug, Default)]
pub struct Objects {
    secrets: RwLock<BTreeMap<String, Arc<Secret>>>,
    tls: RwLock<BTreeMap<String, TlsCreds>>,
    throttles: RwLock<BTreeMap<String, Arc<ThrottleGroup>>>,
    authz: RwLock<BTreeMap<String, Arc<Authz>>>,
    /// There is one at most.
    vmstate: RwLock<Option<Arc<DbusVmState>>>,
    /// They are a VM's.
    of_vm: bool,
}

/// An object's options, each taken once; what is left over is refused.
pub(crate) struct Fields(Map<String, Value>);

impl Fields {
    /// The text of an option.
    pub(crate) fn text(&mut self, key: &str) -> Result<Option<String>, ObjectError> {
        match self.0.remove(key) {
            None => Ok(None),
            Some(Value::String(text)) => Ok(Some(text)),
            Some(_) => Err(bad(format!("Invalid parameter type for '{key}', expected: string"))),
        }
    }

    /// An option, whatever it is.
    pub(crate) fn take(&mut self, key: &str) -> Option<Value> {
        self.0.remove(key)
    }

    /// The options whose names start so.
    pub(crate) fn keys(&self, start: &str) -> Vec<String> {
        self.0.keys().filter(|k| k.starts_with(start)).cloned().collect()
    }

    /// Makes `GROUP.KEY` of the keys of a group that is an object.
    fn flatten(&mut self, group: &str) {
        if let Some(Value::Object(map)) = self.0.remove(group) {
            self.0.extend(map.into_iter().map(|(key, value)| (format!("{group}.{key}"), value)));
        }
    }

    /// The number of an option.
    pub(crate) fn number(&mut self, key: &str) -> Result<Option<u64>, ObjectError> {
        let wrong = || bad(format!("Parameter '{key}' expects a number"));
        match self.0.remove(key) {
            None => Ok(None),
            Some(Value::Number(n)) => n.as_u64().map(Some).ok_or_else(wrong),
            Some(Value::String(text)) => text.parse().map(Some).map_err(|_| wrong()),
            Some(_) => Err(wrong()),
        }
    }

    /// The flag of an option.
    pub(crate) fn flag(&mut self, key: &str) -> Result<Option<bool>, ObjectError> {
        match self.0.remove(key) {
            None => Ok(None),
            Some(Value::Bool(on)) => Ok(Some(on)),
            Some(Value::String(text)) => match text.as_str() {
                "on" | "yes" | "true" | "y" => Ok(Some(true)),
                "off" | "no" | "false" | "n" => Ok(Some(false)),
                _ => Err(bad(format!("Parameter '{key}' expects 'on' or 'off'"))),
            },
            Some(_) => Err(bad(format!("Invalid parameter type for '{key}', expected: boolean"))),
        }
    }

    fn finish(self, kind: &str) -> Result<(), ObjectError> {
        match self.0.keys().next() {
            Some(key) => Err(bad(format!("Object '{kind}' does not support the option '{key}'"))),
            None => Ok(()),
        }
    }
}

impl Objects {
    /// The objects of a program that runs a VM.
    pub fn for_vm() -> Self {
        Self { of_vm: true, ..Self::default() }
    }

    /// Makes an object of `TYPE,id=ID,key=value,…` or a JSON object with `qom-type` and `id`.
    ///
    /// # Errors
    /// [`ObjectError`] that names the option; never with a secret in it.
    pub fn add_text(&self, text: &str) -> Result<(), ObjectError> {
        if text.starts_with('{') {
            let value = serde_json::from_str(text);
            // The parser's message may quote the text.
            return match value {
                Ok(Value::Object(map)) => self.add(map),
                _ => Err(bad("the object's options are not a JSON object")),
            };
        }
        let mut map = Map::new();
        for (n, (key, value)) in pairs::split_pairs(text).into_iter().enumerate() {
            let (key, value) = match (n, value) {
                (0, None) => ("qom-type".to_owned(), key),
                (_, Some(value)) => (key, value),
                (_, None) => return Err(bad(format!("Expected '=' after parameter '{key}'"))),
            };
            if map.insert(key.clone(), Value::String(value)).is_some() {
                return Err(bad(format!("option '{key}' is given twice")));
            }
        }
        self.add(map)
    }

    /// Makes an object of options with `qom-type` and `id`.
    ///
    /// # Errors
    /// As [`Objects::add_text`].
    pub fn add(&self, map: Map<String, Value>) -> Result<(), ObjectError> {
        let mut fields = Fields(map);
        let kind = fields.text("qom-type")?.ok_or_else(|| bad("Parameter 'qom-type' is missing"))?;
        let id = fields.text("id")?.ok_or_else(|| bad("Parameter 'id' is missing"))?;
        let well_formed = id.starts_with(|c: char| c.is_ascii_alphabetic())
            && id.chars().all(|c| c.is_ascii_alphanumeric() || "-._".contains(c));
        if !well_formed {
            return Err(bad("Parameter 'id' expects an identifier"));
        }
        if self.contains(&id) {
            return Err(bad(format!(
                "attempt to add duplicate property '{id}' to object (type 'container')"
            )));
        }
        match kind.as_str() {
            "secret" => {
                let secret = Secret::from_fields(&mut fields, self)?;
                fields.finish(&kind)?;
                self.secrets.write().insert(id, Arc::new(secret));
                Ok(())
            }
            "tls-creds-x509" => {
                let creds = TlsCreds::from_fields(&mut fields, self)?;
                fields.finish(&kind)?;
                self.tls.write().insert(id, creds);
                Ok(())
            }
            "throttle-group" => {
                fields.flatten("limits");
                let limits = throttle::Limits::from_fields(&mut fields)?;
                fields.finish(&kind)?;
                self.throttles.write().insert(id, ThrottleGroup::new(limits));
                Ok(())
            }
            "authz-simple" | "authz-list" | "authz-list-file" => {
                let authz = match kind.as_str() {
                    "authz-simple" => Authz::simple(&mut fields),
                    "authz-list" => Authz::list(&mut fields),
                    _ => Authz::file(&mut fields),
                }?;
                fields.finish(&kind)?;
                self.authz.write().insert(id, Arc::new(authz));
                Ok(())
            }
            "dbus-vmstate" => {
                let vmstate = DbusVmState::from_fields(&id, &mut fields)?;
                fields.finish(&kind)?;
                self.set_vmstate(vmstate)
            }
            "tls-creds-psk" | "tls-creds-anon" => Err(bad(format!(
                "objects of the type '{kind}' are not supported: rustls has TLS with certificates only; use tls-creds-x509"
            ))),
            "authz-pam" => Err(bad("objects of the type 'authz-pam' are not supported: use authz-list-file")),
            _ => Err(bad(format!(
                "Invalid parameter '{kind}': objects are of the types 'secret', 'tls-creds-x509', 'throttle-group', 'authz-simple', 'authz-list', 'authz-list-file' and 'dbus-vmstate'"
            ))),
        }
    }

    fn set_vmstate(&self, vmstate: DbusVmState) -> Result<(), ObjectError> {
        if !self.of_vm {
            return Err(bad(
                "an object of the type 'dbus-vmstate' is for a VM that moves, and there is no VM here",
            ));
        }
        let mut place = self.vmstate.write();
        if place.is_some() {
            return Err(bad("There is already an instance of dbus-vmstate"));
        }
        *place = Some(Arc::new(vmstate));
        Ok(())
    }

    fn contains(&self, id: &str) -> bool {
        self.secrets.read().contains_key(id)
            || self.tls.read().contains_key(id)
            || self.throttles.read().contains_key(id)
            || self.authz.read().contains_key(id)
            || self.vmstate.read().as_ref().is_some_and(|vmstate| vmstate.id == id)
    }

    /// Lets an object go. Who uses it already keeps it.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if there is none.
    pub fn remove(&self, id: &str) -> Result<(), ObjectError> {
        let secret = self.secrets.write().remove(id).map(drop);
        let gone = secret.or_else(|| self.tls.write().remove(id).map(drop));
        let gone = gone.or_else(|| self.throttles.write().remove(id).map(drop));
        let gone = gone.or_else(|| self.authz.write().remove(id).map(drop));
        let gone = gone.or_else(|| self.vmstate.write().take_if(|vmstate| vmstate.id == id).map(drop));
        gone.ok_or_else(|| bad(format!("object '{id}' not found")))
    }

    /// Ids and types of all objects.
    pub fn list(&self) -> Vec<(String, &'static str)> {
        let mut all: Vec<_> = self.secrets.read().keys().map(|id| (id.clone(), "secret")).collect();
        all.extend(self.tls.read().keys().map(|id| (id.clone(), "tls-creds-x509")));
        all.extend(self.throttles.read().keys().map(|id| (id.clone(), "throttle-group")));
        all.extend(self.authz.read().iter().map(|(id, authz)| (id.clone(), authz.kind())));
        all.extend(self.vmstate.read().iter().map(|vmstate| (vmstate.id.clone(), "dbus-vmstate")));
        all
    }

    /// The throttle group of that id.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if there is none.
    pub fn throttle(&self, id: &str) -> Result<Arc<ThrottleGroup>, ObjectError> {
        let found = self.throttles.read().get(id).cloned();
        found.ok_or_else(|| bad(format!("Throttle group '{id}' does not exist")))
    }

    /// Which helpers' state moves with the VM, if any does.
    pub fn dbus_vmstate(&self) -> Option<Arc<DbusVmState>> {
        self.vmstate.read().clone()
    }

    /// Who may connect, by that id.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if there is none.
    pub fn authz(&self, id: &str) -> Result<Arc<Authz>, ObjectError> {
        let found = self.authz.read().get(id).cloned();
        found.ok_or_else(|| bad(format!("No authorization object with id '{id}'")))
    }

    /// The TLS credentials of that id.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if there are none.
    pub fn tls(&self, id: &str) -> Result<TlsCreds, ObjectError> {
        let found = self.tls.read().get(id).cloned();
        found.ok_or_else(|| bad(format!("No TLS credentials with id '{id}'")))
    }

    /// The secret of that id.
    ///
    /// # Errors
    /// [`ObjectError::Option`] if there is none.
    pub fn secret(&self, id: &str) -> Result<Arc<Secret>, ObjectError> {
        let found = self.secrets.read().get(id).cloned();
        found.ok_or_else(|| bad(format!("No secret with id '{id}'")))
    }

    /// The secret of that id as a password.
    ///
    /// # Errors
    /// As [`Objects::secret`], and if it is not UTF-8.
    pub fn password(&self, id: &str) -> Result<Arc<Secret>, ObjectError> {
        let secret = self.secret(id)?;
        if std::str::from_utf8(secret.bytes()).is_err() {
            return Err(bad(format!("Data from secret {id} is not valid UTF-8")));
        }
        Ok(secret)
    }
}
