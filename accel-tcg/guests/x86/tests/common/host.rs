//! The host's own processor, running a case in this process.
//!
//! The sandbox is mapped at the addresses that the guest has. [`enter`] loads the whole user-level state and jumps;
//! the code comes back by the jump at its end, or by a signal, whose handler takes the state from the frame.

use std::arch::global_asm;
use std::ffi::{c_int, c_void};
use std::marker::PhantomData;
use std::ptr;
use std::sync::{Mutex, MutexGuard};

use super::case::{
    CODE, CODE_SIZE, CS32, CS64, DATA, DATA_RW, DATA_SIZE, END, END32, End, Image, OPMASK, Outcome,
    Processor, SS, XSAVE_SIZE, ZMM_HIGH, ZMM_UPPER,
};

/// Room for an XSAVE area as the host lays it out.
const AREA: usize = 0x1000;

/// What the assembly shares with [`Host`].
#[repr(C, align(64))]
struct Context {
    gpr: [u64; 16],     // 0
    rip: u64,           // 128
    rflags: u64,        // 136
    host_rsp: u64,      // 144
    host_fs: u64,       // 152
    active: u64,        // 160
    far: [u8; 8],       // 168: offset (4), selector (2)
    wide: u64,          // 176: 1 if the code is 64-bit
    vector: u64,        // 184: u64::MAX if there was no exception
    error: u64,         // 192
    address: u64,       // 200
    go: u64,            // 208: where `enter` jumps
    mxcsr: u64,         // 216: what the host likes
    components: u64,    // 224: of XCR0, that are loaded and stored
    stack: [u64; 35],   // 232 to 512
    before: [u8; AREA], // 512
    after: [u8; AREA],  // 4608
}

#[unsafe(no_mangle)]
static mut HOLDFAST_FUZZ: Context = Context {
    gpr: [0; 16],
    rip: 0,
    rflags: 0,
    host_rsp: 0,
    host_fs: 0,
    active: 0,
    far: [0; 8],
    wide: 0,
    vector: 0,
    error: 0,
    address: 0,
    go: 0,
    mxcsr: 0x1f80,
    components: 7,
    stack: [0; 35],
    before: [0; AREA],
    after: [0; AREA],
};

global_asm!(
    ".globl holdfast_fuzz_enter, holdfast_fuzz_far, holdfast_fuzz_exit, holdfast_fuzz_fault, holdfast_fuzz_signal",
    "holdfast_fuzz_enter:",
    "push rbx",
    "push rbp",
    "push r12",
    "push r13",
    "push r14",
    "push r15",
    "rdfsbase rax",
    "mov [rip + {c} + 152], rax",
    "mov [rip + {c} + 144], rsp",
    "cmp qword ptr [rip + {c} + 176], 0",
    "jne 2f",
    "mov eax, {ss}",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "2:",
    "xor eax, eax",
    "wrfsbase rax",
    "wrgsbase rax",
    "mov eax, [rip + {c} + 224]",
    "xor edx, edx",
    "xrstor64 [rip + {c} + 512]",
    "lea rsp, [rip + {c} + 504]",
    "push qword ptr [rip + {c} + 136]",
    "popfq",
    "mov rax, [rip + {c}]",
    "mov rcx, [rip + {c} + 8]",
    "mov rdx, [rip + {c} + 16]",
    "mov rbx, [rip + {c} + 24]",
    "mov rsp, [rip + {c} + 32]",
    "mov rbp, [rip + {c} + 40]",
    "mov rsi, [rip + {c} + 48]",
    "mov rdi, [rip + {c} + 56]",
    "mov r8, [rip + {c} + 64]",
    "mov r9, [rip + {c} + 72]",
    "mov r10, [rip + {c} + 80]",
    "mov r11, [rip + {c} + 88]",
    "mov r12, [rip + {c} + 96]",
    "mov r13, [rip + {c} + 104]",
    "mov r14, [rip + {c} + 112]",
    "mov r15, [rip + {c} + 120]",
    "jmp qword ptr [rip + {c} + 208]",
    "holdfast_fuzz_far:",
    "jmp fword ptr [rip + {c} + 168]",
    "holdfast_fuzz_exit:",
    "mov [rip + {c}], rax",
    "mov [rip + {c} + 8], rcx",
    "mov [rip + {c} + 16], rdx",
    "mov [rip + {c} + 24], rbx",
    "mov [rip + {c} + 32], rsp",
    "mov [rip + {c} + 40], rbp",
    "mov [rip + {c} + 48], rsi",
    "mov [rip + {c} + 56], rdi",
    "mov [rip + {c} + 64], r8",
    "mov [rip + {c} + 72], r9",
    "mov [rip + {c} + 80], r10",
    "mov [rip + {c} + 88], r11",
    "mov [rip + {c} + 96], r12",
    "mov [rip + {c} + 104], r13",
    "mov [rip + {c} + 112], r14",
    "mov [rip + {c} + 120], r15",
    "lea rsp, [rip + {c} + 504]",
    "pushfq",
    "pop qword ptr [rip + {c} + 136]",
    "push 0x202",
    "popfq",
    "mov eax, [rip + {c} + 224]",
    "xor edx, edx",
    "xsave64 [rip + {c} + 4608]",
    "mov qword ptr [rip + {c} + 184], -1",
    "holdfast_fuzz_fault:",
    "xor eax, eax",
    "mov ds, eax",
    "mov es, eax",
    "mov fs, eax",
    "mov gs, eax",
    "wrgsbase rax",
    "mov rax, [rip + {c} + 152]",
    "wrfsbase rax",
    "fninit",
    "ldmxcsr [rip + {c} + 216]",
    "vzeroupper",
    "mov rsp, [rip + {c} + 144]",
    "pop r15",
    "pop r14",
    "pop r13",
    "pop r12",
    "pop rbp",
    "pop rbx",
    "ret",
    "holdfast_fuzz_signal:",
    // The kernel leaves AC as it was.
    "push 0x202",
    "popfq",
    "mov rax, [rip + {c} + 152]",
    "wrfsbase rax",
    // An emulator's frame may leave the stack misaligned. The frame has all registers.
    "mov rbx, rsp",
    "and rsp, -16",
    "call {handler}",
    "mov rsp, rbx",
    "ret",
    c = sym HOLDFAST_FUZZ,
    ss = const SS as i32,
    handler = sym on_signal,
);

