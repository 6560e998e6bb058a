//! Jumps between regions: requests, patching, guards, unlinking, the indirect-branch cache, polling.
#![allow(clippy::unwrap_used, reason = "tests")]

mod common;

use common::{Machine, RAM_SIZE, State, random_state, x};
use holdfast_tcg_ir::env::{self, exit, header, tables};
use holdfast_tcg_ir::{Builder, Cond, HelperTable, JumpHint, Region};
use holdfast_tcg_x64::{HostFeatures, LinkKind, LinkSite, Target};
use std::sync::atomic::Ordering;

const A: u64 = 0xffff_ffff_8000_1000;
const B_SAME: u64 = A + 0x40;
const B_CROSS: u64 = A + 0x3000;

/// Adds `n` to x5 and goes on.
fn adder(pc: u64, n: i64, end: impl Fn(&mut Builder)) -> Region {
    let mut b = Builder::new(&HelperTable::new());
    b.start(pc);
    b.insn(pc, 4);
    let v = b.get(x(5));
    let v = b.addi(v, n);
    b.set(x(5), v);
    end(&mut b);
    b.take()
}

struct Bench {
    m: Machine,
    used: usize,
    base: State,
}

impl Bench {
    fn new() -> Bench {
        let m = Machine::new(HelperTable::new(), HostFeatures::detect());
        let used = m.stubs.len.next_multiple_of(16);
        let mut base = random_state(&mut common::Rng(1));
        base.x[5] = 0;
        Bench { m, used, base }
    }

    /// Compiles behind what is there; gives the offset of the code and its links.
    fn add(&mut self, r: &Region, region_id: u32) -> (usize, Vec<LinkSite>) {
        let at = self.used;
        let exec = self.m.code.base as u64 + at as u64;
        let base = self.m.code.base;
        // SAFETY: the rest of the mapping, while the translator is borrowed too.
        let out = unsafe { std::slice::from_raw_parts_mut(base.add(at), 65536) };
        let c = self.m.translator.compile(&self.m.stubs, r, Target { out, exec, region_id }).unwrap();
        self.used += c.len;
        (at, c.links.to_vec())
    }

    /// Runs from the code at `at`: exit code, pc, exit argument, x5.
    fn run(&mut self, at: usize) -> (u32, u64, u64, u64) {
        let code = self.m.code.base as u64 + at as u64;
        let base = self.base;
        let a = self.m.run_code(code, &base, &vec![0; RAM_SIZE], 0x1f80);
        let env = self.m.env();
        // SAFETY: our environment.
        let (exit, arg) =
            unsafe { ((*header(env)).exit_request.load(Ordering::Relaxed), (*header(env)).exit_arg) };
        assert_eq!(exit, 0);
        (a.exit, a.pc, arg, a.state.x[5])
    }

    fn link(&mut self, from: usize, site: &LinkSite, to: usize, id: u32) -> bool {
        // SAFETY: nobody runs or patches at the same time.
        unsafe { site.link(self.m.code.base.add(from), to as i64 - from as i64, id) }
    }

    fn unlink(&mut self, from: usize, site: &LinkSite) {
        // SAFETY: nobody runs or patches at the same time.
        unsafe { site.unlink(self.m.code.base.add(from)) }
    }

    fn set_page_id(&mut self, pc: u64, id: u32) {
        let env = self.m.env();
        // SAFETY: our environment; the generation is the one that `run_code` sets.
        unsafe {
            (*tables(env)).page_ids[env::page_id_index(pc)] = env::page_id_entry(id, 7 << env::GEN_SHIFT);
        }
    }
}

#[test]
fn same_page_links() {
    let mut b = Bench::new();
    let (at, links) = b.add(&adder(A, 1, |b| b.goto_pc(B_SAME)), 77);
    let (to, _) = b.add(&adder(B_SAME, 100, |b| b.exit(0x200, 0x1234)), 78);
    assert_eq!((links.len(), links[0].kind, links[0].target_pc), (1, LinkKind::SamePage, B_SAME));
    // `run_code` shows a link request as a lookup: both mean "go on there".
    assert_eq!(b.run(at), (exit::LOOKUP, B_SAME, 77 << 32, 1));
    assert!(b.link(at, &links[0], to, 0));
    assert_eq!((b.run(at).0, b.run(at).3), (0x200, 101));
    b.unlink(at, &links[0]);
    assert_eq!(b.run(at).1, B_SAME);
}

#[test]
fn conditional_branches_link_directly() {
    let mut b = Bench::new();
    let r = adder(A, 1, |b| {
        let l = b.label();
        let (p, q) = (b.get(x(6)), b.get(x(7)));
        b.brcond(Cond::LtU, p, q, l);
        b.exit(0x300, A + 4);
        b.bind(l);
        b.goto_pc(B_SAME);
    });
    let (at, links) = b.add(&r, 5);
    let (to, _) = b.add(&adder(B_SAME, 100, |b| b.exit(0x200, 0x1234)), 6);
    (b.base.x[6], b.base.x[7]) = (1, 2);
    assert_eq!(b.run(at), (exit::LOOKUP, B_SAME, 5 << 32, 1));
    assert!(b.link(at, &links[0], to, 0));
    assert_eq!(b.run(at).0, 0x200);
    b.base.x[7] = 0;
    assert_eq!(b.run(at).0, 0x300);
}

