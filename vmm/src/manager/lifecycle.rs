//! Building, running and ending a VM.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use holdfast_config::{MemoryRestoreMode, RestoreConfig, VmConfig};

use holdfast_sandbox::Sandbox;

use super::{Manager, Run, Stage, TapFds, migrate};
use crate::confine;
use crate::control::{ControlError, ErrorKind, Event, Origin, Responder};
use crate::snapshot::ram::{self, DemandPager};
use crate::snapshot::{SavedVm, SnapshotDir, helpers};
use crate::vm::{Host, Vm};

/// Shorthand: the operation failed for this reason.
fn failed<E: std::error::Error + Send + Sync + 'static>(
    message: &str,
) -> impl FnOnce(E) -> ControlError + use<'_, E> {
    move |error| ControlError::failed(message, error)
}

impl Manager {
    /// Builds the VM and lets it run, then answers.
    pub(super) fn start_boot(&mut self, reply: Responder<()>) {
        let checked = self.idle().and_then(|()| match self.stage {
            Stage::Nothing => Err(ControlError::not_created()),
            Stage::Built { .. } => Err(ControlError::new(ErrorKind::Failed, "VM is already running")),
            Stage::Created => self.config.validate_for_boot().map_err(ControlError::from),
        });
        // On this thread, so that every later job is limited as well.
        let limit = || confine::limit_paths(&self.options.sandbox, &self.config, None);
        let checked = checked.and_then(|()| limit().map_err(failed("The VM could not be confined")));
        if let Err(error) = checked {
            return reply.respond(Err(error));
        }
        self.events.publish(Event::Booting);
        let (config, host) = (self.config.clone(), self.host());
        let (debug, wait) = (self.options.debug, self.options.debug_wait);
        let work = move || -> Result<Arc<Vm>, ControlError> {
            let vm = Vm::build(config, host).map_err(failed("The VM could not boot"))?;
            if debug {
                vm.accel().can_debug().map_err(failed("--gdb cannot work with this VM"))?;
            }
            let started = if wait { vm.start() } else { vm.power_on() };
            started.map_err(failed("The VM could not boot"))?;
            Ok(Arc::new(vm))
        };
        let reply = share(reply);
        let answer = Arc::clone(&reply);
        let started = self.start_job("boot", work, move |manager, result| {
            let result = result.map(|vm| {
                manager.adopt(vm, if wait { Run::Debug } else { Run::Running }, Event::Booted);
            });
            respond(&answer, result);
        });
        if let Err(error) = started {
            respond(&reply, Err(error));
        }
    }

    /// Takes a VM that a job has built.
    pub(super) fn adopt(&mut self, vm: Arc<Vm>, run: Run, event: Event) {
        self.config = vm.config().clone();
        for id in 0..vm.vcpus().len() {
            self.events.publish(Event::CreateVcpu { id: id as u32 });
        }
        self.stage = Stage::Built { vm, run };
        self.events.publish(event);
    }

    pub(super) fn pause_vm(&mut self) -> Result<(), ControlError> {
        self.idle()?;
        let vm = self.built_and(Run::Running, "VM is not running")?;
        self.events.publish(Event::Pausing);
        vm.pause().map_err(failed("The VM could not be paused"))?;
        self.set_run(Run::Paused);
        self.events.publish(Event::Paused);
        self.tell_stopped();
        Ok(())
    }

    pub(super) fn resume_vm(&mut self) -> Result<(), ControlError> {
        self.idle()?;
        self.not_debugged()?;
        let vm = match &self.stage {
            Stage::Built { vm, run: Run::Debug } => Arc::clone(vm),
            Stage::Built { vm, run: Run::Moved { ram: false } } => Arc::clone(vm),
            Stage::Built { run: Run::Moved { ram: true }, .. } => {
                let text = "The VM has moved to another process together with its RAM";
                return Err(ControlError::new(ErrorKind::Failed, text));
            }
            Stage::Built { vm, run: Run::IoError } => Arc::clone(vm),
            _ => self.built_and(Run::Paused, "VM is not paused")?,
        };
        // After a migration whose end is not known, or that was undone by hand, they may have been given up.
        vm.storage().nodes().activate().map_err(failed("The VM could not be resumed"))?;
        self.events.publish(Event::Resuming);
        vm.resume().map_err(failed("The VM could not be resumed"))?;
        self.set_run(Run::Running);
        self.events.publish(Event::Resumed);
        Ok(())
    }

