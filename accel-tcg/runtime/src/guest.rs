//! What a guest architecture provides, and what it is given.
//!
//! The runtime knows nothing of any instruction set. A [`Guest`] turns guest code into IR, walks
//! page tables, delivers exceptions and interrupts, and converts its state. Everything it touches
//! of a running vCPU it reaches through [`Cpu`].

use std::fmt::Debug;

use holdfast_arch::{Arch, CpuModel, CpuState};
use holdfast_tcg_ir::{Builder, HelperTable};

use crate::code::CodeReader;
use crate::cpu::Cpu;

/// What an access does. Read-modify-write counts as a write.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccessKind {
    /// A load.
    Read,
    /// A store or atomic.
    Write,
    /// An instruction fetch.
    Fetch,
}

/// An access by guest-virtual address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Access {
    /// Guest-virtual address.
    pub gva: u64,
    /// Bytes: 1 to 16.
    pub size: u8,
    /// What it does.
    pub kind: AccessKind,
    /// The MMU index (privilege and the like) it is made with.
    pub mmu_idx: u8,
}

/// An exception as the guest architecture encodes it; opaque to the runtime.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fault {
    /// The architecture's exception number.
    pub cause: u64,
    /// Its main operand (RISC-V `tval`, x86 `CR2`).
    pub value: u64,
    /// A second operand (x86 error code).
    pub aux: u64,
}

/// What a guest-virtual address translates to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translation {
    /// Guest-physical address of the accessed byte.
    pub gpa: u64,
    /// Reads may use this translation without asking again.
    pub read: bool,
    /// Writes may (so the dirty bit is set already).
    pub write: bool,
    /// Fetches may.
    pub fetch: bool,
    /// Size of the translated page as a power of two, at least 12 if `cacheable`. A flush of any
    /// address in a larger page flushes all of it.
    pub page_bits: u8,
    /// False if less than a 4 KiB page is known to translate alike (fine-grained protection): the
    /// result serves this access only.
    pub cacheable: bool,
    /// The page is mapped alike in every address space, and a flush of one address space need not forget it
    /// (RISC-V: G in a page table entry).
    pub global: bool,
}

/// The modes that translated code and TLB entries depend on, computed from the guest's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Mode {
    /// Whatever changes the meaning of an instruction (privilege, FP enabled, ...). Regions are keyed
    /// by it. At most 31 bits: the runtime has the highest one for itself.
    pub key: u32,
    /// MMU index of fetches.
    pub fetch_idx: u8,
    /// The address space (RISC-V: ASID and mode of `satp`); anything equal shares TLB entries.
    pub space: u64,
}

/// What of the TLB to forget.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flush {
    /// Everything.
    All,
    /// One address space ([`Mode::space`]).
    Space(u64),
    /// One page (and the larger page it is part of) in every address space.
    Page(u64),
    /// One page in one address space.
    PageInSpace(u64, u64),
}

/// Static facts about a guest architecture.
#[derive(Debug, Clone)]
pub struct GuestSpec {
    /// For messages.
    pub name: &'static str,
    /// The architecture.
    pub arch: Arch,
    /// Bytes of the guest's `#[repr(C)]` state behind the generic header; see [`Cpu::state`].
    pub state_size: usize,
    /// What the back end needs: pinned slots, pc alignment.
    pub ir: holdfast_tcg_ir::GuestSpec,
    /// Number of MMU indexes, 1 to 8.
    pub mmu_modes: u8,
    /// Smallest instruction and alignment of the pc, in bytes.
    pub insn_align: u8,
    /// Longest instruction in bytes.
    pub max_insn_len: u8,
    /// True if misaligned loads and stores are done rather than faulted.
    pub misaligned_ok: bool,
    /// True if the very next instruction has to see code that a store changed (x86): such a store leaves its region and
    /// is done as the only instruction of one.
    pub precise_code: bool,
}

