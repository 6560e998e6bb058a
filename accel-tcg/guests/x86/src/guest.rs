//! The guest trait for x86.

use std::sync::LazyLock;

use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_tcg_ir::{Builder, HelperTable};
use holdfast_tcg_runtime::{
    Access, CodeReader, Cpu, Fault, Flush, Guest, GuestSpec, Mode, TranslateRequest, Translated, Translation,
};
use iced_x86::{Decoder, Formatter, IntelFormatter};

use crate::helpers::{self, Ids};
use crate::key::{CodeSize, Key, idx};
use crate::state::X86;
use crate::system::regs::vector;
use crate::system::{deliver, events, fault, mmu, mode, reset, transfer};
use crate::translate;

/// The x86 guest: 64-bit processors and everything older that they run.
#[derive(Debug)]
pub struct X86Guest {
    spec: GuestSpec,
    helpers: HelperTable,
    ids: Ids,
}

impl X86Guest {
    /// The guest: the same for all VMs, for it has no state.
    pub fn get() -> &'static Self {
        static GUEST: LazyLock<X86Guest> = LazyLock::new(X86Guest::new);
        &GUEST
    }

    fn new() -> Self {
        let (helpers, ids) = helpers::table();
        let ir =
            holdfast_tcg_ir::GuestSpec { name: "x86_64", pins: translate::PINS, pc_shift: 0, page_bits: 12 };
        let spec = GuestSpec {
            name: "x86_64",
            arch: Arch::X86_64,
            state_size: size_of::<X86>(),
            ir,
            mmu_modes: idx::COUNT,
            insn_align: 1,
            max_insn_len: 15,
            misaligned_ok: true,
            precise_code: true,
        };
        Self { spec, helpers, ids }
    }
}

impl Guest for X86Guest {
    fn spec(&self) -> &GuestSpec {
        &self.spec
    }

    fn helpers(&self) -> &HelperTable {
        &self.helpers
    }

    fn reset(&self, cpu: &mut Cpu<'_>, model: &CpuModel) -> Result<(), String> {
        let CpuModel::X86_64(model) = model else {
            return Err("the CPU model is not one of x86_64".into());
        };
        reset::power_up(cpu, model)
    }

    fn mode(&self, cpu: &mut Cpu<'_>) -> Mode {
        mode::mode(cpu.state())
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
        let mut translation = mmu::translate(state, phys, access)?;
        if events::watch(cpu.state(), access) {
            translation.cacheable = false;
        }
        Ok(translation)
    }

    fn probe(&self, cpu: &mut Cpu<'_>, gva: u64) -> Option<u64> {
        let (state, phys) = cpu.state_and_phys();
        mmu::probe(state, phys, gva)
    }

    fn bus_fault(&self, _access: &Access, _gpa: u64) -> Option<Fault> {
        None // reads as all ones, writes are dropped
    }

    fn misaligned_fault(&self, cpu: &mut Cpu<'_>, access: &Access, _atomic: bool) -> Fault {
        // Vectors have to be aligned in any case; all else only while alignment is checked.
        if access.size == 16 {
            return fault::gp(0);
        }
        mmu::non_canonical(cpu.state(), access).unwrap_or_else(|| fault::coded(vector::AC, 0))
    }

    fn raise(&self, cpu: &mut Cpu<'_>, fault: &Fault) {
        deliver::raise(cpu, fault);
    }

    fn take_interrupt(&self, cpu: &mut Cpu<'_>) -> bool {
        events::take(cpu)
    }

    fn wakes(&self, cpu: &mut Cpu<'_>) -> bool {
        events::wakes(cpu)
    }

    fn export(&self, cpu: &mut Cpu<'_>) -> CpuState {
        CpuState::X86_64(Box::new(transfer::export(cpu)))
    }

    fn import(&self, cpu: &mut Cpu<'_>, state: &CpuState) -> Result<(), String> {
        let CpuState::X86_64(state) = state else {
            return Err("the state is not one of x86_64".into());
        };
        transfer::import(cpu, state)?;
        cpu.flush(Flush::All);
        cpu.mode_changed();
        cpu.request_exit();
        Ok(())
    }

    fn disassemble(&self, key: u32, pc: u64, bytes: &[u8]) -> (usize, String) {
        let key = Key::from_bits_truncate(key);
        let bits = match key.code_size() {
            CodeSize::Bits16 => 16,
            CodeSize::Bits32 => 32,
            CodeSize::Bits64 => 64,
        };
        let insn = Decoder::with_ip(bits, bytes, pc, key.decoder_options()).decode();
        let mut text = String::new();
        IntelFormatter::new().format(&insn, &mut text);
        (insn.len(), text)
    }

    fn describe(&self, cpu: &mut Cpu<'_>) -> String {
        transfer::describe(&transfer::export(cpu))
    }
}
