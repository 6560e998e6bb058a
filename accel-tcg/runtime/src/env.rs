//! The memory block that translated code works on.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::ptr::NonNull;
use std::sync::atomic::AtomicU32;

use zerocopy::{FromBytes, IntoBytes, KnownLayout};

/// Alignment of an `Env`, and of the guest's state within it.
const ALIGN: usize = 64;

/// The fields of the header that this module reaches.
#[repr(C)]
struct Header {
    exit_request: AtomicU32,
    _pad: u32,
    pc: u64,
}

const STATE_AT: usize = size_of::<Header>().next_multiple_of(ALIGN);

/// Owns one vCPU's `Env`: the generic header, then the guest's state.
#[derive(Debug)]
pub struct EnvBox {
    base: NonNull<u8>,
    layout: Layout,
    state_size: usize,
}

// SAFETY: the block is plain memory; what several threads touch of it is atomic, the rest is touched
// only by the thread that owns the vCPU.
unsafe impl Send for EnvBox {}
// SAFETY: as above.
unsafe impl Sync for EnvBox {}

impl EnvBox {
    /// A zeroed `Env` with `state_size` bytes of guest state.
    pub fn new(state_size: usize) -> Self {
        let size = STATE_AT + state_size;
        let layout =
            Layout::from_size_align(size.next_multiple_of(ALIGN), ALIGN).unwrap_or(Layout::new::<[u64; 8]>());
        // SAFETY: the layout's size is not zero.
        let base = unsafe { alloc_zeroed(layout) };
        let Some(base) = NonNull::new(base) else { handle_alloc_error(layout) };
        Self { base, layout, state_size }
    }

    fn header(&self) -> *mut Header {
        self.base.as_ptr().cast()
    }

    /// The word that translated code polls.
    pub fn exit_request(&self) -> &AtomicU32 {
        // SAFETY: the header is initialised (zeroed) and the field is atomic.
        unsafe { &(*self.header()).exit_request }
    }

    pub(crate) fn pc(&self) -> u64 {
        // SAFETY: only the vCPU's own thread reads and writes it.
        unsafe { (*self.header()).pc }
    }

    pub(crate) fn set_pc(&self, pc: u64) {
        // SAFETY: only the vCPU's own thread reads and writes it.
        unsafe { (*self.header()).pc = pc }
    }

    /// The guest's state.
    #[allow(clippy::mut_from_ref, reason = "the vCPU's thread reaches it through `&mut Cpu` only")]
    pub(crate) fn state<T: FromBytes + IntoBytes + KnownLayout>(&self) -> &mut T {
        assert!(
            size_of::<T>() <= self.state_size && align_of::<T>() <= ALIGN,
            "guest state type does not fit"
        );
        // SAFETY: size and alignment were checked, any bytes are a valid `T`, and the caller holds the
        // one `&mut Cpu` of this vCPU.
        unsafe { &mut *self.base.as_ptr().add(STATE_AT).cast::<T>() }
    }
}

impl Drop for EnvBox {
    fn drop(&mut self) {
        // SAFETY: allocated in `new` with this layout.
        unsafe { dealloc(self.base.as_ptr(), self.layout) }
    }
}
