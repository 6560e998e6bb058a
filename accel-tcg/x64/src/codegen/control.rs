//! Labels, branches and the ways out of a region.

use super::Cx;
use super::cold::Cold;
use crate::asm::{Alu, Cc, Mem, Reg};
use crate::link::{LinkKind, LinkSite};
use crate::stubs;
use holdfast_tcg_ir::env::{self, exit, offset};
use holdfast_tcg_ir::{Inst, Op, Val};

impl Cx<'_> {
    pub(crate) fn control(&mut self, i: &Inst) {
        match i.op {
            Op::Label => self.label(i.a),
            Op::Br => {
                let at = self.st.asm.jmp();
                self.refer(at, i.a);
            }
            Op::BrCond => {
                if let Some(pc) = self.direct_exit(i.c) {
                    return self.branch_out(i, pc);
                }
                let cc = self.compare_cond(i);
                let at = self.st.asm.jcc(cc);
                self.refer(at, i.c);
            }
            Op::GotoPc => self.goto_pc(i.imm()),
            Op::GotoReg => self.goto_reg(Val(i.a)),
            Op::Exit => self.emit_exit(i.a, i.imm()),
            Op::ExitReg => {
                let r = self.gpr(Val(i.b));
                self.st.asm.store(3, Mem::env(offset::PC), r);
                self.leave(i.a);
            }
            _ => self.leave(i.a),
        }
    }

    /// The guest pc that a branch to `label` goes on at, when nothing but a jump within the page is there and no poll is
    /// due: the branch itself can be linked then.
    fn direct_exit(&mut self, label: u32) -> Option<u64> {
        let at = self.r.labels.get(label as usize)?.at? as usize;
        let after = at + 1;
        let jump = self.r.insts.get(after)?;
        let pc = jump.imm();
        let fits = jump.op == Op::GotoPc
            && at > self.at as usize
            && pc > self.pc
            && pc != self.r.entry_pc
            && self.r.same_page(pc, self.spec.page_bits);
        if !fits {
            return None;
        }
        let left = self.st.label_uses.get_mut(label as usize)?;
        *left = left.saturating_sub(1);
        if *left == 0 && self.r.insts.get(at.checked_sub(1)?)?.op.is_terminator() {
            self.st.an.kill(at as u32);
            self.st.an.kill(after as u32);
        }
        Some(pc)
    }

    /// A conditional branch that is a link site.
    fn branch_out(&mut self, i: &Inst, pc: u64) {
        let start = self.st.asm.pos();
        let cc = self.compare_cond(i);
        // The rel32 is to be aligned; no-operations go before the comparison, which is to stay next to the jump.
        let pad = (self.st.asm.pos() + 2).wrapping_neg() % 4;
        self.st.asm.insert_nops(start, pad);
        let jump = self.st.asm.jcc(cc) as u32;
        let n = self.st.links.len();
        self.st.links.push(LinkSite::same_page(pc, jump));
        self.st.cold.push(Cold::Link { from: 0, n });
    }

    fn leave(&mut self, code: u32) {
        self.st.asm.mov_imm(Reg::RAX, u64::from(code));
        let at = self.st.asm.jmp();
        self.reach_stub(at, self.stubs.exit);
    }

    fn refer(&mut self, at: usize, label: u32) {
        match self.st.label_at.get(label as usize).copied().flatten() {
            Some(target) => self.st.asm.patch_rel(at, target as usize),
            None => self.st.label_refs.push((at as u32, label)),
        }
    }

    fn label(&mut self, n: u32) {
        let here = self.st.asm.pos();
        // Those who jump back have what the loop keeps in registers.
        self.begin_loop(self.at);
        let again = self.st.asm.pos();
        if let Some(l) = self.st.label_at.get_mut(n as usize) {
            *l = Some(again as u32);
        }
        let st = &mut *self.st;
        st.label_refs.retain(|&(at, l)| {
            if l == n {
                st.asm.patch_rel(at as usize, here);
            }
            l != n
        });
        self.st.al.forget_all();
        if let Some(l) = self.r.labels.get(n as usize)
            && l.backward
        {
            self.poll(l.pc.unwrap_or(self.pc));
        }
    }

    fn poll(&mut self, pc: u64) {
        self.st.asm.alu_imm(Alu::Cmp, false, Mem::env(offset::EXIT_REQUEST), 0);
        let from = self.st.asm.jcc(Cc::Ne);
        self.st.cold.push(Cold::Exit { from, code: exit::POLL, pc });
    }

    fn goto_pc(&mut self, pc: u64) {
        if pc <= self.pc {
            self.poll(pc);
        }
        if pc == self.r.entry_pc {
            let at = self.st.asm.jmp();
            return self.st.asm.patch_rel(at, self.st.loops.entry);
        }
        let n = self.st.links.len();
        let mut site = LinkSite::same_page(pc, 0);
        if !self.r.same_page(pc, self.spec.page_bits) {
            site.kind = LinkKind::CrossPage;
            let index = env::page_id_index(pc) as i32;
            let a = &mut self.st.asm;
            a.align(4, 3);
            // The displacement must have four bytes, so it is not 0 while encoding.
            a.lea(false, Reg::RAX, Mem::base(Reg::R15, i32::MAX));
            site.id = a.pos() as u32 - 4;
            a.patch32(site.id as usize, 0);
            a.alu(Alu::Cmp, false, Reg::RAX, Mem::env(offset::PAGE_IDS + 4 * index));
            site.miss = a.jcc(Cc::Ne) as u32;
            debug_assert_eq!(site.miss % 4, 0);
        }
        self.st.asm.align(4, 1);
        site.jump = self.st.asm.jmp() as u32;
        self.st.links.push(site);
        self.st.cold.push(Cold::Link { from: site.miss as usize, n });
    }

    fn goto_reg(&mut self, pc: Val) {
        self.copy_to(Reg::RAX, pc);
        let from = stubs::ibtc_probe(&mut self.st.asm, self.spec.pc_shift);
        self.st.cold.push(Cold::Lookup { from, pc: self.pc });
    }
}
