//! UNIX sockets of back ends, by the names that QEMU's users give them.

use std::collections::BTreeMap;
use std::path::Path;

use holdfast_config::VmConfig;

use super::netdev::Netdevs;
use crate::control::{BackEndSocket, ChardevInfo, ControlError, ErrorKind};

/// All of them.
#[derive(Debug, Default)]
pub(super) struct Sockets(BTreeMap<String, BackEndSocket>);

/// Whether a device of the VM has its back end there.
fn is_used(config: &VmConfig, path: &Path) -> bool {
    let same = |socket: &Option<String>| socket.as_deref().is_some_and(|socket| Path::new(socket) == path);
    config.fs().iter().any(|fs| fs.socket == path)
        || config.generic_vhost_user().iter().any(|device| device.socket == path)
        || config.disks().iter().any(|disk| same(&disk.vhost_socket))
        || config.net().iter().any(|net| same(&net.vhost_socket))
        || config.vsock.as_ref().is_some_and(|vsock| vsock.vhost_user && vsock.socket == path)
}

impl Sockets {
    pub(super) fn add(&mut self, label: String, socket: BackEndSocket) -> Result<(), ControlError> {
        if self.0.contains_key(&label) {
            let text = format!("Chardev with id '{label}' already exists");
            return Err(ControlError::new(ErrorKind::Conflict, text));
        }
        self.0.insert(label, socket);
        Ok(())
    }

    pub(super) fn remove(
        &mut self,
        label: &str,
        config: &VmConfig,
        netdevs: &Netdevs,
    ) -> Result<(), ControlError> {
        let failed = |text| Err(ControlError::new(ErrorKind::Failed, text));
        match self.0.get(label) {
            None => failed(format!("Chardev '{label}' not found")),
            Some(socket) if is_used(config, &socket.path) || netdevs.name_socket(label) => {
                failed(format!("Chardev '{label}' is busy"))
            }
            Some(_) => {
                self.0.remove(label);
                Ok(())
            }
        }
    }

    pub(super) fn get(&self, label: &str) -> Option<BackEndSocket> {
        self.0.get(label).cloned()
    }

    /// What is shown of them.
    pub(super) fn shown(&self, config: &VmConfig) -> Vec<ChardevInfo> {
        let shown = |(label, socket): (&String, &BackEndSocket)| ChardevInfo {
            label: label.clone(),
            filename: format!(
                "unix:{}{}",
                socket.path.display(),
                if socket.listen { ",server=on" } else { "" }
            ),
            frontend_open: is_used(config, &socket.path),
        };
        self.0.iter().map(shown).collect()
    }
}
