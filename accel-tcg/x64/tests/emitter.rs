//! The emitter against an independent decoder: what was emitted is what was meant.
#![allow(clippy::unwrap_used, reason = "tests")]

use holdfast_tcg_x64::asm::{Alu, Asm, Cc, Mem, Reg, Rm, Shift, Xmm};
use iced_x86::{Decoder, DecoderOptions, Formatter, IntelFormatter};

const R64: [&str; 16] = [
    "rax", "rcx", "rdx", "rbx", "rsp", "rbp", "rsi", "rdi", "r8", "r9", "r10", "r11", "r12", "r13", "r14",
    "r15",
];
const R32: [&str; 16] = [
    "eax", "ecx", "edx", "ebx", "esp", "ebp", "esi", "edi", "r8d", "r9d", "r10d", "r11d", "r12d", "r13d",
    "r14d", "r15d",
];
const R8: [&str; 16] = [
    "al", "cl", "dl", "bl", "spl", "bpl", "sil", "dil", "r8b", "r9b", "r10b", "r11b", "r12b", "r13b", "r14b",
    "r15b",
];
const R16: [&str; 16] = [
    "ax", "cx", "dx", "bx", "sp", "bp", "si", "di", "r8w", "r9w", "r10w", "r11w", "r12w", "r13w", "r14w",
    "r15w",
];

fn one(emit: &dyn Fn(&mut Asm)) -> String {
    let mut a = Asm::new();
    emit(&mut a);
    let mut d = Decoder::with_ip(64, a.bytes(), 0, DecoderOptions::NONE);
    let i = d.decode();
    assert_eq!(d.position(), a.bytes().len(), "{:x?} decodes as several or none: {i}", a.bytes());
    let mut f = IntelFormatter::new();
    f.options_mut().set_hex_prefix("0x");
    f.options_mut().set_hex_suffix("");
    f.options_mut().set_space_after_operand_separator(true);
    f.options_mut().set_uppercase_hex(false);
    f.options_mut().set_leading_zeros(false);
    f.options_mut().set_small_hex_numbers_in_decimal(true);
    f.options_mut().set_always_show_scale(true);
    f.options_mut().set_memory_size_options(iced_x86::MemorySizeOptions::Never);
    let mut s = String::new();
    f.format(&i, &mut s);
    s
}

fn num(n: i64) -> String {
    if n < 10 { format!("{n}") } else { format!("0x{n:x}") }
}

fn mem(m: Mem) -> String {
    let mut s = format!("[{}", R64[m.base as usize]);
    if m.index != Mem::NONE {
        s += &format!("+{}*{}", R64[m.index as usize], 1 << m.scale);
    }
    if m.disp > 0 {
        s += &format!("+{}", num(i64::from(m.disp)));
    } else if m.disp < 0 {
        s += &format!("-{}", num(-i64::from(m.disp)));
    }
    s + "]"
}

fn mems() -> Vec<Mem> {
    let mut v = Vec::new();
    for b in 0..16 {
        for disp in [0, 8, -128, 127, 128, -0x111080] {
            v.push(Mem::base(Reg(b), disp));
            for x in [0u8, 5, 7, 12, 13, 15] {
                v.push(Mem::index(Reg(b), Reg(x), x & 3, disp));
            }
        }
    }
    v
}

fn regs() -> impl Iterator<Item = Reg> {
    (0..16).map(Reg)
}

