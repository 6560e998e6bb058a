//! The virtio socket device (virtio 1.2 section 5.10), connected to UNIX sockets of the host as with Firecracker and
//! Cloud Hypervisor.

pub mod config;
mod connection;
mod handler;
mod packet;
#[cfg(test)]
mod tests;

use std::collections::BTreeMap;
use std::os::unix::net::UnixListener;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use holdfast_device::{BuildContext, BuildError, StateError};
use holdfast_threads::Role;

use crate::device::{VirtioDevice, feature, kind, read_bytes};
use crate::queue::VirtQueue;
use crate::worker::{Activation, Worker};
use config::VsockConfig;
use handler::Mux;

const QUEUE_SIZE: u16 = 256;

/// What the worker and the device share.
#[derive(Debug, Default)]
struct Shared {
    /// The driver has reset the device: there are no connections.
    forget: AtomicBool,
    /// The driver is to be told that all connections are lost.
    lost: AtomicBool,
    to_guest: AtomicU64,
    from_guest: AtomicU64,
}

/// A virtio socket device.
#[derive(Debug)]
pub struct Vsock {
    cid: u64,
    shared: Arc<Shared>,
    worker: Worker,
    path: PathBuf,
}

impl Drop for Vsock {
    fn drop(&mut self) {
        // Nothing is lost if it is gone already.
        let _ = std::fs::remove_file(&self.path);
    }
}

/// Listens for processes that connect to the guest, and starts the worker.
///
/// # Errors
/// [`BuildError`] naming the field or what the host refused.
pub fn build(id: &str, config: &VsockConfig, context: &BuildContext) -> Result<Arc<Vsock>, BuildError> {
    crate::registry::check(id, config.validate())?;
    let host = |what: String, source| BuildError::Host { id: id.to_owned(), what, source };
    crate::vhost_user::remove_left_behind(&config.socket);
    let listener = UnixListener::bind(&config.socket)
        .and_then(|listener| listener.set_nonblocking(true).map(|()| listener))
        .map_err(|e| host(format!("cannot listen on `{}`", config.socket.display()), e))?;
    let shared = Arc::new(Shared::default());
    let mux = Mux::new(config.cid, (listener, config.socket.clone()), Arc::clone(&shared));
    let worker = Worker::start(id, Role::BackEnd, &*context.spawner, Box::new(mux));
    let worker = worker.map_err(|e| host("cannot start its thread".to_owned(), e))?;
    Ok(Arc::new(Vsock { cid: config.cid, shared, worker, path: config.socket.clone() }))
}

impl VirtioDevice for Vsock {
    fn name(&self) -> &'static str {
        "virtio-vsock"
    }

    fn device_type(&self) -> u32 {
        kind::VSOCK
    }

    fn features(&self) -> u64 {
        feature::QUEUES
    }

    fn queue_sizes(&self) -> Vec<u16> {
        vec![QUEUE_SIZE; 3]
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.cid.to_le_bytes(), offset, data);
    }

    fn activate(&self, activation: Activation) {
        self.worker.activate(activation);
    }

    fn stop(&self) -> Vec<VirtQueue> {
        self.worker.stop()
    }

    fn reset(&self) {
        self.shared.forget.store(true, Ordering::SeqCst);
        self.shared.lost.store(false, Ordering::SeqCst);
    }

    fn save(&self) -> Result<serde_json::Value, StateError> {
        Ok(serde_json::Value::Null)
    }

    fn restore(&self, _: &serde_json::Value) -> Result<(), StateError> {
        // The processes that the guest was connected to are not here.
        self.shared.lost.store(true, Ordering::SeqCst);
        Ok(())
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        BTreeMap::from([
            ("bytes_to_guest".to_owned(), self.shared.to_guest.load(Ordering::Relaxed)),
            ("bytes_from_guest".to_owned(), self.shared.from_guest.load(Ordering::Relaxed)),
        ])
    }
}
