//! The VM as the two ends of a migration see it.

use std::error::Error;
use std::io;
use std::os::fd::{OwnedFd, RawFd};
use std::path::Path;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use holdfast_block::BlockNode;
use holdfast_block::nodes::NamedNode;
use holdfast_config::VmConfig;
use holdfast_memory::{GuestMemory, PAGE_SIZE};
use holdfast_migration::mapped::Mapped;
use holdfast_migration::{Control, MigrationError, MirroredDisk, Phase, Plan, RunningCode, Source, Target};
use holdfast_objects::DbusVmState;
use holdfast_sandbox::Sandbox;
use holdfast_threads::{Role, Spawner};

use super::super::{Manager, Run, Wire};
use super::disks;
use super::settings::status;
use crate::confine;
use crate::control::{Event, EventBus};
use crate::snapshot::ram::{self, DemandPager};
use crate::snapshot::{SavedVm, helpers};
use crate::storage::LoggedDisk;
use crate::vm::{Host, Vm, ahead};

type Failure = Box<dyn Error + Send + Sync>;

/// How long vCPUs run between two rests when they are slowed.
const RUN: Duration = Duration::from_millis(10);

/// The VM at the source, as the migration's thread sees it.
pub(super) struct Link {
    pub(super) vm: Arc<Vm>,
    pub(super) running: bool,
    /// Its RAM goes with it.
    pub(super) ram: bool,
    pub(super) wire: Wire,
    pub(super) spawner: Arc<dyn Spawner>,
    /// Where the status is published, if somebody wants to know.
    pub(super) events: Option<EventBus>,
    /// Percent of the time that vCPUs stand.
    throttle: Arc<AtomicU8>,
    throttling: AtomicBool,
    /// Disks that go along.
    disks: OnceLock<Vec<Arc<LoggedDisk>>>,
    /// Helpers whose state goes along: those of the object that was there when the migration began.
    helpers: Option<Arc<DbusVmState>>,
}

impl Link {
    pub(super) fn new(vm: Arc<Vm>, running: bool, wire: Wire, spawner: Arc<dyn Spawner>) -> Self {
        let helpers = vm.storage().objects().dbus_vmstate();
        Self {
            vm,
            running,
            ram: false,
            wire,
            spawner,
            events: None,
            throttle: Arc::default(),
            throttling: AtomicBool::new(false),
            disks: OnceLock::new(),
            helpers,
        }
    }

    /// Runs `what` on the manager's thread.
    fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Manager) -> T + Send + 'static,
    ) -> Result<T, Failure> {
        self.wire.ask(what).ok_or_else(|| "the VM manager has ended".into())
    }
}

impl Source for Link {
    fn memory(&self) -> GuestMemory {
        self.vm.memory().clone()
    }

    fn plan(&self) -> Result<Plan, Failure> {
        // Devices may have been added since the VM was built.
        let config = self.ask(|manager| manager.config.clone())?;
        let mut plan = self.vm.plan(&config, self.running)?;
        plan.helpers = helpers::ids(self.helpers.as_deref())?;
        Ok(plan)
    }

    fn ram_files(&self) -> Result<Vec<RawFd>, Failure> {
        Ok(self.vm.ram_files()?)
    }

    fn start_log(&self) -> Result<(), Failure> {
        Ok(self.vm.accel().start_dirty_log()?)
    }

    fn sync_log(&self) -> Result<(), Failure> {
        Ok(self.vm.accel().sync_dirty_log()?)
    }

    fn stop_log(&self) {
        if let Err(error) = self.vm.accel().stop_dirty_log() {
            tracing::warn!(%error, "the log of writes to RAM cannot be ended");
        }
    }

    fn note_code(&self) {
        self.vm.accel().note_running_code();
    }

    fn running_code(&self) -> RunningCode {
        let places = self.vm.accel().running_code(ahead::MOST);
        let mut pages: Vec<u64> = places.iter().map(|place| place.gpa / PAGE_SIZE * PAGE_SIZE).collect();
        pages.sort_unstable();
        pages.dedup();
        RunningCode { pages, places: ahead::encode(&places) }
    }

    fn throttle(&self, percent: u8) {
        self.throttle.store(percent, Ordering::Release);
        if percent == 0 || self.throttling.swap(true, Ordering::AcqRel) {
            return;
        }
        let (throttle, vm) = (Arc::clone(&self.throttle), Arc::downgrade(&self.vm));
        let body = move || {
            loop {
                let percent = u32::from(throttle.load(Ordering::Acquire).min(99));
                let Some(vm) = vm.upgrade().filter(|_| percent > 0) else { return };
                let rest = RUN * percent / (100 - percent);
                vm.vcpus().rest(rest.as_nanos() as u64);
                drop(vm);
                std::thread::sleep(rest + RUN);
            }
        };
        if let Err(error) = self.spawner.spawn("throttle", Role::Migration, Box::new(body)) {
            tracing::warn!(%error, "vCPUs cannot be slowed");
        }
    }

