//! Landlock: only the paths that the configuration names can be opened.

use std::cell::Cell;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

use crate::SandboxError;

/// What may be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PathAccess {
    /// Reading files and listing directories.
    pub read: bool,
    /// Writing, creating and removing.
    pub write: bool,
    /// Removing files, which [`PathAccess::write`] includes.
    pub remove: bool,
}

impl PathAccess {
    /// Whether everything that `other` permits is permitted.
    fn covers(self, other: Self) -> bool {
        (self.read || !other.read)
            && (self.write || !other.write)
            && (self.write || self.remove || !other.remove)
    }

    /// What either permits.
    #[must_use]
    pub fn or(self, other: Self) -> Self {
        Self {
            read: self.read || other.read,
            write: self.write || other.write,
            remove: self.remove || other.remove,
        }
    }
}

/// A word that is no access.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no access; r, w and rw are")]
pub struct UnknownAccess(pub String);

impl FromStr for PathAccess {
    type Err = UnknownAccess;

    fn from_str(s: &str) -> Result<Self, UnknownAccess> {
        match s {
            "r" => Ok(Self { read: true, ..Self::default() }),
            "w" => Ok(Self { write: true, ..Self::default() }),
            "rw" | "wr" => Ok(Self { read: true, write: true, remove: false }),
            _ => Err(UnknownAccess(s.to_owned())),
        }
    }
}

/// A path, with everything below it, and what may be done there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PathRule {
    /// The path. It must exist.
    pub path: PathBuf,
    /// What is permitted.
    pub access: PathAccess,
}

impl PathRule {
    /// A rule for reading `path`, and for writing it if `write`.
    pub fn new(path: impl Into<PathBuf>, write: bool) -> Self {
        Self { path: path.into(), access: PathAccess { read: true, write, remove: false } }
    }

    /// A rule for removing files from `directory`, and nothing else.
    pub fn removing(directory: impl Into<PathBuf>) -> Self {
        let access = PathAccess { remove: true, ..PathAccess::default() };
        Self { path: directory.into(), access }
    }
}

/// Whether `rules` together permit what `wanted` asks.
pub fn permit(rules: &[PathRule], wanted: &PathRule) -> bool {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let path = real(&wanted.path);
    let above = rules.iter().filter(|rule| path.starts_with(real(&rule.path)));
    above.fold(PathAccess::default(), |all, rule| all.or(rule.access)).covers(wanted.access)
}

thread_local! {
    /// Whether this thread is inside the rules of the process already; its threads are, too.
    static WITHIN: Cell<bool> = const { Cell::new(false) };
}

/// Whether this thread is inside the rules of the process.
pub fn is_within() -> bool {
    WITHIN.get()
}

/// Notes that this thread is, or is not, inside the rules of the process.
pub fn set_within(within: bool) {
    WITHIN.set(within);
}

/// The rights that rules speak of. Later kernels know more; the newest that are needed are those of the third ABI.
const LEVEL: ABI = ABI::V3;

fn rights(rule: &PathRule) -> BitFlags<AccessFs> {
    let mut rights = BitFlags::EMPTY;
    if rule.access.read {
        // Executing is reading plus a right that nothing here needs.
        rights |= AccessFs::from_read(LEVEL) & !BitFlags::from(AccessFs::Execute);
    }
    if rule.access.write {
        rights |= AccessFs::from_write(LEVEL);
    }
    if rule.access.remove {
        rights |= AccessFs::RemoveFile;
    }
    if !rule.path.is_dir() {
        rights &= AccessFs::from_file(LEVEL);
    }
    rights
}

fn fail(e: impl std::fmt::Display) -> SandboxError {
    SandboxError::Landlock(e.to_string())
}

/// Restricts this thread and those that it starts.
pub fn restrict(rules: &[PathRule]) -> Result<(), SandboxError> {
    if restrict_if_possible(rules)? {
        return Ok(());
    }
    Err(SandboxError::Landlock(
        "the kernel does not have it; boot it with `lsm=landlock,...` or do without `--landlock`".into(),
    ))
}

/// Restricts this thread and those that it starts; false if the kernel cannot do that.
pub fn restrict_if_possible(rules: &[PathRule]) -> Result<bool, SandboxError> {
    let mut ruleset = Ruleset::default()
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessFs::from_all(LEVEL))
        .and_then(Ruleset::create)
        .map_err(fail)?;
    for rule in rules {
        let path = PathFd::new(&rule.path).map_err(fail)?;
        ruleset = ruleset.add_rule(PathBeneath::new(path, rights(rule))).map_err(fail)?;
    }
    let status = ruleset.restrict_self().map_err(fail)?;
    Ok(status.ruleset != RulesetStatus::NotEnforced)
}
