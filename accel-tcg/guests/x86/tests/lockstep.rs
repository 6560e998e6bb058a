//! The same random sequences by Debian's `qemu-x86_64` and by translation: an oracle that is no processor of the kind
//! that this runs on. `HOLDFAST_LOCKSTEP_INSNS` and `HOLDFAST_LOCKSTEP_SEED` set how many instructions and where to start.
//!
//! The emulator runs this very program, whose sandbox (`common/host.rs`) then is the emulated processor; requests come by a
//! socket. Compared are general registers, flags, vectors and memory of 64-bit integer and vector-integer code. What QEMU
//! 7.2 is known not to do is left out: alignment checks, the exact state at faults, ADX (which ends the emulator), all
//! floating point, and what [`known`] lists.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::io::{Read, Write};
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};

use common::campaign::{Limits, run_of};
use common::case::{CODE, CODE_SIZE, DATA_RW, DATA_SIZE, End, Image, Outcome, Processor, XSAVE_SIZE};
use common::generate::Generator;
use common::guest::Machine;
use common::host::Host;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;
use iced_x86::{Code, CpuidFeature, EncodingKind, Mnemonic};

/// Says that this is the emulated side, and on which descriptor requests come.
const SERVE: &str = "HOLDFAST_LOCKSTEP_FD";
/// Bytes of a state in a message.
const IMAGE: usize = 18 * 8 + XSAVE_SIZE;
/// Bytes of an answer.
const ANSWER: usize = 24 + IMAGE + DATA_RW;

