//! `dbus-vmstate` objects: helpers on a D-Bus bus whose state moves with the VM.
//!
//! Options and meaning are those of QEMU (docs/interop/dbus-vmstate.rst); who talks to the helpers is the VM's business.

use std::collections::BTreeSet;
use std::path::PathBuf;

use crate::{Fields, ObjectError, bad};

/// Most bytes of a helper's Id: with the NUL that C puts behind it, it has 256.
pub const MAX_ID: usize = 255;

/// Where a bus listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum BusSocket {
    /// A UNIX socket by its path.
    Path(PathBuf),
    /// A UNIX socket by its name in the abstract namespace, without the leading NUL.
    Abstract(Vec<u8>),
}

/// One place to reach a bus at (D-Bus Specification, "Server Addresses").
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BusAddress {
    /// Where it listens.
    pub socket: BusSocket,
    /// Who it has to be, as it says itself when it lets somebody in.
    pub guid: Option<String>,
}

/// Which helpers' state moves with a VM.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DbusVmState {
    /// The object's id.
    pub id: String,
    /// The address of the bus, as it was given.
    pub addr: String,
    /// What it means: places to try in this order, at least one.
    pub places: Vec<BusAddress>,
    /// Ids of the helpers that move, which then all have to be there; `None` for all that are there.
    pub ids: Option<BTreeSet<String>>,
}

/// Whether this can be a helper's Id: 1 to [`MAX_ID`] bytes, none of them NUL.
pub fn is_id(text: &str) -> bool {
    (1..=MAX_ID).contains(&text.len()) && !text.contains('\0')
}

impl DbusVmState {
    pub(crate) fn from_fields(id: &str, fields: &mut Fields) -> Result<Self, ObjectError> {
        let addr = fields.text("addr")?.ok_or_else(|| bad("Parameter 'addr' is missing"))?;
        let places = parse(&addr).map_err(|text| bad(format!("Parameter 'addr' {text}")))?;
        let ids = match fields.text("id-list")? {
            None => None,
            Some(list) => {
                let ids: BTreeSet<String> = list.split(',').map(str::to_owned).collect();
                if !ids.iter().all(|id| is_id(id)) {
                    let text = format!(
                        "Parameter 'id-list' expects Ids of 1 to {MAX_ID} bytes, separated by commas"
                    );
                    return Err(bad(text));
                }
                Some(ids)
            }
        };
        Ok(Self { id: id.to_owned(), addr, places, ids })
    }
}

/// Reads an address: `TRANSPORT:key=value,…`, several separated by semicolons.
fn parse(text: &str) -> Result<Vec<BusAddress>, String> {
    let places: Vec<_> = text.split(';').filter(|t| !t.is_empty()).map(place).collect::<Result<_, _>>()?;
    if places.is_empty() { Err("is empty".to_owned()) } else { Ok(places) }
}

fn place(text: &str) -> Result<BusAddress, String> {
    let (transport, pairs) = text.split_once(':').ok_or("expects a D-Bus address: unix:path=PATH")?;
    if transport != "unix" {
        return Err(format!("names the transport '{transport}', which is not supported: use unix:path="));
    }
    let (mut socket, mut guid) = (None, None);
    for pair in pairs.split(',') {
        let (key, value) =
            pair.split_once('=').ok_or_else(|| format!("has '{pair}', which is no key=value"))?;
        let value = unescape(value)
            .ok_or_else(|| format!("has a value of '{key}' that is empty or wrongly escaped"))?;
        let place = match key {
            "path" => BusSocket::Path(PathBuf::from(text_of(value, key)?)),
            "abstract" => BusSocket::Abstract(value),
            "guid" if guid.is_none() => {
                guid = Some(text_of(value, key)?.to_ascii_lowercase());
                continue;
            }
            "guid" => return Err("has more than one guid".to_owned()),
            _ => return Err(format!("has the key '{key}', which is not supported: use unix:path=")),
        };
        if socket.replace(place).is_some() {
            return Err("names more than one socket".to_owned());
        }
    }
    Ok(BusAddress { socket: socket.ok_or("names no socket: use unix:path=")?, guid })
}

fn text_of(value: Vec<u8>, key: &str) -> Result<String, String> {
    String::from_utf8(value).map_err(|_| format!("has a value of '{key}' that is not UTF-8"))
}

