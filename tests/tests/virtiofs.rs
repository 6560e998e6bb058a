//! A shared directory while its daemon is killed: Debian's riscv64 kernel with fio and virtiofsd, whichever there is.
//! With virtiofsd 1.14, which is built once, fsx and a move of the guest as well.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_tests::back_ends::{Virtiofsd, shared_ram};
use holdfast_tests::migration::Vmm;
use holdfast_tests::shell::{BOOT, Guest};
use holdfast_tests::{add_archive, back_ends_of_others, fio_archive, riscv64_args, x86_64_args};
use serde_json::json;

/// The guest with fio.
fn arguments(dir: &Path, socket: &Path) -> Vec<String> {
    let mut args = riscv64_args(2, "");
    shared_ram(&mut args);
    add_archive(&mut args, &fio_archive(), dir);
    args.extend(["--fs".to_owned(), format!("tag=share,socket={}", socket.display())]);
    args
}

/// Random reads and writes whose contents are checked, and two storms of renames in one directory.
fn exercise(guest: &mut Guest, name: &str) {
    // Each of them has files of its own, and both replace the same one.
    let storm = |who: &str| {
        let at = format!("/mnt/{name}");
        format!(
            "(i=0; while [ $i -lt 60 ]; do echo $i >{at}/{who} && mv {at}/{who} {at}/x{who}$i \
             && mv {at}/x{who}$i {at}/{who}$i && echo $i >{at}/t{who} && mv {at}/t{who} {at}/both \
             || echo FAIL''ED; i=$((i + 1)); done)"
        )
    };
    let (b, c) = (storm("b"), storm("c"));
    let storms = guest.run(&format!("mkdir /mnt/{name}; {b} & {c}; wait; ls /mnt/{name} | wc -l"));
    assert!(!storms.contains("FAILED") && storms.lines().any(|line| line.trim() == "121"), "{storms}");
    let fio = guest.run(&format!(
        "/usr/bin/fio --name={name} --directory=/mnt --rw=randrw --size=1m --bsrange=512-16k --verify=crc32c \
         --verify_fatal=1 --do_verify=1 --ioengine=psync --end_fsync=1 --fallocate=none --randseed=7"
    ));
    assert!(fio.contains("err= 0"), "{fio}");
}