fn setting(name: &str, default: u64) -> u64 {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

fn pack(image: &Image) -> Vec<u8> {
    let words = image.gpr.iter().chain([&image.rip, &image.rflags]);
    words.flat_map(|w| w.to_le_bytes()).chain(image.xsave).collect()
}

fn word(bytes: &[u8], n: usize) -> u64 {
    u64::from_le_bytes(bytes[8 * n..8 * n + 8].try_into().expect("8 bytes"))
}

fn unpack(bytes: &[u8]) -> Image {
    let mut image = Image::new();
    image.gpr = std::array::from_fn(|n| word(bytes, n));
    (image.rip, image.rflags) = (word(bytes, 16), word(bytes, 17));
    image.xsave.copy_from_slice(&bytes[144..IMAGE]);
    image
}

/// The emulated side: does what it is asked until the socket is closed.
fn serve(fd: i32) {
    // SAFETY: the parent gave this process the descriptor for this alone.
    let mut socket = unsafe { UnixStream::from_raw_fd(fd) };
    let mut host = Host::new();
    let end_page = host.end_page();
    socket.write_all(&end_page).expect("the parent listens");
    let mut head = [0; 16];
    while socket.read_exact(&mut head).is_ok() {
        let (at, len) = (word(&head, 0), word(&head, 1) as usize);
        let mut body = vec![0; len];
        socket.read_exact(&mut body).expect("the rest of a request");
        if at != u64::MAX {
            host.place(at as usize, &body);
            host.code_changed();
            continue;
        }
        let data: &[u8; DATA_SIZE] = body[IMAGE..].try_into().expect("the data");
        let outcome = host.run(64, &unpack(&body), data);
        let end = match outcome.end {
            End::Done => [0, 0, 0],
            End::Fault { vector, error, address } => [1 + u64::from(vector), error.into(), address],
            End::Broken(_) => [u64::MAX; 3],
        };
        let mut answer: Vec<u8> = end.iter().flat_map(|w| w.to_le_bytes()).collect();
        answer.extend(pack(&outcome.image));
        answer.extend(host.data());
        socket.write_all(&answer).expect("the parent listens");
    }
}

/// The emulated processor as the parent sees it.
struct Emulated {
    child: Child,
    socket: UnixStream,
    data: Vec<u8>,
    /// All code that was placed.
    code: Vec<u8>,
    runs: u64,
    /// Times that the emulator ended of itself: random addresses reach its own memory, and some instructions it does
    /// not survive.
    died: u64,
}

impl Emulated {
    /// Starts it; also what its page of the end holds.
    fn new() -> (Self, Vec<u8>) {
        let (child, socket, end_page) = Self::start();
        let (data, code) = (vec![0; DATA_RW], vec![0x90; CODE_SIZE]);
        (Self { child, socket, data, code, runs: 0, died: 0 }, end_page)
    }

    fn start() -> (Child, UnixStream, Vec<u8>) {
        let (mut socket, theirs) = UnixStream::pair().expect("a socket pair");
        let fd = theirs.as_raw_fd();
        // SAFETY: the descriptor is open; it is to be inherited.
        assert_eq!(unsafe { libc::fcntl(fd, libc::F_SETFD, 0) }, 0);
        let child = Command::new("qemu-x86_64")
            .args(["-cpu", "max"])
            .arg(std::env::current_exe().expect("this program"))
            .args(["--exact", "qemu_agrees_with_translated_code", "--nocapture"])
            .env(SERVE, fd.to_string())
            .stdout(Stdio::null())
            .spawn()
            .expect("qemu-x86_64, of Debian's package `qemu-user`");
        drop(theirs);
        let mut end_page = vec![0; 0x1000];
        socket.read_exact(&mut end_page).expect("the emulated side starts");
        (child, socket, end_page)
    }

    fn send(&mut self, head: [u64; 2], body: &[u8]) -> std::io::Result<()> {
        let mut message: Vec<u8> = head.iter().flat_map(|w| w.to_le_bytes()).collect();
        message.extend(body);
        self.socket.write_all(&message)
    }

    /// Sends a state and the data; what comes back.
    fn ask(&mut self, body: &[u8]) -> std::io::Result<Vec<u8>> {
        self.send([u64::MAX, body.len() as u64], body)?;
        let mut answer = vec![0; ANSWER];
        self.socket.read_exact(&mut answer)?;
        Ok(answer)
    }

    /// Starts another in place of one that has ended.
    fn restart(&mut self) {
        self.died += 1;
        assert!(
            self.died < 10 + self.runs / 1000,
            "the emulator dies all the time: {} of {}",
            self.died,
            self.runs
        );
        let _ = self.child.kill();
        let _ = self.child.wait();
        (self.child, self.socket, _) = Self::start();
        let code = std::mem::take(&mut self.code);
        self.send([0, code.len() as u64], &code).expect("a new one listens");
        self.code = code;
    }
}

impl Drop for Emulated {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Processor for Emulated {
    fn name(&self) -> &'static str {
        "qemu"
    }

    fn place(&mut self, at: usize, code: &[u8]) {
        self.code[at..at + code.len()].copy_from_slice(code);
        if self.send([at as u64, code.len() as u64], code).is_err() {
            self.restart();
        }
    }

    fn run(&mut self, _bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome {
        let mut body = pack(image);
        body.extend(data);
        self.runs += 1;
        let Ok(answer) = self.ask(&body) else {
            self.restart();
            // As if single-stepped: not compared.
            return Outcome { end: End::Fault { vector: 1, error: 0, address: 0 }, image: Image::new() };
        };
        self.data = answer[24 + IMAGE..].to_vec();
        let end = match word(&answer, 0) {
            0 => End::Done,
            n => End::Fault { vector: (n - 1) as u8, error: 0, address: 0 },
        };
        Outcome { end, image: unpack(&answer[24..]) }
    }

    fn data(&self) -> &[u8] {
        &self.data
    }
}

/// A processor of which only that is seen which is compared.
struct Common<P>(P, Vec<u8>);

impl<P: Processor> Processor for Common<P> {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn place(&mut self, at: usize, code: &[u8]) {
        self.0.place(at, code);
    }

    fn run(&mut self, bits: u32, image: &Image, data: &[u8; DATA_SIZE]) -> Outcome {
        let mut image = image.clone();
        // No alignment checks.
        image.rflags &= !(1 << 18);
        let mut outcome = self.0.run(bits, &image, data);
        self.1 = self.0.data().to_vec();
        // The x87 unit's part, MXCSR, and which components are in use.
        outcome.image.xsave[..160].fill(0);
        outcome.image.xsave[512] = 7;
        if let End::Fault { vector, address, .. } = outcome.end {
            let outside = |at: u64| at >> 24 != CODE >> 24;
            if outside(address) && address != 0 || outside(outcome.image.rip) {
                // Beyond the sandbox the emulated process has memory, and we have none; a branch to no canonical address faults
                // where it goes to. What single-steps is not compared.
                outcome.end = End::Fault { vector: 1, error: 0, address: 0 };
                return outcome;
            }
            // Where it stopped, and that it did; all that a processor does not reach has one name.
            let vector = if matches!(vector, 12..=14) { 14 } else { vector };
            outcome.end = End::Fault { vector, error: 0, address: 0 };
            outcome.image = Image { rip: outcome.image.rip, ..Image::new() };
            self.1.fill(0);
        }
        outcome
    }

    fn data(&self) -> &[u8] {
        &self.1
    }
}

/// What takes part.
fn wanted(code: Code) -> bool {
    let named = |part: &[&str]| {
        code.cpuid_features()
            .iter()
            .any(|f: &CpuidFeature| part.iter().any(|p| format!("{f:?}").starts_with(p)))
    };
    let integer = code.encoding() == EncodingKind::Legacy
        && !named(&["FPU", "SSE", "SSSE", "MMX", "FXSR", "AES", "SHA", "PCLMUL", "GFNI", "ADX"]);
    let vector = format!("{code:?}").starts_with("VEX_Vp");
    let bits = code.encoding() == EncodingKind::VEX && named(&["BMI"]);
    (integer || vector || bits) && known(code).is_none()
}

/// Where QEMU 7.2 is known not to do what the host's processor does (with which ours agrees, see `differential.rs`), or
/// the manual leaves a choice: why.
fn known(code: Code) -> Option<&'static str> {
    use Mnemonic as M;
    match code.mnemonic() {
        M::Popf | M::Popfq | M::Pushf | M::Pushfq => Some("flags of the system"),
        M::Wait => Some("belongs to the x87 unit"),
        M::Clflush | M::Clflushopt | M::Clwb => Some("does not look at memory"),
        M::Cmpxchg8b | M::Cmpxchg16b => Some("changes more flags than ZF"),
        M::Enter | M::Leave => Some("the order of its accesses"),
        M::Bsf | M::Bsr => Some("the destination for 0"),
        M::Rcl | M::Rcr | M::Shld | M::Shrd => Some("results and flags of counts above the operand's size"),
        M::Blsi => Some("CF"),
        M::Movbe => Some("66 beside REX.W"),
        M::Vpclmulqdq => Some("has no 256 bits"),
        M::Vpcmpestri | M::Vpcmpestri64 | M::Vpcmpestrm | M::Vpcmpestrm64 => {
            Some("flags of lengths in 64 bits")
        }
        M::Vpmaskmovd | M::Vpmaskmovq => Some("looks at what is off"),
        M::Vpgatherdd | M::Vpgatherdq | M::Vpgatherqd | M::Vpgatherqq => Some("looks at what is off"),
        M::Ret if format!("{code:?}").ends_with("imm16") => Some("takes its operand as signed"),
        M::Test if format!("{code:?}").ends_with("r1") => Some("does not know the other encoding"),
        _ => None,
    }
}

#[test]
fn qemu_agrees_with_translated_code() {
    if let Ok(fd) = std::env::var(SERVE) {
        return serve(fd.parse().expect("a descriptor"));
    }
    let (emulated, end_page) = Emulated::new();
    let ours = Machine::new(X86Guest::get(), Engine::Auto);
    ours.set_end_page(&end_page);
    let (mut ours, mut emulated) = (Common(ours, Vec::new()), Common(emulated, Vec::new()));
    let seed = setting("HOLDFAST_LOCKSTEP_SEED", 4);
    let limits = Limits { insns: setting("HOLDFAST_LOCKSTEP_INSNS", 2_000), kinds: 40 };
    let report = run_of(Generator::of(seed, wanted), seed, limits, (&mut ours, &mut emulated));
    println!("{} instructions of {} codes, {} restarts", report.insns, report.codes, emulated.0.died);
    assert!(report.kinds.is_empty(), "{}", report.mismatches());
    assert!(report.codes > 850, "only {} codes", report.codes);
}
