//! A vCPU's architectural state in and out of KVM.

use std::io;

use holdfast_accel::AccelError;
use holdfast_arch::x86_64::{Events, MpState, Segment, State, Table, cpuid};
use kvm_bindings::{
    KVM_MP_STATE_HALTED, KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_SIPI_RECEIVED,
    KVM_MP_STATE_UNINITIALIZED, KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, Msrs, Xsave, kvm_debugregs, kvm_dtable, kvm_lapic_state, kvm_mp_state,
    kvm_msr_entry, kvm_regs, kvm_segment, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::Cap;

use crate::vcpu::KvmVcpu;
use crate::{NAME, host, io_error};

/// IA32_TIME_STAMP_COUNTER.
pub const MSR_TSC: u32 = 0x10;
/// IA32_TSC_ADJUST.
pub const MSR_TSC_ADJUST: u32 = 0x3b;
/// IA32_TSC_DEADLINE.
pub const MSR_TSC_DEADLINE: u32 = 0x6e0;
/// IA32_FEATURE_CONTROL.
const MSR_FEATURE_CONTROL: u32 = 0x3a;
/// A clock this far off, in parts per million, is the same clock measured twice.
const TSC_TOLERANCE_PPM: u64 = 250;

fn state_error(reason: String) -> AccelError {
    AccelError::State { accel: NAME, reason }
}

fn segment(s: &kvm_segment) -> Segment {
    let bit = |v: u8, at: u16| u16::from(v & 1) << at;
    let attributes = u16::from(s.type_ & 15)
        | bit(s.s, 4)
        | u16::from(s.dpl & 3) << 5
        | bit(s.present, 7)
        | bit(s.avl, 12)
        | bit(s.l, 13)
        | bit(s.db, 14)
        | bit(s.g, 15);
    Segment { selector: s.selector, base: s.base, limit: s.limit, attributes, unusable: s.unusable != 0 }
}

fn kvm_segment_of(s: &Segment) -> kvm_segment {
    let bit = |at: u16| (s.attributes >> at & 1) as u8;
    kvm_segment {
        base: s.base,
        limit: s.limit,
        selector: s.selector,
        type_: (s.attributes & 15) as u8,
        present: bit(7),
        dpl: (s.attributes >> 5 & 3) as u8,
        db: bit(14),
        s: bit(4),
        l: bit(13),
        g: bit(15),
        avl: bit(12),
        unusable: u8::from(s.unusable),
        padding: 0,
    }
}

fn table(t: &kvm_dtable) -> Table {
    Table { base: t.base, limit: t.limit }
}

fn kvm_table(t: &Table) -> kvm_dtable {
    kvm_dtable { base: t.base, limit: t.limit, padding: [0; 3] }
}

fn gpr(r: &kvm_regs) -> [u64; 16] {
    [
        r.rax, r.rcx, r.rdx, r.rbx, r.rsp, r.rbp, r.rsi, r.rdi, r.r8, r.r9, r.r10, r.r11, r.r12, r.r13,
        r.r14, r.r15,
    ]
}

fn kvm_regs_of(s: &State) -> kvm_regs {
    let [rax, rcx, rdx, rbx, rsp, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15] = s.gpr;
    let (rip, rflags) = (s.rip, s.rflags);
    kvm_regs { rax, rbx, rcx, rdx, rsi, rdi, rsp, rbp, r8, r9, r10, r11, r12, r13, r14, r15, rip, rflags }
}

fn put_sregs(s: &mut State, r: &kvm_sregs) {
    s.segments = [&r.es, &r.cs, &r.ss, &r.ds, &r.fs, &r.gs].map(segment);
    s.tr = segment(&r.tr);
    s.ldt = segment(&r.ldt);
    s.gdt = table(&r.gdt);
    s.idt = table(&r.idt);
    s.cr = [r.cr0, r.cr2, r.cr3, r.cr4, r.cr8];
    s.efer = r.efer;
    s.apic_base = r.apic_base;
}

fn kvm_sregs_of(s: &State) -> kvm_sregs {
    let [es, cs, ss, ds, fs, gs] = s.segments.each_ref().map(kvm_segment_of);
    let [cr0, cr2, cr3, cr4, cr8] = s.cr;
    kvm_sregs {
        cs,
        ds,
        es,
        fs,
        gs,
        ss,
        tr: kvm_segment_of(&s.tr),
        ldt: kvm_segment_of(&s.ldt),
        gdt: kvm_table(&s.gdt),
        idt: kvm_table(&s.idt),
        cr0,
        cr2,
        cr3,
        cr4,
        cr8,
        efer: s.efer,
        apic_base: s.apic_base,
        // Events carry the interrupt that is being delivered.
        interrupt_bitmap: [0; 4],
    }
}

fn events(e: &kvm_vcpu_events) -> Events {
    let code = (e.exception.has_error_code != 0).then_some(e.exception.error_code);
    let active = e.exception.injected != 0 || e.exception.pending != 0;
    Events {
        exception: active.then_some((e.exception.nr, code)),
        interrupt: (e.interrupt.injected != 0).then_some((e.interrupt.nr, e.interrupt.soft != 0)),
        nmi_pending: e.nmi.pending != 0 || e.nmi.injected != 0,
        nmi_masked: e.nmi.masked != 0 && e.nmi.injected == 0,
        shadow: e.interrupt.shadow,
        sipi_vector: e.sipi_vector,
    }
}

fn kvm_events_of(e: &Events) -> kvm_vcpu_events {
    let mut out = kvm_vcpu_events {
        flags: KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR | KVM_VCPUEVENT_VALID_SHADOW,
        sipi_vector: e.sipi_vector,
        ..Default::default()
    };
    if let Some((nr, code)) = e.exception {
        out.exception.injected = 1;
        out.exception.nr = nr;
        out.exception.has_error_code = u8::from(code.is_some());
        out.exception.error_code = code.unwrap_or(0);
    }
    if let Some((nr, soft)) = e.interrupt {
        out.interrupt.injected = 1;
        out.interrupt.nr = nr;
        out.interrupt.soft = u8::from(soft);
    }
    out.interrupt.shadow = e.shadow;
    out.nmi.pending = u8::from(e.nmi_pending);
    out.nmi.masked = u8::from(e.nmi_masked);
    out
}

fn mp_state(state: u32) -> MpState {
    match state {
        KVM_MP_STATE_UNINITIALIZED => MpState::Uninitialized,
        KVM_MP_STATE_INIT_RECEIVED | KVM_MP_STATE_SIPI_RECEIVED => MpState::InitReceived,
        KVM_MP_STATE_HALTED => MpState::Halted,
        _ => MpState::Runnable,
    }
}

fn kvm_mp_state_of(state: MpState) -> kvm_mp_state {
    let mp_state = match state {
        MpState::Runnable => KVM_MP_STATE_RUNNABLE,
        MpState::Uninitialized => KVM_MP_STATE_UNINITIALIZED,
        MpState::InitReceived => KVM_MP_STATE_INIT_RECEIVED,
        MpState::Halted => KVM_MP_STATE_HALTED,
    };
    kvm_mp_state { mp_state }
}

impl KvmVcpu {
    /// Reads everything.
    pub(crate) fn read_state(&mut self) -> Result<State, AccelError> {
        let fail = |what: &'static str| move |e| host(format!("cannot read {what}"), io_error(e));
        let fd = &self.fd;
        // First: asking for it makes KVM act on a pending INIT or SIPI, which changes the rest.
        let mp = fd.get_mp_state().map_err(fail("the run state"))?;
        let regs = fd.get_regs().map_err(fail("registers"))?;
        let debug = fd.get_debug_regs().map_err(fail("debug registers"))?;
        let xcrs = fd.get_xcrs().map_err(fail("XCRs"))?;
        let lapic = fd.get_lapic().map_err(fail("the local APIC"))?;
        let pending = fd.get_vcpu_events().map_err(fail("events"))?;
        let mut state = State {
            gpr: gpr(&regs),
            rip: regs.rip,
            rflags: regs.rflags,
            dr: [debug.db[0], debug.db[1], debug.db[2], debug.db[3], debug.dr6, debug.dr7],
            xcr0: xcrs.xcrs.iter().take(xcrs.nr_xcrs as usize).find(|x| x.xcr == 0).map_or(1, |x| x.value),
            xsave: self.read_xsave()?,
            msrs: self.read_msrs()?,
            lapic: lapic.regs.iter().map(|b| *b as u8).collect(),
            events: events(&pending),
            mp_state: mp_state(mp.mp_state),
            tsc_khz: self.fd.get_tsc_khz().unwrap_or(0),
            cpuid: self.cpuid.clone(),
            ..State::default()
        };
        put_sregs(&mut state, &self.fd.get_sregs().map_err(fail("system registers"))?);
        if state.events.interrupt.is_none() {
            state.events.interrupt = self.undelivered.map(|vector| (vector, false));
        }
        Ok(state)
    }

    fn read_xsave(&self) -> Result<Vec<u8>, AccelError> {
        let head = size_of::<kvm_bindings::kvm_xsave>();
        let mut xsave = Xsave::new((self.vm.xsave_size - head).div_ceil(4))
            .map_err(|e| host("cannot hold the XSAVE area", io::Error::other(format!("{e:?}"))))?;
        if self.vm.xsave_size > head {
            // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM.
            unsafe { self.fd.get_xsave2(&mut xsave) }
                .map_err(|e| host("cannot read the XSAVE area", io_error(e)))?;
        } else {
            let plain = self.fd.get_xsave().map_err(|e| host("cannot read the XSAVE area", io_error(e)))?;
            return Ok(plain.region.iter().flat_map(|w| w.to_le_bytes()).collect());
        }
        let area = xsave.as_fam_struct_ref();
        let words = area.xsave.region.iter().chain(xsave.as_slice());
        Ok(words.flat_map(|w| w.to_le_bytes()).collect())
    }

    fn write_xsave(&self, bytes: &[u8]) -> Result<(), AccelError> {
        if bytes.is_empty() {
            return Ok(());
        }
        if let Some(rest) = bytes.get(self.vm.xsave_size..)
            && rest.iter().any(|b| *b != 0)
        {
            return Err(state_error(format!(
                "its XSAVE area of {} bytes is larger than the host's",
                bytes.len()
            )));
        }
        let head = size_of::<kvm_bindings::kvm_xsave>();
        let mut xsave = Xsave::new((self.vm.xsave_size - head).div_ceil(4))
            .map_err(|e| host("cannot hold the XSAVE area", io::Error::other(format!("{e:?}"))))?;
        let mut words = bytes.chunks(4).map(|c| c.iter().rev().fold(0u32, |v, b| v << 8 | u32::from(*b)));
        // SAFETY: only the words of the fixed part are written, not the length.
        let area = unsafe { xsave.as_mut_fam_struct() };
        for (to, from) in area.xsave.region.iter_mut().zip(&mut words) {
            *to = from;
        }
        for (to, from) in xsave.as_mut_slice().iter_mut().zip(&mut words) {
            *to = from;
        }
        // SAFETY: the area has the size that KVM_CAP_XSAVE2 gave for this VM.
        unsafe { self.fd.set_xsave2(&xsave) }.map_err(|e| host("cannot set the XSAVE area", io_error(e)))
    }

    /// All registers of the index list that can be read.
    fn read_msrs(&self) -> Result<std::collections::BTreeMap<u32, u64>, AccelError> {
        let mut left: &[u32] = &self.vm.msrs;
        let mut out = std::collections::BTreeMap::new();
        while !left.is_empty() {
            let entries: Vec<kvm_msr_entry> =
                left.iter().map(|&index| kvm_msr_entry { index, ..Default::default() }).collect();
            let mut msrs = Msrs::from_entries(&entries)
                .map_err(|e| host("cannot list MSRs", io::Error::other(format!("{e:?}"))))?;
            let n = self.fd.get_msrs(&mut msrs).map_err(|e| host("cannot read MSRs", io_error(e)))?;
            out.extend(msrs.as_slice().iter().take(n).map(|m| (m.index, m.data)));
            // KVM stops at the first that this guest does not have.
            left = left.get(n + 1..).unwrap_or_default();
        }
        Ok(out)
    }

    fn write_msrs(&self, state: &State) -> Result<(), AccelError> {
        let plain = state.msrs.iter().filter(|(index, _)| **index != MSR_TSC_DEADLINE);
        let entry = |(&index, &data): (&u32, &u64)| kvm_msr_entry { index, data, ..Default::default() };
        let mut entries: Vec<kvm_msr_entry> = plain.map(entry).collect();
        // The deadline is compared with the counter, and both must be right when it is armed.
        entries.extend(state.msrs.get_key_value(&MSR_TSC_DEADLINE).map(entry));
        let mut left = &entries[..];
        while !left.is_empty() {
            let chunk = &left[..left.len().min(kvm_bindings::KVM_MAX_MSR_ENTRIES)];
            let msrs = Msrs::from_entries(chunk)
                .map_err(|e| host("cannot list MSRs", io::Error::other(format!("{e:?}"))))?;
            let n = self.fd.set_msrs(&msrs).map_err(|e| host("cannot set MSRs", io_error(e)))?;
            let Some(refused) = chunk.get(n) else {
                left = &left[chunk.len()..];
                continue;
            };
            self.tolerate(refused)?;
            left = left.get(n + 1..).unwrap_or_default();
        }
        Ok(())
    }

    /// A register that cannot be written is no trouble if it has the value already, or should be zero.
    fn tolerate(&self, refused: &kvm_msr_entry) -> Result<(), AccelError> {
        let probe = [kvm_msr_entry { index: refused.index, ..Default::default() }];
        let now = Msrs::from_entries(&probe).ok().and_then(|mut m| match self.fd.get_msrs(&mut m) {
            Ok(1) => m.as_slice().first().map(|e| e.data),
            _ => None,
        });
        // Locked with nothing switched on is what translation shows; a KVM without VMX has no such register.
        let locked_only = refused.index == MSR_FEATURE_CONTROL && refused.data == 1;
        if now == Some(refused.data) || refused.data == 0 || locked_only {
            return Ok(());
        }
        Err(state_error(format!("the host cannot set MSR {:#x} to {:#x}", refused.index, refused.data)))
    }

    /// Says so if KVM has not taken over the time-stamp counter: guests that keep time by it will see a jump.
    fn check_counter(&self, state: &State) {
        let Some(&wanted) = state.msrs.get(&MSR_TSC) else { return };
        let probe = [kvm_msr_entry { index: MSR_TSC, ..Default::default() }];
        let Ok(mut msrs) = Msrs::from_entries(&probe) else { return };
        let a_second = u64::from(self.fd.get_tsc_khz().unwrap_or(0)) * 1000;
        if let (Ok(1), Some(now)) = (self.fd.get_msrs(&mut msrs), msrs.as_slice().first().map(|e| e.data))
            && now.abs_diff(wanted) > a_second
        {
            tracing::warn!(
                "vCPU {}: this host's KVM cannot set the time-stamp counter; a guest that keeps time by it sees it \
                 jump (Linux: `clocksource=kvm-clock` does not)",
                self.index
            );
        }
    }

    fn check_tsc(&self, wanted: u32) -> Result<(), AccelError> {
        let have = self.fd.get_tsc_khz().unwrap_or(0);
        if wanted == 0 || have == 0 || wanted == have {
            return Ok(());
        }
        if self.vm.fd.check_extension(Cap::TscControl) {
            return self
                .fd
                .set_tsc_khz(wanted)
                .map_err(|e| host(format!("cannot set the TSC to {wanted} kHz"), io_error(e)));
        }
        let off = u64::from(wanted.abs_diff(have));
        if off * 1_000_000 <= u64::from(have) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        Err(state_error(format!(
            "its TSC runs at {wanted} kHz, the host's at {have} kHz and cannot be scaled"
        )))
    }

    /// Writes everything, each part after those that KVM checks it against.
    pub(crate) fn write_state(&mut self, state: &State) -> Result<(), AccelError> {
        let fail = |what: &'static str| move |e| host(format!("cannot set {what}"), io_error(e));
        self.check_tsc(state.tsc_khz)?;
        cpuid::same_xsave_layout(&state.cpuid, &self.cpuid, state.xcr0)
            .map_err(|e| state_error(e.to_string()))?;
        let fd = &self.fd;
        fd.set_sregs(&kvm_sregs_of(state)).map_err(fail("system registers"))?;
        fd.set_regs(&kvm_regs_of(state)).map_err(fail("registers"))?;
        if state.xcr0 != 0 {
            let mut xcrs = kvm_xcrs { nr_xcrs: 1, ..Default::default() };
            xcrs.xcrs[0].value = state.xcr0;
            fd.set_xcrs(&xcrs).map_err(fail("XCR0"))?;
        }
        self.write_xsave(&state.xsave)?;
        let [d0, d1, d2, d3, dr6, dr7] = state.dr;
        let debug = kvm_debugregs { db: [d0, d1, d2, d3], dr6, dr7, ..Default::default() };
        fd.set_debug_regs(&debug).map_err(fail("debug registers"))?;
        // After APIC_BASE in the system registers, before the deadline among the MSRs.
        if !state.lapic.is_empty() {
            let mut lapic = kvm_lapic_state::default();
            for (to, from) in lapic.regs.iter_mut().zip(&state.lapic) {
                *to = *from as std::ffi::c_char;
            }
            fd.set_lapic(&lapic).map_err(fail("the local APIC"))?;
        }
        self.write_msrs(state)?;
        self.check_counter(state);
        // The run state after the system registers, which wake a halted boot processor at its reset vector.
        fd.set_mp_state(kvm_mp_state_of(state.mp_state)).map_err(fail("the run state"))?;
        fd.set_vcpu_events(&kvm_events_of(&state.events)).map_err(fail("events"))
    }
}
