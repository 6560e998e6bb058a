//! A VM's state, for snapshots and migration.

use std::collections::BTreeMap;

use holdfast_arch::CpuState;
use holdfast_arch::x86_64::cpuid;
use holdfast_device::DeviceState;
use holdfast_migration::Marks;
use vm_memory::{Address, GuestMemoryBackend, GuestMemoryRegion};

use super::{Vm, VmError};
use crate::snapshot::SavedVm;

impl Vm {
    /// Everything but RAM; the VM must be paused.
    ///
    /// # Errors
    /// [`VmError`] naming the vCPU or device that cannot be saved.
    pub fn save(&self) -> Result<SavedVm, VmError> {
        let mut saved = SavedVm::new(self.arch, self.module.name(), self.clock.now());
        let mut marks = Marks::start("saving");
        saved.ram = self.ram_ranges();
        saved.vcpus = self.vcpu_states()?;
        marks.mark("vcpus");
        saved.platform = self.accel.save()?;
        for device in self.devices() {
            let id = device.id().to_owned();
            let state = device.save().map_err(|source| VmError::State { id: id.clone(), source })?;
            marks.mark(&id);
            saved.devices.push((id, state));
        }
        Ok(saved)
    }

    /// Takes over a saved state, in a VM freshly built from the same config and never run.
    ///
    /// # Errors
    /// [`VmError`] naming what does not fit; the VM must not be run then.
    pub fn restore(&self, saved: &SavedVm) -> Result<(), VmError> {
        let mut marks = Marks::start("restoring");
        self.check_fits(saved)?;
        self.clock.set(saved.clock);
        self.accel.restore(&saved.platform)?;
        self.check_features(saved)?;
        marks.mark("features");
        // vCPUs first: devices then drive the pins that they hold.
        for (index, state) in saved.vcpus.iter().enumerate() {
            self.vcpus.set_state(index, state.clone())?;
        }
        marks.mark("vcpus");
        let mut sections: BTreeMap<&str, &DeviceState> =
            saved.devices.iter().map(|(id, state)| (id.as_str(), state)).collect();
        for device in self.devices() {
            let id = device.id();
            let Some(state) = sections.remove(id) else {
                return Err(VmError::Mismatch(format!("it has no device `{id}`")));
            };
            device.restore(state).map_err(|source| VmError::State { id: id.to_owned(), source })?;
            marks.mark(id);
        }
        match sections.keys().next() {
            Some(id) => Err(VmError::Mismatch(format!("it has a device `{id}` that this VM lacks"))),
            None => Ok(()),
        }
    }

    pub(super) fn ram_ranges(&self) -> Vec<(u64, u64)> {
        self.memory.iter().map(|r| (r.start_addr().raw_value(), r.len())).collect()
    }

    /// Whether vCPU 0 shows what the saved one showed. Paravirtual leaves are left out: what a guest uses of them is in
    /// MSRs, which the accelerator looks at.
    pub(crate) fn check_features(&self, saved: &SavedVm) -> Result<(), VmError> {
        let Some(CpuState::X86_64(saved)) = saved.vcpus.first() else { return Ok(()) };
        let CpuState::X86_64(here) = self.vcpus.state(0)? else { return Ok(()) };
        if saved.cpuid.is_empty() || here.cpuid.is_empty() {
            return Ok(());
        }
        let shown: Vec<_> = saved
            .cpuid
            .iter()
            .filter(|e| !(0x4000_0000..0x4001_0000).contains(&e.function))
            .copied()
            .collect();
        let lacking: Vec<_> = cpuid::missing(&here.cpuid, &shown)
            .into_iter()
            .map(|(leaf, index, register, bits)| {
                let register = ["EAX", "EBX", "ECX", "EDX"].get(register).unwrap_or(&"?");
                format!("CPUID leaf {leaf:#x}.{index} {register} bits {bits:#x}")
            })
            .collect();
        if lacking.is_empty() {
            return Ok(());
        }
        Err(VmError::Mismatch(format!(
            "its guest was shown features that `{}` does not have here: {}; give the VM a CPU model by name \
             (`--cpus profile=`) that both have",
            self.accel.accel(),
            lacking.join(", ")
        )))
    }

    fn check_fits(&self, saved: &SavedVm) -> Result<(), VmError> {
        let mismatch = |what: &str, saved: &dyn std::fmt::Display, here: &dyn std::fmt::Display| {
            Err(VmError::Mismatch(format!("{what} is {saved}, here it is {here}")))
        };
        if saved.arch != self.arch {
            return mismatch("its architecture", &saved.arch, &self.arch);
        }
        if saved.machine != self.module.name() {
            return mismatch("its machine", &saved.machine, &self.module.name());
        }
        if saved.vcpus.len() != self.vcpus.len() {
            return mismatch("its number of vCPUs", &saved.vcpus.len(), &self.vcpus.len());
        }
        if saved.ram != self.ram_ranges() {
            let total = |ranges: &[(u64, u64)]| ranges.iter().map(|r| r.1).sum::<u64>();
            return mismatch("its RAM", &total(&saved.ram), &total(&self.ram_ranges()));
        }
        Ok(())
    }
}
