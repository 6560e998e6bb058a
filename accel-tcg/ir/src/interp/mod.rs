//! The interpreter: executes a region over an environment, one instruction after the other, by the plain meaning of
//! each. It is the oracle of the back ends and shares nothing with them but the environment's layout.

mod fp;

use crate::env::{SlowPaths, exit, header};
use crate::fold::{eval_binary, eval_unary};
use crate::helper::{Effects, HelperFn, HelperRet, HelperTable};
use crate::op::{Inst, MemOp, Op};
use crate::region::Region;
use crate::types::{Type, Val};
use crate::vec::VecInsn;
use crate::{Helper, HelperId};

/// How a region ended.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Outcome {
    /// Execution goes on at this guest pc.
    Goto(u64),
    /// Exit with a code, the guest pc is in [`crate::env::EnvHeader::pc`].
    Exit(u32),
}

/// Guest memory as the interpreter sees it. Errors are exit codes; the guest's exception has been noted.
pub trait Memory {
    /// Loads, extended as `mem` says.
    fn load(&mut self, va: u64, mem: MemOp, pc: u64) -> Result<u64, u32>;
    /// Stores the low bytes of `value`.
    fn store(&mut self, va: u64, mem: MemOp, pc: u64, value: u64) -> Result<(), u32>;
    /// Atomic read-modify-write; `desc` is [`Inst::aux`]. Returns the old value, extended.
    fn rmw(&mut self, va: u64, desc: u16, pc: u64, value: u64) -> Result<u64, u32>;
    /// Atomic compare and swap of (expected, new). Returns the old value, extended.
    fn cas(&mut self, va: u64, mem: MemOp, pc: u64, values: (u64, u64)) -> Result<u64, u32>;
}

/// Guest memory through a runtime's slow paths.
#[derive(Debug)]
pub struct SlowMemory {
    env: *mut u8,
    slow: SlowPaths,
}

impl SlowMemory {
    /// # Safety
    /// `env` is what the functions of `slow` expect, as long as this exists.
    pub unsafe fn new(env: *mut u8, slow: SlowPaths) -> Self {
        Self { env, slow }
    }
}

fn checked(r: HelperRet) -> Result<u64, u32> {
    if r.exit == 0 { Ok(r.value) } else { Err(r.exit as u32) }
}

impl Memory for SlowMemory {
    fn load(&mut self, va: u64, mem: MemOp, pc: u64) -> Result<u64, u32> {
        // SAFETY: by the contract of `new`.
        checked(unsafe { (self.slow.load)(self.env, va, u32::from(mem.0), pc) })
    }

    fn store(&mut self, va: u64, mem: MemOp, pc: u64, value: u64) -> Result<(), u32> {
        // SAFETY: by the contract of `new`.
        checked(unsafe { (self.slow.store)(self.env, va, u32::from(mem.0), pc, value) }).map(drop)
    }

    fn rmw(&mut self, va: u64, desc: u16, pc: u64, value: u64) -> Result<u64, u32> {
        // SAFETY: by the contract of `new`.
        checked(unsafe { (self.slow.rmw)(self.env, va, u32::from(desc), pc, value) })
    }

    fn cas(&mut self, va: u64, mem: MemOp, pc: u64, (expected, new): (u64, u64)) -> Result<u64, u32> {
        // SAFETY: by the contract of `new`.
        checked(unsafe { (self.slow.cas)(self.env, va, u32::from(mem.0), pc, expected, new) })
    }
}

/// Runs host instructions for the interpreter, which shares nothing else with the host.
pub trait Native: std::fmt::Debug + Send {
    /// Executes a vector instruction with a result of type `ty` under the guest's MXCSR, which is updated. `None` if it cannot.
    fn vec(&mut self, insn: &VecInsn, ty: Type, args: [(Type, u128); 3], mxcsr: &mut u32) -> Option<u128>;

    /// Runs host code on the environment under its MXCSR, which is updated. False if it cannot.
    ///
    /// # Safety
    /// `code` is as [`crate::HostCode`] says and fits the environment, that nobody else uses meanwhile.
    unsafe fn host(&mut self, code: &[u8], env: *mut u8) -> bool;
}

