//! Helpers: functions that translated code calls.

use crate::types::Type;

bitflags::bitflags! {
    /// What a helper does beyond computing its result from its arguments. The fewer, the cheaper the call.
    #[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
    pub struct Effects: u16 {
        /// Reads pinned slots: they are stored before the call. (Unpinned slots are always exact in memory.)
        const READS_SLOTS = 1;
        /// Writes slots: pinned ones are reloaded after, and nothing known of any slot survives.
        const WRITES_SLOTS = 2;
        /// Has the [`FaultingHelper`] signature; a non-zero `exit` leaves the region with that code. The guest pc is
        /// stored in [`crate::env::EnvHeader::pc`] before the call, and may be changed by a helper that exits.
        const MAY_FAULT = 4;
        /// May change translations, the mode or the TLB generation; the generation register is reloaded after.
        const MAY_FLUSH = 8;
        /// Reads or writes the guest's floating-point flags and rounding mode, or computes in floating point:
        /// MXCSR is stored to [`crate::env::EnvHeader::mxcsr`], the host's own loaded, and the field loaded back after.
        const USES_FP = 16;
        /// Wants [`crate::env::EnvHeader::pc`] set although it cannot fault.
        const NEEDS_PC = 32;
        /// Result depends on the arguments only and it may be dropped when unused.
        const PURE = 64;
        /// Reads and writes slots, faults, flushes: the safe choice for system instructions.
        const ALL = 1 | 2 | 4 | 8;
    }
}

/// What helpers that may fault and slow-path functions return (in rax and rdx).
#[derive(Clone, Copy, PartialEq, Eq, Debug, Default)]
#[repr(C)]
pub struct HelperRet {
    /// The result.
    pub value: u64,
    /// 0 to go on, else the exit code to leave translated code with.
    pub exit: u64,
}

impl HelperRet {
    /// Success.
    #[inline]
    pub const fn ok(value: u64) -> Self {
        Self { value, exit: 0 }
    }

    /// Leave with `code`.
    #[inline]
    pub const fn exit(code: u32) -> Self {
        Self { value: 0, exit: code as u64 }
    }
}

/// A helper without [`Effects::MAY_FAULT`]. `env` is the environment pointer (the guest's state). Values of any
/// type arrive as their raw bits; the upper half of a 32-bit argument is undefined. Unused arguments are undefined.
pub type PlainHelper = unsafe extern "C" fn(env: *mut u8, a: u64, b: u64, c: u64, d: u64, e: u64) -> u64;

/// A helper with [`Effects::MAY_FAULT`].
pub type FaultingHelper =
    unsafe extern "C" fn(env: *mut u8, a: u64, b: u64, c: u64, d: u64, e: u64) -> HelperRet;

/// Address of a helper.
#[derive(Clone, Copy, Debug)]
pub enum HelperFn {
    /// Without [`Effects::MAY_FAULT`].
    Plain(PlainHelper),
    /// With it.
    Faulting(FaultingHelper),
}

impl HelperFn {
    /// Its address.
    pub fn addr(self) -> u64 {
        match self {
            HelperFn::Plain(f) => f as usize as u64,
            HelperFn::Faulting(f) => f as usize as u64,
        }
    }
}

/// A described helper.
#[derive(Clone, Copy, Debug)]
pub struct Helper {
    /// For the printer.
    pub name: &'static str,
    /// The function.
    pub func: HelperFn,
    /// Result type, [`Type::Void`] for none.
    pub ret: Type,
    /// Number of arguments, at most [`Helper::MAX_ARGS`].
    pub args: u8,
    /// Its effects; [`Effects::MAY_FAULT`] follows from `func`.
    pub effects: Effects,
}

impl Helper {
    /// Most arguments.
    pub const MAX_ARGS: usize = 5;
}

/// Names a helper in a [`HelperTable`].
#[derive(Clone, Copy, PartialEq, Eq, Debug, Hash)]
pub struct HelperId(pub u32);

/// All helpers of one guest; built once at start.
#[derive(Clone, Debug, Default)]
pub struct HelperTable {
    list: Vec<Helper>,
}

impl HelperTable {
    /// An empty table.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds a helper that cannot fault.
    pub fn plain(
        &mut self,
        name: &'static str,
        func: PlainHelper,
        ret: Type,
        args: u8,
        effects: Effects,
    ) -> HelperId {
        self.push(Helper {
            name,
            func: HelperFn::Plain(func),
            ret,
            args,
            effects: effects - Effects::MAY_FAULT,
        })
    }

    /// Adds a helper that may fault.
    pub fn faulting(
        &mut self,
        name: &'static str,
        func: FaultingHelper,
        ret: Type,
        args: u8,
        effects: Effects,
    ) -> HelperId {
        self.push(Helper {
            name,
            func: HelperFn::Faulting(func),
            ret,
            args,
            effects: effects | Effects::MAY_FAULT,
        })
    }

    fn push(&mut self, h: Helper) -> HelperId {
        self.list.push(h);
        HelperId(self.list.len() as u32 - 1)
    }

    /// The helper named `id`.
    #[inline]
    pub fn get(&self, id: HelperId) -> Option<&Helper> {
        self.list.get(id.0 as usize)
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }
}
