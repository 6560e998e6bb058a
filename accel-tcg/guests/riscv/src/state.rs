//! Reset, and the architectural state in the form that all accelerators share.

use std::fmt::Write;

use holdfast_arch::riscv64::State;
use holdfast_tcg_runtime::{Cpu, Flush};

use crate::csr::{self, addr};
use crate::hart::{Hart, NO_RESERVATION, irq, mstatus, reset_state};
use crate::helpers::context;
use crate::isa::Isa;
use crate::{fcsr, timer};

/// CSRs whose value is not kept as it was saved: time goes on, and pins are not the hart's.
const MOVING: [u32; 3] = [addr::MIP, addr::MCYCLE, addr::MINSTRET];

/// Puts a hart of `isa` as it is after reset.
pub(crate) fn reset(cpu: &mut Cpu<'_>, isa: Isa) {
    let hartid = u64::from(cpu.index());
    let hart = cpu.state::<Hart>();
    hart.clone_from(&reset_state());
    hart.hartid = hartid;
    hart.sstc = u64::from(isa.sstc);
    hart.max_satp_mode = isa.max_satp_mode;
    hart.pmp_entries = isa.pmp_entries;
    hart.timebase_hz = isa.timebase_hz;
    cpu.set_pc(0);
    cpu.set_mxcsr(fcsr::to_mxcsr(0, 0));
    cpu.set_halted(false);
    cpu.flush(Flush::All);
    cpu.mode_changed();
    timer::arm(cpu);
}

/// The state of a hart.
pub(crate) fn export(cpu: &mut Cpu<'_>) -> State {
    let cx = context(cpu);
    let (pc, waiting) = (cpu.pc(), cpu.halted());
    let hart = cpu.state::<Hart>();
    let entries = hart.pmp_entries as u32;
    let csrs = csr::saved()
        .filter(|c| !(addr::PMPADDR0..=addr::PMPADDR63).contains(c) || c - addr::PMPADDR0 < entries)
        .filter(|c| !(addr::PMPCFG0..=addr::PMPCFG15).contains(c) || (c - addr::PMPCFG0) * 4 < entries)
        .filter(|c| *c != addr::STIMECMP || hart.sstc != 0)
        .filter_map(|c| {
            // Pins are their drivers' state.
            let value = if c == addr::MIP { hart.mip } else { csr::read(hart, &cx, c).ok()? };
            Some((c as u16, value))
        })
        .collect();
    let reservation = (hart.res_addr != NO_RESERVATION).then(|| {
        let size = if hart.res_addr & 1 != 0 { 4 } else { 8 };
        (hart.res_addr & !1, size)
    });
    State {
        hartid: hart.hartid,
        x: hart.x,
        f: hart.f,
        pc,
        privilege: hart.privilege as u8,
        csrs,
        reservation,
        waiting,
    }
}

