//! Loops of vector code: the same results as the host's, and how long they take. Registers that are read and written in a loop
//! stay in registers of the host from round to round, whatever else the loop does.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::time::Instant;

use common::case::{CODE, Case, DATA, DATA_SIZE, END, End, Image, Processor, Role};
use common::compare::differences;
use common::guest::Machine;
use common::host::{Host, has_avx512};
use common::random::Random;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;
use iced_x86::code_asm::*;

/// Elements of each of the two arrays.
const LENGTH: i32 = 480;

/// A loop over the arrays at rsi and rdi, with the factor in xmm0 to xmm0's all elements.
fn code(step: i32, body: impl Fn(&mut CodeAssembler)) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit");
    let (mut outer, mut inner) = (a.create_label(), a.create_label());
    let mut build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        a.set_label(&mut outer)?;
        a.xor(eax, eax)?;
        a.set_label(&mut inner)?;
        body(a);
        a.add(rax, step)?;
        a.cmp(rax, LENGTH)?;
        a.jb(inner)?;
        a.dec(r15)?;
        a.jne(outer)?;
        a.mov(r14, END)?;
        a.jmp(r14)
    };
    build(&mut a).expect("code");
    a.assemble(CODE).expect("code")
}

use iced_x86::IcedError;

fn scalar(a: &mut CodeAssembler) {
    let mut f = || -> Result<(), IcedError> {
        a.movsd_2(xmm1, qword_ptr(rsi + rax * 8))?;
        a.mulsd(xmm1, xmm0)?;
        a.addsd(xmm1, qword_ptr(rdi + rax * 8))?;
        a.movsd_2(qword_ptr(rdi + rax * 8), xmm1)
    };
    f().expect("code");
}

fn sse2(a: &mut CodeAssembler) {
    let mut f = || -> Result<(), IcedError> {
        a.movapd(xmm1, xmmword_ptr(rsi + rax * 8))?;
        a.mulpd(xmm1, xmm0)?;
        a.addpd(xmm1, xmmword_ptr(rdi + rax * 8))?;
        a.movapd(xmmword_ptr(rdi + rax * 8), xmm1)
    };
    f().expect("code");
}

fn avx2(a: &mut CodeAssembler) {
    let mut f = || -> Result<(), IcedError> {
        a.vmovupd(ymm1, ymmword_ptr(rdi + rax * 8))?;
        a.vfmadd231pd(ymm1, ymm0, ymmword_ptr(rsi + rax * 8))?;
        a.vmovupd(ymmword_ptr(rdi + rax * 8), ymm1)
    };
    f().expect("code");
}

fn image(repeats: u64) -> Image {
    let mut image = Image::new();
    image.rip = CODE;
    image.gpr[4] = DATA + 0x1ff0;
    image.gpr[6] = DATA;
    image.gpr[7] = DATA + 0x1080;
    image.gpr[15] = repeats;
    for lane in 0..2 {
        image.xsave[160 + 8 * lane..168 + 8 * lane].copy_from_slice(&0.75f64.to_le_bytes());
        image.xsave[576 + 8 * lane..584 + 8 * lane].copy_from_slice(&0.75f64.to_le_bytes());
    }
    image
}

/// Nanoseconds an element, and the data afterwards.
fn run(on: &mut dyn Processor, code: &[u8], repeats: u64) -> (f64, Vec<u8>) {
    let mut data = [0u8; DATA_SIZE];
    for (n, d) in data.chunks_exact_mut(8).take(0x400).enumerate() {
        d.copy_from_slice(&(n as f64 * 0.125 - 40.0).to_le_bytes());
    }
    on.place(0, code);
    let started = Instant::now();
    let outcome = on.run(64, &image(repeats), &data);
    let ns = started.elapsed().as_nanos() as f64 / (repeats as f64 * f64::from(LENGTH));
    assert_eq!(outcome.end, End::Done);
    (ns, on.data().to_vec())
}

#[test]
fn daxpy() {
    let mut host = Host::new();
    let mut ours = Machine::new(X86Guest::get(), Engine::Auto);
    let mut interpreted = Machine::new(X86Guest::get(), Engine::Interpreter);
    let fma = is_x86_feature_detected!("fma") && is_x86_feature_detected!("avx2");
    let all = [("scalar", code(1, scalar)), ("SSE2", code(2, sse2)), ("AVX2", code(4, avx2))];
    let repeats = std::env::var("HOLDFAST_LOOP_REPEATS").ok().and_then(|v| v.parse().ok()).unwrap_or(2000);
    for (name, code) in all.into_iter().filter(|l| l.0 != "AVX2" || fma) {
        assert_eq!(run(&mut host, &code, 3).1, run(&mut interpreted, &code, 3).1, "{name}, interpreted");
        let (native, want) = run(&mut host, &code, repeats);
        let (took, got) = run(&mut ours, &code, repeats);
        println!("{name}: {took:.2} ns an element, the host {native:.2}");
        assert!(want == got, "{name}");
    }
}

