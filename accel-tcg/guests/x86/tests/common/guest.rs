//! Our processor: one vCPU with paging, descriptor tables and RAM, put at CPL 3 for each case.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use holdfast_arch::x86_64::{CpuidModel, Segment, State, Table};
use holdfast_arch::{CpuModel, CpuState};
use holdfast_clock::{Timers, VmClock};
use holdfast_memory::GuestMemory;
use holdfast_tcg_runtime::{Engine, Guest, Io, Stop, TcgVcpu, TcgVm, VmParts, request};
use holdfast_threads::PlainSpawner;
use vm_memory::{Bytes, GuestAddress};

use super::case::{
    CODE, CODE_SIZE, CS32, CS64, DATA, DATA_RW, DATA_SIZE, END, END32, End, Image, Outcome, Processor, SS,
};

/// Where supervisor pages are: guest-physical 0 to 2 MiB.
pub const SYSTEM: u64 = 0xffff_a234_0000_0000;
const RAM_SIZE: usize = 0x20_0000;
const PML4: u64 = 0x1000;
const GDT: u64 = 0x1_0000;
const IDT: u64 = 0x1_1000;
const TSS: u64 = 0x1_2000;
const STACK_TOP: u64 = 0x1_4000;
/// Handler of vector `n` at `HANDLERS + 16 * n`.
const HANDLERS: u64 = 0x1_5000;
const CODE_AT: u64 = 0x4_0000;
const END_AT: u64 = 0x6_0000;
/// Guest-physical address of data.
pub const DATA_AT: u64 = 0x8_0000;
/// Seconds that a case may take.
const PATIENCE: u64 = 5;

/// There is only RAM.
#[derive(Debug)]
struct NoIo;

impl Io for NoIo {
    fn read(&self, _vcpu: u32, _gpa: u64, _size: u8) -> Option<u64> {
        None
    }

    fn write(&self, _vcpu: u32, _gpa: u64, _size: u8, _value: u64) -> bool {
        false
    }
}

/// A vCPU in its machine.
pub struct Machine {
    name: &'static str,
    /// What the vCPUs share.
    pub vm: Arc<TcgVm>,
    /// The vCPU.
    pub vcpu: TcgVcpu,
    /// The other vCPUs.
    pub others: Vec<TcgVcpu>,
    /// RAM.
    pub memory: GuestMemory,
    timers: Arc<Timers>,
    /// What every case starts from.
    base: State,
    data: Vec<u8>,
    runs: Arc<AtomicU64>,
    done: Arc<AtomicBool>,
    dog: Option<JoinHandle<()>>,
}

impl Machine {
    /// A machine that runs by `engine`.
    pub fn new(guest: &'static dyn Guest, engine: Engine) -> Self {
        Self::with_vcpus(guest, engine, 1)
    }

    /// A machine with AVX-512, which the host has to have.
    pub fn wide(guest: &'static dyn Guest, engine: Engine) -> Self {
        let mut model = "host".to_owned();
        let names = ["f", "cd", "bw", "dq", "vl", "ifma", "vbmi", "vbmi2", "vnni", "bitalg", "-vpopcntdq"];
        for name in names.iter().take(if super::templates::all_of_avx512() { names.len() } else { 5 }) {
            model += &format!(",+avx512{name}");
        }
        let model = holdfast_arch::x86_64::features::parse(&model).expect("a model");
        let mut this = Self::of(guest, engine, (1, model));
        this.base.xcr0 = 0xe7;
        this
    }

    /// A machine with several vCPUs, the first of which runs cases.
    pub fn with_vcpus(guest: &'static dyn Guest, engine: Engine, vcpus: u32) -> Self {
        Self::of(guest, engine, (vcpus, CpuidModel { name: "host".into(), ..CpuidModel::default() }))
    }

    fn of(guest: &'static dyn Guest, engine: Engine, (vcpus, model): (u32, CpuidModel)) -> Self {
        let memory = GuestMemory::from_ranges(&[(GuestAddress(0), RAM_SIZE)]).expect("RAM");
        let clock = VmClock::stopped_at(0);
        let timers = Timers::start(Arc::clone(&clock), &PlainSpawner).expect("timers");
        let vm = TcgVm::new(VmParts {
            guest,
            memory: memory.clone(),
            io: Arc::new(NoIo),
            clock: Arc::clone(&clock),
            timers: Arc::clone(&timers),
            vcpus,
            code_cache: 0,
            engine,
            controllers: Vec::new(),
        })
        .expect("a VM");
        let model = CpuModel::X86_64(model);
        let mut vcpu = TcgVcpu::new(&vm, 0, &model).expect("a vCPU");
        let mut others: Vec<_> = (1..vcpus).map(|n| TcgVcpu::new(&vm, n, &model).expect("a vCPU")).collect();
        clock.resume();
        timers.clock_changed();
        tables(&memory);
        let mut stops: Vec<u64> = (0..32).map(|v| SYSTEM + HANDLERS + 16 * v).collect();
        stops.extend([END, END32]);
        vcpu.set_debug(false, &stops);
        others.iter_mut().for_each(|v| v.set_debug(false, &stops));
        let CpuState::X86_64(state) = vcpu.export() else { panic!("not x86") };
        let base = system_state(*state);
        let (runs, done) = (Arc::new(AtomicU64::new(0)), Arc::new(AtomicBool::new(false)));
        let dog = watch(vcpu.shared(), &runs, &done);
        let name = if engine == Engine::Interpreter { "interpreter" } else { "translated" };
        Self {
            name,
            vm,
            vcpu,
            others,
            memory,
            timers,
            base,
            data: vec![0; DATA_RW],
            runs,
            done,
            dog: Some(dog),
        }
    }