/// Takes a state over, but for what follows from it: TLB, mode, deadline. A reservation is dropped: SC may
/// fail at any time.
///
/// # Errors
/// What this hart cannot hold.
pub(crate) fn import(cpu: &mut Cpu<'_>, state: &State) -> Result<(), String> {
    if !matches!(state.privilege, 0 | 1 | 3) {
        return Err(format!("there is no privilege level {}", state.privilege));
    }
    if state.pc & 1 != 0 {
        return Err(format!("the program counter {:#x} is odd", state.pc));
    }
    let mut cx = context(cpu);
    let hart = cpu.state::<Hart>();
    let (sstc, max_satp_mode) = (hart.sstc, hart.max_satp_mode);
    let (pmp_entries, timebase_hz) = (hart.pmp_entries, hart.timebase_hz);
    hart.clone_from(&reset_state());
    (hart.sstc, hart.max_satp_mode) = (sstc, max_satp_mode);
    (hart.pmp_entries, hart.timebase_hz) = (pmp_entries, timebase_hz);
    hart.hartid = state.hartid;
    hart.x = state.x;
    hart.x[0] = 0;
    hart.f = state.f;
    hart.privilege = u64::from(state.privilege);
    cx.fflags = 0;
    // `fcsr` first: writing it makes FS dirty, which the saved `mstatus` then puts right.
    let known: Vec<u32> = csr::saved().collect();
    if let Some(unknown) = state.csrs.keys().find(|c| !known.contains(&u32::from(**c))) {
        return Err(format!("CSR {unknown:#x} is not one of this hart's"));
    }
    let ordered = std::iter::once(addr::FCSR).chain(known.into_iter().filter(|c| *c != addr::FCSR));
    let given: Vec<(u32, u64)> =
        ordered.filter_map(|c| state.csrs.get(&(c as u16)).map(|v| (c, *v))).collect();
    for &(number, value) in &given {
        if number == addr::MIP {
            hart.mip = value & irq::SUPERVISOR;
        } else {
            csr::write(hart, &mut cx, number, value)
                .map_err(|_| format!("CSR {number:#x} cannot be written"))?;
        }
    }
    for (number, value) in given {
        let held = csr::read(hart, &cx, number).unwrap_or(!value);
        // SD follows from FS.
        let derived = if number == addr::MSTATUS { mstatus::SD } else { 0 };
        if (held ^ value) & !derived != 0 && !MOVING.contains(&number) {
            return Err(format!("CSR {number:#x} cannot hold {value:#x}, only {held:#x}"));
        }
    }
    let frm = hart.frm;
    cpu.set_mxcsr(fcsr::to_mxcsr(frm, cx.fflags));
    cpu.set_pc(state.pc);
    cpu.set_halted(state.waiting);
    Ok(())
}

const X_NAMES: [&str; 32] = [
    "zero", "ra", "sp", "gp", "tp", "t0", "t1", "t2", "s0", "s1", "a0", "a1", "a2", "a3", "a4", "a5", "a6",
    "a7", "s2", "s3", "s4", "s5", "s6", "s7", "s8", "s9", "s10", "s11", "t3", "t4", "t5", "t6",
];

const SHOWN: [(&str, u32); 16] = [
    ("mstatus", addr::MSTATUS),
    ("mip", addr::MIP),
    ("mie", addr::MIE),
    ("mideleg", addr::MIDELEG),
    ("medeleg", addr::MEDELEG),
    ("mtvec", addr::MTVEC),
    ("mepc", addr::MEPC),
    ("mcause", addr::MCAUSE),
    ("mtval", addr::MTVAL),
    ("stvec", addr::STVEC),
    ("sepc", addr::SEPC),
    ("scause", addr::SCAUSE),
    ("stval", addr::STVAL),
    ("satp", addr::SATP),
    ("stimecmp", addr::STIMECMP),
    ("fcsr", addr::FCSR),
];

/// A register dump.
pub(crate) fn describe(state: &State) -> String {
    let mut out = String::new();
    let mode = ["U", "S", "?", "M"].get(state.privilege as usize).copied().unwrap_or("?");
    let waiting = if state.waiting { " (waiting)" } else { "" };
    let _ = writeln!(out, "hart {}  pc {:#018x}  mode {mode}{waiting}", state.hartid, state.pc);
    let mut column = 0;
    let mut cell = |out: &mut String, name: &str, value: u64| {
        column += 1;
        let end = if column % 4 == 0 { "\n" } else { "  " };
        let _ = write!(out, "{name:>8} {value:016x}{end}");
    };
    for (name, value) in X_NAMES.iter().zip(state.x) {
        cell(&mut out, name, value);
    }
    for (name, number) in SHOWN {
        cell(&mut out, name, state.csrs.get(&(number as u16)).copied().unwrap_or(0));
    }
    for (i, value) in state.f.iter().enumerate() {
        cell(&mut out, &format!("f{i}"), *value);
    }
    out
}
