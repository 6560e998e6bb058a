//! Each kind of thread makes a system call that it must not make, in a process of its own, and the process dies of
//! it, saying of which.

use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Output};
use std::sync::Arc;
use std::sync::mpsc::channel;

use holdfast_sandbox::{PathRule, ROLES, Sandbox, SeccompMode};
use holdfast_threads::Role;

/// Tells the child, which is this same test, what to do.
const TASK: &str = "HOLDFAST_SANDBOX_TASK";

fn child(task: &str) -> Output {
    let me = std::env::current_exe().expect("own path");
    Command::new(me)
        .args(["--exact", "child_of_the_other_tests", "--nocapture", "--test-threads=1"])
        .env(TASK, task)
        .output()
        .expect("child runs")
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

fn role_of(name: &str) -> Role {
    ROLES.into_iter().find(|r| format!("{r:?}") == name).expect("a role")
}

/// Makes system call `number` with arguments that do no harm.
fn call(number: i64) -> i64 {
    // SAFETY: with null pointers and zeroes these calls fail, or do nothing that matters to a test's child.
    unsafe { libc::syscall(number, 0, 0, 0, 0, 0, 0) }
}

fn errno() -> i32 {
    std::io::Error::last_os_error().raw_os_error().unwrap_or(0)
}

thread_local! {
    /// The sandbox of the thread under test, to start threads with.
    static SANDBOX: std::cell::RefCell<Option<Arc<Sandbox>>> = const { std::cell::RefCell::new(None) };
}

/// Blocks all signals, as the C library does for itself at times.
fn block_signals() {
    // SAFETY: sigset_t is plain data that sigfillset initialises.
    unsafe {
        let mut all: libc::sigset_t = std::mem::zeroed();
        libc::sigfillset(&raw mut all);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const all, std::ptr::null_mut());
    }
}

/// Runs `body` on a confined thread and prints what it returns.
fn confined(mode: SeccompMode, role: Role, body: fn() -> String) {
    let sandbox = Sandbox::new(mode).expect("sandbox");
    let own = Arc::clone(&sandbox);
    let body = move || {
        SANDBOX.set(Some(own));
        body()
    };
    // What a thread inherits must not silence the message.
    block_signals();
    let (send, receive) = channel();
    let thread = sandbox.spawner().spawn("subject", role, Box::new(move || drop(send.send(body()))));
    thread.expect("thread").join().expect("join");
    eprintln!("result: {}", receive.recv().expect("result"));
}

fn call_by_name(name: &str) -> fn() -> String {
    match name {
        "execve" => || format!("{} {}", call(libc::SYS_execve), errno()),
        "openat" => || format!("{} {}", call(libc::SYS_openat), errno()),
        "socket" => || format!("{} {}", call(libc::SYS_socket), errno()),
        "ptrace" => || format!("{} {}", call(libc::SYS_ptrace), errno()),
        "clone3" => || format!("{} {}", call(libc::SYS_clone3), errno()),
        "fork" => || {
            // SAFETY: flags without CLONE_THREAD ask for a process; SIGCHLD alone is what fork uses.
            let pid = unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) };
            if pid == 0 {
                // SAFETY: the child ends at once.
                unsafe { libc::_exit(0) };
            }
            format!("{pid}")
        },
        "exec-memory" => || {
            // SAFETY: a new anonymous mapping; what it returns is only looked at.
            let at = unsafe {
                let (prot, flags) =
                    (libc::PROT_READ | libc::PROT_EXEC, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
                libc::mmap(std::ptr::null_mut(), 4096, prot, flags, -1, 0)
            };
            format!("{}", at == libc::MAP_FAILED)
        },
        "sti" => || {
            // SAFETY: TIOCSTI with a null pointer cannot type anything.
            let result = unsafe { libc::ioctl(0, 0x5412, 0) };
            format!("{result}")
        },
        "kill-other" => || format!("{}", call(libc::SYS_tgkill)),
        "own-thread" => || {
            let sandbox = SANDBOX.take().expect("a sandbox");
            let made = sandbox.spawner().spawn("inner", Role::Timer, Box::new(|| {}));
            format!("own thread {}", made.is_ok_and(|thread| thread.join().is_ok()))
        },
        "passwd" => || format!("{:?}", std::fs::read("/etc/passwd").map(|_| ()).map_err(|e| e.kind())),
        "bounding-set" => || {
            // SAFETY: prctl with integer arguments; it fails for capabilities that the kernel does not have.
            let has = |cap: u64| unsafe { libc::prctl(libc::PR_CAPBSET_READ, cap, 0, 0, 0) } == 1;
            format!("bounded to {}", (0..64).filter(|cap| has(*cap)).count())
        },
        "thread" => || std::thread::spawn(|| "thread made".to_owned()).join().expect("join"),
        "work" => || {
            let mut file = std::io::sink();
            std::io::Write::write_all(&mut file, &vec![1; 1 << 20]).expect("write");
            std::thread::sleep(std::time::Duration::from_millis(1));
            let lock = std::sync::Mutex::new(String::from("worked"));
            lock.into_inner().expect("lock")
        },
        "caps" => || {
            let status = std::fs::read_to_string("/proc/thread-self/status");
            let status = status.expect("no filter forbids it in this mode");
            status.lines().filter(|l| l.starts_with("CapEff") || l.starts_with("NoNewPrivs")).collect()
        },
        other => panic!("no task {other}"),
    }
}

