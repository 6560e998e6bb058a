//! A strict reader of flattened device trees (Devicetree Specification 0.4, sections 2 and 5): it takes
//! nothing that any guest's reader might stumble over.

use std::collections::BTreeSet;

/// A node.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Node {
    /// Its name with its unit address.
    pub name: String,
    /// Properties in order.
    pub properties: Vec<(String, Vec<u8>)>,
    /// Children in order.
    pub children: Vec<Node>,
}

const BEGIN_NODE: u32 = 1;
const END_NODE: u32 = 2;
const PROPERTY: u32 = 3;
const NOP: u32 = 4;
const END: u32 = 9;
/// Nodes lie no deeper than this.
const MAX_DEPTH: usize = 16;

type Result<T> = std::result::Result<T, String>;

fn word(bytes: &[u8], at: usize) -> Result<u32> {
    let four = at.checked_add(4).and_then(|end| bytes.get(at..end));
    let four: [u8; 4] = four.and_then(|b| b.try_into().ok()).ok_or_else(|| format!("nothing at {at:#x}"))?;
    Ok(u32::from_be_bytes(four))
}

/// The text up to a NUL.
fn text(bytes: &[u8], at: usize) -> Result<&str> {
    let rest = bytes.get(at..).ok_or_else(|| format!("no text at {at:#x}"))?;
    let end = rest.iter().position(|b| *b == 0).ok_or_else(|| format!("text at {at:#x} does not end"))?;
    std::str::from_utf8(&rest[..end]).map_err(|e| e.to_string())
}

fn allowed(name: &str, more: &str) -> bool {
    name.chars().all(|c| c.is_ascii_alphanumeric() || more.contains(c))
}

struct Reader<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
    at: usize,
}

impl Reader<'_> {
    fn next(&mut self) -> Result<u32> {
        let word = word(self.structure, self.at)?;
        self.at += 4;
        Ok(word)
    }

    fn property(&mut self) -> Result<(String, Vec<u8>)> {
        let (len, name) = (self.next()? as usize, self.next()? as usize);
        let name = text(self.strings, name)?;
        if name.is_empty() || name.len() > 31 || !allowed(name, ",._+?#-") {
            return Err(format!("property name `{name}`"));
        }
        let value = self.at.checked_add(len).and_then(|end| self.structure.get(self.at..end));
        let value = value.ok_or_else(|| format!("`{name}` is longer than its tree"))?;
        self.at = (self.at + len).next_multiple_of(4);
        Ok((name.to_owned(), value.to_vec()))
    }

    /// A node whose first token was read.
    fn node(&mut self, depth: usize) -> Result<Node> {
        let name = text(self.structure, self.at)?.to_owned();
        let (stem, unit) = name.split_once('@').unwrap_or((name.as_str(), "0"));
        let well_named = (depth == 0) == stem.is_empty() && stem.len() <= 31 && allowed(stem, ",._+-");
        if !well_named || unit.is_empty() || !allowed(unit, ",._+-") || depth > MAX_DEPTH {
            return Err(format!("node name `{name}` at depth {depth}"));
        }
        self.at = (self.at + name.len() + 1).next_multiple_of(4);
        let mut node = Node { name, ..Node::default() };
        let mut seen = BTreeSet::new();
        loop {
            match self.next()? {
                NOP => {}
                PROPERTY if node.children.is_empty() => {
                    let property = self.property()?;
                    if !seen.insert(property.0.clone()) {
                        return Err(format!("`{}` twice in `{}`", property.0, node.name));
                    }
                    node.properties.push(property);
                }
                BEGIN_NODE => {
                    let child = self.node(depth + 1)?;
                    if node.children.iter().any(|c| c.name == child.name) {
                        return Err(format!("`{}` twice in `{}`", child.name, node.name));
                    }
                    node.children.push(child);
                }
                END_NODE => return Ok(node),
                token => return Err(format!("token {token} in `{}`", node.name)),
            }
        }
    }
}

/// Reads a blob.
///
/// # Errors
/// What is wrong with it.
pub fn parse(blob: &[u8]) -> Result<Node> {
    let header: Vec<u32> = (0..10).map(|n| word(blob, 4 * n)).collect::<Result<_>>()?;
    let [magic, total, structure, strings, reserved, version, compatible, _, strings_len, structure_len] =
        header[..]
    else {
        return Err("no header".into());
    };
    if (magic, total as usize, version, compatible) != (0xd00d_feed, blob.len(), 17, 16) {
        return Err(format!("header {header:x?} of {} bytes", blob.len()));
    }
    if structure % 4 != 0 || reserved % 8 != 0 || reserved < 40 {
        return Err("blocks are not aligned".into());
    }
    let block = |from: u32, len: u32| {
        let range = from as usize..(from as usize).saturating_add(len as usize);
        blob.get(range).ok_or_else(|| format!("a block at {from:#x} of {len:#x} bytes"))
    };
    // Reserved ranges: pairs of 64 bits, the last one zero.
    let mut at = reserved as usize;
    while blob.get(at..at + 16).ok_or("reserved ranges do not end")?.iter().any(|b| *b != 0) {
        at += 16;
    }
    let mut reader =
        Reader { structure: block(structure, structure_len)?, strings: block(strings, strings_len)?, at: 0 };
    if reader.next()? != BEGIN_NODE {
        return Err("no root".into());
    }
    let root = reader.node(0)?;
    if reader.next()? != END || reader.at != reader.structure.len() {
        return Err("something follows the root".into());
    }
    Ok(root)
}

impl Node {
    /// A property's value.
    pub fn get(&self, name: &str) -> Option<&[u8]> {
        self.properties.iter().find(|p| p.0 == name).map(|p| p.1.as_slice())
    }

    /// A property's value as 32-bit cells.
    pub fn cells(&self, name: &str) -> Option<Vec<u32>> {
        let value = self.get(name)?;
        assert_eq!(value.len() % 4, 0, "`{name}` of `{}`", self.name);
        Some(value.chunks_exact(4).map(|c| u32::from_be_bytes([c[0], c[1], c[2], c[3]])).collect())
    }

    /// A child by its name without unit address.
    pub fn child(&self, stem: &str) -> Option<&Node> {
        self.children.iter().find(|c| c.name.split('@').next() == Some(stem))
    }

    /// Itself and all below it.
    pub fn all(&self) -> Vec<&Node> {
        std::iter::once(self).chain(self.children.iter().flat_map(Node::all)).collect()
    }
}
