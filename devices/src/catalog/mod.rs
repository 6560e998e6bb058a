//! Devices that are added by name: `--device NAME,key=value` on the command line, `board_devices` in a config. Names
//! and keys are QEMU's.
//!
//! A device has a folder here with its config, its registers and its state, and a line in the list below. None
//! of them opens anything, makes threads or calls the system after it is built, so the sandbox knows nothing of them.

pub mod isa_debug_exit;
pub mod pc_testdev;
pub mod pci_testdev;

use std::sync::Arc;

use holdfast_device::{BuildContext, BuildError, Device, IrqLine};
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::pci::PciBus;

/// The ISA side of a machine.
pub type IsaLines<'a> = &'a dyn Fn(u32) -> IrqLine;

/// What devices are plugged into.
pub struct Board<'a> {
    /// Buses, RAM and clocks.
    pub build: &'a BuildContext,
    /// The machine's PCI root bus.
    pub pci: &'a Arc<PciBus>,
    /// Its ISA interrupts, 24 lines with those of the IOAPIC; `None`: there is no ISA bus.
    pub isa: Option<IsaLines<'a>>,
}

impl std::fmt::Debug for Board<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Board").field("isa", &self.isa.is_some()).finish_non_exhaustive()
    }
}

impl Board<'_> {
    /// The ISA interrupts.
    ///
    /// # Errors
    /// [`BuildError::Config`] if the machine has no ISA bus.
    fn isa(&self, id: &str) -> Result<IsaLines<'_>, BuildError> {
        let reason = || "the machine has no ISA bus for it".to_owned();
        self.isa.ok_or_else(|| BuildError::Config { id: id.to_owned(), reason: reason() })
    }
}

/// The configuration of one kind of device.
pub trait DeviceKind: DeserializeOwned + JsonSchema + Into<DeviceConfig> {
    /// The name that `--device` takes.
    const NAME: &'static str;
    /// One line on what it is.
    const SUMMARY: &'static str;

    /// Values that cannot be, as field and reason.
    fn problems(&self) -> Vec<(&'static str, String)> {
        Vec::new()
    }

    /// Builds the device and attaches it.
    ///
    /// # Errors
    /// [`BuildError`].
    fn build(&self, board: &Board<'_>) -> Result<Arc<dyn Device>, BuildError>;
}

/// Does something for a kind of device that is known by name only.
pub trait Visitor {
    /// What comes of it.
    type Out;

    /// Does it for `K`.
    fn visit<K: DeviceKind>(&mut self) -> Self::Out;
}

macro_rules! devices {
    ($($variant:ident: $kind:ty = $name:literal,)*) => {
        /// A device and its configuration.
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
        #[serde(tag = "driver")]
        pub enum DeviceConfig {
            $(#[doc = concat!("`", $name, "`.")] #[serde(rename = $name)] $variant($kind),)*
        }

        $(impl From<$kind> for DeviceConfig {
            fn from(config: $kind) -> Self {
                Self::$variant(config)
            }
        })*

        impl DeviceConfig {
            /// The device's name.
            pub fn name(&self) -> &'static str {
                match self { $(Self::$variant(_) => <$kind>::NAME,)* }
            }

            /// Values that cannot be, as field and reason.
            pub fn problems(&self) -> Vec<(&'static str, String)> {
                match self { $(Self::$variant(config) => config.problems(),)* }
            }

            /// Builds the device and attaches it.
            ///
            /// # Errors
            /// [`BuildError`].
            pub fn build(&self, board: &Board<'_>) -> Result<Arc<dyn Device>, BuildError> {
                match self { $(Self::$variant(config) => config.build(board),)* }
            }
        }

        /// All names.
        pub const NAMES: &[&str] = &[$($name),*];

        /// Lets `visitor` do its work for the kind of device called `name`; `None`: there is none.
        pub fn visit<V: Visitor>(name: &str, visitor: &mut V) -> Option<V::Out> {
            match name {
                $($name => Some(visitor.visit::<$kind>()),)*
                _ => None,
            }
        }
    };
}

devices! {
    IsaDebugExit: isa_debug_exit::IsaDebugExitConfig = "isa-debug-exit",
    PcTestdev: pc_testdev::PcTestdevConfig = "pc-testdev",
    PciTestdev: pci_testdev::PciTestdevConfig = "pci-testdev",
}

#[cfg(test)]
mod tests {
    use super::*;

    struct Name;
    impl Visitor for Name {
        type Out = (&'static str, &'static str);
        fn visit<K: DeviceKind>(&mut self) -> Self::Out {
            (K::NAME, K::SUMMARY)
        }
    }

    #[test]
    fn names_in_the_list_are_those_of_the_kinds_and_of_their_json() {
        for name in NAMES {
            let (kind, summary) = visit(name, &mut Name).expect("is listed");
            assert_eq!(kind, *name);
            assert!(!summary.is_empty());
            let config: DeviceConfig =
                serde_json::from_value(serde_json::json!({ "driver": name })).expect("needs no keys");
            assert_eq!(config.name(), *name);
        }
        assert!(visit("rtl8139", &mut Name).is_none());
    }

    #[test]
    fn unknown_names_and_keys_are_refused_by_name() {
        let read = |text| serde_json::from_str::<DeviceConfig>(text).expect_err("refused").to_string();
        assert!(read(r#"{"driver":"rtl8139"}"#).contains("rtl8139"));
        assert!(read(r#"{"driver":"pc-testdev","iobase":1}"#).contains("iobase"));
        assert!(read(r#"{"driver":"isa-debug-exit","port":1}"#).contains("port"));
    }
}
