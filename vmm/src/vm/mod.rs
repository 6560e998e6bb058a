//! A VM: its machine, devices and vCPUs, and what can be done with them.

pub mod ahead;
mod assemble;
mod hot;
mod migrate;
mod plug;
mod state;
pub mod vcpus;
mod windows;

use std::fmt;
use std::sync::Arc;

use holdfast_accel::Vm as AccelVm;
use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_clock::{Timers, VmClock};
use holdfast_config::{BlockdevOptions, VmConfig};
use holdfast_device::{BuildContext, BuildError, Bus, Device, StateError};
use holdfast_machines::{Machine, MachineError, MachineModule};
use holdfast_memory::GuestMemory;
use holdfast_migration::Marks;
use holdfast_virtio::blk::Blk;
use parking_lot::RwLock;

use crate::accel::NoAccelerator;
use crate::control::ControlError;
use crate::ram::RamError;
use crate::snapshot::ram::DemandPager;
use crate::storage::Storage;
use vcpus::{VcpuError, Vcpus};

pub use assemble::Host;
pub use hot::HotDevice;

/// A VM that cannot be built, or an operation on it that failed.
#[derive(Debug, thiserror::Error)]
pub enum VmError {
    /// No machine has that name.
    #[error("machine `{name}` does not exist for {arch} guests; {known} do")]
    UnknownMachine {
        /// What was asked for.
        name: String,
        /// The guest's architecture.
        arch: Arch,
        /// Machines of that architecture.
        known: String,
    },
    /// The machine refuses.
    #[error(transparent)]
    Machine(#[from] MachineError),
    /// The host does not provide RAM.
    #[error("guest RAM cannot be provided")]
    Ram(#[from] RamError),
    /// No accelerator.
    #[error(transparent)]
    Accel(#[from] NoAccelerator),
    /// The accelerator failed later.
    #[error("the accelerator failed")]
    Operation(#[from] holdfast_accel::AccelError),
    /// A device cannot be built.
    #[error("a device cannot be built")]
    Device(#[from] BuildError),
    /// A node of the storage graph cannot be opened.
    #[error("the node `{name}` cannot be opened")]
    Node {
        /// Its name.
        name: String,
        /// Why.
        #[source]
        source: ControlError,
    },
    /// Images that were given up cannot be had again.
    #[error("the disks' images cannot be taken")]
    Images {
        /// Why.
        #[source]
        source: holdfast_block::BlockError,
    },
    /// A vCPU failed.
    #[error("a vCPU failed")]
    Vcpu(#[from] VcpuError),
    /// A device's state cannot be saved or restored.
    #[error("state of device `{id}`")]
    State {
        /// The device.
        id: String,
        /// What is wrong.
        #[source]
        source: StateError,
    },
    /// A saved VM does not fit this one.
    #[error("the saved VM does not fit: {0}")]
    Mismatch(String),
    /// The host refuses something.
    #[error("{what}")]
    Host {
        /// What was asked for.
        what: String,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The operation makes no sense for this VM.
    #[error("{0}")]
    Unsupported(String),
}

/// A device that was plugged into the machine, with what monitors show of it.
#[derive(Debug, Clone)]
pub struct Plugged {
    /// Its id: `_disk0`.
    pub id: String,
    /// Its kind: `virtio-blk`.
    pub kind: &'static str,
    /// The device as the VM keeps it.
    pub device: Arc<dyn Device>,
    /// PCI address, if it has one.
    pub bdf: Option<String>,
}

/// A VM with everything built. vCPUs stand until [`Vm::power_on`] or [`Vm::resume`].
pub struct Vm {
    config: VmConfig,
    arch: Arch,
    module: &'static dyn MachineModule,
    memory: GuestMemory,
    mmio: Arc<Bus>,
    pio: Arc<Bus>,
    clock: Arc<VmClock>,
    timers: Arc<Timers>,
    accel: Arc<dyn AccelVm>,
    // vCPUs are dropped, and so stopped, before the devices that they use.
    vcpus: Vcpus,
    machine: Box<dyn Machine>,
    plugged: RwLock<Vec<Plugged>>,
    disks: RwLock<Vec<Arc<Blk>>>,
    /// What devices that are added while it runs are built with.
    build: BuildContext,
    storage: Arc<Storage>,
    balloon: Option<Arc<holdfast_virtio::balloon::Balloon>>,
    power_button: Option<Arc<holdfast_virtio::input::PowerButton>>,
    chardevs: Vec<assemble::Chardev>,
    pager: Option<DemandPager>,
    arriving: Option<holdfast_migration::Arriving>,
}

impl fmt::Debug for Vm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Vm")
            .field("machine", &self.module.name())
            .field("accel", &self.accel.accel())
            .finish()
    }
}

impl Vm {
    /// The config that it was built from, with ids filled in.
    pub fn config(&self) -> &VmConfig {
        &self.config
    }

    /// The guest's architecture.
    pub fn arch(&self) -> Arch {
        self.arch
    }

    /// The kind of machine.
    pub fn module(&self) -> &'static dyn MachineModule {
        self.module
    }

    /// The accelerator's VM.
    pub fn accel(&self) -> &Arc<dyn AccelVm> {
        &self.accel
    }

    /// The machine.
    pub fn machine(&self) -> &dyn Machine {
        self.machine.as_ref()
    }

    /// Guest RAM.
    pub fn memory(&self) -> &GuestMemory {
        &self.memory
    }

    /// The memory and port buses.
    pub fn buses(&self) -> [(&'static str, &Arc<Bus>); 2] {
        [("memory", &self.mmio), ("I/O", &self.pio)]
    }

    /// The vCPUs.
    pub fn vcpus(&self) -> &Vcpus {
        &self.vcpus
    }

    /// Guest-virtual time.
    pub fn clock(&self) -> &Arc<VmClock> {
        &self.clock
    }

    /// Devices plugged into the machine, in order.
    pub fn plugged(&self) -> Vec<Plugged> {
        let mut all = self.plugged.read().clone();
        // The guest numbers the buses behind ports.
        if let Some(bus) = self.machine.pci_bus() {
            for plugged in all.iter_mut().filter(|p| p.bdf.is_some()) {
                plugged.bdf = plug::address_on(&bus, &plugged.id).or(plugged.bdf.take());
            }
        }
        all
    }

    /// Its disks, in order.
    pub fn disks(&self) -> Vec<Arc<Blk>> {
        self.disks.read().clone()
    }

    /// The storage graph that its disks are in.
    pub fn storage(&self) -> &Arc<Storage> {
        &self.storage
    }

    /// Opens nodes anew by other options, under the disks on them, which stand meanwhile.
    ///
    /// # Errors
    /// What the block layer says of the first that cannot be; those before are changed.
    pub fn reopen(&self, all: &[BlockdevOptions]) -> Result<(), ControlError> {
        for options in all {
            let name = options.node_name.as_deref().unwrap_or_default();
            let rests =
                |disk: &Blk| self.storage.nodes().find(&disk.node()).is_ok_and(|top| top.rests_on(name));
            let disks: Vec<_> = self.disks().into_iter().filter(|d| rests(d)).collect();
            let devices: Vec<_> =
                self.plugged().into_iter().filter(|p| disks.iter().any(|d| d.id() == p.id)).collect();
            devices.iter().for_each(|p| p.device.pause());
            disks.iter().for_each(|d| d.let_go());
            let result = self.storage.reopen(options);
            for disk in &disks {
                let _ = disk.refresh_size();
                if let Err(error) = disk.take_up() {
                    tracing::error!(disk = disk.id(), %error, "the disk has no queues any more");
                }
            }
            devices.iter().for_each(|p| p.device.resume());
            result?;
        }
        Ok(())
    }

    /// Character devices by id, with their labels.
    pub fn chardevs(&self) -> Vec<(String, String)> {
        self.chardevs.iter().map(|c| (c.id.clone(), c.backend.label())).collect()
    }

    /// The balloon, if there is one.
    pub fn balloon(&self) -> Option<&holdfast_virtio::balloon::Balloon> {
        self.balloon.as_deref()
    }

    /// Presses the power button. False if the guest has no driver that would notice.
    pub fn press_power_button(&self) -> bool {
        match &self.power_button {
            Some(button) => button.press(),
            None => self.machine.power_button(),
        }
    }

    /// All devices in the order in which they are saved: the machine's, then those plugged in.
    pub fn devices(&self) -> Vec<Arc<dyn Device>> {
        let mut all = self.machine.devices();
        all.extend(self.plugged.read().iter().map(|p| Arc::clone(&p.device)));
        all
    }

    /// Loads the payload, puts every vCPU at its start and lets the guest run.
    ///
    /// # Errors
    /// [`VmError`]; the guest does not run then.
    pub fn power_on(&self) -> Result<(), VmError> {
        self.start()?;
        self.resume()
    }

    /// Loads the payload and puts every vCPU at its start. The guest stands.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn start(&self) -> Result<(), VmError> {
        self.machine.load()?;
        self.vcpus.reset()?;
        for index in 0..self.vcpus.len() {
            let state = self.machine.start_state(index as u32, self.vcpus.state(index)?);
            self.vcpus.set_state(index, state)?;
        }
        Ok(())
    }

    /// Resets the machine as a reset button would. The guest runs afterwards if `run`.
    ///
    /// # Errors
    /// [`VmError`]; the guest stands then.
    pub fn reset(&self, run: bool) -> Result<(), VmError> {
        self.vcpus.pause()?;
        for device in self.devices() {
            device.reset();
        }
        self.start()?;
        if run { self.resume() } else { Ok(()) }
    }

    /// Stops the guest: vCPUs, then devices' I/O, then time.
    ///
    /// # Errors
    /// [`VmError`] if a vCPU does not stop.
    pub fn pause(&self) -> Result<(), VmError> {
        let mut marks = Marks::start("stopping");
        self.vcpus.pause()?;
        marks.mark("vcpus");
        for device in self.devices() {
            device.pause();
            marks.mark(device.id());
        }
        self.clock.pause();
        Ok(())
    }

    /// Lets the guest go on: time, devices, then vCPUs.
    ///
    /// # Errors
    /// [`VmError`] if a vCPU does not run.
    pub fn resume(&self) -> Result<(), VmError> {
        let mut marks = Marks::start("going on");
        for disk in self.disks.read().iter() {
            // As QEMU, which lets the guest run too: an export that has brought the disk may still be there.
            if let Err(error) = disk.claim() {
                tracing::warn!(disk = disk.id(), %error, "the disk may be written by others");
            }
        }
        self.clock.resume();
        self.timers.clock_changed();
        marks.mark("clock");
        for device in self.devices() {
            device.resume();
            marks.mark(device.id());
        }
        self.vcpus.run()?;
        marks.mark("vcpus");
        Ok(())
    }

    /// As [`Vm::resume`] for the vCPUs of which `which` says so, by index.
    ///
    /// # Errors
    /// [`VmError`] if a vCPU does not run.
    pub fn resume_some(&self, which: &[bool]) -> Result<(), VmError> {
        self.clock.resume();
        self.timers.clock_changed();
        for device in self.devices() {
            device.resume();
        }
        for (index, _) in which.iter().enumerate().filter(|(_, run)| **run) {
            self.vcpus.run_one(index)?;
        }
        Ok(())
    }

    /// The CPU shown to the guest.
    pub fn cpu_model(&self) -> CpuModel {
        self.module.default_cpu()
    }

    /// The states of all vCPUs; the VM must be paused.
    ///
    /// # Errors
    /// [`VmError`].
    pub fn vcpu_states(&self) -> Result<Vec<CpuState>, VmError> {
        Ok(self.vcpus.states()?)
    }

    /// Keeps what brings in RAM that has not come yet for as long as the VM.
    pub fn attach_arriving(&mut self, arriving: holdfast_migration::Arriving) {
        self.arriving = Some(arriving);
    }

    /// Keeps the pager of a VM that is restored on demand for as long as the VM.
    pub fn attach_pager(&mut self, pager: DemandPager) {
        self.pager = Some(pager);
    }
}

impl Drop for Vm {
    fn drop(&mut self) {
        // Devices must do no further I/O for a guest that stands; errors have nowhere to go here.
        if let Err(error) = self.vcpus.pause() {
            tracing::warn!("{error}");
        }
        for device in self.devices() {
            device.pause();
        }
        self.timers.stop();
        // Buses and devices hold each other; images and interfaces are to be free for the next VM.
        self.mmio.clear();
        self.pio.clear();
    }
}
