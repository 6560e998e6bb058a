//! The builder folds, forwards slots and makes regions that verify and print.

use holdfast_tcg_ir::{Builder, Cond, HelperTable, MemOp, Op, Slot, Type, verify};

const A0: Slot = Slot::i64(0);
const A1: Slot = Slot::i64(8);

#[test]
fn folds_and_forwards() {
    let helpers = HelperTable::new();
    let mut b = Builder::new(&helpers);
    b.start(0x1000);
    b.insn(0x1000, 4);
    let c = b.iconst(0x7000);
    b.set(A0, c);
    let x = b.get(A0);
    let y = b.addi(x, 5);
    assert_eq!(b.as_const(y), Some(0x7005));
    let z = b.get(A1);
    let s = b.addi(z, 16);
    let v = b.load(Type::I64, MemOp::U64, s, 8);
    let l = *b.region().def(v);
    assert_eq!((l.a, l.disp()), (z.0, 24));
    b.set(A1, v);
    b.goto_pc(0x1004);
    verify(b.region(), &helpers).unwrap();
    assert!(b.region().to_string().contains("goto_pc 0x1004"));
}

#[test]
fn loops_need_a_pc() {
    let helpers = HelperTable::new();
    let mut b = Builder::new(&helpers);
    for with_pc in [true, false] {
        b.start(0x1000);
        let top = if with_pc { b.label_at(0x1000) } else { b.label() };
        b.bind(top);
        b.insn(0x1000, 4);
        let x = b.get(A0);
        let y = b.subi(x, 1);
        b.set(A0, y);
        let zero = b.iconst(0);
        b.brcond(Cond::Ne, y, zero, top);
        b.goto_pc(0x1004);
        assert_eq!(verify(b.region(), &helpers).is_ok(), with_pc);
    }
}

#[test]
fn values_do_not_cross_labels() {
    let helpers = HelperTable::new();
    let mut b = Builder::new(&helpers);
    b.start(0x1000);
    b.insn(0x1000, 4);
    let x = b.get(A0);
    let l = b.label();
    b.bind(l);
    b.set(A1, x);
    b.goto_pc(0x1004);
    assert!(verify(b.region(), &helpers).is_err());
}

#[test]
fn orc_b_combination() {
    let helpers = HelperTable::new();
    let mut b = Builder::new(&helpers);
    b.start(0);
    for x in [0u64, 0x0100_0000_0000_8001, u64::MAX, 0x8000_7f00_0010_0080] {
        let v = b.iconst(x as i64);
        let r = b.orc_b(v);
        let want = x.to_le_bytes().map(|y| if y != 0 { 0xff } else { 0 });
        assert_eq!(b.as_const(r), Some(u64::from_le_bytes(want)));
    }
    assert_eq!(size_of::<holdfast_tcg_ir::Inst>(), 16);
    assert!(Op::Load.has_effect());
}

#[test]
fn shift_pairs_are_extensions() {
    let helpers = HelperTable::new();
    let mut b = Builder::new(&helpers);
    b.start(0x1000);
    b.insn(0x1000, 4);
    let x = b.get(A0);
    for (n, signed, op) in [
        (32, false, Op::And),
        (32, true, Op::SExt),
        (48, true, Op::Ext16S),
        (48, false, Op::Ext16U),
        (56, true, Op::Ext8S),
        (56, false, Op::Ext8U),
        (40, true, Op::ShrS),
    ] {
        let s = b.shli(x, n);
        let v = if signed { b.shrsi(s, n) } else { b.shrui(s, n) };
        assert_eq!(b.region().def(v).op, op);
    }
    let w = b.trunc(x);
    let (v, again) = (b.sext(w), b.sext(w));
    assert_eq!(v, again);
    let l = b.load(Type::I64, MemOp::S16, x, 0);
    let w = b.trunc(l);
    assert_eq!(b.sext(w), l);
    let zero = b.iconst(0);
    let n = b.sub(zero, x);
    assert_eq!(b.region().def(n).op, Op::Neg);
    b.goto_pc(0);
    verify(b.region(), &helpers).unwrap();
}
