//! The platform-level interrupt controller (RISC-V PLIC specification 1.0.0).

use std::sync::Arc;

use holdfast_device::{Access, BusDevice, CpuLines, Device, DeviceState, IrqSink, StateError};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

use super::pin;

const PENDING: u64 = 0x1000;
const ENABLE: u64 = 0x2000;
const ENABLE_STRIDE: u64 = 0x80;
const CONTEXT: u64 = 0x20_0000;
const CONTEXT_STRIDE: u64 = 0x1000;
/// The highest priority and threshold.
const PRIORITY_MASK: u32 = 7;

/// What a PLIC is made from.
#[derive(Debug, Clone)]
pub struct PlicSpec {
    /// Number of harts, at most 512. Contexts 2n and 2n+1 are machine and supervisor mode of hart n.
    pub harts: u32,
    /// The highest source number (`riscv,ndev`), at most 1023.
    pub sources: u32,
    /// The harts' pins.
    pub lines: Arc<dyn CpuLines>,
    /// Source numbers that are edge-triggered; all others are level-triggered.
    pub edge: Vec<u32>,
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Context {
    threshold: u32,
    enabled: Bits,
    /// What the pin was last driven to.
    #[serde(skip)]
    asserted: bool,
}

/// A bit a source: bit n of word m stands for source `32 * m + n`.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(transparent)]
struct Bits(Vec<u32>);

impl Bits {
    fn new(sources: u32) -> Self {
        Self(vec![0; (sources as usize + 1).div_ceil(32)])
    }

    fn get(&self, n: usize) -> bool {
        self.0.get(n / 32).is_some_and(|w| w >> (n % 32) & 1 != 0)
    }

    fn set(&mut self, n: usize, value: bool) {
        if let Some(word) = self.0.get_mut(n / 32) {
            *word = *word & !(1 << (n % 32)) | u32::from(value) << (n % 32);
        }
    }

    fn word(&self, index: usize) -> u32 {
        self.0.get(index).copied().unwrap_or(0)
    }
}

#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
struct Regs {
    priority: Vec<u32>,
    level: Bits,
    pending: Bits,
    /// Claimed and not completed.
    in_service: Bits,
    /// An edge came while the source was in service.
    missed: Bits,
    contexts: Vec<Context>,
}

impl Regs {
    fn new(sources: u32, harts: u32) -> Self {
        let bits = Bits::new(sources);
        let context = Context { enabled: bits.clone(), ..Context::default() };
        Self {
            priority: vec![0; sources as usize + 1],
            level: bits.clone(),
            pending: bits.clone(),
            in_service: bits.clone(),
            missed: bits,
            contexts: vec![context; 2 * harts as usize],
        }
    }

    /// True if `other` is of the same numbers of sources and contexts.
    fn same_shape(&self, other: &Self) -> bool {
        let shape = |r: &Self| {
            let bits = [&r.level, &r.pending, &r.in_service, &r.missed].map(|b| b.0.len());
            (r.priority.len(), bits, r.contexts.len())
        };
        let contexts = self.contexts.iter().zip(&other.contexts);
        shape(self) == shape(other)
            && contexts.into_iter().all(|(a, b)| a.enabled.0.len() == b.enabled.0.len())
    }

    /// The pending source with the highest priority that `context` has enabled; the lowest number wins a
    /// tie. Priority 0 never interrupts.
    fn best(&self, context: &Context) -> Option<(usize, u32)> {
        let mut best = None;
        for (index, (&pending, &enabled)) in self.pending.0.iter().zip(&context.enabled.0).enumerate() {
            let mut candidates = pending & enabled;
            while candidates != 0 {
                let number = 32 * index + candidates.trailing_zeros() as usize;
                candidates &= candidates - 1;
                let priority = self.priority.get(number).copied().unwrap_or(0);
                if priority > best.map_or(0, |(_, p)| p) {
                    best = Some((number, priority));
                }
            }
        }
        best
    }

    /// Gateway: forwards one request at a time.
    fn set_level(&mut self, number: usize, level: bool, edge: bool) {
        let risen = level && !self.level.get(number);
        self.level.set(number, level);
        if !level || (edge && !risen) {
            return;
        }
        if !self.in_service.get(number) {
            self.pending.set(number, true);
        } else if edge {
            self.missed.set(number, true);
        }
    }

