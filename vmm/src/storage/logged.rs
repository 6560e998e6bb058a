//! A disk of a VM whose writes are noted while somebody copies it.

use std::sync::Arc;

use holdfast_block::nodes::NamedNode;
use holdfast_device::Device;
use holdfast_virtio::blk::Blk;
use holdfast_virtio::blk::log::WriteLog;

use super::refused;
use crate::control::ControlError;
use crate::vm::Vm;

/// A disk whose writes are noted. Its methods are called where nobody stops or resets the guest meanwhile, and told whether the
/// device works then (`works`): if not, it is left as it is.
#[derive(Debug)]
pub(crate) struct LoggedDisk {
    pub(crate) blk: Arc<Blk>,
    pub(crate) node: Arc<NamedNode>,
    pub(crate) log: Arc<WriteLog>,
    device: Arc<dyn Device>,
}

impl LoggedDisk {
    /// A disk of `vm`, whose writes are not noted yet.
    pub(crate) fn new(vm: &Vm, blk: Arc<Blk>, log: WriteLog) -> Result<Self, ControlError> {
        let node = vm.storage().nodes().find(&blk.node()).map_err(refused)?;
        let plugged = vm.plugged().into_iter().find(|p| p.id == blk.id());
        let device = plugged.ok_or_else(|| super::failed("the disk is not plugged in"))?.device;
        Ok(Self { blk, node, log: Arc::new(log), device })
    }

    /// Lets requests under way end, and what was changed take effect.
    fn turn_over(&self, works: bool) {
        self.device.pause();
        if works {
            self.device.resume();
        }
    }

    /// Notes writes from now on, or no more.
    pub(crate) fn note(&self, on: bool, works: bool) {
        self.blk.log_writes(&self.log, on);
        if on {
            // What is under way is not noted, and is not to reach the disk behind what is copied.
            self.turn_over(works);
        }
    }

    /// Lets new requests wait from now on, and those under way end; or no more.
    pub(crate) fn hold_back(&self, yes: bool, works: bool) {
        self.blk.hold_back(yes);
        self.turn_over(works);
    }

    /// Does something while the device does nothing.
    pub(crate) fn standing<T>(&self, works: bool, what: impl FnOnce(&Self) -> T) -> T {
        self.device.pause();
        let done = what(self);
        if works {
            self.device.resume();
        }
        done
    }
}
