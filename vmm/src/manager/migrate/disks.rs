//! Disks that go along with a VM, because the destination has other storage.

use std::error::Error;
use std::path::Path;
use std::sync::Arc;

use holdfast_block::nodes::NamedNode;
use holdfast_block::raw::{RawImage, RawOptions};
use holdfast_block::{BlockNode, qcow2};
use holdfast_config::VmConfig;
use holdfast_migration::MirroredDisk;
use holdfast_threads::Spawner;
use holdfast_virtio::blk::log::WriteLog;

use crate::storage::LoggedDisk;
use crate::vm::Vm;

type Failure = Box<dyn Error + Send + Sync>;

/// The writable disks of `vm`.
pub(super) fn leaving(vm: &Vm) -> Result<Vec<Arc<LoggedDisk>>, Failure> {
    let mut all = Vec::new();
    for blk in vm.disks().into_iter().filter(|d| !d.backend().is_readonly()) {
        let log = WriteLog::new(blk.backend().geometry().size);
        all.push(Arc::new(LoggedDisk::new(vm, blk, log)?));
    }
    Ok(all)
}

pub(super) fn describe(disk: &LoggedDisk) -> MirroredDisk {
    let (id, size) = (disk.blk.id().to_owned(), disk.blk.backend().geometry().size);
    MirroredDisk { id, size, format: disk.node.driver().to_owned() }
}

/// Makes the images that `config` names and that are not there, for disks that come along.
pub(super) fn make_images(
    config: &VmConfig,
    disks: &[MirroredDisk],
    spawner: &Arc<dyn Spawner>,
) -> Result<(), Failure> {
    for MirroredDisk { id, size, format } in disks {
        let of_disk = config.disks().iter().find(|d| d.id.as_deref() == Some(id));
        let Some(path) = of_disk.and_then(|d| d.path.as_deref()).filter(|path| !path.exists()) else {
            continue;
        };
        make_image(path, *size, format, spawner)?;
    }
    Ok(())
}

fn make_image(path: &Path, size: u64, format: &str, spawner: &Arc<dyn Spawner>) -> Result<(), Failure> {
    match format {
        "raw" => {
            let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
            Ok(file.set_len(size)?)
        }
        "qcow2" => {
            let options = RawOptions { create: true, io_uring: false, ..RawOptions::new(path) };
            let file: Arc<dyn BlockNode> = RawImage::open(options, Arc::clone(spawner))?;
            qcow2::create(file, None, &qcow2::CreateOptions::new(size), None)?;
            Ok(())
        }
        other => {
            Err(format!("`{}` is not there, and images of the format `{other}` are not made", path.display())
                .into())
        }
    }
}

/// The nodes of disks that come along, in the plan's order.
pub(super) fn arriving(vm: &Vm, disks: &[MirroredDisk]) -> Result<Vec<Arc<NamedNode>>, Failure> {
    let all = vm.disks();
    let mut nodes = Vec::new();
    for MirroredDisk { id, size, .. } in disks {
        let disk =
            all.iter().find(|d| d.id() == id).ok_or_else(|| format!("there is no disk `{id}` here"))?;
        let here = disk.backend().geometry().size;
        if here != *size {
            return Err(format!("disk `{id}` has {size} bytes at the source, {here} here").into());
        }
        nodes.push(vm.storage().nodes().find(&disk.node())?);
    }
    Ok(nodes)
}
