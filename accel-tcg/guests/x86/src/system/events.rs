//! Interrupts, INIT, SIPI and NMI, and what debug registers find (SDM volume 3, sections 6.9 and 17.2).

use holdfast_tcg_runtime::{Access, AccessKind, Cpu, Fault};

use super::regs::{dr, vector};
use super::{cpuid, deliver, monitor, reset};
use crate::apic::{self, LocalApic};
use crate::flags::rflags;
use crate::state::{X86, seg};

/// Values of [`X86::mp_state`].
pub(crate) mod mp {
    pub const RUNNABLE: u64 = 0;
    pub const UNINITIALIZED: u64 = 1;
    pub const INIT_RECEIVED: u64 = 2;
    pub const HALTED: u64 = 3;
}

/// True if a maskable interrupt would be taken now.
pub(crate) fn deliverable(cpu: &mut Cpu<'_>) -> bool {
    cpu.state::<X86>().flags & rflags::IF != 0 && apic::has_interrupt(cpu)
}

/// Takes the most urgent event, if any; true if something was delivered.
pub(crate) fn take(cpu: &mut Cpu<'_>) -> bool {
    let apic = apic::of(cpu);
    if let Some(apic) = &apic
        && apic.has_signal()
        && signals(cpu, &**apic)
    {
        return true;
    }
    let s = cpu.state::<X86>();
    if matches!(s.mp_state, mp::UNINITIALIZED | mp::INIT_RECEIVED) {
        return false;
    }
    if s.debug_pending != 0 && s.shadow != 2 {
        let bits = std::mem::take(&mut s.debug_pending);
        deliver::raise(cpu, &Fault { cause: u64::from(vector::DB), value: bits, aux: 0 });
        return true;
    }
    if s.nmi_pending != 0 && s.nmi_masked == 0 && s.shadow == 0 {
        s.nmi_pending -= 1;
        s.nmi_masked = 1;
        wake(cpu);
        deliver::interrupt(cpu, vector::NMI);
        return true;
    }
    if s.shadow != 0 || s.flags & rflags::IF == 0 {
        return false;
    }
    let Some(vector) = apic.and_then(|a| if a.has_interrupt() { a.acknowledge() } else { None }) else {
        return false;
    };
    wake(cpu);
    deliver::interrupt(cpu, vector);
    true
}

fn wake(cpu: &mut Cpu<'_>) {
    cpu.set_halted(false);
    let s = cpu.state::<X86>();
    (s.mp_state, s.mwait) = (mp::RUNNABLE, 0);
}

/// Acts on what the APIC latched; true if the processor started anew.
fn signals(cpu: &mut Cpu<'_>, apic: &dyn LocalApic) -> bool {
    let signals = apic.take_signals();
    if signals.nmi != 0 {
        // One can wait while one is served; where none is, the first of two is as good as taken.
        let s = cpu.state::<X86>();
        let most = if s.nmi_masked != 0 { 1 } else { 2 };
        s.nmi_pending = (s.nmi_pending + u64::from(signals.nmi)).min(most);
    }
    let mut done = false;
    if signals.init {
        reset::init(cpu);
        apic.reset(true);
        if apic.base() & apic_base::BSP == 0 {
            cpu.state::<X86>().mp_state = mp::INIT_RECEIVED;
            cpu.set_halted(true);
        } else {
            wake(cpu);
            done = true;
        }
    }
    if let Some(vector) = signals.sipi
        && cpu.state::<X86>().mp_state == mp::INIT_RECEIVED
    {
        let s = cpu.state::<X86>();
        let cs = &mut s.seg[seg::CS];
        cs.selector = u64::from(vector) << 8;
        cs.base = u64::from(vector) << 12;
        let pc = s.pc_of(0);
        cpu.set_pc(pc);
        wake(cpu);
        done = true;
    }
    super::mode::changed(cpu);
    done
}

/// Bits of IA32_APIC_BASE.
pub(crate) mod apic_base {
    /// The bootstrap processor.
    pub const BSP: u64 = 1 << 8;
}

