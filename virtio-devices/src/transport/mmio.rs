//! Virtio over MMIO, version 2 (virtio 1.2 section 4.2).

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, IoEvents, IrqLine, StateError,
};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::common::{Common, Flags};
use crate::device::{Interrupt, VirtioDevice};

/// Bytes of the register window: 0x100 of registers and as many of config space.
pub const WINDOW: u64 = 0x200;

const MAGIC: u32 = 0x7472_6976;
const VERSION: u32 = 2;
/// "HDFT": free for hypervisors to choose.
const VENDOR: u32 = 0x5446_4448;
const CONFIG: u64 = 0x100;
const QUEUE_NOTIFY: u64 = 0x50;

const ISR_QUEUE: u32 = 1;
const ISR_CONFIG: u32 = 2;

/// Kind and newest version of saved states.
const KIND: &str = "virtio-mmio";
const STATE_VERSION: u32 = 1;

/// The one interrupt: its causes and its wire, which change together.
#[derive(Debug)]
struct MmioInterrupt {
    flags: Arc<Flags>,
    causes: Mutex<u32>,
    line: IrqLine,
}

impl MmioInterrupt {
    /// The lock is held while the line is driven, so that causes and line never disagree; interrupt
    /// controllers do not call back.
    fn update(&self, change: impl FnOnce(u32) -> u32) {
        let mut causes = self.causes.lock();
        *causes = change(*causes);
        self.line.set(*causes != 0);
    }
}

impl Interrupt for MmioInterrupt {
    fn queue(&self, _queue: u16) {
        self.update(|c| c | ISR_QUEUE);
    }

    fn config_changed(&self) {
        self.flags.generation.fetch_add(1, Ordering::AcqRel);
        self.update(|c| c | ISR_CONFIG);
    }

    fn needs_reset(&self) {
        self.flags.needs_reset.store(true, Ordering::Release);
        self.config_changed();
    }
}

/// What is saved beside the common part.
#[derive(Debug, Serialize, Deserialize)]
struct MmioState {
    causes: u32,
}

/// A device in a virtio-mmio window.
#[derive(Debug)]
pub struct MmioTransport {
    common: Common,
    interrupt: Arc<MmioInterrupt>,
}

impl MmioTransport {
    /// Plugs `device` into the window at `base`, interrupting through `line`.
    ///
    /// # Errors
    /// [`BuildError`] if the window is taken or the host has no file descriptors left.
    pub fn plug(
        id: &str,
        device: Arc<dyn VirtioDevice>,
        base: u64,
        line: IrqLine,
        context: &BuildContext,
    ) -> Result<Arc<Self>, BuildError> {
        if device.shared_memory().is_some() {
            let reason = "its back end has shared memory, which virtio-mmio has no place for: use virtio-pci";
            return Err(BuildError::Config { id: id.to_owned(), reason: reason.to_owned() });
        }
        let flags = Arc::new(Flags::default());
        let interrupt = Arc::new(MmioInterrupt { flags: Arc::clone(&flags), causes: Mutex::new(0), line });
        let dynamic = Arc::clone(&interrupt) as Arc<dyn Interrupt>;
        let host = |what: &str, source| BuildError::Host { id: id.to_owned(), what: what.to_owned(), source };
        let common = Common::new(id, device, context, dynamic, flags)
            .map_err(|e| host("cannot make an eventfd", e))?;
        let this = Arc::new(Self { common, interrupt });
        let name = format!("virtio-mmio-{id}");
        context
            .mmio
            .attach(base, WINDOW, &name, Arc::clone(&this) as Arc<dyn BusDevice>)
            .map_err(|source| BuildError::Bus { id: id.to_owned(), source })?;
        for (n, kick) in this.common.kicks().iter().enumerate() {
            context
                .mmio
                .register(kick, base + QUEUE_NOTIFY, 4, Some(n as u64))
                .map_err(|e| host("cannot register an ioeventfd", e))?;
        }
        Ok(this)
    }