unsafe extern "C" {
    fn holdfast_fuzz_enter();
    fn holdfast_fuzz_far();
    fn holdfast_fuzz_exit();
    fn holdfast_fuzz_fault();
    fn holdfast_fuzz_signal();
}

/// Takes the state from the signal's frame and goes on behind the code.
unsafe extern "C" fn on_signal(signal: c_int, _info: *mut libc::siginfo_t, frame: *mut c_void) {
    // SAFETY: the kernel gives a valid frame; the context is this thread's, for only one thread runs cases.
    unsafe {
        let context: *mut Context = &raw mut HOLDFAST_FUZZ;
        let context = &mut *context;
        if context.active == 0 {
            // Not from a case: die of it.
            libc::signal(signal, libc::SIG_DFL);
            return;
        }
        let machine = &mut (*frame.cast::<libc::ucontext_t>()).uc_mcontext;
        let general = &mut machine.gregs;
        let order = [
            libc::REG_RAX,
            libc::REG_RCX,
            libc::REG_RDX,
            libc::REG_RBX,
            libc::REG_RSP,
            libc::REG_RBP,
            libc::REG_RSI,
            libc::REG_RDI,
            libc::REG_R8,
            libc::REG_R9,
            libc::REG_R10,
            libc::REG_R11,
            libc::REG_R12,
            libc::REG_R13,
            libc::REG_R14,
            libc::REG_R15,
        ];
        for (to, from) in context.gpr.iter_mut().zip(order) {
            *to = general[from as usize] as u64;
        }
        context.rip = general[libc::REG_RIP as usize] as u64;
        context.rflags = general[libc::REG_EFL as usize] as u64;
        context.vector = match (general[libc::REG_TRAPNO as usize] as u64, signal) {
            (vector @ 0..32, _) => vector,
            // An emulator may not say.
            (_, libc::SIGILL) => 6,
            (_, libc::SIGFPE) => 0,
            (_, libc::SIGTRAP) => 3,
            _ => 14,
        };
        context.error = general[libc::REG_ERR as usize] as u64;
        context.address = general[libc::REG_CR2 as usize] as u64;
        let area = machine.fpregs.cast::<u8>();
        ptr::copy_nonoverlapping(area, (&raw mut context.after).cast(), AREA);
        area.cast::<u16>().write(0x37f);
        area.add(2).cast::<[u8; 4]>().write([0; 4]);
        area.add(24).cast::<u32>().write(0x1f80);
        general[libc::REG_RIP as usize] = (holdfast_fuzz_fault as *const () as usize) as i64;
        general[libc::REG_RSP as usize] = context.host_rsp as i64;
        general[libc::REG_EFL as usize] = 0x202;
        let selectors = general[libc::REG_CSGSFS as usize] as u64 & 0x0000_ffff_ffff_0000;
        general[libc::REG_CSGSFS as usize] = (selectors | u64::from(CS64) | u64::from(SS) << 48) as i64;
    }
}

