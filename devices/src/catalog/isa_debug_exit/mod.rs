//! `isa-debug-exit`: a port that ends the whole process: writing `v` exits with status `v * 2 + 1`, never zero.

use std::sync::Arc;

use holdfast_device::{
    Access, BuildContext, BuildError, BusDevice, Device, DeviceState, StateError, SystemEvent, SystemSink,
};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Board, DeviceKind};
use crate::x86::attach;

const KIND: &str = "isa-debug-exit";

/// Where the port is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct IsaDebugExitConfig {
    /// First port.
    #[serde(default = "iobase")]
    pub iobase: u16,
    /// Number of ports.
    #[serde(default = "iosize")]
    pub iosize: u16,
}

fn iobase() -> u16 {
    0x501
}

fn iosize() -> u16 {
    2
}

impl DeviceKind for IsaDebugExitConfig {
    const NAME: &'static str = KIND;
    const SUMMARY: &'static str = "Port that ends the process: a guest's write of v exits with status 2v + 1";

    fn problems(&self) -> Vec<(&'static str, String)> {
        let mut problems = Vec::new();
        if !(1..=8).contains(&self.iosize) {
            problems.push(("iosize", format!("is {}; 1 to 8 would do", self.iosize)));
        }
        if u32::from(self.iobase) + u32::from(self.iosize) > 0x1_0000 {
            problems.push(("iobase", format!("is {:#x}, too near to the end of the ports", self.iobase)));
        }
        problems
    }

    fn build(&self, board: &Board<'_>) -> Result<Arc<dyn Device>, BuildError> {
        board.isa(KIND)?;
        Ok(DebugExit::build(*self, board.build)?)
    }
}

/// The port.
#[derive(Debug)]
pub struct DebugExit {
    system: Arc<dyn SystemSink>,
}

impl DebugExit {
    /// Builds the port.
    ///
    /// # Errors
    /// [`BuildError::Bus`] if the port is taken.
    pub fn build(config: IsaDebugExitConfig, context: &BuildContext) -> Result<Arc<Self>, BuildError> {
        let exit = Arc::new(Self { system: Arc::clone(&context.system) });
        let device = Arc::clone(&exit) as Arc<dyn BusDevice>;
        attach(&context.pio, KIND, config.iobase.into(), config.iosize.into(), device)?;
        Ok(exit)
    }
}

impl BusDevice for DebugExit {
    fn read(&self, _access: Access, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, _access: Access, data: &[u8]) {
        if let Some(value) = data.first() {
            self.system.request(SystemEvent::Exit(value << 1 | 1));
        }
    }
}

impl Device for DebugExit {
    fn id(&self) -> &str {
        KIND
    }

    fn reset(&self) {}

    fn save(&self) -> Result<DeviceState, StateError> {
        DeviceState::new(KIND, 1, &())
    }

    fn restore(&self, state: &DeviceState) -> Result<(), StateError> {
        state.parse(KIND, 1)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::x86::testing::{context, hostile, outb};

    #[test]
    fn the_exit_port_exits() {
        let (c, requests) = context();
        let config = IsaDebugExitConfig { iobase: 0xf4, iosize: 4 };
        let exit = DebugExit::build(config, &c).expect("build");
        outb(&c.pio, 0xf4, 0x10);
        assert_eq!(requests.take(), [SystemEvent::Exit(0x21)]);
        assert!(DebugExit::build(config, &c).is_err(), "the port is taken");
        hostile(&*exit, 0xf4, 4);
        exit.restore(&exit.save().expect("saves")).expect("restores");
    }

    #[test]
    fn windows_that_cannot_be_are_refused() {
        let fields = |iobase, iosize| -> Vec<&str> {
            IsaDebugExitConfig { iobase, iosize }.problems().iter().map(|p| p.0).collect()
        };
        assert!(fields(0x501, 2).is_empty() && fields(0xfffc, 4).is_empty());
        assert_eq!(fields(0x501, 0), ["iosize"]);
        assert_eq!(fields(0xffff, 2), ["iobase"]);
    }
}
