//! Migration as QMP drives it: parameters and capabilities that hold for the next migrations, and what is shown.

use std::time::Duration;

use holdfast_memory::PAGE_SIZE;
use holdfast_migration::{Address, Listener, MigrationError, Parameters, Phase, SendTo, Tls};

use super::super::{Manager, Stage};
use super::{Migration, RECEIVE, SEND, Start, Switch, Wait, address, invalid};
use crate::control::{
    AnnounceParameters, ControlError, ErrorKind, Event, MigrationCapability, MigrationCapabilityStatus,
    MigrationInfo, MigrationParameters, MigrationStats, MultifdCompression, Origin,
};

/// Capabilities that can be switched, or are always on.
const CAPABILITIES: [(MigrationCapability, bool); 9] = [
    (MigrationCapability::PostcopyRam, false),
    (MigrationCapability::AutoConverge, false),
    (MigrationCapability::Events, false),
    (MigrationCapability::PauseBeforeSwitchover, false),
    (MigrationCapability::Multifd, false),
    (MigrationCapability::MappedRam, false),
    (MigrationCapability::ReturnPath, true),
    (MigrationCapability::SwitchoverAck, true),
    (MigrationCapability::PostcopyPreempt, true),
];

/// What the next migrations are started with.
#[derive(Debug, Clone)]
pub(super) struct Settings {
    parameters: Parameters,
    channels: u32,
    zstd_level: i32,
    compression: MultifdCompression,
    multifd: bool,
    postcopy: bool,
    mapped: bool,
    direct: bool,
    events: bool,
    announce: AnnounceParameters,
    /// Id of the object with certificates; empty for no TLS.
    tls_creds: String,
    /// The name of the destination; empty for that of its address.
    tls_hostname: String,
}

impl Default for Settings {
    /// QEMU's.
    fn default() -> Self {
        let parameters = Parameters { bandwidth: 128 << 20, ..Parameters::default() };
        Self {
            parameters,
            channels: 2,
            zstd_level: 1,
            compression: MultifdCompression::None,
            multifd: false,
            postcopy: false,
            mapped: false,
            direct: false,
            events: false,
            announce: AnnounceParameters::default(),
            tls_creds: String::new(),
            tls_hostname: String::new(),
        }
    }
}

impl Settings {
    /// Whether `MIGRATION` events are wanted.
    pub(super) fn events(&self) -> bool {
        self.events
    }

    /// How a VM that has come is announced.
    pub(super) fn announce(&self) -> &AnnounceParameters {
        &self.announce
    }

    fn zstd(&self) -> Option<i32> {
        (self.multifd && self.compression == MultifdCompression::Zstd).then_some(self.zstd_level)
    }
}

/// QEMU's name of a phase.
pub(super) fn status(phase: Phase) -> &'static str {
    match phase {
        Phase::Setup => "setup",
        Phase::Active => "active",
        Phase::PreSwitchover => "pre-switchover",
        Phase::Device => "device",
        Phase::PostcopyActive => "postcopy-active",
        Phase::PostcopyPaused => "postcopy-paused",
        Phase::PostcopyRecover => "postcopy-recover",
        Phase::Cancelling => "cancelling",
        Phase::Cancelled => "cancelled",
        Phase::Failed => "failed",
        Phase::Completed => "completed",
    }
}

/// QEMU's words for a parameter that is out of range.
fn range(name: &str, expects: &str) -> ControlError {
    invalid(format!("Parameter '{name}' expects {expects}"))
}

fn within<T: PartialOrd + Copy>(
    name: &str,
    value: Option<T>,
    bounds: std::ops::RangeInclusive<T>,
    expects: &str,
) -> Result<(), ControlError> {
    match value {
        Some(value) if !bounds.contains(&value) => Err(range(name, expects)),
        _ => Ok(()),
    }
}

impl Migration {
    /// All parameters.
    pub(in super::super) fn parameters(&self) -> MigrationParameters {
        let Settings { parameters, channels, zstd_level, compression, announce, .. } = &self.settings;
        MigrationParameters {
            cpu_throttle_initial: Some(parameters.throttle_initial),
            cpu_throttle_increment: Some(parameters.throttle_increment),
            max_cpu_throttle: Some(parameters.throttle_max),
            max_bandwidth: Some(parameters.bandwidth),
            downtime_limit: Some(parameters.downtime.as_millis() as u64),
            multifd_channels: Some(*channels),
            multifd_compression: Some(*compression),
            multifd_zstd_level: Some(*zstd_level),
            tls_creds: Some(self.settings.tls_creds.clone()),
            tls_hostname: Some(self.settings.tls_hostname.clone()),
            tls_authz: Some(String::new()),
            direct_io: Some(self.settings.direct),
            announce_initial: Some(announce.initial),
            announce_max: Some(announce.max),
            announce_rounds: Some(announce.rounds),
            announce_step: Some(announce.step),
        }
    }

