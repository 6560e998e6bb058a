//! SMBIOS tables: System Management BIOS reference specification 3.0, with the 32-bit (2.1) entry point.

use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress, GuestMemoryError};

/// fw_cfg file of the entry point; firmware fills in the tables' address.
pub const ANCHOR: &str = "etc/smbios/smbios-anchor";
/// fw_cfg file of the tables.
pub const TABLES: &str = "etc/smbios/smbios-tables";

/// Length of the entry point in bytes.
const ANCHOR_LEN: u8 = 0x1f;
/// Largest memory device that a type 17 record describes here, in bytes: its 16-bit field ends at 32 GiB.
const DEVICE_BYTES: u64 = 16 << 30;
/// First handles of the kinds of record of which there may be many, far enough apart never to meet.
const CPU_HANDLE: u16 = 0x0400;
const ARRAY_HANDLE: u16 = 0x1000;
const DEVICE_HANDLE: u16 = 0x1100;
const MAPPED_HANDLE: u16 = 0x9000;
/// Most memory devices that the handles leave room for.
const DEVICES: u64 = (MAPPED_HANDLE - DEVICE_HANDLE) as u64;

/// What the tables describe.
#[derive(Debug, Clone)]
pub struct SmbiosConfig {
    /// The machine's UUID, in the order of its text form.
    pub uuid: Option<[u8; 16]>,
    /// Name of the machine, for example `q35`.
    pub product: &'static str,
    /// Processor packages and, in each, cores and threads (of all its cores).
    pub sockets: u32,
    /// Cores in a package.
    pub cores: u32,
    /// Threads in a package.
    pub threads: u32,
    /// CPUID leaf 1: EAX and EDX, as the processor ID.
    pub processor_id: [u32; 2],
    /// RAM: (first address, length in bytes).
    pub ram: Vec<(u64, u64)>,
}

/// Tables and their entry point.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Smbios {
    /// The entry point, with the tables' address left zero.
    pub anchor: Vec<u8>,
    /// The records.
    pub tables: Vec<u8>,
}

/// Tables that cannot be placed.
#[derive(Debug, thiserror::Error)]
pub enum SmbiosError {
    /// They do not fit.
    #[error("SMBIOS tables need {need:#x} bytes, there are {have:#x}")]
    TooLong {
        /// Their length.
        need: u64,
        /// The room.
        have: u64,
    },
    /// There is no RAM where they are to go.
    #[error("SMBIOS tables cannot be written")]
    Memory(#[from] GuestMemoryError),
}

#[derive(Default)]
struct Records {
    bytes: Vec<u8>,
    count: u16,
    longest: u16,
}

/// One record in the making.
struct Record {
    kind: u8,
    handle: u16,
    body: Vec<u8>,
    strings: Vec<String>,
}

impl Record {
    fn new(kind: u8, handle: u16) -> Self {
        Self { kind, handle, body: Vec::new(), strings: Vec::new() }
    }

    fn bytes(mut self, bytes: &[u8]) -> Self {
        self.body.extend_from_slice(bytes);
        self
    }

    fn word(self, value: u16) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn dword(self, value: u32) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    fn qword(self, value: u64) -> Self {
        self.bytes(&value.to_le_bytes())
    }