/// Undoes `%XX`; `None` if an escape is none, or the value is empty or has a NUL. Bytes that the specification wants escaped may stand for
/// themselves, as libdbus has it.
fn unescape(text: &str) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut out = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        out.push(match byte {
            b'%' => {
                let digits = [bytes.next()?, bytes.next()?];
                let [high, low] = digits.map(|d| char::from(d).to_digit(16));
                u8::try_from(high? << 4 | low?).ok()?
            }
            byte => byte,
        });
    }
    (!out.is_empty() && !out.contains(&0)).then_some(out)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Objects;

    #[test]
    fn addresses() {
        let path = |path: &str| BusAddress { socket: BusSocket::Path(path.into()), guid: None };
        assert_eq!(parse("unix:path=/run/bus.sock"), Ok(vec![path("/run/bus.sock")]));
        assert_eq!(parse("unix:path=/run/a%2cb%20c"), Ok(vec![path("/run/a,b c")]));
        let both = parse("unix:path=/a;unix:abstract=/tmp/dbus-x,guid=0123456789abcdef0123456789ABCDEF;");
        let named = BusAddress {
            socket: BusSocket::Abstract(b"/tmp/dbus-x".to_vec()),
            guid: Some("0123456789abcdef0123456789abcdef".into()),
        };
        assert_eq!(both, Ok(vec![path("/a"), named]));
        for (text, says) in [
            ("", "is empty"),
            (";", "is empty"),
            ("/run/bus.sock", "expects a D-Bus address"),
            ("tcp:host=localhost,port=1", "the transport 'tcp', which is not supported"),
            ("unix:runtime=yes", "the key 'runtime', which is not supported"),
            ("unix:path=/a,abstract=b", "more than one socket"),
            ("unix:guid=00", "names no socket"),
            ("unix:path", "no key=value"),
            ("unix:path=", "wrongly escaped"),
            ("unix:path=/a%2", "wrongly escaped"),
            ("unix:path=/a%zz", "wrongly escaped"),
            ("unix:path=/a%00", "wrongly escaped"),
        ] {
            let said = parse(text).expect_err(text);
            assert!(said.contains(says), "{text}: {said}");
        }
    }

    #[test]
    fn one_object_for_a_vm_and_none_elsewhere() {
        let objects = Objects::for_vm();
        objects.add_text("dbus-vmstate,id=v,addr=unix:path=/run/bus,id-list=a,,b").expect("made");
        let made = objects.dbus_vmstate().expect("there");
        assert_eq!((made.id.as_str(), made.addr.as_str()), ("v", "unix:path=/run/bus"));
        assert_eq!(made.ids, Some(["a", "b"].map(str::to_owned).into()));
        assert_eq!(objects.list(), [("v".to_owned(), "dbus-vmstate")]);
        let says = |objects: &Objects, text: &str| objects.add_text(text).expect_err(text).to_string();
        let second = says(&objects, "dbus-vmstate,id=w,addr=unix:path=/run/bus");
        assert_eq!(second, "There is already an instance of dbus-vmstate");
        assert!(says(&objects, "secret,id=v,data=x").contains("duplicate"));
        objects.remove("v").expect("there");
        assert!(objects.dbus_vmstate().is_none());
        for (text, wanted) in [
            ("dbus-vmstate,id=v", "Parameter 'addr' is missing"),
            ("dbus-vmstate,id=v,addr=x", "Parameter 'addr' expects a D-Bus address"),
            ("dbus-vmstate,id=v,addr=unix:path=/b,id-list=a,,,,b", "Parameter 'id-list' expects Ids"),
            ("dbus-vmstate,id=v,addr=unix:path=/b,idlist=a", "does not support the option 'idlist'"),
        ] {
            assert!(says(&objects, text).contains(wanted), "{text}");
        }
        let long = format!("dbus-vmstate,id=v,addr=unix:path=/b,id-list={}", "x".repeat(256));
        assert!(says(&objects, &long).contains("1 to 255 bytes"));
        objects.add_text(&long[..long.len() - 1]).expect("255 bytes are fine");
        let elsewhere = says(&Objects::default(), "dbus-vmstate,id=v,addr=unix:path=/run/bus");
        assert!(elsewhere.contains("there is no VM here"), "{elsewhere}");
    }
}
