//! fw_cfg through both front ends, against a model: selector, data, DMA, files that the guest may write.

use std::collections::BTreeMap;
use std::sync::Arc;

use arbitrary::{Arbitrary, Unstructured};
use holdfast_device::{Access, BusDevice, Device};
use holdfast_devices::fw_cfg::{FwCfg, key};
use holdfast_memory::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

const RAM: u64 = 1 << 16;
/// Most operations of a run.
const MAX_OPS: usize = 64;

#[derive(Debug)]
enum Op {
    Select(u8, bool),
    Data(u8),
    Dma { at: u16, control: u8, key: u8, length: u32, target: u16 },
    Registers { port: bool, write: bool, at: u8, value: u64, size: u8 },
    Poke { at: u16, bytes: [u8; 4] },
    AddFile { name: u8, long: bool, writable: bool, data: Vec<u8> },
    SetFile { name: u8, data: Vec<u8> },
    Saved,
    Reset,
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? % 9 {
            0 => Self::Select(u.arbitrary()?, u.arbitrary()?),
            1 => Self::Data(u.arbitrary()?),
            2 => Self::Dma { at: u.arbitrary()?, control: u.arbitrary()?, key: u.arbitrary()?, length: u.arbitrary()?, target: u.arbitrary()? },
            3 => Self::Registers { port: u.arbitrary()?, write: u.arbitrary()?, at: u.arbitrary()?, value: u.arbitrary()?, size: u.arbitrary()? },
            4 => Self::Poke { at: u.arbitrary()?, bytes: u.arbitrary()? },
            5 => Self::AddFile { name: u.arbitrary()?, long: u.arbitrary()?, writable: u.arbitrary()?, data: u.arbitrary()? },
            6 => Self::SetFile { name: u.arbitrary()?, data: u.arbitrary()? },
            7 => Self::Saved,
            _ => Self::Reset,
        })
    }
}

/// What the device must hold.
#[derive(Default)]
struct Model {
    items: BTreeMap<u16, (Vec<u8>, bool)>,
    names: BTreeMap<String, u16>,
    selected: u16,
    offset: u32,
}

struct Rig {
    memory: GuestMemory,
    device: Arc<FwCfg>,
    model: Model,
}

fn key_of(n: u8) -> u16 {
    // Well-known items, the first files, and some that are not there.
    [0, 1, 5, key::FILE_DIR, 0x20, 0x21, 0x22, 0x23, 0x7fff, u16::from(n) << 8 | 0xff][usize::from(n % 10)]
}

fn access(offset: u64) -> Access {
    Access { offset, address: 0x510 + offset, vcpu: Some(0) }
}

