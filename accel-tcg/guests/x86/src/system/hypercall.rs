//! VMCALL and VMMCALL: hypercalls as KVM numbers and answers them (Linux `Documentation/virt/kvm/x86/hypercalls.rst`),
//! so that a guest that makes them gets the same answers with either accelerator. CPUID does not announce any.

use holdfast_tcg_runtime::Cpu;

use crate::apic;
use crate::state::X86;

const RAX: usize = 0;
const RCX: usize = 1;
const RDX: usize = 2;
const RBX: usize = 3;
const RSI: usize = 6;

const VAPIC_POLL_IRQ: u64 = 1;
const SEND_IPI: u64 = 10;

/// The guest's errors: EPERM, EINVAL, ENOSYS of KVM.
const NOT_PERMITTED: i64 = -1;
const INVALID: i64 = -22;
const UNKNOWN: i64 = -1000;

/// Fields of an interrupt command that SEND_IPI does not take: destination shorthand and mode.
const ICR_DESTINATIONS: u64 = 3 << 18 | 1 << 11;
/// Fields that it takes: vector and delivery mode.
const ICR_KIND: u64 = 0x7ff;

/// Does the hypercall in RAX with its arguments in RBX, RCX, RDX and RSI; the answer goes to RAX.
pub(crate) fn call(cpu: &mut Cpu<'_>) {
    let s = cpu.state::<X86>();
    let long = s.code64();
    let mask = if long { u64::MAX } else { 0xffff_ffff };
    let [number, a0, a1, a2, a3] = [RAX, RBX, RCX, RDX, RSI].map(|r| s.gpr[r] & mask);
    let answer = if s.cpl != 0 {
        NOT_PERMITTED
    } else {
        match number {
            VAPIC_POLL_IRQ => 0,
            SEND_IPI => send_ipi(cpu, long, [a0, a1], a2, a3),
            _ => UNKNOWN,
        }
    };
    cpu.state::<X86>().gpr[RAX] = answer as u64 & mask;
}

/// Sends an interrupt to the APIC ids from `first` on whose bits are set in `ids`; how many there are.
fn send_ipi(cpu: &mut Cpu<'_>, long: bool, ids: [u64; 2], first: u64, icr: u64) -> i64 {
    if icr & ICR_DESTINATIONS != 0 {
        return INVALID;
    }
    let Some(apic) = apic::of(cpu) else { return UNKNOWN };
    let width = if long { 64 } else { 32 };
    let mut sent = 0;
    for (base, bits) in [0, width].into_iter().zip(ids) {
        for n in (0..width).filter(|n| bits >> n & 1 != 0) {
            let id = first.checked_add(base + n).and_then(|id| u32::try_from(id).ok());
            sent += i64::from(id.is_some_and(|id| apic.send_ipi(id, (icr & ICR_KIND) as u32)));
        }
    }
    sent
}
