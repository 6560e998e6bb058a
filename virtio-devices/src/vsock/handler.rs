//! The worker: packets of the guest to UNIX sockets and back.

use std::collections::{BTreeMap, VecDeque};
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
use vm_memory::ByteValued;

use super::Shared;
use super::connection::{BUFFER, Connection, Ports, Taken};
use super::packet::{HEADER_LEN, HOST_CID, Header, SHUTDOWN_SEND, TYPE_STREAM, op};
use crate::device::Interrupt;
use crate::queue::{Chain, HandlerError, QueueError, VirtQueue, total_len};
use crate::worker::{Activation, Handler, Watch};

const LISTENER: u64 = 3;
const GREETING: u64 = 1 << 62;
const STREAM: u64 = 1 << 63;

/// Most connections, and most processes that have not said yet what they want.
const MAX_CONNECTIONS: usize = 1024;
const MAX_GREETINGS: usize = 64;
/// Most packets without data that wait for the guest's buffers. The guest's packets wait while there are so many.
const MAX_OUT: usize = 2048;
/// Most bytes of `CONNECT PORT`.
const MAX_LINE: usize = 32;
/// The first port that processes of the host get.
const FIRST_PORT: u32 = 1 << 30;
/// Most data bytes in one packet to the guest.
const MAX_DATA: usize = 64 * 1024;

struct Live {
    rx: Option<VirtQueue>,
    tx: Option<VirtQueue>,
    events: Option<VirtQueue>,
    interrupt: Arc<dyn Interrupt>,
}

struct Greeting {
    stream: UnixStream,
    line: Vec<u8>,
}

/// The worker's handler.
pub(super) struct Mux {
    cid: u64,
    listener: UnixListener,
    path: PathBuf,
    shared: Arc<Shared>,
    live: Option<Live>,
    connections: BTreeMap<Ports, (u64, Connection)>,
    /// Connections by their tokens.
    tokens: BTreeMap<u64, Ports>,
    greetings: BTreeMap<u64, Greeting>,
    /// Packets without data for the guest.
    out: VecDeque<Header>,
    /// The connection that was served last.
    last: Option<Ports>,
    next_token: u64,
    next_port: u32,
    data: Vec<u8>,
}

/// The next chain, if there is one; the driver says when there is another.
fn pop(queue: &mut VirtQueue) -> Result<Option<Chain>, QueueError> {
    loop {
        if let Some(chain) = queue.pop()? {
            return Ok(Some(chain));
        }
        if !queue.enable_kicks()? {
            return Ok(None);
        }
    }
}

/// Connects without ever waiting.
fn connect_to(path: &std::path::Path) -> io::Result<UnixStream> {
    let address = SocketAddrUnix::new(path)?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let fd = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&fd, &address)?;
    Ok(fd.into())
}

impl Mux {
    pub(super) fn new(cid: u64, (listener, path): (UnixListener, PathBuf), shared: Arc<Shared>) -> Self {
        Self {
            cid,
            listener,
            path,
            shared,
            live: None,
            connections: BTreeMap::new(),
            tokens: BTreeMap::new(),
            greetings: BTreeMap::new(),
            out: VecDeque::new(),
            last: None,
            next_token: 0,
            next_port: FIRST_PORT,
            data: vec![0; MAX_DATA],
        }
    }

    fn forget(&mut self) {
        self.connections.clear();
        self.tokens.clear();
        self.out.clear();
    }

    fn header(&self, ports: Ports, op: u16) -> Header {
        Header {
            src_cid: HOST_CID,
            dst_cid: self.cid,
            src_port: ports.host,
            dst_port: ports.guest,
            kind: TYPE_STREAM,
            op,
            buf_alloc: BUFFER,
            ..Header::default()
        }
    }

    /// A packet without data.
    fn say(&mut self, ports: Ports, op: u16, flags: u32) {
        let mut header = Header { flags, ..self.header(ports, op) };
        if let Some((_, connection)) = self.connections.get_mut(&ports) {
            let (buffer, taken) = connection.tell();
            (header.buf_alloc, header.fwd_cnt) = (buffer, taken);
        }
        self.out.push_back(header);
    }

    fn remove(&mut self, ports: Ports) {
        if let Some((token, _)) = self.connections.remove(&ports) {
            self.tokens.remove(&token);
        }
    }