    /// Claims the best source for `context`: 0 if there is none. The threshold does not matter.
    fn claim(&mut self, context: usize) -> u32 {
        let best = self.contexts.get(context).and_then(|c| self.best(c));
        let Some((number, _)) = best else { return 0 };
        self.pending.set(number, false);
        self.in_service.set(number, true);
        number as u32
    }

    fn complete(&mut self, context: usize, number: u32, edge: bool) {
        let number = number as usize;
        // A source that is not enabled for the context is silently ignored (section 10).
        if !self.contexts.get(context).is_some_and(|c| c.enabled.get(number)) || !self.in_service.get(number)
        {
            return;
        }
        self.in_service.set(number, false);
        let again = if edge { self.missed.get(number) } else { self.level.get(number) };
        self.missed.set(number, false);
        if again {
            self.pending.set(number, true);
        }
    }
}

/// The device. Its inputs are the source numbers, from 1.
#[derive(Debug)]
pub struct Plic {
    spec: PlicSpec,
    regs: Mutex<Regs>,
}

impl Plic {
    /// A PLIC with everything disabled.
    pub fn new(spec: PlicSpec) -> Arc<Self> {
        let spec = PlicSpec { harts: spec.harts.min(512), sources: spec.sources.min(1023), ..spec };
        Arc::new(Self { regs: Mutex::new(Regs::new(spec.sources, spec.harts)), spec })
    }

    fn is_edge(&self, source: u32) -> bool {
        self.spec.edge.contains(&source)
    }

    /// Drives the pins that have changed. Called under the lock, so that levels cannot be reordered.
    fn update(&self, regs: &mut Regs) {
        for index in 0..regs.contexts.len() {
            let context = &regs.contexts[index];
            let level = regs.best(context).is_some_and(|(_, priority)| priority > context.threshold);
            if level != context.asserted {
                regs.contexts[index].asserted = level;
                self.drive(index, level);
            }
        }
    }

    fn drive(&self, context: usize, level: bool) {
        let pin = if context.is_multiple_of(2) { pin::MEIP } else { pin::SEIP };
        self.spec.lines.set_cpu_pin((context / 2) as u32, pin, level);
    }

    /// Drives every pin, whatever it was.
    fn refresh(&self, regs: &mut Regs) {
        for index in 0..regs.contexts.len() {
            regs.contexts[index].asserted = false;
            self.drive(index, false);
        }
        self.update(regs);
    }

    fn read_word(&self, regs: &mut Regs, offset: u64) -> u32 {
        match offset {
            0..PENDING => regs.priority.get((offset / 4) as usize).copied().unwrap_or(0),
            PENDING..ENABLE => regs.pending.word(((offset - PENDING) / 4) as usize),
            ENABLE..CONTEXT => {
                let at = offset - ENABLE;
                let context = regs.contexts.get((at / ENABLE_STRIDE) as usize);
                let word = (at % ENABLE_STRIDE / 4) as usize;
                context.map_or(0, |c| c.enabled.word(word))
            }
            _ => {
                let context = ((offset - CONTEXT) / CONTEXT_STRIDE) as usize;
                match (offset - CONTEXT) % CONTEXT_STRIDE {
                    0 => regs.contexts.get(context).map_or(0, |c| c.threshold),
                    4 => {
                        let claimed = regs.claim(context);
                        self.update(regs);
                        claimed
                    }
                    _ => 0,
                }
            }
        }
    }