/// Maps `len` bytes of `file` from `offset` at `at`, or anywhere if 0.
fn map(at: u64, len: usize, protection: c_int, file: c_int, offset: usize) -> *mut u8 {
    let fixed = if at == 0 { 0 } else { libc::MAP_FIXED_NOREPLACE };
    let hint = ptr::with_exposed_provenance_mut::<c_void>(at as usize);
    // SAFETY: never over an existing mapping.
    let got = unsafe {
        libc::mmap(hint, len, protection, libc::MAP_SHARED | libc::MAP_POPULATE | fixed, file, offset as i64)
    };
    assert!(got != libc::MAP_FAILED, "mmap {at:#x}: {}", std::io::Error::last_os_error());
    got.cast()
}

/// Whether the host has the part of AVX-512 that guests are offered.
pub fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512cd")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// How the host lays out an XSAVE area: its processor says where AVX-512's parts are.
struct Layout {
    components: u64,
    /// Where a part is on the host, in an [`Image`], and its bytes.
    parts: Vec<(usize, usize, usize)>,
}

impl Layout {
    fn new() -> Self {
        if !has_avx512() {
            return Self { components: 7, parts: Vec::new() };
        }
        let place = |n: u32| std::arch::x86_64::__cpuid_count(0xd, n).ebx as usize;
        let parts = vec![(place(5), OPMASK, 64), (place(6), ZMM_HIGH, 512), (place(7), ZMM_UPPER, 1024)];
        assert!(parts.iter().all(|(at, _, len)| at + len <= AREA), "{parts:?}");
        Self { components: 0xe7, parts }
    }

    fn to_host(&self, image: &[u8; XSAVE_SIZE], area: &mut [u8; AREA]) {
        area[..832].copy_from_slice(&image[..832]);
        for (there, here, len) in &self.parts {
            area[*there..there + len].copy_from_slice(&image[*here..here + len]);
        }
    }

    fn image_of(&self, area: &[u8; AREA], image: &mut [u8; XSAVE_SIZE]) {
        image[..832].copy_from_slice(&area[..832]);
        image[512] &= self.components as u8;
        for (there, here, len) in &self.parts {
            image[*here..here + len].copy_from_slice(&area[*there..there + len]);
        }
    }
}

static ONE: Mutex<()> = Mutex::new(());

/// Offset of data in the sandbox's file; the page of the end is before it.
const DATA_AT: usize = CODE_SIZE + 0x1000;

/// The host's processor. Stays on its thread; there is one at a time.
pub struct Host {
    _one: MutexGuard<'static, ()>,
    /// All of the sandbox, writable.
    memory: *mut u8,
    layout: Layout,
    _thread: PhantomData<*mut ()>,
}

impl Host {
    /// Maps the sandbox and takes the signals.
    pub fn new() -> Self {
        let one = ONE.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        // SAFETY: plain system calls.
        let file = unsafe { libc::memfd_create(c"sandbox".as_ptr(), 0) };
        // SAFETY: as above.
        let sized = unsafe { libc::ftruncate(file, (DATA_AT + DATA_SIZE) as i64) };
        assert!(file >= 0 && sized == 0, "memfd: {}", std::io::Error::last_os_error());
        let (r, w, x) = (libc::PROT_READ, libc::PROT_WRITE, libc::PROT_EXEC);
        let memory = map(0, DATA_AT + DATA_SIZE, r | w, file, 0);
        map(CODE, CODE_SIZE, r | x, file, 0);
        map(END, 0x1000, r | x, file, CODE_SIZE);
        map(DATA, DATA_RW, r | w, file, DATA_AT);
        map(DATA + DATA_RW as u64, DATA_SIZE - DATA_RW, r, file, DATA_AT + DATA_RW);
        // SAFETY: mapped above.
        unsafe { libc::close(file) };
        let this = Self { _one: one, memory, layout: Layout::new(), _thread: PhantomData };
        // A jump through a pointer that is aligned, for alignment checks may be on.
        let mut end = [0u8; 16];
        end[..3].copy_from_slice(&[0xff, 0x25, 2]);
        end[8..].copy_from_slice(&(holdfast_fuzz_exit as *const () as usize as u64).to_le_bytes());
        this.write(CODE_SIZE, &end);
        let mut back = [0xea, 0, 0, 0, 0, CS64 as u8, 0];
        back[1..5].copy_from_slice(&(END as u32).to_le_bytes());
        this.write(CODE_SIZE + (END32 - END) as usize, &back);
        take_signals();
        this
    }

