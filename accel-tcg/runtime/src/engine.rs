//! How regions are run: as host code, or by the IR interpreter.

use holdfast_tcg_ir::Builder;

use crate::cache::CodeCache;
use crate::guest::Guest;
use crate::table::{Body, Region};
use crate::vcpu::VcpuCore;
use crate::vm::{Engine, RuntimeError};

/// The VM's part of an engine.
#[derive(Debug)]
pub enum EngineKind {
    /// The interpreter.
    Interpreter,
}

impl EngineKind {
    /// For `info jit`.
    pub fn name(&self) -> &'static str {
        "interpreter"
    }

    /// Sets up the engine and its code cache.
    pub fn new(
        _guest: &dyn Guest,
        _wanted: Engine,
        _bytes: usize,
        _vcpus: usize,
    ) -> Result<(Self, Option<CodeCache>), RuntimeError> {
        Ok((Self::Interpreter, None))
    }

    /// A vCPU's part.
    pub fn vcpu(&self, guest: &dyn Guest) -> Result<VcpuEngine, RuntimeError> {
        Ok(VcpuEngine { builder: Builder::new(guest.helpers()) })
    }
}

/// A vCPU's part of an engine.
#[derive(Debug)]
pub struct VcpuEngine {
    builder: Builder,
}

impl VcpuEngine {
    pub fn take_builder(&mut self) -> Builder {
        std::mem::take(&mut self.builder)
    }

    pub fn return_builder(&mut self, builder: Builder) {
        self.builder = builder;
    }

    pub unsafe fn enter(_engine: *mut Self, _env: *mut u8, _region: *const Region) -> u32 {
        0
    }
}

impl VcpuCore {
    pub fn compile(&mut self, builder: &mut Builder, _id: u32) -> Option<Body> {
        Some(Body::Ir(Box::new(builder.region().clone())))
    }
}
