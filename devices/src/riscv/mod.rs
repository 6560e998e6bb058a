//! RISC-V platform interrupt controllers and timers.

mod aclint;
mod plic;

pub use aclint::{Aclint, AclintSpec, WINDOW as ACLINT_WINDOW};
pub use plic::{Plic, PlicSpec};

/// Bits of `mip`, the pins of a hart (privileged specification, section 3.1.9).
pub mod pin {
    /// Supervisor software interrupt.
    pub const SSIP: u32 = 1;
    /// Machine software interrupt.
    pub const MSIP: u32 = 3;
    /// Machine timer interrupt.
    pub const MTIP: u32 = 7;
    /// Supervisor external interrupt.
    pub const SEIP: u32 = 9;
    /// Machine external interrupt.
    pub const MEIP: u32 = 11;
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use holdfast_device::CpuLines;
    use parking_lot::Mutex;

    /// Harts' pins that remember their levels.
    #[derive(Debug, Default)]
    pub struct Pins(Mutex<HashSet<(u32, u32)>>);

    impl Pins {
        pub fn get(&self, hart: u32, pin: u32) -> bool {
            self.0.lock().contains(&(hart, pin))
        }
    }

    impl CpuLines for Pins {
        fn set_cpu_pin(&self, vcpu: u32, pin: u32, level: bool) {
            if level {
                self.0.lock().insert((vcpu, pin));
            } else {
                self.0.lock().remove(&(vcpu, pin));
            }
        }
    }
}
