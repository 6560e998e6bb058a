//! The master key and the slots that passwords open.

use std::io;

use holdfast_clock::{HostRandom, RandomSource};
use subtle::ConstantTimeEq;
use zeroize::Zeroizing;

use super::header::{Header, LENGTH, SLOTS};
use crate::crypto::{SECTOR, SectorCipher};
use crate::{BlockError, BlockNode};

/// Least iterations of a slot and of the master key's digest.
const MIN_ITERATIONS: u64 = 1000;

/// A header, where it is.
#[derive(Debug)]
pub struct Volume<'a> {
    /// The node with header and key material.
    pub node: &'a dyn BlockNode,
    /// Where in it, in bytes.
    pub base: u64,
}

/// A change of key slots (`state=`).
#[derive(Clone, Default)]
pub struct SlotChange<'a> {
    /// Slots are to be opened by the new password; otherwise they are erased.
    pub activate: bool,
    /// The slot that is meant.
    pub slot: Option<usize>,
    /// Slots that this password opens are meant.
    pub old: Option<&'a [u8]>,
    /// The new password.
    pub new: Option<&'a [u8]>,
    /// How long a password is to be worked on, in milliseconds.
    pub iter_time: u64,
    /// The last slot may be erased, an active one replaced.
    pub force: bool,
}

impl std::fmt::Debug for SlotChange<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // Not the passwords.
        f.debug_struct("SlotChange")
            .field("activate", &self.activate)
            .field("slot", &self.slot)
            .finish_non_exhaustive()
    }
}

pub(crate) fn random(buf: &mut [u8]) -> Result<(), BlockError> {
    HostRandom.fill(buf).map_err(|e| BlockError::Option(format!("no random numbers: {e}")))
}

fn refused<T>(text: impl Into<String>) -> Result<T, BlockError> {
    Err(BlockError::Option(text.into()))
}

/// Iterations for so many milliseconds, within what headers can have.
pub(super) fn iterations(header: &Header, len: usize, milliseconds: u64) -> Result<u32, BlockError> {
    let n = header.hash.calibrate(len, milliseconds).max(MIN_ITERATIONS);
    match u32::try_from(n) {
        Ok(n) if n <= 400_000_000 => Ok(n),
        _ => refused(format!("PBKDF iterations {n} larger than what can be: a shorter iter-time is needed")),
    }
}

