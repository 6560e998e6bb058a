//! The printer: one line per instruction.

use crate::op::{Inst, Op};
use crate::region::Region;
use crate::verify::defines;
use std::fmt;

impl fmt::Display for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(
            f,
            "region {:#x}, {} instructions, {} bytes",
            self.entry_pc, self.guest_insns, self.guest_len
        )?;
        for (n, i) in self.insts.iter().enumerate() {
            match i.op {
                Op::Nop => continue,
                Op::Label => write!(f, "L{}:", i.a)?,
                Op::InsnStart => write!(f, "  ; {:#x}", i.imm())?,
                _ if defines(i) => write!(f, "  v{n}:{} = ", i.ty)?,
                _ => write!(f, "  ")?,
            }
            print(self, i, f)?;
            writeln!(f)?;
        }
        Ok(())
    }
}

fn print(r: &Region, i: &Inst, f: &mut fmt::Formatter<'_>) -> fmt::Result {
    match i.op {
        Op::Label | Op::InsnStart => Ok(()),
        Op::Const => write!(f, "{:#x}", i.imm()),
        Op::GetSlot => write!(f, "[{}]", i.a),
        Op::SetSlot => write!(f, "[{}]:{} = v{}", i.a, i.ty, i.b),
        Op::SetCond => write!(f, "v{} {:?} v{}", i.a, i.cond(), i.b),
        Op::BrCond => write!(f, "if v{} {:?} v{} goto L{}", i.a, i.cond(), i.b, i.c),
        Op::Br => write!(f, "goto L{}", i.a),
        Op::Load => write!(f, "load.{:#x} v{}{:+}", i.mem().0, i.a, i.disp()),
        Op::Store => write!(f, "store.{:#x} v{}{:+}, v{}", i.mem().0, i.a, i.disp(), i.b),
        Op::AtomicRmw => write!(f, "rmw.{:#x} {:?} v{}, v{}", i.mem().0, i.rmw(), i.a, i.b),
        Op::GotoPc => write!(f, "goto_pc {:#x}", i.imm()),
        Op::Exit => write!(f, "exit {} at {:#x}", i.a, i.imm()),
        Op::ExitReg => write!(f, "exit {} at v{}", i.a, i.b),
        Op::ExitAsIs => write!(f, "exit {}", i.a),
        Op::Call => {
            write!(f, "call h{}", i.a)?;
            r.call_args(i).iter().try_for_each(|v| write!(f, " {v}"))
        }
        Op::Vec | Op::VecFp => {
            match r.vec(i) {
                Some(v) => write!(f, "{:?} {:?} {}.{}.{:02x}", i.op, v.form, v.pp, v.map, v.opcode)?,
                None => write!(f, "{:?} ?", i.op)?,
            }
            if let Some(imm) = r.vec(i).and_then(|v| v.imm) {
                write!(f, " {imm:#x}")?;
            }
            i.uses().try_for_each(|v| write!(f, " {v}"))
        }
        Op::Host => match r.host(i) {
            Some((bytes, _)) => {
                write!(f, "host")?;
                bytes.iter().try_for_each(|b| write!(f, " {b:02x}"))
            }
            None => write!(f, "host ?"),
        },
        _ => {
            write!(f, "{:?}", i.op)?;
            if i.aux != 0 {
                write!(f, ".{:#x}", i.aux)?;
            }
            i.uses().try_for_each(|v| write!(f, " {v}"))
        }
    }
}
