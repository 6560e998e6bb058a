//! Faults in the middle of string and vector instructions: what has been done is done, what has not is not, and the
//! registers say which. The same cases run on the host's processor.
#![cfg(all(target_arch = "x86_64", target_os = "linux"))]

mod common;

use common::case::{CODE, Case, DATA, DATA_RW, DATA_SIZE, End, Image, Outcome, Processor, Role};
use common::guest::Machine;
use common::host::Host;
use holdfast_guest_x86::X86Guest;
use holdfast_tcg_runtime::Engine;

const RAX: usize = 0;
const RCX: usize = 1;
const RSI: usize = 6;
const RDI: usize = 7;
/// The first address that can only be read.
const READ_ONLY: u64 = DATA + DATA_RW as u64;
/// The first address behind all data.
const BEHIND: u64 = DATA + DATA_SIZE as u64;

/// What a store to `address` raises: the page is there, or it is not.
fn write_fault(address: u64) -> End {
    let there = (DATA..BEHIND).contains(&address);
    End::Fault { vector: 14, error: 6 | u32::from(there), address }
}

fn read_fault(address: u64) -> End {
    End::Fault { vector: 14, error: 4, address }
}

/// Data that tells where each byte came from.
fn data() -> [u8; DATA_SIZE] {
    std::array::from_fn(|n| (n * 7 + n / 251) as u8)
}

/// Runs `code` on the host, by translation and by the interpreter; `check` looks at each.
fn each(code: &[u8], set: impl Fn(&mut Image), check: impl Fn(&str, &Outcome, &[u8])) {
    let case =
        Case { bits: 64, at: 0x80, code: code.to_vec(), roles: [Role::Small; 16], seed: 1, wide: false };
    let mut image = case.image();
    // No DF, no AC; the state is otherwise any.
    image.rflags = 0x202;
    set(&mut image);
    let ours = |engine| Machine::new(X86Guest::get(), engine);
    let mut host = Host::new();
    let (mut translated, mut interpreted) = (ours(Engine::Auto), ours(Engine::Interpreter));
    let all: [&mut dyn Processor; 3] = [&mut host, &mut translated, &mut interpreted];
    for processor in all {
        processor.place(case.at, &case.bytes());
        // Twice: with translations and TLB entries there is nothing new.
        for _ in 0..2 {
            let outcome = processor.run(64, &image, &data());
            if matches!(outcome.end, End::Fault { .. }) {
                assert_eq!(outcome.image.rip, CODE + 0x80, "{}", processor.name());
            }
            check(processor.name(), &outcome, processor.data());
        }
    }
}

fn vector(image: &mut Image, n: usize, words: [u64; 4]) {
    for (lane, word) in words.into_iter().enumerate() {
        let at = if lane < 2 { 160 + 16 * n + 8 * lane } else { 576 + 16 * n + 8 * (lane - 2) };
        image.xsave[at..at + 8].copy_from_slice(&word.to_le_bytes());
    }
}

fn vector_of(image: &Image, n: usize) -> [u64; 4] {
    [160, 168, 576, 584].map(|at| u64::from_le_bytes(image.get(at + 16 * n)))
}

/// `rep movs` up into pages that cannot be written, in steps of 1, 2, 4 and 8 bytes, from and to odd addresses.
#[test]
fn a_copy_stops_at_the_byte_that_faults() {
    for (size, code) in
        [(1, &[0xf3, 0xa4][..]), (2, &[0xf3, 0x66, 0xa5]), (4, &[0xf3, 0xa5]), (8, &[0xf3, 0x48, 0xa5])]
    {
        for skew in [0, 1, 3, 7] {
            let (from, to) = (DATA + 0x10, READ_ONLY - 0x1000 + 0x200 + skew);
            // Elements that fit before the read-only page; the next straddles or begins it.
            let fit = (READ_ONLY - to) / size;
            let set = |i: &mut Image| (i.gpr[RCX], i.gpr[RSI], i.gpr[RDI]) = (0x1000, from, to);
            each(code, set, |name, outcome, memory| {
                let i = &outcome.image;
                let what = format!("{name}, {size} bytes, skew {skew}");
                assert_eq!(outcome.end, write_fault(READ_ONLY), "{what}");
                assert_eq!(i.gpr[RCX], 0x1000 - fit, "{what}");
                assert_eq!((i.gpr[RSI] - from, i.gpr[RDI] - to), (fit * size, fit * size), "{what}");
                let mut expected = data()[..DATA_RW].to_vec();
                let (from, to) = ((from - DATA) as usize, (to - DATA) as usize);
                for n in 0..(fit * size) as usize {
                    expected[to + n] = expected[from + n];
                }
                assert!(memory == expected, "{what}: memory");
            });
        }
    }
}

