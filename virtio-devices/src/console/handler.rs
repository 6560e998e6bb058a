//! The console's queues, on its worker.

use std::os::fd::AsRawFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::control::{MESSAGE, PortInfo};
use super::{Shared, bit};
use crate::device::Interrupt;
use crate::queue::{HandlerError, QueueError, VirtQueue};
use crate::worker::{Activation, Handler, Watch};

/// Queue numbers of the control messages.
const CONTROL_RX: u16 = 2;
const CONTROL_TX: u16 = 3;
/// Tokens: a queue's number, or these.
const INPUT: u64 = 0x1000;
const CONTROL_WAKE: u64 = 0x2000;
/// Bytes of output taken from guest memory at a time.
const CHUNK: usize = 4096;

pub(super) struct ConsoleHandler {
    shared: Arc<Shared>,
    ports: Vec<PortInfo>,
    queues: Vec<VirtQueue>,
    interrupt: Option<Arc<dyn Interrupt>>,
}

/// The receive queue of a port (section 5.3.2); the transmit queue follows it.
fn receive_queue(port: usize) -> u16 {
    if port == 0 { 0 } else { 2 + 2 * port as u16 }
}

/// The port whose transmit queue is `queue`.
fn transmitting_port(queue: u16) -> Option<usize> {
    match queue {
        1 => Some(0),
        5.. if queue % 2 == 1 => Some(usize::from(queue - 3) / 2),
        _ => None,
    }
}

impl ConsoleHandler {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        let info =
            |p: &Arc<super::Port>| PortInfo { name: p.args.name.clone(), is_console: p.args.is_console };
        let ports = shared.ports.iter().map(info).collect();
        Self { shared, ports, queues: Vec::new(), interrupt: None }
    }

    fn queue(&mut self, index: u16) -> Option<&mut VirtQueue> {
        self.queues.iter_mut().find(|q| q.index() == index)
    }

    fn notify(&mut self, index: u16) -> Result<(), QueueError> {
        let Some(interrupt) = self.interrupt.clone() else { return Ok(()) };
        if let Some(queue) = self.queue(index)
            && queue.wants_interrupt()?
        {
            interrupt.queue(index);
        }
        Ok(())
    }

    /// Guest to host.
    fn transmit(&mut self, port: usize, index: u16) -> Result<(), QueueError> {
        let shared = Arc::clone(&self.shared);
        let Some(port) = shared.ports.get(port) else { return Ok(()) };
        let Some(queue) = self.queue(index) else { return Ok(()) };
        let mut budget = queue.size();
        let mut buf = [0; CHUNK];
        loop {
            while let Some(chain) = queue.pop()? {
                let mut reader = queue.reader(&chain);
                while reader.remaining() != 0 {
                    let n = reader.remaining().min(CHUNK as u64) as usize;
                    let some = buf.get_mut(..n).unwrap_or(&mut []);
                    reader.read(some)?;
                    port.args.backend.send(some);
                    shared.sent.fetch_add(n as u64, Ordering::Relaxed);
                }
                queue.push(chain.head, 0)?;
                budget -= 1;
                if budget == 0 {
                    queue.kick_again();
                    return self.notify(index);
                }
            }
            if !queue.enable_kicks()? {
                return self.notify(index);
            }
        }
    }

    /// Host to guest.
    fn receive(&mut self, at: usize) -> Result<(), QueueError> {
        let shared = Arc::clone(&self.shared);
        let Some(port) = shared.ports.get(at) else { return Ok(()) };
        let index = receive_queue(at);
        {
            let control = shared.control.lock();
            if control.multiport && !control.states.get(at).is_some_and(|s| s.open) {
                return Ok(());
            }
        }
        let Some(queue) = self.queue(index) else { return Ok(()) };
        let mut any = false;
        while port.has_input() {
            let Some(chain) = queue.pop()? else {
                if queue.enable_kicks()? {
                    continue;
                }
                break;
            };
            let mut writer = queue.writer(&chain);
            let data = port.take(writer.remaining().min(CHUNK as u64) as usize);
            if data.is_empty() && writer.remaining() == 0 {
                return Err(QueueError::Short { queue: index });
            }
            writer.write(&data)?;
            let written = writer.written();
            shared.received.fetch_add(u64::from(written), Ordering::Relaxed);
            queue.push(chain.head, written)?;
            any = true;
        }
        if any {
            port.args.backend.receiver_ready();
        }
        self.notify(index)
    }

    /// Control messages from the guest, and the answers.
    fn control(&mut self) -> Result<(), QueueError> {
        let shared = Arc::clone(&self.shared);
        let ports = self.ports.clone();
        if let Some(queue) = self.queue(CONTROL_TX) {
            let mut budget = queue.size();
            loop {
                while let Some(chain) = queue.pop()? {
                    let mut message = [0; MESSAGE];
                    queue.reader(&chain).read(&mut message)?;
                    shared.control.lock().receive(message, &ports, shared.size());
                    queue.push(chain.head, 0)?;
                    budget -= 1;
                    if budget == 0 {
                        queue.kick_again();
                        break;
                    }
                }
                if budget == 0 || !queue.enable_kicks()? {
                    break;
                }
            }
        }
        self.notify(CONTROL_TX)?;
        self.answer()?;
        // Ports may have been opened.
        for at in 0..ports.len() {
            self.receive(at)?;
        }
        Ok(())
    }

    fn answer(&mut self) -> Result<(), QueueError> {
        let shared = Arc::clone(&self.shared);
        if let Some(queue) = self.queue(CONTROL_RX) {
            while shared.control.lock().is_waiting() {
                let Some(chain) = queue.pop()? else {
                    if queue.enable_kicks()? {
                        continue;
                    }
                    break;
                };
                let Some(message) = shared.control.lock().next() else {
                    queue.undo_pop();
                    break;
                };
                let mut writer = queue.writer(&chain);
                if writer.remaining() < message.len() as u64 {
                    shared.control.lock().put_back(message);
                    return Err(QueueError::Short { queue: CONTROL_RX });
                }
                writer.write(&message)?;
                let written = writer.written();
                queue.push(chain.head, written)?;
            }
        }
        self.notify(CONTROL_RX)
    }

    fn queue_event(&mut self, index: u16, multiport: bool) -> Result<(), QueueError> {
        if multiport && index == CONTROL_TX {
            self.control()
        } else if multiport && index == CONTROL_RX {
            self.answer()
        } else if let Some(port) = transmitting_port(index) {
            self.transmit(port, index)
        } else {
            let port = if index == 0 { 0 } else { usize::from(index.saturating_sub(2)) / 2 };
            self.receive(port)
        }
    }

    fn multiport(&self) -> bool {
        self.shared.control.lock().multiport
    }
}

