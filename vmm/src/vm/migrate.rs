//! What a VM is to a migration.

use std::os::fd::{AsRawFd, RawFd};

use holdfast_arch::CpuState;
use holdfast_config::VmConfig;
use holdfast_memory::PAGE_SIZE;
use holdfast_migration::Plan;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use super::{Vm, VmError};
use crate::snapshot::SavedVm;

impl Vm {
    /// What a VM must be like for this one's state to fit. `config` has the devices that were added since it was built.
    ///
    /// # Errors
    /// [`VmError`] if a vCPU does not answer, or something of this VM cannot move.
    pub fn plan(&self, config: &VmConfig, running: bool) -> Result<Plan, VmError> {
        let unwritable =
            |e: serde_json::Error| VmError::Unsupported(format!("the config cannot be written: {e}"));
        let kinds = |id: &str| {
            let plugged = self.plugged().into_iter().find(|p| p.device.id() == id);
            plugged.map_or(self.module.name(), |p| p.kind).to_owned()
        };
        Ok(Plan {
            build: concat!("holdfast ", env!("CARGO_PKG_VERSION")).to_owned(),
            page_size: PAGE_SIZE,
            arch: self.arch.to_string(),
            machine: self.module.name().to_owned(),
            vcpus: self.vcpus.len() as u32,
            cpu_model: self.config.cpus.profile.clone().unwrap_or_default(),
            ram: self.ram_ranges(),
            devices: self.devices().iter().map(|d| (d.id().to_owned(), kinds(d.id()))).collect(),
            config: serde_json::to_value(config).map_err(unwritable)?,
            vcpu: serde_json::to_value(self.vcpus.state(0)?).map_err(unwritable)?,
            running,
            local: false,
            postcopy: false,
            mirror: Vec::new(),
            nbd: false,
            helpers: Vec::new(),
            connections: 1,
        })
    }

    /// Whether this VM, freshly built, fits `plan`.
    ///
    /// # Errors
    /// [`VmError::Mismatch`] naming all that differs.
    pub fn check_plan(&self, plan: &Plan) -> Result<(), VmError> {
        let differences = plan.differences(&self.plan(&self.config, false)?);
        if !differences.is_empty() {
            return Err(VmError::Mismatch(differences.join("; ")));
        }
        let Ok(state) = serde_json::from_value::<CpuState>(plan.vcpu.clone()) else {
            return Err(VmError::Mismatch("the state of vCPU 0 does not parse".into()));
        };
        let mut shown = SavedVm::new(self.arch, self.module.name(), 0);
        shown.vcpus.push(state);
        self.check_features(&shown)
    }

    /// The files that RAM is in, by range.
    ///
    /// # Errors
    /// [`VmError::Unsupported`] if RAM is this process's own.
    pub fn ram_files(&self) -> Result<Vec<RawFd>, VmError> {
        if !self.config.memory.shared {
            return Err(VmError::Unsupported(
                "`local` hands RAM over by its file descriptors, and this VM's has none: it needs memory.shared=on".into(),
            ));
        }
        let files = self.memory.iter().map(|r| r.file_offset().map(|f| f.file().as_raw_fd()));
        let none = || VmError::Unsupported("RAM has no file descriptor".into());
        files.map(|fd| fd.ok_or_else(none)).collect()
    }

    /// What keeps this VM from moving to another host or process.
    ///
    /// # Errors
    /// [`VmError::Unsupported`] naming it.
    pub fn check_movable(&self) -> Result<(), VmError> {
        if self.pager.is_some() {
            return Err(VmError::Unsupported(
                "RAM still comes from a snapshot on demand; restore with memory_restore_mode=Copy to migrate"
                    .into(),
            ));
        }
        self.storage().nodes().can_inactivate().map_err(|e| VmError::Unsupported(e.to_string()))
    }
}