/// What to translate.
#[derive(Debug, Clone, Copy)]
pub struct TranslateRequest {
    /// Guest-virtual address of the first instruction.
    pub pc: u64,
    /// [`Mode::key`] it runs under.
    pub key: u32,
    /// At most this many instructions; 1 for single step.
    pub max_insns: u32,
    /// If true (single step), the region must end with `exit(exit::RESUME, ..)` or the like, not with a jump.
    pub no_chain: bool,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Translated {
    /// Guest instructions in the region; at least 1.
    pub insns: u32,
    /// Basic blocks that they make, for statistics.
    pub blocks: u32,
    /// The guest-virtual address behind the last byte that was translated.
    pub end: u64,
}

/// A guest architecture. One value serves all vCPUs of a VM.
pub trait Guest: Send + Sync + Debug + 'static {
    /// Static facts.
    fn spec(&self) -> &GuestSpec;

    /// The helpers that its IR calls. Write them as safe functions over [`Cpu`] and wrap them with
    /// [`crate::plain_helper!`] and [`crate::faulting_helper!`].
    fn helpers(&self) -> &HelperTable;

    /// Takes over the CPU model and puts the state as the architecture has it after reset. Called
    /// when the vCPU is made and at every reset.
    ///
    /// # Errors
    /// A text that names what of the model is not supported.
    fn reset(&self, cpu: &mut Cpu<'_>, model: &CpuModel) -> Result<(), String>;

    /// The current modes. Called often; must be cheap.
    fn mode(&self, cpu: &mut Cpu<'_>) -> Mode;

    /// Decodes from `request.pc` and builds one region: blocks of the one page that `request.pc` is
    /// in, ending at the page's end at the latest (an instruction that starts in the page may run
    /// into the next). An instruction that runs into the next page has to be the only one of its region;
    /// a region that comes to one ends before it with `goto_reg` to its constant pc, for direct links
    /// would not notice that the second page is mapped elsewhere. Breakpoints end a region before the instruction ([`CodeReader::is_break`]).
    ///
    /// # Errors
    /// The fault of fetching the *first* instruction; a later one ends the region before it.
    fn translate(
        &self,
        request: &TranslateRequest,
        code: &mut CodeReader<'_, '_>,
        builder: &mut Builder,
    ) -> Result<Translated, Fault>;

    /// Translates an address, setting accessed and dirty bits as the access needs. Page tables are read
    /// through [`Cpu::phys`].
    ///
    /// # Errors
    /// The page fault.
    fn fill(&self, cpu: &mut Cpu<'_>, access: &Access) -> Result<Translation, Fault>;

    /// As [`Guest::fill`] for a debugger: a read that ignores protection and changes nothing.
    fn probe(&self, cpu: &mut Cpu<'_>, gva: u64) -> Option<u64>;

    /// The exception for an access to `gpa`, where nothing is; `None` if it reads all ones.
    fn bus_fault(&self, access: &Access, gpa: u64) -> Option<Fault>;

    /// The exception for a misaligned access that the architecture or this guest does not do.
    /// `atomic`: it is an atomic instruction.
    fn misaligned_fault(&self, cpu: &mut Cpu<'_>, access: &Access, atomic: bool) -> Fault;

    /// Delivers an exception: [`Cpu::pc`] is the faulting instruction's on entry, the handler's on exit. The runtime looks at the
    /// mode behind it.
    fn raise(&self, cpu: &mut Cpu<'_>, fault: &Fault);

    /// Looks at the pins and timers and takes the most urgent interrupt that is enabled, if any.
    /// Called whenever the vCPU was asked to look ([`Cpu::request_exit`], a pin, the deadline).
    fn take_interrupt(&self, cpu: &mut Cpu<'_>) -> bool;

    /// True if a vCPU that waits for an interrupt has to go on.
    fn wakes(&self, cpu: &mut Cpu<'_>) -> bool;

    /// The architectural state.
    fn export(&self, cpu: &mut Cpu<'_>) -> CpuState;

    /// Replaces the architectural state, [`Cpu::set_halted`] and [`Cpu::set_deadline`] included.
    ///
    /// # Errors
    /// A text that says what does not fit.
    fn import(&self, cpu: &mut Cpu<'_>, state: &CpuState) -> Result<(), String>;

    /// The instruction in `bytes` at `pc` under [`Mode::key`] `key`, for logs: its length in bytes, at least 1, and its
    /// text.
    fn disassemble(&self, key: u32, pc: u64, bytes: &[u8]) -> (usize, String);

    /// Register dump for `info registers` and logs.
    fn describe(&self, cpu: &mut Cpu<'_>) -> String;
}
