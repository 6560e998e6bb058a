//! x86-64: Intel SDM (December 2023) and AMD APM (rev. 3.36).

pub mod acpi;
pub mod boot;
pub mod cpuid;
pub mod features;
pub mod models;
pub mod smbios;

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

/// One CPUID leaf as the guest sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidEntry {
    /// Input EAX.
    pub function: u32,
    /// Input ECX, meaningful where `indexed`.
    pub index: u32,
    /// Whether ECX selects the entry.
    pub indexed: bool,
    /// EAX, EBX, ECX, EDX.
    pub regs: [u32; 4],
}

/// A CPU model.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct CpuidModel {
    /// `host`, or the name of a model.
    pub name: String,
    /// Entries; empty means all that the accelerator supports.
    pub entries: Vec<CpuidEntry>,
    /// Features that were switched by name.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub switches: Vec<features::Switch>,
    /// The vendor to show instead of the model's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vendor: Option<[u8; 12]>,
    /// How vCPUs are arranged in packages; `None`: one package of single-threaded cores.
    #[serde(default)]
    pub topology: Option<CpuTopology>,
}

/// How the vCPUs of one package are arranged. APIC ids follow from it: see [`CpuTopology::apic_id`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuTopology {
    /// Threads in a core, at least 1.
    pub threads: u32,
    /// Cores in a die, at least 1.
    pub cores: u32,
    /// Dies in a package, at least 1.
    pub dies: u32,
}

impl CpuTopology {
    /// The arrangement used when none is given: `vcpus` cores in one package.
    pub fn flat(vcpus: u32) -> Self {
        Self { threads: 1, cores: vcpus.max(1), dies: 1 }
    }

    /// APIC id bits below the core number.
    pub fn core_shift(self) -> u32 {
        bits_for(self.threads)
    }

    /// APIC id bits below the die number.
    pub fn die_shift(self) -> u32 {
        self.core_shift() + bits_for(self.cores)
    }

    /// APIC id bits below the package number.
    pub fn package_shift(self) -> u32 {
        self.die_shift() + bits_for(self.dies)
    }

    /// Threads in a package.
    pub fn per_package(self) -> u32 {
        self.threads.max(1).saturating_mul(self.cores.max(1)).saturating_mul(self.dies.max(1))
    }

    /// The APIC id of vCPU `index` (SDM volume 3, section 9.9): each level has a power of two of ids,
    /// so there are gaps when a count is none.
    pub fn apic_id(self, index: u32) -> u32 {
        let (threads, cores, dies) = (self.threads.max(1), self.cores.max(1), self.dies.max(1));
        let thread = index % threads;
        let core = index / threads % cores;
        let die = index / threads / cores % dies;
        let package = index / threads / cores / dies;
        shl(package, self.package_shift())
            | shl(die, self.die_shift())
            | shl(core, self.core_shift())
            | thread
    }
}

/// `value << shift`, all ones if that has no room.
pub(crate) fn shl(value: u32, shift: u32) -> u32 {
    if value == 0 { 0 } else { value.checked_shl(shift).unwrap_or(u32::MAX) }
}

/// Bits that number `count` things.
fn bits_for(count: u32) -> u32 {
    count.max(1).saturating_sub(1).checked_ilog2().map_or(0, |b| b + 1)
}

/// A segment register with its hidden part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Segment {
    /// Selector.
    pub selector: u16,
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u32,
    /// Attributes as in the descriptor's bits 40 to 55: type (bits 0 to 3), S (4), DPL (5, 6), P (7),
    /// AVL (12), L (13), D/B (14), G (15). Bits 8 to 11, the limit's in the descriptor, are zero.
    pub attributes: u16,
    /// Loaded with a null selector.
    pub unusable: bool,
}

/// GDTR or IDTR.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Table {
    /// Base address.
    pub base: u64,
    /// Limit in bytes.
    pub limit: u16,
}

/// Pending events that are part of a vCPU's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Events {
    /// Exception being delivered: vector and error code.
    pub exception: Option<(u8, Option<u32>)>,
    /// Interrupt being delivered: vector, and whether it is a software interrupt.
    pub interrupt: Option<(u8, bool)>,
    /// An NMI is pending.
    pub nmi_pending: bool,
    /// NMIs are blocked until IRET.
    pub nmi_masked: bool,
    /// Interrupt shadow: 1 after STI, 2 after MOV SS.
    pub shadow: u8,
    /// SIPI vector that is pending.
    pub sipi_vector: u32,
}

/// Whether a vCPU runs, waits or has not been started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MpState {
    /// Runs.
    #[default]
    Runnable,
    /// Waits for INIT.
    Uninitialized,
    /// Waits for SIPI.
    InitReceived,
    /// Stopped in HLT.
    Halted,
}

/// Architectural state of one vCPU.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct State {
    /// RAX RCX RDX RBX RSP RBP RSI RDI R8 to R15.
    pub gpr: [u64; 16],
    /// RIP.
    pub rip: u64,
    /// RFLAGS.
    pub rflags: u64,
    /// ES CS SS DS FS GS.
    pub segments: [Segment; 6],
    /// Task register.
    pub tr: Segment,
    /// LDTR.
    pub ldt: Segment,
    /// GDTR.
    pub gdt: Table,
    /// IDTR.
    pub idt: Table,
    /// CR0, CR2, CR3, CR4, CR8.
    pub cr: [u64; 5],
    /// EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// DR0 to DR3, DR6, DR7.
    pub dr: [u64; 6],
    /// XCR0.
    pub xcr0: u64,
    /// XSAVE area in the standard format.
    pub xsave: Vec<u8>,
    /// Model-specific registers by number.
    #[serde(with = "crate::numbered")]
    pub msrs: BTreeMap<u32, u64>,
    /// Local APIC registers: the 1 KiB page of SDM table 11-1, 32 bits every 16 bytes.
    pub lapic: Vec<u8>,
    /// Pending events.
    pub events: Events,
    /// Run state.
    pub mp_state: MpState,
    /// TSC frequency in kHz; 0 if not known.
    pub tsc_khz: u32,
    /// What the guest was shown by CPUID, to tell whether another host or accelerator shows as much. Setting a state
    /// does not change it. Empty in states of versions that did not keep it.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub cpuid: Vec<CpuidEntry>,
}
