//! A bare machine for small hand-assembled RISC-V programs.
#![allow(dead_code, reason = "each test binary uses a part")]

pub mod asm;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use holdfast_arch::{CpuModel, CpuState, riscv64};
use holdfast_clock::{Timers, VmClock};
use holdfast_memory::GuestMemory;
use holdfast_tcg::{Engine, Io, Stop, TcgVcpu, TcgVm, VmParts, request};
use holdfast_threads::PlainSpawner;
use parking_lot::Mutex;
use vm_memory::{Bytes, GuestAddress};

/// Start of RAM and of every program.
pub const RAM: u64 = 0x8000_0000;
/// Bytes of RAM.
pub const RAM_LEN: usize = 16 << 20;
/// A store here ends the test with the value.
pub const DONE: u64 = 0x10_0000;
/// A store here is logged; a load gives the number of stores so far.
pub const LOG: u64 = 0x1000_0000;
/// Nothing is here.
pub const NOTHING: u64 = 0x2000_0000;

#[derive(Debug, Default)]
pub struct TestIo {
    pub done: AtomicBool,
    pub value: AtomicU64,
    pub log: Mutex<Vec<u64>>,
    kick: Mutex<Option<Arc<TcgVm>>>,
}

impl Io for TestIo {
    fn read(&self, _vcpu: u32, gpa: u64, _size: u8) -> Option<u64> {
        (LOG..LOG + 8).contains(&gpa).then(|| self.log.lock().len() as u64)
    }

    fn write(&self, _vcpu: u32, gpa: u64, _size: u8, value: u64) -> bool {
        match gpa {
            DONE => {
                self.value.store(value, Ordering::SeqCst);
                self.done.store(true, Ordering::SeqCst);
                if let Some(vm) = &*self.kick.lock() {
                    vm.vcpus().iter().for_each(|v| v.request(request::KICK));
                }
                true
            }
            LOG => {
                self.log.lock().push(value);
                true
            }
            _ => false,
        }
    }
}

pub struct Machine {
    pub vm: Arc<TcgVm>,
    pub io: Arc<TestIo>,
    pub memory: GuestMemory,
    pub clock: Arc<VmClock>,
    pub vcpus: Vec<TcgVcpu>,
}

impl Machine {
    pub fn new(engine: Engine, vcpus: u32, code_cache: usize) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(RAM), RAM_LEN)]).expect("RAM");
        let clock = VmClock::stopped_at(0);
        clock.resume();
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
        let io = Arc::new(TestIo::default());
        let guest = holdfast_tcg::guest(holdfast_arch::Arch::Riscv64).expect("guest");
        let vm = TcgVm::new(VmParts {
            guest,
            memory: memory.clone(),
            io: Arc::clone(&io) as Arc<dyn Io>,
            clock: Arc::clone(&clock),
            timers,
            vcpus,
            code_cache,
            engine,
            controllers: Vec::new(),
        })
        .expect("VM");
        *io.kick.lock() = Some(Arc::clone(&vm));
        let model = CpuModel::Riscv64(riscv64::IsaModel::default());
        let vcpus = (0..vcpus)
            .map(|n| {
                let mut vcpu = TcgVcpu::new(&vm, n, &model).expect("vCPU");
                let CpuState::Riscv64(mut state) = vcpu.export() else { panic!("not RISC-V") };
                state.pc = RAM;
                state.hartid = u64::from(n);
                state.x[10] = u64::from(n);
                vcpu.import(&CpuState::Riscv64(state)).expect("state");
                vcpu
            })
            .collect();
        Self { vm, io, memory, clock, vcpus }
    }

    /// With `program` at the start of RAM.
    pub fn with(engine: Engine, vcpus: u32, program: &asm::Asm) -> Self {
        let machine = Self::new(engine, vcpus, 0);
        machine.load(RAM, program);
        machine
    }

    pub fn load(&self, at: u64, program: &asm::Asm) {
        self.memory.write_slice(&program.bytes(), GuestAddress(at)).expect("in RAM");
    }

    pub fn read(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).expect("in RAM")
    }

    pub fn write(&self, at: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    }

    /// Runs all vCPUs until the program is done; gives the value.
    pub fn run(&mut self) -> u64 {
        let io = Arc::clone(&self.io);
        let vm = Arc::clone(&self.vm);
        let vcpus = std::mem::take(&mut self.vcpus);
        let threads: Vec<_> = vcpus
            .into_iter()
            .map(|mut vcpu| {
                let io = Arc::clone(&io);
                std::thread::spawn(move || {
                    while !io.done.load(Ordering::SeqCst) {
                        assert_eq!(vcpu.run().expect("run"), Stop::Kicked);
                    }
                    vcpu
                })
            })
            .collect();
        let limit = Instant::now() + Duration::from_secs(300);
        while threads.iter().any(|t| !t.is_finished()) {
            if Instant::now() > limit {
                io.done.store(true, Ordering::SeqCst);
                vm.vcpus().iter().for_each(|v| v.request(request::KICK));
                let text: Vec<_> = threads.into_iter().map(|t| t.join().expect("vCPU").describe()).collect();
                panic!("the program did not end\n{}\n{}", text.join("\n"), vm.info());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        self.vcpus = threads.into_iter().map(|t| t.join().expect("vCPU")).collect();
        self.io.value.load(Ordering::SeqCst)
    }

    pub fn x(&mut self, vcpu: usize, n: usize) -> u64 {
        let CpuState::Riscv64(state) = self.vcpus[vcpu].export() else { panic!("not RISC-V") };
        state.x[n]
    }

    pub fn pc(&mut self, vcpu: usize) -> u64 {
        let CpuState::Riscv64(state) = self.vcpus[vcpu].export() else { panic!("not RISC-V") };
        state.pc
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        // The VM holds the I/O, which holds the VM.
        *self.io.kick.lock() = None;
    }
}

/// Runs `program` on every engine and checks that all end with `value`.
pub fn check(program: &asm::Asm, value: u64) {
    for engine in ENGINES {
        assert_eq!(Machine::with(engine, 1, program).run(), value, "{engine:?}");
    }
}

pub const ENGINES: [Engine; 2] = [Engine::Interpreter, Engine::Auto];
