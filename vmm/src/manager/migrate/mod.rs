//! Migration: the manager's part, and the VM as the two ends of a migration see it.

mod announce;
mod disks;
mod ends;
mod settings;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use holdfast_config::{
    AccelChoice, MigrationMode, ReceiveMigrationData, SendMigrationData, TimeoutStrategy as Strategy,
};
use holdfast_migration::{
    Address, Control, Listener, MigrationError, Parameters, Phase, SendTo, TimeoutStrategy, Tls,
};

use holdfast_sandbox::Sandbox;

use super::lifecycle::{respond, share};
use super::{Manager, Message, Run, Stage};
use crate::confine;
use crate::control::{ControlError, ErrorKind, Event, Origin, Responder};
use crate::vm::{Host, Vm};
use ends::{Link, Newcomer};
use settings::Settings;

/// The job that takes a VM over.
pub(super) const RECEIVE: &str = "receive-migration";
/// The job that gives one away.
const SEND: &str = "send-migration";

/// The migration under way, or the last one.
#[derive(Debug, Default)]
pub(super) struct Migration {
    control: Option<Arc<Control>>,
    settings: Settings,
    /// The process was started for a VM from elsewhere that has not come yet (`--incoming`).
    expected: bool,
    announcements: announce::Announcements,
}

impl Migration {
    /// Whether the process waits for a VM from elsewhere.
    pub(super) fn expected(&self) -> bool {
        self.expected
    }

    /// There is nothing left to migrate.
    pub(super) fn guest_ended(&self) {
        if let Some(control) = &self.control {
            // Too late is fine: then the guest has gone over.
            control.cancel();
        }
    }

    /// Whether pages of the VM that is here are still coming.
    fn arriving(&self) -> bool {
        use Phase::{PostcopyActive, PostcopyPaused, PostcopyRecover};
        let phase = self.control.as_ref().map(|c| c.phase());
        matches!(phase, Some(PostcopyActive | PostcopyPaused | PostcopyRecover))
    }

    /// Whether the guest stands for the last part.
    pub(super) fn finishing(&self) -> bool {
        self.control.as_ref().is_some_and(|c| c.phase() == Phase::Device)
    }
}

/// How a migration is started.
struct Start {
    to: SendTo,
    parameters: Parameters,
    /// The process ends when the VM has moved.
    exit: bool,
    /// When it goes over to post-copy without being told.
    postcopy: Switch,
}

/// When the guest goes over before all of its RAM has.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Switch {
    /// Not before somebody says so.
    Never,
    /// Before any RAM has.
    AtOnce,
    /// After one pass, if much is left then.
    BehindFirstPass,
}

fn invalid(message: impl Into<String>) -> ControlError {
    ControlError::new(ErrorKind::Invalid, message)
}

fn address(url: &str) -> Result<Address, ControlError> {
    url.parse()
        .map_err(|e: MigrationError| ControlError::caused(ErrorKind::Invalid, "The URL is not valid", e))
}

/// The path of a socket or a file.
fn socket_path(address: &Address) -> Option<PathBuf> {
    match address {
        Address::Unix(path) | Address::File(path) => Some(path.clone()),
        _ => None,
    }
}

fn plan_send(data: &SendMigrationData) -> Result<Start, ControlError> {
    data.check().map_err(invalid)?;
    let address = address(&data.destination_url)?;
    let postcopy = data.memory_mode != MigrationMode::Precopy;
    if data.local && postcopy {
        return Err(invalid("`local` goes with `memory_mode=Precopy` only"));
    }
    if data.local && !matches!(address, Address::Unix(_)) {
        return Err(invalid("`local` needs a destination_url that begins with unix:"));
    }
    let failed = |e: MigrationError| ControlError::failed("TLS cannot be used", e);
    let tls = data.tls_dir.as_ref().map(|dir| Tls::load(dir, false)).transpose().map_err(failed)?;
    let parameters = Parameters {
        bandwidth: data.bandwidth,
        downtime: Duration::from_millis(data.downtime_ms),
        timeout: Some(Duration::from_secs(data.timeout_s)),
        strategy: match data.timeout_strategy {
            Strategy::Cancel => TimeoutStrategy::Cancel,
            Strategy::Ignore => TimeoutStrategy::Ignore,
        },
        auto_converge: data.auto_converge,
        zstd: data.zstd_level,
        ..Parameters::default()
    };
    let session = uuid::Uuid::new_v4().into_bytes();
    let (connections, local, direct) = (data.connections, data.local, data.direct_io);
    let mirror = data.mirror_disks;
    let to = SendTo { address, tls, connections, local, postcopy, mirror, direct, session };
    let postcopy = match data.memory_mode {
        MigrationMode::Precopy => Switch::Never,
        MigrationMode::Postcopy => Switch::AtOnce,
        MigrationMode::Hybrid => Switch::BehindFirstPass,
    };
    Ok(Start { to, parameters, exit: !data.preserve_source, postcopy })
}

