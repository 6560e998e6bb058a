//! Command-level tests.

use std::path::PathBuf;

use super::*;

const SIZE: u64 = 1 << 20;

#[derive(Debug, Default)]
struct Hook(Mutex<Vec<bool>>);
impl RomHook for Hook {
    fn map(&self, gpa: u64, region: &Arc<GuestRegion>) -> bool {
        use vm_memory::{Address, GuestMemoryRegion};
        assert_eq!((gpa, region.start_addr().raw_value(), region.len()), (0x2000_0000, 0x2000_0000, SIZE));
        self.0.lock().push(true);
        true
    }
    fn unmap(&self, _gpa: u64) {
        self.0.lock().push(false);
    }
}

fn bank(backing: Backing, rom: Option<Arc<dyn RomHook>>) -> Arc<Flash> {
    let spec =
        FlashSpec { id: "flash0".into(), chips: Chips::Pair16, gpa: 0x2000_0000, size: SIZE, backing, rom };
    Flash::new(spec).expect("a bank")
}

fn erased() -> Arc<Flash> {
    bank(Backing::Erased, None)
}

fn at(offset: u64) -> Access {
    Access { offset, address: 0x2000_0000 + offset, vcpu: Some(0) }
}

fn write(flash: &Flash, offset: u64, value: u32) {
    flash.write(at(offset), &value.to_le_bytes());
}

fn read(flash: &Flash, offset: u64) -> u32 {
    let mut b = [0; 4];
    flash.read(at(offset), &mut b);
    u32::from_le_bytes(b)
}

/// A command goes to both chips.
fn command(flash: &Flash, offset: u64, command: u32) {
    write(flash, offset, command << 16 | command);
}

struct Scratch(PathBuf);
impl Scratch {
    fn new(name: &str, size: u64) -> (Self, File) {
        let path = std::env::temp_dir().join(format!("holdfast-flash-{}-{name}", std::process::id()));
        let file =
            File::options().create(true).truncate(true).read(true).write(true).open(&path).expect("file");
        file.set_len(size).expect("size");
        (Self(path), file)
    }
}
impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

#[test]
fn identifies_itself() {
    let flash = erased();
    assert_eq!(read(&flash, 0), u32::MAX);
    command(&flash, 0x154, 0x98);
    let text: Vec<u8> = (0x10..0x13).map(|n| read(&flash, 4 * n) as u8).collect();
    assert_eq!(text, b"QRY");
    assert_eq!(read(&flash, 4 * 0x10), 0x0051_0051, "both chips answer");
    assert_eq!(read(&flash, 4 * 0x27), 0x0013_0013, "512 KiB each");
    assert_eq!(read(&flash, 4 * 0x2a), 0x000a_000a, "1 KiB write buffer each");
    assert_eq!((read(&flash, 4 * 0x2d) as u8, read(&flash, 4 * 0x30) as u8), (3, 2), "4 blocks of 128 KiB");
    command(&flash, 0, 0x90);
    assert_eq!((read(&flash, 0), read(&flash, 4), read(&flash, 8)), (0x0089_0089, 0x0018_0018, 0));
    command(&flash, 0, 0xff);
    assert_eq!(read(&flash, 0), u32::MAX);
}

#[test]
fn programs_bits_to_zero_and_erases_blocks() {
    let flash = erased();
    command(&flash, 0, 0x40);
    write(&flash, 0x100, 0xf0f0_1234);
    assert_eq!(read(&flash, 0x100), 0x0080_0080, "status");
    command(&flash, 0, 0x40);
    write(&flash, 0x100, 0x00ff_ffff);
    command(&flash, 0, 0xff);
    assert_eq!(read(&flash, 0x100), 0x00f0_1234);
    command(&flash, 0x100, 0x20);
    command(&flash, 0x100, 0xd0);
    assert_eq!(read(&flash, 0), 0x0080_0080);
    command(&flash, 0, 0xff);
    assert_eq!(read(&flash, 0x100), u32::MAX);
    command(&flash, 0, 0x20);
    command(&flash, 0, 0xff);
    assert_eq!(read(&flash, 0) & 0xff, 0xb0, "no confirmation: sequence error");
    command(&flash, 0, 0x50);
    assert_eq!(read(&flash, 0) & 0xff, 0x80);
}

