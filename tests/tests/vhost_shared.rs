//! Memory that a back end shows to Debian's amd64 kernel beside RAM (`VHOST_USER_PROTOCOL_F_SHMEM`).

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::Command;

use holdfast_tests::back_ends::shared_ram;
use holdfast_tests::http::Api;
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::{Program, x86_64_args};
use serde_json::{Value, json};

/// A back end whose regions 0 and 3 have 64 KiB and 4 MiB.
struct BackEnd(Program);

impl BackEnd {
    fn start(socket: &Path) -> Self {
        let program = Path::new(env!("CARGO_MANIFEST_DIR")).join("clients/shared_memory.py");
        let mut command = Command::new("python3");
        command.arg(program).arg(socket).args(["0x10000", "0", "0", "0x400000"]);
        let program = Program::spawn(command);
        program.wait_for("LISTENS", BOOT);
        Self(program)
    }

    /// What the VM answers to a request.
    fn asks(&mut self, request: &str) -> i64 {
        let from = self.0.output().len();
        self.0.type_in(&format!("{request}\n"));
        let at = self.0.wait_for_after("RESULT ", from, BOOT);
        self.0.wait_for_after("\n", at, BOOT);
        let said = self.0.output();
        said[at..].lines().next().and_then(|number| number.parse().ok()).expect("a number")
    }
}

/// Where the guest finds the BAR of its entropy device's shared memory, and a word of it.
struct Window<'a>(&'a mut Guest, u64);

impl<'a> Window<'a> {
    fn find(guest: &'a mut Guest) -> Self {
        // Another such device has no such BAR.
        let devices = "grep -l 0x1044 /sys/bus/pci/devices/*/device";
        let show = "sed -n 3p ${d%/device}/resource; hexdump -v -e '1/1 \"%02x\"' ${d%/device}/config; echo";
        let said = guest.run(&format!("for d in $({devices}); do {show}; done"));
        let lines: Vec<&str> = said.lines().map(str::trim).collect();
        let found = lines.windows(2).find_map(|pair| {
            let start = u64::from_str_radix(pair[0].strip_prefix("0x")?.get(..16)?, 16).ok()?;
            (start != 0).then_some((start, pair[1]))
        });
        let (start, config) = found.unwrap_or_else(|| panic!("no BAR: {said}"));
        let byte = |at: usize| usize::from_str_radix(&config[2 * at..2 * at + 2], 16).expect("a byte");
        let word = |at: usize| (0..4).rev().fold(0, |value, n| value << 8 | byte(at + n) as u64);
        let mut regions = Vec::new();
        let mut at = byte(0x34);
        while at != 0 {
            // VIRTIO_PCI_CAP_SHARED_MEMORY_CFG
            if (byte(at), byte(at + 3)) == (9, 8) {
                let wide = |low: usize, high: usize| word(at + low) | word(at + high) << 32;
                regions.push((byte(at + 4), byte(at + 5), wide(8, 16), wide(12, 20)));
            }
            at = byte(at + 1);
        }
        regions.sort_unstable();
        assert_eq!(regions, [(2, 0, 0, 0x1_0000), (2, 3, 2 << 20, 4 << 20)]);
        Self(guest, start)
    }

    fn read(&mut self, offset: u64) -> u64 {
        let said = self.0.run(&format!("devmem {:#x} 32", self.1 + offset));
        let value = said.lines().find_map(|line| line.trim().strip_prefix("0x"));
        u64::from_str_radix(value.unwrap_or_else(|| panic!("{said}")), 16).expect("a number")
    }

    fn write(&mut self, offset: u64, value: u32) {
        self.0.run(&format!("devmem {:#x} 32 {value:#x}", self.1 + offset));
    }
}

/// A word of the host's file.
fn word(file: &File, offset: u64) -> u32 {
    let mut bytes = [0; 4];
    file.read_exact_at(&mut bytes, offset).expect("read");
    u32::from_le_bytes(bytes)
}

