use super::*;

const HEAD: &str =
    "decoder d 8\nfield a 7:4\nfield b 3,1 signed <<1\nfield c 2:0 +8\nformat one a\nformat two b c\n";

fn read(body: &str) -> Result<Generator, Error> {
    let mut g = Generator::new();
    g.table("t", &format!("{HEAD}{body}"))?;
    Ok(g)
}

fn error(body: &str) -> (usize, ErrorKind) {
    let e = read(body).map(|_| ()).expect_err("an error");
    (e.line, e.kind)
}

#[test]
fn operands_are_read_from_their_fields() {
    let g = read("insn x one .... 0001\ninsn y one a=#3 0000 0010\n").expect("a table");
    assert_eq!(g.spec().decode("d", 0xa1), Some(("x", "one", vec![("a", 10)])));
    assert_eq!(g.spec().decode("d", 0x02), Some(("y", "one", vec![("a", 3)])));
    assert_eq!(g.spec().decode("d", 0x03), None);
    let g = read("insn z two 1111 ....\n").expect("a table");
    assert_eq!(g.spec().decode("d", 0xf8), Some(("z", "two", vec![("b", -4), ("c", 8)])));
    assert_eq!(g.spec().decode("d", 0xf7), Some(("z", "two", vec![("b", 2), ("c", 15)])));
}

#[test]
fn overlaps_are_errors_outside_a_group_and_ordered_inside() {
    let overlap = "insn x one ....0001\n\ninsn y one 0000....\n";
    assert_eq!(error(overlap).0, 9);
    assert!(
        matches!(error("insn x one ....0001\ninsn y one ....00-1\n"), (8, ErrorKind::Overlap(a, b, 7)) if a == "y" && b == "x")
    );
    let g = read("group\ninsn y one a=#0 00000001\nreserved 0001 0001\ninsn x one ....0001\nend\n")
        .expect("a table");
    assert_eq!(g.spec().decode("d", 1).map(|d| d.0), Some("y"));
    assert_eq!(g.spec().decode("d", 0x11), None);
    assert_eq!(g.spec().decode("d", 0x21).map(|d| d.0), Some("x"));
    let hidden = error("group\ninsn x one ....0001\ninsn y one a=#0 00000001\nend\n");
    assert!(matches!(hidden, (9, ErrorKind::Hidden(a, b, 8)) if a == "y" && b == "x"), "first wins");
}

#[test]
fn mistakes_are_reported_with_their_line() {
    assert_eq!(error("insn x one ....000\n"), (7, ErrorKind::Width(7, 8)));
    assert_eq!(error("insn x one ....000.\n"), (7, ErrorKind::Unread(0)));
    assert_eq!(error("insn x three 00000000\n"), (7, ErrorKind::Unknown("three".into(), "format")));
    assert_eq!(error("insn x one a=q 00000000\n"), (7, ErrorKind::Unknown("q".into(), "field")));
    assert_eq!(error("insn x one a=b 00000000\n"), (7, ErrorKind::Signedness("a".into())));
    assert!(read("insn x two b=a ....0...\n").is_ok(), "a short unsigned field fits a signed operand");
    assert_eq!(error("field e 8:1\n"), (7, ErrorKind::Range(8)));
    assert_eq!(error("field a 1\n"), (7, ErrorKind::Twice("a".into())));
    assert_eq!(error("end\n"), (7, ErrorKind::Group));
    assert_eq!(error("group\n"), (7, ErrorKind::Group));
    assert_eq!(error("bogus\n"), (7, ErrorKind::Directive("bogus".into())));
    assert_eq!(
        error("insn x one ....0001\ninsn x two 1111....\n"),
        (8, ErrorKind::Format("x".into(), "one".into()))
    );
    let e = Generator::new().table("t", "field a 1\n").map(|_| ()).expect_err("no decoder");
    assert_eq!(e.to_string(), "t:1: `decoder NAME WIDTH` must come first");
    assert!(Generator::new().table("t", "").is_err());
}

#[test]
fn a_tree_finds_what_trying_all_finds() {
    use crate::tree::{Node, build};
    let g = read(
        "group\ninsn p one a=#1 0001 0000\ninsn q one .... 0000\nend\ninsn r one ..1. 0100\ninsn s one ...0 0110\n\
         insn t one a=#2 1111 1-11\n",
    )
    .expect("a table");
    let table = &g.spec().tables[0];
    let tree = build(&table.encodings);
    fn walk(node: &Node, w: u64) -> Option<usize> {
        match node {
            Node::Nothing => None,
            Node::Test { mask, value, encoding, other } => {
                if w & mask == *value {
                    Some(*encoding)
                } else {
                    walk(other, w)
                }
            }
            Node::Switch { shift, bits, arms } => {
                let v = w >> shift & ((1 << bits) - 1);
                arms.iter().find(|a| a.0 == v).and_then(|a| walk(&a.1, w))
            }
        }
    }
    let mut hits = 0;
    for w in 0..256 {
        let tried = table.encodings.iter().position(|e| w & e.mask == e.value);
        assert_eq!(walk(&tree, w), tried, "{w:#x}");
        hits += usize::from(tried.is_some());
    }
    assert_eq!(hits, 16 + 8 + 8 + 2);
    let source = g.generate();
    for part in ["pub struct Two", "pub b: i32", "R(One)", "pub fn d(w: u16) -> Option<Insn>"] {
        assert!(source.contains(part), "{part}");
    }
}
