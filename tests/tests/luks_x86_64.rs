//! LUKS volumes beside the kernel's dm-crypt: Debian's cryptsetup in a guest opens those that our tools make, and makes one that
//! they open. Needs e2fsprogs.

use std::path::Path;
use std::process::Command;

use holdfast_tests::devices::{ext4_image, run, sha256};
use holdfast_tests::shell::Guest;
use holdfast_tests::{add_archive, cryptsetup_archive, holdfast, printed, x86_64_args};

const SECRET: &str = "secret,id=s,data=letmein";

fn image_opts(file: &Path) -> String {
    format!("driver=luks,key-secret=s,file.filename={}", file.display())
}

/// Runs our image tool.
fn img(args: &[&str]) -> String {
    run(Command::new(holdfast()).arg("img").args(args))
}

/// A volume made by our tools, with the contents of `from`.
fn volume(from: &Path, to: &Path, cipher: &str) {
    let options = format!("key-secret=s,iter-time=10,{cipher}");
    let (from, to) = (from.display().to_string(), to.display().to_string());
    img(&["convert", "--object", SECRET, "-f", "raw", "-O", "luks", "-o", &options, &from, &to]);
}

/// The guest with cryptsetup, and these disks.
fn boot(dir: &Path, disks: &[&Path]) -> Guest {
    let mut args = x86_64_args(1, "");
    add_archive(&mut args, &cryptsetup_archive(), dir);
    for (n, disk) in disks.iter().enumerate() {
        let node = format!("driver=raw,node-name=n{n},file.driver=file,file.filename={}", disk.display());
        args.extend(["--blockdev".to_owned(), node]);
        args.extend(["--device".to_owned(), format!("virtio-blk-pci,drive=n{n},id=d{n}")]);
    }
    let mut guest = Guest::boot(&args);
    // What is typed is echoed: words that are looked for are typed in two halves. There is no udev: the library makes the nodes of volumes itself.
    let prepared = guest.run(
        "export LD_LIBRARY_PATH=/usr/lib DM_DISABLE_UDEV=1 PATH=/bin:/usr/bin; printf letmein >/tmp/key; \
         for m in $(cat /lib/modules/crypt/order); do insmod /lib/modules/crypt/$m || echo MIS''SING $m; done",
    );
    assert!(!prepared.contains("MISSING"), "{prepared}");
    guest
}

#[test]
fn dm_crypt_opens_our_volumes_and_we_open_its() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    let plain = ext4_image(dir, 1 << 18);
    let content = sha256(&dir.join("tree/content"));
    let [a, b, c] = ["a", "b", "c"].map(|name| dir.join(name));
    volume(&plain, &a, "cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,hash-alg=sha512");
    let cbc = "cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256,hash-alg=sha1";
    volume(&dir.join("tree/content"), &b, cbc);
    run(Command::new("truncate").args(["-s", "24M"]).arg(&c));

    let mut guest = boot(dir, &[&a, &b, &c]);
    let said = guest.run(
        "cryptsetup luksOpen --key-file /tmp/key /dev/vda a; echo A''-OPEN $?; \
         cryptsetup luksOpen --key-file /tmp/key /dev/vdb b; echo B''-OPEN $?; \
         mount -t ext4 /dev/mapper/a /mnt && sha256sum /mnt/content | sed 's/^/A''-SUM /'; \
         sha256sum /dev/mapper/b | sed 's/^/B''-SUM /'; cryptsetup status b | grep cipher",
    );
    assert_eq!((printed(&said, "A-OPEN"), printed(&said, "B-OPEN")), ("0".into(), "0".into()), "{said}");
    assert_eq!(printed(&said, "A-SUM")[..64], content, "{said}");
    assert_eq!(printed(&said, "B-SUM")[..64], content, "{said}");
    assert!(said.contains("aes-cbc-essiv:sha256"), "{said}");
    let said = guest.run(
        "cryptsetup luksFormat -q --type luks1 --pbkdf-force-iterations 1000 --key-file /tmp/key /dev/vdc; echo FOR''MAT $?; \
         cryptsetup luksOpen --key-file /tmp/key /dev/vdc c && /usr/bin/mke2fs -q -t ext4 /dev/mapper/c; mkdir -p /c; \
         mount -t ext4 /dev/mapper/c /c && cp /mnt/content /c/copy && echo more >/mnt/more; \
         umount /c && umount /mnt && sync && cryptsetup luksClose c && cryptsetup luksClose a; echo CLOS''ED $?",
    );
    assert_eq!((printed(&said, "FORMAT"), printed(&said, "CLOSED")), ("0".into(), "0".into()), "{said}");
    guest.power_off();

    // What the guest wrote, as our tools find it.
    let out = dir.join("out");
    for (disk, name, sum) in [(&c, "copy", Some(content)), (&a, "more", None)] {
        img(&[
            "convert",
            "--object",
            SECRET,
            "-O",
            "raw",
            "--image-opts",
            &image_opts(disk),
            &out.display().to_string(),
        ]);
        run(Command::new("e2fsck").args(["-f", "-n"]).arg(&out));
        let file = dir.join(name);
        run(Command::new("debugfs").arg("-R").arg(format!("dump /{name} {}", file.display())).arg(&out));
        match sum {
            Some(sum) => assert_eq!(sha256(&file), sum),
            None => assert_eq!(std::fs::read_to_string(&file).expect("file"), "more\n"),
        }
    }
    let info = img(&["info", "--object", SECRET, "--image-opts", &image_opts(&c)]);
    assert!(info.contains("cipher mode: xts"), "{info}");
}
