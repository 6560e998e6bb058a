//! A machine for test programs: RAM, pins, an exit register. And the cross tools that make the programs.
#![allow(dead_code, reason = "each test uses its part")]

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use holdfast_arch::riscv64::{IsaModel, State};
use holdfast_arch::{CpuModel, CpuState};
use holdfast_clock::{Timers, VmClock};
use holdfast_guest_riscv::RiscvGuest;
use holdfast_memory::GuestMemory;
use holdfast_tcg_runtime::{Engine, Io, Stop, TcgVcpu, TcgVm, VmParts, request};
use holdfast_threads::PlainSpawner;
use vm_memory::{Bytes, GuestAddress};

/// A store here ends the run.
const EXIT: u64 = 0x10_0000;
/// Pin n is set by a store to `PINS + 8 * n`, and 10 ms later by one to `PINS + 8 * (32 + n)`.
const PINS: u64 = 0x20_0000;

/// What is not RAM.
#[derive(Debug, Default)]
struct TestIo {
    vm: OnceLock<Weak<TcgVm>>,
    exit: AtomicU64,
    done: AtomicBool,
}

impl TestIo {
    fn vm(&self) -> Option<Arc<TcgVm>> {
        self.vm.get().and_then(Weak::upgrade)
    }
}

impl Io for TestIo {
    fn read(&self, _vcpu: u32, gpa: u64, _size: u8) -> Option<u64> {
        (PINS..PINS + 0x1000).contains(&gpa).then_some(0)
    }

    fn write(&self, _vcpu: u32, gpa: u64, _size: u8, value: u64) -> bool {
        let Some(vm) = self.vm() else { return false };
        match gpa {
            EXIT => {
                self.exit.store(value, Ordering::SeqCst);
                self.done.store(true, Ordering::SeqCst);
                vm.vcpus().iter().for_each(|v| v.request(request::KICK));
            }
            PINS..0x20_0200 => {
                let pin = ((gpa - PINS) / 8) as u32;
                if pin < 32 {
                    vm.set_pin(0, pin, value != 0);
                } else if value != 0 {
                    std::thread::spawn(move || {
                        std::thread::sleep(Duration::from_millis(10));
                        vm.set_pin(0, pin - 32, true);
                    });
                }
            }
            _ => return false,
        }
        true
    }
}

/// One vCPU with RAM.
pub struct Machine {
    pub vcpu: TcgVcpu,
    /// The other vCPUs, to be run by threads of their own.
    pub others: Vec<TcgVcpu>,
    pub memory: GuestMemory,
    io: Arc<TestIo>,
    clock: Arc<VmClock>,
    timers: Arc<Timers>,
}

impl Machine {
    /// A machine with `size` bytes of RAM at `base`.
    pub fn new(engine: Engine, base: u64, size: usize) -> Self {
        Self::with_vcpus(engine, base, size, 1)
    }

