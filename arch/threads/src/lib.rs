//! The one way Holdfast starts a thread.
//!
//! Every thread has a name (an interface: libvirt classifies threads by it) and a [`Role`], from
//! which the sandbox derives its seccomp allow-list. Crates below `vmm` never call
//! `std::thread::spawn`: they take a [`Spawner`], so that no thread escapes its filter.

mod affinity;

use std::fmt::Debug;
use std::io;
use std::sync::Arc;
use std::thread::JoinHandle;

pub use affinity::{pin, pin_current};

/// What a thread is for. The sandbox has one system-call allow-list per role.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Role {
    /// Runs guest code (`vcpuN`).
    Vcpu,
    /// The VM's own event loop: lifecycle requests, exits, resets.
    Vmm,
    /// Fires device timers.
    Timer,
    /// Moves data for a block device.
    Block,
    /// Moves data between disks and the network: NBD.
    Nbd,
    /// Moves packets for a network device.
    Net,
    /// Any other device I/O: console, rng, balloon, serial input.
    Device,
    /// Speaks vhost-user: passes requests on to a back end, or has a front end.
    BackEnd,
    /// Passes requests on to the kernel's vhost.
    Vhost,
    /// Serves REST, QMP or the event monitor.
    Api,
    /// Talks to a debugger.
    Gdb,
    /// Waits for signals.
    Signal,
    /// Saves or loads a VM: snapshot, restore, migration, page-fault service.
    Migration,
}

/// Starts threads under the sandbox's rules.
pub trait Spawner: Send + Sync + Debug {
    /// Starts `body` on a new thread called `name` (at most 15 bytes are visible to the kernel).
    ///
    /// # Errors
    /// Whatever the host says when no thread can be made.
    fn spawn(&self, name: &str, role: Role, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>>;
}

/// A [`Spawner`] without a sandbox, for tests and tools.
#[derive(Debug, Default, Clone, Copy)]
pub struct PlainSpawner;

impl PlainSpawner {
    /// The plain spawner as the shared object that constructors take.
    pub fn shared() -> Arc<dyn Spawner> {
        Arc::new(Self)
    }
}

impl Spawner for PlainSpawner {
    fn spawn(&self, name: &str, _role: Role, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        std::thread::Builder::new().name(name.to_owned()).spawn(body)
    }
}
