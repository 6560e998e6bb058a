//! An x86 guest of a few instructions, which boots at once and runs on any accelerator.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

use crate::migration::LIMIT;

/// A CPU model that KVM and translation have alike; a KVM that interprets says that it has no SSE3.
pub const PROFILE: &str = "qemu64,-pni";
const LOAD: u32 = 0x20_0000;

/// A Multiboot image of a guest that counts, at most 18 times a second by the interval timer. Each time it checks that the last
/// number is still in each of 64 pages, writes the next one there, and writes that to the serial port, in hexadecimal.
pub fn image() -> Vec<u8> {
    let (magic, flags) = (0x1bad_b002u32, 1u32 << 16);
    let checksum = 0u32.wrapping_sub(magic.wrapping_add(flags));
    let header = [magic, flags, checksum, LOAD, LOAD, 0, 0, LOAD + 0x20];
    let code = [
        0xb0, 0x34, 0xe6, 0x43, // mov al, 0x34; out 0x43, al: counter 0 begins anew at 0
        0x31, 0xc0, 0xe6, 0x40, 0xe6, 0x40, // xor eax, eax; out 0x40, al; out 0x40, al
        0x31, 0xdb, // xor ebx, ebx
        0xbf, 0, 0, 0x40, 0, // next: mov edi, 0x400000
        0xb9, 0x40, 0, 0, 0, // mov ecx, 64
        0x39, 0x1f, 0x75, 0x49, // page: cmp [edi], ebx; jne bad
        0x8d, 0x43, 0x01, 0x89, 0x07, // lea eax, [ebx+1]; mov [edi], eax
        0x81, 0xc7, 0, 0x10, 0, 0, 0xe2, 0xef, // add edi, 4096; loop page
        0x43, // inc ebx
        0xba, 0xf8, 0x03, 0, 0, // mov edx, 0x3f8
        0xb9, 8, 0, 0, 0, 0x89, 0xde, // mov ecx, 8; mov esi, ebx
        0xc1, 0xc6, 0x04, 0x89, 0xf0, 0x24, 0x0f, // digit: rol esi, 4; mov eax, esi; and al, 15
        0x04, 0x30, 0x3c, 0x39, 0x76, 0x02, 0x04, 0x27, // add al, '0'; cmp al, '9'; jbe put; add al, 39
        0xee, 0xe2, 0xee, // put: out dx, al; loop digit
        0xb0, 0x0a, 0xee, // mov al, 10; out dx, al
        0x31, 0xc0, 0xe6, 0x43, 0xe4, 0x40, 0xe4,
        0x40, // high: latch, read the low byte, read the high byte
        0x84, 0xc0, 0x79, 0xf4, // test al, al; jns high
        0x31, 0xc0, 0xe6, 0x43, 0xe4, 0x40, 0xe4, 0x40, // low: as above
        0x84, 0xc0, 0x78, 0xf4, // test al, al; js low
        0xeb, 0xa9, // jmp next
        0xba, 0xf8, 0x03, 0, 0, 0xb0, 0x42, 0xee, // bad: mov edx, 0x3f8; mov al, 'B'; out dx, al
        0xf4, 0xeb, 0xf5, // hlt; jmp bad
    ];
    header.iter().flat_map(|w| w.to_le_bytes()).chain(code).collect()
}

/// What the guest wrote, to a file that all processes append to.
#[derive(Debug)]
pub struct Counter(pub PathBuf);

impl Counter {
    /// The last number of a whole line; each must be one more than the one before.
    ///
    /// # Panics
    /// If one is not, or the guest found its RAM altered.
    pub fn counted(&self) -> u64 {
        let text = std::fs::read_to_string(&self.0).unwrap_or_default();
        let whole = text.rsplit_once('\n').map_or("", |(whole, _)| whole);
        let mut last = 0;
        for line in whole.lines() {
            let number = u64::from_str_radix(line, 16).unwrap_or_else(|_| panic!("RAM got lost:\n{text}"));
            assert_eq!(number, last + 1, "it counts on without a gap:\n{text}");
            last = number;
        }
        last
    }

    /// Waits until it has counted `more` numbers further than now.
    ///
    /// # Panics
    /// If it does not.
    pub fn goes_on(&self, more: u64) {
        let (want, deadline) = (self.counted() + more, Instant::now() + LIMIT);
        while self.counted() < want {
            assert!(Instant::now() < deadline, "it does not count up to {want}");
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}

/// The config of a VM with 64 MiB and one vCPU that counts into `dir/console`. The image is written to `dir`.
///
/// # Panics
/// If it cannot be.
pub fn config(dir: &Path, accel: &str) -> Value {
    std::fs::write(dir.join("image"), image()).expect("written");
    json!({
        "arch": "x86_64",
        "accel": accel,
        "cpus": { "boot_vcpus": 1, "max_vcpus": 1, "profile": PROFILE },
        "memory": { "size": 64u64 << 20 },
        "payload": { "kernel": dir.join("image") },
        "serial": { "mode": "File", "file": dir.join("console") },
        "console": { "mode": "Off" },
    })
}

/// Options of the command line that make the same VM.
///
/// # Panics
/// If the image cannot be written.
pub fn options(dir: &Path, accel: &str) -> Vec<String> {
    std::fs::write(dir.join("image"), image()).expect("written");
    let at = |name: &str| dir.join(name).display().to_string();
    let options = [
        ["--arch", "x86_64"],
        ["--accel", accel],
        ["--cpus", &format!("boot=1,profile=\"{PROFILE}\"")],
        ["--memory", "size=64M"],
        ["--kernel", &at("image")],
        ["--serial", &format!("file={}", at("console"))],
        ["--console", "off"],
    ];
    options.into_iter().flatten().map(str::to_owned).collect()
}