/// Restores a VM out of a file; the guest stands. Its RAM follows as it is touched if `demand`.
pub(super) fn unpack(
    path: &Path,
    (host, sandbox): (Host, &Arc<Sandbox>),
    accel: Option<AccelChoice>,
    demand: bool,
) -> Result<Vm, MigrationError> {
    let spawner = Arc::clone(&host.spawner);
    let (host, sandbox) = (Some(host), Arc::clone(sandbox));
    let mut newcomer = Newcomer {
        config: None,
        host,
        accel,
        sandbox,
        events: None,
        vm: None,
        running: false,
        demand,
        disks: Vec::new(),
    };
    newcomer.unpack(path, &spawner)?;
    newcomer.vm.take().ok_or_else(|| MigrationError::Protocol("there is no VM".into()))
}

/// How a VM is waited for.
struct Wait {
    address: Address,
    tls: Option<Tls>,
    accel: Option<AccelChoice>,
}

fn plan_receive(data: &ReceiveMigrationData) -> Result<Wait, ControlError> {
    let failed = |e: MigrationError| ControlError::failed("TLS cannot be used", e);
    let tls = data.tls_dir.as_ref().map(|dir| Tls::load(dir, true)).transpose().map_err(failed)?;
    Ok(Wait { address: address(&data.receiver_url)?, tls, accel: data.accel.clone() })
}

impl Manager {
    /// Moves the VM elsewhere on a thread of its own, then answers.
    pub(super) fn start_send(&mut self, data: &SendMigrationData, reply: Responder<()>) {
        let start = self.movable().and_then(|_| plan_send(data));
        let reply = share(reply);
        let answer = Arc::clone(&reply);
        let started = start.and_then(|start| self.give(start, move |result| respond(&answer, result)));
        if let Err(error) = started {
            respond(&reply, Err(error));
        }
    }

    /// The VM, and whether it runs, if it can begin to move.
    fn movable(&self) -> Result<(Arc<Vm>, bool), ControlError> {
        self.idle()?;
        let vm = Arc::clone(self.built()?);
        if self.migration.arriving() {
            return Err(ControlError::new(ErrorKind::Busy, "RAM of this VM is still on its way here"));
        }
        vm.check_movable().map_err(|e| ControlError::failed("This VM cannot migrate", e))?;
        match self.stage {
            Stage::Built { run: Run::Running, .. } => Ok((vm, true)),
            Stage::Built { run: Run::Paused, .. } => Ok((vm, false)),
            _ => Err(ControlError::new(ErrorKind::Failed, "The VM neither runs nor is paused")),
        }
    }

    /// Fails if Landlock keeps the process from a UNIX socket.
    fn socket_in_reach(&self, address: &Address) -> Result<(), ControlError> {
        let Some(path) = socket_path(address) else { return Ok(()) };
        let directory = match path.parent() {
            Some(parent) if parent != Path::new("") => parent,
            _ => Path::new("."),
        };
        let reach = confine::check_output(&self.options.sandbox, directory);
        reach.map_err(|e| ControlError::failed("The socket is out of reach", e))
    }

    /// Begins to move the VM elsewhere; `done` hears how it ended.
    fn give(
        &mut self,
        start: Start,
        done: impl FnOnce(Result<(), ControlError>) + Send + 'static,
    ) -> Result<(), ControlError> {
        let (vm, running) = self.movable()?;
        self.socket_in_reach(&start.to.address)?;
        let control = Arc::new(Control::new(start.parameters));
        match start.postcopy {
            Switch::Never => {}
            Switch::AtOnce => control.start_postcopy_at_once(),
            Switch::BehindFirstPass => control.start_postcopy_if_slow(),
        }
        let mut link = Link::new(vm, running, self.wire.clone(), Arc::clone(&self.spawner));
        link.events = self.migration.settings.events().then(|| self.events.clone());
        link.ram = start.to.local;
        let exit = start.exit;
        let spawner = Arc::clone(&self.spawner);
        let watched = Arc::clone(&control);
        let work = move || holdfast_migration::send(&link, &start.to, &control, &spawner);
        self.start_job(SEND, work, move |manager, result| {
            let result = manager.sent(result.map(drop), exit);
            done(result);
        })?;
        self.migration.control = Some(watched);
        self.events.publish(Event::MigrationStarted);
        Ok(())
    }

