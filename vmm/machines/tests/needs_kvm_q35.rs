//! The q35 on the host's KVM. `HOLDFAST_NO_KVM=1` skips these tests where there is none; otherwise its
//! absence fails.

mod rig;

use std::sync::Arc;
use std::time::Duration;

use holdfast_accel::IrqChip;
use holdfast_device::SystemEvent;
use holdfast_devices::chardev::{CharBackend, CharReceiver};
use holdfast_machines::Payload;
use parking_lot::Mutex;
use rig::{End, Options, Rig};

const SEABIOS: &str = "/usr/share/seabios/bios-256k.bin";

/// Records what the guest says, and types the answer once the guest has said what it waits for.
#[derive(Debug, Default)]
struct Tape {
    said: Mutex<Vec<u8>>,
    receiver: Mutex<Option<Arc<dyn CharReceiver>>>,
    /// What to wait for and what to type then, one after the other.
    answers: Mutex<Vec<(&'static str, &'static str)>>,
}

impl CharBackend for Tape {
    fn send(&self, data: &[u8]) {
        self.said.lock().extend_from_slice(data);
    }
    fn connect(&self, receiver: Arc<dyn CharReceiver>) {
        *self.receiver.lock() = Some(receiver);
    }
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "tape".into()
    }
}

impl Tape {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.said.lock()).into_owned()
    }

    /// Types the answers, each when its cue has been said, until there are none left.
    fn converse(&self) {
        let mut heard = 0;
        let answers = std::mem::take(&mut *self.answers.lock());
        for (cue, answer) in answers {
            for byte in answer.bytes() {
                loop {
                    std::thread::sleep(Duration::from_millis(20));
                    let text = self.text();
                    let cued = text.get(heard..).is_some_and(|t| t.contains(cue));
                    let receiver = self.receiver.lock().clone();
                    if let Some(receiver) = receiver.filter(|r| cued && r.capacity() > 0) {
                        receiver.receive(&[byte]);
                        break;
                    }
                }
            }
            heard = self.text().len();
        }
    }
}

fn absent() -> bool {
    let absent = std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1");
    if absent {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
    }
    absent
}

/// A disk whose boot sector reads its second sector through the BIOS, sends what it finds there to the debug
/// console, and exits with 0x21.
fn bootable_disk(dir: &std::path::Path) -> String {
    #[rustfmt::skip]
    let code = [
        0x31u8, 0xc0, 0x8e, 0xc0, 0x8e, 0xd8, // xor ax, ax; mov es, ax; mov ds, ax
        0xb8, 0x01, 0x02, // mov ax, 0x0201: read one sector
        0xb9, 0x02, 0x00, // mov cx, 2
        0xb6, 0x00, // mov dh, 0
        0xbb, 0x00, 0x7e, // mov bx, 0x7e00
        0xcd, 0x13, // int 0x13
        0xbe, 0x00, 0x7e, // mov si, 0x7e00
        0xba, 0x02, 0x04, // mov dx, 0x402
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz +3
        0xee, // out dx, al
        0xeb, 0xf8, // jmp lodsb
        0xb0, 0x10, // mov al, 0x10
        0xe6, 0xf4, // out 0xf4, al
        0xf4, // hlt
    ];
    let mut disk = vec![0; 1 << 20];
    disk[..code.len()].copy_from_slice(&code);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    disk[512..531].copy_from_slice(b"READ FROM THE DISK\n");
    let path = dir.join("disk.img");
    std::fs::write(&path, disk).expect("writable");
    path.to_str().expect("text").to_owned()
}

#[test]
fn needs_kvm_firmware_boots_a_virtio_disk() {
    if absent() {
        return;
    }
    for irqchip in [IrqChip::Split, IrqChip::On] {
        let dir = tempfile::tempdir().expect("directory");
        let (serial, debug) = (Arc::new(Tape::default()), Arc::new(Tape::default()));
        let options = Options {
            payload: Payload { firmware: Some(SEABIOS.into()), ..Payload::default() },
            irqchip,
            disk: Some(bootable_disk(dir.path())),
            serial: Some(serial.clone()),
            debug_console: Some(debug.clone()),
            ..Options::default()
        };
        let end = Rig::new(&options).run(Duration::from_secs(240));
        let text = format!("{irqchip:?}\n{}\n{}", serial.text(), debug.text());
        assert_eq!(end, End::Asked(SystemEvent::Exit(0x21)), "{text}");
        assert!(debug.text().contains("READ FROM THE DISK"), "{text}");
        assert!(serial.text().contains("SeaBIOS"), "{text}");
        assert!(debug.text().contains("table(50434146)="), "firmware found our FADT: {text}");
        assert!(debug.text().contains("Copying SMBIOS"), "{text}");
    }
}