#[test]
fn cross_page_links_are_guarded() {
    let mut b = Bench::new();
    let (at, links) = b.add(&adder(A, 1, |b| b.goto_pc(B_CROSS)), 9);
    let (to, _) = b.add(&adder(B_CROSS, 100, |b| b.exit(0x200, 0x1234)), 10);
    let site = links[0];
    assert_eq!(site.kind, LinkKind::CrossPage);
    assert_eq!(b.run(at), (exit::LOOKUP, B_CROSS, 9 << 32, 1));
    assert!(!b.link(at, &site, to, 0), "there is no mapping 0");
    assert!(b.link(at, &site, to, 3));
    // The page is not known to be mapped so: the lookup function (which finds nothing here) decides.
    assert_eq!(b.run(at).1, B_CROSS);
    b.set_page_id(B_CROSS, 3);
    assert_eq!((b.run(at).0, b.run(at).3), (0x200, 101));
    b.set_page_id(B_CROSS, 4);
    assert_eq!(b.run(at).0, exit::LOOKUP);
    assert!(!b.link(at, &site, to, 4), "one mapping per site");
    b.set_page_id(B_CROSS, 3);
    b.unlink(at, &site);
    assert_eq!(b.run(at), (exit::LOOKUP, B_CROSS, 9 << 32, 1));
    assert!(b.link(at, &site, to, 3));
    assert_eq!(b.run(at).0, 0x200);
}

#[test]
fn indirect_jumps_use_the_cache() {
    let mut b = Bench::new();
    let r = adder(A, 1, |b| {
        let t = b.get(x(6));
        b.goto_reg(t, JumpHint::Jump);
    });
    let (at, _) = b.add(&r, 1);
    let (to, _) = b.add(&adder(B_CROSS, 100, |b| b.exit(0x200, 0x1234)), 2);
    b.base.x[6] = B_CROSS;
    assert_eq!((b.run(at).0, b.run(at).1), (exit::LOOKUP, B_CROSS));
    let env = b.m.env();
    let code = b.m.code.base as u64 + to as u64;
    for (key, hit) in [(2, false), (1, true)] {
        // SAFETY: our environment.
        unsafe {
            let e = &mut (*tables(env)).ibtc[env::ibtc_index(B_CROSS, common::SPEC.pc_shift)];
            *e = env::IbtcEntry { pc: B_CROSS, key, code, pad: 0 };
        }
        assert_eq!(b.run(at).0 == 0x200, hit);
    }
    b.base.x[6] = B_CROSS + (1 << 24);
    let index = |pc| env::ibtc_index(pc, common::SPEC.pc_shift);
    assert_eq!(index(b.base.x[6]), index(B_CROSS));
    assert_eq!((b.run(at).0, b.run(at).1), (exit::LOOKUP, b.base.x[6]));
}

#[test]
fn endless_loops_are_left_on_request() {
    let loops: [Region; 3] = [
        adder(A, 1, |b| b.goto_pc(A)),
        adder(A, 1, |b| {
            let l = b.label_at(A + 4);
            b.bind(l);
            b.br(l);
        }),
        adder(A, 1, |b| {
            let t = b.get(x(6));
            b.goto_reg(t, JumpHint::Jump);
        }),
    ];
    for (n, r) in loops.iter().enumerate() {
        let mut b = Bench::new();
        b.base.x[6] = A;
        let (at, _) = b.add(r, 1);
        let code = b.m.code.base as u64 + at as u64;
        let env = b.m.env() as usize;
        // SAFETY: our environment.
        unsafe {
            let e = &mut (*tables(env as *mut u8)).ibtc[env::ibtc_index(A, common::SPEC.pc_shift)];
            *e = env::IbtcEntry { pc: A, key: 1, code, pad: 0 };
        }
        let other = std::thread::spawn(move || {
            std::thread::sleep(std::time::Duration::from_millis(30));
            // SAFETY: the field is atomic, and the environment outlives the thread, which is joined.
            unsafe { (*header(env as *mut u8)).exit_request.store(1, Ordering::Relaxed) };
        });
        let base = b.base;
        let a = b.m.run_code(code, &base, &vec![0; RAM_SIZE], 0x1f80);
        other.join().unwrap();
        assert_eq!((a.exit, a.pc & !4), (exit::POLL, A), "loop {n}");
    }
}

#[test]
fn jumps_to_what_cannot_be_linked_are_looked_up() {
    for to in [A + 0xf00, B_CROSS] {
        let mut b = Bench::new();
        let (at, links) = b.add(&adder(A, 1, |b| b.goto_pc(to)), 9);
        let (target, _) = b.add(&adder(to, 100, |b| b.exit(0x200, 0x1234)), 10);
        assert_eq!(b.run(at), (exit::LOOKUP, to, 9 << 32, 1), "the link is asked for");
        let (env, code) = (b.m.env(), b.m.code.base as u64 + target as u64);
        // SAFETY: nobody runs or patches at the same time; our environment.
        unsafe {
            assert!(links[0].defer(b.m.code.base.add(at)));
            let e = &mut (*tables(env)).ibtc[env::ibtc_index(to, common::SPEC.pc_shift)];
            *e = env::IbtcEntry { pc: to, key: 1, code, pad: 0 };
        }
        assert_eq!((b.run(at).0, b.run(at).3), (0x200, 101));
        b.unlink(at, &links[0]);
        assert!(b.link(at, &links[0], target, 3), "its successor may be linked");
        b.set_page_id(to, 3);
        assert_eq!((b.run(at).0, b.run(at).3), (0x200, 101));
    }
    let mut b = Bench::new();
    let (at, links) = b.add(&adder(A, 1, |b| b.goto_pc(B_SAME)), 9);
    // SAFETY: nobody runs or patches at the same time.
    assert!(!unsafe { links[0].defer(b.m.code.base.add(at)) }, "not near the end of the page");
}
