//! The state of helpers: processes beside the VM that own the name `org.qemu.VMState1` on a D-Bus bus, and whose state moves along with
//! the VM under their Ids (QEMU, docs/interop/dbus-vmstate.rst).
//!
//! At the source [`Helpers::save`] asks each for its state, at the destination [`Helpers::load`] hands each the state of the helper that has
//! the same Id, on a bus of its own. An [object](DbusVmState) says which bus it is, and which helpers.

mod bus;
mod message;

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::time::Duration;

use holdfast_objects::DbusVmState;
use holdfast_objects::vmstate::is_id;
use zbus::OwnedVariant;

use bus::Bus;
use message::Method;

/// Most bytes of a helper's state.
pub const MAX_STATE: usize = 1 << 20;
/// Most helpers of one VM.
pub const MAX_HELPERS: usize = 256;
/// How long a bus or a helper may take for an answer; while it saves, the guest stands.
const PATIENCE: Duration = Duration::from_secs(10);

/// The name that helpers queue for, and their interface.
const NAME: &str = "org.qemu.VMState1";
const PATH: &str = "/org/qemu/VMState1";
const PROPERTIES: &str = "org.freedesktop.DBus.Properties";
const NO_OWNER: &str = "org.freedesktop.DBus.Error.NameHasNoOwner";

