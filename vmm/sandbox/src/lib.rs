//! The process confines itself before guest code runs.
//!
//! Every thread that starts through [`Sandbox`]'s [`Spawner`] gets the seccomp allow-list of its
//! [`Role`], gives up the capabilities that the role does not need, and keeps to the
//! paths of the configuration if Landlock is asked for. A thread inherits what confines its maker, so only roles
//! that make threads have the wide lists that this takes.
//!
//! A forbidden system call kills the process: a handler of `SIGSYS` writes which one, and in which thread.
//!
//! Capabilities: the bounding and ambient sets of all threads are empty from the start, so nothing can be gained by
//! executing a program. Roles that build VMs keep `CAP_NET_ADMIN` and a few more for as long as they live, because a
//! VM, with taps to make, can be asked for at any time; vCPUs, devices, timers and signals keep none.
//!
//! Landlock: API threads open no files, so they are kept from all of them (but for removing their sockets) wherever
//! the kernel has Landlock, asked for or not.

mod caps;
mod fds;
mod filters;
mod malloc;
mod names;
mod paths;
mod trap;

use std::cell::Cell;
use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::str::FromStr;
use std::sync::Arc;
use std::thread::JoinHandle;

use holdfast_threads::{Role, Spawner};
use parking_lot::RwLock;
use seccompiler::BpfProgram;

pub use fds::inheritable_fds;
pub use paths::{PathAccess, PathRule};

/// What happens on a system call that is not on the list (`--seccomp`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum SeccompMode {
    /// `true`: the process dies, saying of what.
    #[default]
    Kill,
    /// `log`: the kernel logs it and lets it pass.
    Log,
    /// `errno`: it fails with `EPERM`.
    Errno,
    /// `false`: there are no filters.
    Off,
}

/// A word that is no mode.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no seccomp mode; true, false, log and errno are")]
pub struct UnknownMode(pub String);

impl FromStr for SeccompMode {
    type Err = UnknownMode;

    fn from_str(s: &str) -> Result<Self, UnknownMode> {
        match s {
            "true" => Ok(Self::Kill),
            "false" => Ok(Self::Off),
            "log" => Ok(Self::Log),
            "errno" => Ok(Self::Errno),
            _ => Err(UnknownMode(s.to_owned())),
        }
    }
}

/// A confinement that cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum SandboxError {
    /// A filter does not compile.
    #[error("the seccomp filter of {role:?} threads does not compile: {reason}")]
    Compile {
        /// Whose.
        role: Role,
        /// Why.
        reason: String,
    },
    /// A filter was refused.
    #[error("the seccomp filter of {role:?} threads cannot be installed")]
    Install {
        /// Whose.
        role: Role,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
    /// The kernel has no Landlock, or a rule is wrong.
    #[error("Landlock: {0}")]
    Landlock(String),
    /// Privileges cannot be given up.
    #[error("{what}")]
    Privileges {
        /// What was tried.
        what: &'static str,
        /// What the kernel said.
        #[source]
        source: io::Error,
    },
}

/// All roles.
pub const ROLES: [Role; 13] = [
    Role::Vcpu,
    Role::Vmm,
    Role::Timer,
    Role::Block,
    Role::Nbd,
    Role::Net,
    Role::Device,
    Role::BackEnd,
    Role::Vhost,
    Role::Api,
    Role::Gdb,
    Role::Signal,
    Role::Migration,
];

thread_local! {
    /// The role as which this thread is confined.
    static ROLE: Cell<Option<Role>> = const { Cell::new(None) };
}

/// The confinement of this process.
pub struct Sandbox {
    mode: SeccompMode,
    programs: HashMap<Role, BpfProgram>,
    /// Makes glibc fall back to `clone`, whose flags a filter can see.
    no_clone3: BpfProgram,
    paths: RwLock<Option<Vec<PathRule>>>,
    /// What API threads may do in the file system.
    api_paths: RwLock<Vec<PathRule>>,
    keep_privileges: bool,
}

impl std::fmt::Debug for Sandbox {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sandbox").field("mode", &self.mode).finish_non_exhaustive()
    }
}

impl Sandbox {
    /// Compiles the filters of all roles and, to say of what the process dies, takes over `SIGSYS`. To be called
    /// on the main thread before there are others: it also empties the capability bounding set, which they inherit.
    ///
    /// # Errors
    /// [`SandboxError`].
    pub fn new(mode: SeccompMode) -> Result<Arc<Self>, SandboxError> {
        malloc::fix_arenas();
        let mut programs = HashMap::new();
        if mode != SeccompMode::Off {
            for role in ROLES {
                programs.insert(role, filters::compile(role, mode)?);
            }
        }
        if mode == SeccompMode::Kill {
            trap::install()
                .map_err(|source| SandboxError::Privileges { what: "cannot handle SIGSYS", source })?;
        }
        if mode != SeccompMode::Off {
            caps::drop_bounding_set()?;
        }
        Ok(Arc::new(Self {
            mode,
            programs,
            no_clone3: filters::compile_no_clone3()?,
            paths: RwLock::default(),
            api_paths: RwLock::default(),
            keep_privileges: mode == SeccompMode::Off,
        }))
    }