    fn mirror(&self) -> Result<Vec<MirroredDisk>, Failure> {
        let disks = disks::leaving(&self.vm)?;
        Ok(self.disks.get_or_init(|| disks).iter().map(|disk| disks::describe(disk)).collect())
    }

    fn log_disks(&self, on: bool) -> Result<(), Failure> {
        let disks = self.disks.get().cloned().unwrap_or_default();
        // There nobody stops or resets the guest meanwhile.
        self.ask(move |manager| disks.iter().for_each(|disk| disk.note(on, manager.devices_work())))
    }

    fn take_written(&self, disk: usize) -> Result<Vec<(u64, u64)>, Failure> {
        let disk = self.disks.get().and_then(|all| all.get(disk)).ok_or("there is no such disk")?;
        Ok(disk.log.take())
    }

    fn read_disk(&self, disk: usize, offset: u64, to: &mut [u8]) -> Result<(), Failure> {
        let disk = self.disks.get().and_then(|all| all.get(disk)).ok_or("there is no such disk")?;
        Ok(disk.node.read_at(offset, to)?)
    }

    fn stop(&self) -> Result<(), Failure> {
        if !self.running {
            return Ok(());
        }
        Ok(self.ask(Manager::stop_to_move)??)
    }

    fn save(&self) -> Result<Vec<u8>, Failure> {
        let mut saved = self.vm.save()?;
        helpers::save(self.helpers.as_deref(), &mut saved)?;
        Ok(serde_json::to_vec(&saved)?)
    }

    fn give_up(&self) -> Result<(), Failure> {
        self.ask(|manager| manager.no_active_jobs())??;
        Ok(self.vm.storage().nodes().inactivate()?)
    }

    fn take_back(&self) -> Result<(), Failure> {
        Ok(self.vm.storage().nodes().activate()?)
    }

    fn go_on(&self) {
        if self.running
            && let Err(error) = self.ask(Manager::go_on_here)
        {
            tracing::error!("{error}");
        }
    }

    fn moved(&self) {
        let ram = self.ram;
        if let Err(error) = self.ask(move |manager| manager.set_run(Run::Moved { ram })) {
            tracing::error!("{error}");
        }
    }

    fn entered(&self, phase: Phase) {
        tracing::info!(?phase, "migration");
        if let Some(events) = &self.events {
            events.publish(Event::MigrationStatus(status(phase)));
        }
    }

    fn passed(&self, pass: u64) {
        tracing::debug!(pass, "migration");
        if let Some(events) = &self.events {
            events.publish(Event::MigrationPass(pass));
        }
    }
}

/// The VM at the target.
pub(super) struct Newcomer {
    pub(super) host: Option<Host>,
    /// The VM's config; `None` for that of the source.
    pub(super) config: Option<VmConfig>,
    pub(super) accel: Option<holdfast_config::AccelChoice>,
    pub(super) sandbox: Arc<Sandbox>,
    pub(super) events: Option<EventBus>,
    pub(super) vm: Option<Vm>,
    pub(super) running: bool,
    /// RAM out of a file comes as the guest touches it.
    pub(super) demand: bool,
    /// Disks that come along.
    pub(super) disks: Vec<Arc<NamedNode>>,
}

impl Newcomer {
    /// Takes the VM out of a file; its RAM follows as the guest touches it, where the host can do that.
    pub(super) fn load(
        &mut self,
        path: &Path,
        control: &Control,
        spawner: &Arc<dyn Spawner>,
    ) -> Result<(), MigrationError> {
        control.enter(Phase::Active);
        self.entered(Phase::Active);
        let result = self.unpack(path, spawner).and_then(|()| {
            let run = if self.running { self.run() } else { Ok(()) };
            run.map_err(|source| MigrationError::Vm { what: "the guest does not run", source })
        });
        let phase = match &result {
            Ok(()) => Phase::Completed,
            Err(error) => {
                control.set_error(error.describe());
                Phase::Failed
            }
        };
        control.enter(phase);
        self.entered(phase);
        result
    }

