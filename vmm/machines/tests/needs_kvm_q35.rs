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

#[derive(Debug, Default)]
struct Tape(Mutex<Vec<u8>>);

impl CharBackend for Tape {
    fn send(&self, data: &[u8]) {
        self.0.lock().extend_from_slice(data);
    }
    fn connect(&self, _receiver: Arc<dyn CharReceiver>) {}
    fn receiver_ready(&self) {}
    fn label(&self) -> String {
        "tape".into()
    }
}

impl Tape {
    fn text(&self) -> String {
        String::from_utf8_lossy(&self.0.lock()).into_owned()
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
