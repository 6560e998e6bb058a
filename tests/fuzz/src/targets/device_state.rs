//! Saved states that were cut or altered: each device of both machines takes them or refuses them in words;
//! what it takes it runs on, and saves again.

use std::sync::{Arc, Mutex, OnceLock};

use arbitrary::{Arbitrary, Unstructured};
use holdfast_device::{Device, DeviceState};
use holdfast_machines::VirtioSlot;
use holdfast_machines::q35::Q35Module;
use holdfast_machines::virt::VirtModule;
use holdfast_virtio::console::{Console, PortArgs};
use holdfast_virtio::{Slot, plug};
use serde_json::{Number, Value};

use super::pci_config::machine;
use crate::access::steps;
use crate::rig::Rig;

/// Most changes to one state.
const MAX_EDITS: usize = 6;

#[derive(Debug)]
enum Edit {
    Number(u64),
    Near(i8),
    Negative(i64),
    Fraction(f64),
    Text(String),
    Flag(bool),
    Null,
    Remove,
    /// A list with so many more of its last element, or an object's value under another name.
    Repeat(u8),
    /// Another value of the same state.
    Copy(u16),
    Cut(u8),
}

impl<'a> Arbitrary<'a> for Edit {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? % 11 {
            0 => Self::Number(u.arbitrary()?),
            1 => Self::Near(u.arbitrary()?),
            2 => Self::Negative(u.arbitrary()?),
            3 => Self::Fraction(u.arbitrary()?),
            4 => Self::Text(u.arbitrary()?),
            5 => Self::Flag(u.arbitrary()?),
            6 => Self::Null,
            7 => Self::Remove,
            8 => Self::Repeat(u.arbitrary()?),
            9 => Self::Copy(u.arbitrary()?),
            _ => Self::Cut(u.arbitrary()?),
        })
    }
}

struct Machines {
    rigs: Vec<Rig>,
    /// Device, its rig, and its state as it was built.
    devices: Vec<(Arc<dyn Device>, usize, DeviceState)>,
}

static MACHINES: OnceLock<Mutex<Machines>> = OnceLock::new();

fn build() -> Mutex<Machines> {
    let mut rigs = vec![machine(&Q35Module), machine(&VirtModule)];
    for rig in &mut rigs {
        let port = |name: Option<String>| PortArgs {
            is_console: name.is_none(),
            name,
            backend: Arc::new(holdfast_devices::chardev::Null),
        };
        let console = Console::new("_console", vec![port(None), port(Some("port".into()))], &rig.context);
        let bus = rig.machine.pci_bus().expect("a PCI bus");
        let slot = Slot::Pci { bus, device: Some(3) };
        let console = console.expect("a console");
        rig.devices.push(plug("_console", console, slot, &rig.context).expect("plugged"));
        let [rng, _, disk] = super::virtqueue::devices(&rig.context);
        let bus = rig.machine.pci_bus().expect("a PCI bus");
        let slot = Slot::Pci { bus, device: Some(4) };
        rig.devices.push(plug("_disk", disk, slot, &rig.context).expect("plugged"));
        if let Some(VirtioSlot::Mmio { base, irq }) = rig.machine.take_mmio_slot() {
            let slot = Slot::Mmio { base, irq };
            rig.devices.push(plug("_rng_mmio", rng, slot, &rig.context).expect("plugged"));
        }
    }
    let mut devices = Vec::new();
    for (n, rig) in rigs.iter().enumerate() {
        for device in &rig.devices {
            devices.push((Arc::clone(device), n, device.save().expect("every state can be saved")));
        }
    }
    Mutex::new(Machines { rigs, devices })
}

/// How many values there are.
fn count(value: &Value) -> usize {
    1 + match value {
        Value::Array(list) => list.iter().map(count).sum(),
        Value::Object(map) => map.values().map(count).sum(),
        _ => 0,
    }
}

/// The `n`th value.
fn nth<'a>(value: &'a mut Value, n: &mut usize) -> Option<&'a mut Value> {
    if *n == 0 {
        return Some(value);
    }
    *n -= 1;
    match value {
        Value::Array(list) => list.iter_mut().find_map(|v| nth(v, n)),
        Value::Object(map) => map.values_mut().find_map(|v| nth(v, n)),
        _ => None,
    }
}