    /// The same with several vCPUs.
    pub fn with_vcpus(engine: Engine, base: u64, size: usize, vcpus: u32) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(base), size)]).expect("RAM");
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
        let io = Arc::new(TestIo::default());
        let vm = TcgVm::new(VmParts {
            guest: RiscvGuest::get(),
            memory: memory.clone(),
            io: Arc::clone(&io) as Arc<dyn Io>,
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            vcpus,
            code_cache: 0,
            engine,
            controllers: Vec::new(),
        })
        .expect("a VM");
        io.vm.set(Arc::downgrade(&vm)).expect("set once");
        let model = CpuModel::Riscv64(IsaModel::default());
        let vcpu = TcgVcpu::new(&vm, 0, &model).expect("a vCPU");
        let others = (1..vcpus).map(|i| TcgVcpu::new(&vm, i, &model).expect("a vCPU")).collect();
        clock.resume();
        timers.clock_changed();
        Self { vcpu, others, memory, io, clock, timers }
    }

    /// Loads an ELF file's segments; its entry point.
    pub fn load(&self, elf: &[u8]) -> u64 {
        let word = |at: usize| u64::from_le_bytes(elf[at..at + 8].try_into().expect("8 bytes"));
        let half = |at: usize| usize::from(u16::from_le_bytes(elf[at..at + 2].try_into().expect("2 bytes")));
        assert_eq!(&elf[..4], b"\x7fELF");
        let (table, size, count) = (word(32) as usize, half(54), half(56));
        for header in (0..count).map(|i| table + i * size) {
            if elf[header..header + 4] == [1, 0, 0, 0] {
                let (offset, len) = (word(header + 8) as usize, word(header + 32) as usize);
                let bytes = &elf[offset..offset + len];
                self.memory.write_slice(bytes, GuestAddress(word(header + 24))).expect("in RAM");
            }
        }
        word(24)
    }

    /// The hart's state.
    pub fn state(&mut self) -> State {
        let CpuState::Riscv64(state) = self.vcpu.export() else { panic!("not RISC-V") };
        *state
    }

    /// Replaces it.
    pub fn set_state(&mut self, state: State) {
        self.vcpu.import(&CpuState::Riscv64(Box::new(state))).expect("fits");
    }

    /// Starts at `pc`.
    pub fn set_pc(&mut self, pc: u64) {
        let mut state = self.state();
        state.pc = pc;
        self.set_state(state);
    }

    /// Runs until the program ends: its code, or `Err` with the registers if it does not in `limit`.
    pub fn run(&mut self, limit: Duration) -> Result<u64, String> {
        match self.run_to(limit)? {
            Stop::Kicked => Ok(self.io.exit.load(Ordering::SeqCst)),
            other => Err(format!("stopped by {other:?}\n{}", self.vcpu.describe())),
        }
    }

    /// What the program ended with.
    pub fn exit_code(&self) -> u64 {
        self.io.exit.load(Ordering::SeqCst)
    }

    /// Runs until the program ends, or a breakpoint.
    pub fn run_to(&mut self, limit: Duration) -> Result<Stop, String> {
        let shared = Arc::clone(self.vcpu.shared());
        self.io.done.store(false, Ordering::SeqCst);
        let finished = Arc::new(AtomicBool::new(false));
        let watch = Arc::clone(&finished);
        let dog = std::thread::spawn(move || {
            let end = Instant::now() + limit;
            while !watch.load(Ordering::SeqCst) {
                if Instant::now() > end {
                    shared.request(request::KICK);
                    return;
                }
                std::thread::park_timeout(Duration::from_millis(50));
            }
        });
        let stop = self.vcpu.run();
        finished.store(true, Ordering::SeqCst);
        dog.thread().unpark();
        dog.join().expect("the watchdog");
        let stop = stop.map_err(|e| format!("{e}\n{}", self.vcpu.describe()))?;
        if stop == Stop::Kicked && !self.io.done.load(Ordering::SeqCst) {
            return Err(format!("does not end\n{}", self.vcpu.describe()));
        }
        Ok(stop)
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.timers.stop();
    }
}

/// Runs a command that has to succeed.
fn must(command: &mut Command, package: &str) {
    let out = command
        .output()
        .unwrap_or_else(|e| panic!("{:?}: {e}; Debian's package `{package}` has it", command.get_program()));
    assert!(out.status.success(), "{command:?}:\n{}", String::from_utf8_lossy(&out.stderr));
}

/// Assembles and links a program of `tests/asm` to run at 0x80000000.
pub fn assemble(name: &str, dir: &Path) -> Vec<u8> {
    let out: PathBuf = dir.join(name);
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/asm").join(format!("{name}.S"));
    let mut gcc = Command::new("riscv64-linux-gnu-gcc");
    gcc.args(["-nostdlib", "-static", "-fno-pic", "-no-pie", "-march=rv64gc_zba_zbb_zbs", "-mabi=lp64d"])
        .arg("-Wl,-Ttext=0x80000000,--build-id=none,--no-relax")
        .arg("-o")
        .arg(&out)
        .arg(source);
    must(&mut gcc, "gcc-riscv64-linux-gnu");
    std::fs::read(&out).expect("the program")
}