#[test]
fn a_daemon_that_is_killed_ends_the_session_and_another_one_begins_the_next() {
    let dir = tempfile::tempdir().expect("directory");
    let (share, socket) = (dir.path().join("share"), dir.path().join("s"));
    std::fs::create_dir(&share).expect("directory");
    let first = Virtiofsd::share(&share, &socket);
    let mut guest = Guest::boot(&arguments(dir.path(), &socket));
    guest.run("mount -t virtiofs share /mnt");
    exercise(&mut guest, "before");
    // In the middle of a storm.
    guest.run("mkdir /mnt/middle");
    guest.start(
        "i=0; while echo $i >/mnt/middle/new && mv /mnt/middle/new /mnt/middle/$i; do i=$((i + 1)); done",
    );
    let deadline = Instant::now() + BOOT;
    while !share.join("middle/20").exists() {
        assert!(Instant::now() < deadline, "the guest renames nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    drop(first);
    let ended = guest.finish();
    assert!(ended.contains("Transport endpoint is not connected"), "{ended}");
    let files = || {
        let names = std::fs::read_dir(share.join("middle")).expect("directory");
        let mut names: Vec<_> = names.map(|entry| entry.expect("entry").file_name()).collect();
        names.sort();
        names
    };
    let left = files();
    // The next daemon knows nothing of what the guest has open, and hears nothing of it.
    let _second = Virtiofsd::share(&share, &socket);
    let refused = guest.run("ls /mnt 2>&1; rm -r /mnt/middle 2>&1; echo x >/mnt/middle/late");
    assert!(refused.contains("Transport endpoint is not connected"), "{refused}");
    assert_eq!(files(), left);
    let again = guest.run("umount /mnt && mount -t virtiofs share /mnt && ls /mnt/middle | wc -l");
    assert!(again.lines().any(|line| line.trim() == left.len().to_string()), "{again}: {left:?}");
    for name in left.iter().filter_map(|name| name.to_str()).filter(|name| *name != "new") {
        let text = std::fs::read_to_string(share.join("middle").join(name)).expect("file");
        assert_eq!(text, format!("{name}\n"), "what was renamed was whole");
    }
    exercise(&mut guest, "after");
    guest.run("umount /mnt");
    guest.power_off();
}

fn newest() -> PathBuf {
    back_ends_of_others().join("virtiofsd")
}

/// The host's fsx with what it needs, to be run by an x86-64 guest.
fn take_fsx(share: &Path) -> &'static str {
    let (fsx, at) = (back_ends_of_others().join("fsx"), share.join("bin"));
    std::fs::create_dir(&at).expect("directory");
    let needed = holdfast_tests::devices::run(Command::new("ldd").arg(&fsx));
    let libraries = needed.split_whitespace().filter(|word| word.starts_with('/'));
    for path in libraries.map(Path::new).chain([fsx.as_path()]) {
        std::fs::copy(path, at.join(path.file_name().expect("a name"))).expect("copied");
    }
    "/mnt/bin/ld-linux-x86-64.so.2 --library-path /mnt/bin /mnt/bin/fsx"
}

#[test]
fn fsx_on_virtiofsd_1_14_that_is_killed_in_the_middle() {
    let dir = tempfile::tempdir().expect("directory");
    let (share, socket) = (dir.path().join("share"), dir.path().join("s"));
    std::fs::create_dir(&share).expect("directory");
    let fsx = take_fsx(&share);
    let first = Virtiofsd::of(&newest(), &share, &socket);
    let mut args = x86_64_args(2, "");
    shared_ram(&mut args);
    args.extend(["--fs".to_owned(), format!("tag=share,socket={}", socket.display())]);
    let mut guest = Guest::boot(&args);
    guest.run("mount -t virtiofs share /mnt");
    let whole = guest.run(&format!("{fsx} -N 3000 -S 7 /mnt/one && echo WH''OLE"));
    assert!(whole.contains("WHOLE"), "{whole}");
    guest.start(&format!("{fsx} -S 8 /mnt/two || echo BRO''KEN"));
    let deadline = Instant::now() + BOOT;
    while !share.join("two").metadata().is_ok_and(|data| data.len() != 0) {
        assert!(Instant::now() < deadline, "fsx writes nothing");
        std::thread::sleep(Duration::from_millis(5));
    }
    std::thread::sleep(Duration::from_millis(500));
    drop(first);
    let broken = guest.finish();
    assert!(broken.contains("BROKEN"), "{broken}");
    let _second = Virtiofsd::of(&newest(), &share, &socket);
    let again = guest.run(&format!(
        "cd /; umount /mnt; mount -t virtiofs share /mnt && {fsx} -N 3000 -S 9 /mnt/three && echo WH''OLE"
    ));
    assert!(again.contains("WHOLE"), "{again}");
    guest.power_off();
}

#[test]
fn a_guest_moves_with_a_mounted_directory_and_open_files() {
    let dir = tempfile::tempdir().expect("directory");
    let (share, socket) = (dir.path().join("share"), dir.path().join("s"));
    std::fs::create_dir(&share).expect("directory");
    let first = Virtiofsd::of(&newest(), &share, &socket);
    let mut args = riscv64_args(2, "");
    shared_ram(&mut args);
    args.extend(["--fs".to_owned(), format!("tag=share,socket={}", socket.display())]);
    args.extend(["--api-socket".to_owned(), dir.path().join("a").display().to_string()]);
    let mut guest = Guest::boot(&args);
    let source = holdfast_tests::http::Api::connect(&dir.path().join("a"));
    guest.run("mount -t virtiofs share /mnt; mkdir /mnt/dir; cd /mnt/dir; exec 3>held; echo before >&3");
    // The other host's daemon, of the same directory.
    // A path has one daemon; the guest's comes to it with another's name.
    let other = dir.path().join("t");
    let _second = Virtiofsd::of(&newest(), &share, &other);
    std::fs::rename(&other, &socket).expect("renamed");
    let target = Vmm::start(dir.path(), "b", &[]);
    let url = format!("unix:{}", dir.path().join("m").display());
    let received = target.receive(json!({ "receiver_url": url }));
    let sent = source.request("PUT", "vm.send-migration", &json!({ "destination_url": url }));
    assert_eq!(sent.status, 204, "{sent:?}");
    assert_eq!(received.join().expect("an answer").status, 204);
    drop(first);
    let mut guest = guest.moved(target.program);
    let seen = guest.run("echo behind >&3; exec 3>&-; pwd; cat held; ls /mnt");
    assert!(seen.contains("before") && seen.contains("behind") && seen.contains("/mnt/dir"), "{seen}");
    assert_eq!(std::fs::read_to_string(share.join("dir/held")).expect("file"), "before\nbehind\n");
    exercise_names(&mut guest);
    guest.run("cd /; umount /mnt");
    guest.power_off();
}

/// Names that come and go behind a move.
fn exercise_names(guest: &mut Guest) {
    let count = guest.run("for i in 1 2 3 4 5 6 7 8 9; do echo $i >n$i; mv n$i m$i; done; ls | grep -c ^m");
    assert!(count.lines().any(|line| line.trim() == "9"), "{count}");
}
