//! Programs for [`Driver`]s, made from bytes with their structure: requests that are nearly right.

use arbitrary::{Arbitrary, Unstructured};

use crate::driver::{Driver, RAM, RAM_SIZE, SIZE};

const NEXT: u16 = 1;
const WRITE: u16 = 2;
const INDIRECT: u16 = 4;
/// Most operations of a program.
const MAX_OPS: usize = 48;

/// What a buffer holds before the device sees it.
#[derive(Debug, Clone)]
pub enum Content {
    /// Anything.
    Raw([u8; 16]),
    /// The header of a block request.
    Block {
        /// Its type.
        kind: u8,
        /// Its sector.
        sector: u8,
    },
    /// A range to discard or zero.
    Range {
        /// First sector.
        sector: u16,
        /// How many.
        sectors: u32,
        /// Flags.
        flags: u8,
    },
    /// A network header.
    Packet {
        /// Flags.
        flags: u8,
        /// Kind of segmentation.
        gso: u8,
        /// Length of headers.
        header: u16,
        /// Segment size.
        size: u16,
        /// Where the checksum starts and goes.
        checksum: [u16; 2],
    },
    /// A command for the network device's control queue.
    Command {
        /// Its class.
        class: u8,
        /// The command.
        command: u8,
        /// What follows.
        data: [u8; 8],
    },
    /// A control message of the console.
    Port {
        /// The port.
        id: u8,
        /// The event.
        event: u8,
        /// Its value.
        value: u8,
    },
    /// Page frames.
    Pages([u16; 8]),
}

impl<'a> Arbitrary<'a> for Content {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? % 7 {
            0 => Self::Raw(u.arbitrary()?),
            1 => Self::Block { kind: u.arbitrary()?, sector: u.arbitrary()? },
            2 => Self::Range { sector: u.arbitrary()?, sectors: u.arbitrary()?, flags: u.arbitrary()? },
            3 => Self::Packet {
                flags: u.arbitrary()?,
                gso: u.arbitrary()?,
                header: u.arbitrary()?,
                size: u.arbitrary()?,
                checksum: u.arbitrary()?,
            },
            4 => Self::Command { class: u.arbitrary()?, command: u.arbitrary()?, data: u.arbitrary()? },
            5 => Self::Port { id: u.arbitrary()?, event: u.arbitrary()?, value: u.arbitrary()? },
            _ => Self::Pages(u.arbitrary()?),
        })
    }
}

impl Content {
    fn bytes(&self) -> Vec<u8> {
        let mut out = Vec::new();
        match self {
            Self::Raw(bytes) => out.extend(bytes),
            Self::Block { kind, sector } => {
                let kind = [0, 1, 4, 8, 11, 13, u32::from(*kind)][usize::from(kind % 7)];
                out.extend(kind.to_le_bytes());
                out.extend([0; 4]);
                out.extend(u64::from(*sector).to_le_bytes());
            }
            Self::Range { sector, sectors, flags } => {
                out.extend(u64::from(*sector).to_le_bytes());
                out.extend(sectors.to_le_bytes());
                out.extend(u32::from(*flags).to_le_bytes());
            }
            Self::Packet { flags, gso, header, size, checksum } => {
                out.extend([*flags, *gso]);
                [header, size, &checksum[0], &checksum[1]].iter().for_each(|n| out.extend(n.to_le_bytes()));
                out.extend([0; 2]);
            }
            Self::Command { class, command, data } => {
                out.extend([class % 8, command % 8]);
                out.extend(data);
            }
            Self::Port { id, event, value } => {
                out.extend(u32::from(*id % 4).to_le_bytes());
                out.extend(u16::from(*event % 10).to_le_bytes());
                out.extend(u16::from(*value).to_le_bytes());
            }
            Self::Pages(frames) => {
                frames.iter().for_each(|n| out.extend(((RAM >> 12) as u32 + u32::from(*n)).to_le_bytes()));
            }
        }
        out
    }
}

/// One buffer of a chain.
#[derive(Debug, Clone)]
pub struct Part {
    write: bool,
    at: u8,
    len: u16,
    content: Content,
}