/// One instruction on registers 0 to 4, or a few that belong together.
fn any(a: &mut CodeAssembler, random: &mut Random, wide: bool) -> Result<(), IcedError> {
    let xmms = [xmm0, xmm1, xmm2, xmm3, xmm4];
    let (ymms, zmms) = ([ymm0, ymm1, ymm2, ymm3, ymm4], [zmm0, zmm1, zmm2, zmm3, zmm4]);
    let mut pick = || random.below(5) as usize;
    let (n, m, l) = (pick(), pick(), pick());
    let (x, y, z) = (xmms[n], xmms[m], xmms[l]);
    match random.below(if wide { 30 } else { 24 }) {
        0 => a.addsd(x, y),
        1 => a.mulsd(x, y),
        2 => a.subsd(x, qword_ptr(rsi + rax * 8)),
        3 => a.minsd(x, y),
        4 => a.addss(x, y),
        5 => a.mulss(x, y),
        6 => a.cvtss2sd(x, y),
        7 => a.cvtsd2ss(x, y),
        8 => a.addpd(x, y),
        9 => a.addps(x, y),
        10 => a.paddd(x, y),
        11 => a.pshufd(x, y, 0x4e),
        12 => a.movsd_2(x, y),
        13 => a.movss(x, y),
        14 => a.movsd_2(x, qword_ptr(rsi + rax * 8)),
        15 => a.movss(x, dword_ptr(rsi + rax * 8)),
        16 => a.movsd_2(qword_ptr(rdi + rax * 8), x),
        17 => a.movups(xmmword_ptr(rdi + rax * 8), x),
        18 => a.vaddpd(ymms[n], ymms[m], ymms[l]),
        19 => a.vaddsd(x, y, z),
        20 => a.vextractf128(x, ymms[m], 1),
        21 => a.stmxcsr(dword_ptr(rdi + 0x800)),
        22 => {
            let mut skip = a.create_label();
            a.ucomisd(x, y)?;
            if random.percent(50) {
                a.jp(skip)?
            } else {
                a.ja(skip)?
            }
            a.addsd(z, x)?;
            a.mulpd(y, z)?;
            a.set_label(&mut skip)?;
            a.nop()
        }
        23 => {
            let mut skip = a.create_label();
            a.test(al, 1)?;
            a.je(skip)?;
            a.addsd(x, y)?;
            a.addss(z, x)?;
            a.set_label(&mut skip)?;
            a.nop()
        }
        24 => a.vaddpd(zmms[n], zmms[m], zmms[l]),
        25 => a.vaddpd(zmms[n].k1(), zmms[m], zmms[l]),
        26 => a.vpternlogd(zmms[n], zmms[m], zmms[l], 0x96),
        27 => a.vaddsd(x.k2(), y, z),
        28 => a.vpcmpd(k1, zmms[n], zmms[m], 1),
        _ => a.vmovdqu64(zmmword_ptr(rdi + rax * 8), zmms[n]),
    }
}

/// A loop in a loop, of which the inner has `length` parts.
fn any_loop(random: &mut Random, wide: bool) -> Vec<u8> {
    let mut a = CodeAssembler::new(64).expect("64-bit");
    let (mut outer, mut inner, mut out) = (a.create_label(), a.create_label(), a.create_label());
    let mut build = |a: &mut CodeAssembler| -> Result<(), IcedError> {
        a.set_label(&mut outer)?;
        a.xor(eax, eax)?;
        a.set_label(&mut inner)?;
        for _ in 0..1 + random.below(9) {
            any(a, random, wide)?;
        }
        if random.percent(20) {
            // Out of the middle.
            a.cmp(eax, 17)?;
            a.je(out)?;
        }
        a.inc(eax)?;
        a.cmp(eax, 24)?;
        a.jb(inner)?;
        if random.percent(30) {
            any(a, random, wide)?;
        }
        a.dec(r15)?;
        a.jne(outer)?;
        a.set_label(&mut out)?;
        a.mov(r14, END)?;
        a.jmp(r14)
    };
    build(&mut a).expect("code");
    a.assemble(CODE).expect("code")
}

#[test]
fn registers_live_on_from_round_to_round() {
    let wide = has_avx512();
    let ours = |engine| {
        let guest = X86Guest::get();
        if wide { Machine::wide(guest, engine) } else { Machine::new(guest, engine) }
    };
    let mut host = Host::new();
    let (mut translated, mut interpreted) = (ours(Engine::Auto), ours(Engine::Interpreter));
    let mut random = Random::new(0x100b);
    let loops = std::env::var("HOLDFAST_LOOPS").ok().and_then(|v| v.parse().ok()).unwrap_or(400);
    for n in 0..loops {
        let code = any_loop(&mut random, wide);
        let case =
            Case { bits: 64, at: 0, code: Vec::new(), roles: [Role::Any; 16], seed: random.next(), wide };
        let mut image = case.image();
        (image.rip, image.rflags) = (CODE, 0x202);
        image.put(24, &0x1f80u32.to_le_bytes());
        (image.gpr[4], image.gpr[6], image.gpr[7], image.gpr[15]) = (DATA + 0x1ff0, DATA, DATA + 0x1000, 3);
        let data: [u8; DATA_SIZE] = std::array::from_fn(|at| (at * 31 + at / 57) as u8);
        let go = |on: &mut dyn Processor| {
            on.place(0, &code);
            let outcome = on.run(64, &image, &data);
            assert_eq!(outcome.end, End::Done, "loop {n} on {}", on.name());
            (outcome.image, on.data().to_vec())
        };
        let want = go(&mut host);
        for machine in [&mut translated, &mut interpreted] {
            let got = go(machine);
            let differ = differences(64, &want.0, &got.0);
            assert!(
                differ.is_empty() && want.1 == got.1,
                "loop {n} on {}: {differ:#?}\n{code:02x?}",
                machine.name()
            );
        }
    }
}