/// The same with the source that ends, and downwards.
#[test]
fn a_copy_stops_where_its_source_ends() {
    let set = |i: &mut Image| (i.gpr[RCX], i.gpr[RSI], i.gpr[RDI]) = (100, BEHIND - 21, DATA);
    each(&[0xf3, 0xa5], set, |name, outcome, memory| {
        let i = &outcome.image;
        // The sixth double word begins at the last byte.
        assert_eq!(outcome.end, read_fault(BEHIND), "{name}");
        assert_eq!((i.gpr[RCX], i.gpr[RSI], i.gpr[RDI]), (95, BEHIND - 1, DATA + 20), "{name}");
        assert!(memory[..20] == data()[DATA_SIZE - 21..DATA_SIZE - 1] && memory[20..] == data()[20..DATA_RW]);
    });
    let down = |i: &mut Image| {
        i.rflags |= 0x400;
        (i.gpr[RCX], i.gpr[RSI], i.gpr[RDI]) = (100, DATA + 24, DATA + 0x1000);
    };
    each(&[0xf3, 0x48, 0xa5], down, |name, outcome, memory| {
        let i = &outcome.image;
        assert_eq!(outcome.end, read_fault(DATA - 8), "{name}");
        assert_eq!((i.gpr[RCX], i.gpr[RSI], i.gpr[RDI]), (96, DATA - 8, DATA + 0xfe0), "{name}");
        assert!(memory[0xfe8..0x1008] == data()[..32], "{name}");
    });
}

#[test]
fn a_fill_and_a_search_stop_at_the_byte_that_faults() {
    let to = READ_ONLY - 0x1801;
    let set = |i: &mut Image| (i.gpr[RAX], i.gpr[RCX], i.gpr[RDI]) = (0xa5, 0x5000, to);
    each(&[0xf3, 0xaa], set, |name, outcome, memory| {
        assert_eq!(outcome.end, write_fault(READ_ONLY), "{name}");
        assert_eq!((outcome.image.gpr[RCX], outcome.image.gpr[RDI]), (0x5000 - 0x1801, READ_ONLY), "{name}");
        let at = (to - DATA) as usize;
        assert!(memory[at..].iter().all(|b| *b == 0xa5) && memory[..at] == data()[..at], "{name}");
    });
    // repne scasq for what is nowhere.
    let from = BEHIND - 8 * 40 - 3;
    let set = |i: &mut Image| (i.gpr[RAX], i.gpr[RCX], i.gpr[RDI]) = (0x0123_4567, 1000, from);
    each(&[0xf2, 0x48, 0xaf], set, |name, outcome, _| {
        assert_eq!(outcome.end, read_fault(BEHIND), "{name}");
        assert_eq!((outcome.image.gpr[RCX], outcome.image.gpr[RDI]), (960, from + 320), "{name}");
    });
}

/// A vector that crosses into a page that cannot be written is not written at all.
#[test]
fn a_vector_store_is_whole_or_not_at_all() {
    // movups [rdi], xmm3; vmovups [rdi], ymm3; vmovdqu; movhps; vextractf128 [rdi], ymm3, 1; movq
    let stores: [(&[u8], u64); 6] = [
        (&[0x0f, 0x11, 0x1f], 16),
        (&[0xc5, 0xfc, 0x11, 0x1f], 32),
        (&[0xc5, 0xfe, 0x7f, 0x1f], 32),
        (&[0x0f, 0x17, 0x1f], 8),
        (&[0xc4, 0xe3, 0x7d, 0x19, 0x1f, 0x01], 16),
        (&[0x66, 0x0f, 0xd6, 0x1f], 8),
    ];
    for (code, size) in stores {
        for before in [1, size / 2, size - 1] {
            let set = |i: &mut Image| {
                i.gpr[RDI] = READ_ONLY - before;
                vector(i, 3, [0x1111, 0x2222, 0x3333, 0x4444]);
            };
            each(code, set, |name, outcome, memory| {
                assert_eq!(outcome.end, write_fault(READ_ONLY), "{name} {code:02x?}");
                assert!(memory == &data()[..DATA_RW], "{name} {code:02x?}, {before} bytes before");
            });
        }
    }
}

/// What lies in two pages is loaded and stored whole, wherever the pages meet.
#[test]
fn what_lies_in_two_pages_is_copied() {
    // mov ax, [rsi]; mov [rdi], ax, and so on; movups xmm0, [rsi]; movups [rdi], xmm0
    let copies: [(&[u8], usize); 4] = [
        (&[0x66, 0x8b, 0x06, 0x66, 0x89, 0x07], 2),
        (&[0x8b, 0x06, 0x89, 0x07], 4),
        (&[0x48, 0x8b, 0x06, 0x48, 0x89, 0x07], 8),
        (&[0x0f, 0x10, 0x06, 0x0f, 0x11, 0x07], 16),
    ];
    for (code, size) in copies {
        for (from, to) in (1..size).flat_map(|from| (1..size).map(move |to| (DATA_RW - from, 0x1000 - to))) {
            let set = |i: &mut Image| (i.gpr[RSI], i.gpr[RDI]) = (DATA + from as u64, DATA + to as u64);
            each(code, set, |name, outcome, memory| {
                assert_eq!(outcome.end, End::Done, "{name}");
                let mut expected = data()[..DATA_RW].to_vec();
                expected[to..to + size].copy_from_slice(&data()[from..from + size]);
                assert!(memory == expected, "{name}: {size} bytes from {from:#x} to {to:#x}");
            });
        }
    }
}