impl<'a> Arbitrary<'a> for Part {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(Self { write: u.arbitrary()?, at: u.arbitrary()?, len: u.arbitrary()?, content: u.arbitrary()? })
    }
}

impl Part {
    fn address(&self) -> u64 {
        match self.at {
            // The last bytes of RAM, none at all, and the rings.
            255 => RAM + RAM_SIZE - 8,
            254 => RAM + RAM_SIZE + 0x1000,
            253 => RAM + 0x400,
            252 => u64::MAX - 16,
            at => RAM + 0x1_0000 + 0x400 * u64::from(at),
        }
    }

    fn len(&self) -> u32 {
        // Mostly what the content needs; sometimes far too much.
        match self.len {
            0xff00.. => u32::MAX - u32::from(self.len & 0xff),
            0x8000..0xff00 => self.content.bytes().len() as u32,
            len => u32::from(len % 0x1800),
        }
    }

    fn flags(&self) -> u16 {
        if self.write { WRITE } else { 0 }
    }
}

/// One thing that a driver, the host or the VM does.
#[derive(Debug, Clone)]
pub enum Op {
    /// A request as a driver makes it.
    Request {
        /// The queue.
        queue: u8,
        /// First descriptor.
        head: u8,
        /// Through a table of its own.
        indirect: bool,
        /// Its buffers.
        parts: Vec<Part>,
    },
    /// A descriptor as no driver makes it.
    Descriptor {
        /// The queue.
        queue: u8,
        /// Which.
        index: u8,
        /// Address, less that of RAM.
        address: u32,
        /// Length.
        len: u32,
        /// Flags.
        flags: u8,
        /// The next one.
        next: u8,
    },
    /// The rings themselves are written.
    Ring {
        /// The queue.
        queue: u8,
        /// Where.
        at: u16,
        /// What.
        value: u16,
    },
    /// A notification.
    Kick(u8),
    /// A register is written.
    Write {
        /// Where.
        at: u16,
        /// What.
        value: u64,
        /// Logarithm of the size.
        size: u8,
    },
    /// A register is read.
    Read {
        /// Where.
        at: u16,
        /// Logarithm of the size.
        size: u8,
    },
    /// The device's config space is written.
    Config {
        /// Where.
        at: u8,
        /// What.
        value: u32,
        /// Logarithm of the size.
        size: u8,
    },
    /// PCI configuration space is written and read.
    Pci {
        /// Where.
        at: u8,
        /// What.
        value: u32,
        /// Logarithm of the size.
        size: u8,
    },
    /// An MSI-X vector is masked or not.
    Mask {
        /// Which.
        vector: u8,
        /// Masked.
        masked: bool,
    },
    /// Something comes from the host's side.
    Host(Vec<u8>),
    /// Pause, save, restore, resume.
    Saved,
    /// Set up again.
    Start(u32),
}

impl<'a> Arbitrary<'a> for Op {
    fn arbitrary(u: &mut Unstructured<'a>) -> arbitrary::Result<Self> {
        Ok(match u.arbitrary::<u8>()? % 12 {
            0 => Self::Request {
                queue: u.arbitrary()?,
                head: u.arbitrary()?,
                indirect: u.arbitrary()?,
                parts: u.arbitrary()?,
            },
            1 => Self::Descriptor {
                queue: u.arbitrary()?,
                index: u.arbitrary()?,
                address: u.arbitrary()?,
                len: u.arbitrary()?,
                flags: u.arbitrary()?,
                next: u.arbitrary()?,
            },
            2 => Self::Ring { queue: u.arbitrary()?, at: u.arbitrary()?, value: u.arbitrary()? },
            3 => Self::Kick(u.arbitrary()?),
            4 => Self::Write { at: u.arbitrary()?, value: u.arbitrary()?, size: u.arbitrary()? },
            5 => Self::Read { at: u.arbitrary()?, size: u.arbitrary()? },
            6 => Self::Config { at: u.arbitrary()?, value: u.arbitrary()?, size: u.arbitrary()? },
            7 => Self::Pci { at: u.arbitrary()?, value: u.arbitrary()?, size: u.arbitrary()? },
            8 => Self::Mask { vector: u.arbitrary()?, masked: u.arbitrary()? },
            9 => Self::Host(u.arbitrary()?),
            10 => Self::Saved,
            _ => Self::Start(u.arbitrary()?),
        })
    }
}