    /// The VM has moved, or has not.
    fn sent(&mut self, result: Result<(), MigrationError>, exit: bool) -> Result<(), ControlError> {
        match result {
            Ok(()) => {
                self.events.publish(Event::MigrationFinished);
                if exit {
                    self.events.publish(Event::Shutdown(Origin::Host));
                    self.exit = Some(0);
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!("the migration failed: {}", error.describe());
                self.events.publish(Event::MigrationFailed);
                Err(ControlError::failed("The VM did not migrate", error))
            }
        }
    }

    /// Stops the guest for the last part of its migration. What it asked for until then is done first.
    fn stop_to_move(&mut self) -> Result<(), ControlError> {
        while let Stage::Built { vm, run: Run::Running } = &self.stage {
            let vm = Arc::clone(vm);
            vm.pause().map_err(|e| ControlError::failed("The VM could not be stopped", e))?;
            let mut asked = Vec::new();
            while let Ok(message) = self.messages.try_recv() {
                asked.push(message);
            }
            // A reset lets the guest run again; an end leaves another state than this one.
            let again = asked.iter().any(|m| !matches!(m, Message::Event(_)));
            asked.into_iter().for_each(|message| self.take(message));
            if !again {
                self.set_run(Run::Paused);
                self.events.publish(Event::Paused);
                return Ok(());
            }
        }
        Err(ControlError::new(ErrorKind::Failed, "The guest has ended by itself"))
    }

    fn go_on_here(&mut self) {
        let Stage::Built { vm, run: Run::Paused } = &self.stage else { return };
        if let Err(error) = vm.resume() {
            tracing::error!(%error, "the guest cannot go on after its migration failed");
            return;
        }
        self.set_run(Run::Running);
        self.events.publish(Event::Resumed);
    }

    /// Takes a VM over on a thread of its own, then answers.
    pub(super) fn start_receive(&mut self, data: &ReceiveMigrationData, reply: Responder<()>) {
        let reply = share(reply);
        let answer = Arc::clone(&reply);
        let started = self.idle().and_then(|()| match self.stage {
            Stage::Nothing => plan_receive(data),
            _ => Err(ControlError::new(ErrorKind::Failed, "VM is already created")),
        });
        let started = started.and_then(|wait| self.take_in(wait, move |_, result| respond(&answer, result)));
        if let Err(error) = started {
            respond(&reply, Err(error));
        }
    }

    /// Begins to wait for a VM from elsewhere; `done` hears how it ended. It listens when this returns.
    fn take_in(
        &mut self,
        wait: Wait,
        done: impl FnOnce(&mut Self, Result<(), ControlError>) + Send + 'static,
    ) -> Result<(), ControlError> {
        self.socket_in_reach(&wait.address)?;
        let failed = |e: MigrationError| ControlError::failed("No VM can be received", e);
        let stored = match &wait.address {
            Address::File(_) if wait.tls.is_some() => return Err(invalid("TLS does not go with a file")),
            Address::File(path) => Some(path.clone()),
            _ => None,
        };
        let listener = match stored {
            None => Some(Listener::bind(&wait.address, wait.tls).map_err(failed)?),
            Some(_) => None,
        };
        let control = Arc::new(Control::new(Parameters::default()));
        self.storage.nodes().open_inactive(true);
        let mut newcomer = Newcomer {
            config: matches!(self.stage, Stage::Created).then(|| self.config.clone()),
            host: Some(self.host()),
            accel: wait.accel,
            sandbox: Arc::clone(&self.options.sandbox),
            events: self.migration.settings.events().then(|| self.events.clone()),
            vm: None,
            running: false,
            demand: true,
            disks: Vec::new(),
        };
        let spawner = Arc::clone(&self.spawner);
        let watched = Arc::clone(&control);
        let work = move || {
            let came = match (&listener, stored) {
                (Some(listener), _) => {
                    holdfast_migration::receive(listener, &mut newcomer, &control, &spawner)
                }
                (None, path) => newcomer.load(&path.unwrap_or_default(), &control, &spawner).map(|()| None),
            };
            came.map(|arriving| {
                let mut vm = newcomer.vm.take();
                if let (Some(vm), Some(arriving)) = (&mut vm, arriving) {
                    vm.attach_arriving(arriving);
                }
                (vm, newcomer.running)
            })
        };
        self.start_job(RECEIVE, work, move |manager, result| {
            let result = manager.received(result);
            done(manager, result);
        })?;
        self.migration.control = Some(watched);
        self.events.publish(Event::MigrationReceiveStarted);
        Ok(())
    }

    fn received(&mut self, result: Result<(Option<Vm>, bool), MigrationError>) -> Result<(), ControlError> {
        const MESSAGE: &str = "No VM was received";
        // The job may have limited itself to what the config names.
        let joined = self.options.sandbox.join_limits().map_err(|e| ControlError::failed(MESSAGE, e));
        let result = result.map_err(|e| ControlError::failed(MESSAGE, e));
        let result = result.and_then(|came| joined.map(|()| came));
        let result = result.and_then(|(vm, running)| match vm {
            Some(vm) => Ok((vm, running)),
            None => Err(ControlError::new(ErrorKind::Failed, MESSAGE)),
        });
        match result {
            Ok((vm, running)) => {
                let run = if running { Run::Running } else { Run::Paused };
                self.adopt(Arc::new(vm), run, Event::MigrationReceiveFinished);
                if running {
                    self.events.publish(Event::Resumed);
                    let how = self.migration.settings.announce().clone();
                    if let Err(error) = self.announce(how) {
                        tracing::warn!("the network does not hear of the VM: {}", error.describe());
                    }
                }
                Ok(())
            }
            Err(error) => {
                tracing::warn!("{}", error.describe());
                self.events.publish(Event::MigrationReceiveFailed);
                self.storage.nodes().open_inactive(self.migration.expected);
                Err(error)
            }
        }
    }
}
