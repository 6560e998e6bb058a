//! What happens to values around calls of Rust code.

use super::{NO_HOME, NO_VALUE, NONE, NOWHERE, PINS};
use crate::codegen::Cx;
use crate::stubs::TEMPS;
use holdfast_tcg_ir::Val;
use holdfast_tcg_ir::types::SLOT_INDEXES;

impl Cx<'_> {
    /// Before a call of Rust code: every value that lives on leaves the temporaries and vector registers, and the pins
    /// and homes too when the callee writes slots.
    pub(crate) fn save_across_call(&mut self, writes_slots: bool) {
        for t in TEMPS {
            self.st.al.drop_page(t);
        }
        let mut used = if writes_slots { self.st.al.used } else { self.st.al.used & !PINS };
        while used != 0 {
            let r = used.trailing_zeros() as usize;
            used &= used - 1;
            let v = self.st.al.occ[r & 31];
            if v == NO_VALUE || !self.lives_on(Val(v)) {
                continue;
            }
            let p = self.st.al.places[v as usize];
            let homed = p.home != NO_HOME && !writes_slots;
            if p.spill == NONE && !homed && self.konst(Val(v)).is_none() {
                self.spill(Val(v));
            }
        }
        if writes_slots {
            for n in 0..SLOT_INDEXES {
                let (o, v) = self.st.al.homes[n];
                let p = if o == NO_HOME { NOWHERE } else { self.st.al.places[v as usize] };
                if o != NO_HOME && p.reg == NONE && p.spill == NONE && p.home == o && self.lives_on(Val(v)) {
                    self.home_to_spill(Val(v));
                }
            }
        }
    }

    /// Copies a value that is only at home to a spill slot.
    fn home_to_spill(&mut self, v: Val) {
        if self.r.ty(v).in_vector() {
            self.xmm(v);
        } else {
            self.gpr(v);
        }
        self.spill(v);
        // The register goes with the call; unlock it for the next one.
        self.st.al.locked = 0;
    }

    /// After the call: the temporaries and vector registers are empty.
    pub(crate) fn forget_after_call(&mut self, writes_slots: bool) {
        let mut used = if writes_slots { self.st.al.used } else { self.st.al.used & !PINS };
        while used != 0 {
            let r = used.trailing_zeros() as u8;
            used &= used - 1;
            let v = self.st.al.occ[usize::from(r & 31)];
            if let Some(place) = self.st.al.places.get_mut(v as usize) {
                place.reg = NONE;
            }
            self.st.al.vacate(r);
        }
        if writes_slots {
            for (o, v) in std::mem::replace(&mut self.st.al.homes, [(NO_HOME, 0); SLOT_INDEXES]) {
                if o != NO_HOME {
                    self.st.al.places[v as usize].home = NO_HOME;
                }
            }
        }
        if self.st.al.reserved != 0 {
            self.load_carriers();
        }
        self.st.al.locked = 0;
    }

    /// Gives the argument `v` a place in memory or as a constant, for moves that would overwrite its register.
    pub(crate) fn move_to_memory(&mut self, v: Val) {
        let v = self.st.an.root(v);
        let p = self.st.al.places[v.index()];
        if p.reg != NONE {
            if p.spill == NONE && p.home == NO_HOME && self.konst(v).is_none() {
                self.spill(v);
            }
            self.st.al.places[v.index()].reg = NONE;
            self.st.al.vacate(p.reg);
        }
    }
}