#[test]
fn what_a_back_end_maps_is_what_the_guest_sees() {
    let dir = tempfile::tempdir().expect("directory");
    let (socket, path, saved) = (dir.path().join("s"), dir.path().join("file"), dir.path().join("saved"));
    std::fs::create_dir(&saved).expect("directory");
    let words: Vec<u8> = (0..0x2000u32).flat_map(u32::to_le_bytes).collect();
    std::fs::write(&path, words).expect("file");
    let file = File::options().read(true).write(true).open(&path).expect("file");
    let mut back_end = BackEnd::start(&socket);
    let mut args = x86_64_args(1, "");
    shared_ram(&mut args);
    let device = format!("socket={},device_type=4,queue_sizes=[64]", socket.display());
    args.extend(["--generic-vhost-user".to_owned(), device]);
    args.extend(["--api-socket".to_owned(), dir.path().join("a").display().to_string()]);
    let mut guest = Guest::boot(&args);
    let api = Api::connect(&dir.path().join("a"));
    let mut window = Window::find(&mut guest);
    assert_eq!(window.read(0), 0, "nothing is there");
    // The second page of the file in the first region's last, read-only; all of it in the other region.
    assert_eq!(back_end.asks(&format!("map 0 0xf000 0x1000 0x1000 0 {}", path.display())), 0);
    assert_eq!(back_end.asks(&format!("map 3 0x2000 0x8000 0 1 {}", path.display())), 0);
    let region = 2 << 20;
    assert_eq!((window.read(0xf004), window.read(region + 0x2008)), (0x401, 2));
    assert_eq!((window.read(0xe004), window.read(region + 0xa000)), (0, 0), "beside it there is nothing");
    window.write(0xf004, 0x1111);
    window.write(region + 0x2008, 0x2222);
    assert_eq!((word(&file, 0x1004), word(&file, 8)), (0x401, 0x2222));
    file.write_all_at(&0x3333_u32.to_le_bytes(), 8).expect("written");
    assert_eq!(window.read(region + 0x2008), 0x3333);
    for wrong in [
        format!("map 0 0x10000 0x1000 0 0 {}", path.display()),
        format!("map 1 0 0x1000 0 0 {}", path.display()),
        format!("map 3 0x9000 0x1000 0 0 {}", path.display()),
        format!("map 3 0x20000 0x1000 0x8000 0 {}", path.display()),
        "unmap 3 0x2000 0x1000".to_owned(),
        "unmap 0 0 0x1000".to_owned(),
    ] {
        assert_eq!(back_end.asks(&wrong), -22, "{wrong}");
    }
    // What is mapped cannot be carried away.
    api.put("vm.pause", &Value::Null);
    let snapshot = json!({ "destination_url": format!("file://{}", saved.display()) });
    let refused = api.request("PUT", "vm.snapshot", &snapshot);
    assert!(refused.status == 500 && refused.body.contains("cannot be saved or moved"), "{refused:?}");
    api.put("vm.resume", &Value::Null);
    assert_eq!(back_end.asks("unmap 0 0xf000 0x1000"), 0);
    assert_eq!((window.read(0xf004), window.read(region + 0x2008)), (0, 0x3333));
    // A file that becomes shorter takes nobody along.
    file.set_len(0).expect("shorter");
    assert_eq!(window.read(region + 0x2008), 0);
    // What a back end has mapped goes with it; the next one may map again.
    file.set_len(0x8000).and_then(|()| file.write_all_at(&[7; 4], 0)).expect("written");
    drop(back_end);
    let mut back_end = BackEnd::start(&socket);
    assert_eq!(back_end.asks(&format!("map 3 0x2000 0x1000 0 0 {}", path.display())), 0);
    assert_eq!((window.read(region + 0x2000), window.read(region + 0x3000)), (0x0707_0707, 0));
    assert_eq!(back_end.asks("unmap 3 0x2000 0x1000"), 0);
    api.put("vm.pause", &Value::Null);
    api.put("vm.snapshot", &snapshot);
    api.put("vm.resume", &Value::Null);
    guest.power_off();
}
