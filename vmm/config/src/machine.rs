//! Machine and accelerator: Holdfast's own fields.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// Where the x86 interrupt controllers live.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum IrqChipMode {
    /// Local APIC with the accelerator; IOAPIC, PIC and PIT in user space.
    #[default]
    Split,
    /// All with the accelerator.
    On,
    /// All in user space.
    Off,
}

/// How the guest finds its virtio devices.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum VirtioTransport {
    /// As functions on the PCI bus (virtio-pci).
    #[default]
    Pci,
    /// In windows of their own that the device tree names (virtio-mmio).
    Mmio,
}

impl fmt::Display for VirtioTransport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Pci => "pci",
            Self::Mmio => "mmio",
        })
    }
}

/// The machine.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize, JsonSchema)]
pub struct MachineConfig {
    /// Name of the machine; the default is `q35` for x86_64 guests and `virt` for others.
    #[serde(rename = "type", default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-positional" = true))]
    pub kind: Option<String>,
    /// Where the x86 interrupt controllers live.
    #[serde(default)]
    pub kernel_irqchip: IrqChipMode,
    /// Port of the debug exit device (isa-debug-exit): a guest's write of `v` ends the process with status
    /// `v * 2 + 1`. q35 only; none if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub debug_exit: Option<u16>,
    /// How the guest finds its virtio devices: on PCI, or in virtio-mmio windows, of which `virt` has eight and
    /// q35 none.
    #[serde(default)]
    pub virtio: VirtioTransport,
    /// PCI Express root ports into which devices can be plugged while the guest runs, at most 8. The default is 4 for
    /// VMs that are made over REST or by a program that serves it (`--api-socket`), and none for others, which nobody
    /// could plug anything into.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hotplug_ports: Option<u8>,
}

impl MachineConfig {
    /// Ports for devices that come later, unless the user has said how many: REST's clients take them for granted.
    /// Machines whose virtio devices are not on PCI get none.
    pub fn expect_hot_plug(&mut self) {
        if self.virtio == VirtioTransport::Pci {
            self.hotplug_ports.get_or_insert(4);
        }
    }
}

/// What a flash bank holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct PflashConfig {
    /// The file, of exactly the bank's size (`virt`: 32 MiB; `q35`: any multiple of 4 KiB, 16 MiB for all).
    pub path: PathBuf,
    /// The guest cannot write it.
    #[serde(default)]
    pub readonly: bool,
}

/// An accelerator.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum AccelKind {
    /// The host's hardware virtualisation.
    Kvm,
    /// Translation.
    Tcg,
}

impl AccelKind {
    /// The name in options.
    pub fn name(self) -> &'static str {
        match self {
            Self::Kvm => "kvm",
            Self::Tcg => "tcg",
        }
    }
}

impl fmt::Display for AccelKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Which accelerators to try, in order. Text: `auto`, or names joined by colons.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub enum AccelChoice {
    /// KVM if it can run this guest at speed, else translation.
    #[default]
    Auto,
    /// These, in order; never empty.
    Try(Vec<AccelKind>),
}

/// Text that is no choice of accelerators.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no accelerator; kvm, tcg, auto and lists like kvm:tcg are")]
pub struct UnknownAccel(pub String);

impl FromStr for AccelChoice {
    type Err = UnknownAccel;

    fn from_str(s: &str) -> Result<Self, UnknownAccel> {
        if s == "auto" {
            return Ok(Self::Auto);
        }
        let mut kinds = Vec::new();
        for word in s.split(':') {
            let kind = match word {
                "kvm" => AccelKind::Kvm,
                "tcg" => AccelKind::Tcg,
                _ => return Err(UnknownAccel(word.to_owned())),
            };
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        Ok(Self::Try(kinds))
    }
}

impl fmt::Display for AccelChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Auto => f.write_str("auto"),
            Self::Try(kinds) => {
                for (i, kind) in kinds.iter().enumerate() {
                    if i > 0 {
                        f.write_str(":")?;
                    }
                    f.write_str(kind.name())?;
                }
                Ok(())
            }
        }
    }
}

impl Serialize for AccelChoice {
    fn serialize<S: serde::Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for AccelChoice {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = String::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl JsonSchema for AccelChoice {
    fn schema_name() -> std::borrow::Cow<'static, str> {
        "AccelChoice".into()
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({
            "type": "string",
            "pattern": "^(auto|(kvm|tcg)(:(kvm|tcg))*)$",
            "description": "Accelerators to try, in order: kvm, tcg, auto or a list like kvm:tcg",
        })
    }
}