/// True if the waiting processor has to go on.
pub(crate) fn wakes(cpu: &mut Cpu<'_>) -> bool {
    let Some(apic) = apic::of(cpu) else { return monitor::ends(cpu) };
    if apic.has_signal() {
        return true;
    }
    let s = cpu.state::<X86>();
    if matches!(s.mp_state, mp::UNINITIALIZED | mp::INIT_RECEIVED) {
        return false;
    }
    s.debug_pending != 0
        || s.nmi_pending != 0 && s.nmi_masked == 0
        || s.flags & rflags::IF != 0 && apic.has_interrupt()
        || monitor::ends(cpu)
}

/// At the start of a region of one instruction (TF, breakpoints, interrupt shadow): what there is to do before it.
///
/// # Errors
/// #DB for an instruction breakpoint.
pub(crate) fn begin(cpu: &mut Cpu<'_>) -> Result<(), Fault> {
    let pc = cpu.pc();
    let s = cpu.state::<X86>();
    // Behind MOV SS there are no instruction breakpoints with Intel's processors; with AMD's there are.
    let blocked = std::mem::take(&mut s.shadow) == 2 && cpuid::is_intel(s);
    if s.flags & rflags::RF == 0 && !blocked {
        let hits = hits(s, |n, dr7| dr7 >> (16 + 4 * n) & 3 == 0 && s.dr[n] == pc);
        if hits != 0 {
            super::mode::changed(cpu);
            return Err(Fault { cause: u64::from(vector::DB), value: hits, aux: super::fault::RESUME });
        }
    }
    s.flags &= !rflags::RF;
    if s.flags & rflags::TF != 0 {
        s.debug_pending |= dr::DR6_BS;
    }
    super::mode::changed(cpu);
    Ok(())
}

/// The enabled breakpoints for which `hit` holds.
fn hits(s: &X86, hit: impl Fn(usize, u64) -> bool) -> u64 {
    let dr7 = s.dr[dr::DR7];
    (0..4).filter(|n| dr7 >> (2 * n) & 3 != 0 && hit(*n, dr7)).fold(0, |bits, n| bits | 1 << n)
}

/// Bytes that breakpoint `n` watches: (address, length, on reads too).
fn watched(s: &X86, n: usize) -> Option<(u64, u64, bool)> {
    let dr7 = s.dr[dr::DR7];
    let len = match dr7 >> (18 + 4 * n) & 3 {
        0 => 1,
        1 => 2,
        2 => 8,
        _ => 4,
    };
    match dr7 >> (16 + 4 * n) & 3 {
        1 => Some((s.dr[n] & !(len - 1), len, false)),
        3 => Some((s.dr[n] & !(len - 1), len, true)),
        _ => None,
    }
}

/// Notes the data breakpoints that `access` hits; true if the page of it has any, so that it must not be cached.
pub(crate) fn watch(s: &mut X86, access: &Access) -> bool {
    if s.dr[dr::DR7] & 0xff == 0 || access.kind == AccessKind::Fetch {
        return false;
    }
    let end = access.gva.wrapping_add(u64::from(access.size));
    let hit = hits(s, |n, _| {
        watched(s, n).is_some_and(|(at, len, reads)| {
            (reads || access.kind == AccessKind::Write) && access.gva < at.wrapping_add(len) && at < end
        })
    });
    s.debug_pending |= hit;
    hits(s, |n, _| watched(s, n).is_some_and(|(at, ..)| (at ^ access.gva) & !0xfff == 0)) != 0
}

/// I/O breakpoints (CR4.DE, type 2) on `size` bytes at `port`.
pub(crate) fn watch_port(s: &mut X86, port: u16, size: u8) {
    let (start, end) = (u64::from(port), u64::from(port) + u64::from(size));
    let hit = hits(s, |n, dr7| {
        let len = [1, 2, 8, 4][(dr7 >> (18 + 4 * n) & 3) as usize];
        let at = s.dr[n] & !(len - 1);
        dr7 >> (16 + 4 * n) & 3 == 2 && start < at + len && at < end
    });
    s.debug_pending |= hit;
}
