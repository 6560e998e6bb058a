//! Internal snapshots, in both directions.

use super::*;

#[test]
fn snapshots_keep_what_was() {
    for options in matrix() {
        if options.data_file.is_some() || options.backing_file.is_some() || options.refcount_bits < 4 {
            continue;
        }
        let bed = Bed::new(options);
        let mut rng = Rng(11);
        let mut model = vec![0; bed.options.size as usize];
        let image = bed.create();
        scribble(&image, &mut model, &mut rng, 15);
        image.create_snapshot("one", 1_700_000_000_000_000_000).expect("snapshot");
        let first = model.clone();
        scribble(&image, &mut model, &mut rng, 15);
        image.create_snapshot("two", 1_700_000_001_000_000_000).expect("snapshot");
        let second = model.clone();
        scribble(&image, &mut model, &mut rng, 15);
        assert!(contents(&*image) == model);
        assert!(contents(&*image.snapshot_view("one").expect("one")) == first);
        drop(image);
        bed.assert_clean();
        bed.assert_equal(&model);
        let list = qemu_ok(&["snapshot", "-l", text(&bed.path())]);
        assert!(list.contains("one") && list.contains("two"), "{list}");
        qemu_ok(&["snapshot", "-a", "one", text(&bed.path())]);
        bed.assert_equal(&first);
        let image = bed.open();
        image.apply_snapshot("two").expect("apply");
        assert!(contents(&*image) == second);
        image.delete_snapshot("one").expect("delete");
        let mut model = second;
        scribble(&image, &mut model, &mut rng, 20);
        image.delete_snapshot("two").expect("delete");
        assert!(contents(&*image) == model);
        drop(image);
        bed.assert_clean();
        bed.assert_equal(&model);
    }
}

#[test]
fn snapshots_of_qemu_are_applied() {
    let bed = Bed::new(CreateOptions::new(4 << 20));
    let image = bed.create();
    image.write_at(0, &[1; 100_000]).expect("write");
    drop(image);
    qemu_ok(&["snapshot", "-c", "theirs", text(&bed.path())]);
    let image = bed.open();
    image.write_at(50_000, &[2; 100_000]).expect("write");
    image.apply_snapshot("theirs").expect("apply");
    let mut model = vec![0; 4 << 20];
    model[..100_000].fill(1);
    assert!(contents(&*image) == model);
    drop(image);
    bed.assert_clean();
}

#[test]
fn narrow_refcounts_refuse_snapshots() {
    let bed = Bed::new(CreateOptions { refcount_bits: 1, ..CreateOptions::new(1 << 20) });
    let image = bed.create();
    image.create_snapshot("no", 0).expect_err("refcounts of one bit count no second reference");
    drop(image);
    bed.assert_clean();
}