    /// Ends a connection on both sides.
    fn reset(&mut self, ports: Ports) {
        self.say(ports, op::RST, 0);
        self.remove(ports);
    }

    /// False if there is no room for another.
    fn add(&mut self, ports: Ports, connection: Connection, watch: &Watch) -> Result<bool, HandlerError> {
        if self.connections.len() >= MAX_CONNECTIONS {
            return Ok(false);
        }
        self.next_token += 1;
        let token = self.next_token;
        watch.add_both(connection.stream.as_raw_fd(), STREAM | token)?;
        self.tokens.insert(token, ports);
        self.connections.insert(ports, (token, connection));
        Ok(true)
    }

    /// Processes that want to reach the guest.
    fn accept(&mut self, watch: &Watch) -> Result<(), HandlerError> {
        while let Ok((stream, _)) = self.listener.accept() {
            if self.greetings.len() >= MAX_GREETINGS || stream.set_nonblocking(true).is_err() {
                continue;
            }
            self.next_token += 1;
            let token = self.next_token;
            watch.add(stream.as_raw_fd(), GREETING | token)?;
            self.greetings.insert(token, Greeting { stream, line: Vec::new() });
        }
        Ok(())
    }

    /// A process says which port it wants.
    fn greet(&mut self, token: u64, watch: &Watch) -> Result<(), HandlerError> {
        let Some(mut greeting) = self.greetings.remove(&token) else { return Ok(()) };
        loop {
            let mut byte = [0];
            match greeting.stream.read(&mut byte) {
                Ok(1) if byte == *b"\n" => break,
                Ok(1) if greeting.line.len() < MAX_LINE => greeting.line.extend(byte),
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.greetings.insert(token, greeting);
                    return Ok(());
                }
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                // It is gone, or says something else.
                _ => return Ok(()),
            }
        }
        let line = String::from_utf8_lossy(&greeting.line);
        let port = line.trim_end().strip_prefix("CONNECT ").and_then(|port| port.trim().parse().ok());
        let Some(guest) = port else { return Ok(()) };
        let host = loop {
            let host = self.next_port;
            self.next_port = host.wrapping_add(1).max(FIRST_PORT);
            if !self.connections.contains_key(&Ports { host, guest }) {
                break host;
            }
        };
        let ports = Ports { host, guest };
        watch.remove(greeting.stream.as_raw_fd());
        if self.add(ports, Connection::new(greeting.stream, false), watch)? {
            self.say(ports, op::REQUEST, 0);
        }
        Ok(())
    }

    /// A packet of the guest.
    fn packet(&mut self, queue: &VirtQueue, chain: &Chain, watch: &Watch) -> Result<(), HandlerError> {
        let mut reader = queue.reader(chain);
        let header = reader.read_obj::<Header>()?.swapped();
        let ports = Ports { host: header.dst_port, guest: header.src_port };
        let whole = u64::from(header.len) <= reader.remaining();
        let addressed = header.src_cid == self.cid && header.dst_cid == HOST_CID;
        if !addressed || !whole || header.kind != TYPE_STREAM {
            if header.op != op::RST && addressed {
                let answer = Header { kind: header.kind, ..self.header(ports, op::RST) };
                self.out.push_back(answer);
                self.remove(ports);
            }
            return Ok(());
        }
        if header.op == op::REQUEST {
            return self.request(ports, &header, watch);
        }
        let Some((_, connection)) = self.connections.get_mut(&ports) else {
            if header.op != op::RST {
                self.reset(ports);
            }
            return Ok(());
        };
        connection.credit(header.buf_alloc, header.fwd_cnt);
        let good = match header.op {
            op::RST => {
                self.remove(ports);
                return Ok(());
            }
            op::RESPONSE if !connection.open => {
                connection.open = true;
                // Nothing was written yet, so there is room.
                connection.stream.write_all(format!("OK {}\n", ports.host).as_bytes()).is_ok()
            }
            op::RW if connection.open && header.len <= BUFFER => {
                let mut data = vec![0; header.len as usize];
                reader.read(&mut data)?;
                self.shared.from_guest.fetch_add(u64::from(header.len), Ordering::Relaxed);
                connection.push(&data)
            }
            op::SHUTDOWN => {
                connection.shut(header.flags);
                true
            }
            op::CREDIT_UPDATE => true,
            op::CREDIT_REQUEST => {
                self.say(ports, op::CREDIT_UPDATE, 0);
                true
            }
            _ => false,
        };
        if good {
            self.flush(ports);
        } else {
            self.reset(ports);
        }
        Ok(())
    }

    /// The guest wants to reach a process.
    fn request(&mut self, ports: Ports, header: &Header, watch: &Watch) -> Result<(), HandlerError> {
        if self.connections.contains_key(&ports) {
            self.reset(ports);
            return Ok(());
        }
        let mut path = self.path.clone().into_os_string();
        path.push(format!("_{}", ports.host));
        let stream = match connect_to(path.as_ref()) {
            Ok(stream) => stream,
            Err(error) => {
                tracing::debug!(path = %path.display(), %error, "nobody takes a connection of the guest");
                self.reset(ports);
                return Ok(());
            }
        };
        let mut connection = Connection::new(stream, true);
        connection.credit(header.buf_alloc, header.fwd_cnt);
        let answer = if self.add(ports, connection, watch)? { op::RESPONSE } else { op::RST };
        self.say(ports, answer, 0);
        Ok(())
    }

    /// Gives a process what waits for it.
    fn flush(&mut self, ports: Ports) {
        let Some((_, connection)) = self.connections.get_mut(&ports) else { return };
        if !connection.flush() || connection.is_over() {
            self.reset(ports);
        } else if connection.has_news() {
            self.say(ports, op::CREDIT_UPDATE, 0);
        }
    }

    /// The connection that has its turn to send.
    fn turn(&mut self) -> Option<Ports> {
        let mut asks = Vec::new();
        let mut found = None;
        let after = self.connections.iter().filter(|(ports, _)| Some(**ports) > self.last);
        let before = self.connections.iter().filter(|(ports, _)| Some(**ports) <= self.last);
        for (ports, (_, connection)) in after.chain(before) {
            if !connection.sends() {
                continue;
            }
            if connection.room() != 0 {
                found = Some(*ports);
                break;
            }
            if !connection.asked {
                asks.push(*ports);
            }
        }
        for ports in asks {
            self.say(ports, op::CREDIT_REQUEST, 0);
            if let Some((_, connection)) = self.connections.get_mut(&ports) {
                connection.asked = true;
            }
        }
        self.last = found.or(self.last);
        found
    }

    /// Fills the guest's buffers.
    fn fill(&mut self, queue: &mut VirtQueue) -> Result<(), HandlerError> {
        loop {
            let turn = if self.out.is_empty() { self.turn() } else { None };
            if self.out.is_empty() && turn.is_none() {
                return Ok(());
            }
            let Some(chain) = pop(queue)? else { return Ok(()) };
            let room = total_len(&chain.writable).saturating_sub(HEADER_LEN as u64);
            if let Some(header) = self.out.pop_front() {
                write(queue, &chain, header, &[])?;
                continue;
            }
            let Some(ports) = turn else { continue };
            let Some((_, connection)) = self.connections.get_mut(&ports) else { continue };
            let most = u64::from(connection.room()).min(room).min(MAX_DATA as u64) as usize;
            if most == 0 {
                return Err(QueueError::Short { queue: queue.index() }.into());
            }
            match connection.read(self.data.get_mut(..most).unwrap_or_default()) {
                Taken::Bytes(n) => {
                    let (buf_alloc, fwd_cnt) = connection.tell();
                    let header = Header { len: n as u32, buf_alloc, fwd_cnt, ..self.header(ports, op::RW) };
                    write(queue, &chain, header, self.data.get(..n).unwrap_or_default())?;
                    self.shared.to_guest.fetch_add(n as u64, Ordering::Relaxed);
                }
                Taken::Nothing => queue.undo_pop(),
                Taken::End => {
                    queue.undo_pop();
                    connection.ended = true;
                    let over = connection.is_over();
                    if over {
                        self.reset(ports);
                    } else {
                        self.say(ports, op::SHUTDOWN, SHUTDOWN_SEND);
                    }
                }
            }
        }
    }

    /// Takes the guest's packets; false if some have to wait.
    fn take(&mut self, queue: &mut VirtQueue, watch: &Watch) -> Result<bool, HandlerError> {
        while self.out.len() < MAX_OUT {
            let Some(chain) = pop(queue)? else { return Ok(true) };
            self.packet(queue, &chain, watch)?;
            queue.push(chain.head, 0)?;
        }
        Ok(false)
    }

    /// Tells the driver that all its connections are lost, if they are.
    fn tell_lost(&self, queue: &mut VirtQueue) -> Result<(), HandlerError> {
        if !self.shared.lost.load(Ordering::SeqCst) {
            return Ok(());
        }
        let Some(chain) = pop(queue)? else { return Ok(()) };
        // VIRTIO_VSOCK_EVENT_TRANSPORT_RESET
        let mut writer = queue.writer(&chain);
        writer.write(&0u32.to_le_bytes())?;
        let written = writer.written();
        queue.push(chain.head, written)?;
        self.shared.lost.store(false, Ordering::SeqCst);
        Ok(())
    }

    /// Moves all that can be moved.
    fn run(&mut self, watch: &Watch) -> Result<(), HandlerError> {
        let Some(mut live) = self.live.take() else { return Ok(()) };
        let result = self.run_live(&mut live, watch);
        self.live = Some(live);
        result
    }

    fn run_live(&mut self, live: &mut Live, watch: &Watch) -> Result<(), HandlerError> {
        if let Some(events) = &mut live.events {
            self.tell_lost(events)?;
        }
        loop {
            let all = match &mut live.tx {
                Some(queue) => self.take(queue, watch)?,
                None => true,
            };
            if let Some(queue) = &mut live.rx {
                self.fill(queue)?;
            }
            if all || self.out.len() >= MAX_OUT {
                break;
            }
        }
        for queue in [&mut live.rx, &mut live.tx, &mut live.events].into_iter().flatten() {
            if queue.wants_interrupt()? {
                live.interrupt.queue(queue.index());
            }
        }
        Ok(())
    }
}

