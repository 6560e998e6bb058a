//! An image that changes hands between two graphs, as between two processes.

use crate::graph::{Backing, Opener};
use crate::nodes::{NamedNode, Nodes};
use crate::options::BlockdevOptions;

use super::*;

fn graph() -> Arc<Nodes> {
    #[derive(Debug)]
    struct Nobody;
    impl crate::nodes::NodeEvents for Nobody {
        fn write_threshold(&self, _: &str, _: u64, _: u64) {}
        fn image_corrupted(&self, _: &str, _: &str) {}
    }
    Nodes::new(Arc::new(Nobody))
}

fn open(nodes: &Arc<Nodes>, path: &Path, lock: LockRange) -> Result<Arc<NamedNode>, BlockError> {
    let opener = Opener {
        writable: true,
        lock,
        backing: Backing::Refuse,
        nodes: Some(Arc::clone(nodes)),
        for_vm: true,
        ..Opener::reading(PlainSpawner::shared())
    };
    opener.open_as("disk", &BlockdevOptions::of_file(text(path), None))
}

#[test]
fn an_image_changes_hands_there_and_back() {
    for lock in [LockRange::Bytes, LockRange::Full, LockRange::Qemu] {
        let bed = Bed::new(CreateOptions { cluster_size: 4096, ..CreateOptions::new(6 << 20) });
        drop(bed.create());
        let path = bed.path();
        qemu_ok(&["bitmap", "--add", "-g", "65536", text(&path), "map"]);
        let (here, there) = (graph(), graph());
        let mine = open(&here, &path, lock).expect("free");
        there.open_inactive(true);
        let theirs = open(&there, &path, lock).expect("not taken");
        assert!(!theirs.is_readonly() && theirs.size() == 6 << 20);
        assert!(theirs.write_at(0, &[1; 512]).is_err() && theirs.read_at(0, &mut [0; 512]).is_err());
        there.activate().expect_err("it is taken");
        let mut rng = Rng(7);
        let mut model = vec![0; 6 << 20];
        for round in 0..4_u8 {
            for _ in 0..50 {
                let (at, byte) = (rng.below(6 << 11) * 512, rng.below(256) as u8);
                let owner = if round % 2 == 0 { &mine } else { &theirs };
                owner.write_at(at, &[byte; 512]).expect("written");
                model[at as usize..at as usize + 512].fill(byte);
            }
            let (from, to, old, new) = if round % 2 == 0 {
                (&here, &there, &mine, &theirs)
            } else {
                (&there, &here, &theirs, &mine)
            };
            from.inactivate().expect("given up");
            assert!(old.write_at(0, &[1; 512]).is_err(), "it is not ours any more");
            to.activate().expect("taken");
            assert!(from.activate().is_err(), "two have it");
            assert_eq!(contents(&**new), model);
        }
        drop((mine, theirs));
        bed.assert_clean();
        bed.assert_equal(&model);
        let info = qemu_ok(&["info", text(&path)]);
        assert!(info.contains("name: map") && !info.contains("in-use"), "{info}");
    }
}

#[test]
fn what_cannot_be_taken_is_left_alone() {
    let bed = Bed::new(CreateOptions::new(1 << 20));
    drop(bed.create());
    let other = bed.dir.path().join("other.raw");
    std::fs::write(&other, [0; 4096]).expect("file");
    let (here, there) = (graph(), graph());
    let mine = [open(&here, &bed.path(), LockRange::Bytes).expect("free")];
    there.open_inactive(true);
    let theirs = open(&there, &bed.path(), LockRange::Bytes).expect("not taken");
    // A second image of the destination, which somebody else has.
    let thief = RawImage::open(RawOptions::new(&other), PlainSpawner::shared()).expect("free");
    let opener = Opener {
        writable: true,
        lock: LockRange::Bytes,
        nodes: Some(Arc::clone(&there)),
        ..Opener::reading(PlainSpawner::shared())
    };
    let options = BlockdevOptions::of_file(text(&other), Some(crate::options::Driver::Raw));
    let second = opener.open_as("second", &options).expect("not taken");
    here.inactivate().expect("given up");
    assert!(there.activate().expect_err("one is in use").to_string().contains("other.raw"));
    here.activate().expect("the other gave all up again");
    mine[0].write_at(0, &[3; 512]).expect("ours");
    drop(thief);
    here.inactivate().expect("given up");
    there.activate().expect("free now");
    let mut back = [0; 512];
    theirs.read_at(0, &mut back).expect("read");
    second.write_at(0, &back).expect("written");
    assert_eq!(std::fs::read(&other).expect("file")[..512], [3; 512]);
}
