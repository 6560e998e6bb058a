//! What we write, QEMU reads; what QEMU writes, we read.

use super::*;

fn base(bed: &Bed) -> Vec<u8> {
    let mut model = vec![0; bed.options.size as usize];
    if bed.options.backing_file.is_some() {
        let mut rng = Rng(77);
        let data: Vec<u8> =
            (0..4 << 20).map(|i: usize| if i % 5000 < 2500 { rng.next() as u8 } else { 0 }).collect();
        std::fs::write(bed.dir.path().join("base.raw"), &data).expect("base");
        model[..data.len()].copy_from_slice(&data);
    }
    model
}

#[test]
fn images_of_ours_are_clean_and_equal_for_qemu() {
    for (seed, options) in matrix().into_iter().enumerate() {
        let bed = Bed::new(options);
        let mut model = base(&bed);
        let mut rng = Rng(seed as u64 + 1);
        let image = bed.create();
        scribble(&image, &mut model, &mut rng, 40);
        assert_eq!(contents(&*image), model, "{:?}", bed.options);
        drop(image);
        bed.assert_clean();
        bed.assert_equal(&model);
        let image = bed.open();
        scribble(&image, &mut model, &mut rng, 20);
        let report = image.check(check::Fix::None).expect("check");
        assert_eq!(report.messages, Vec::<String>::new(), "{:?}", bed.options);
        drop(image);
        bed.assert_clean();
        bed.assert_equal(&model);
    }
}

#[test]
fn images_of_qemu_are_read_equal() {
    let dir = tempfile::tempdir().expect("directory");
    let raw = dir.path().join("in.raw");
    let mut rng = Rng(3);
    let data: Vec<u8> = (0..3usize << 20)
        .map(|i| match i >> 16 {
            n if n % 3 == 0 => 0,
            n if n % 3 == 1 => (i / 100) as u8,
            _ => rng.next() as u8,
        })
        .collect();
    std::fs::write(&raw, &data).expect("raw");
    let variants: &[(&str, bool)] = &[
        ("compat=1.1", false),
        ("compat=0.10", true),
        ("cluster_size=512", true),
        ("cluster_size=2M", true),
        ("compression_type=zstd", true),
        ("compression_type=zlib", true),
        ("extended_l2=on", true),
        ("extended_l2=on,cluster_size=16k", false),
        ("refcount_bits=1", false),
        ("refcount_bits=64,lazy_refcounts=on", false),
        ("preallocation=metadata", false),
        ("preallocation=full", false),
        ("preallocation=falloc,extended_l2=on", false),
    ];
    for (options, compressed) in variants {
        let path = dir.path().join("qemu.qcow2");
        let mut args = vec!["convert", "-f", "raw", "-O", "qcow2", "-o", options];
        if *compressed {
            args.push("-c");
        }
        args.extend([text(&raw), text(&path)]);
        qemu_ok(&args);
        let image = Qcow2::open(file(&path, false), None, None, &OpenOptions::default()).expect(options);
        assert!(contents(&*image) == data, "{options}");
        // And they stay sound when they are written.
        let mut model = data.clone();
        scribble(&image, &mut model, &mut Rng(9), 15);
        drop(image);
        let out = qemu_img(&["check", text(&path)]);
        assert!(out.status.success(), "{options}: {}", String::from_utf8_lossy(&out.stdout));
        std::fs::write(dir.path().join("model"), &model).expect("model");
        qemu_ok(&["compare", "-F", "raw", text(&path), text(&dir.path().join("model"))]);
    }
}

#[test]
fn compressed_clusters_are_read_by_qemu() {
    for compression in [Compression::Zlib, Compression::Zstd] {
        for cluster_size in [512, 65536, 2 << 20] {
            let bed =
                Bed::new(CreateOptions { compression, cluster_size, ..CreateOptions::new((4 << 20) + 512) });
            let image = bed.create();
            let model: Vec<u8> = (0..bed.options.size).map(|i| (i / 97) as u8 ^ (i >> 12) as u8).collect();
            for (n, part) in model.chunks(cluster_size as usize).enumerate() {
                image.write_compressed(n as u64 * cluster_size, part).expect("compressed");
            }
            assert!(contents(&*image) == model);
            drop(image);
            bed.assert_clean();
            bed.assert_equal(&model);
            let mut model = model;
            let image = bed.open();
            scribble(&image, &mut model, &mut Rng(5), 30);
            drop(image);
            bed.assert_clean();
            bed.assert_equal(&model);
        }
    }
}