/// An element that is off does not fault; one that is on and does keeps all others from being stored.
#[test]
fn masked_stores_fault_for_what_is_on() {
    const ON: u64 = 1 << 63;
    // vpmaskmovq [rdi], ymm1, ymm2
    let code = [0xc4, 0xe2, 0xf5, 0x8e, 0x17];
    for (mask, faults) in [([ON, ON, 0, 0], false), ([ON, 0, 0, ON], true), ([0, 0, 0, 0], false)] {
        let set = |i: &mut Image| {
            i.gpr[RDI] = READ_ONLY - 16;
            vector(i, 1, mask);
            vector(i, 2, [1, 2, 3, 4]);
        };
        each(&code, set, |name, outcome, memory| {
            let end = if faults { write_fault(READ_ONLY + 8) } else { End::Done };
            assert_eq!(outcome.end, end, "{name} {mask:x?}");
            let mut expected = data()[..DATA_RW].to_vec();
            for n in (0..2).filter(|n| !faults && mask[*n] != 0) {
                let at = DATA_RW - 16 + 8 * n;
                expected[at..at + 8].copy_from_slice(&(n as u64 + 1).to_le_bytes());
            }
            assert!(memory == expected, "{name} {mask:x?}");
        });
    }
}

/// A gather that faults keeps what it has loaded, and its mask says what is left: run again, it goes on.
#[test]
fn a_gather_that_faults_keeps_its_progress() {
    // vpgatherqq ymm2, [rdi + ymm3 * 1], ymm4
    let code = [0xc4, 0xe2, 0xdd, 0x91, 0x14, 0x1f];
    let word = |at: usize| u64::from_le_bytes(data()[at..at + 8].try_into().expect("8 bytes"));
    let offset = BEHIND - DATA;
    let set = |i: &mut Image| {
        i.gpr[RDI] = DATA;
        vector(i, 2, [0xa, 0xb, 0xc, 0xd]);
        vector(i, 3, [16, 0x1001, offset - 4, 24]);
        vector(i, 4, [u64::MAX; 4]);
    };
    each(&code, set, |name, outcome, _| {
        assert_eq!(outcome.end, read_fault(BEHIND), "{name}");
        assert_eq!(vector_of(&outcome.image, 2), [word(16), word(0x1001), 0xc, 0xd], "{name}: data");
        assert_eq!(vector_of(&outcome.image, 4), [0, 0, u64::MAX, u64::MAX], "{name}: mask");
    });
    // The third is off: it is not loaded, and keeps what was there.
    let off = |i: &mut Image| {
        set(i);
        vector(i, 4, [u64::MAX, u64::MAX, 0, 1 << 63]);
    };
    each(&code, off, |name, outcome, _| {
        assert_eq!(outcome.end, End::Done, "{name}");
        assert_eq!(vector_of(&outcome.image, 2), [word(16), word(0x1001), 0xc, word(24)], "{name}: data");
        assert_eq!(vector_of(&outcome.image, 4), [0; 4], "{name}: mask");
    });
}

/// Pushes and pops that fault leave RSP and the flags; locked operations leave memory.
#[test]
fn what_faults_half_way_changes_nothing() {
    // enter 0x40, 3 with a stack that ends in the nesting's frame pointers; lock cmpxchg16b on a read-only page
    let set = |i: &mut Image| (i.gpr[4], i.gpr[5]) = (DATA + 8, DATA + 0x800);
    each(&[0xc8, 0x40, 0, 3], set, |name, outcome, _| {
        assert_eq!(outcome.end, write_fault(DATA - 8), "{name}");
        assert_eq!((outcome.image.gpr[4], outcome.image.gpr[5]), (DATA + 8, DATA + 0x800), "{name}");
    });
    let set = |i: &mut Image| i.gpr[RDI] = READ_ONLY - 4;
    // lock add qword [rdi], rax over the end of the page; xchg likewise
    for code in [&[0xf0, 0x48, 0x01, 0x07][..], &[0x48, 0x87, 0x07]] {
        each(code, set, |name, outcome, memory| {
            assert_eq!(outcome.end, write_fault(READ_ONLY), "{name}");
            assert_eq!(outcome.image.rflags & 0x8d5, 0, "{name}: flags");
            assert!(memory == &data()[..DATA_RW], "{name}");
        });
    }
}
