//! Loops of vector code: the same results as the host's, and how long they take.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use std::sync::Arc;
use std::time::Instant;

use common::case::{CODE, DATA, DATA_SIZE, END, End, Image, Processor};
use common::guest::Machine;
use common::host::Host;
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
    let mut ours = Machine::new(Arc::new(X86Guest::new()), Engine::Auto);
    let mut interpreted = Machine::new(Arc::new(X86Guest::new()), Engine::Interpreter);
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