/// What the host's side of a device can do.
pub trait Peer {
    /// Something arrives for the guest.
    fn arrive(&self, bytes: &[u8]);
}

/// A device without another side.
#[derive(Debug, Clone, Copy)]
pub struct Alone;

impl Peer for Alone {
    fn arrive(&self, _bytes: &[u8]) {}
}

fn request(driver: &Driver, queue: u64, head: u16, indirect: bool, parts: &[Part]) {
    let ring = driver.ring(queue);
    let (table, first) = if indirect { (ring + 0xc00, 0) } else { (ring, head) };
    for (n, part) in parts.iter().enumerate() {
        let index = (first + n as u16) % SIZE;
        let more = if n + 1 < parts.len() { NEXT } else { 0 };
        driver.poke(part.address(), &part.content.bytes());
        let buffer = (part.address(), part.len());
        driver.descriptor(table + 16 * u64::from(index), buffer, part.flags() | more, (index + 1) % SIZE);
    }
    if indirect {
        let buffer = (table, 16 * parts.len() as u32);
        driver.descriptor(ring + 16 * u64::from(head), buffer, INDIRECT, 0);
    }
    driver.publish(queue, head);
    driver.kick(queue);
}

fn step(driver: &mut Driver, peer: &dyn Peer, op: &Op) {
    let length = |size: u8| 1usize << (size % 4);
    match op {
        Op::Request { queue, head, indirect, parts } => {
            let parts = parts.get(..usize::from(SIZE).min(parts.len())).unwrap_or(&[]);
            request(driver, u64::from(*queue), u16::from(*head) % SIZE, *indirect, parts);
        }
        Op::Descriptor { queue, index, address, len, flags, next } => {
            let at = driver.ring((*queue).into()) + 16 * u64::from(index % 16);
            driver.descriptor(
                at,
                (RAM + u64::from(*address), *len),
                u16::from(flags & 7),
                u16::from(next % 18),
            );
        }
        Op::Ring { queue, at, value } => {
            driver.poke(driver.ring((*queue).into()) + u64::from(at % 0x1000), &value.to_le_bytes());
        }
        Op::Kick(queue) => driver.kick((*queue).into()),
        Op::Write { at, value, size } => {
            driver.write((*at).into(), value.to_le_bytes().get(..length(*size)).unwrap_or(&[]));
        }
        Op::Read { at, size } => {
            driver.read((*at).into(), [0; 8].get_mut(..length(*size)).unwrap_or(&mut []));
        }
        Op::Config { at, value, size } => {
            let bytes = value.to_le_bytes();
            driver.write(driver.config_at() + u64::from(*at), bytes.get(..length(size % 3)).unwrap_or(&[]));
        }
        Op::Pci { at, value, size } => {
            let bytes = value.to_le_bytes();
            driver.write_pci((*at).into(), bytes.get(..length(size % 3)).unwrap_or(&[]));
            driver.read_pci((*at).into(), [0; 4].get_mut(..length(size % 3)).unwrap_or(&mut []));
        }
        Op::Mask { vector, masked } => {
            if let Some(table) = driver.msix_at() {
                driver.write(table + 16 * u64::from(vector % 16) + 12, &u32::from(*masked).to_le_bytes());
            }
        }
        Op::Host(bytes) => peer.arrive(bytes),
        Op::Saved => {
            driver.device.pause();
            let state = driver.device.save().expect("every state can be saved");
            driver.device.restore(&state).expect("a device takes its own state");
            driver.device.resume();
        }
        Op::Start(features) => driver.start(u64::from(*features) | 1 << 32),
    }
}

/// Runs the program in `data` on the driver.
pub fn run(driver: &mut Driver, peer: &dyn Peer, features: u64, data: &[u8]) {
    driver.start(features);
    let mut input = Unstructured::new(data);
    for _ in 0..MAX_OPS {
        if input.is_empty() {
            break;
        }
        let Ok(op) = Op::arbitrary(&mut input) else { break };
        step(driver, peer, &op);
    }
    driver.check();
}
