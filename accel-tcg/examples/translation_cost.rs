//! What it costs to translate a stretch of code: `translation_cost riscv64|x86_64 FILE OFFSET LENGTH [ROUNDS]` (hexadecimal)
//! translates region after region from OFFSET of FILE on, as user code, and prints the mean. Without a VM, so the data base of
//! translations has no part in it. Run under `valgrind --tool=callgrind` it tells where instructions go.
#![allow(clippy::unwrap_used, reason = "a measurement")]

use std::time::Instant;

use holdfast_guest_riscv::RiscvGuest;
use holdfast_guest_x86::X86Guest;
use holdfast_guest_x86::key::Key;
use holdfast_tcg_ir::Builder;
use holdfast_tcg_ir::env::SlowPaths;
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_runtime::{CodeReader, Guest, TranslateRequest};
use holdfast_tcg_x64::{Target, Translator};

unsafe extern "C" fn load(_: *mut u8, _: u64, _: u32, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn store(_: *mut u8, _: u64, _: u32, _: u64, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn cas(_: *mut u8, _: u64, _: u32, _: u64, _: u64, _: u64) -> HelperRet {
    HelperRet::ok(0)
}
unsafe extern "C" fn lookup(_: *mut u8, _: u64) -> u64 {
    0
}

#[derive(Default)]
struct Sums {
    regions: u64,
    insns: u64,
    ir: u64,
    guest: u64,
    host: u64,
    links: u64,
    build_ns: u128,
    compile_ns: u128,
}

fn hex(text: &str) -> u64 {
    u64::from_str_radix(text.trim_start_matches("0x"), 16).unwrap()
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let (guest, key): (&'static dyn Guest, u32) = match args[0].as_str() {
        "riscv64" => (RiscvGuest::get(), 1 << 2),
        _ => {
            let key = Key::CODE64
                | Key::PROTECTED
                | Key::LONG
                | Key::CS_FLAT
                | Key::DATA_FLAT
                | Key::OSFXSR
                | Key::AVX;
            (X86Guest::get(), (key.bits() | 3) & !Key::MMU_IDX.bits() | 1 << 18)
        }
    };
    let file = std::fs::read(&args[1]).unwrap();
    let (offset, len) = (hex(&args[2]), hex(&args[3]));
    let rounds = args.get(4).map_or(1, |n| n.parse().unwrap());
    let slow = SlowPaths { load, store, rmw: store, cas, lookup };
    let mut t = Translator::new(guest.spec().ir, guest.helpers().clone(), slow).unwrap();
    let mut out = vec![0u8; 1 << 20];
    let exec = out.as_ptr() as u64 & !0xfff;
    let stubs = t.stubs(&mut out, exec).unwrap();
    let at = stubs.len;
    let mut b = Builder::new(guest.helpers());
    let mut best: Option<Sums> = None;
    for _ in 0..rounds {
        let mut s = Sums::default();
        let mut pc = offset;
        while pc < offset + len {
            let start = Instant::now();
            let request = TranslateRequest { pc, key, max_insns: 64, no_chain: false };
            b.start(pc);
            let Ok(done) = CodeReader::over(0, &file, |code| guest.translate(&request, code, &mut b)) else {
                break;
            };
            let built = Instant::now();
            let target = Target { out: &mut out[at..], exec: exec + at as u64, region_id: 0 };
            let made = t.compile(&stubs, b.region(), target).unwrap();
            s.compile_ns += built.elapsed().as_nanos();
            s.build_ns += (built - start).as_nanos();
            s.regions += 1;
            s.insns += u64::from(done.insns);
            s.ir += b.region().insts.len() as u64;
            s.guest += done.end - pc;
            s.host += made.len as u64;
            s.links += made.links.len() as u64;
            pc = done.end;
        }
        if best.as_ref().is_none_or(|b| s.build_ns + s.compile_ns < b.build_ns + b.compile_ns) {
            best = Some(s);
        }
    }
    let s = best.unwrap();
    let each = |x: u64| x as f64 / s.regions as f64;
    let time = |ns: u128| ns as f64 / 1e3 / s.regions as f64;
    println!("{} regions of {:.1} instructions, {:.1} links", s.regions, each(s.insns), each(s.links));
    println!(
        "{:.1} guest bytes, {:.1} IR instructions, {:.1} host bytes",
        each(s.guest),
        each(s.ir),
        each(s.host)
    );
    let all = s.build_ns + s.compile_ns;
    println!(
        "{:.2} us to IR, {:.2} us to host code: {:.2} us a region",
        time(s.build_ns),
        time(s.compile_ns),
        time(all)
    );
    println!("{:.0} ns an instruction", all as f64 / s.insns as f64);
}
