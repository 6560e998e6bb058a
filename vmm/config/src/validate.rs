//! What a configuration must satisfy. All problems are found at once.

use std::collections::HashSet;

use holdfast_virtio::FieldError;
use holdfast_virtio::blk::config::DiskConfig;
use holdfast_virtio::console::MAX_PORTS;
use holdfast_virtio::console::config::ConsoleMode;
use holdfast_virtio::net::config::NetConfig;

use crate::{ConfigError, FsConfig, GenericVhostUserConfig, IrqChipMode, Problems, VmConfig, VsockConfig};

/// Most vCPUs of any machine; each machine has its own, lower limit.
const MAX_VCPUS: u32 = 8192;
/// Page size of guest RAM.
const PAGE: u64 = 4096;
/// Longest identifier of a device.
const MAX_ID: usize = 64;

impl VmConfig {
    /// Checks everything that can be checked without opening anything. What the guest boots from is
    /// not looked at: see [`VmConfig::validate_for_boot`].
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems.
    pub fn validate(&self) -> Result<(), ConfigError> {
        let mut problems = Problems::default();
        self.check_cpus(&mut problems);
        self.check_memory(&mut problems);
        self.check_devices(&mut problems);
        self.check_consoles(&mut problems);
        self.check_platform(&mut problems);
        self.check_tcg_log(&mut problems);
        problems.into_result()
    }

    /// [`VmConfig::validate`], and there is something to boot.
    ///
    /// # Errors
    /// [`ConfigError::Invalid`] with all problems.
    pub fn validate_for_boot(&self) -> Result<(), ConfigError> {
        let mut problems = match self.validate() {
            Err(ConfigError::Invalid(problems)) => problems,
            other => {
                other?;
                Problems::default()
            }
        };
        let payload = self.payload.clone().unwrap_or_default();
        if !payload.is_bootable() && self.pflash().is_empty() {
            problems.add("payload", "names neither a kernel nor a firmware to boot");
        }
        if payload.initramfs.is_some() && payload.kernel.is_none() {
            problems.add("payload.initramfs", "needs a kernel that takes it");
        }
        problems.into_result()
    }

    fn check_tcg_log(&self, problems: &mut Problems) {
        let Some(log) = &self.tcg_log else { return };
        if !(log.guest || log.ir || log.host || log.int) {
            problems.add("tcg_log", "logs nothing; switch on guest, ir, host or int");
        }
        if let Err(reason) = log.range() {
            problems.add("tcg_log.filter", reason);
        }
        if log.file.as_os_str().is_empty() {
            problems.add("tcg_log.file", "is empty");
        }
    }

    fn check_profile(&self, profile: &str, problems: &mut Problems) {
        if self.guest_arch() != holdfast_arch::Arch::X86_64 {
            problems.add("cpus.profile", "is for x86_64 guests");
        } else if let Err(reason) = holdfast_arch::x86_64::features::parse(profile) {
            problems.add("cpus.profile", reason.to_string());
        }
    }

    fn check_cpus(&self, problems: &mut Problems) {
        let cpus = &self.cpus;
        let max = cpus.max();
        if cpus.boot_vcpus == 0 {
            problems.add("cpus.boot_vcpus", "is 0; a VM needs at least one");
        }
        if let Some(profile) = &cpus.profile {
            self.check_profile(profile, problems);
        }
        if max < cpus.boot_vcpus {
            let reason = format!("is {max}, less than boot_vcpus, which is {}", cpus.boot_vcpus);
            problems.add("cpus.max_vcpus", reason);
        }
        if max > MAX_VCPUS {
            problems.add("cpus.max_vcpus", format!("is {max}; at most {MAX_VCPUS} are possible"));
        }
        if let Some(topology) = &cpus.topology
            && topology.vcpus() != u64::from(max)
        {
            let product = topology.vcpus();
            let reason = format!("makes {product} vCPUs of its four factors; max_vcpus is {max}");
            problems.add("cpus.topology", reason);
        }
        let mut seen = HashSet::new();
        for (i, affinity) in cpus.affinity.iter().flatten().enumerate() {
            if affinity.vcpu >= max {
                let reason = format!("is {}; the last vCPU is {}", affinity.vcpu, max.saturating_sub(1));
                problems.add(format!("cpus.affinity[{i}].vcpu"), reason);
            }
            if !seen.insert(affinity.vcpu) {
                problems.add(format!("cpus.affinity[{i}].vcpu"), "is named twice");
            }
            if affinity.host_cpus.is_empty() {
                problems.add(format!("cpus.affinity[{i}].host_cpus"), "is empty; name at least one CPU");
            }
        }
    }