    fn write_word(&self, regs: &mut Regs, offset: u64, value: u32) {
        match offset {
            // Source 0 does not exist.
            4..PENDING => {
                if let Some(priority) = regs.priority.get_mut((offset / 4) as usize) {
                    *priority = value & PRIORITY_MASK;
                }
            }
            ENABLE..CONTEXT => {
                let at = offset - ENABLE;
                let word = (at % ENABLE_STRIDE / 4) as usize;
                // Bits of sources that do not exist stay zero.
                let exists = |n: &u32| word as u32 * 32 + n != 0 && word as u32 * 32 + n <= self.spec.sources;
                let mask = (0..32).filter(exists).fold(0u32, |m, n| m | 1 << n);
                let context = regs.contexts.get_mut((at / ENABLE_STRIDE) as usize);
                if let Some(enabled) = context.and_then(|c| c.enabled.0.get_mut(word)) {
                    *enabled = value & mask;
                }
            }
            CONTEXT.. => {
                let context = ((offset - CONTEXT) / CONTEXT_STRIDE) as usize;
                match (offset - CONTEXT) % CONTEXT_STRIDE {
                    0 => {
                        if let Some(context) = regs.contexts.get_mut(context) {
                            context.threshold = value & PRIORITY_MASK;
                        }
                    }
                    4 => regs.complete(context, value, self.is_edge(value)),
                    _ => {}
                }
            }
            // Pending bits are read-only.
            _ => {}
        }
        self.update(regs);
    }
}

impl IrqSink for Plic {
    fn set_level(&self, pin: u32, level: bool) {
        let mut regs = self.regs.lock();
        let exists = pin != 0 && pin <= self.spec.sources;
        if !exists || regs.level.get(pin as usize) == level {
            return;
        }
        regs.set_level(pin as usize, level, self.is_edge(pin));
        self.update(&mut regs);
    }
}

impl BusDevice for Plic {
    fn read(&self, access: Access, data: &mut [u8]) {
        data.fill(0);
        // Only 32-bit accesses are defined (section 3).
        if data.len() == 4 && access.offset.is_multiple_of(4) {
            let word = self.read_word(&mut self.regs.lock(), access.offset);
            data.copy_from_slice(&word.to_le_bytes());
        }
    }

    fn write(&self, access: Access, data: &[u8]) {
        if let (&[a, b, c, d], true) = (data, access.offset.is_multiple_of(4)) {
            self.write_word(&mut self.regs.lock(), access.offset, u32::from_le_bytes([a, b, c, d]));
        }
    }
}

const KIND: &str = "riscv-plic";

impl Device for Plic {
    fn id(&self) -> &str {
        "plic"
    }

    fn reset(&self) {
        let mut regs = self.regs.lock();
        // Wires count as low: on a reset no device asserts its interrupt.
        *regs = Regs::new(self.spec.sources, self.spec.harts);
        self.refresh(&mut regs);
    }

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &*self.regs.lock())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        let saved: Regs = state.parse(KIND, 1)?;
        let mut regs = self.regs.lock();
        if !saved.same_shape(&regs) {
            let reason = "it has other sources or harts than this machine".to_owned();
            return Err(StateError::Invalid { kind: KIND, reason });
        }
        *regs = saved;
        for priority in &mut regs.priority {
            *priority &= PRIORITY_MASK;
        }
        self.refresh(&mut regs);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::riscv::tests::Pins;

    fn plic(edge: Vec<u32>) -> (Arc<Plic>, Arc<Pins>) {
        let pins = Arc::new(Pins::default());
        let lines = Arc::clone(&pins) as Arc<dyn CpuLines>;
        (Plic::new(PlicSpec { harts: 2, sources: 96, lines, edge }), pins)
    }

    fn read(plic: &Plic, offset: u64) -> u32 {
        let mut b = [0; 4];
        plic.read(Access { offset, address: offset, vcpu: Some(0) }, &mut b);
        u32::from_le_bytes(b)
    }

    fn write(plic: &Plic, offset: u64, value: u32) {
        plic.write(Access { offset, address: offset, vcpu: Some(0) }, &value.to_le_bytes());
    }

    /// Supervisor mode of hart 0 and of hart 1.
    const S0: u64 = 1;
    const S1: u64 = 3;

    fn enable(plic: &Plic, context: u64, source: u64, priority: u32) {
        write(plic, 4 * source, priority);
        let at = ENABLE + context * ENABLE_STRIDE + source / 32 * 4;
        write(plic, at, read(plic, at) | 1 << (source % 32));
    }

    fn claim(context: u64) -> u64 {
        CONTEXT + context * CONTEXT_STRIDE + 4
    }

