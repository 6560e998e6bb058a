//! MXCSR, fences, hints and non-temporal stores of general registers.

use holdfast_tcg_ir::FenceKind;
use iced_x86::{Instruction, Mnemonic};

use crate::translate::{Size, Translator};

impl Translator<'_> {
    /// Instructions of the vector extensions that work on no vector.
    pub(in crate::translate) fn vec_misc(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Prefetchnta | Prefetcht0 | Prefetcht1 | Prefetcht2 | Prefetch | Prefetchw | Prefetchwt1 => true,
            Clflush | Clflushopt | Clwb => {
                // Checked as a load of a byte; caches are the host's business.
                self.sync();
                let at = self.address(insn, 1, false);
                self.load(Size::B1, at);
                true
            }
            Sfence | Lfence => {
                self.b.fence(FenceKind::AcquireRelease);
                true
            }
            Mfence => {
                self.b.fence(FenceKind::Full);
                true
            }
            Movnti => {
                let size = self.op_size(insn, 1);
                let v = self.read_reg(insn.op1_register());
                let at = self.address(insn, size.bytes(), true);
                self.store(size, at, v);
                true
            }
            Ldmxcsr | Vldmxcsr | Stmxcsr | Vstmxcsr => {
                let vex = matches!(insn.mnemonic(), Vldmxcsr | Vstmxcsr);
                if self.vec_allowed(vex) {
                    self.control_register(insn, matches!(insn.mnemonic(), Ldmxcsr | Vldmxcsr));
                }
                true
            }
            _ => false,
        }
    }

    fn control_register(&mut self, insn: &Instruction, load: bool) {
        self.sync();
        let at = self.address(insn, 4, !load);
        if load {
            let v = self.load(Size::B4, at);
            let v = self.b.zext(v);
            self.b.call(self.ids.fpu.ldmxcsr, &[v]);
        } else {
            let v = self.b.call(self.ids.fpu.stmxcsr, &[]);
            let v = self.b.trunc(v);
            self.store(Size::B4, at, v);
        }
    }
}