/// The interpreter; keeps its buffer between runs.
#[derive(Debug, Default)]
pub struct Interpreter {
    vals: Vec<u128>,
    /// Executes vector instructions; without it they end the run with [`exit::NONE`].
    pub native: Option<Box<dyn Native>>,
    pc: u64,
    /// Instructions left before the run is given up, when set.
    pub budget: Option<u64>,
}

/// What to do after an instruction.
enum Next {
    Step,
    Jump(u32),
    End(Outcome),
}

impl Interpreter {
    /// A new interpreter.
    pub fn new() -> Self {
        Self::default()
    }

    /// Runs well-formed `region` on the environment, until it is left. A run that exceeds the budget ends with
    /// [`exit::POLL`].
    ///
    /// # Safety
    /// `env` points to the guest part of a [`crate::env::Env`] whose guest state covers all slots of the region, that nobody
    /// else uses meanwhile; `helpers` are those the region was built for and fit this environment.
    pub unsafe fn run(
        &mut self,
        region: &Region,
        helpers: &HelperTable,
        env: *mut u8,
        mem: &mut dyn Memory,
    ) -> Outcome {
        self.vals.clear();
        self.vals.resize(region.insts.len(), 0);
        self.pc = region.entry_pc;
        let mut at = 0usize;
        while let Some(i) = region.insts.get(at) {
            if let Some(b) = &mut self.budget {
                if *b == 0 {
                    return Self::leave(env, exit::POLL, self.pc);
                }
                *b -= 1;
            }
            // SAFETY: by this function's contract.
            let next = unsafe { self.step(at, i, region, helpers, (env, &mut *mem)) };
            match next {
                Next::Step => at += 1,
                Next::End(o) => return o,
                Next::Jump(l) => {
                    let info = region.labels.get(l as usize).copied().unwrap_or_default();
                    let target = info.at.unwrap_or(u32::MAX) as usize;
                    // SAFETY: the header belongs to the environment.
                    let asked = unsafe { &(*header(env)).exit_request };
                    if target <= at && asked.load(std::sync::atomic::Ordering::Relaxed) != 0 {
                        return Self::leave(env, exit::POLL, info.pc.unwrap_or(self.pc));
                    }
                    at = target;
                    // Instructions belong to the guest instruction before them in the list, not in time.
                    let before = region.insts.get(..at).unwrap_or(&[]);
                    if let Some(start) = before.iter().rev().find(|i| i.op == Op::InsnStart) {
                        self.pc = start.imm();
                    }
                }
            }
        }
        Outcome::Exit(exit::NONE)
    }

    fn leave(env: *mut u8, code: u32, pc: u64) -> Outcome {
        // SAFETY: `env` comes from `run`.
        unsafe { (*header(env)).pc = pc };
        Outcome::Exit(code)
    }

    fn val(&self, v: u32) -> u64 {
        self.wide(v) as u64
    }

    fn wide(&self, v: u32) -> u128 {
        self.vals.get(v as usize).copied().unwrap_or(0)
    }

    fn set(&mut self, at: usize, ty: Type, value: u128) {
        if let Some(v) = self.vals.get_mut(at) {
            *v = match ty.bytes() {
                4 => value & 0xffff_ffff,
                16 => value,
                _ => value & u128::from(u64::MAX),
            };
        }
    }

