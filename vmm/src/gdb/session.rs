//! One debugger's session: what it sends, and what the VM does.

use std::io;

use gdbstub::common::Signal;
use gdbstub::stub::state_machine::GdbStubStateMachine as Machine;
use gdbstub::stub::{DisconnectReason, GdbStub, MultiThreadStopReason};

use super::Server;
use super::connection::{Connection, Ready, wait};
use super::target::{Registers, VmTarget, tid};
use crate::control::{DebugEvent, DebugStop, DebugTarget, DebugWhy, Origin, VmmShutdown};

/// A session that cannot go on.
#[derive(Debug, thiserror::Error)]
pub(super) enum SessionError {
    /// The socket fails.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// The debugger says what cannot be understood, or the VM does not answer.
    #[error("{0}")]
    Protocol(String),
}

/// Longest packet that is taken, in bytes.
const PACKET: usize = 0x4000;

/// Bytes that are read at once.
const CHUNK: usize = 4096;

/// What the debugger sent and nobody has looked at.
struct Input {
    connection: Connection,
    bytes: Vec<u8>,
    next: usize,
}

/// What comes first.
enum First {
    Byte(u8),
    Event(DebugEvent),
    /// The connection or the process ends.
    End,
}

impl Input {
    fn first(&mut self, server: &Server) -> io::Result<First> {
        loop {
            if let Some(event) = server.mailbox.take() {
                return Ok(First::Event(event));
            }
            if let Some(&byte) = self.bytes.get(self.next) {
                self.next += 1;
                return Ok(First::Byte(byte));
            }
            match wait(&self.connection, &server.stop, &server.mailbox.wake, None) {
                Ready::Stop => return Ok(First::End),
                Ready::Mail | Ready::Nothing => {}
                Ready::Connection => {
                    self.bytes.resize(CHUNK, 0);
                    let n = self.connection.read(&mut self.bytes)?;
                    self.bytes.truncate(n);
                    self.next = 0;
                    if n == 0 {
                        return Ok(First::End);
                    }
                }
            }
        }
    }
}

/// Serves the debugger until it leaves; gives how it did.
pub(super) fn run<R: Registers>(
    server: &Server,
    connection: Connection,
    vm: DebugTarget,
) -> Result<&'static str, SessionError> {
    let protocol = |e: &dyn std::fmt::Display| SessionError::Protocol(e.to_string());
    let mut input = Input { connection: connection.another()?, bytes: Vec::new(), next: 0 };
    let mut target = VmTarget::<R>::new(server.handle.clone(), server.mailbox.clone(), vm);
    let stub = GdbStub::builder(connection).packet_buffer_size(PACKET).build();
    let stub = stub.map_err(|e| protocol(&e))?;
    let mut machine = stub.run_state_machine(&mut target).map_err(|e| protocol(&e))?;
    loop {
        machine = match machine {
            Machine::Idle(idle) => match input.first(server)? {
                First::End => return Ok("the connection was closed"),
                First::Byte(byte) => idle.incoming_data(&mut target, byte).map_err(|e| protocol(&e))?,
                First::Event(DebugEvent::Ended(_)) => return Ok("the guest is off"),
                // It stands already, as far as the debugger knows.
                First::Event(DebugEvent::Stopped { .. }) => Machine::Idle(idle),
            },
            Machine::Running(running) => match input.first(server)? {
                First::End => return Ok("the connection was closed"),
                First::Byte(byte) => running.incoming_data(&mut target, byte).map_err(|e| protocol(&e))?,
                First::Event(event) => {
                    let reason = target.reason(event);
                    running.report_stop(&mut target, reason).map_err(|e| protocol(&e))?
                }
            },
            Machine::CtrlCInterrupt(interrupt) => {
                server.handle.call(DebugStop).map_err(|e| protocol(&e.describe()))?;
                // If a vCPU stopped by itself meanwhile, that is what the debugger wants to know.
                let reason = match server.mailbox.take() {
                    Some(event) => target.reason(event),
                    None => MultiThreadStopReason::SignalWithThread { tid: tid(0), signal: Signal::SIGINT },
                };
                interrupt.interrupt_handled(&mut target, Some(reason)).map_err(|e| protocol(&e))?
            }
            Machine::Disconnected(end) => {
                return Ok(match end.get_reason() {
                    DisconnectReason::Kill => {
                        server.handle.submit(VmmShutdown(Origin::HostQuit), drop);
                        "it killed the VM"
                    }
                    DisconnectReason::Disconnect => "it detached",
                    _ => "the guest is off",
                });
            }
        };
    }
}

/// Why the guest stopped, as gdb is told.
pub(super) fn stop_reason(event: DebugEvent, hardware: &[u64]) -> MultiThreadStopReason<u64> {
    use gdbstub::target::ext::breakpoints::WatchKind as Kind;
    use holdfast_accel::WatchKind;
    match event {
        DebugEvent::Ended(status) => MultiThreadStopReason::Exited(status),
        DebugEvent::Stopped { vcpu, why } => {
            let tid = tid(vcpu);
            match why {
                DebugWhy::Breakpoint(pc) if hardware.contains(&pc) => MultiThreadStopReason::HwBreak(tid),
                DebugWhy::Breakpoint(_) => MultiThreadStopReason::SwBreak(tid),
                DebugWhy::Step => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
                DebugWhy::Paused => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGINT },
                DebugWhy::Watch(hit) => {
                    let kind = match hit.kind {
                        WatchKind::Read => Kind::Read,
                        WatchKind::Write => Kind::Write,
                        WatchKind::Access => Kind::ReadWrite,
                    };
                    MultiThreadStopReason::Watch { tid, kind, addr: hit.address }
                }
            }
        }
    }
}