    fn read_register(&self, offset: u64) -> u32 {
        let common = &self.common;
        match offset {
            0x000 => MAGIC,
            0x004 => VERSION,
            0x008 => common.device.device_type(),
            0x00c => VENDOR,
            0x010 => common.device_features(),
            0x020 => common.driver_features(),
            0x034 => common.with(|r| r.queue().map_or(0, |q| u32::from(q.max_size))),
            0x038 => common.with(|r| r.queue().map_or(0, |q| u32::from(q.size))),
            0x044 => common.with(|r| r.queue().map_or(0, |q| u32::from(q.ready))),
            0x060 => *self.interrupt.causes.lock(),
            0x070 => u32::from(common.status()),
            // No shared memory regions: length and base read as all ones (section 4.2.2).
            0x0b0..=0x0bc => u32::MAX,
            0x0fc => common.flags.generation.load(Ordering::Acquire),
            _ => 0,
        }
    }

    fn write_register(&self, offset: u64, value: u32) {
        let common = &self.common;
        let low = |old: u64| old & !0xffff_ffff | u64::from(value);
        let high = |old: u64| old & 0xffff_ffff | u64::from(value) << 32;
        match offset {
            0x014 => common.select(|r| r.device_select = value),
            0x020 => common.set_driver_features(value),
            0x024 => common.select(|r| r.driver_select = value),
            // Numbers that do not fit name no queue.
            0x030 => common.select(|r| r.queue_select = u16::try_from(value).unwrap_or(u16::MAX)),
            0x038 => common.set_queue(|q| {
                if value.is_power_of_two() && value <= u32::from(q.max_size) {
                    q.size = value as u16;
                }
            }),
            0x044 => common.set_queue(|q| q.ready = value & 1 != 0),
            QUEUE_NOTIFY => common.kick(value & 0xffff),
            0x064 => self.interrupt.update(|c| c & !value),
            0x070 => self.set_status(value as u8),
            0x080 => common.set_queue(|q| q.desc = low(q.desc)),
            0x084 => common.set_queue(|q| q.desc = high(q.desc)),
            0x090 => common.set_queue(|q| q.avail = low(q.avail)),
            0x094 => common.set_queue(|q| q.avail = high(q.avail)),
            0x0a0 => common.set_queue(|q| q.used = low(q.used)),
            0x0a4 => common.set_queue(|q| q.used = high(q.used)),
            _ => {}
        }
    }

    fn set_status(&self, value: u8) {
        self.common.set_status(value);
        if value == 0 {
            self.interrupt.update(|_| 0);
        }
    }
}

impl BusDevice for MmioTransport {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0);
        if access.offset >= CONFIG {
            self.common.device.read_config(access.offset - CONFIG, data);
        } else if access.offset.is_multiple_of(4)
            && let Some(out) = data.get_mut(..4)
        {
            out.copy_from_slice(&self.read_register(access.offset).to_le_bytes());
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if access.offset >= CONFIG {
            self.common.device.write_config(access.offset - CONFIG, data);
        } else if let (0, Ok(value)) = (access.offset % 4, <[u8; 4]>::try_from(data)) {
            self.write_register(access.offset, u32::from_le_bytes(value));
        }
    }
}

impl Device for MmioTransport {
    fn id(&self) -> &str {
        &self.common.id
    }

    fn reset(&self) {
        self.set_status(0);
    }

    fn pause(&self) {
        self.common.pause();
    }

    fn resume(&self) {
        self.common.resume();
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        let causes = *self.interrupt.causes.lock();
        self.common.save(KIND, STATE_VERSION, MmioState { causes })
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let transport: MmioState = self.common.restore(KIND, STATE_VERSION, state)?;
        self.interrupt.update(|_| transport.causes & (ISR_QUEUE | ISR_CONFIG));
        Ok(())
    }

    fn announce(&self) {
        self.common.device.announce();
    }

    fn counters(&self) -> BTreeMap<String, u64> {
        self.common.device.counters()
    }
}
