//! Runs single vector instructions and host code for the IR's interpreter.

use std::collections::HashMap;

use crate::asm::{Asm, Mem, Reg, Rm, Xmm};
use crate::features::HostFeatures;
use holdfast_tcg_ir::env::offset;
use holdfast_tcg_ir::interp::Native;
use holdfast_tcg_ir::{Type, VecEncoding, VecForm, VecInsn};

/// Bytes of the code area.
const AREA: usize = 256 * 1024;
/// More than any one piece of code takes.
const LONGEST: usize = 4096;

/// Executes host instructions one by one, from an area that is writable and executable.
pub struct NativeRunner {
    area: *mut u8,
    used: usize,
    known: HashMap<Vec<u8>, usize>,
    asm: Asm,
    features: HostFeatures,
}

// SAFETY: the area is owned and has no thread affinity.
unsafe impl Send for NativeRunner {}

impl std::fmt::Debug for NativeRunner {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("NativeRunner").field("used", &self.used).finish_non_exhaustive()
    }
}

/// Operands, result and control registers of one instruction.
#[repr(C, align(16))]
struct Frame {
    args: [u128; 3],
    result: u128,
    guest_mxcsr: u32,
    host_mxcsr: u32,
}

const RESULT: i32 = 48;
const GUEST: i32 = 64;
const HOST: i32 = 68;
const _: () = assert!(std::mem::offset_of!(Frame, result) == RESULT as usize);
const _: () = assert!(std::mem::offset_of!(Frame, guest_mxcsr) == GUEST as usize);
const _: () = assert!(std::mem::offset_of!(Frame, host_mxcsr) == HOST as usize);

impl NativeRunner {
    /// A runner with a fresh area.
    ///
    /// # Errors
    /// The operating system's, when memory that is writable and executable is refused.
    pub fn new() -> std::io::Result<Self> {
        let prot = libc::PROT_READ | libc::PROT_WRITE | libc::PROT_EXEC;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
        // SAFETY: a new private mapping at an address of the system's choice.
        let area = unsafe { libc::mmap(std::ptr::null_mut(), AREA, prot, flags, -1, 0) };
        if area == libc::MAP_FAILED {
            return Err(std::io::Error::last_os_error());
        }
        let features = HostFeatures::detect();
        Ok(Self { area: area.cast(), used: 0, known: HashMap::new(), asm: Asm::new(), features })
    }

    /// The address of the code that the emitter holds.
    fn entry(&mut self) -> Option<*const u8> {
        let code = self.asm.bytes();
        if let Some(at) = self.known.get(code) {
            return Some(self.area.wrapping_add(*at));
        }
        if code.len() > LONGEST {
            return None;
        }
        if self.used + code.len() > AREA {
            self.known.clear();
            self.used = 0;
        }
        let at = self.used;
        let to = self.area.wrapping_add(at);
        // SAFETY: the range lies in the area, which is ours and in which nothing runs now.
        unsafe { std::ptr::copy_nonoverlapping(code.as_ptr(), to, code.len()) };
        self.known.insert(code.to_vec(), at);
        self.used = (at + code.len()).next_multiple_of(16);
        Some(to)
    }

    fn instruction(&mut self, v: &VecInsn, vex: bool, [a, b]: [Rm; 2], out_int: bool) {
        let asm = &mut self.asm;
        let (x0, x3) = (Xmm(0), Xmm(3));
        let out = if out_int { Reg::RDX.0 } else { x3.0 };
        match v.form {
            VecForm::Unary => asm.vector(v, vex, (out, 0), a, v.imm),
            VecForm::Binary | VecForm::Merge if vex => asm.vector(v, true, (3, 0), b, v.imm),
            VecForm::Binary | VecForm::Merge => {
                asm.movaps(x3, x0);
                asm.vector(v, false, (3, 0), b, v.imm);
            }
            VecForm::Ternary => {
                asm.movaps(x3, x0);
                asm.vector(v, true, (3, 1), Xmm(2).into(), v.imm);
            }
            VecForm::Is4 => asm.vector(v, true, (3, 0), Xmm(1).into(), Some(2 << 4)),
            VecForm::ShiftImm if vex => asm.vector(v, true, (v.ext, 3), x0.into(), v.imm),
            VecForm::ShiftImm => {
                asm.movaps(x3, x0);
                asm.vector(v, false, (v.ext, 0), x3.into(), v.imm);
            }
            VecForm::Extract => asm.vector(v, vex, (0, 0), Rm::R(out), v.imm),
            VecForm::Flags => {
                asm.vector(v, vex, (0, 0), b, v.imm);
                asm.flags_to_rax(0xd5);
                asm.mov(true, Reg::RDX, Reg::RAX);
            }
        }
    }
}

