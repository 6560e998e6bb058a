//! Vector registers that live on from round to round of a loop.
//!
//! Slots in memory are written through, so at the head of a loop each of them can be read again. But a sum in a vector register would
//! go through memory once a round then: a store and a load that waits for it, several times what the addition takes. So in the
//! innermost loops of a region a few slots that are read and written have a register of their own, their *carrier*, which holds at every
//! instruction what memory holds.

use super::Cx;
use crate::asm::{Mem, Xmm};
use holdfast_tcg_ir::{Op, Region, Slot, Type, Val};

/// Slots with a carrier at most.
const CARRIERS: usize = 4;
/// Their registers go down from here; values take the lowest free one.
const FIRST: u8 = 13;
/// Loops looked at in a region.
const LOOPS: usize = 4;

/// The slots that have a carrier, by its number from [`FIRST`] down.
#[derive(Clone, Copy, Default)]
pub(crate) struct Carriers([Option<Slot>; CARRIERS]);

impl Carriers {
    /// The carrier of `slot`.
    #[inline]
    fn of(&self, slot: Slot) -> Option<Xmm> {
        let n = self.0.iter().position(|s| *s == Some(slot))?;
        Some(Xmm(FIRST - n as u8))
    }

    /// Their registers and slots.
    fn all(self) -> impl Iterator<Item = (Xmm, Slot)> {
        (0..).zip(self.0).filter_map(|(n, slot)| Some((Xmm(FIRST - n), slot?)))
    }

    /// Their registers, as a bit mask over general and vector registers.
    fn mask(self) -> u32 {
        self.all().fold(0, |mask, (x, _)| mask | 1 << (x.0 + 16))
    }
}

/// A loop: the instructions from `head` on that may be run again, up to and with `end`.
#[derive(Clone, Copy)]
struct Loop {
    head: u32,
    end: u32,
}

impl Loop {
    fn holds(&self, at: u32) -> bool {
        (self.head..=self.end).contains(&at)
    }
}

/// The loops of the region at hand that have carriers.
#[derive(Default)]
pub(crate) struct Loops {
    found: Vec<(Loop, Carriers)>,
    /// Where jumps go and where they are.
    jumps: Vec<(u32, u32)>,
    /// The end of the one that is being emitted.
    end: Option<u32>,
    /// Its carriers.
    pub(crate) active: Carriers,
    /// Where jumps back to the region's entry go.
    pub(crate) entry: usize,
}

impl Loops {
    /// Finds the innermost loops of `r` and their carriers.
    fn find(&mut self, r: &Region) {
        self.found.clear();
        self.jumps.clear();
        let label = |n: u32| r.labels.get(n as usize).and_then(|l| l.at);
        for (at, i) in (0..).zip(&r.insts) {
            let to = match i.op {
                Op::Br => label(i.a),
                Op::BrCond => label(i.c),
                Op::GotoPc => (i.imm() == r.entry_pc).then_some(0),
                _ => continue,
            };
            self.jumps.extend(to.map(|to| (to, at)));
        }
        for &(head, at) in self.jumps.iter().filter(|(to, at)| to <= at) {
            if let Some((l, _)) = self.found.iter_mut().find(|(l, _)| l.head == head) {
                l.end = l.end.max(at);
            } else if self.found.len() < LOOPS {
                self.found.push((Loop { head, end: at }, Carriers::default()));
            }
        }
        // Nobody jumps into one but to its head, and none has another in it.
        let heads: Vec<u32> = self.jumps.iter().filter(|(to, at)| to <= at).map(|(to, _)| *to).collect();
        let jumps = &self.jumps;
        self.found.retain(|(l, _)| {
            let entered = jumps.iter().any(|(to, at)| *to != l.head && l.holds(*to) && !l.holds(*at));
            !entered && !heads.iter().any(|head| *head != l.head && l.holds(*head))
        });
    }