impl Rig {
    fn new() -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM as usize)]).expect("RAM");
        let device = FwCfg::new(memory.clone());
        let mut model = Model::default();
        model.items.insert(0, (b"QEMU".to_vec(), false));
        model.items.insert(1, (3u32.to_le_bytes().to_vec(), false));
        device.add_item(5, vec![2, 0]);
        model.items.insert(5, (vec![2, 0], false));
        Self { memory, device, model }
    }

    fn select(&mut self, key: u16) {
        (self.model.selected, self.model.offset) = (key & !0x4000, 0);
    }

    /// What comes next of the selected item, if the model knows it.
    fn expected(&mut self, len: usize) -> Option<Vec<u8>> {
        let start = self.model.offset as usize;
        self.model.offset = self.model.offset.saturating_add(len as u32);
        if self.model.selected == key::FILE_DIR {
            return None;
        }
        let item = self.model.items.get(&self.model.selected).map_or(&[][..], |i| &i.0);
        let byte = |n| start.checked_add(n).and_then(|at| item.get(at)).copied().unwrap_or(0);
        Some((0..len).map(byte).collect())
    }

    fn dma(&mut self, at: u16, control: u32, length: u32, target: u16) {
        let mut header = control.to_be_bytes().to_vec();
        header.extend(length.to_be_bytes());
        header.extend(u64::from(target).to_be_bytes());
        let fits = self.memory.write_slice(&header, GuestAddress(at.into())).is_ok();
        if fits && control & 8 != 0 {
            self.select((control >> 16) as u16);
        }
        self.device.port_io().write(access(4), &[0; 4]);
        self.device.port_io().write(access(8), &u32::from(at).to_be_bytes());
        // A transfer over its own descriptor ends as it ends.
        let apart = u64::from(target) + u64::from(length) <= at.into() || u64::from(at) + 16 <= target.into();
        if !fits || !apart {
            return self.follow();
        }
        let status = self.memory.read_obj::<u32>(GuestAddress(at.into())).map(u32::from_be).expect("in RAM");
        assert!(status <= 1, "status {status:#x}");
        let inside = u64::from(target) + u64::from(length) <= RAM;
        if control & 2 != 0 && inside {
            assert_eq!(status, 0, "a read into RAM");
            if let Some(wanted) = self.expected(length as usize) {
                let mut found = vec![0; length as usize];
                self.memory.read_slice(&mut found, GuestAddress(target.into())).expect("in RAM");
                assert_eq!(found, wanted);
            }
        } else {
            self.follow();
        }
    }

    /// Takes over what the device says, where the model does not follow.
    fn follow(&mut self) {
        let state = self.device.save().expect("every state can be saved");
        let number = |name: &str| state.data[name].as_u64().expect("a number");
        (self.model.selected, self.model.offset) = (number("selected") as u16, number("offset") as u32);
        for (name, key) in &self.model.names {
            let data = self.device.file(name).expect("it was added");
            let (old, writable) = self.model.items.get_mut(key).expect("it was added");
            assert_eq!(old.len(), data.len(), "no guest changes a size");
            assert!(*writable || *old == data, "no guest writes what is read-only");
            *old = data;
        }
    }

    fn step(&mut self, op: Op) {
        match op {
            Op::Select(n, port) => {
                let key = key_of(n);
                match port {
                    true => self.device.port_io().write(access(0), &key.to_le_bytes()),
                    false => self.device.mmio().write(access(8), &key.to_be_bytes()),
                }
                self.select(key);
            }
            Op::Data(size) => {
                let mut data = [0xaa; 8];
                let n = usize::from(size % 8) + 1;
                if size & 0x80 != 0 {
                    self.device.port_io().read(access(1), &mut data[..1]);
                    assert!(self.expected(1).is_none_or(|e| e == data[..1]));
                } else {
                    self.device.mmio().read(access(0), &mut data[..n]);
                    assert!(self.expected(n).is_none_or(|e| e == data[..n]));
                }
            }
            Op::Dma { at, control, key, length, target } => {
                let length = if length >> 24 == 0xff { length } else { length % 0x4000 };
                self.dma(at, u32::from(key_of(key)) << 16 | u32::from(control), length, target);
            }
            Op::Registers { port, write, at, value, size } => {
                let (at, mut bytes) = (access(u64::from(at % 28)), value.to_le_bytes());
                let size = 1 << (size % 4);
                match (port, write) {
                    (true, true) => self.device.port_io().write(at, &bytes[..size]),
                    (true, false) => self.device.port_io().read(at, &mut bytes[..size]),
                    (false, true) => self.device.mmio().write(at, &bytes[..size]),
                    (false, false) => self.device.mmio().read(at, &mut bytes[..size]),
                }
                self.follow();
            }
            Op::Poke { at, bytes } => _ = self.memory.write_slice(&bytes, GuestAddress(at.into())),
            Op::AddFile { name, long, writable, data } => self.add(name, long, writable, data),
            Op::SetFile { name, data } => {
                let name = format!("opt/{name}");
                let there = self.model.names.get(&name).copied();
                assert_eq!(self.device.set_file(&name, data.clone()), there.is_some());
                if let Some(item) = there.and_then(|key| self.model.items.get_mut(&key)) {
                    item.0 = data;
                }
            }
            Op::Saved => {
                let state = self.device.save().expect("every state can be saved");
                self.device.restore(&state).expect("a device takes its own state");
            }
            Op::Reset => {
                self.device.reset();
                self.select(0);
            }
        }
    }

    fn add(&mut self, name: u8, long: bool, writable: bool, data: Vec<u8>) {
        let name = if long { "x".repeat(name.into()) } else { format!("opt/{}", name % 8) };
        let added = match writable {
            true => self.device.add_writable_file(&name, data.clone()),
            false => self.device.add_file(&name, data.clone()),
        };
        let possible = !name.is_empty() && name.len() < 56 && !self.model.names.contains_key(&name);
        assert_eq!(added.is_ok(), possible, "{name}");
        if let Ok(key) = added {
            self.model.items.insert(key, (data, writable));
            self.model.names.insert(name, key);
        }
    }
}

/// Runs one input.
pub fn run(data: &[u8]) {
    let mut rig = Rig::new();
    let mut input = Unstructured::new(data);
    for _ in 0..MAX_OPS {
        if input.is_empty() {
            break;
        }
        let Ok(op) = Op::arbitrary(&mut input) else { break };
        rig.step(op);
    }
    rig.follow();
}