    fn check_memory(&self, problems: &mut Problems) {
        let memory = &self.memory;
        if memory.size == 0 || !memory.size.is_multiple_of(PAGE) {
            let reason = format!("is {}; it must be a multiple of {PAGE} above 0", memory.size);
            problems.add("memory.size", reason);
        }
        let Some(page) = memory.hugepage_size else { return };
        if !memory.hugepages {
            problems.add("memory.hugepage_size", "needs hugepages=on");
        }
        if !page.is_power_of_two() || page <= PAGE {
            problems.add("memory.hugepage_size", format!("is {page}; try 2M or 1G"));
        } else if !memory.size.is_multiple_of(page) {
            problems.add("memory.size", format!("is not a multiple of hugepage_size, which is {page}"));
        }
    }

    fn check_devices(&self, problems: &mut Problems) {
        for (i, disk) in self.disks().iter().enumerate() {
            note(&format!("disks[{i}]"), disk.validate(), problems);
        }
        self.check_blockdevs(problems);
        for (i, net) in self.net().iter().enumerate() {
            note(&format!("net[{i}]"), net.validate(), problems);
        }
        for (i, fs) in self.fs().iter().enumerate() {
            note(&format!("fs[{i}]"), fs.validate(), problems);
        }
        for (i, device) in self.generic_vhost_user().iter().enumerate() {
            note(&format!("generic_vhost_user[{i}]"), device.validate(), problems);
        }
        let served = !self.fs().is_empty()
            || !self.generic_vhost_user().is_empty()
            || self.disks().iter().any(|disk| disk.vhost_user)
            || self.net().iter().any(|net| net.vhost_user);
        if served && !self.memory.shared {
            problems.add(
                "memory.shared",
                "is off; vhost-user back ends need RAM that they can map (`shared=on`)",
            );
        }
        if let Some(vsock) = &self.vsock {
            note("vsock", vsock.validate(), problems);
        }
        note("rng", self.rng.validate(), problems);
        note("console", self.console.validate(), problems);
        if let Some(balloon) = &self.balloon {
            note("balloon", balloon.validate(), problems);
            if balloon.size > self.memory.size {
                problems.add("balloon.size", format!("is {}, more than memory.size", balloon.size));
            }
        }
        self.check_board(problems);
        let mut seen = HashSet::new();
        for (field, id) in self.named_devices() {
            // A configuration that was read back carries the names that Holdfast gave itself.
            let own = matches!(
                (field.as_str(), id),
                ("console.id", "__console") | ("rng.id", "__rng") | ("balloon.id", "__balloon")
            );
            if !own && let Err(reason) = check_id(id) {
                problems.add(field.clone(), reason);
            }
            if !seen.insert(id) {
                problems.add(field, format!("is `{id}`, which another device has"));
            }
        }
    }

    fn check_blockdevs(&self, problems: &mut Problems) {
        let mut seen = HashSet::new();
        for (i, options) in self.blockdevs().iter().enumerate() {
            let field = |name: &str| format!("blockdevs[{i}].{name}");
            match &options.node_name {
                None => problems.add(field("node-name"), "is missing; a node needs one"),
                Some(name) if !seen.insert(name) => {
                    problems.add(field("node-name"), format!("is `{name}`, which another node has"));
                }
                Some(_) => {}
            }
            match options.driver {
                None => problems.add(field("driver"), "is missing"),
                Some(driver) => {
                    if let Err(error) = options.check(driver) {
                        problems.add(format!("blockdevs[{i}]"), error.to_string());
                    }
                }
            }
        }
    }