    pub(super) fn reset(&mut self, origin: Origin) -> Result<(), ControlError> {
        self.idle()?;
        self.reset_now(origin)
    }

    /// Resets the machine, whatever job is under way.
    pub(super) fn reset_now(&mut self, origin: Origin) -> Result<(), ControlError> {
        let vm = Arc::clone(self.built()?);
        if matches!(self.stage, Stage::Built { run: Run::Moved { .. }, .. }) {
            return Err(ControlError::new(ErrorKind::Failed, "The VM has moved to another process"));
        }
        let stands = match self.stage {
            Stage::Built { run: run @ (Run::Paused | Run::Debug | Run::IoError), .. } => Some(run),
            _ => None,
        };
        let run = stands.is_none();
        self.events.publish(Event::Rebooting);
        vm.reset(run).map_err(failed("The VM could not be reset"))?;
        self.set_run(stands.unwrap_or(Run::Running));
        self.events.publish(Event::Rebooted(origin));
        Ok(())
    }

    /// Ends the VM and keeps its config.
    pub(super) fn switch_off(&mut self, origin: Origin) -> Result<(), ControlError> {
        self.idle()?;
        self.built()?;
        self.end_debugging(0);
        self.end_jobs(None);
        self.stage = Stage::Created;
        self.events.publish(Event::Shutdown(origin));
        Ok(())
    }

    /// Saves the paused VM on a thread of its own, then answers.
    pub(super) fn start_snapshot(&mut self, directory: Option<&Path>, reply: Responder<()>) {
        let checked = self.idle().and_then(|()| {
            let vm = self.built_and(Run::Paused, "VM must be paused before it is snapshotted")?;
            let invalid = || {
                ControlError::new(ErrorKind::Failed, "destination_url is not file:// and an absolute path")
            };
            let directory = directory.ok_or_else(invalid)?;
            let reach = confine::check_output(&self.options.sandbox, directory);
            reach.map_err(failed("The VM could not be saved"))?;
            let dir = SnapshotDir::open(directory).map_err(failed("The VM could not be saved"))?;
            Ok((vm, dir))
        });
        let (vm, dir) = match checked {
            Ok(checked) => checked,
            Err(error) => return reply.respond(Err(error)),
        };
        self.events.publish(Event::Snapshotting);
        let config = self.config.clone();
        let object = self.storage.objects().dbus_vmstate();
        let work = move || -> Result<(), ControlError> {
            let mut saved = vm.save().map_err(failed("The VM could not be saved"))?;
            helpers::save(object.as_deref(), &mut saved).map_err(failed("The VM could not be saved"))?;
            let write = |file: &std::fs::File| ram::save(vm.memory(), file);
            dir.write(&config, &saved, write).map_err(failed("The VM could not be saved"))
        };
        let reply = share(reply);
        let answer = Arc::clone(&reply);
        let started = self.start_job("snapshot", work, move |manager, result| {
            if result.is_ok() {
                manager.events.publish(Event::Snapshotted);
            }
            respond(&answer, result);
        });
        if let Err(error) = started {
            respond(&reply, Err(error));
        }
    }

    /// Restores a VM on a thread of its own, then answers.
    pub(super) fn start_restore(&mut self, config: RestoreConfig, fds: Vec<OwnedFd>, reply: Responder<()>) {
        let checked = self.idle().and_then(|()| match self.stage {
            Stage::Nothing => Ok(()),
            _ => Err(ControlError::new(ErrorKind::Failed, "VM is already created")),
        });
        if let Err(error) = checked {
            return reply.respond(Err(error));
        }
        self.events.publish(Event::Restoring);
        self.tap_fds = sort_fds(&config, fds);
        let host = self.host();
        let sandbox = Arc::clone(&self.options.sandbox);
        let resume = config.resume;
        let work = move || -> Result<Arc<Vm>, ControlError> {
            let vm = restore(&config, host, &sandbox)?;
            if resume {
                vm.resume().map_err(failed("The VM could not be resumed"))?;
            }
            Ok(Arc::new(vm))
        };
        let reply = share(reply);
        let answer = Arc::clone(&reply);
        let started = self.start_job("restore", work, move |manager, result| {
            // The job may have limited itself to what the snapshot's config names.
            let joined = manager.options.sandbox.join_limits();
            let joined = joined.map_err(failed("The VM manager could not be confined"));
            let result = result.and_then(|vm| joined.map(|()| vm));
            let run = if resume { Run::Running } else { Run::Paused };
            let result = result.map(|vm| manager.adopt(vm, run, Event::Restored));
            respond(&answer, result);
        });
        if let Err(error) = started {
            respond(&reply, Err(error));
        }
    }
}

