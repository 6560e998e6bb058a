//! A Multiboot image with modules and a command line, and devices that are added by name: what the image finds, and the
//! exit status that it asks for.

use std::path::Path;
use std::time::Duration;

use holdfast_tests::Program;

/// Wide enough for a machine that is busy with other tests.
const LIMIT: Duration = Duration::from_secs(120);
const LOAD: u32 = 0x20_0000;

/// A plain image: writes its command line to the serial port and the first byte of its first module to the exit port; 0x7f
/// if EAX is not what Multiboot promises.
fn image() -> Vec<u8> {
    let magic = 0x1bad_b002u32;
    let flags = 1u32 << 16;
    let checksum = 0u32.wrapping_sub(magic.wrapping_add(flags));
    let header = [magic, flags, checksum, LOAD, LOAD, 0, 0, LOAD + 0x20];
    let code = [
        0x3d, 0x02, 0xb0, 0xad, 0x2b, // cmp eax, 0x2badb002
        0x75, 0x1c, // jne wrong
        0x8b, 0x73, 0x10, // mov esi, [ebx+16]
        0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
        0xac, 0x84, 0xc0, // next: lodsb; test al, al
        0x74, 0x03, // jz done
        0xee, 0xeb, 0xf8, // out dx, al; jmp next
        0x8b, 0x73, 0x18, // done: mov esi, [ebx+24]
        0x8b, 0x36, 0x8a, 0x06, // mov esi, [esi]; mov al, [esi]
        0xe6, 0xf4, // out 0xf4, al
        0xf4, 0xeb, 0xfd, // forever: hlt; jmp forever
        0xb0, 0x7f, 0xe6, 0xf4, 0xf4, // wrong: mov al, 0x7f; out 0xf4, al; hlt
    ];
    header.iter().flat_map(|w| w.to_le_bytes()).chain(code).collect()
}

fn args(dir: &Path, more: &[&str]) -> Vec<String> {
    let at = |name: &str| dir.join(name).display().to_string();
    std::fs::write(dir.join("image"), image()).expect("written");
    std::fs::write(dir.join("module"), [0x10]).expect("written");
    std::fs::write(dir.join("other"), [0x11]).expect("written");
    let modules = format!("{} a=b,{}", at("module"), at("other"));
    let fixed = [
        ["--arch", "x86_64"],
        ["--accel", "tcg"],
        ["--memory", "size=64M"],
        ["--kernel", &at("image")],
        ["--initramfs", &modules],
        ["--cmdline", "one two"],
        ["--serial", "tty"],
        ["--console", "off"],
    ];
    fixed.into_iter().flatten().chain(more.iter().copied()).map(str::to_owned).collect()
}

#[test]
fn a_multiboot_image_finds_its_modules_and_exits_with_its_status() {
    let dir = tempfile::tempdir().expect("a directory");
    let devices = [
        "--landlock",
        "--device",
        "isa-debug-exit,iobase=0xf4,iosize=0x4",
        "--device",
        "pc-testdev",
        "--device",
        "pci-testdev",
    ];
    let mut program = Program::run(&args(dir.path(), &devices));
    program.wait_for("image one two", LIMIT);
    assert_eq!(program.wait_exit(LIMIT).code(), Some(0x10 << 1 | 1));
}

#[test]
fn processors_and_devices_that_cannot_be_had_are_refused_by_name() {
    let dir = tempfile::tempdir().expect("a directory");
    for (option, value, text) in [
        ("--device", "rtl8139", "no device `rtl8139`"),
        ("--device", "pc-testdev,iobase=1", "`iobase`"),
        ("--cpus", "boot=1,profile=\"max,+flux\"", "`flux`"),
        ("--cpus", "boot=1,profile=\"max,+svm\"", "no `svm`"),
    ] {
        let mut program = Program::run(&args(dir.path(), &[option, value]));
        program.wait_for(text, LIMIT);
        assert_ne!(program.wait_exit(LIMIT).code(), Some(0));
    }
}
