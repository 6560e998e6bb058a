//! How regions are run: as host code, or by the IR interpreter.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use holdfast_tcg_ir::Builder;
use holdfast_tcg_ir::env::{exit, header};
use holdfast_tcg_ir::interp::{Interpreter, Outcome, SlowMemory};
use holdfast_tcg_x64::{CodegenError, NativeRunner, Stubs, Target, Translator};

use crate::cache::{Acquired, CodeCache, SegmentId};
use crate::guest::Guest;
use crate::slow::slow_paths;
use crate::table::{Body, HostCode, Link, Region};
use crate::vcpu::VcpuCore;
use crate::vm::{Engine, RuntimeError};

/// The VM's part of an engine.
#[derive(Debug)]
pub enum EngineKind {
    /// The interpreter.
    Interpreter,
    /// Host code.
    Host(Box<Stubs>),
}

/// True if there is a back end for this host.
const HAS_BACK_END: bool = cfg!(all(target_arch = "x86_64", target_os = "linux"));

impl EngineKind {
    /// For `info jit`.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Interpreter => "interpreter",
            Self::Host(_) => "x86-64 code",
        }
    }

    /// Sets up the engine and its code cache.
    pub fn new(
        guest: &dyn Guest,
        wanted: Engine,
        bytes: usize,
        vcpus: usize,
    ) -> Result<(Self, Option<CodeCache>), RuntimeError> {
        if wanted == Engine::Interpreter || !HAS_BACK_END {
            return Ok((Self::Interpreter, None));
        }
        let cache = CodeCache::new(bytes, vcpus).map_err(|e| RuntimeError::Memory("translated code", e))?;
        let mut translator = translator(guest)?;
        let out = cache.writable(cache.start_of(0), cache.segment_len());
        let stubs = translator
            .stubs(out, cache.exec_addr(0).expose_provenance() as u64)
            .map_err(RuntimeError::Codegen)?;
        Ok((Self::Host(Box::new(stubs)), Some(cache)))
    }

    /// A vCPU's part.
    pub fn vcpu(&self, guest: &'static dyn Guest) -> Result<VcpuEngine, RuntimeError> {
        let kind = match self {
            Self::Interpreter => {
                let mut interpreter = Interpreter::new();
                let native =
                    NativeRunner::new().map_err(|e| RuntimeError::Memory("single instructions", e))?;
                interpreter.native = Some(Box::new(native));
                Kind::Interpreter(interpreter, guest)
            }
            Self::Host(stubs) => Kind::Host(Box::new((translator(guest)?, Stubs::clone(stubs)))),
        };
        Ok(VcpuEngine { builder: None, kind, segment: None, limit: u32::MAX, prepared: 0 })
    }
}

fn translator(guest: &dyn Guest) -> Result<Translator, RuntimeError> {
    Translator::new(guest.spec().ir, guest.helpers().clone(), slow_paths()).map_err(RuntimeError::Codegen)
}

/// Bytes of the code cache whose pages are asked for at once.
const PREPARED: usize = 64 << 10;
/// Host code of few regions is longer.
const LARGE_REGION: usize = 4 << 10;

enum Kind {
    Interpreter(Interpreter, &'static dyn Guest),
    Host(Box<(Translator, Stubs)>),
}

/// A vCPU's part of an engine.
pub struct VcpuEngine {
    /// Away while a region is built.
    builder: Option<Box<Builder>>,
    kind: Kind,
    /// The segment being filled and the bytes used of it.
    segment: Option<(SegmentId, usize)>,
    /// Instructions that the next region may have at most.
    limit: u32,
    /// Where the part of the segment ends whose pages are there.
    prepared: usize,
}

impl fmt::Debug for VcpuEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("VcpuEngine").field("segment", &self.segment).finish_non_exhaustive()
    }
}

impl VcpuEngine {
    /// The routines that host code calls, if host code is made.
    pub fn stubs(&self) -> Option<&Stubs> {
        match &self.kind {
            Kind::Host(host) => Some(&host.1),
            Kind::Interpreter(..) => None,
        }
    }

    /// The builder, for one region.
    pub fn take_builder(&mut self, guest: &dyn Guest) -> Box<Builder> {
        self.builder.take().unwrap_or_else(|| Box::new(Builder::new(guest.helpers())))
    }

    /// The builder back.
    pub fn return_builder(&mut self, builder: Box<Builder>) {
        self.builder = Some(builder);
    }

    /// Instructions that the next region may have at most.
    pub fn limit(&self) -> u32 {
        self.limit
    }

