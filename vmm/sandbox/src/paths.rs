//! Landlock: only the paths that the configuration names can be opened.

use std::path::PathBuf;
use std::str::FromStr;

use landlock::{
    ABI, Access, AccessFs, BitFlags, CompatLevel, Compatible, PathBeneath, PathFd, Ruleset, RulesetAttr,
    RulesetCreatedAttr, RulesetStatus,
};

use crate::SandboxError;

/// What may be done with a path.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PathAccess {
    /// Reading files and listing directories.
    pub read: bool,
    /// Writing, creating and removing.
    pub write: bool,
}

/// A word that is no access.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no access; r, w and rw are")]
pub struct UnknownAccess(pub String);

impl FromStr for PathAccess {
    type Err = UnknownAccess;

    fn from_str(s: &str) -> Result<Self, UnknownAccess> {
        match s {
            "r" => Ok(Self { read: true, write: false }),
            "w" => Ok(Self { read: false, write: true }),
            "rw" | "wr" => Ok(Self { read: true, write: true }),
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
        Self { path: path.into(), access: PathAccess { read: true, write } }
    }
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
    if status.ruleset == RulesetStatus::NotEnforced {
        return Err(SandboxError::Landlock(
            "the kernel does not have it; boot it with `lsm=landlock,...` or do without `--landlock`".into(),
        ));
    }
    Ok(())
}