    fn check_board(&self, problems: &mut Problems) {
        for (i, device) in self.board_devices.iter().flatten().enumerate() {
            for (field, reason) in device.problems() {
                problems.add(format!("board_devices[{i}].{field}"), reason);
            }
        }
        let mut seen = HashSet::new();
        for device in self.board_devices() {
            if !seen.insert(device.name()) {
                problems.add("board_devices", format!("have two `{}`; there can be one", device.name()));
            }
        }
    }

    fn named_devices(&self) -> Vec<(String, &str)> {
        let disks = self.disks().iter().enumerate().map(|(i, disk)| (format!("disks[{i}].id"), &disk.id));
        let nets = self.net().iter().enumerate().map(|(i, net)| (format!("net[{i}].id"), &net.id));
        let shares = self.fs().iter().enumerate().map(|(i, fs)| (format!("fs[{i}].id"), &fs.id));
        let others = self.generic_vhost_user().iter().enumerate();
        let others = others.map(|(i, device)| (format!("generic_vhost_user[{i}].id"), &device.id));
        let single = [
            Some(("rng.id".to_owned(), &self.rng.id)),
            Some(("console.id".to_owned(), &self.console.id)),
            self.balloon.as_ref().map(|balloon| ("balloon.id".to_owned(), &balloon.id)),
            self.vsock.as_ref().map(|vsock| ("vsock.id".to_owned(), &vsock.id)),
        ];
        disks
            .chain(nets)
            .chain(shares)
            .chain(others)
            .chain(single.into_iter().flatten())
            .filter_map(|(field, id)| id.as_deref().map(|id| (field, id)))
            .collect()
    }

    fn check_consoles(&self, problems: &mut Problems) {
        let serial = &self.serial;
        if serial.mode == ConsoleMode::File && serial.file.is_none() {
            problems.add("serial.file", "is missing; mode File needs it");
        }
        if serial.mode == ConsoleMode::Socket && serial.socket.is_none() {
            problems.add("serial.socket", "is missing; mode Socket needs it");
        }
        let ports = self.console_ports();
        if ports.len() >= MAX_PORTS {
            problems.add("console_ports", format!("are {}; a console has {}", ports.len(), MAX_PORTS - 1));
        }
        for (i, port) in ports.iter().enumerate() {
            let mut wrong = |field: &str, reason: &str| {
                problems.add(format!("console_ports[{i}].{field}"), reason);
            };
            match port.mode {
                ConsoleMode::Off | ConsoleMode::Tty => {
                    wrong("mode", "is not one of Null, Pty, File and Socket")
                }
                ConsoleMode::File if port.file.is_none() => wrong("file", "is missing; mode File needs it"),
                ConsoleMode::Socket if port.socket.is_none() => {
                    wrong("socket", "is missing; mode Socket needs it");
                }
                _ => {}
            }
            if port.name.is_empty() || port.name.len() > 255 {
                wrong("name", "must have 1 to 255 bytes");
            }
            if ports.iter().take(i).any(|other| other.name == port.name) {
                wrong("name", "is the name of another port");
            }
        }
        let debug = &self.debug_console;
        if debug.mode == ConsoleMode::File && debug.file.is_none() {
            problems.add("debug_console.file", "is missing; mode File needs it");
        }
        if matches!(debug.mode, ConsoleMode::Socket | ConsoleMode::Null) {
            problems.add("debug_console.mode", "is not one of Off, Pty, Tty and File");
        }
        if debug.mode != ConsoleMode::Off && self.guest_arch() != holdfast_arch::Arch::X86_64 {
            problems.add("debug_console.mode", "needs an x86_64 guest; use Off");
        }
        let terminals = [serial.mode, self.console.mode, debug.mode];
        if terminals.iter().filter(|mode| **mode == ConsoleMode::Tty).count() > 1 {
            problems.add("console.mode", "is Tty, and another console has the terminal already; use Off");
        }
    }