#[test]
fn register_forms() {
    for d in regs() {
        for s in regs() {
            let (d64, s64, d32, s32) =
                (R64[d.0 as usize], R64[s.0 as usize], R32[d.0 as usize], R32[s.0 as usize]);
            assert_eq!(one(&|a| a.mov(true, d, s)), format!("mov {d64}, {s64}"));
            assert_eq!(one(&|a| a.mov(false, d, s)), format!("mov {d32}, {s32}"));
            for (op, n) in [(Alu::Add, "add"), (Alu::Sub, "sub"), (Alu::Cmp, "cmp"), (Alu::Xor, "xor")] {
                assert_eq!(one(&|a| a.alu(op, true, d, s)), format!("{n} {d64}, {s64}"));
                assert_eq!(one(&|a| a.alu(op, false, d, s)), format!("{n} {d32}, {s32}"));
            }
            assert_eq!(one(&|a| a.movzx(0, d, s)), format!("movzx {d32}, {}", R8[s.0 as usize]));
            assert_eq!(one(&|a| a.movzx(1, d, s)), format!("movzx {d32}, {}", R16[s.0 as usize]));
            assert_eq!(one(&|a| a.movsx(0, true, d, s)), format!("movsx {d64}, {}", R8[s.0 as usize]));
            assert_eq!(one(&|a| a.movsx(1, false, d, s)), format!("movsx {d32}, {}", R16[s.0 as usize]));
            assert_eq!(one(&|a| a.movsx(2, true, d, s)), format!("movsxd {d64}, {s32}"));
            assert_eq!(one(&|a| a.imul(true, d, s)), format!("imul {d64}, {s64}"));
            // The formatter drops the middle operand when it is the first.
            let text =
                if d == s { format!("imul {d32}, 0x3e8") } else { format!("imul {d32}, {s32}, 0x3e8") };
            assert_eq!(one(&|a| a.imul_imm(false, d, s, 1000)), text);
            assert_eq!(one(&|a| a.cmov(Cc::L, true, d, s)), format!("cmovl {d64}, {s64}"));
            assert_eq!(one(&|a| a.test(true, d, s)), format!("test {d64}, {s64}"));
            assert_eq!(one(&|a| a.popcnt(true, d, s)), format!("popcnt {d64}, {s64}"));
            assert_eq!(one(&|a| a.lzcnt(false, d, s)), format!("lzcnt {d32}, {s32}"));
            assert_eq!(one(&|a| a.tzcnt(true, d, s)), format!("tzcnt {d64}, {s64}"));
            assert_eq!(one(&|a| a.bsr(true, d, s)), format!("bsr {d64}, {s64}"));
            assert_eq!(one(&|a| a.bsf(true, d, s)), format!("bsf {d64}, {s64}"));
            assert_eq!(one(&|a| a.rorx(true, d, s, 8)), format!("rorx {d64}, {s64}, 8"));
            for n in regs() {
                let n64 = R64[n.0 as usize];
                assert_eq!(
                    one(&|a| a.shiftx(Shift::Shl, true, d, s, n)),
                    format!("shlx {d64}, {s64}, {n64}")
                );
                assert_eq!(
                    one(&|a| a.shiftx(Shift::Sar, false, d, s, n)),
                    format!("sarx {d32}, {s32}, {}", R32[n.0 as usize])
                );
                assert_eq!(
                    one(&|a| a.shiftx(Shift::Shr, true, d, s, n)),
                    format!("shrx {d64}, {s64}, {n64}")
                );
                assert_eq!(one(&|a| a.andn(true, d, s, n)), format!("andn {d64}, {s64}, {n64}"));
            }
        }
        let (d64, d32) = (R64[d.0 as usize], R32[d.0 as usize]);
        assert_eq!(one(&|a| a.push(d)), format!("push {d64}"));
        assert_eq!(one(&|a| a.pop(d)), format!("pop {d64}"));
        assert_eq!(one(&|a| a.bswap(true, d)), format!("bswap {d64}"));
        assert_eq!(one(&|a| a.bswap(false, d)), format!("bswap {d32}"));
        assert_eq!(one(&|a| a.setcc(Cc::A, d)), format!("seta {}", R8[d.0 as usize]));
        assert_eq!(one(&|a| a.group3(3, true, d)), format!("neg {d64}"));
        assert_eq!(one(&|a| a.group3(2, false, d)), format!("not {d32}"));
        assert_eq!(one(&|a| a.group3(6, true, d)), format!("div {d64}"));
        assert_eq!(one(&|a| a.shift_imm(Shift::Sar, true, d, 12)), format!("sar {d64}, 0xc"));
        assert_eq!(one(&|a| a.shift_cl(Shift::Rol, false, d)), format!("rol {d32}, cl"));
        assert_eq!(one(&|a| a.jmp_rm(d)), format!("jmp {d64}"));
        assert_eq!(one(&|a| a.call_rm(d)), format!("call {d64}"));
        assert_eq!(one(&|a| a.mov_imm(d, 0x1234)), format!("mov {d32}, 0x1234"));
        assert_eq!(one(&|a| a.mov_imm(d, u64::MAX)), format!("mov {d64}, 0xffffffffffffffff"));
        assert_eq!(one(&|a| a.mov_imm(d, 0x1_2345_6789)), format!("mov {d64}, 0x123456789"));
        assert_eq!(one(&|a| a.alu_imm(Alu::And, true, d, -4096)), format!("and {d64}, 0xfffffffffffff000"));
        assert_eq!(one(&|a| a.alu_imm(Alu::Or, false, d, 5)), format!("or {d32}, 5"));
        assert_eq!(one(&|a| a.test_imm(true, d, 0x1000)), format!("test {d64}, 0x1000"));
    }
}