    /// Gives carriers to the slots that are read and written in each; `is_dead` says of which instructions nothing is left.
    fn choose(&mut self, r: &Region, is_dead: impl Fn(u32) -> bool) {
        for (l, carriers) in &mut self.found {
            let body = || (0..).zip(&r.insts).filter(|(at, _)| l.holds(*at) && !is_dead(*at));
            // Single-precision numbers in boxes are read and written by their halves, in memory.
            let boxed = |v: u32| r.insts.get(v as usize).is_some_and(|d| d.op == Op::FBox);
            let sets = |slot: Slot| {
                body().filter(move |(_, i)| i.op == Op::SetSlot && (i.a, i.ty) == (slot.offset, slot.ty))
            };
            let written = |slot| sets(slot).next().is_some() && !sets(slot).any(|(_, i)| boxed(i.b));
            let read = body().filter(|(_, i)| i.op == Op::GetSlot && i.ty.in_vector());
            let mut free = carriers.0.iter_mut();
            let mut given: Vec<Slot> = Vec::new();
            for (_, i) in read {
                let slot = Slot { offset: i.a, ty: i.ty };
                if !given.contains(&slot) && written(slot) {
                    let Some(place) = free.next() else { break };
                    *place = Some(slot);
                    given.push(slot);
                }
            }
        }
        self.found.retain(|(_, carriers)| carriers.mask() != 0);
    }
}

impl Cx<'_> {
    /// Looks for loops with carriers, where there are vectors; begins that of the region's entry.
    pub(crate) fn find_loops(&mut self) {
        let st = &mut *self.st;
        (st.loops.active, st.loops.end, st.loops.entry) = (Carriers::default(), None, 0);
        st.loops.found.clear();
        st.al.reserved = 0;
        if !st.an.has_vectors() {
            return;
        }
        st.loops.find(self.r);
        let an = &st.an;
        st.loops.choose(self.r, |at| an.is_dead(at));
        self.begin_loop(0);
        self.st.loops.entry = self.st.asm.pos();
    }

    /// Loads the carriers of the loop that begins at instruction `head`, if there is one.
    pub(crate) fn begin_loop(&mut self, head: u32) {
        let found = self.st.loops.found.iter().find(|(l, _)| l.head == head);
        let Some(&(l, carriers)) = found else { return };
        (self.st.loops.active, self.st.loops.end) = (carriers, Some(l.end));
        self.st.al.reserved = carriers.mask();
        self.load_carriers();
    }

    /// Carriers are registers like others behind the loop.
    #[inline]
    pub(crate) fn end_loop(&mut self, at: u32) {
        if self.st.loops.end.is_some_and(|end| at > end) {
            (self.st.loops.active, self.st.loops.end) = (Carriers::default(), None);
            self.st.al.reserved = 0;
        }
    }

    /// Loads what memory holds to the carriers: at the head, and behind a call.
    pub(crate) fn load_carriers(&mut self) {
        for (x, slot) in self.st.loops.active.all() {
            let m = Mem::env(slot.offset as i32);
            match slot.ty {
                Type::V128 => self.st.asm.movups(x, m),
                ty => self.st.asm.fload(ty.bytes() == 8, x, m),
            }
        }
    }

    /// The carrier of a slot.
    #[inline]
    pub(crate) fn carrier(&self, slot: Slot) -> Option<Xmm> {
        if self.st.al.reserved == 0 { None } else { self.st.loops.active.of(slot) }
    }

    /// Whether the current instruction's result is what the slot of carrier `x` is set to next.
    pub(crate) fn carried_next(&self, x: Xmm) -> bool {
        let first = self.at as usize + 1;
        let rest = (first..).zip(self.r.insts.get(first..).unwrap_or_default());
        let mut rest = rest.skip_while(|(at, i)| i.op == Op::Const || self.st.an.is_dead(*at as u32));
        rest.next().is_some_and(|(_, i)| {
            i.op == Op::SetSlot
                && self.st.an.root(Val(i.b)).0 == self.at
                && self.carrier(Slot { offset: i.a, ty: i.ty }) == Some(x)
        })
    }
}
