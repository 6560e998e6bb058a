//! System instructions: most call a helper, and look up what follows under the modes that hold then.

use holdfast_tcg_ir::{Cond, FenceKind, HelperId, JumpHint, Slot, Type, Val};
use iced_x86::{Instruction, Mnemonic, OpKind, Register};

use super::operand::segment;
use super::{Addr, Size, Translator};
use crate::flags::rflags;
use crate::key::Key;
use crate::state::{SegmentRegister, X86, seg, slot};
use crate::system::helpers::{Strings, int};
use crate::system::regs::vector;

/// The selectors of LDTR and TR, and CR0.
const LDT: Slot = Slot::i64(std::mem::offset_of!(X86, ldt) + std::mem::offset_of!(SegmentRegister, selector));
const TR: Slot = Slot::i64(std::mem::offset_of!(X86, tr) + std::mem::offset_of!(SegmentRegister, selector));
const CR0: Slot = Slot::i64(std::mem::offset_of!(X86, cr0));
const TSC_AUX: Slot = Slot::i64(std::mem::offset_of!(X86, tsc_aux));

/// What a system instruction does, for those that are a helper's call.
enum After {
    /// The next instruction follows.
    Next(HelperId),
    /// The same, but modes may be others: it is looked up.
    Lookup(HelperId),
}

