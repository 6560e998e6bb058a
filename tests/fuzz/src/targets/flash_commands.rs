//! Command streams of parallel flash, with memory and with a file behind it.

use std::sync::{Arc, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use holdfast_device::{Access, BusDevice, Device, DeviceState};
use holdfast_devices::flash::{BLOCK, Backing, Chips, Flash, FlashSpec};
use vmm_sys_util::tempfile::TempFile;

const SIZE: u64 = 2 * BLOCK;
/// Most operations of a run.
const MAX_OPS: usize = 96;

#[derive(Debug)]
enum Op {
    /// A command that means something.
    Command { index: u8, at: u32 },
    /// Any write.
    Write { at: u32, value: u64, size: u8 },
    Read { at: u32, size: u8 },
    /// One word, as a driver programs it.
    Program { at: u32, value: u32 },
    /// A buffer, as a driver programs it.
    Buffer { at: u32, words: Vec<u32>, count: u8, confirmed: bool },
    Erase { block: u8 },
    Saved,
    Reset,
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? % 8 {
            0 => Self::Command { index: u.arbitrary()?, at: u.arbitrary()? },
            1 => Self::Write { at: u.arbitrary()?, value: u.arbitrary()?, size: u.arbitrary()? },
            2 => Self::Read { at: u.arbitrary()?, size: u.arbitrary()? },
            3 => Self::Program { at: u.arbitrary()?, value: u.arbitrary()? },
            4 => Self::Buffer { at: u.arbitrary()?, words: u.arbitrary()?, count: u.arbitrary()?, confirmed: u.arbitrary()? },
            5 => Self::Erase { block: u.arbitrary()? },
            6 => Self::Saved,
            _ => Self::Reset,
        })
    }
}

struct Rig {
    flash: [Arc<Flash>; 3],
    fresh: DeviceState,
}

static RIG: OnceLock<Rig> = OnceLock::new();

fn bank(id: &str, backing: Backing) -> Arc<Flash> {
    let chips = Chips::Pair16;
    let spec = FlashSpec { id: id.into(), gpa: 0x2000_0000, chips, size: SIZE, backing, rom: None };
    Flash::new(spec).expect("a bank")
}

fn build() -> Rig {
    let file = || {
        let file = TempFile::new().expect("a file").into_file();
        file.set_len(SIZE).expect("long enough");
        file
    };
    let flash = [
        bank("erased", Backing::Erased),
        bank("file", Backing::File { file: file(), readonly: false }),
        bank("locked", Backing::File { file: file(), readonly: true }),
    ];
    let fresh = flash[0].save().expect("saved");
    Rig { flash, fresh }
}

fn write(flash: &Flash, at: u64, bytes: &[u8]) {
    flash.write(Access { offset: at % SIZE, address: 0x2000_0000 + at % SIZE, vcpu: Some(0) }, bytes);
}

fn read(flash: &Flash, at: u64) -> u32 {
    let mut bytes = [0; 4];
    flash.read(Access { offset: at % SIZE, address: 0x2000_0000 + at % SIZE, vcpu: Some(0) }, &mut bytes);
    u32::from_le_bytes(bytes)
}

/// A word in array mode.
fn word(flash: &Flash, at: u64) -> u32 {
    write(flash, 0, &[0xff; 4]);
    read(flash, at)
}

fn program(flash: &Flash, at: u64, value: u32, writable: bool) {
    // From whatever mode it is in: a reset first.
    flash.reset();
    let old = word(flash, at);
    write(flash, at, &[0x40; 4]);
    write(flash, at, &value.to_le_bytes());
    let status = read(flash, at);
    assert_eq!(status & 0x92, if writable { 0x80 } else { 0x92 }, "status {status:#x}");
    assert_eq!(word(flash, at), if writable { old & value } else { old }, "bits only go to zero");
}

fn step(flash: &Flash, op: &Op, writable: bool) {
    match op {
        Op::Command { index, at } => {
            let commands = [0x10, 0x20, 0x40, 0x50, 0x60, 0x70, 0x90, 0x98, 0xd0, 0xe8, 0xf0, 0xff, 0x01];
            write(flash, (*at).into(), &[commands[usize::from(*index) % commands.len()]; 4]);
        }
        Op::Write { at, value, size } => write(flash, (*at).into(), &value.to_le_bytes()[..1 << (size % 4)]),
        Op::Read { at, size } => {
            let offset = u64::from(*at) % SIZE;
            let access = Access { offset, address: 0x2000_0000 + offset, vcpu: None };
            flash.read(access, &mut [0; 8][..1 << (size % 4)]);
        }
        Op::Program { at, value } => program(flash, u64::from(at & !3), *value, writable),
        Op::Buffer { at, words, count, confirmed } => {
            let at = u64::from(at & !3);
            write(flash, at, &[0xe8; 4]);
            write(flash, at, &[*count, 0, *count, 0]);
            for (n, word) in words.iter().take(64).enumerate() {
                write(flash, at + 4 * n as u64, &word.to_le_bytes());
            }
            write(flash, at, &[if *confirmed { 0xd0 } else { 0xff }; 4]);
        }
        Op::Erase { block } => {
            flash.reset();
            let at = u64::from(block % 2) * BLOCK;
            write(flash, at, &[0x20; 4]);
            write(flash, at, &[0xd0; 4]);
            assert_eq!(read(flash, at) & 0x80, 0x80, "ready");
            assert!(!writable || word(flash, at + 0x40) == u32::MAX);
        }
        Op::Saved => {
            let state = flash.save().expect("every state can be saved");
            flash.restore(&state).expect("a device takes its own state");
        }
        Op::Reset => flash.reset(),
    }
}

/// Runs one input: which bank, then operations.
pub fn run(data: &[u8]) {
    let Some((&which, data)) = data.split_first() else { return };
    let rig = RIG.get_or_init(build);
    let n = usize::from(which) % 3;
    let flash = &rig.flash[n];
    if n == 0 {
        flash.restore(&rig.fresh).expect("a device takes its own state");
    }
    flash.reset();
    let mut input = Unstructured::new(data);
    for _ in 0..MAX_OPS {
        if input.is_empty() {
            break;
        }
        let Ok(op) = Op::arbitrary(&mut input) else { break };
        step(flash, &op, n != 2);
    }
}
