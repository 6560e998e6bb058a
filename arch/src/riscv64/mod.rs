//! RISC-V: unprivileged specification 20240411, privileged specification 20240411.

pub mod boot;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// What the guest is told of its hart.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct IsaModel {
    /// The ISA string of the device tree, for example `rv64imafdc_zicsr_zifencei_zba_zbb_zbs_sstc`.
    pub isa: String,
    /// The largest MMU mode: `sv39`, `sv48` or `sv57`.
    pub mmu: String,
    /// Number of PMP entries, 0 to 64.
    pub pmp_entries: u32,
    /// Ticks of the `time` CSR per second.
    pub timebase_hz: u64,
}

impl Default for IsaModel {
    fn default() -> Self {
        Self {
            isa: "rv64imafdc_zicntr_zicsr_zifencei_zba_zbb_zbs_sstc".into(),
            mmu: "sv57".into(),
            pmp_entries: 16,
            timebase_hz: 10_000_000,
        }
    }
}

/// Architectural state of one hart.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// Hart id.
    pub hartid: u64,
    /// `x0` to `x31` (`x0` is ignored).
    pub x: [u64; 32],
    /// `f0` to `f31`, raw (NaN-boxed) bits.
    pub f: [u64; 32],
    /// Program counter.
    pub pc: u64,
    /// Privilege: 0 user, 1 supervisor, 3 machine.
    pub privilege: u8,
    /// CSRs by number, machine-level views only (`mstatus`, not `sstatus`).
    #[serde(with = "crate::numbered")]
    pub csrs: BTreeMap<u16, u64>,
    /// Address and size of the reservation made by LR, if one is held.
    pub reservation: Option<(u64, u8)>,
    /// Waits in WFI.
    pub waiting: bool,
}

impl Default for State {
    fn default() -> Self {
        Self {
            hartid: 0,
            x: [0; 32],
            f: [0; 32],
            pc: 0,
            privilege: 3,
            csrs: BTreeMap::new(),
            reservation: None,
            waiting: false,
        }
    }
}