#[test]
fn memory_forms() {
    for m in mems() {
        let t = mem(m);
        for r in regs() {
            let n = r.0 as usize;
            assert_eq!(one(&|a| a.mov(true, r, m)), format!("mov {}, {t}", R64[n]));
            assert_eq!(one(&|a| a.lea(true, r, m)), format!("lea {}, {t}", R64[n]));
            assert_eq!(one(&|a| a.store(0, m, r)), format!("mov {t}, {}", R8[n]));
            assert_eq!(one(&|a| a.store(1, m, r)), format!("mov {t}, {}", R16[n]));
            assert_eq!(one(&|a| a.store(2, m, r)), format!("mov {t}, {}", R32[n]));
            assert_eq!(one(&|a| a.store(3, m, r)), format!("mov {t}, {}", R64[n]));
            assert_eq!(one(&|a| a.movzx(0, r, m)), format!("movzx {}, {t}", R32[n]));
            assert_eq!(one(&|a| a.movsx(1, true, r, m)), format!("movsx {}, {t}", R64[n]));
            assert_eq!(one(&|a| a.alu(Alu::Cmp, true, r, m)), format!("cmp {}, {t}", R64[n]));
            assert_eq!(one(&|a| a.alu_store(Alu::Or, false, m, r)), format!("or {t}, {}", R32[n]));
            assert_eq!(one(&|a| a.lock_cmpxchg(3, m, r)), format!("lock cmpxchg {t}, {}", R64[n]));
            assert_eq!(one(&|a| a.lock_xadd(2, m, r)), format!("lock xadd {t}, {}", R32[n]));
            assert_eq!(one(&|a| a.xchg(0, m, r)), format!("xchg {t}, {}", R8[n]));
            assert_eq!(one(&|a| a.andn(true, r, Reg::R9, m)), format!("andn {}, r9, {t}", R64[n]));
        }
        assert_eq!(one(&|a| a.alu_imm(Alu::Cmp, false, m, 0)), format!("cmp {t}, 0"));
        assert_eq!(one(&|a| a.store_imm(0, m, 7)), format!("mov {t}, 7"));
        assert_eq!(one(&|a| a.store_imm(1, m, 0x1234)), format!("mov {t}, 0x1234"));
        assert_eq!(one(&|a| a.store_imm(2, m, 0x12345)), format!("mov {t}, 0x12345"));
        assert_eq!(one(&|a| a.store_imm(3, m, -1)), format!("mov {t}, 0xffffffffffffffff"));
        assert_eq!(one(&|a| a.ldmxcsr(m)), format!("ldmxcsr {t}"));
        assert_eq!(one(&|a| a.stmxcsr(m)), format!("stmxcsr {t}"));
        assert_eq!(one(&|a| a.jmp_rm(m)), format!("jmp {t}"));
        for x in (0..16).map(Xmm) {
            let n = x.0;
            assert_eq!(one(&|a| a.fload(true, x, m)), format!("movsd xmm{n}, {t}"));
            assert_eq!(one(&|a| a.fload(false, x, m)), format!("movss xmm{n}, {t}"));
            assert_eq!(one(&|a| a.fstore(true, m, x)), format!("movsd {t}, xmm{n}"));
            assert_eq!(one(&|a| a.movups(x, m)), format!("movups xmm{n}, {t}"));
            assert_eq!(one(&|a| a.sse(0xf2, 0x58, x, m)), format!("addsd xmm{n}, {t}"));
            assert_eq!(
                one(&|a| a.fma231(0xb9, true, x, Xmm(9), m)),
                format!("vfmadd231sd xmm{n}, xmm9, {t}")
            );
        }
    }
}