#[test]
fn buffered_writes_take_effect_when_confirmed() {
    let flash = erased();
    command(&flash, BLOCK, 0xe8);
    assert_eq!(read(&flash, BLOCK) & 0x80, 0x80);
    command(&flash, BLOCK, 2);
    for n in 0..3 {
        write(&flash, BLOCK + 4 * n, 0x1111_1111 * (n as u32 + 1));
    }
    command(&flash, BLOCK, 0xd0);
    command(&flash, 0, 0xff);
    assert_eq!((read(&flash, BLOCK), read(&flash, BLOCK + 8)), (0x1111_1111, 0x3333_3333));
    command(&flash, BLOCK, 0xe8);
    command(&flash, BLOCK, 0);
    write(&flash, BLOCK + 12, 0);
    command(&flash, BLOCK, 0xff);
    command(&flash, 0, 0xff);
    assert_eq!(read(&flash, BLOCK + 12), u32::MAX, "not confirmed");
    command(&flash, BLOCK, 0xe8);
    command(&flash, BLOCK, 0xffff);
    assert_ne!(read(&flash, 0) & 0x30, 0, "more than the buffer holds");
    command(&flash, 0, 0xff);
    command(&flash, BLOCK, 0xe8);
    command(&flash, BLOCK, 1);
    write(&flash, 0, 0);
    assert_ne!(read(&flash, 0) & 0x10, 0, "outside of the block");
}

#[test]
fn a_file_is_mapped_in_array_mode_and_written_through() {
    let (scratch, file) = Scratch::new("rw", SIZE);
    let hook = Arc::new(Hook::default());
    let rom = Some(Arc::clone(&hook) as Arc<dyn RomHook>);
    let flash = bank(Backing::File { file, readonly: false }, rom);
    command(&flash, BLOCK, 0x20);
    command(&flash, BLOCK, 0xd0);
    command(&flash, 0, 0x40);
    write(&flash, BLOCK, 0x6c6c_6548);
    command(&flash, 0, 0xff);
    assert_eq!(*hook.0.lock(), [true, false, true]);
    assert_eq!((read(&flash, BLOCK), read(&flash, 0)), (0x6c6c_6548, 0));
    let bytes = std::fs::read(&scratch.0).expect("file");
    assert_eq!(bytes[BLOCK as usize..BLOCK as usize + 5], *b"Hell\xff");
    drop(flash);
    assert_eq!(hook.0.lock().last(), Some(&false));
}

#[test]
fn read_only_and_misfit_files_are_refused() {
    let (_scratch, file) = Scratch::new("ro", SIZE);
    let flash = bank(Backing::File { file, readonly: true }, None);
    command(&flash, 0, 0x40);
    write(&flash, 0, 0);
    assert_eq!(read(&flash, 0) & 0xff, 0x92, "locked");
    command(&flash, 0, 0x50);
    command(&flash, 0, 0x20);
    command(&flash, 0, 0xd0);
    assert_eq!(read(&flash, 0) & 0xff, 0xa2);
    let (_scratch, file) = Scratch::new("short", SIZE - 1);
    let build = |size, backing| {
        let spec = FlashSpec { id: "f".into(), gpa: 0, chips: Chips::Pair16, size, backing, rom: None };
        Flash::new(spec).expect_err("refused").to_string()
    };
    assert!(build(SIZE, Backing::File { file, readonly: false }).contains("both must be equal"));
    assert!(build(SIZE + 1, Backing::Erased).contains("power of two"));
    assert!(build(4096, Backing::Erased).contains("power of two"));
}