/// Fills one of the guest's buffers with a packet.
fn write(queue: &mut VirtQueue, chain: &Chain, header: Header, data: &[u8]) -> Result<(), QueueError> {
    let mut writer = queue.writer(chain);
    writer.write(header.swapped().as_slice())?;
    writer.write(data)?;
    let written = writer.written();
    queue.push(chain.head, written)
}

impl Handler for Mux {
    fn start(&mut self, activation: Activation, watch: &Watch) -> Result<(), HandlerError> {
        let lost = self.shared.lost.load(Ordering::SeqCst);
        if self.shared.forget.swap(false, Ordering::SeqCst) || lost {
            self.forget();
        }
        let interrupt = activation.interrupt;
        let mut live = Live { rx: None, tx: None, events: None, interrupt };
        for queue in activation.queues {
            watch.add(queue.kick().as_raw_fd(), u64::from(queue.index()))?;
            match queue.index() {
                0 => live.rx = Some(queue),
                1 => live.tx = Some(queue),
                _ => live.events = Some(queue),
            }
        }
        self.live = Some(live);
        watch.add(self.listener.as_raw_fd(), LISTENER)?;
        // What happened while nobody looked.
        for token in self.greetings.keys().copied().collect::<Vec<_>>() {
            self.greet(token, watch)?;
        }
        for ports in self.connections.keys().copied().collect::<Vec<_>>() {
            if let Some((_, connection)) = self.connections.get_mut(&ports) {
                connection.readable = true;
            }
            self.flush(ports);
        }
        self.accept(watch)?;
        self.run(watch)
    }

    fn event(&mut self, token: u64, watch: &Watch) -> Result<(), HandlerError> {
        if token & STREAM != 0 {
            if let Some(ports) = self.tokens.get(&(token & !STREAM)).copied() {
                if let Some((_, connection)) = self.connections.get_mut(&ports) {
                    connection.readable = true;
                }
                self.flush(ports);
            }
        } else if token & GREETING != 0 {
            self.greet(token & !GREETING, watch)?;
        } else if token == LISTENER {
            self.accept(watch)?;
        }
        self.run(watch)
    }

    fn stop(&mut self, watch: &Watch) -> Vec<VirtQueue> {
        watch.remove(self.listener.as_raw_fd());
        let Some(live) = self.live.take() else { return Vec::new() };
        let queues: Vec<_> = [live.rx, live.tx, live.events].into_iter().flatten().collect();
        for queue in &queues {
            watch.remove(queue.kick().as_raw_fd());
        }
        queues
    }
}