fn apply(state: &mut Value, at: u16, edit: Edit) {
    let total = count(state);
    let copy = match edit {
        Edit::Copy(from) => nth(state, &mut (usize::from(from) % total)).cloned(),
        _ => None,
    };
    let Some(value) = nth(state, &mut (usize::from(at) % total)) else { return };
    match edit {
        Edit::Number(n) => *value = n.into(),
        Edit::Near(by) => *value = value.as_u64().unwrap_or(0).wrapping_add_signed(by.into()).into(),
        Edit::Negative(n) => *value = n.into(),
        Edit::Fraction(f) => *value = Number::from_f64(f).map_or(Value::Null, Value::Number),
        Edit::Text(text) => *value = text.into(),
        Edit::Flag(flag) => *value = flag.into(),
        Edit::Null => *value = Value::Null,
        Edit::Copy(_) => *value = copy.unwrap_or(Value::Null),
        Edit::Remove | Edit::Cut(_) | Edit::Repeat(_) => resize(value, &edit),
    }
}

fn resize(value: &mut Value, edit: &Edit) {
    match (value, edit) {
        (Value::Array(list), Edit::Cut(n)) => list.truncate((*n).into()),
        (Value::Array(list), Edit::Remove) => _ = list.pop(),
        (Value::Array(list), Edit::Repeat(n)) => {
            let last = list.last().cloned().unwrap_or(0.into());
            list.extend(std::iter::repeat_n(last, (*n).into()));
        }
        (Value::Object(map), Edit::Cut(n)) => {
            let name = map.keys().nth(usize::from(*n) % map.len().max(1)).cloned();
            _ = name.and_then(|name| map.remove(&name));
        }
        (Value::Object(map), Edit::Remove) => map.clear(),
        (Value::Object(map), Edit::Repeat(n)) => {
            if let Some(value) = map.values().next().cloned() {
                map.insert(n.to_string(), value);
            }
        }
        (value, _) => *value = Value::Null,
    }
}

/// Reads and writes the machine, and lets time pass.
fn live_on(rig: &Rig, data: &[u8]) {
    rig.advance(2_000_000_000);
    for step in steps(data).take(48) {
        let bus = if step.what & 8 == 0 { &rig.context.mmio } else { &rig.context.pio };
        let windows = bus.windows();
        let Some(window) = windows.get(step.window % windows.len().max(1)) else { continue };
        let address = window.base + step.offset % window.len;
        match step.what & 7 {
            0..=2 => _ = bus.write(Some(0), address, &step.value[..step.size]),
            3..=5 => _ = bus.read(Some(0), address, &mut [0; 8][..step.size]),
            _ => rig.advance(u64::from(u32::from_le_bytes([step.value[0], step.value[1], step.value[2], 0]))),
        }
    }
}

/// Runs one input: a device, changes to its state, then a life with it.
pub fn run(data: &[u8]) {
    let machines = MACHINES.get_or_init(build).lock().expect("no run has failed");
    let mut input = Unstructured::new(data);
    let Ok(which) = u16::arbitrary(&mut input) else { return };
    let (device, rig, fresh) = &machines.devices[usize::from(which) % machines.devices.len()];
    let rig = &machines.rigs[*rig];
    let mut state = fresh.clone();
    for _ in 0..input.int_in_range(1..=MAX_EDITS).unwrap_or(1) {
        let Ok((at, edit)) = <(u16, Edit)>::arbitrary(&mut input) else { break };
        apply(&mut state.data, at, edit);
    }
    rig.context.clock.pause();
    device.pause();
    match device.restore(&state) {
        Ok(()) => {
            device.resume();
            rig.context.clock.resume();
            rig.context.timers.clock_changed();
            live_on(rig, input.take_rest());
            rig.context.clock.pause();
            device.pause();
            let again = device.save().expect("every state can be saved");
            device.restore(&again).expect("a device takes its own state");
        }
        Err(error) => assert!(!error.to_string().is_empty()),
    }
    for (device, of, fresh) in &machines.devices {
        if std::ptr::eq(rig, &raw const machines.rigs[*of]) {
            device.pause();
            device.restore(fresh).expect("a device takes its own state");
            device.resume();
            device.reset();
        }
    }
    rig.reset();
}