    /// Vector instructions, and all others on vectors. `None` for what is neither.
    ///
    /// # Safety
    /// As for [`Interpreter::run`].
    unsafe fn vector(
        &mut self,
        at: usize,
        i: &Inst,
        r: &Region,
        (env, mem): (*mut u8, &mut dyn Memory),
    ) -> Option<Next> {
        // SAFETY: the header belongs to the environment.
        let scratch = unsafe { &raw mut (*header(env)).scratch[0] };
        let slot = env.wrapping_add(i.a as usize).cast::<u128>();
        let va = self.val(i.a).wrapping_add(i.disp() as u64);
        let wide = i.mem().bytes() == 16;
        let result = match i.op {
            Op::Vec | Op::VecFp => {
                let ty = |v: u32| r.insts.get(v as usize).map_or(Type::Void, |d| d.ty);
                let args = [i.a, i.b, i.c].map(|v| (ty(v), self.wide(v)));
                // SAFETY: the header belongs to the environment.
                let mxcsr = unsafe { &mut (*header(env)).mxcsr };
                let insn = r.vec(i)?;
                match self.native.as_mut().and_then(|n| n.vec(insn, i.ty, args, mxcsr)) {
                    Some(v) => v,
                    None => return Some(Next::End(Outcome::Exit(exit::NONE))),
                }
            }
            Op::Host => {
                let (code, _) = r.host(i)?;
                // SAFETY: by this function's contract.
                let done = self.native.as_mut().is_some_and(|n| unsafe { n.host(code, env) });
                return Some(if done { Next::Step } else { Next::End(Outcome::Exit(exit::NONE)) });
            }
            _ if i.ty != Type::V128 => return None,
            // SAFETY: slots lie within the guest state.
            Op::GetSlot => unsafe { slot.read_unaligned() },
            Op::SetSlot => {
                // SAFETY: slots lie within the guest state.
                unsafe { slot.write_unaligned(self.wide(i.b)) };
                return Some(Next::Step);
            }
            Op::Select => {
                let narrow = r.insts.get(i.a as usize).is_some_and(|d| d.ty == Type::I32);
                let test = if narrow { self.val(i.a) & 0xffff_ffff } else { self.val(i.a) };
                self.wide(if test != 0 { i.b } else { i.c })
            }
            Op::Load => match mem.load(va, i.load_mem(), self.pc) {
                // SAFETY: the slow path has put the upper half there.
                Ok(v) if wide => u128::from(v) | u128::from(unsafe { scratch.read() }) << 64,
                Ok(v) => u128::from(v),
                Err(code) => return Some(Next::End(Self::leave(env, code, self.pc))),
            },
            Op::Store => {
                let v = self.wide(i.b);
                // SAFETY: the slow path takes the upper half from there.
                unsafe { scratch.write((v >> 64) as u64) };
                return Some(match mem.store(va, i.mem(), self.pc, v as u64) {
                    Ok(()) => Next::Step,
                    Err(code) => Next::End(Self::leave(env, code, self.pc)),
                });
            }
            _ => return None,
        };
        self.set(at, i.ty, result);
        Some(Next::Step)
    }

    /// # Safety
    /// As for [`Interpreter::run`].
    unsafe fn step(
        &mut self,
        at: usize,
        i: &Inst,
        r: &Region,
        helpers: &HelperTable,
        (env, mem): (*mut u8, &mut dyn Memory),
    ) -> Next {
        // SAFETY: by this function's contract.
        if let Some(next) = unsafe { self.vector(at, i, r, (env, &mut *mem)) } {
            return next;
        }
        let (a, b, c) = (self.val(i.a), self.val(i.b), self.val(i.c));
        let aty = r.insts.get(i.a as usize).map_or(Type::Void, |d| d.ty);
        let compare = |cc: crate::Cond, ty: Type, x, y| {
            if ty == Type::I32 { cc.eval32(x, y) } else { cc.eval64(x, y) }
        };
        let result = match i.op {
            Op::Nop | Op::Label => return Next::Step,
            Op::Fence => {
                // Other vCPUs run in parallel, interpreted or not.
                std::sync::atomic::fence(std::sync::atomic::Ordering::SeqCst);
                return Next::Step;
            }
            Op::InsnStart => {
                self.pc = i.imm();
                return Next::Step;
            }
            Op::Const => i.imm(),
            // SAFETY: slots lie within the guest state.
            Op::GetSlot => unsafe { read_slot(env, i.a, i.ty) },
            Op::SetSlot => {
                // SAFETY: slots lie within the guest state.
                unsafe { write_slot(env, i.a, i.ty, b) };
                return Next::Step;
            }
            _ if i.op.is_int_binary() => eval_binary(i.op, i.ty, a, b),
            _ if i.op.is_int_unary() => eval_unary(i.op, i.ty, a),
            Op::SExt => a as i32 as u64,
            Op::ZExt | Op::Trunc => a & 0xffff_ffff,
            Op::SetCond => u64::from(compare(i.cond(), aty, a, b)),
            Op::Select => {
                let test = if aty == Type::I32 { a & 0xffff_ffff } else { a };
                if test != 0 { b } else { c }
            }
            Op::Load | Op::Store | Op::AtomicRmw | Op::AtomicCas => match self.access(i, mem) {
                Ok(v) => v,
                Err(code) => return Next::End(Self::leave(env, code, self.pc)),
            },
            // SAFETY: by this function's contract.
            Op::Call => match unsafe { self.call(i, r, helpers, env) } {
                Ok(v) => v,
                Err(code) => return Next::End(Outcome::Exit(code)),
            },
            Op::Br => return Next::Jump(i.a),
            Op::BrCond => return if compare(i.cond(), aty, a, b) { Next::Jump(i.c) } else { Next::Step },
            Op::GotoPc => return Next::End(Outcome::Goto(i.imm())),
            Op::GotoReg => {
                // SAFETY: the header belongs to the environment.
                unsafe { (*header(env)).branch_pc = self.pc };
                return Next::End(Outcome::Goto(a));
            }
            Op::Exit => return Next::End(Self::leave(env, i.a, i.imm())),
            Op::ExitReg => return Next::End(Self::leave(env, i.a, b)),
            Op::ExitAsIs => return Next::End(Outcome::Exit(i.a)),
            _ => {
                // SAFETY: the header belongs to the environment.
                let mxcsr = unsafe { &mut (*header(env)).mxcsr };
                fp::eval(i, aty, [a, b, c], mxcsr)
            }
        };
        self.set(at, i.ty, u128::from(result));
        Next::Step
    }