    /// Sets what the page that ends code holds.
    pub fn set_end_page(&self, bytes: &[u8]) {
        self.memory.write_slice(bytes, GuestAddress(END_AT)).expect("in RAM");
    }

    /// A state in ring 0 of long mode, interrupts off, in supervisor pages, which can be written and executed.
    pub fn supervisor_state(&self, offset: u64, stack: u64) -> State {
        let mut state = self.base.clone();
        (state.rip, state.gpr, state.rflags) = (SYSTEM + offset, [0; 16], 2);
        state.gpr[4] = SYSTEM + stack;
        state.segments[1] = segment(0x10, 0xa09b);
        state.segments[2] = segment(0x18, 0xc093);
        state
    }

    /// Maps a page of the first data's 2 MiB, supervisor, writable.
    pub fn map(&self, va: u64, gpa: u64) {
        let entry = 0x6000 + (va >> 12 & 511) * 8;
        self.memory.write_obj(gpa | 1 << 63 | 3, GuestAddress(entry)).expect("in RAM");
    }

    fn word(&self, va: u64) -> u64 {
        let gpa = GuestAddress(va.wrapping_sub(SYSTEM));
        self.memory.read_obj(gpa).unwrap_or(u64::MAX)
    }

    fn state(&self, bits: u32, image: &Image) -> State {
        let mut state = self.base.clone();
        state.gpr = image.gpr;
        state.rip = image.rip;
        state.rflags = image.rflags;
        state.xsave[..image.xsave.len()].copy_from_slice(&image.xsave);
        if bits == 32 {
            state.segments = [segment(SS, 0xc0f3); 6];
            state.segments[1] = segment(CS32, 0xc0fb);
        }
        state
    }

    /// What the processor pushed for an exception, put back as the state of the interrupted code.
    fn fault(&mut self, vector: u8, image: &mut Image, cr2: u64) -> End {
        let mut at = image.gpr[4];
        let mut error = 0;
        if matches!(vector, 8 | 10..=14 | 17 | 21) {
            error = self.word(at) as u32;
            at += 8;
        }
        image.rip = self.word(at);
        image.rflags = self.word(at + 16);
        image.gpr[4] = self.word(at + 24);
        End::Fault { vector, error, address: if vector == 14 { cr2 } else { 0 } }
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        self.done.store(true, Ordering::SeqCst);
        if let Some(dog) = self.dog.take() {
            dog.thread().unpark();
            let _ = dog.join();
        }
        self.timers.stop();
    }
}

/// Kicks the vCPU if a case does not end.
fn watch(
    shared: &Arc<holdfast_tcg_runtime::VcpuShared>,
    runs: &Arc<AtomicU64>,
    done: &Arc<AtomicBool>,
) -> JoinHandle<()> {
    let (shared, runs, done) = (Arc::clone(shared), Arc::clone(runs), Arc::clone(done));
    std::thread::spawn(move || {
        let mut last = 0;
        while !done.load(Ordering::SeqCst) {
            std::thread::park_timeout(Duration::from_secs(PATIENCE));
            let now = runs.load(Ordering::SeqCst);
            // Odd: inside a run.
            if now == last && now & 1 == 1 {
                shared.request(request::KICK);
            }
            last = now;
        }
    })
}

fn segment(selector: u16, attributes: u16) -> Segment {
    Segment { selector, base: 0, limit: u32::MAX, attributes, unusable: false }
}

/// Long mode at CPL 3, with everything on that the host's kernel has on.
fn system_state(mut state: State) -> State {
    let unusable = Segment { unusable: true, ..Segment::default() };
    state.segments = [unusable; 6];
    state.segments[1] = segment(CS64, 0xa0fb);
    state.segments[2] = segment(SS, 0xc0f3);
    state.tr = Segment { selector: 0x40, base: SYSTEM + TSS, limit: 103, attributes: 0x8b, unusable: false };
    state.ldt = unusable;
    state.gdt = Table { base: SYSTEM + GDT, limit: 0x4f };
    state.idt = Table { base: SYSTEM + IDT, limit: 32 * 16 - 1 };
    state.cr = [0x8005_0033, 0, PML4, 0, 0];
    // PAE, PGE, OSFXSR, OSXMMEXCPT, UMIP, FSGSBASE, OSXSAVE.
    state.cr[3] = 1 << 5 | 1 << 7 | 1 << 9 | 1 << 10 | 1 << 11 | 1 << 16 | 1 << 18;
    state.efer = 0xd01;
    state.xcr0 = 7;
    if state.xsave.len() < super::case::XSAVE_SIZE {
        state.xsave.resize(super::case::XSAVE_SIZE, 0);
    }
    state
}