#[test]
fn state_survives() {
    let flash = erased();
    command(&flash, 0, 0x40);
    write(&flash, 2 * BLOCK + 4, 7);
    command(&flash, 0, 0x90);
    let mut state = flash.save().expect("state");
    let other = erased();
    other.restore(&state).expect("same size");
    assert_eq!(read(&other, 0), 0x0089_0089);
    other.reset();
    assert_eq!(read(&other, 2 * BLOCK + 4), 7, "contents survive a reset");
    let whole = state.clone();
    state.data["programmed"] = serde_json::json!([[SIZE - 1, [1, 2]]]);
    assert!(other.restore(&state).is_err());
    let mut state = whole;
    state.data["regs"]["mode"] = serde_json::json!({ "buffer_data": [u32::MAX, 0] });
    assert!(other.restore(&state).is_err(), "a guest could fill the host's memory");
    state.data["regs"]["mode"] = serde_json::json!({ "buffer_data": [4, 0] });
    other.restore(&state).expect("four more words fit");
}

#[test]
fn hostile_accesses_do_no_harm() {
    let flash = erased();
    let offsets = [0, 1, 2, 3, BLOCK - 1, BLOCK - 2, SIZE - 4, SIZE - 1, SIZE, u64::MAX - 3, u64::MAX];
    for first in 0..=255u8 {
        for offset in offsets {
            for len in [0, 1, 2, 3, 4, 5, 8, 64] {
                let mut data = vec![first; len];
                flash.write(at(0), &[first]);
                flash.write(Access { offset, address: 0, vcpu: None }, &data);
                flash.read(Access { offset, address: 0, vcpu: None }, &mut data);
            }
        }
    }
}

/// One chip of 8 bits: what OVMF does to find and to write its variables.
#[test]
fn a_single_chip_takes_bytes() {
    let size = 3 * SMALL_BLOCK;
    let (scratch, file) = Scratch::new("single", size);
    let spec = FlashSpec {
        id: "vars".into(),
        gpa: 0xffc0_0000,
        chips: Chips::Single8,
        size,
        backing: Backing::File { file, readonly: false },
        rom: None,
    };
    let flash = Flash::new(spec).expect("a bank of any number of blocks");
    let put = |offset, byte: u8| flash.write(at(offset), &[byte]);
    let get = |offset| {
        let mut byte = [0];
        flash.read(at(offset), &mut byte);
        byte[0]
    };
    for block in [0x11, 0x1011] {
        put(block, 0x20);
        put(block, 0xd0);
        assert_eq!(get(block), 0x80, "erased, ready");
    }
    put(0x11, 0x50);
    put(0x11, 0x70);
    assert_eq!(get(0x11), 0, "the status is clear: this is flash");
    for (offset, byte) in [(0x1001, 0xa5), (0x1002, 0x3c)] {
        put(offset, 0x10);
        put(offset, byte);
        assert_eq!(get(offset), 0x80);
    }
    put(0, 0xff);
    assert_eq!([0xfff, 0x1001, 0x1002, 0x1003].map(get), [0xff, 0xa5, 0x3c, 0xff]);
    put(0x1fff, 0x20);
    put(0x1fff, 0xd0);
    put(0, 0xff);
    assert_eq!([0x1001, 0x1fff, 0x2000].map(get), [0xff, 0xff, 0]);
    put(0, 0x98);
    assert_eq!([0x10, 0x11, 0x12, 0x28].map(get), [b'Q', b'R', b'Y', 0]);
    // Three blocks of 4 KiB.
    assert_eq!([0x2d, 0x2e, 0x2f, 0x30].map(get), [2, 0, 16, 0]);
    put(0, 0x90);
    assert_eq!([0, 1].map(get), [0x89, 0x18]);
    // A wide write is a write of each byte.
    put(0, 0xff);
    flash.write(at(0x1000), &[0x10, 0x77, 0x10, 0x55]);
    put(0, 0xff);
    assert_eq!([0x1000, 0x1001, 0x1002, 0x1003].map(get), [0xff, 0x77, 0xff, 0x55]);
    drop(flash);
    assert_eq!(std::fs::read(&scratch.0).expect("file")[0x1001], 0x77);
}