#[test]
fn vector_register_forms() {
    for d in (0..16).map(Xmm) {
        for s in (0..16).map(Xmm) {
            let (x, y) = (d.0, s.0);
            assert_eq!(one(&|a| a.sse(0xf3, 0x59, d, s)), format!("mulss xmm{x}, xmm{y}"));
            assert_eq!(one(&|a| a.sse(0x66, 0x2e, d, s)), format!("ucomisd xmm{x}, xmm{y}"));
            assert_eq!(one(&|a| a.sse(0, 0x57, d, s)), format!("xorps xmm{x}, xmm{y}"));
            assert_eq!(
                one(&|a| a.fma231(0xbf, false, d, Xmm(3), s)),
                format!("vfnmsub231ss xmm{x}, xmm3, xmm{y}")
            );
        }
        for r in regs() {
            let (x, n) = (d.0, r.0 as usize);
            assert_eq!(one(&|a| a.mov_to_xmm(true, d, r)), format!("movq xmm{x}, {}", R64[n]));
            assert_eq!(one(&|a| a.mov_from_xmm(false, r, d)), format!("movd {}, xmm{x}", R32[n]));
            assert_eq!(
                one(&|a| a.cvt_to_int((true, true, true), r, d)),
                format!("cvttsd2si {}, xmm{x}", R64[n])
            );
            assert_eq!(
                one(&|a| a.cvt_to_int((false, false, false), r, d)),
                format!("cvtss2si {}, xmm{x}", R32[n])
            );
            assert_eq!(one(&|a| a.cvt_from_int(true, true, d, r)), format!("cvtsi2sd xmm{x}, {}", R64[n]));
        }
    }
}

#[test]
fn jumps_and_rip() {
    let mut a = Asm::new();
    let at = a.jcc(Cc::Ne);
    let s = a.jcc_short(Cc::E);
    a.ret();
    a.patch_short(s);
    a.lea(true, Reg::RAX, Mem { base: Mem::RIP, index: Mem::NONE, scale: 0, disp: 0x1000 });
    a.alu_imm(
        Alu::Cmp,
        false,
        Rm::M(Mem { base: Mem::RIP, index: Mem::NONE, scale: 0, disp: 0x2000 }),
        77777,
    );
    let end = a.pos();
    a.patch_rel(at, end);
    let list: Vec<_> = Decoder::with_ip(64, a.bytes(), 0, DecoderOptions::NONE).iter().collect();
    assert_eq!(list[0].near_branch_target(), end as u64);
    assert_eq!(list[1].near_branch_target(), list[3].ip());
    assert_eq!(list[3].ip_rel_memory_address(), 0x1000);
    assert_eq!((list[4].ip_rel_memory_address(), list[4].immediate32()), (0x2000, 77777));
    for align in [4usize, 16] {
        for plus in 0..4 {
            let mut a = Asm::new();
            a.ret();
            a.align(align, plus);
            assert_eq!((a.pos() + plus) % align, 0);
        }
    }
}

#[test]
fn running_out_of_room_is_noticed() {
    let mut a = Asm::new();
    while a.room() {
        a.raw(&[0x90; 1000]);
    }
    assert!(a.overflowed() && !a.room());
    a.clear();
    assert!(a.room());
}

#[test]
fn the_tail_of_a_probe_is_what_its_instructions_are() {
    for (t1, t2) in [(Reg::RDI, Reg::RSI), (Reg::RAX, Reg::RCX), (Reg::RCX, Reg::RDX), (Reg::RDX, Reg::RAX)] {
        let array = 0x12340;
        let mut tail = Asm::new();
        let miss = tail.probe_tail((t1, t2), 0xfff0, array);
        let mut d = Decoder::with_ip(64, tail.bytes(), 0, DecoderOptions::NONE);
        let text: Vec<String> = d.iter().map(|i| i.to_string()).collect();
        let (a, b) = (R64[usize::from(t1.0)], R64[usize::from(t2.0)]);
        let wanted = [
            format!("and {},0FFF0h", R32[usize::from(t1.0)]),
            format!("and {b},0FFFFFFFFFFFFF000h"),
            format!("add {b},r15"),
            format!("cmp {b},[rbp+{a}+12340h]"),
            format!("jne {:016X}h", miss + 4),
            format!("mov {a},[rbp+{a}+12348h]"),
        ];
        assert_eq!(text, wanted);
    }
}