/// Page tables, GDT, IDT, TSS.
fn tables(memory: &GuestMemory) {
    let put = |at: u64, value: u64| memory.write_obj(value, GuestAddress(at)).expect("in RAM");
    let index = |va: u64, level: u32| (va >> (12 + 9 * level) & 511) * 8;
    const NX: u64 = 1 << 63;
    // Supervisor: one 2 MiB page.
    put(PML4 + index(SYSTEM, 3), 0x2000 | 3);
    put(0x2000 + index(SYSTEM, 2), 0x3000 | 3);
    put(0x3000 + index(SYSTEM, 1), 0x83);
    // User.
    put(PML4 + index(CODE, 3), 0x4000 | 7);
    put(0x4000 + index(CODE, 2), 0x5000 | 7);
    put(0x5000 + index(CODE, 1), 0x6000 | 7);
    let map = |va: u64, gpa: u64, size: usize, bits: u64| {
        for at in (0..size as u64).step_by(0x1000) {
            put(0x6000 + index(va + at, 0), (gpa + at) | bits);
        }
    };
    map(CODE, CODE_AT, CODE_SIZE, 5);
    map(END, END_AT, 0x1000, 5);
    map(DATA, DATA_AT, DATA_RW, NX | 7);
    map(DATA + DATA_RW as u64, DATA_AT + DATA_RW as u64, DATA_SIZE - DATA_RW, NX | 5);
    let gdt: [u64; 10] = [
        0,
        0,
        0x00af_9b00_0000_ffff,
        0x00cf_9300_0000_ffff,
        0x00cf_fb00_0000_ffff,
        0x00cf_f300_0000_ffff,
        0x00af_fb00_0000_ffff,
        0,
        0x0000_8b00_0000_0067 | ((SYSTEM + TSS) & 0xff_ffff) << 16 | ((SYSTEM + TSS) >> 24 & 0xff) << 56,
        (SYSTEM + TSS) >> 32,
    ];
    for (at, descriptor) in (GDT..).step_by(8).zip(gdt) {
        put(at, descriptor);
    }
    for vector in 0..32 {
        let to = SYSTEM + HANDLERS + 16 * vector;
        put(IDT + 16 * vector, to & 0xffff | 0x10 << 16 | 0xee00 << 32 | (to >> 16 & 0xffff) << 48);
        put(IDT + 16 * vector + 8, to >> 32);
    }
    let top = SYSTEM + STACK_TOP;
    memory.write_obj(top, GuestAddress(TSS + 4)).expect("in RAM");
    memory.write_obj(0x68u16, GuestAddress(TSS + 102)).expect("in RAM");
}

impl Processor for Machine {
    fn name(&self) -> &'static str {
        self.name
    }

    fn place(&mut self, at: usize, code: &[u8]) {
        self.memory.write_slice(code, GuestAddress(CODE_AT + at as u64)).expect("in RAM");
    }

    fn run(&mut self, bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome {
        self.memory.write_slice(data, GuestAddress(DATA_AT)).expect("in RAM");
        let state = self.state(bits, image);
        self.vcpu.import(&CpuState::X86_64(Box::new(state))).expect("fits");
        self.runs.fetch_add(1, Ordering::SeqCst);
        // Code that comes to the end of the other mode's code goes on there, as it does on the host.
        let other = if bits == 32 { END } else { END32 };
        let stop = loop {
            match self.vcpu.run() {
                Ok(Stop::Debug(at)) if at == other => {}
                stop => break stop,
            }
        };
        self.runs.fetch_add(1, Ordering::SeqCst);
        let CpuState::X86_64(state) = self.vcpu.export() else { panic!("not x86") };
        self.memory.read_slice(&mut self.data, GuestAddress(DATA_AT)).expect("in RAM");
        let mut image = Image::new();
        image.gpr = state.gpr;
        image.rip = state.rip;
        image.rflags = state.rflags;
        let len = image.xsave.len().min(state.xsave.len());
        image.xsave[..len].copy_from_slice(&state.xsave[..len]);
        let end = match stop {
            Ok(Stop::Debug(END | END32)) => End::Done,
            Ok(Stop::Debug(at)) => {
                let vector = (at.wrapping_sub(SYSTEM + HANDLERS) / 16) as u8;
                self.fault(vector, &mut image, state.cr[1])
            }
            Ok(Stop::Shutdown) => End::Broken("shut down"),
            Ok(Stop::Kicked) => End::Broken("does not end"),
            Ok(Stop::Watch(..)) => End::Broken("hit a watchpoint that nobody set"),
            Err(_) => End::Broken("an unknown exit"),
        };
        Outcome { end, image }
    }

    fn data(&self) -> &[u8] {
        &self.data
    }
}
