//! Addresses of PCI functions.

use std::fmt;
use std::str::FromStr;

/// Segment, bus, device and function. Its text form is `0000:00:03.0`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Bdf {
    segment: u16,
    bus: u8,
    devfn: u8,
}

/// A text that is no PCI address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is no PCI address; one looks like 0000:00:03.0")]
pub struct BdfError(pub String);

impl Bdf {
    /// The function `devfn` (device number times eight plus function) of `bus`.
    pub fn new(segment: u16, bus: u8, devfn: u8) -> Self {
        Self { segment, bus, devfn }
    }

    /// The PCI segment (domain).
    pub fn segment(self) -> u16 {
        self.segment
    }

    /// Bus number.
    pub fn bus(self) -> u8 {
        self.bus
    }

    /// Device number, 0 to 31.
    pub fn device(self) -> u8 {
        self.devfn >> 3
    }

    /// Function number, 0 to 7.
    pub fn function(self) -> u8 {
        self.devfn & 7
    }

    /// Device and function as one byte.
    pub fn devfn(self) -> u8 {
        self.devfn
    }

    /// The 16-bit requester id (bus, device, function), as in MSI messages.
    pub fn requester(self) -> u32 {
        u32::from(self.bus) << 8 | u32::from(self.devfn)
    }
}

impl fmt::Display for Bdf {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:04x}:{:02x}:{:02x}.{}", self.segment, self.bus, self.device(), self.function())
    }
}

impl FromStr for Bdf {
    type Err = BdfError;

    fn from_str(s: &str) -> Result<Self, BdfError> {
        let err = || BdfError(s.to_owned());
        let (rest, function) = s.rsplit_once('.').ok_or_else(err)?;
        let mut parts = rest.split(':');
        let (Some(segment), Some(bus), Some(device), None) =
            (parts.next(), parts.next(), parts.next(), parts.next())
        else {
            return Err(err());
        };
        let hex = |t: &str, max: u16| u16::from_str_radix(t, 16).ok().filter(|&n| n <= max).ok_or_else(err);
        let devfn = hex(device, 31)? << 3 | hex(function, 7)?;
        Ok(Self { segment: hex(segment, 0xffff)?, bus: hex(bus, 0xff)? as u8, devfn: devfn as u8 })
    }
}
