//! Network back ends, by the names that QEMU's users give them.

use std::collections::BTreeMap;

use holdfast_config::{NetConfig, VhostMode, VmConfig};

use super::chardev::Sockets;
use crate::control::{ControlError, ErrorKind, Netdev, NetdevCard, TapNetdev};

/// A back end, and the card that was made with it.
#[derive(Debug)]
struct Entry {
    netdev: Netdev,
    card: Option<String>,
}

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Netdevs(BTreeMap<String, Entry>);

fn invalid(text: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Invalid, text)
}

fn id(netdev: &Netdev) -> &String {
    match netdev {
        Netdev::Tap(tap) => &tap.id,
        Netdev::VhostUser(process) => &process.id,
    }
}

/// Refuses programs that are to set a tap up, and descriptors that nobody has sent.
fn check_tap(tap: &TapNetdev) -> Result<(), ControlError> {
    for (name, script) in [("script", &tap.script), ("downscript", &tap.downscript)] {
        if script.as_deref().is_some_and(|script| !matches!(script, "no" | "")) {
            return Err(invalid(format!("`{name}` is not supported: no programs are run; say `{name}=no`")));
        }
    }
    for (name, given) in [("vhostfd", tap.vhostfd.is_some()), ("vhostfds", tap.vhostfds.is_some())] {
        if given {
            return Err(invalid(format!(
                "`{name}` is not supported: with vhost=on /dev/vhost-net is opened"
            )));
        }
    }
    Ok(())
}

impl Entry {
    /// Whether the card is still there.
    fn is_used(&self, config: &VmConfig) -> bool {
        self.card.is_some() && config.net().iter().any(|net| net.id == self.card)
    }
}

impl Netdevs {
    pub(super) fn add(&mut self, netdev: Netdev, sockets: &Sockets) -> Result<(), ControlError> {
        let id = id(&netdev).clone();
        if self.0.contains_key(&id) {
            return Err(ControlError::new(ErrorKind::Conflict, format!("Duplicate ID '{id}'")));
        }
        let queues = match &netdev {
            Netdev::Tap(tap) => {
                check_tap(tap)?;
                tap.queues
            }
            Netdev::VhostUser(process) => {
                if sockets.get(&process.chardev).is_none() {
                    return Err(invalid(format!("chardev \"{}\" not found", process.chardev)));
                }
                process.queues
            }
        };
        if queues == Some(0) {
            return Err(invalid("Parameter 'queues' expects a number greater than 0"));
        }
        self.0.insert(id, Entry { netdev, card: None });
        Ok(())
    }

    pub(super) fn remove(&mut self, id: &str, config: &VmConfig) -> Result<(), ControlError> {
        match self.0.get(id) {
            None => Err(ControlError::new(ErrorKind::DeviceNotFound, format!("Device '{id}' not found"))),
            Some(entry) if entry.is_used(config) => {
                Err(ControlError::new(ErrorKind::Failed, format!("Device '{id}' is in use")))
            }
            Some(_) => {
                self.0.remove(id);
                Ok(())
            }
        }
    }

    /// Whether one of them has its process at the socket of this name.
    pub(super) fn name_socket(&self, label: &str) -> bool {
        let names = |entry: &Entry| matches!(&entry.netdev, Netdev::VhostUser(p) if p.chardev == label);
        self.0.values().any(names)
    }

    /// The whole card.
    pub(super) fn card(
        &self,
        wanted: &NetdevCard,
        sockets: &Sockets,
        config: &VmConfig,
    ) -> Result<NetConfig, ControlError> {
        let NetdevCard { netdev: name, multi_queue, vectors, card } = wanted;
        let property = "Property 'virtio-net-pci.netdev' can't";
        let entry = self.0.get(name).ok_or_else(|| invalid(format!("{property} find value '{name}'")))?;
        if entry.is_used(config) {
            return Err(invalid(format!("{property} take value '{name}', it's in use")));
        }
        let mut card = card.clone();
        let queues = match &entry.netdev {
            Netdev::Tap(tap) => {
                card.tap.clone_from(&tap.ifname);
                card.vhost = tap.is_vhost();
                tap.queues
            }
            Netdev::VhostUser(process) => {
                let missing = || invalid(format!("chardev \"{}\" not found", process.chardev));
                let socket = sockets.get(&process.chardev).ok_or_else(missing)?;
                card.vhost_user = true;
                card.vhost_socket = Some(socket.path.display().to_string());
                card.vhost_mode = if socket.listen { VhostMode::Server } else { VhostMode::Client };
                process.queues
            }
        };
        let pairs = if *multi_queue { queues.unwrap_or(1) } else { 1 };
        card.num_queues = pairs.checked_mul(2).ok_or_else(|| invalid("Parameter 'queues' is too large"))?;
        // One for each queue, the control queue and changes of the config space.
        let all = u32::from(card.num_queues) + 2;
        if vectors.is_some_and(|vectors| vectors != all) {
            return Err(invalid(format!("the card has {all} vectors: leave `vectors` out")));
        }
        Ok(card)
    }

    /// Notes which card was made.
    pub(super) fn made(&mut self, name: &str, card: Option<String>) {
        if let Some(entry) = self.0.get_mut(name) {
            entry.card = card;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn card(tap: &serde_json::Value) -> Result<NetConfig, ControlError> {
        let (mut netdevs, sockets) = (Netdevs::default(), Sockets::default());
        netdevs.add(serde_json::from_value(tap.clone()).expect("a netdev"), &sockets)?;
        let wanted = NetdevCard { netdev: "n".to_owned(), ..NetdevCard::default() };
        netdevs.card(&wanted, &sockets, &VmConfig::default())
    }

    #[test]
    fn a_tap_may_ask_for_the_kernels_vhost() {
        let tap = |more: serde_json::Value| {
            let mut tap = serde_json::json!({ "type": "tap", "id": "n" });
            tap.as_object_mut().expect("an object").extend(more.as_object().cloned().expect("an object"));
            card(&tap)
        };
        assert!(!tap(serde_json::json!({})).expect("a card").vhost);
        assert!(tap(serde_json::json!({ "vhost": true })).expect("a card").vhost);
        assert!(tap(serde_json::json!({ "vhostforce": true })).expect("a card").vhost);
        assert!(!tap(serde_json::json!({ "vhost": false, "vhostforce": true })).expect("a card").vhost);
        for name in ["vhostfd", "vhostfds"] {
            let error = tap(serde_json::json!({ "vhost": true, name: "3" })).expect_err("refused");
            assert!(error.to_string().contains(&format!("`{name}` is not supported")), "{error}");
        }
    }
}