impl Drop for NativeRunner {
    fn drop(&mut self) {
        // SAFETY: the mapping that `new` made.
        unsafe { libc::munmap(self.area.cast(), AREA) };
    }
}

impl Native for NativeRunner {
    fn vec(&mut self, insn: &VecInsn, ty: Type, args: [(Type, u128); 3], mxcsr: &mut u32) -> Option<u128> {
        let vex = insn.encoding == VecEncoding::Vex;
        if vex && !self.features.avx {
            return None;
        }
        let mut frame = Frame {
            args: args.map(|a| a.1),
            result: 0,
            guest_mxcsr: *mxcsr & 0xffff | 0x1f80,
            host_mxcsr: 0,
        };
        self.asm.clear();
        let at = |n: i32| Mem::base(Reg::RDI, n);
        self.asm.stmxcsr(at(HOST));
        self.asm.ldmxcsr(at(GUEST));
        let gprs = [Reg::RAX, Reg::RCX];
        let mut rms = [Rm::from(Xmm(0)), Rm::from(Xmm(1))];
        for (n, (ty, _)) in args.iter().enumerate() {
            let m = at(16 * n as i32);
            match (gprs.get(n), rms.get_mut(n)) {
                (Some(r), Some(rm)) if ty.is_int() => {
                    self.asm.mov(true, *r, m);
                    *rm = (*r).into();
                }
                _ => self.asm.movups(Xmm(n as u8), m),
            }
        }
        self.instruction(insn, vex, rms, ty.is_int());
        if ty.is_int() {
            self.asm.store(3, at(RESULT), Reg::RDX);
        } else {
            self.asm.movups_store(at(RESULT), Xmm(3));
        }
        self.asm.stmxcsr(at(GUEST));
        self.asm.ldmxcsr(at(HOST));
        self.asm.ret();
        let entry = self.entry()?;
        // SAFETY: the code above: it takes the frame, keeps what the calling convention wants kept, and MXCSR.
        unsafe {
            let run = std::mem::transmute::<*const u8, unsafe extern "C" fn(*mut Frame)>(entry);
            run(&raw mut frame);
        }
        *mxcsr = frame.guest_mxcsr;
        Some(frame.result)
    }

    unsafe fn host(&mut self, code: &[u8], env: *mut u8) -> bool {
        self.asm.clear();
        self.asm.push(Reg::RBP);
        self.asm.mov(true, Reg::RBP, Reg::RDI);
        self.asm.stmxcsr(Mem::env(offset::HOST_MXCSR));
        self.asm.ldmxcsr(Mem::env(offset::MXCSR));
        self.asm.raw(code);
        self.asm.stmxcsr(Mem::env(offset::MXCSR));
        self.asm.ldmxcsr(Mem::env(offset::HOST_MXCSR));
        self.asm.pop(Reg::RBP);
        self.asm.ret();
        let Some(entry) = self.entry() else { return false };
        // SAFETY: by this function's contract the code fits the environment and keeps all but caller-saved registers.
        unsafe {
            let run = std::mem::transmute::<*const u8, unsafe extern "C" fn(*mut u8)>(entry);
            run(env);
        }
        true
    }
}