    /// Changes parameters, those of a migration under way as well.
    pub(in super::super) fn set_parameters(&mut self, new: &MigrationParameters) -> Result<(), ControlError> {
        const PERCENT: &str = "an integer in the range of 1 to 99";
        within("cpu_throttle_initial", new.cpu_throttle_initial, 1..=99, PERCENT)?;
        within("cpu_throttle_increment", new.cpu_throttle_increment, 1..=99, PERCENT)?;
        within("max_cpu_throttle", new.max_cpu_throttle, 1..=99, "an integer in the range of 1 to 99")?;
        within(
            "downtime_limit",
            new.downtime_limit,
            0..=2_000_000,
            "an integer in the range of 0 to 2000000 ms",
        )?;
        within("multifd_channels", new.multifd_channels, 1..=128, "a value between 1 and 128")?;
        within("multifd_zstd_level", new.multifd_zstd_level, 1..=20, "a value between 1 and 20")?;
        if new.multifd_compression == Some(MultifdCompression::Zlib) {
            return Err(ControlError::unsupported("multifd-compression=zlib"));
        }
        if new.tls_authz.as_ref().is_some_and(|id| !id.is_empty()) {
            return Err(ControlError::unsupported("tls-authz"));
        }
        let settings = &mut self.settings;
        let now = settings.announce.clone();
        let announce = AnnounceParameters {
            initial: new.announce_initial.unwrap_or(now.initial),
            max: new.announce_max.unwrap_or(now.max),
            rounds: new.announce_rounds.unwrap_or(now.rounds),
            step: new.announce_step.unwrap_or(now.step),
            ..now
        };
        announce.check()?;
        settings.announce = announce;
        let parameters = &mut settings.parameters;
        let set = |to: &mut u8, value: Option<u8>| *to = value.unwrap_or(*to);
        set(&mut parameters.throttle_initial, new.cpu_throttle_initial);
        set(&mut parameters.throttle_increment, new.cpu_throttle_increment);
        set(&mut parameters.throttle_max, new.max_cpu_throttle);
        parameters.bandwidth = new.max_bandwidth.unwrap_or(parameters.bandwidth);
        if let Some(limit) = new.downtime_limit {
            parameters.downtime = Duration::from_millis(limit);
        }
        let name = |to: &mut String, value: &Option<String>| {
            if let Some(value) = value {
                to.clone_from(value);
            }
        };
        name(&mut settings.tls_creds, &new.tls_creds);
        name(&mut settings.tls_hostname, &new.tls_hostname);
        settings.direct = new.direct_io.unwrap_or(settings.direct);
        settings.channels = new.multifd_channels.unwrap_or(settings.channels);
        settings.compression = new.multifd_compression.unwrap_or(settings.compression);
        settings.zstd_level = new.multifd_zstd_level.unwrap_or(settings.zstd_level);
        if let Some(control) = &self.control {
            let now = control.parameters();
            control.set_parameters(Parameters {
                timeout: now.timeout,
                zstd: now.zstd,
                ..settings.parameters
            });
        }
        Ok(())
    }

    fn capability(&self, capability: MigrationCapability) -> bool {
        match capability {
            MigrationCapability::AutoConverge => self.settings.parameters.auto_converge,
            MigrationCapability::Events => self.settings.events,
            MigrationCapability::PauseBeforeSwitchover => self.settings.parameters.pause_before_switchover,
            MigrationCapability::Multifd => self.settings.multifd,
            MigrationCapability::PostcopyRam => self.settings.postcopy,
            MigrationCapability::MappedRam => self.settings.mapped,
            other => CAPABILITIES.iter().any(|(c, always)| *c == other && *always),
        }
    }

    /// Those that there are.
    pub(in super::super) fn capabilities(&self) -> Vec<MigrationCapabilityStatus> {
        let status = |(capability, _): &(MigrationCapability, bool)| MigrationCapabilityStatus {
            capability: *capability,
            state: self.capability(*capability),
        };
        CAPABILITIES.iter().map(status).collect()
    }

    fn set_capability(&mut self, wanted: MigrationCapabilityStatus) {
        let settings = &mut self.settings;
        match wanted.capability {
            MigrationCapability::AutoConverge => settings.parameters.auto_converge = wanted.state,
            MigrationCapability::Events => settings.events = wanted.state,
            MigrationCapability::PauseBeforeSwitchover => {
                settings.parameters.pause_before_switchover = wanted.state;
            }
            MigrationCapability::Multifd => settings.multifd = wanted.state,
            MigrationCapability::PostcopyRam => settings.postcopy = wanted.state,
            MigrationCapability::MappedRam => settings.mapped = wanted.state,
            _ => {}
        }
    }
}