impl Handler for ConsoleHandler {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let multiport = activation.features & bit::MULTIPORT != 0;
        self.shared.control.lock().multiport = multiport;
        self.interrupt = Some(activation.interrupt);
        self.queues = activation.queues;
        for queue in &self.queues {
            watch.add(queue.kick().as_raw_fd(), u64::from(queue.index()))?;
        }
        for (n, port) in self.shared.ports.iter().enumerate() {
            watch.add(port.wake().as_raw_fd(), INPUT + n as u64)?;
        }
        watch.add(self.shared.control_wake.as_raw_fd(), CONTROL_WAKE)?;
        let indexes: Vec<u16> = self.queues.iter().map(VirtQueue::index).collect();
        for index in indexes {
            self.queue_event(index, multiport)?;
        }
        Ok(())
    }

    fn event(&mut self, token: u64, _watch: &Watch) -> Result<(), HandlerError> {
        match token {
            CONTROL_WAKE => self.answer()?,
            INPUT.. => {
                let at = (token - INPUT) as usize;
                // A byte stream that nobody has open drops its input, as a disconnected line does.
                let closed = {
                    let control = self.shared.control.lock();
                    control.multiport && control.states.get(at).is_some_and(|s| s.ready && !s.open)
                };
                match self.shared.ports.get(at) {
                    Some(port) if closed => {
                        port.discard();
                        port.args.backend.receiver_ready();
                    }
                    _ => self.receive(at)?,
                }
            }
            index => {
                let multiport = self.multiport();
                self.queue_event(index as u16, multiport)?;
            }
        }
        Ok(())
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        for queue in &self.queues {
            watch.remove(queue.kick().as_raw_fd());
        }
        for port in &self.shared.ports {
            watch.remove(port.wake().as_raw_fd());
        }
        watch.remove(self.shared.control_wake.as_raw_fd());
        self.interrupt = None;
        std::mem::take(&mut self.queues)
    }
}
