//! Translates 64-bit code from a file: prints it, its IR and host code, or measures how long that takes.
//!
//! `translate FILE OFFSET [-t]`: the region at OFFSET of a flat binary.
#![allow(clippy::unwrap_used, reason = "a measurement")]

use std::time::Instant;

use holdfast_guest_x86::X86Guest;
use holdfast_guest_x86::key::Key;
use holdfast_tcg_ir::Builder;
use holdfast_tcg_ir::env::SlowPaths;
use holdfast_tcg_ir::helper::HelperRet;
use holdfast_tcg_runtime::{CodeReader, Guest, TranslateRequest};
use holdfast_tcg_x64::{Target, Translator};
use iced_x86::{Decoder, DecoderOptions};

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

fn disassemble(code: &[u8], ip: u64) {
    for i in &mut Decoder::with_ip(64, code, ip, DecoderOptions::NONE) {
        println!("{:6x} {i}", i.ip());
    }
}

fn main() {
    let mut args = std::env::args().skip(1);
    let bytes = std::fs::read(args.next().unwrap()).unwrap();
    let offset = u64::from_str_radix(args.next().unwrap().trim_start_matches("0x"), 16).unwrap();
    let measure = args.next().is_some();
    let base = 0x40_0000;
    let guest = X86Guest::get();
    let slow = SlowPaths { load, store, rmw: store, cas, lookup };
    let mut t = Translator::new(guest.spec().ir, guest.helpers().clone(), slow).unwrap();
    let mut out = vec![0u8; 1 << 20];
    let exec = out.as_ptr() as u64 & !0xfff;
    let stubs = t.stubs(&mut out, exec).unwrap();
    let at = stubs.len;
    let mut b = Builder::new(guest.helpers());
    let key = (Key::CODE64 | Key::PROTECTED | Key::LONG | Key::CS_FLAT | Key::DATA_FLAT).bits() | 3;
    let request = TranslateRequest { pc: base + offset, key, max_insns: 64, no_chain: false };
    let mut build = || {
        b.start(request.pc);
        CodeReader::over(base, &bytes, |code| guest.translate(&request, code, &mut b)).unwrap()
    };
    let done = build();
    if measure {
        let mut best = [u128::MAX; 2];
        for _ in 0..3000 {
            let start = Instant::now();
            b.start(request.pc);
            CodeReader::over(base, &bytes, |code| guest.translate(&request, code, &mut b)).unwrap();
            best[0] = best[0].min(start.elapsed().as_nanos());
            let target = Target { out: &mut out[at..], exec: exec + at as u64, region_id: 0 };
            t.compile(&stubs, b.region(), target).unwrap();
            best[1] = best[1].min(start.elapsed().as_nanos());
        }
        return println!("{} instructions: {} ns to IR, {} ns in all", done.insns, best[0], best[1]);
    }
    disassemble(&bytes[offset as usize..(done.end - base) as usize], request.pc);
    println!("{}", b.region());
    let target = Target { out: &mut out[at..], exec: exec + at as u64, region_id: 0 };
    let compiled = t.compile(&stubs, b.region(), target).unwrap();
    let (hot, len) = (compiled.hot_len, compiled.len);
    println!("hot {hot} of {len} bytes");
    disassemble(&t.bytes()[..hot], 0);
}
