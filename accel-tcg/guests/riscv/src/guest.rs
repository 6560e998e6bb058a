//! The guest trait for RISC-V.

use std::sync::LazyLock;

use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_tcg_ir::{Builder, HelperTable};
use holdfast_tcg_runtime::{
    Access, AccessKind, CodeReader, Cpu, Fault, Flush, Guest, GuestSpec, Mode, TranslateRequest, Translated,
    Translation,
};

use crate::decode::decode;
use crate::hart::Hart;
use crate::helpers::{self, Ids};
use crate::trap::{self, cause};
use crate::{isa, key, mmu, state, timer, translate};

/// The RISC-V guest: RV64IMAFDC with Zicsr, Zifencei, Zicntr, Zba, Zbb, Zbs and Sstc; M, S and U mode.
#[derive(Debug)]
pub struct RiscvGuest {
    spec: GuestSpec,
    helpers: HelperTable,
    ids: Ids,
}

impl RiscvGuest {
    /// The guest: the same for all VMs, for it has no state.
    pub fn get() -> &'static Self {
        static GUEST: LazyLock<RiscvGuest> = LazyLock::new(RiscvGuest::new);
        &GUEST
    }

    fn new() -> Self {
        let (helpers, ids) = helpers::table();
        let ir =
            holdfast_tcg_ir::GuestSpec { name: "riscv64", pins: translate::PINS, pc_shift: 1, page_bits: 12 };
        let spec = GuestSpec {
            name: "riscv64",
            arch: Arch::Riscv64,
            state_size: size_of::<Hart>(),
            ir,
            mmu_modes: mmu::idx::COUNT,
            insn_align: 2,
            max_insn_len: 4,
            misaligned_ok: true,
            precise_code: false,
        };
        Self { spec, helpers, ids }
    }
}

impl Guest for RiscvGuest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn helpers(&self) -> &HelperTable {
        &self.helpers
    }

    fn reset(&self, cpu: &mut Cpu<'_>, model: &CpuModel) -> Result<(), String> {
        let CpuModel::Riscv64(model) = model else {
            return Err("the CPU model is not one of riscv64".into());
        };
        state::reset(cpu, isa::parse(model)?);
        Ok(())
    }

    fn mode(&self, cpu: &mut Cpu<'_>) -> Mode {
        key::mode(cpu.state())
    }

    fn translate(
        &self,
        request: &TranslateRequest,
        code: &mut CodeReader<'_, '_>,
        builder: &mut Builder,
    ) -> Result<Translated, Fault> {
        let translated = translate::region(request, code, builder, &self.ids)?;
        debug_assert_eq!(
            holdfast_tcg_ir::verify(builder.region(), &self.helpers),
            Ok(()),
            "at {:#x}",
            request.pc
        );
        Ok(translated)
    }

    fn fill(&self, cpu: &mut Cpu<'_>, access: &Access) -> Result<Translation, Fault> {
        let (state, phys) = cpu.state_and_phys();
        mmu::translate(state, phys, access)
    }

    fn probe(&self, cpu: &mut Cpu<'_>, gva: u64) -> Option<u64> {
        let (state, phys) = cpu.state_and_phys();
        mmu::probe(state, phys, gva)
    }

    fn bus_fault(&self, access: &Access, _gpa: u64) -> Option<Fault> {
        Some(mmu::access_fault(access))
    }

    fn misaligned_fault(&self, _cpu: &mut Cpu<'_>, access: &Access, _atomic: bool) -> Fault {
        let cause = match access.kind {
            AccessKind::Read => cause::LOAD_MISALIGNED,
            AccessKind::Write => cause::STORE_MISALIGNED,
            AccessKind::Fetch => cause::FETCH_MISALIGNED,
        };
        Fault { cause, value: access.gva, aux: 0 }
    }

    fn raise(&self, cpu: &mut Cpu<'_>, fault: &Fault) {
        let pc = cpu.pc();
        let handler = trap::enter(cpu.state(), pc, fault.cause, fault.value);
        cpu.set_pc(handler);
    }

    fn take_interrupt(&self, cpu: &mut Cpu<'_>) -> bool {
        // The deadline may have fired a little early, or never have been set on this run.
        timer::arm(cpu);
        let pending = timer::pending(cpu);
        let Some(cause) = trap::next_interrupt(cpu.state(), pending) else { return false };
        let pc = cpu.pc();
        let handler = trap::enter(cpu.state(), pc, cause, 0);
        cpu.set_pc(handler);
        cpu.set_halted(false);
        true
    }

    fn wakes(&self, cpu: &mut Cpu<'_>) -> bool {
        let pending = timer::pending(cpu);
        trap::wakes(cpu.state(), pending)
    }

    fn export(&self, cpu: &mut Cpu<'_>) -> CpuState {
        CpuState::Riscv64(Box::new(state::export(cpu)))
    }

    fn import(&self, cpu: &mut Cpu<'_>, state: &CpuState) -> Result<(), String> {
        let CpuState::Riscv64(state) = state else {
            return Err("the state is not one of riscv64".into());
        };
        state::import(cpu, state)?;
        cpu.flush(Flush::All);
        cpu.mode_changed();
        timer::arm(cpu);
        cpu.request_exit();
        Ok(())
    }

    fn disassemble(&self, _key: u32, _pc: u64, bytes: &[u8]) -> (usize, String) {
        let word = bytes.iter().take(4).rev().fold(0_u32, |word, byte| word << 8 | u32::from(*byte));
        match decode(word) {
            (Some(insn), len) => (usize::from(len), text(insn)),
            (None, len) => (usize::from(len), "illegal".into()),
        }
    }

    fn describe(&self, cpu: &mut Cpu<'_>) -> String {
        state::describe(&state::export(cpu))
    }
}

/// An instruction as the tables name it, with its operands by name: `addi rd: 10, rs1: 0, imm: 5`.
fn text(insn: crate::decode::Insn) -> String {
    let debug = format!("{insn:?}");
    let operands =
        debug.split_once('{').map_or("", |(_, operands)| operands).trim_end_matches([')', '}', ' ']);
    format!("{}{operands}", insn.name())
}