    /// Runs from `region` on until translated code is left; gives the exit code.
    ///
    /// # Safety
    /// `engine` and `env` are the vCPU's own, `region` is alive for its epoch, and no reference to the vCPU's
    /// core is in use.
    pub unsafe fn enter(engine: *mut Self, env: *mut u8, region: *const Region) -> u32 {
        // SAFETY: by contract; nothing that translated code calls uses this part of the core.
        let (kind, region) = unsafe { (&mut (*engine).kind, &*region) };
        match (kind, &region.body) {
            (Kind::Host(host), Body::Host(code)) => {
                let enter = host.1.enter();
                // SAFETY: the code was generated for this environment and is alive.
                (unsafe { enter(env, code.entry) }) as u32
            }
            (Kind::Interpreter(interpreter, guest), Body::Ir(ir)) => {
                // SAFETY: the environment is of this guest.
                let outcome = unsafe {
                    let mut memory = SlowMemory::new(env, slow_paths());
                    interpreter.run(ir, guest.helpers(), env, &mut memory)
                };
                match outcome {
                    Outcome::Exit(code) => code,
                    Outcome::Goto(pc) => {
                        // SAFETY: the environment has a header.
                        unsafe { (*header(env)).pc = pc };
                        exit::LOOKUP
                    }
                }
            }
            // A VM has one engine.
            _ => exit::NONE,
        }
    }
}

impl VcpuCore {
    /// Turns what `builder` holds into something that runs; its accesses may `share` probes. `None`: try again, with fewer
    /// instructions.
    pub fn compile(
        &mut self,
        builder: &mut Builder,
        id: u32,
        share: bool,
    ) -> Result<Option<Body>, RuntimeError> {
        if matches!(self.engine.kind, Kind::Interpreter(..)) {
            return Ok(Some(Body::Ir(Box::new(builder.region().clone()))));
        }
        let vm = Arc::clone(&self.vm);
        let Some(cache) = vm.cache() else { return Ok(None) };
        loop {
            let (segment, used) = match self.engine.segment {
                Some(mine) => mine,
                None => {
                    let segment = self.take_segment(cache);
                    self.engine.prepared = cache.start_of(segment);
                    (segment, 0)
                }
            };
            self.engine.segment = Some((segment, used));
            let Kind::Host(host) = &mut self.engine.kind else { return Ok(None) };
            let (translator, stubs) = &mut **host;
            translator.share_probes(share);
            let offset = cache.start_of(segment) + used;
            let end = cache.start_of(segment) + cache.segment_len();
            if self.engine.prepared < end.min(offset + LARGE_REGION) {
                let from = self.engine.prepared;
                self.engine.prepared = end.min(from + PREPARED);
                cache.prepare(from, self.engine.prepared - from);
            }
            let out = cache.writable(offset, cache.segment_len() - used);
            let entry = cache.exec_addr(offset).expose_provenance() as u64;
            let insns = builder.region().guest_insns;
            let target = Target { out, exec: entry, region_id: id };
            match translator.compile(stubs, builder.region(), target) {
                Ok(made) => {
                    let links = made.links.iter().map(Link::new).collect();
                    let code = HostCode { entry, offset, len: made.len as u32, segment, links };
                    self.engine.segment = Some((segment, used + made.len.next_multiple_of(16)));
                    self.engine.limit = u32::MAX;
                    return Ok(Some(Body::Host(code)));
                }
                Err(CodegenError::BufferFull { .. }) if used > 0 => {
                    cache.filled(segment, used);
                    self.engine.segment = None;
                }
                Err(CodegenError::BufferFull { .. } | CodegenError::TooLong(_)) if insns > 1 => {
                    self.engine.limit = insns / 2;
                    return Ok(None);
                }
                Err(e) => return Err(RuntimeError::Codegen(e)),
            }
        }
    }

    /// An empty segment, evicting the oldest if need be.
    fn take_segment(&mut self, cache: &CodeCache) -> SegmentId {
        let vm = Arc::clone(&self.vm);
        let (epochs, index) = (&vm.regions.epochs, self.shared.index());
        loop {
            match cache.acquire(epochs.passed()) {
                Acquired::Segment(id) => return id,
                Acquired::Evict(id) => {
                    vm.evict(id);
                    cache.retire(id, epochs.advance());
                }
                Acquired::Wait => {
                    // This vCPU holds no region itself.
                    self.from = None;
                    self.away = true;
                    epochs.leave(index);
                    std::thread::sleep(Duration::from_micros(10));
                    epochs.enter(index);
                }
            }
        }
    }
}