    #[test]
    fn a_level_source_is_claimed_and_comes_back_while_it_is_high() {
        let (plic, pins) = plic(vec![]);
        plic.set_level(10, true);
        assert!(!pins.get(0, pin::SEIP), "not enabled");
        enable(&plic, S0, 10, 1);
        assert!(pins.get(0, pin::SEIP));
        assert!(!pins.get(0, pin::MEIP) && !pins.get(1, pin::SEIP));
        assert_eq!(read(&plic, PENDING), 1 << 10);
        assert_eq!(read(&plic, claim(S0)), 10);
        assert_eq!((read(&plic, PENDING), pins.get(0, pin::SEIP)), (0, false));
        assert_eq!(read(&plic, claim(S0)), 0);
        write(&plic, claim(S1), 10);
        assert!(!pins.get(0, pin::SEIP), "completion by a context without the source is ignored");
        write(&plic, claim(S0), 10);
        assert!(pins.get(0, pin::SEIP), "still high");
        assert_eq!(read(&plic, claim(S0)), 10);
        plic.set_level(10, false);
        write(&plic, claim(S0), 10);
        assert!(!pins.get(0, pin::SEIP));
    }

    #[test]
    fn an_edge_in_service_is_not_lost() {
        let (plic, pins) = plic(vec![5]);
        enable(&plic, S1, 5, 1);
        plic.set_level(5, true);
        plic.set_level(5, false);
        assert_eq!(read(&plic, claim(S1)), 5);
        write(&plic, claim(S1), 5);
        assert!(!pins.get(1, pin::SEIP));
        plic.set_level(5, true);
        assert_eq!(read(&plic, claim(S1)), 5);
        plic.set_level(5, false);
        plic.set_level(5, true);
        write(&plic, claim(S1), 5);
        assert!(pins.get(1, pin::SEIP));
    }

    #[test]
    fn priorities_and_thresholds_decide() {
        let (plic, pins) = plic(vec![]);
        for (source, priority) in [(3, 2), (7, 5), (8, 5), (96, 1)] {
            enable(&plic, S0, source, priority);
            plic.set_level(source as u32, true);
        }
        write(&plic, CONTEXT + CONTEXT_STRIDE, 5);
        assert!(!pins.get(0, pin::SEIP), "at the threshold is not above it");
        write(&plic, CONTEXT + CONTEXT_STRIDE, 4);
        assert!(pins.get(0, pin::SEIP));
        let order: Vec<u32> = (0..5).map(|_| read(&plic, claim(S0))).collect();
        assert_eq!(order, [7, 8, 3, 96, 0]);
        write(&plic, 4 * 3, 0xff);
        assert_eq!(read(&plic, 4 * 3), 7, "three bits of priority");
    }

    #[test]
    fn state_survives_and_reset_clears() {
        let (plic, pins) = plic(vec![]);
        enable(&plic, S0, 40, 3);
        plic.set_level(40, true);
        let state = plic.save().expect("state");
        plic.reset();
        assert!(!pins.get(0, pin::SEIP));
        assert_eq!(read(&plic, 4 * 40), 0);
        plic.restore(&state).expect("own state");
        assert!(pins.get(0, pin::SEIP));
        let pins = Arc::new(Pins::default());
        let other = Plic::new(PlicSpec { harts: 1, sources: 96, lines: pins, edge: vec![] });
        assert!(other.restore(&state).is_err());
    }

    #[test]
    fn hostile_accesses_do_no_harm() {
        let (plic, _) = plic(vec![]);
        let offsets = [0, 1, 4 * 96, 4 * 97, PENDING, PENDING + 0x7c, ENABLE - 4, ENABLE + 12, CONTEXT - 4];
        let far = [CONTEXT, claim(3), claim(4), CONTEXT + 8, 0x5f_fffc, 0x60_0000, u64::MAX - 3, u64::MAX];
        for offset in offsets.into_iter().chain(far) {
            for len in [0, 1, 2, 3, 4, 5, 8, 64] {
                let mut data = vec![0xff; len];
                plic.write(Access { offset, address: offset, vcpu: None }, &data);
                plic.read(Access { offset, address: offset, vcpu: None }, &mut data);
            }
        }
        write(&plic, ENABLE, u32::MAX);
        assert_eq!(read(&plic, ENABLE), u32::MAX - 1, "source 0 cannot be enabled");
        write(&plic, ENABLE + 12, u32::MAX);
        assert_eq!(read(&plic, ENABLE + 12), 1, "source 96 is the last");
        plic.set_level(0, true);
        plic.set_level(97, true);
        plic.set_level(u32::MAX, true);
    }
}