/// A responder that a job may answer, or, if the job cannot start, its starter.
pub(super) type Shared = Arc<parking_lot::Mutex<Option<Responder<()>>>>;

pub(super) fn share(reply: Responder<()>) -> Shared {
    Arc::new(parking_lot::Mutex::new(Some(reply)))
}

pub(super) fn respond(reply: &Shared, result: Result<(), ControlError>) {
    if let Some(reply) = reply.lock().take() {
        reply.respond(result);
    }
}

/// Which of the message's descriptors belong to which network device.
fn sort_fds(config: &RestoreConfig, fds: Vec<OwnedFd>) -> TapFds {
    let mut fds = fds.into_iter();
    let nets = config.net_fds.iter().flatten();
    nets.map(|net| (net.id.clone(), fds.by_ref().take(net.num_fds).collect())).collect()
}

/// Restores a VM that was migrated into a file. It stands, whether it ran or not.
fn unpack(
    config: &RestoreConfig,
    path: &Path,
    host: Host,
    sandbox: &Arc<Sandbox>,
) -> Result<Vm, ControlError> {
    const MESSAGE: &str = "The VM could not be restored";
    if config.prefault {
        let text = "prefault=on is not supported with a VM in a file";
        return Err(ControlError::new(ErrorKind::Failed, text));
    }
    let demand = config.memory_restore_mode == MemoryRestoreMode::OnDemand;
    let vm = migrate::unpack(path, (host, sandbox), config.accel.clone(), demand);
    vm.map_err(failed(MESSAGE))
}

fn restore(config: &RestoreConfig, host: Host, sandbox: &Arc<Sandbox>) -> Result<Vm, ControlError> {
    const MESSAGE: &str = "The VM could not be restored";
    let invalid = || ControlError::new(ErrorKind::Failed, "source_url is not file:// and an absolute path");
    let path = config.directory().ok_or_else(invalid)?;
    if path.is_file() {
        return unpack(config, &path, host, sandbox);
    }
    let dir = SnapshotDir::open(&path).map_err(failed(MESSAGE))?;
    let saved: SavedVm = dir.state().map_err(failed(MESSAGE))?;
    let mut vm_config: VmConfig = dir.config().map_err(failed(MESSAGE))?;
    if let Some(accel) = &config.accel {
        vm_config.accel = accel.clone();
    }
    if config.prefault {
        if config.memory_restore_mode == MemoryRestoreMode::OnDemand {
            let text = "prefault=on and memory_restore_mode=OnDemand exclude each other";
            return Err(ControlError::new(ErrorKind::Failed, text));
        }
        vm_config.memory.prefault = true;
    }
    vm_config.validate_for_boot().map_err(failed(MESSAGE))?;
    confine::check(sandbox, &vm_config, Some(&path)).map_err(failed(MESSAGE))?;
    confine::limit_paths(sandbox, &vm_config, Some(&path)).map_err(failed(MESSAGE))?;
    helpers::check(host.storage.objects(), saved.helpers.iter().map(|h| &h.id)).map_err(failed(MESSAGE))?;
    let file = dir.ram().map_err(failed(MESSAGE))?;
    let spawner = Arc::clone(&host.spawner);
    let mut vm = Vm::build(vm_config, host).map_err(failed(MESSAGE))?;
    match config.memory_restore_mode {
        MemoryRestoreMode::Copy => ram::load(vm.memory(), &file).map_err(failed(MESSAGE))?,
        MemoryRestoreMode::OnDemand => {
            let pager =
                DemandPager::start(vm.memory(), file, true, spawner.as_ref()).map_err(failed(MESSAGE))?;
            vm.attach_pager(pager);
        }
    }
    vm.restore(&saved).map_err(failed(MESSAGE))?;
    helpers::load(vm.storage().objects(), &saved).map_err(failed(MESSAGE))?;
    Ok(vm)
}
