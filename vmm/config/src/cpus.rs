//! vCPUs.

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Host CPUs that a vCPU may run on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuAffinity {
    /// The vCPU.
    pub vcpu: u32,
    /// The host CPUs.
    pub host_cpus: Vec<usize>,
}

/// Arrangement of the vCPUs; the product of the four is `max_vcpus`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpuTopology {
    /// Threads in a core.
    pub threads_per_core: u16,
    /// Cores in a die.
    pub cores_per_die: u16,
    /// Dies in a package.
    pub dies_per_package: u16,
    /// Packages.
    pub packages: u16,
}

impl CpuTopology {
    /// The number of vCPUs.
    pub fn vcpus(&self) -> u64 {
        [self.threads_per_core, self.cores_per_die, self.dies_per_package, self.packages]
            .into_iter()
            .map(u64::from)
            .product()
    }
}

/// The vCPUs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct CpusConfig {
    /// vCPUs present at boot.
    #[serde(default = "one", alias = "boot")]
    #[schemars(range(min = 1), extend("x-cli" = "boot", "x-positional" = true))]
    pub boot_vcpus: u32,
    /// Most vCPUs that the VM can have; 0 means `boot_vcpus`.
    #[serde(default, alias = "max")]
    #[schemars(extend("x-cli" = "max"))]
    pub max_vcpus: u32,
    /// Arrangement.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub topology: Option<CpuTopology>,
    /// CPU model of an x86 guest: `host` or `max` (all that the accelerator supports), `qemu64`, `Nehalem`,
    /// `Skylake-Server`, `EPYC`. A named model gets what of it the accelerator supports. Features can be switched as
    /// with QEMU's `-cpu`: `Nehalem,+x2apic,-vme,vendor=AuthenticAMD` (in quotes on the command line); one that is
    /// asked for by name and is not to be had is an error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub profile: Option<String>,
    /// Pinning of vCPUs to host CPUs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub affinity: Option<Vec<CpuAffinity>>,
}

fn one() -> u32 {
    1
}

impl CpusConfig {
    /// The most vCPUs that the VM can have, the default resolved.
    pub fn max(&self) -> u32 {
        if self.max_vcpus == 0 { self.boot_vcpus } else { self.max_vcpus }
    }
}

impl Default for CpusConfig {
    fn default() -> Self {
        Self { boot_vcpus: 1, max_vcpus: 1, topology: None, profile: None, affinity: None }
    }
}