    /// A reference to a string.
    fn text(mut self, text: &str) -> Self {
        self.strings.push(text.to_owned());
        let n = self.strings.len() as u8;
        self.bytes(&[n])
    }
}

impl Records {
    fn add(&mut self, record: &Record) {
        let start = self.bytes.len();
        self.bytes.extend([record.kind, record.body.len() as u8 + 4]);
        self.bytes.extend(record.handle.to_le_bytes());
        self.bytes.extend(&record.body);
        for text in &record.strings {
            self.bytes.extend(text.bytes().filter(|b| *b != 0));
            self.bytes.push(0);
        }
        if record.strings.is_empty() {
            self.bytes.push(0);
        }
        self.bytes.push(0);
        self.count += 1;
        self.longest = self.longest.max((self.bytes.len() - start) as u16);
    }
}

/// UUIDs are stored with their first three fields little-endian (section 7.2.1).
fn wire_uuid(text_order: [u8; 16]) -> [u8; 16] {
    let [a, b, c, d, e, f, g, h, rest @ ..] = text_order;
    let mut out = [d, c, b, a, f, e, h, g, 0, 0, 0, 0, 0, 0, 0, 0];
    out.iter_mut().skip(8).zip(rest).for_each(|(to, from)| *to = from);
    out
}

const VERSION: &str = env!("CARGO_PKG_VERSION");

fn platform(r: &mut Records, config: &SmbiosConfig) {
    // Type 0: characteristics "not supported", and that this is a virtual machine.
    r.add(
        &Record::new(0, 0)
            .text("Holdfast")
            .text(VERSION)
            .word(0xe800)
            .text("11/21/2026")
            .bytes(&[0])
            .qword(0x08)
            .bytes(&[0, 0x14, 0, 0, 0xff, 0xff]),
    );
    // Type 1: wakes up by its power switch. All ones: there is a UUID but it is not set.
    let uuid = config.uuid.map_or([0; 16], wire_uuid);
    r.add(
        &Record::new(1, 0x100)
            .text("Holdfast")
            .text(config.product)
            .text(VERSION)
            .bytes(&[0])
            .bytes(&uuid)
            .bytes(&[6, 0])
            .text("Virtual Machine"),
    );
    // Type 3: enclosure of unknown kind, in a safe state.
    r.add(
        &Record::new(3, 0x300)
            .text("Holdfast")
            .bytes(&[1, 0, 0, 0, 3, 3, 3, 2])
            .dword(0)
            .bytes(&[0, 0, 0, 0, 0]),
    );
}

fn processors(r: &mut Records, config: &SmbiosConfig) {
    for n in 0..config.sockets.clamp(1, 256) as u16 {
        let byte = |v: u32| v.min(0xff) as u8;
        let word = |v: u32| v.min(0xffff) as u16;
        let [eax, edx] = config.processor_id;
        r.add(
            &Record::new(4, CPU_HANDLE + n)
                .text(&format!("CPU {n}"))
                // A central processor of a family that needs no further word.
                .bytes(&[3, 1])
                .text("Holdfast")
                .dword(eax)
                .dword(edx)
                .bytes(&[0])
                // Voltage, clocks unknown; populated and enabled; upgrade "other".
                .bytes(&[0])
                .word(0)
                .word(0)
                .word(0)
                .bytes(&[0x41, 1])
                .word(0xffff)
                .word(0xffff)
                .word(0xffff)
                .bytes(&[0, 0, 0])
                .bytes(&[byte(config.cores), byte(config.cores), byte(config.threads)])
                // 64-bit capable; family again; the counts again, wider.
                .word(0x0004)
                .word(1)
                .word(word(config.cores))
                .word(word(config.cores))
                .word(word(config.threads)),
        );
    }
}

fn memory(r: &mut Records, config: &SmbiosConfig) {
    let total: u64 = config.ram.iter().map(|(_, len)| len).sum();
    let devices = total.div_ceil(DEVICE_BYTES).clamp(1, DEVICES);
    // Type 16: system memory on the board, multi-bit ECC; its size in KiB, or in bytes when too large.
    let kib = total / 1024;
    let (short, long) = if kib < 0x8000_0000 { (kib as u32, 0) } else { (0x8000_0000, total) };
    r.add(
        &Record::new(16, ARRAY_HANDLE)
            .bytes(&[1, 3, 6])
            .dword(short)
            .word(0xfffe)
            .word(devices as u16)
            .qword(long),
    );
    for n in 0..devices {
        let mib = total.saturating_sub(n * DEVICE_BYTES).min(DEVICE_BYTES) >> 20;
        r.add(
            &Record::new(17, DEVICE_HANDLE + n as u16)
                .word(ARRAY_HANDLE)
                .word(0xfffe)
                .word(0xffff)
                .word(0xffff)
                .word(mib as u16)
                // DIMM, no set.
                .bytes(&[9, 0])
                .text(&format!("DIMM {n}"))
                // No bank; type RAM; detail "other"; speed unknown.
                .bytes(&[0, 7])
                .word(2)
                .word(0)
                .text("Holdfast")
                .bytes(&[0, 0, 0, 0])
                .dword(0)
                .word(0)
                .word(0)
                .word(0)
                .word(0),
        );
    }
    for (n, (base, len)) in config.ram.iter().enumerate().take(0x1000) {
        // Type 19: addresses in KiB, or in bytes when they do not fit.
        let last = base + len.max(&1) - 1;
        let fits = last / 1024 < 0xffff_ffff;
        let (a, b) = if fits { ((base / 1024) as u32, (last / 1024) as u32) } else { (u32::MAX, u32::MAX) };
        let (wide_a, wide_b) = if fits { (0, 0) } else { (*base, last) };
        r.add(
            &Record::new(19, MAPPED_HANDLE + n as u16)
                .dword(a)
                .dword(b)
                .word(ARRAY_HANDLE)
                .bytes(&[1])
                .qword(wide_a)
                .qword(wide_b),
        );
    }
}

fn checksum(bytes: &mut [u8], at: usize) {
    let sum = bytes.iter().fold(0u8, |s, b| s.wrapping_add(*b));
    if let Some(byte) = bytes.get_mut(at) {
        *byte = byte.wrapping_sub(sum);
    }
}

/// The entry point for tables at `address` (section 5.2.1).
fn anchor(records: &Records, address: u32) -> Vec<u8> {
    let mut out = b"_SM_".to_vec();
    out.extend([0, ANCHOR_LEN, 2, 8]);
    out.extend(records.longest.to_le_bytes());
    out.extend([0; 6]);
    out.extend(b"_DMI_\0");
    out.extend((records.bytes.len() as u16).to_le_bytes());
    out.extend(address.to_le_bytes());
    out.extend(records.count.to_le_bytes());
    out.push(0x28);
    if let Some(inner) = out.get_mut(16..) {
        checksum(inner, 5);
    }
    checksum(&mut out, 4);
    out
}

fn records(config: &SmbiosConfig) -> Records {
    let mut r = Records::default();
    platform(&mut r, config);
    processors(&mut r, config);
    memory(&mut r, config);
    // Type 32: no boot errors. Type 127: the end.
    r.add(&Record::new(32, 0x2000).bytes(&[0; 7]));
    r.add(&Record::new(127, 0x7f00));
    r
}

/// Makes the tables and an entry point without their address, for firmware.
pub fn build(config: &SmbiosConfig) -> Smbios {
    let r = records(config);
    Smbios { anchor: anchor(&r, 0), tables: r.bytes }
}

/// Writes the entry point at `base` (16-byte aligned, where kernels look: 0xf0000 to 0xfffff) and
/// the tables behind it.
///
/// # Errors
/// [`SmbiosError`] if they need more than `room` bytes or there is no RAM.
pub fn place(config: &SmbiosConfig, memory: &GuestMemory, base: u32, room: u64) -> Result<(), SmbiosError> {
    let r = records(config);
    let at = base + u32::from(ANCHOR_LEN) + 1;
    let need = u64::from(at - base) + r.bytes.len() as u64;
    // The entry point counts the tables' bytes in 16 bits.
    if need > room || r.bytes.len() > 0xffff {
        return Err(SmbiosError::TooLong { need, have: room.min(0xffff) });
    }
    memory.write_slice(&anchor(&r, at), GuestAddress(base.into()))?;
    memory.write_slice(&r.bytes, GuestAddress(at.into()))?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    fn config(ram: Vec<(u64, u64)>) -> SmbiosConfig {
        SmbiosConfig {
            uuid: Some(*b"\x00\x11\x22\x33\x44\x55\x66\x77\x88\x99\xaa\xbb\xcc\xdd\xee\xff"),
            product: "q35",
            sockets: 2,
            cores: 4,
            threads: 8,
            processor_id: [0x306c1, 0x178b_fbff],
            ram,
        }
    }

    /// (type, handle, formatted area) of every record.
    fn parse(mut bytes: &[u8]) -> Vec<(u8, u16, Vec<u8>)> {
        let mut out = Vec::new();
        while !bytes.is_empty() {
            let len = usize::from(bytes[1]);
            out.push((bytes[0], u16::from_le_bytes([bytes[2], bytes[3]]), bytes[..len].to_vec()));
            let strings = bytes[len..].windows(2).position(|w| w == [0, 0]).expect("terminated");
            bytes = &bytes[len + strings + 2..];
        }
        out
    }

    #[test]
    fn records_have_the_lengths_of_their_version() {
        let s = build(&config(vec![(0, 2 << 30), (4 << 30, 1 << 30)]));
        let lens: Vec<_> = parse(&s.tables).iter().map(|r| (r.0, r.2.len())).collect();
        let expected = [
            (0, 24),
            (1, 27),
            (3, 22),
            (4, 48),
            (4, 48),
            (16, 23),
            (17, 40),
            (19, 31),
            (19, 31),
            (32, 11),
            (127, 4),
        ];
        assert_eq!(lens, expected);
        let system = &parse(&s.tables)[1].2;
        assert_eq!(system[8..16], [0x33, 0x22, 0x11, 0x00, 0x55, 0x44, 0x77, 0x66]);
    }

    #[test]
    fn the_entry_point_sums_to_zero_and_counts() {
        let s = build(&config(vec![(0, 1 << 30)]));
        let sum = |b: &[u8]| b.iter().fold(0u8, |s, b| s.wrapping_add(*b));
        assert_eq!((s.anchor.len(), sum(&s.anchor), sum(&s.anchor[16..])), (31, 0, 0));
        assert_eq!(usize::from(u16::from_le_bytes([s.anchor[0x16], s.anchor[0x17]])), s.tables.len());
        assert_eq!(usize::from(s.anchor[0x1c]), parse(&s.tables).len());
    }

    #[test]
    fn handles_never_meet_however_much_ram_there_is() {
        let s = build(&config(vec![(0, 2 << 30), (4 << 30, 9 << 40)]));
        let records = parse(&s.tables);
        let handles: HashSet<_> = records.iter().map(|r| r.1).collect();
        assert_eq!(handles.len(), records.len());
        let array = records.iter().find(|r| r.0 == 16).expect("array");
        assert_eq!(array.2[7..11], 0x8000_0000u32.to_le_bytes());
        assert_eq!(records.iter().filter(|r| r.0 == 17).count(), 577);
    }

    #[test]
    fn tables_are_placed_or_refused() {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), 2 << 20)]).expect("memory");
        place(&config(vec![(0, 2 << 20)]), &memory, 0xf_0000, 0x1_0000).expect("fits");
        let mut address = [0; 4];
        memory.read_slice(&mut address, GuestAddress(0xf_0018)).expect("RAM");
        assert_eq!(u32::from_le_bytes(address), 0xf_0020);
        let huge = config(vec![(0, 90 << 40)]);
        assert!(matches!(place(&huge, &memory, 0xf_0000, 0x1_0000), Err(SmbiosError::TooLong { .. })));
    }
}