    pub(super) fn unpack(&mut self, path: &Path, spawner: &Arc<dyn Spawner>) -> Result<(), MigrationError> {
        let Mapped { plan, state, file, ram_at } = Mapped::open(path)?;
        let vm = |what| move |source| MigrationError::Vm { what, source };
        let memory = self.build(&plan, Vec::new()).map_err(vm("the stored VM does not fit"))?;
        // The pager knows pages of 4 KiB.
        let small = self.demand && !self.vm().map_err(vm("there is no VM"))?.config().memory.hugepages;
        let copy = if small { file.try_clone() } else { Err(io::ErrorKind::Unsupported.into()) };
        let pager =
            copy.and_then(|copy| DemandPager::start_at(&memory, (copy, ram_at), true, spawner.as_ref()));
        match (pager, &mut self.vm) {
            (Ok(pager), Some(vm)) => vm.attach_pager(pager),
            (Err(error), _) => {
                tracing::info!(%error, "RAM is read before the guest runs");
                let read = ram::load_at(&memory, &file, ram_at);
                read.map_err(|e| MigrationError::vm("RAM cannot be read from the file", e))?;
            }
            (Ok(_), None) => {}
        }
        self.restore(&state).map_err(vm("the stored VM cannot be restored"))?;
        self.take_over().map_err(vm("the stored VM cannot be taken over"))?;
        Ok(())
    }

    fn vm(&self) -> Result<&Vm, Failure> {
        self.vm.as_ref().ok_or_else(|| "there is no VM yet".into())
    }
}

impl Target for Newcomer {
    fn build(&mut self, plan: &Plan, files: Vec<OwnedFd>) -> Result<GuestMemory, Failure> {
        let mut host = self.host.take().ok_or("there was a VM already")?;
        let mut config = match self.config.take() {
            Some(config) => config,
            None => VmConfig::from_json(&serde_json::to_vec(&plan.config)?)?,
        };
        if let Some(accel) = &self.accel {
            config.accel = accel.clone();
        }
        config.validate_for_boot()?;
        confine::check(&self.sandbox, &config, None)?;
        helpers::check(host.storage.objects(), &plan.helpers)?;
        if !plan.mirror.is_empty() {
            // These images are nobody else's.
            disks::make_images(&config, &plan.mirror, &host.spawner)?;
            host.storage.nodes().activate()?;
        }
        confine::limit_paths(&self.sandbox, &config, None)?;
        host.incoming = true;
        host.ram_files = files.into_iter().map(Into::into).collect();
        let vm = Vm::build(config, host)?;
        vm.check_plan(plan)?;
        self.disks = disks::arriving(&vm, &plan.mirror)?;
        self.running = plan.running;
        let memory = vm.memory().clone();
        self.vm = Some(vm);
        Ok(memory)
    }

    fn images(&self) -> Result<Vec<Arc<dyn BlockNode>>, Failure> {
        Ok(self.disks.iter().map(|disk| Arc::clone(disk) as Arc<dyn BlockNode>).collect())
    }

    fn prepare_code(&mut self, places: &[u8]) {
        if let Some(vm) = &self.vm {
            vm.vcpus().translate_ahead(ahead::decode(places));
        }
    }

    fn wait_for_code(&mut self, patience: Duration) {
        if let Some(vm) = &self.vm {
            vm.vcpus().wait_ahead(patience);
        }
    }

    fn end_code(&mut self) {
        if let Some(vm) = &self.vm {
            vm.vcpus().end_ahead();
        }
    }

    fn restore(&mut self, state: &[u8]) -> Result<(), Failure> {
        let saved: SavedVm = serde_json::from_slice(state)?;
        saved.check_version()?;
        let vm = self.vm()?;
        vm.restore(&saved)?;
        Ok(helpers::load(vm.storage().objects(), &saved)?)
    }

    fn take_over(&mut self) -> Result<(), Failure> {
        let vm = self.vm()?;
        let nodes = vm.storage().nodes();
        nodes.activate()?;
        let sizes = vm.disks().iter().try_for_each(|disk| disk.refresh_size().map(drop));
        if sizes.is_err() {
            // The source has to get them back.
            nodes.inactivate()?;
        }
        Ok(sizes?)
    }

    fn run(&mut self) -> Result<(), Failure> {
        // It belongs to this process now and must not be lost, whether it runs or not.
        if let Err(error) = self.vm()?.resume() {
            tracing::error!(%error, "the guest that has come does not run");
            self.running = false;
        }
        Ok(())
    }

    fn watcher(&self) -> Box<dyn FnMut(Phase) + Send> {
        let events = self.events.clone();
        Box::new(move |phase| {
            tracing::info!(?phase, "migration");
            if let Some(events) = &events {
                events.publish(Event::MigrationStatus(status(phase)));
            }
        })
    }

    fn entered(&mut self, phase: Phase) {
        tracing::info!(?phase, "migration");
        if let Some(events) = &self.events {
            events.publish(Event::MigrationStatus(status(phase)));
        }
    }
}
