//! Programs that are killed (SIGKILL) while they write, discard, zero and resize, take, apply and delete snapshots, add and remove bitmaps: the image
//! is whole but for leaks, and has what was flushed (Debian: qemu-utils). `HOLDFAST_KILLS` says how many rounds there are.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use holdfast_block::BlockNode;
use holdfast_block::nbd::{Address, ClientOptions, Nbd};

/// Rounds where nobody asks for more.
const ROUNDS: u64 = 6;
const SIZE: u64 = 64 << 20;
/// What the checked writes go to; the others go behind it.
const CHECKED: u64 = 16 << 20;
const STEP: u64 = 24 << 10;

struct Random(u64);

impl Random {
    fn below(&mut self, n: u64) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0 % n
    }
}

fn image(dir: &Path, program: &str, args: &[&str]) -> (i32, String) {
    let out = Command::new(program).current_dir(dir).args(args).output();
    let out = out.unwrap_or_else(|e| panic!("{program}: {e} (Debian: qemu-utils)"));
    let text = String::from_utf8_lossy(&out.stdout).into_owned() + &String::from_utf8_lossy(&out.stderr);
    (out.status.code().unwrap_or(-1), text)
}

fn serve(dir: &Path) -> (Child, Arc<Nbd>) {
    let _ = std::fs::remove_file(dir.join("s"));
    let mut child = Command::new(dir.join("holdfast-nbd"))
        .current_dir(dir)
        .args(["-t", "-e", "0", "-k", "s", "-f", "qcow2", "--discard=unmap", "a.qcow2"])
        .stdin(Stdio::null())
        .spawn()
        .expect("server");
    let options = ClientOptions {
        address: Address::Unix(dir.join("s")),
        export: String::new(),
        tls: None,
        context: None,
        reconnect_delay: 0,
        open_timeout: 0,
        readonly: false,
    };
    let until = Instant::now() + Duration::from_secs(120);
    loop {
        match Nbd::open(options.clone()) {
            Ok(client) => return (child, client),
            Err(error) => {
                assert!(child.try_wait().expect("server").is_none(), "the server has ended: {error}");
                assert!(Instant::now() < until, "the server does not come up: {error}");
                std::thread::sleep(Duration::from_millis(20));
            }
        }
    }
}

/// Takes, applies and deletes snapshots, adds and removes a bitmap, and grows the image; each is killed at some point of `pace`, which is about
/// how long one takes here and now. Returns what it did, for messages.
fn change_and_kill(dir: &Path, random: &mut Random, round: u64, pace: &mut Duration) -> String {
    let program = env!("CARGO_BIN_EXE_holdfast-img");
    let (now, before) = (format!("s{round}"), format!("s{}", round.saturating_sub(1 + random.below(2))));
    let all: [&[&str]; 6] = [
        &["snapshot", "-c", &now, "a.qcow2"],
        // What was just taken, if it was: the contents stay.
        &["snapshot", "-a", &now, "a.qcow2"],
        &["snapshot", "-d", &before, "a.qcow2"],
        &["resize", "-q", "a.qcow2", "+1M"],
        &["bitmap", "--add", "a.qcow2", "b"],
        &["bitmap", "--remove", "a.qcow2", "b"],
    ];
    let mut done = String::new();
    for args in all {
        let begun = Instant::now();
        let mut child = Command::new(program)
            .current_dir(dir)
            .args(args)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("started");
        // One in five comes to its end and sets the pace; others are killed before, or just then.
        if random.below(5) == 0 {
            child.wait().expect("gone");
            *pace = begun.elapsed();
        } else {
            std::thread::sleep(*pace * random.below(1000) as u32 / 900);
            // It may be done already.
            let _ = child.kill();
        }
        let status = child.wait().expect("gone");
        done += &format!("{} {}: {status}; ", args[0], args[1]);
        let (code, said) = image(dir, "qemu-img", &["check", "a.qcow2"]);
        assert!(code == 0 || code == 3, "round {round}, {done}{said}");
    }
    // Images with bitmaps take no snapshots back.
    image(dir, program, &["bitmap", "--remove", "a.qcow2", "b"]);
    done
}

/// Writes, zeroes and discards until the server is gone.
fn load(client: &dyn BlockNode, seed: u64, stop: &AtomicBool) {
    let mut random = Random(seed | 1);
    let data = vec![0xee; 300 << 10];
    while !stop.load(Ordering::Acquire) {
        let at = CHECKED + random.below(SIZE - CHECKED - (300 << 10));
        let len = 512 + random.below(299 << 10);
        let done = match random.below(4) {
            0 => client.discard(at, len),
            1 => client.write_zeroes(at, len, true),
            _ => client.write_at(at, data.get(..len as usize).unwrap_or_default()),
        };
        if done.is_err() {
            return;
        }
    }
}

#[test]
fn what_was_flushed_is_there_after_a_kill() {
    let dir = tempfile::tempdir().expect("directory");
    let dir = dir.path();
    std::os::unix::fs::symlink(env!("CARGO_BIN_EXE_holdfast-img"), dir.join("holdfast-nbd")).expect("link");
    let ours = env!("CARGO_BIN_EXE_holdfast-img");
    let (code, said) =
        image(dir, ours, &["create", "-q", "-f", "qcow2", "-o", "cluster_size=4k", "a.qcow2", "64M"]);
    assert_eq!(code, 0, "{said}");
    let mut random = Random(0x5eed);
    let mut pace = Duration::from_millis(40);
    // What each place was last flushed with; 0 if never.
    let mut known = vec![0u8; (CHECKED / STEP) as usize];
    let rounds = std::env::var("HOLDFAST_KILLS").ok().and_then(|n| n.parse().ok()).unwrap_or(ROUNDS);
    for round in 1..=rounds {
        let (mut child, client) = serve(dir);
        let stop = AtomicBool::new(false);
        let acknowledged = std::thread::scope(|s| {
            for n in 0..2 {
                let (client, stop) = (&client, &stop);
                s.spawn(move || load(&**client, round << 8 | n, stop));
            }
            let wanted = 3 + random.below(25);
            for _ in 0..wanted {
                let place = random.below(known.len() as u64);
                let byte = (round * 29 + place) as u8 | 1;
                client.write_at(place * STEP, &vec![byte; STEP as usize]).expect("written");
                client.flush().expect("flushed");
                known[place as usize] = byte;
            }
            // In the middle of what the others do.
            child.kill().expect("killed");
            child.wait().expect("gone");
            stop.store(true, Ordering::Release);
            wanted
        });
        drop(client);
        let (code, said) = image(dir, "qemu-img", &["check", "a.qcow2"]);
        assert!(code == 0 || code == 3, "round {round}, {acknowledged} flushes: {said}");
        let changed = change_and_kill(dir, &mut random, round, &mut pace);
        let (code, said) = image(dir, ours, &["check", "-r", "leaks", "a.qcow2"]);
        assert_eq!(code, 0, "round {round}: {said}");
        let (code, said) = image(dir, "qemu-img", &["convert", "-f", "qcow2", "-O", "raw", "a.qcow2", "out"]);
        assert_eq!(code, 0, "round {round}: {said}");
        let out = std::fs::read(dir.join("out")).expect("data");
        for (place, byte) in known.iter().enumerate() {
            let at = place * STEP as usize;
            let same = out[at..at + STEP as usize].iter().all(|b| b == byte);
            assert!(same, "round {round}, place {place}, after {changed}");
        }
    }
}