    fn access(&mut self, i: &Inst, mem: &mut dyn Memory) -> Result<u64, u32> {
        let (a, b, c) = (self.val(i.a), self.val(i.b), self.val(i.c));
        let va = a.wrapping_add(i.disp() as u64);
        match i.op {
            Op::Load => mem.load(va, i.load_mem(), self.pc),
            Op::Store => mem.store(va, i.mem(), self.pc, b).map(|()| 0),
            Op::AtomicRmw => mem.rmw(a, i.aux, self.pc, b),
            _ => mem.cas(a, i.mem(), self.pc, (b, c)),
        }
    }

    /// # Safety
    /// As for [`Interpreter::run`].
    unsafe fn call(&mut self, i: &Inst, r: &Region, helpers: &HelperTable, env: *mut u8) -> Result<u64, u32> {
        let Some(h) = helpers.get(HelperId(i.a)) else { return Err(exit::NONE) };
        let mut x = [0u64; Helper::MAX_ARGS];
        for (x, v) in x.iter_mut().zip(r.call_args(i)) {
            *x = self.val(Val::index(*v) as u32);
        }
        if h.effects.intersects(Effects::MAY_FAULT | Effects::NEEDS_PC) {
            // SAFETY: the header belongs to the environment.
            unsafe { (*header(env)).pc = self.pc };
        }
        match h.func {
            // SAFETY: the helper fits this environment.
            HelperFn::Plain(f) => Ok(unsafe { f(env, x[0], x[1], x[2], x[3], x[4]) }),
            // SAFETY: the helper fits this environment.
            HelperFn::Faulting(f) => checked(unsafe { f(env, x[0], x[1], x[2], x[3], x[4]) }),
        }
    }
}

/// Reads a slot.
///
/// # Safety
/// `env + offset` is readable for the type's size.
pub unsafe fn read_slot(env: *mut u8, offset: u32, ty: Type) -> u64 {
    let p = env.wrapping_add(offset as usize);
    // SAFETY: by this function's contract.
    unsafe {
        if ty.bytes() == 4 {
            u64::from(p.cast::<u32>().read_unaligned())
        } else {
            p.cast::<u64>().read_unaligned()
        }
    }
}

/// Writes a slot.
///
/// # Safety
/// `env + offset` is writable for the type's size.
pub unsafe fn write_slot(env: *mut u8, offset: u32, ty: Type, v: u64) {
    let p = env.wrapping_add(offset as usize);
    // SAFETY: by this function's contract.
    unsafe {
        if ty.bytes() == 4 {
            p.cast::<u32>().write_unaligned(v as u32)
        } else {
            p.cast::<u64>().write_unaligned(v)
        }
    }
}