/// QEMU's name of a capability.
fn capability_name(capability: MigrationCapability) -> String {
    let name = serde_json::to_value(capability).unwrap_or_default();
    name.as_str().unwrap_or_default().to_owned()
}

impl Manager {
    /// The certificates that the parameter `tls-creds` names.
    fn migration_tls(&self, server: bool) -> Result<Option<Tls>, ControlError> {
        let Settings { tls_creds, tls_hostname, .. } = &self.migration.settings;
        if tls_creds.is_empty() {
            return Ok(None);
        }
        let wrong = |e: holdfast_objects::ObjectError| ControlError::new(ErrorKind::Failed, e.to_string());
        let creds = self.storage.objects().tls(tls_creds).map_err(wrong)?;
        let name = Some(tls_hostname.clone()).filter(|name| !name.is_empty());
        let tls = if server {
            creds.server().map(Tls::Server)
        } else {
            creds.client().map(|config| Tls::Client(config, name))
        };
        tls.map(Some).map_err(wrong)
    }

    /// Whether a migration is under way, in either direction.
    fn migrating(&self) -> bool {
        matches!(self.job, Some(SEND | RECEIVE))
    }

    /// Switches capabilities, all or none.
    pub(in super::super) fn set_capabilities(
        &mut self,
        new: &[MigrationCapabilityStatus],
    ) -> Result<(), ControlError> {
        if self.migrating() {
            return Err(ControlError::new(ErrorKind::Failed, "There's a migration process in progress"));
        }
        for wanted in new {
            let name = capability_name(wanted.capability);
            match CAPABILITIES.iter().find(|(c, _)| *c == wanted.capability) {
                None if wanted.state => {
                    return Err(ControlError::unsupported(format_args!("Capability '{name}'")));
                }
                Some((_, true)) if !wanted.state => {
                    let text = format!("Capability '{name}' cannot be switched off");
                    return Err(ControlError::new(ErrorKind::Failed, text));
                }
                _ => {}
            }
        }
        new.iter().for_each(|wanted| self.migration.set_capability(*wanted));
        Ok(())
    }

    /// `migrate`.
    pub(in super::super) fn migrate_to(
        &mut self,
        uri: &str,
        resume: bool,
        blk: bool,
    ) -> Result<(), ControlError> {
        if resume {
            return match &self.migration.control {
                Some(control) if self.job == Some(SEND) && control.phase() == Phase::PostcopyPaused => {
                    control.go_on_at(address(uri)?);
                    Ok(())
                }
                _ => {
                    Err(ControlError::new(ErrorKind::Failed, "Cannot resume if there is no paused migration"))
                }
            };
        }
        if self.migrating() {
            return Err(ControlError::new(ErrorKind::Failed, "There's a migration process in progress"));
        }
        let settings = &self.migration.settings;
        let address = address(uri)?;
        if settings.mapped && !matches!(address, Address::File(_)) {
            let text = "Migration requires seekable transport (e.g. file): mapped-ram is on";
            return Err(ControlError::new(ErrorKind::Failed, text));
        }
        let to = SendTo {
            address,
            tls: self.migration_tls(false)?,
            connections: if settings.multifd { settings.channels } else { 1 },
            local: false,
            direct: settings.direct,
            mirror: blk,
            postcopy: settings.postcopy,
            session: uuid::Uuid::new_v4().into_bytes(),
        };
        let parameters = Parameters { zstd: settings.zstd(), ..settings.parameters };
        self.give(Start { to, parameters, exit: false, postcopy: Switch::Never }, |_| {})
    }

    /// `migrate-incoming`, and `--incoming`.
    pub(in super::super) fn migrate_from(
        &mut self,
        uri: Option<&str>,
        exit: bool,
    ) -> Result<(), ControlError> {
        self.idle()?;
        if matches!(self.stage, Stage::Built { .. }) {
            return Err(ControlError::new(ErrorKind::Failed, "There is a VM already"));
        }
        let Some(uri) = uri else {
            self.migration.expected = true;
            // What is added meanwhile belongs to the VM that is to come.
            self.storage.nodes().open_inactive(true);
            // Those of its config may be exported before it comes. What cannot be opened yet is told of then.
            for options in self.config.blockdevs.iter().flatten() {
                if let Err(error) = self.storage.ensure(options) {
                    tracing::info!(
                        error = error.describe(),
                        "a node of the VM that is to come is not opened yet"
                    );
                }
            }
            return Ok(());
        };
        if !self.migration.expected && matches!(self.stage, Stage::Created) {
            let text = "'-incoming' was not specified on the command line";
            return Err(ControlError::new(ErrorKind::Failed, text));
        }
        let wait = Wait { address: address(uri)?, tls: self.migration_tls(true)?, accel: None };
        self.migration.expected = true;
        self.take_in(wait, move |manager, result| match result {
            Ok(()) => manager.migration.expected = false,
            Err(_) if exit => {
                manager.events.publish(Event::Shutdown(Origin::HostError));
                manager.exit = Some(1);
            }
            Err(_) => {}
        })
    }

