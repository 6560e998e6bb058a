//! Register-level tests of both front ends.

use holdfast_device::{Access, BusDevice};

use super::*;

fn device() -> (Arc<FwCfg>, GuestMemory) {
    let memory = GuestMemory::from_ranges(&[(GuestAddress(0x1000), 0x4000)]).expect("RAM");
    (FwCfg::new(memory.clone()), memory)
}

fn at(offset: u64) -> Access {
    Access { offset, address: offset, vcpu: Some(0) }
}

fn port_read(device: &Arc<FwCfg>, key: u16, len: usize) -> Vec<u8> {
    let ports = device.port_io();
    ports.write(at(0), &key.to_le_bytes());
    let byte = |_| {
        let mut b = [0];
        ports.read(at(1), &mut b);
        b[0]
    };
    (0..len).map(byte).collect()
}

/// A DMA access: control, length, address; returns the control word afterwards.
fn dma_access(device: &Arc<FwCfg>, memory: &GuestMemory, access: (u32, u32, u64)) -> u32 {
    let mut header = [access.0.to_be_bytes(), access.1.to_be_bytes()].concat();
    header.extend(access.2.to_be_bytes());
    memory.write_slice(&header, GuestAddress(0x1000)).expect("RAM");
    device.mmio().write(at(16), &0x1000u64.to_be_bytes());
    u32::from_be_bytes(memory.read_obj(GuestAddress(0x1000)).expect("RAM"))
}

#[test]
fn items_and_directory_read_through_the_ports() {
    let (device, _) = device();
    assert_eq!(port_read(&device, key::SIGNATURE, 6), b"QEMU\0\0");
    assert_eq!(port_read(&device, key::ID, 4), [3, 0, 0, 0]);
    let first = device.add_file("etc/e820", vec![1, 2, 3]).expect("room");
    let second = device.add_file("etc/acpi/rsdp", vec![4; 20]).expect("room");
    assert_eq!((first, second), (0x20, 0x21));
    let dir = port_read(&device, key::FILE_DIR, 4 + 2 * 64);
    assert_eq!(dir[..12], [0, 0, 0, 2, 0, 0, 0, 3, 0, 0x20, 0, 0]);
    assert!(dir[12..].starts_with(b"etc/e820\0"));
    assert_eq!(dir[68..76], [0, 0, 0, 20, 0, 0x21, 0, 0]);
    assert_eq!(port_read(&device, first, 5), [1, 2, 3, 0, 0]);
    assert_eq!(port_read(&device, 0x7777, 2), [0, 0], "no such item");
    assert!(device.set_file("etc/e820", vec![9; 4]) && !device.set_file("none", vec![]));
    assert_eq!(port_read(&device, key::FILE_DIR, 8)[4..], [0, 0, 0, 4]);
    assert_eq!(device.add_file("etc/e820", vec![]), Err(FwCfgError::Name("etc/e820".into())));
    assert!(device.add_file("", vec![]).is_err() && device.add_file(&"x".repeat(56), vec![]).is_err());
    assert!(device.add_file(&"x".repeat(55), vec![]).is_ok());
}

#[test]
fn memory_front_end_is_big_endian_and_reads_wide() {
    let (device, _) = device();
    device.add_file("file", (1..=20).collect()).expect("room");
    let mmio = device.mmio();
    mmio.write(at(8), &0x20u16.to_be_bytes());
    let mut wide = [0; 8];
    mmio.read(at(0), &mut wide);
    assert_eq!(wide, [1, 2, 3, 4, 5, 6, 7, 8]);
    let mut byte = [0];
    mmio.read(at(0), &mut byte);
    assert_eq!(byte, [9]);
    mmio.read(at(16), &mut wide);
    assert_eq!(&wide, b"QEMU CFG");
}

#[test]
fn dma_reads_skips_selects_and_writes() {
    let (device, memory) = device();
    let key = device.add_file("long", (0..=255).cycle().take(6000).collect()).expect("room");
    let select = u32::from(key) << 16 | dma::SELECT;
    assert_eq!(dma_access(&device, &memory, (select | dma::SKIP, 10, 0)), 0);
    assert_eq!(dma_access(&device, &memory, (dma::READ, 5992, 0x2000)), 0);
    assert_eq!(memory.read_obj::<[u8; 2]>(GuestAddress(0x2000)).expect("RAM"), [10, 11]);
    assert_eq!(memory.read_obj::<[u8; 3]>(GuestAddress(0x2000 + 5989)).expect("RAM"), [111, 0, 0]);
    assert_eq!(dma_access(&device, &memory, (select | dma::WRITE, 4, 0x2000)), dma::ERROR, "read-only");
    let key = device.add_writable_file("addr", vec![0; 8]).expect("room");
    let select = u32::from(key) << 16 | dma::SELECT;
    assert_eq!(dma_access(&device, &memory, (select | dma::WRITE, 9, 0x2000)), dma::ERROR, "too long");
    assert_eq!(dma_access(&device, &memory, (select | dma::WRITE, 2, 0x2000)), 0);
    assert_eq!(device.file("addr").expect("there")[..3], [10, 11, 0]);
}

#[test]
fn dma_outside_of_ram_fails_without_harm() {
    let (device, memory) = device();
    let ports = device.port_io();
    for target in [0, 0x4fff, 0x5000, u64::MAX - 3, u64::MAX] {
        assert_eq!(dma_access(&device, &memory, (dma::READ, 0x4001, target)), dma::ERROR, "{target:#x}");
    }
    assert_eq!(dma_access(&device, &memory, (dma::SKIP, u32::MAX, 0)), 0);
    assert_eq!(dma_access(&device, &memory, (dma::SKIP, u32::MAX, 0)), 0);
    assert_eq!(dma_access(&device, &memory, (dma::READ, 4, 0x2000)), 0);
    ports.write(at(8), &0xffff_fff8u32.to_be_bytes());
    ports.write(at(4), &u32::MAX.to_be_bytes());
    ports.write(at(8), &u32::MAX.to_be_bytes());
}

#[test]
fn state_survives_with_what_the_guest_wrote() {
    let (device, memory) = device();
    let key = device.add_writable_file("addr", vec![0; 4]).expect("room");
    memory.write_slice(&[7; 4], GuestAddress(0x2000)).expect("RAM");
    dma_access(&device, &memory, (u32::from(key) << 16 | dma::SELECT | dma::WRITE, 2, 0x2000));
    let state = device.save().expect("state");
    let other = FwCfg::new(memory.clone());
    assert!(other.restore(&state).is_err(), "the file is missing");
    other.add_writable_file("addr", vec![0; 4]).expect("room");
    other.restore(&state).expect("same files");
    assert_eq!(other.file("addr").expect("there"), [7, 7, 0, 0]);
    assert_eq!(dma_access(&other, &memory, (dma::WRITE, 2, 0x2000)), 0, "offset 2 is current");
    assert_eq!(other.file("addr").expect("there"), [7; 4]);
    other.reset();
    let mut b = [0];
    other.port_io().read(at(1), &mut b);
    assert_eq!(b, [b'Q']);
}

#[test]
fn odd_accesses_do_no_harm() {
    let (device, _) = device();
    let fronts: [Arc<dyn BusDevice>; 2] = [device.port_io(), device.mmio()];
    for front in fronts {
        for offset in (0..32).chain([u64::MAX]) {
            for len in [0, 1, 2, 3, 4, 8, 64] {
                let mut data = vec![0xff; len];
                front.write(at(offset), &data);
                front.read(at(offset), &mut data);
            }
        }
    }
}
