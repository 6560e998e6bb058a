//! Per-architecture facts: CPU state, CPU models, boot protocols, tables. Knows no accelerator.

pub mod riscv64;
pub mod x86_64;

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A guest architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Arch {
    /// 64-bit x86, with its 32-bit and real modes.
    #[serde(rename = "x86_64")]
    X86_64,
    /// 64-bit RISC-V.
    Riscv64,
}

impl Arch {
    /// The architecture of this host, if guests of it are known.
    pub const HOST: Option<Self> = if cfg!(target_arch = "x86_64") {
        Some(Self::X86_64)
    } else if cfg!(target_arch = "riscv64") {
        Some(Self::Riscv64)
    } else {
        None
    };

    /// All architectures that guests can have.
    pub const ALL: [Self; 2] = [Self::X86_64, Self::Riscv64];

    /// The name in options and states.
    pub fn name(self) -> &'static str {
        match self {
            Self::X86_64 => "x86_64",
            Self::Riscv64 => "riscv64",
        }
    }
}

impl fmt::Display for Arch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no guest architecture.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no guest architecture; x86_64 and riscv64 are")]
pub struct UnknownArch(pub String);

impl FromStr for Arch {
    type Err = UnknownArch;

    fn from_str(s: &str) -> Result<Self, UnknownArch> {
        Self::ALL.into_iter().find(|a| a.name() == s).ok_or_else(|| UnknownArch(s.to_owned()))
    }
}

/// Which CPU a vCPU shows to its guest.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "arch", rename_all = "lowercase")]
pub enum CpuModel {
    /// x86: the CPUID table before it is intersected with what the accelerator supports.
    #[serde(rename = "x86_64")]
    X86_64(x86_64::CpuidModel),
    /// RISC-V: the ISA extensions and MMU modes.
    Riscv64(riscv64::IsaModel),
}

/// The architectural state of a vCPU, the same whichever accelerator it ran on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(tag = "arch", rename_all = "lowercase")]
pub enum CpuState {
    /// x86.
    #[serde(rename = "x86_64")]
    X86_64(Box<x86_64::State>),
    /// RISC-V.
    Riscv64(Box<riscv64::State>),
}

/// Registers by number, as `#[serde(with)]` for maps inside [`CpuState`]: JSON keys are strings, and inside a
/// tagged enum serde does not turn them back into numbers by itself.
pub mod numbered {
    use std::collections::BTreeMap;
    use std::fmt::Display;
    use std::str::FromStr;

    use serde::de::Error;
    use serde::{Deserialize, Deserializer, Serialize, Serializer};

    /// Writes the map with its keys as they are.
    ///
    /// # Errors
    /// The serializer's.
    pub fn serialize<K: Serialize, S: Serializer>(map: &BTreeMap<K, u64>, s: S) -> Result<S::Ok, S::Error> {
        map.serialize(s)
    }

    /// Reads a map with decimal keys.
    ///
    /// # Errors
    /// The deserializer's, or that a key is no number.
    pub fn deserialize<'de, K, D>(d: D) -> Result<BTreeMap<K, u64>, D::Error>
    where
        K: FromStr + Ord,
        K::Err: Display,
        D: Deserializer<'de>,
    {
        let map = BTreeMap::<String, u64>::deserialize(d)?;
        map.into_iter().map(|(k, v)| Ok((k.parse().map_err(D::Error::custom)?, v))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_survive_json_with_their_numbered_registers() {
        let x86 = x86_64::State { msrs: [(0x10, 5), (0xc000_0080, 6)].into(), ..Default::default() };
        let riscv = riscv64::State { csrs: [(0x300, 7)].into(), ..Default::default() };
        for state in [CpuState::X86_64(Box::new(x86)), CpuState::Riscv64(Box::new(riscv))] {
            let text = serde_json::to_string(&state).expect("json");
            assert_eq!(serde_json::from_str::<CpuState>(&text).expect("json"), state);
            let value = serde_json::to_value(&state).expect("json");
            assert_eq!(serde_json::from_value::<CpuState>(value).expect("json"), state);
        }
    }
}