impl Volume<'_> {
    fn host(&self, what: &'static str) -> impl FnOnce(io::Error) -> BlockError {
        let path = self.node.path().unwrap_or_default();
        move |source| BlockError::Host { path, what, source }
    }

    /// Reads the header.
    ///
    /// # Errors
    /// As [`Header::parse`], and the host's.
    pub fn header(&self) -> Result<Header, BlockError> {
        let mut bytes = [0; LENGTH];
        self.node.read_at(self.base, &mut bytes).map_err(self.host("Unable to read LUKS header"))?;
        Header::parse(&bytes)
    }

    /// Writes the header, durably.
    ///
    /// # Errors
    /// The host's.
    pub fn store(&self, header: &Header) -> Result<(), BlockError> {
        let fail = "Unable to write LUKS header";
        self.node.write_at(self.base, &header.to_bytes()).map_err(self.host(fail))?;
        self.node.flush().map_err(self.host(fail))
    }

    /// The master key, if `password` opens slot `n`.
    fn open_slot(
        &self,
        header: &Header,
        n: usize,
        password: &[u8],
    ) -> Result<Option<Zeroizing<Vec<u8>>>, BlockError> {
        let Some(slot) = header.slots.get(n).filter(|s| s.active) else { return Ok(None) };
        let len = header.cipher.key_bytes();
        let mut key = Zeroizing::new(vec![0; len]);
        header.hash.pbkdf2(password, &slot.salt, slot.iterations, &mut key);
        let mut material = Zeroizing::new(vec![0; header.material() as usize]);
        let at = self.base + u64::from(slot.offset) * SECTOR as u64;
        self.node.read_at(at, &mut material).map_err(self.host("Unable to read key material"))?;
        let cipher = SectorCipher::new(header.cipher, &key).map_err(BlockError::Format)?;
        cipher.decrypt(0, &mut material);
        let split = material.get(..len * slot.stripes as usize).unwrap_or_default();
        let master = header.hash.merge(split, len);
        let mut digest = [0; 20];
        header.hash.pbkdf2(&master, &header.digest_salt, header.digest_iterations, &mut digest);
        Ok(bool::from(digest.ct_eq(&header.digest)).then_some(master))
    }

    /// The master key.
    ///
    /// # Errors
    /// [`BlockError::Option`] if the password opens no slot; the host's.
    pub fn unlock(&self, header: &Header, password: &[u8]) -> Result<Zeroizing<Vec<u8>>, BlockError> {
        for n in 0..SLOTS {
            if let Some(key) = self.open_slot(header, n, password)? {
                return Ok(key);
            }
        }
        refused("Invalid password, cannot unlock any keyslot")
    }

    /// Writes what a slot needs to be opened by `password`; the header is the caller's to write.
    pub(super) fn fill_slot(
        &self,
        header: &mut Header,
        n: usize,
        (master, password): (&[u8], &[u8]),
        iter_time: u64,
    ) -> Result<(), BlockError> {
        let len = header.cipher.key_bytes();
        let count = iterations(header, len, iter_time)?;
        let (cipher_spec, hash, bytes) = (header.cipher, header.hash, header.material() as usize);
        let Some(slot) = header.slots.get_mut(n) else { return refused(format!("Invalid slot {n}")) };
        slot.iterations = count;
        random(&mut slot.salt)?;
        let mut key = Zeroizing::new(vec![0; len]);
        hash.pbkdf2(password, &slot.salt, count, &mut key);
        let mut material = Zeroizing::new(vec![0; bytes]);
        let split = material.get_mut(..len * slot.stripes as usize).unwrap_or_default();
        random(split)?;
        hash.split(master, split);
        let cipher = SectorCipher::new(cipher_spec, &key).map_err(BlockError::Format)?;
        cipher.encrypt(0, &mut material);
        let at = self.base + u64::from(slot.offset) * SECTOR as u64;
        slot.active = true;
        self.node.write_at(at, &material).map_err(self.host("Unable to write key material"))
    }

    /// Overwrites a slot's key material, and takes it out of the header first.
    fn erase_slot(&self, header: &mut Header, n: usize) -> Result<(), BlockError> {
        let bytes = header.material() as usize;
        let Some(slot) = header.slots.get_mut(n) else { return refused(format!("Invalid slot {n}")) };
        (slot.active, slot.iterations, slot.salt) = (false, 0, [0; 32]);
        let at = self.base + u64::from(slot.offset) * SECTOR as u64;
        self.store(header)?;
        let mut noise = vec![0; bytes];
        for _ in 0..2 {
            random(&mut noise)?;
            self.node.write_at(at, &noise).map_err(self.host("Unable to erase key material"))?;
            self.node.flush().map_err(self.host("Unable to erase key material"))?;
        }
        Ok(())
    }

    /// Changes key slots.
    ///
    /// # Errors
    /// [`BlockError::Option`] with what does not fit; the host's.
    pub fn change(&self, master: &[u8], change: &SlotChange<'_>) -> Result<(), BlockError> {
        let mut header = self.header()?;
        if let Some(n) = change.slot.filter(|n| *n >= SLOTS) {
            return refused(format!("Invalid slot {n} specified, should be between 0 and {}", SLOTS - 1));
        }
        if change.activate {
            self.activate(&mut header, master, change)
        } else {
            self.deactivate(&mut header, change)
        }
    }

    fn activate(
        &self,
        header: &mut Header,
        master: &[u8],
        change: &SlotChange<'_>,
    ) -> Result<(), BlockError> {
        let Some(new) = change.new else { return refused("'new-secret' is required to activate a keyslot") };
        if change.old.is_some() {
            return refused("'old-secret' must not be given when activating keyslots");
        }
        let n = match change.slot {
            Some(n) => n,
            None => match header.slots.iter().position(|s| !s.active) {
                Some(n) => n,
                None => return refused("Can't add a keyslot - all keyslots are in use"),
            },
        };
        if header.slots.get(n).is_some_and(|s| s.active) && !change.force {
            return refused(format!("Refusing to overwrite active keyslot {n} - please erase it first"));
        }
        self.fill_slot(header, n, (master, new), change.iter_time)?;
        self.node.flush().map_err(self.host("Unable to write key material"))?;
        self.store(header)
    }

    fn deactivate(&self, header: &mut Header, change: &SlotChange<'_>) -> Result<(), BlockError> {
        if change.new.is_some() {
            return refused("'new-secret' must not be given when erasing keyslots");
        }
        let active = header.slots.iter().filter(|s| s.active).count();
        if let Some(n) = change.slot {
            if let Some(old) = change.old
                && self.open_slot(header, n, old)?.is_none()
            {
                return refused("This keyslot doesn't match the given (old) password");
            }
            let is_active = header.slots.get(n).is_some_and(|s| s.active);
            if !is_active && !change.force {
                return refused(format!("Given keyslot {n} is already erased (inactive)"));
            }
            if is_active && active == 1 && !change.force {
                return refused(format!(
                    "Attempt to erase the only active keyslot {n} which will erase all the data in the image irreversibly - refusing operation"
                ));
            }
            return self.erase_slot(header, n);
        }
        let Some(old) = change.old else {
            return refused(
                "To erase keyslot(s), either explicit keyslot index or the password currently contained in them must be given",
            );
        };
        let mut matching = Vec::new();
        for n in 0..SLOTS {
            if self.open_slot(header, n, old)?.is_some() {
                matching.push(n);
            }
        }
        if matching.is_empty() {
            return refused("No keyslots match given (old) password for erase operation");
        }
        if matching.len() == active && !change.force {
            return refused(
                "All the active keyslots match the (old) password that was given and erasing them will erase all the data in the image irreversibly - refusing operation",
            );
        }
        matching.into_iter().try_for_each(|n| self.erase_slot(header, n))
    }
}