    /// What the page that ends code holds, for data may be read from there too.
    pub fn end_page(&self) -> Vec<u8> {
        // SAFETY: in the mapping, and not written any more.
        unsafe { std::slice::from_raw_parts(self.memory.add(CODE_SIZE), 0x1000) }.to_vec()
    }

    /// For an emulator that runs this program and does not see that code is written through another mapping.
    pub fn code_changed(&self) {
        for protection in [libc::PROT_READ | libc::PROT_WRITE, libc::PROT_READ | libc::PROT_EXEC] {
            let at = ptr::with_exposed_provenance_mut(CODE as usize);
            // SAFETY: the sandbox's own mapping; its code does not run now.
            let done = unsafe { libc::mprotect(at, CODE_SIZE, protection) };
            assert_eq!(done, 0, "mprotect: {}", std::io::Error::last_os_error());
        }
    }

    fn write(&self, at: usize, bytes: &[u8]) {
        assert!(at + bytes.len() <= DATA_AT + DATA_SIZE);
        // SAFETY: in the mapping, which nobody holds a reference to.
        unsafe { ptr::copy_nonoverlapping(bytes.as_ptr(), self.memory.add(at), bytes.len()) };
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        let all = [(CODE, CODE_SIZE), (END, 0x1000), (DATA, DATA_SIZE)];
        for (at, len) in all {
            // SAFETY: mapped by `new`, used by nobody else.
            unsafe { libc::munmap(ptr::with_exposed_provenance_mut(at as usize), len) };
        }
        // SAFETY: as above.
        unsafe { libc::munmap(self.memory.cast(), DATA_AT + DATA_SIZE) };
    }
}

/// Signals that exceptions become go to [`on_signal`], on a stack of their own.
fn take_signals() {
    // An emulator's frame may be shorter than the state that is copied from it: there is room behind it.
    let stack = Vec::leak(vec![0u8; 0x1_0000 + AREA]);
    let stack = libc::stack_t { ss_sp: stack.as_mut_ptr().cast(), ss_flags: 0, ss_size: 0x1_0000 };
    // SAFETY: the stack is never freed; the handler keeps to what a handler may do.
    unsafe {
        assert_eq!(libc::sigaltstack(&stack, ptr::null_mut()), 0);
        let mut action: libc::sigaction = std::mem::zeroed();
        action.sa_sigaction = holdfast_fuzz_signal as *const () as usize;
        action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
        for signal in [libc::SIGSEGV, libc::SIGILL, libc::SIGFPE, libc::SIGBUS, libc::SIGTRAP] {
            assert_eq!(libc::sigaction(signal, &action, ptr::null_mut()), 0);
        }
    }
}

impl Processor for Host {
    fn name(&self) -> &'static str {
        "host"
    }

    fn place(&mut self, at: usize, code: &[u8]) {
        assert!(at + code.len() <= CODE_SIZE);
        self.write(at, code);
    }

    fn run(&mut self, bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome {
        self.write(DATA_AT, data);
        // SAFETY: `Host` is alone and its thread is this one. The code is in the sandbox; what it can reach beside
        // that is what it finds by guessing 64-bit addresses.
        unsafe {
            let context: *mut Context = &raw mut HOLDFAST_FUZZ;
            let context = &mut *context;
            context.gpr = image.gpr;
            context.rflags = image.rflags;
            context.rip = image.rip;
            context.wide = u64::from(bits == 64);
            context.go = if bits == 64 { image.rip } else { holdfast_fuzz_far as *const () as usize as u64 };
            context.far[..4].copy_from_slice(&(image.rip as u32).to_le_bytes());
            context.far[4..6].copy_from_slice(&CS32.to_le_bytes());
            context.components = self.layout.components;
            self.layout.to_host(&image.xsave, &mut context.before);
            context.active = 1;
            holdfast_fuzz_enter();
            let context: *mut Context = &raw mut HOLDFAST_FUZZ;
            let context = &mut *context;
            context.active = 0;
            let mut image = Image::new();
            image.gpr = context.gpr;
            image.rflags = context.rflags;
            self.layout.image_of(&context.after, &mut image.xsave);
            if context.vector == u64::MAX {
                image.rip = if bits == 64 { END } else { END32 };
                return Outcome { end: End::Done, image };
            }
            image.rip = context.rip;
            let vector = context.vector as u8;
            let address = if vector == 14 { context.address } else { 0 };
            Outcome { end: End::Fault { vector, error: context.error as u32, address }, image }
        }
    }

    fn data(&self) -> &[u8] {
        // SAFETY: in the mapping; cases run only through `&mut self`.
        unsafe { std::slice::from_raw_parts(self.memory.add(DATA_AT), DATA_RW) }
    }
}