impl Translator<'_> {
    /// Translates system instructions; false if `insn` is something else.
    pub(super) fn system(&mut self, insn: &Instruction) -> bool {
        self.plain_system(insn)
            || self.transfers(insn)
            || self.moves_system(insn)
            || self.descriptors(insn)
            || self.registers(insn)
            || self.ports(insn)
            || self.hints(insn)
    }

    fn lookup_next(&mut self) {
        let next = self.next;
        self.goto_lookup(next);
    }

    fn bytes(&mut self, size: Size) -> Val {
        self.b.iconst(i64::from(size.bytes()))
    }

    /// Instructions without operands.
    fn plain_system(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        let s = self.ids.sys;
        let call = match insn.mnemonic() {
            Clts => After::Lookup(s.clts),
            Rdmsr => After::Next(s.rdmsr),
            Wrmsr => After::Lookup(s.wrmsr),
            Rdpmc => After::Next(s.rdpmc),
            Cpuid => After::Lookup(s.cpuid),
            Swapgs => After::Next(s.swapgs),
            Xgetbv => After::Next(s.xgetbv),
            Xsetbv => After::Lookup(s.xsetbv),
            Vmcall | Vmmcall => After::Next(s.vmcall),
            Rdpkru => After::Next(s.rdpkru),
            Wrpkru => After::Lookup(s.wrpkru),
            Wbinvd | Invd | Wbnoinvd => After::Next(s.privileged),
            Rdtsc | Rdtscp => {
                let p = self.b.iconst(i64::from(insn.mnemonic() == Rdtscp));
                self.call_system(s.rdtsc, &[p]);
                return true;
            }
            Stac | Clac => {
                let on = self.b.iconst(i64::from(insn.mnemonic() == Stac));
                self.call_system(s.set_ac, &[on]);
                self.lookup_next();
                return true;
            }
            Hlt => {
                let next = self.b.iconst(self.next as i64);
                self.call_system(s.hlt, &[next]);
                let next = self.next;
                self.b.exit(holdfast_tcg_ir::env::exit::RESUME, next); // not reached: the helper leaves
                return true;
            }
            Monitor => {
                self.monitor(insn);
                return true;
            }
            Mwait => {
                let next = self.next;
                let behind = self.b.iconst(next as i64);
                self.call_system(s.mwait, &[behind]);
                self.b.exit(holdfast_tcg_ir::env::exit::RESUME, next); // not reached: the helper leaves
                return true;
            }
            Cli => {
                self.clear_interrupts();
                return true;
            }
            Sti => {
                self.set_interrupts();
                return true;
            }
            _ => return false,
        };
        match call {
            After::Next(id) => {
                self.call_system(id, &[]);
            }
            After::Lookup(id) => {
                self.call_system(id, &[]);
                self.lookup_next();
            }
        }
        true
    }

    /// MONITOR, whose address is in rAX.
    fn monitor(&mut self, insn: &Instruction) {
        use iced_x86::Code::*;
        let rax = self.gpr(0);
        let offset = match insn.code() {
            Monitorw => self.b.andi(rax, 0xffff),
            Monitord => self.wrap32(rax),
            _ => rax,
        };
        let register = match insn.segment_prefix() {
            Register::None => seg::DS,
            prefix => segment(prefix),
        };
        let at = self.linear(register, Addr { base: offset, disp: 0 }, 1, false);
        let at = self.whole(at);
        let idx = self.b.iconst(i64::from(self.key.mmu_idx()));
        self.call_system(self.ids.sys.monitor, &[at, idx]);
        self.lookup_next();
    }

    fn clear_interrupts(&mut self) {
        if !self.key.intersects(Key::IOPL_OK | Key::VIRTUAL_IF) {
            return self.raise(vector::GP, Some(0));
        }
        let flags = self.b.get(slot::FLAGS);
        if self.key.contains(Key::VIRTUAL_IF) {
            let flags = self.b.andi(flags, !(rflags::VIF as i64));
            return self.b.set(slot::FLAGS, flags);
        }
        let flags = self.b.andi(flags, !(rflags::IF as i64));
        self.b.set(slot::FLAGS, flags);
    }

    /// STI: interrupts are recognised behind the next instruction. Within a region they are not before its end, so
    /// the interrupt shadow has to be told of only behind the last.
    fn set_interrupts(&mut self) {
        if self.key.contains(Key::VIRTUAL_IF) {
            let flags = self.b.get(slot::FLAGS);
            let pending = self.b.andi(flags, rflags::VIP as i64);
            let zero = self.b.iconst(0);
            self.raise_if((Cond::Ne, pending, zero), vector::GP, Some(0));
            let flags = self.b.ori(flags, rflags::VIF as i64);
            return self.b.set(slot::FLAGS, flags);
        }
        if !self.key.contains(Key::IOPL_OK) {
            return self.raise(vector::GP, Some(0));
        }
        let last = self.scan.lines.last().is_none_or(|l| l.pc == self.pc);
        let followed = self.b.iconst(i64::from(!last));
        let next = self.b.iconst(self.next as i64);
        self.call_system(self.ids.sys.sti, &[followed, next]);
        if last {
            self.lookup_next();
        }
    }

    /// Transfers of control that may change privilege.
    fn transfers(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        let next = self.next;
        match insn.mnemonic() {
            Int | Int3 | Into | Int1 => self.software_interrupt(insn),
            Iret | Iretd | Iretq => {
                let size = match insn.mnemonic() {
                    Iret => Size::B2,
                    Iretd => Size::B4,
                    _ => Size::B8,
                };
                let args = [self.bytes(size)];
                self.go(self.ids.sys.iret, &args);
            }
            Syscall => {
                let args = [self.ip_of(next)];
                self.go(self.ids.sys.syscall, &args);
            }
            Sysret | Sysretq => {
                let args = [self.bytes(if insn.mnemonic() == Sysretq { Size::B8 } else { Size::B4 })];
                self.go(self.ids.sys.sysret, &args);
            }
            Sysenter => self.go(self.ids.sys.sysenter, &[]),
            Sysexit | Sysexitq => {
                let args = [self.bytes(if insn.mnemonic() == Sysexitq { Size::B8 } else { Size::B4 })];
                self.go(self.ids.sys.sysexit, &args);
            }
            Retf => {
                use iced_x86::Code::*;
                let size = match insn.code() {
                    Retfw | Retfw_imm16 => Size::B2,
                    Retfd | Retfd_imm16 => Size::B4,
                    _ => Size::B8,
                };
                let extra = if insn.op_count() == 1 { insn.immediate16() } else { 0 };
                let args = [self.bytes(size), self.b.iconst(i64::from(extra))];
                self.go(self.ids.sys.far_ret, &args);
            }
            Jmp if is_far(insn) => self.far(insn, self.ids.sys.far_jump),
            Call if is_far(insn) => self.far(insn, self.ids.sys.far_call),
            _ => return false,
        }
        true
    }

    /// Goes on where a helper says.
    fn go(&mut self, id: HelperId, args: &[Val]) {
        let pc = self.call_system(id, args);
        self.goto_val(pc, JumpHint::Jump);
    }

    fn software_interrupt(&mut self, insn: &Instruction) {
        let (number, kind) = match insn.mnemonic() {
            Mnemonic::Int3 => (vector::BP, int::TRAP),
            Mnemonic::Int1 => (vector::DB, int::INT1),
            Mnemonic::Into => (vector::OF, int::TRAP),
            _ => (insn.immediate8(), int::NUMBER),
        };
        let next = self.next;
        if insn.mnemonic() == Mnemonic::Into {
            let (cc, a, b) = self.condition(1); // not overflow
            let test = self.b.setcond(cc, a, b);
            let zero = self.b.iconst(0);
            self.branch((Cond::Ne, test, zero), next);
            if self.b.terminated() {
                return; // known not to overflow
            }
        }
        let args = [self.b.iconst(i64::from(number)), self.ip_of(next), self.b.iconst(kind as i64)];
        self.go(self.ids.sys.interrupt, &args);
    }

    fn far(&mut self, insn: &Instruction, id: HelperId) {
        use iced_x86::Code::*;
        let size = match insn.code() {
            Jmp_ptr1616 | Call_ptr1616 | Jmp_m1616 | Call_m1616 => Size::B2,
            Jmp_m1664 | Call_m1664 => Size::B8,
            _ => Size::B4,
        };
        let (selector, offset) = match insn.op0_kind() {
            OpKind::FarBranch16 => {
                let offset = self.b.iconst(i64::from(insn.far_branch16()));
                (self.b.iconst(i64::from(insn.far_branch_selector())), offset)
            }
            OpKind::FarBranch32 => {
                let offset = self.b.iconst(i64::from(insn.far_branch32()));
                (self.b.iconst(i64::from(insn.far_branch_selector())), offset)
            }
            _ => self.far_pointer(insn, size),
        };
        let next = self.next;
        let args = [selector, offset, self.bytes(size), self.ip_of(next)];
        self.go(id, &args);
    }

    /// Loads a far pointer: (selector, offset), both `I64`.
    fn far_pointer(&mut self, insn: &Instruction, size: Size) -> (Val, Val) {
        let at = self.address(insn, size.bytes() + 2, false);
        let offset = self.load(size, at);
        let offset = self.to64(size, offset);
        let selector = self.load(Size::B2, Addr { base: at.base, disp: at.disp + size.bytes() as i32 });
        (self.to64(Size::B2, selector), offset)
    }

    /// MOV and POP with segment, control and debug registers; LDS and the like.
    fn moves_system(&mut self, insn: &Instruction) -> bool {
        match insn.mnemonic() {
            Mnemonic::Mov => {
                let (to, from) = (register(insn, 0), register(insn, 1));
                if from.is_segment_register() {
                    self.store_selector(insn, slot::seg_selector(segment(from)));
                } else if to.is_segment_register() {
                    self.mov_to_segment(insn, to);
                } else if to.is_cr() || to.is_dr() {
                    let v = self.gpr(from.number());
                    let v = if self.long() { v } else { self.wrap32(v) };
                    let n = self.b.iconst(to.number() as i64);
                    let id = if to.is_cr() { self.ids.sys.write_cr } else { self.ids.sys.write_dr };
                    self.call_system(id, &[n, v]);
                    self.lookup_next();
                } else if from.is_cr() || from.is_dr() {
                    let n = self.b.iconst(from.number() as i64);
                    let id = if from.is_cr() { self.ids.sys.read_cr } else { self.ids.sys.read_dr };
                    let v = self.call_system(id, &[n]);
                    let size = Size::of(to.size());
                    let v = self.narrow(size, v);
                    self.write_reg(to, v);
                } else {
                    return false;
                }
            }
            Mnemonic::Pop if register(insn, 0).is_segment_register() => self.pop_segment(insn),
            Mnemonic::Lds | Mnemonic::Les | Mnemonic::Lss | Mnemonic::Lfs | Mnemonic::Lgs => {
                let r = match insn.mnemonic() {
                    Mnemonic::Lds => seg::DS,
                    Mnemonic::Les => seg::ES,
                    Mnemonic::Lss => seg::SS,
                    Mnemonic::Lfs => seg::FS,
                    _ => seg::GS,
                };
                let to = insn.op_register(0);
                let size = Size::of(to.size());
                let (selector, offset) = self.far_pointer(insn, size);
                self.load_segment(r, selector);
                let v = self.narrow(size, offset);
                self.write_reg(to, v);
                self.lookup_next();
            }
            _ => return false,
        }
        true
    }

    fn load_segment(&mut self, r: usize, selector: Val) {
        let args = [self.b.iconst(r as i64), selector];
        self.call_system(self.ids.sys.load_seg, &args);
    }

    fn mov_to_segment(&mut self, insn: &Instruction, to: Register) {
        if to == Register::CS {
            return self.raise(vector::UD, None);
        }
        let v = self.read_op(insn, 1, Size::B2);
        let v = if self.b.ty(v) == Type::I64 { v } else { self.b.zext(v) };
        let selector = self.b.andi(v, 0xffff);
        self.load_segment(segment(to), selector);
        self.lookup_next();
    }

    fn pop_segment(&mut self, insn: &Instruction) {
        let size = Self::item_size(insn);
        let sp = self.gpr(4);
        let at = self.stack_at(sp, 0, size, false);
        let v = self.load(Size::B2, at);
        let selector = self.to64(Size::B2, v);
        self.load_segment(segment(insn.op_register(0)), selector);
        self.move_sp(sp, i64::from(size.bytes()));
        self.lookup_next();
    }

    /// Stores a selector: 16 bits to memory, zero-extended to registers.
    fn store_selector(&mut self, insn: &Instruction, from: Slot) {
        let v = self.b.get(from);
        self.store_word(insn, v);
    }

    fn store_word(&mut self, insn: &Instruction, v: Val) {
        let size =
            if insn.op0_kind() == OpKind::Register { Size::of(insn.op_register(0).size()) } else { Size::B2 };
        let v = self.narrow(size, v);
        self.write_op(insn, 0, size, v);
    }

    /// True if user-mode instruction prevention forbids the instruction; the fault is raised then.
    fn prevented(&mut self) -> bool {
        if self.key.contains(Key::UMIP) {
            self.raise(vector::GP, Some(0));
            return true;
        }
        false
    }

    /// The 16-bit operand 0, zero-extended.
    fn selector_operand(&mut self, insn: &Instruction, n: u32) -> Val {
        let v = self.read_op(insn, n, Size::B2);
        let v = if self.b.ty(v) == Type::I64 { v } else { self.b.zext(v) };
        self.b.andi(v, 0xffff)
    }

    /// Descriptor tables and what tells of descriptors.
    fn descriptors(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Lldt | Ltr | Lmsw if self.key.contains(Key::PROTECTED) && self.key.cpl() != 0 => {
                self.raise(vector::GP, Some(0));
            }
            Lldt | Ltr => {
                let v = self.selector_operand(insn, 0);
                let id = if insn.mnemonic() == Lldt { self.ids.sys.lldt } else { self.ids.sys.ltr };
                self.call_system(id, &[v]);
            }
            Sldt | Str => {
                if !self.key.contains(Key::PROTECTED) {
                    return false;
                }
                if !self.prevented() {
                    self.store_selector(insn, if insn.mnemonic() == Sldt { LDT } else { TR });
                }
            }
            Smsw => {
                if !self.prevented() {
                    let v = self.b.get(CR0);
                    self.store_word(insn, v);
                }
            }
            Lmsw => {
                let v = self.selector_operand(insn, 0);
                self.call_system(self.ids.sys.lmsw, &[v]);
                self.lookup_next();
            }
            Lgdt | Lidt | Sgdt | Sidt => self.table(insn),
            Lar | Lsl => {
                let v = self.selector_operand(insn, 1);
                let to = insn.op_register(0);
                let size = Size::of(to.size());
                let old = self.gpr(to.number());
                let id = if insn.mnemonic() == Lar { self.ids.sys.lar } else { self.ids.sys.lsl };
                let v = self.call_system(id, &[v, old]);
                // Without success the destination stays as it is, upper half included.
                let v = if size == Size::B8 { v } else { self.b.trunc(v) };
                self.write_reg(to, v);
            }
            Verr | Verw => {
                let v = self.selector_operand(insn, 0);
                let write = self.b.iconst(i64::from(insn.mnemonic() == Verw));
                self.call_system(self.ids.sys.verify, &[v, write]);
            }
            _ => return false,
        }
        true
    }

    fn table(&mut self, insn: &Instruction) {
        use Mnemonic::*;
        let store = matches!(insn.mnemonic(), Sgdt | Sidt);
        if store && self.prevented() {
            return;
        }
        use iced_x86::Code::*;
        let size = match insn.code() {
            Lgdt_m1632_16 | Lidt_m1632_16 | Sgdt_m1632_16 | Sidt_m1632_16 => Size::B2,
            Lgdt_m1664 | Lidt_m1664 | Sgdt_m1664 | Sidt_m1664 => Size::B8,
            _ => Size::B4,
        };
        let at = self.address(insn, if size == Size::B8 { 10 } else { 6 }, store);
        let at = self.whole(at);
        let idt = matches!(insn.mnemonic(), Lidt | Sidt);
        let args = [
            self.b.iconst(i64::from(idt)),
            at,
            self.bytes(size),
            self.b.iconst(i64::from(self.key.mmu_idx())),
        ];
        let id = if store { self.ids.sys.store_table } else { self.ids.sys.load_table };
        self.call_system(id, &args);
    }

    /// Translations, segment bases, random numbers.
    fn registers(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Invlpg => {
                // The address is no access: no segment check.
                let offset = self.offset(insn);
                let at = match self.long() {
                    true => {
                        let s = segment(insn.memory_segment());
                        let at = self.linear(s, Addr { base: offset, disp: 0 }, 1, false);
                        self.whole(at)
                    }
                    false => {
                        let base = self.b.get(slot::seg_base(segment(insn.memory_segment())));
                        let at = self.b.add(offset, base);
                        self.wrap32(at)
                    }
                };
                self.call_system(self.ids.sys.invlpg, &[at]);
                self.lookup_next();
            }
            Invpcid => {
                let r = insn.op_register(0);
                let kind = self.gpr(r.number());
                let kind = if r.size() == 8 { kind } else { self.wrap32(kind) };
                let at = self.address(insn, 16, false);
                let at = self.whole(at);
                let idx = self.b.iconst(i64::from(self.key.mmu_idx()));
                self.call_system(self.ids.sys.invpcid, &[kind, at, idx]);
                self.lookup_next();
            }
            Rdfsbase | Rdgsbase | Wrfsbase | Wrgsbase => self.segment_base(insn),
            Rdrand | Rdseed => {
                let v = self.call_system(self.ids.sys.random, &[]);
                let to = insn.op_register(0);
                let v = self.narrow(Size::of(to.size()), v);
                self.write_reg(to, v);
            }
            Rdpid => {
                let v = self.b.get(TSC_AUX);
                let to = insn.op_register(0);
                let v = self.narrow(Size::of(to.size()), v);
                self.write_reg(to, v);
            }
            _ => return false,
        }
        true
    }

    fn segment_base(&mut self, insn: &Instruction) {
        let r = insn.op_register(0);
        let size = Size::of(r.size());
        let s = if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Wrfsbase) {
            seg::FS
        } else {
            seg::GS
        };
        let n = self.b.iconst(s as i64);
        if matches!(insn.mnemonic(), Mnemonic::Rdfsbase | Mnemonic::Rdgsbase) {
            let v = self.call_system(self.ids.sys.read_base, &[n]);
            let v = self.narrow(size, v);
            return self.write_reg(r, v);
        }
        let v = self.gpr(r.number());
        let v = if size == Size::B8 { v } else { self.wrap32(v) };
        self.call_system(self.ids.sys.write_base, &[n, v]);
    }

    /// IN, OUT, INS, OUTS.
    fn ports(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            In => {
                let to = insn.op_register(0);
                let size = Size::of(to.size());
                let args = [self.port(insn, 1), self.bytes(size)];
                let v = self.call_system(self.ids.sys.port_in, &args);
                let v = self.narrow(size, v);
                self.write_reg(to, v);
                self.lookup_next();
            }
            Out => {
                let from = insn.op_register(1);
                let size = Size::of(from.size());
                let v = self.gpr(0);
                let args = [self.port(insn, 0), self.bytes(size), v];
                self.call_system(self.ids.sys.port_out, &args);
                self.lookup_next();
            }
            Insb | Insw | Insd | Outsb | Outsw | Outsd => {
                let size = match insn.mnemonic() {
                    Insb | Outsb => 1,
                    Insw | Outsw => 2,
                    _ => 4,
                };
                let input = matches!(insn.mnemonic(), Insb | Insw | Insd);
                let pointer = if input { insn.op0_kind() } else { insn.op1_kind() };
                let address = match pointer {
                    OpKind::MemoryESDI | OpKind::MemorySegSI => 2,
                    OpKind::MemoryESEDI | OpKind::MemorySegESI => 4,
                    _ => 8,
                };
                let how = Strings {
                    size,
                    address,
                    segment: segment(insn.memory_segment()) as u8,
                    repeat: insn.has_rep_prefix() || insn.has_repne_prefix(),
                    idx: self.key.mmu_idx(),
                };
                let how = self.b.iconst(how.pack());
                let id = if input { self.ids.sys.ins } else { self.ids.sys.outs };
                self.call_system(id, &[how]);
                self.lookup_next();
            }
            _ => return false,
        }
        true
    }

    fn port(&mut self, insn: &Instruction, n: u32) -> Val {
        if insn.op_kind(n) == OpKind::Register {
            let v = self.gpr(2);
            return self.b.andi(v, 0xffff);
        }
        self.b.iconst(i64::from(insn.immediate8()))
    }

    /// Fences and what only hints.
    fn hints(&mut self, insn: &Instruction) -> bool {
        use Mnemonic::*;
        match insn.mnemonic() {
            Mfence | Lfence | Sfence => {
                if insn.mnemonic() == Mfence {
                    self.b.fence(FenceKind::Full);
                }
            }
            Pause => {
                self.call_system(self.ids.sys.pause, &[]);
            }
            Clflush | Clflushopt | Clwb => {
                // It faults as a load does.
                let at = self.address(insn, 1, false);
                self.load(Size::B1, at);
            }
            Cldemote | Serialize => {}
            _ => return false,
        }
        true
    }
}

fn register(insn: &Instruction, n: u32) -> Register {
    if insn.op_count() > n && insn.op_kind(n) == OpKind::Register {
        insn.op_register(n)
    } else {
        Register::None
    }
}

fn is_far(insn: &Instruction) -> bool {
    matches!(insn.op0_kind(), OpKind::FarBranch16 | OpKind::FarBranch32)
        || insn.is_jmp_far_indirect()
        || insn.is_call_far_indirect()
}