    /// From now on this thread, and threads that are started later, open only what `rules` permit. Threads that are
    /// there already [join](Self::join_limits).
    ///
    /// # Errors
    /// [`SandboxError::Landlock`] if the kernel cannot do that, a path does not exist, or there are limits already,
    /// which cannot be changed.
    pub fn limit_paths(&self, rules: Vec<PathRule>) -> Result<(), SandboxError> {
        let mut paths = self.paths.write();
        if paths.is_some() {
            return Err(SandboxError::Landlock("the process keeps to other paths already".into()));
        }
        paths::restrict(&rules)?;
        paths::set_within(true);
        *paths = Some(rules);
        Ok(())
    }

    /// Puts this thread within the limits of the process, if there are any and it is not yet.
    ///
    /// # Errors
    /// [`SandboxError::Landlock`].
    pub fn join_limits(&self) -> Result<(), SandboxError> {
        let paths = self.paths.read();
        let Some(rules) = paths.as_ref().filter(|_| !paths::is_within()) else { return Ok(()) };
        paths::restrict(rules)?;
        paths::set_within(true);
        Ok(())
    }

    /// Whether the process keeps to certain paths.
    pub fn is_limited(&self) -> bool {
        self.paths.read().is_some()
    }

    /// Whether the limits of the process, if there are any, permit `wanted`.
    pub fn permits(&self, wanted: &PathRule) -> bool {
        self.paths.read().as_ref().is_none_or(|rules| paths::permit(rules, wanted))
    }

    /// API threads that start from now on may remove files from `directories`, and touch no others.
    pub fn keep_sockets_removable(&self, directories: &[PathBuf]) {
        *self.api_paths.write() = directories.iter().map(PathRule::removing).collect();
    }

    /// Confines the calling thread as `role`: what the spawner does for the threads that it starts, and what the
    /// main thread does for itself. There is no way back.
    ///
    /// # Errors
    /// [`SandboxError`]; the thread must not go on then.
    pub fn confine(&self, role: Role) -> Result<(), SandboxError> {
        ROLE.set(Some(role));
        trap::unblock();
        self.join_limits()?;
        if role == Role::Api && self.mode != SeccompMode::Off {
            // Without Landlock in the kernel there still is the filter.
            paths::restrict_if_possible(&self.api_paths.read())?;
        }
        caps::no_new_privileges()?;
        if !self.keep_privileges {
            caps::keep_only(caps::needed_by(role))?;
        }
        let Some(program) = self.programs.get(&role) else { return Ok(()) };
        for filter in [&self.no_clone3, program] {
            filters::apply(filter).map_err(|source| SandboxError::Install { role, source })?;
        }
        Ok(())
    }

    /// The way to start threads under this sandbox.
    pub fn spawner(self: &Arc<Self>) -> Arc<dyn Spawner> {
        Arc::new(SandboxSpawner(Arc::clone(self)))
    }
}

/// Starts threads that are confined before their body runs.
#[derive(Debug, Clone)]
pub struct SandboxSpawner(Arc<Sandbox>);

impl Spawner for SandboxSpawner {
    fn spawn(&self, name: &str, role: Role, body: Box<dyn FnOnce() + Send>) -> io::Result<JoinHandle<()>> {
        let sandbox = Arc::clone(&self.0);
        let maker = ROLE.get();
        if sandbox.mode == SeccompMode::Kill && maker.is_some_and(|role| !filters::may_start_threads(role)) {
            // The C library blocks all signals around this call, so the handler would not be heard.
            trap::die_of(libc::SYS_clone);
        }
        let within = paths::is_within();
        let confined = move || {
            paths::set_within(within);
            if let Err(error) = sandbox.confine(role) {
                // A thread that cannot be confined must not run, and without it the process is not whole.
                tracing::error!(%error, "a thread cannot be confined");
                eprintln!("holdfast: {}: {error}", std::thread::current().name().unwrap_or("thread"));
                std::process::exit(1);
            }
            body();
        };
        std::thread::Builder::new().name(name.to_owned()).spawn(confined)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modes_have_their_words() {
        let words = ["true", "false", "log", "errno"].map(|w| w.parse::<SeccompMode>().expect("a mode"));
        assert_eq!(words, [SeccompMode::Kill, SeccompMode::Off, SeccompMode::Log, SeccompMode::Errno]);
        let text = "maybe".parse::<SeccompMode>().expect_err("no mode").to_string();
        assert_eq!(text, "`maybe` is no seccomp mode; true, false, log and errno are");
    }

    #[test]
    fn every_role_has_a_filter_that_fits_the_kernel() {
        for role in ROLES {
            let program = filters::compile(role, SeccompMode::Kill).expect("compiles");
            assert!(
                program.len() < 4096,
                "{role:?}: {} instructions are more than the kernel takes",
                program.len()
            );
        }
    }
}
