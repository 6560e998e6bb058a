//! The state of helpers on a D-Bus bus, as part of what a VM is saved as.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use holdfast_dbus::{HelperError, Helpers};
use holdfast_objects::{DbusVmState, Objects};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::{SavedVm, VERSION};

/// What a helper gave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HelperState {
    /// Its Id.
    pub id: String,
    /// Its state, in base64 where it is written down.
    #[serde(serialize_with = "to_base64", deserialize_with = "from_base64")]
    pub state: Vec<u8>,
}

fn to_base64<S: Serializer>(bytes: &[u8], to: S) -> Result<S::Ok, S::Error> {
    to.serialize_str(&STANDARD.encode(bytes))
}

fn from_base64<'de, D: Deserializer<'de>>(from: D) -> Result<Vec<u8>, D::Error> {
    let text = String::deserialize(from)?;
    STANDARD.decode(text).map_err(serde::de::Error::custom)
}

/// The Ids of the helpers whose state would be saved now.
///
/// # Errors
/// [`HelperError`] if it could not be.
pub(crate) fn ids(object: Option<&DbusVmState>) -> Result<Vec<String>, HelperError> {
    let Some(object) = object else { return Ok(Vec::new()) };
    Ok(Helpers::find(object)?.ids().cloned().collect())
}

/// Adds to `saved` what the helpers of `object` give.
///
/// # Errors
/// [`HelperError`].
pub(crate) fn save(object: Option<&DbusVmState>, saved: &mut SavedVm) -> Result<(), HelperError> {
    let Some(object) = object else { return Ok(()) };
    let states = Helpers::find(object)?.save()?;
    saved.helpers = states.into_iter().map(|(id, state)| HelperState { id, state }).collect();
    if !saved.helpers.is_empty() {
        saved.version = VERSION;
    }
    Ok(())
}

/// Checks that helpers with these Ids are there, if any are named.
///
/// # Errors
/// [`HelperError`] naming what is missing.
pub(crate) fn check<'a>(
    objects: &Objects,
    ids: impl IntoIterator<Item = &'a String>,
) -> Result<(), HelperError> {
    let mut ids = ids.into_iter().map(String::as_str).peekable();
    if ids.peek().is_none() {
        return Ok(());
    }
    Helpers::find_all(objects.dbus_vmstate().as_deref(), ids).map(drop)
}

/// Hands the helpers what is theirs of `saved`.
///
/// # Errors
/// [`HelperError`] naming what is missing, or who does not take it.
pub(crate) fn load(objects: &Objects, saved: &SavedVm) -> Result<(), HelperError> {
    if saved.helpers.is_empty() {
        return Ok(());
    }
    let ids = saved.helpers.iter().map(|helper| helper.id.as_str());
    let mut helpers = Helpers::find_all(objects.dbus_vmstate().as_deref(), ids)?;
    saved.helpers.iter().try_for_each(|helper| helpers.load(&helper.id, &helper.state))
}

#[cfg(test)]
mod tests {
    use super::*;
    use holdfast_arch::Arch;

    #[test]
    fn without_helpers_it_is_what_it_was_and_with_them_nobody_passes_over_them() {
        let mut saved = SavedVm::new(Arch::Riscv64, "virt", 7);
        let objects = Objects::for_vm();
        save(None, &mut saved).expect("nothing to do");
        load(&objects, &saved).expect("nothing to do");
        check(&objects, []).expect("nothing to do");
        let plain = serde_json::to_value(&saved).expect("JSON");
        assert_eq!((&plain["version"], plain.get("helpers")), (&1.into(), None));
        let mut text = plain.clone();
        text["version"] = 2.into();
        text["helpers"] = serde_json::json!([{ "id": "one", "state": "AAEC/w==" }]);
        let with: SavedVm = serde_json::from_value(text.clone()).expect("it is read");
        assert_eq!(with.helpers, [HelperState { id: "one".into(), state: vec![0, 1, 2, 255] }]);
        assert_eq!(serde_json::to_value(&with).expect("JSON"), text);
        with.check_version().expect("it is known");
        let error = load(&objects, &with).expect_err("there is no object").to_string();
        assert!(error.contains("`one`") && error.contains("no dbus-vmstate object"), "{error}");
        assert!(check(&objects, &["one".to_owned()]).is_err());
        text["helpers"][0]["state"] = "no base64".into();
        assert!(serde_json::from_value::<SavedVm>(text).is_err());
    }
}