    fn check_platform(&self, problems: &mut Problems) {
        if let Some(platform) = &self.platform {
            if platform.num_pci_segments != 1 {
                let reason = format!("is {}; only 1 is supported by this version", platform.num_pci_segments);
                problems.add("platform.num_pci_segments", reason);
            }
            if let Some(text) = &platform.system_uuid
                && text.parse::<uuid::Uuid>().is_err()
            {
                problems.add("platform.system_uuid", format!("is `{text}`, which is no UUID"));
            }
        }
        for (i, rule) in self.landlock_rules.iter().flatten().enumerate() {
            if !matches!(rule.access.as_str(), "r" | "w" | "rw" | "wr") {
                let reason = format!("is `{}`; use r, w or rw", rule.access);
                problems.add(format!("landlock_rules[{i}].access"), reason);
            }
        }
        let banks = if matches!(self.machine_name(), "virt" | "q35") { 2 } else { 0 };
        if self.pflash().len() > banks {
            let reason =
                format!("are {}; machine `{}` has {banks}", self.pflash().len(), self.machine_name());
            problems.add("pflash", reason);
        }
        let x86 = self.guest_arch() == holdfast_arch::Arch::X86_64;
        if let Some(ports @ 9..) = self.machine.hotplug_ports {
            problems.add("machine.hotplug_ports", format!("is {ports}; at most 8 are possible"));
        }
        if self.machine.kernel_irqchip != IrqChipMode::Split && !x86 {
            problems.add("machine.kernel_irqchip", "is for x86_64 guests only");
        }
    }
}

fn note(parent: &str, errors: Vec<FieldError>, problems: &mut Problems) {
    for error in errors {
        problems.add(format!("{parent}.{}", error.field), error.reason);
    }
}

/// Checks a name that a user gives a device.
///
/// # Errors
/// What is wrong with it.
pub fn check_id(id: &str) -> Result<(), String> {
    if id.is_empty() {
        return Err("is empty; leave it out or give it a name".to_owned());
    }
    if id.starts_with("__") {
        return Err(format!("is `{id}`; names that begin with `__` are Holdfast's own"));
    }
    if id.len() > MAX_ID || id.chars().any(|c| c.is_control() || c == '/') {
        return Err(format!("must have at most {MAX_ID} bytes without `/` and control characters"));
    }
    Ok(())
}

/// Checks a disk that is to be added to a VM.
///
/// # Errors
/// [`ConfigError::Invalid`] with all problems.
pub fn validate_disk(disk: &DiskConfig) -> Result<(), ConfigError> {
    added("disk", disk.validate(), disk.id.as_deref())
}

/// Checks a network device that is to be added to a VM.
///
/// # Errors
/// [`ConfigError::Invalid`] with all problems.
pub fn validate_net(net: &NetConfig) -> Result<(), ConfigError> {
    added("net", net.validate(), net.id.as_deref())
}

/// Checks a shared directory that is to be added to a VM.
///
/// # Errors
/// [`ConfigError::Invalid`] with all problems.
pub fn validate_fs(fs: &FsConfig) -> Result<(), ConfigError> {
    added("fs", fs.validate(), fs.id.as_deref())
}

/// Checks a device by a vhost-user back end that is to be added to a VM.
///
/// # Errors
/// [`ConfigError::Invalid`] with all problems.
pub fn validate_generic_vhost_user(device: &GenericVhostUserConfig) -> Result<(), ConfigError> {
    added("generic_vhost_user", device.validate(), device.id.as_deref())
}

/// Checks sockets that are to be added to a VM.
///
/// # Errors
/// [`ConfigError::Invalid`] with all problems.
pub fn validate_vsock(vsock: &VsockConfig) -> Result<(), ConfigError> {
    added("vsock", vsock.validate(), vsock.id.as_deref())
}

fn added(kind: &str, errors: Vec<FieldError>, id: Option<&str>) -> Result<(), ConfigError> {
    let mut problems = Problems::default();
    note(kind, errors, &mut problems);
    if let Some(Err(reason)) = id.map(check_id) {
        problems.add(format!("{kind}.id"), reason);
    }
    problems.into_result()
}
