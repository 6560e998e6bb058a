//! The control queue (section 5.1.6.5).

use holdfast_net::MacAddr;

use super::{Shared, bit, offloads};
use crate::queue::{Chain, HandlerError, QueueError, Reader, VirtQueue};

const CLASS_RX: u8 = 0;
const CLASS_MAC: u8 = 1;
const CLASS_ANNOUNCE: u8 = 3;
const CLASS_MQ: u8 = 4;
const CLASS_GUEST_OFFLOADS: u8 = 5;

const MAC_TABLE_SET: u8 = 0;
const MAC_ADDR_SET: u8 = 1;
const ANNOUNCE_ACK: u8 = 0;
const MQ_PAIRS_SET: u8 = 0;
const OFFLOADS_SET: u8 = 0;
/// Promiscuous to no-broadcast.
const RX_COMMANDS: std::ops::RangeInclusive<u8> = 0..=5;

const OK: u8 = 0;
const ERROR: u8 = 1;

/// Serves the commands that wait.
pub(super) fn serve_all(shared: &Shared, queue: &mut VirtQueue, features: u64) -> Result<(), HandlerError> {
    let mut budget = queue.size();
    loop {
        while budget != 0
            && let Some(chain) = queue.pop()?
        {
            let written = serve(shared, queue, &chain, features)?;
            queue.push(chain.head, written)?;
            budget -= 1;
        }
        if budget == 0 {
            queue.kick_again();
            return Ok(());
        }
        if !queue.enable_kicks()? {
            return Ok(());
        }
    }
}

/// Carries out the command in `chain` and writes its acknowledgement; returns the bytes written.
///
/// # Errors
/// [`QueueError::Short`] if there is no room for the acknowledgement.
fn serve(shared: &Shared, queue: &VirtQueue, chain: &Chain, features: u64) -> Result<u32, QueueError> {
    let mut reader = queue.reader(chain);
    // A command that is cut off is answered like any other wrong one.
    let ack = match command(shared, &mut reader, features) {
        Ok(true) => OK,
        Ok(false) | Err(_) => ERROR,
    };
    let mut writer = queue.writer(chain);
    writer.write(&[ack])?;
    Ok(writer.written())
}

fn command(shared: &Shared, reader: &mut Reader<'_>, features: u64) -> Result<bool, QueueError> {
    let [class, command] = reader.read_obj::<[u8; 2]>()?;
    match (class, command) {
        // The interface filters nothing: the driver gets what it asks for, and may get more.
        (CLASS_RX, command) if RX_COMMANDS.contains(&command) => {
            reader.read_obj::<u8>()?;
            Ok(features & bit::CTRL_RX != 0)
        }
        (CLASS_MAC, MAC_TABLE_SET) => Ok(features & bit::CTRL_RX != 0),
        (CLASS_MAC, MAC_ADDR_SET) => {
            let mac = MacAddr(reader.read_obj::<[u8; 6]>()?);
            let fine = features & bit::CTRL_MAC_ADDR != 0 && !mac.is_multicast();
            if fine {
                shared.state.lock().mac = mac;
            }
            Ok(fine)
        }
        (CLASS_ANNOUNCE, ANNOUNCE_ACK) => {
            shared.state.lock().announce = false;
            Ok(features & bit::GUEST_ANNOUNCE != 0)
        }
        (CLASS_MQ, MQ_PAIRS_SET) => {
            let pairs = u16::from_le_bytes(reader.read_obj::<[u8; 2]>()?);
            if features & bit::MQ == 0 || !(1..=shared.max_pairs).contains(&pairs) {
                return Ok(false);
            }
            if let Err(error) = shared.enable_queues(pairs) {
                tracing::warn!(interface = shared.backend.name(), %error, "cannot switch queues");
                return Ok(false);
            }
            shared.state.lock().pairs = pairs;
            Ok(true)
        }
        (CLASS_GUEST_OFFLOADS, OFFLOADS_SET) => {
            let wanted = u64::from_le_bytes(reader.read_obj::<[u8; 8]>()?);
            let allowed = features & bit::GUEST_OFFLOADS;
            if features & bit::CTRL_GUEST_OFFLOADS == 0 || wanted & !allowed != 0 {
                return Ok(false);
            }
            if let Err(error) = shared.backend.set_offloads(offloads(wanted)) {
                tracing::warn!(interface = shared.backend.name(), %error, "cannot switch offloads");
                return Ok(false);
            }
            shared.state.lock().offloads = Some(wanted);
            Ok(true)
        }
        _ => Ok(false),
    }
}