#[test]
fn resizing_keeps_contents() {
    for options in matrix() {
        if options.backing_file.is_some() {
            continue;
        }
        let bed = Bed::new(options);
        let mut model = vec![0; bed.options.size as usize];
        let image = bed.create();
        scribble(&image, &mut model, &mut Rng(2), 30);
        for size in [(9u64 << 20) + 512, 3 << 20, (5 << 20) - 512] {
            image.truncate(size, Preallocation::Off).expect("resize");
            model.resize(size as usize, 0);
            assert!(contents(&*image) == model, "{:?} {size}", bed.options);
        }
        drop(image);
        bed.assert_clean();
        bed.assert_equal(&model);
    }
}

#[test]
fn preallocation_is_sound() {
    for preallocation in [Preallocation::Metadata, Preallocation::Falloc, Preallocation::Full] {
        for extended_l2 in [false, true] {
            let bed = Bed::new(CreateOptions { preallocation, extended_l2, ..CreateOptions::new(5 << 20) });
            let image = bed.create();
            assert!(crate::node::is_zero(&contents(&*image)));
            image.truncate(7 << 20, preallocation).expect("grow");
            drop(image);
            bed.assert_clean();
            bed.assert_equal(&vec![0; 7 << 20]);
        }
    }
}

#[test]
fn bitmaps_follow_writes_and_qemu_reads_them() {
    let bed = Bed::new(CreateOptions::new(8 << 20));
    drop(bed.create());
    qemu_ok(&["bitmap", "--add", "-g", "64k", text(&bed.path()), "theirs"]);
    let image = bed.open();
    image.add_bitmap("ours", 1 << 16, true).expect("bitmap");
    image.add_bitmap("off", 1 << 16, false).expect("bitmap");
    image.write_at(1 << 20, &[1; 512]).expect("write");
    drop(image);
    bed.assert_clean();
    let info = qemu_ok(&["info", text(&bed.path())]);
    for name in ["theirs", "ours", "off"] {
        assert!(info.contains(&format!("name: {name}")), "{info}");
    }
    let image = bed.open();
    let dirty: Vec<bool> = image.bitmaps().iter().map(|b| b.is_set(16) && !b.is_set(17)).collect();
    assert_eq!(dirty, [true, true, false]);
    image.remove_bitmap("theirs").expect("remove");
    drop(image);
    bed.assert_clean();
}

#[test]
fn bitmaps_follow_the_size() {
    let bed = Bed::new(CreateOptions::new(8 << 20));
    let image = bed.create();
    image.add_bitmap("b", 1 << 16, true).expect("bitmap");
    image.write_at((8 << 20) - 512, &[1; 512]).expect("write");
    image.write_at((3 << 20) + 65536, &[1; 512]).expect("write");
    BlockNode::truncate(&*image, (20 << 20) + 512, Preallocation::Off).expect("grow");
    image.write_at(20 << 20, &[1; 512]).expect("write");
    drop(image);
    bed.assert_clean();
    let set = |image: &Qcow2| {
        let all = image.bitmaps();
        let bitmap = all.first().expect("it is there");
        assert!(!bitmap.inconsistent);
        (0..bitmap.bits.len() as u64 * 8).filter(|n| bitmap.is_set(*n)).collect::<Vec<_>>()
    };
    let image = bed.open();
    assert_eq!(set(&image), [49, 127, 320]);
    BlockNode::truncate(&*image, (3 << 20) + 65536 + 512, Preallocation::Off).expect("shrink");
    drop(image);
    bed.assert_clean();
    // QEMU takes it as it is, grows it, and we read that.
    qemu_ok(&["resize", text(&bed.path()), "16M"]);
    let image = bed.open();
    assert_eq!(set(&image), [49]);
    assert_eq!(image.size(), 16 << 20);
}