/// A bus that does not give what was asked for, or somebody on it.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// There is nobody.
    #[error("nobody can be reached there")]
    Unreachable(#[source] io::Error),
    /// This user may not use it.
    #[error("it does not let this user in")]
    Rejected,
    /// The connection is gone.
    #[error("the connection to the bus broke")]
    Broken(#[source] io::Error),
    /// It takes too long.
    #[error("there was no answer within {0} seconds")]
    Late(u64),
    /// It does not keep to the protocol, or the interface.
    #[error("what it says makes no sense: {0}")]
    Protocol(String),
    /// It says too much.
    #[error("its answer has {0} bytes, more than are taken")]
    Long(usize),
    /// It says that it cannot.
    #[error("{text} ({name})")]
    Answer {
        /// The error's name.
        name: String,
        /// Its text.
        text: String,
    },
}

/// Helpers whose state cannot move.
#[derive(Debug, thiserror::Error)]
pub enum HelperError {
    /// The bus cannot be used.
    #[error("the D-Bus bus `{addr}` of the dbus-vmstate object `{object}` cannot be used")]
    Bus {
        /// Its address.
        addr: String,
        /// The object's id.
        object: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// An owner of the name does not say who it is.
    #[error("`{owner}`, an owner of {NAME} on the bus `{addr}`, does not tell its Id")]
    Nameless {
        /// Its name on the bus.
        owner: String,
        /// The address of the bus.
        addr: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// An Id that is none.
    #[error("`{owner}` on the bus `{addr}` has an Id that is not of 1 to 255 bytes without NUL")]
    Id {
        /// Its name on the bus.
        owner: String,
        /// The address of the bus.
        addr: String,
    },
    /// Nobody could tell whose state it is.
    #[error("two helpers on the bus `{addr}` have the Id `{id}`")]
    Twice {
        /// The Id.
        id: String,
        /// The address of the bus.
        addr: String,
    },
    /// Too many for one VM.
    #[error("{count} helpers on the bus `{addr}` are more than {MAX_HELPERS}")]
    Many {
        /// How many there are.
        count: usize,
        /// The address of the bus.
        addr: String,
    },
    /// Helpers that have to be there are not.
    #[error("helpers are missing on the bus `{addr}`: {ids}")]
    Missing {
        /// Their Ids.
        ids: String,
        /// The address of the bus.
        addr: String,
    },
    /// The list here does not know it.
    #[error("the helper `{id}` is not in the id-list of the dbus-vmstate object `{object}`")]
    Unlisted {
        /// The Id.
        id: String,
        /// The object's id.
        object: String,
    },
    /// State has come for which nothing here is meant.
    #[error("the state of helpers comes along ({ids}), and there is no dbus-vmstate object here")]
    NoObject {
        /// Their Ids.
        ids: String,
    },
    /// State has come that is nobody's.
    #[error("the state of helpers comes along under {0}")]
    Section(&'static str),
    /// A helper does not give its state.
    #[error("the helper `{id}` cannot save its state")]
    Save {
        /// Its Id.
        id: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// A helper does not take its state.
    #[error("the helper `{id}` cannot load its state")]
    Load {
        /// Its Id.
        id: String,
        /// Why.
        #[source]
        source: BusError,
    },
    /// More state than is taken.
    #[error("the state of the helper `{id}` has more than {MAX_STATE} bytes")]
    Large {
        /// Its Id.
        id: String,
    },
}

/// The helpers that are there, and a connection to their bus.
#[derive(Debug)]
pub struct Helpers {
    bus: Bus,
    addr: String,
    /// Names on the bus by Ids.
    owners: BTreeMap<String, String>,
}

impl Helpers {
    /// Looks for the helpers that `object` means.
    ///
    /// # Errors
    /// [`HelperError`]: if the bus cannot be reached, a helper of the object's list is missing, or two have one Id.
    pub fn find(object: &DbusVmState) -> Result<Self, HelperError> {
        Self::find_within(object, PATIENCE)
    }

    fn find_within(object: &DbusVmState, patience: Duration) -> Result<Self, HelperError> {
        let addr = || object.addr.clone();
        let unusable = |source| HelperError::Bus { addr: addr(), object: object.id.clone(), source };
        let mut bus = Bus::connect(&object.places, patience).map_err(unusable)?;
        let queued: Vec<String> = match bus.ask_bus("ListQueuedOwners", &NAME) {
            Ok(names) => names,
            Err(BusError::Answer { name, .. }) if name == NO_OWNER => Vec::new(),
            Err(source) => return Err(unusable(source)),
        };
        if queued.len() > MAX_HELPERS {
            return Err(HelperError::Many { count: queued.len(), addr: addr() });
        }
        let mut owners = BTreeMap::new();
        for owner in queued {
            let id = id_of(&mut bus, &owner).map_err(|source| HelperError::Nameless {
                owner: owner.clone(),
                addr: addr(),
                source,
            })?;
            if object.ids.as_ref().is_some_and(|wanted| !wanted.contains(&id)) {
                continue;
            }
            if !is_id(&id) {
                return Err(HelperError::Id { owner, addr: addr() });
            }
            if owners.insert(id.clone(), owner).is_some() {
                return Err(HelperError::Twice { id, addr: addr() });
            }
        }
        let found = Self { bus, addr: addr(), owners };
        found.need(object.ids.iter().flatten().map(String::as_str))?;
        Ok(found)
    }

    /// Looks for the helpers whose state comes under `ids`.
    ///
    /// # Errors
    /// As [`Helpers::find`], and if there is no object, its list leaves one of them out, one is not there, or they are no Ids.
    pub fn find_all<'a>(
        object: Option<&DbusVmState>,
        ids: impl Iterator<Item = &'a str>,
    ) -> Result<Self, HelperError> {
        let mut wanted = BTreeSet::new();
        for id in ids {
            if !is_id(id) {
                return Err(HelperError::Section("an Id that is not of 1 to 255 bytes without NUL"));
            }
            if !wanted.insert(id) {
                return Err(HelperError::Section("one Id twice"));
            }
        }
        let Some(object) = object else { return Err(HelperError::NoObject { ids: quoted(wanted) }) };
        if let Some(list) = &object.ids
            && let Some(id) = wanted.iter().find(|id| !list.contains(**id))
        {
            return Err(HelperError::Unlisted { id: (*id).to_owned(), object: object.id.clone() });
        }
        let found = Self::find(object)?;
        found.need(wanted)?;
        Ok(found)
    }

    /// Their Ids.
    pub fn ids(&self) -> impl Iterator<Item = &String> {
        self.owners.keys()
    }

    /// Fails unless all of `ids` are there.
    fn need<'a>(&self, ids: impl IntoIterator<Item = &'a str>) -> Result<(), HelperError> {
        let missing: Vec<&str> = ids.into_iter().filter(|id| !self.owners.contains_key(*id)).collect();
        if missing.is_empty() {
            return Ok(());
        }
        Err(HelperError::Missing { ids: quoted(missing), addr: self.addr.clone() })
    }

    /// Asks each for its state: Ids and what they gave, at most [`MAX_STATE`] bytes each. They go on as they are.
    ///
    /// # Errors
    /// [`HelperError::Save`] and [`HelperError::Large`], which name the helper.
    pub fn save(&mut self) -> Result<Vec<(String, Vec<u8>)>, HelperError> {
        let mut states = Vec::new();
        for (id, owner) in &self.owners {
            // Its length comes before it.
            let state: Vec<u8> =
                self.bus.call(&method(owner, "Save"), &(), MAX_STATE + 4).map_err(|source| match source {
                    BusError::Long(_) => HelperError::Large { id: id.clone() },
                    source => HelperError::Save { id: id.clone(), source },
                })?;
            states.push((id.clone(), state));
        }
        Ok(states)
    }

    /// Hands the helper `id` what its like gave elsewhere.
    ///
    /// # Errors
    /// [`HelperError`], which names the helper: it is not there, does not take it, or it is too long.
    pub fn load(&mut self, id: &str, state: &[u8]) -> Result<(), HelperError> {
        if state.len() > MAX_STATE {
            return Err(HelperError::Large { id: id.to_owned() });
        }
        let Some(owner) = self.owners.get(id) else {
            return Err(HelperError::Missing { ids: quoted([id]), addr: self.addr.clone() });
        };
        let loaded = self.bus.call(&method(owner, "Load"), &state, bus::MAX_ANSWER);
        loaded.map_err(|source| HelperError::Load { id: id.to_owned(), source })
    }
}

/// Ids for people.
fn quoted<'a>(ids: impl IntoIterator<Item = &'a str>) -> String {
    let ids: Vec<String> = ids.into_iter().map(|id| format!("`{id}`")).collect();
    ids.join(", ")
}

fn method<'a>(destination: &'a str, member: &'a str) -> Method<'a> {
    Method { destination, path: PATH, interface: NAME, member }
}

/// The Id of an owner of the name. QEMU asks for all properties at once, so that is what helpers answer.
fn id_of(bus: &mut Bus, owner: &str) -> Result<String, BusError> {
    let all = Method { destination: owner, path: PATH, interface: PROPERTIES, member: "GetAll" };
    let mut all: HashMap<String, OwnedVariant> = bus.call(&all, &NAME, bus::MAX_ANSWER)?;
    let id = all.remove("Id").ok_or_else(|| BusError::Protocol("the property Id is missing".into()))?;
    String::try_from(id).map_err(|_| BusError::Protocol("the property Id is no text".into()))
}

#[cfg(test)]
mod tests;