/// A Multiboot kernel that says so on the debug console and exits with 0x41.
fn multiboot_kernel() -> Vec<u8> {
    const BASE: u32 = 0x20_0000;
    let magic = 0x1bad_b002u32;
    #[rustfmt::skip]
    let code = [
        0x66, 0xba, 0x02, 0x04, // mov dx, 0x402
        0xbe, 0x80, 0x00, 0x20, 0x00, // mov esi, text
        0xac, // lodsb
        0x84, 0xc0, // test al, al
        0x74, 0x03, // jz +3
        0xee, // out dx, al
        0xeb, 0xf8, // jmp lodsb
        0xb0, 0x20, // mov al, 0x20
        0xe6, 0xf4, // out 0xf4, al
        0xf4, // hlt
    ];
    let mut body: Vec<u8> =
        [magic, 0, 0u32.wrapping_sub(magic)].iter().flat_map(|w| w.to_le_bytes()).collect();
    body.extend(code);
    body.resize(0x80, 0);
    body.extend(b"THE KERNEL RUNS\n\0");
    let mut elf = b"\x7fELF\x01\x01\x01".to_vec();
    elf.resize(16, 0);
    elf.extend([2, 0, 3, 0]);
    for word in [1, BASE + 12, 52, 0, 0] {
        elf.extend(u32::to_le_bytes(word));
    }
    for half in [52u16, 32, 1, 0, 0, 0] {
        elf.extend(half.to_le_bytes());
    }
    let len = body.len() as u32;
    for word in [1, 0x100, BASE, BASE, len, len, 7, 4] {
        elf.extend(u32::to_le_bytes(word));
    }
    elf.resize(0x100, 0);
    elf.extend(body);
    elf
}

/// A disk with GRUB, whose memory disk holds `kernel`. `None` where GRUB is not installed.
fn grub_disk(dir: &std::path::Path) -> Option<String> {
    let parts = "/usr/lib/grub/i386-pc";
    let mut disk = std::fs::read(format!("{parts}/boot.img")).ok()?;
    std::fs::write(dir.join("kernel"), multiboot_kernel()).expect("writable");
    let config = "serial --unit=0\nterminal_output serial\nterminal_input serial\n";
    std::fs::write(dir.join("grub.cfg"), config).expect("writable");
    let run = |program: &str, args: &[&str]| {
        let status = std::process::Command::new(program).args(args).current_dir(dir).status();
        status.is_ok_and(|s| s.success())
    };
    assert!(run("tar", &["-cf", "memdisk.tar", "kernel"]));
    let modules = ["biosdisk", "memdisk", "tar", "serial", "terminal", "multiboot", "boot", "normal"];
    let mut args = vec!["-O", "i386-pc", "-m", "memdisk.tar", "-c", "grub.cfg", "-p", "/", "-o", "core.img"];
    args.extend(modules);
    if !run("grub-mkimage", &args) {
        return None;
    }
    disk.resize(512, 0);
    disk[510..512].copy_from_slice(&[0x55, 0xaa]);
    // The boot sector loads the sector behind it, which loads the rest.
    disk.extend(std::fs::read(dir.join("core.img")).expect("made"));
    disk.resize(4 << 20, 0);
    let path = dir.join("grub.img");
    std::fs::write(&path, disk).expect("writable");
    Some(path.to_str().expect("text").to_owned())
}

#[test]
fn needs_kvm_grub_takes_commands_at_its_prompt_and_loads_a_kernel() {
    if absent() {
        return;
    }
    let dir = tempfile::tempdir().expect("directory");
    let Some(disk) = grub_disk(dir.path()) else {
        eprintln!("skipped: grub-pc-bin is not installed");
        return;
    };
    let (serial, debug) = (Arc::new(Tape::default()), Arc::new(Tape::default()));
    *serial.answers.lock() = vec![("grub>", "multiboot (memdisk)/kernel\r"), ("grub>", "boot\r")];
    let options = Options {
        payload: Payload { firmware: Some(SEABIOS.into()), ..Payload::default() },
        disk: Some(disk),
        serial: Some(serial.clone()),
        debug_console: Some(debug.clone()),
        ..Options::default()
    };
    let typist = Arc::clone(&serial);
    std::thread::spawn(move || typist.converse());
    let end = Rig::new(&options).run(Duration::from_secs(580));
    let text = format!("{}\n{}", serial.text(), debug.text());
    assert_eq!(end, End::Asked(SystemEvent::Exit(0x41)), "{text}");
    assert!(debug.text().contains("THE KERNEL RUNS"), "{text}");
}

/// `HOLDFAST_KVM_KERNEL` and `HOLDFAST_KVM_INITRAMFS` name a kernel that this host's KVM can run, and an initramfs
/// whose init says `BOOTED` and powers off.
#[test]
fn needs_kvm_linux_boots_to_user_space_and_powers_off() {
    let kernel = std::env::var_os("HOLDFAST_KVM_KERNEL");
    let (Some(kernel), false) = (kernel, absent()) else {
        eprintln!("skipped: HOLDFAST_KVM_KERNEL is not set");
        return;
    };
    let serial = Arc::new(Tape::default());
    let options = Options {
        payload: Payload {
            kernel: Some(kernel.into()),
            initramfs: std::env::var_os("HOLDFAST_KVM_INITRAMFS").map(Into::into),
            cmdline: "console=ttyS0 panic=-1 quiet".into(),
            ..Payload::default()
        },
        cpus: 2,
        serial: Some(serial.clone()),
        ..Options::default()
    };
    let end = Rig::new(&options).run(Duration::from_secs(600));
    assert_eq!(end, End::Asked(SystemEvent::Shutdown), "{}", serial.text());
    assert!(serial.text().contains("BOOTED"), "{}", serial.text());
}