#[test]
fn child_of_the_other_tests() {
    let Ok(task) = std::env::var(TASK) else { return };
    let words: Vec<&str> = task.split(' ').collect();
    if words[0] == "paths" {
        let sandbox = Sandbox::new(SeccompMode::Off).expect("sandbox");
        sandbox
            .limit_paths(vec![PathRule::new(words[1], false), PathRule::new(words[2], true)])
            .expect("Landlock");
        let (send, receive) = channel();
        let (readable, writable) = (words[1].to_owned(), words[2].to_owned());
        let body = move || {
            let kind = |r: std::io::Result<()>| r.map_err(|e| e.kind());
            let results = [
                kind(std::fs::read(format!("{readable}/file")).map(|_| ())),
                kind(std::fs::write(format!("{readable}/file"), "x")),
                kind(std::fs::write(format!("{writable}/file"), "x")),
                kind(std::fs::read("/etc/passwd").map(|_| ())),
            ];
            let _ = send.send(format!("{results:?}"));
        };
        sandbox.spawner().spawn("subject", Role::Vmm, Box::new(body)).expect("thread").join().expect("join");
        eprintln!("result: {}", receive.recv().expect("result"));
        return;
    }
    confined(words[0].parse().expect("a mode"), role_of(words[1]), call_by_name(words[2]));
}

fn dies(role: Role, what: &str, named: &str) {
    let output = child(&format!("true {role:?} {what}"));
    let text = text(&output);
    assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?} {what}: {} {text}", output.status);
    let message = format!("thread `subject` made system call `{named}`, which the sandbox forbids there");
    assert!(text.contains(&message), "{role:?} {what}: {text}");
}

#[test]
fn every_kind_of_thread_dies_of_a_forbidden_system_call() {
    for role in ROLES {
        dies(role, "execve", "execve");
        dies(role, "ptrace", "ptrace");
        dies(role, "fork", "clone");
        dies(role, "sti", "ioctl");
        dies(role, "kill-other", "tgkill");
    }
}

/// Those that start no threads and open no files.
const CONFINED: [Role; 9] = [
    Role::Vcpu,
    Role::Timer,
    Role::Block,
    Role::Net,
    Role::Device,
    Role::BackEnd,
    Role::Vhost,
    Role::Gdb,
    Role::Signal,
];

#[test]
fn threads_that_work_on_what_they_are_given_open_nothing() {
    for role in CONFINED.into_iter().filter(|role| *role != Role::BackEnd) {
        dies(role, "openat", "openat");
        dies(role, "socket", "socket");
        dies(role, "exec-memory", "mmap");
    }
    // It looks for its back end again, and for nothing else.
    dies(Role::BackEnd, "openat", "openat");
    dies(Role::BackEnd, "exec-memory", "mmap");
}

#[test]
fn every_kind_of_thread_lives_and_ends_under_its_filter() {
    for role in ROLES {
        let output = child(&format!("true {role:?} work"));
        assert!(
            output.status.success() && text(&output).contains("result: worked"),
            "{role:?}: {}",
            text(&output)
        );
    }
}

#[test]
fn threads_can_be_made_by_those_who_may_and_never_by_clone3() {
    for role in [Role::Vmm, Role::Api, Role::Migration] {
        let output = child(&format!("true {role:?} thread"));
        assert!(text(&output).contains("result: thread made"), "{role:?}: {}", text(&output));
    }
    let output = child("true Vmm clone3");
    assert!(text(&output).contains(&format!("result: -1 {}", libc::ENOSYS)), "{}", text(&output));
}

#[test]
fn threads_that_may_not_start_others_die_of_it() {
    for role in CONFINED {
        dies(role, "own-thread", "clone");
        // Around the spawner, the C library makes the call with all signals blocked: the kernel kills, and only its
        // own log says of what.
        let output = child(&format!("true {role:?} thread"));
        assert_eq!(output.status.signal(), Some(libc::SIGSYS), "{role:?} {}", text(&output));
    }
    for role in [Role::Vmm, Role::Api, Role::Migration] {
        let output = child(&format!("true {role:?} own-thread"));
        assert!(text(&output).contains("result: own thread true"), "{role:?}: {}", text(&output));
    }
}

#[test]
fn api_threads_open_no_files() {
    let output = child("true Api passwd");
    assert!(text(&output).contains("result: Err(PermissionDenied)"), "{}", text(&output));
    let output = child("true Vmm passwd");
    assert!(text(&output).contains("result: Ok(())"), "{}", text(&output));
}

#[test]
fn the_other_modes_let_the_process_live() {
    let output = child("errno Vcpu openat");
    assert!(text(&output).contains(&format!("result: -1 {}", libc::EPERM)), "{}", text(&output));
    for mode in ["log", "false"] {
        let output = child(&format!("{mode} Vcpu execve"));
        assert!(text(&output).contains(&format!("result: -1 {}", libc::EFAULT)), "{mode}: {}", text(&output));
    }
}

#[test]
fn threads_keep_no_privilege_that_they_do_not_need() {
    let output = child("log Vcpu caps");
    assert!(text(&output).contains("CapEff:\t0000000000000000"), "{}", text(&output));
    assert!(text(&output).contains("NoNewPrivs:\t1"), "{}", text(&output));
    for role in ROLES {
        let output = child(&format!("log {role:?} bounding-set"));
        assert!(text(&output).contains("result: bounded to 0"), "{role:?}: {}", text(&output));
    }
}

#[test]
fn landlock_permits_the_named_paths_and_no_others() {
    let readable = tempfile::tempdir().expect("directory");
    let writable = tempfile::tempdir().expect("directory");
    std::fs::write(readable.path().join("file"), "x").expect("file");
    let output = child(&format!("paths {} {}", readable.path().display(), writable.path().display()));
    let expected = "result: [Ok(()), Err(PermissionDenied), Ok(()), Err(PermissionDenied)]";
    assert!(text(&output).contains(expected), "{}", text(&output));
}
