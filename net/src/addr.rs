//! Addresses.

use std::borrow::Cow;
use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// An Ethernet address.
#[derive(Clone, Copy, Default, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct MacAddr(pub [u8; 6]);

/// Text that is no Ethernet address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is not a MAC address such as 12:34:56:78:9a:bc")]
pub struct ParseMacError(String);

impl MacAddr {
    /// The locally administered unicast address made of `random` bytes.
    pub fn local(random: [u8; 6]) -> Self {
        let mut bytes = random;
        bytes[0] = (bytes[0] & 0xfc) | 2;
        Self(bytes)
    }

    /// True for group addresses, broadcast included.
    pub fn is_multicast(self) -> bool {
        self.0[0] & 1 != 0
    }
}

impl fmt::Display for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for MacAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for MacAddr {
    type Err = ParseMacError;

    fn from_str(text: &str) -> Result<Self, ParseMacError> {
        let wrong = || ParseMacError(text.to_owned());
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().ok_or_else(wrong)?;
            if part.len() != 2 || !part.bytes().all(|b| b.is_ascii_hexdigit()) {
                return Err(wrong());
            }
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        if parts.next().is_some() { Err(wrong()) } else { Ok(Self(bytes)) }
    }
}

impl Serialize for MacAddr {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for MacAddr {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let text = Cow::<str>::deserialize(deserializer)?;
        text.parse().map_err(serde::de::Error::custom)
    }
}

impl schemars::JsonSchema for MacAddr {
    fn schema_name() -> Cow<'static, str> {
        "MacAddr".into()
    }

    fn inline_schema() -> bool {
        true
    }

    fn json_schema(_: &mut schemars::SchemaGenerator) -> schemars::Schema {
        schemars::json_schema!({ "type": "string", "pattern": "^([0-9a-fA-F]{2}:){5}[0-9a-fA-F]{2}$" })
    }
}

/// The number of leading ones of a netmask; `None` if ones follow zeroes.
pub fn prefix_len(mask: IpAddr) -> Option<u8> {
    let (bits, width) = match mask {
        IpAddr::V4(m) => (u128::from(m.to_bits()) << 96, 32),
        IpAddr::V6(m) => (m.to_bits(), 128),
    };
    let ones = bits.leading_ones();
    (bits.count_ones() == ones && ones <= width).then_some(ones as u8)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mac_addresses_parse_print_and_refuse() {
        let mac: MacAddr = "12:34:56:78:9A:bc".parse().expect("a MAC");
        assert_eq!(mac.to_string(), "12:34:56:78:9a:bc");
        for bad in ["", "12:34:56:78:9a", "12:34:56:78:9a:bc:de", "1:2:3:4:5:6", "+1:34:56:78:9a:bc"] {
            assert!(bad.parse::<MacAddr>().is_err(), "{bad}");
        }
        assert!(!MacAddr::local([0xff; 6]).is_multicast());
        assert_eq!(MacAddr::local([0xff; 6]).0[0] & 3, 2);
    }

    #[test]
    fn masks_have_a_prefix_length_or_are_none() {
        let len = |s: &str| prefix_len(s.parse().expect("an address"));
        assert_eq!(len("255.255.255.0"), Some(24));
        assert_eq!(len("255.0.255.0"), None);
        assert_eq!(len("0.0.0.0"), Some(0));
        assert_eq!(len("ffff:ffff::"), Some(32));
    }
}