    /// `migrate_cancel`.
    pub(in super::super) fn cancel_migration(&mut self) {
        if self.job == Some(SEND)
            && let Some(control) = &self.migration.control
            && !control.cancel()
        {
            tracing::info!("the VM has gone over; its migration can no longer be cancelled");
        }
    }

    /// `migrate-continue`.
    pub(in super::super) fn continue_migration(&mut self, state: &str) -> Result<(), ControlError> {
        let control = self.migration.control.as_ref().filter(|_| self.job == Some(SEND));
        let now = control.map_or("none", |c| status(c.phase()));
        match control {
            Some(control) if now == state && state == "pre-switchover" => {
                control.switch_over();
                Ok(())
            }
            _ => {
                let text = format!("Migration not in expected state: {now}");
                Err(ControlError::new(ErrorKind::Failed, text))
            }
        }
    }

    /// `migrate-start-postcopy`.
    pub(in super::super) fn start_postcopy(&mut self) -> Result<(), ControlError> {
        if !self.migration.settings.postcopy {
            let text = "Enable postcopy with migrate_set_capability before the start of migration";
            return Err(ControlError::new(ErrorKind::Failed, text));
        }
        match &self.migration.control {
            Some(control) if self.job == Some(SEND) => {
                control.start_postcopy();
                Ok(())
            }
            _ => Err(ControlError::new(
                ErrorKind::Failed,
                "Postcopy must be started after migration has been started",
            )),
        }
    }

    /// `migrate-pause`.
    pub(in super::super) fn pause_migration(&mut self) -> Result<(), ControlError> {
        if let Some(control) = self.migration.control.as_ref().filter(|c| c.phase() == Phase::PostcopyActive)
        {
            control.break_connections();
            return Ok(());
        }
        let text =
            "migrate-pause is currently only supported during postcopy-active or postcopy-recover state";
        Err(ControlError::new(ErrorKind::Failed, text))
    }

    /// `migrate-recover`.
    pub(in super::super) fn recover_migration(&mut self, uri: &str) -> Result<(), ControlError> {
        if let Some(control) = self.migration.control.as_ref().filter(|c| c.phase() == Phase::PostcopyPaused)
        {
            let address = address(uri)?;
            self.socket_in_reach(&address)?;
            let failed = |e: MigrationError| ControlError::failed("The migration cannot go on here", e);
            control.go_on_from(Listener::bind(&address, self.migration_tls(true)?).map_err(failed)?);
            return Ok(());
        }
        let text = "Migrate recover can only be run when postcopy is paused.";
        Err(ControlError::new(ErrorKind::Failed, text))
    }

    /// `query-migrate`.
    pub(in super::super) fn migration_info(&self) -> MigrationInfo {
        let Some(control) = &self.migration.control else { return MigrationInfo::default() };
        let (phase, figures) = (control.phase(), control.statistics());
        let over = matches!(phase, Phase::Completed | Phase::Failed | Phase::Cancelled);
        let ram = MigrationStats {
            transferred: figures.transferred,
            remaining: figures.remaining,
            total: figures.total,
            duplicate: figures.zero,
            normal: figures.normal,
            normal_bytes: figures.normal * PAGE_SIZE,
            dirty_pages_rate: figures.dirty_rate,
            mbps: figures.rate as f64 * 8.0 / 1e6,
            dirty_sync_count: figures.passes,
            postcopy_requests: figures.requests,
            page_size: PAGE_SIZE,
        };
        MigrationInfo {
            status: Some(status(phase).to_owned()),
            ram: (figures.total > 0).then_some(ram),
            total_time: Some(figures.elapsed),
            expected_downtime: (!over && figures.passes > 0).then_some(figures.expected_downtime),
            downtime: (phase == Phase::Completed).then_some(figures.downtime),
            setup_time: Some(figures.setup),
            cpu_throttle_percentage: (figures.throttle > 0).then_some(figures.throttle),
            postcopy_latency: figures.latency.mean(),
            postcopy_latency_dist: (figures.latency.count() > 0).then(|| figures.latency.buckets.to_vec()),
            error_desc: control.error().filter(|_| phase != Phase::Completed),
        }
    }
}
