//! Guests under `gdb-multiarch`: a small one on both accelerators, and Debian's kernels by symbol under translation.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use holdfast_tests::{Program, riscv64_args, x86_64_args};

/// Generous: the test machine may be busy. Nothing is asserted about speed.
const LONG: Duration = Duration::from_secs(300);

/// What gdb printed of `script`, a failing command of which ends it.
fn gdb(dir: &Path, symbols: &Path, script: &str) -> String {
    let file = dir.join("script.gdb");
    let head = format!(
        "set pagination off\nset confirm off\nset remotetimeout 200\nset width 0\ntarget remote {}\n",
        dir.join("gdb").display()
    );
    std::fs::write(&file, head + script).expect("script");
    let command = "exec timeout 600 gdb-multiarch -nx -q -batch -x \"$0\" \"$1\" 2>&1";
    let mut command = {
        let mut shell = Command::new("sh");
        shell.args(["-c", command]).arg(file).arg(symbols);
        shell
    };
    let output = command.output().expect("gdb runs");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn assert_in_order(text: &str, wanted: &[&str]) {
    let mut rest = text;
    for want in wanted {
        let at = rest.find(want).unwrap_or_else(|| panic!("`{want}` is missing or too early in:\n{text}"));
        rest = &rest[at + want.len()..];
    }
}

/// `program` with debuggers at `dir/gdb`, QMP at `dir/qmp`, and the guest standing.
fn debugged(mut args: Vec<String>, dir: &Path) -> Program {
    for (option, name) in [("--gdb", "gdb"), ("--qmp", "qmp")] {
        args.extend([option.to_owned(), format!("unix:{}", dir.join(name).display())]);
    }
    args.push("--gdb-wait".into());
    Program::run(&args)
}

/// Waits for a socket of the program.
fn connect(program: &Program, path: &Path) -> UnixStream {
    let end = Instant::now() + LONG;
    loop {
        match UnixStream::connect(path) {
            Ok(stream) => return stream,
            Err(e) => assert!(Instant::now() < end, "{}: {e}\n{}", path.display(), program.output()),
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

/// Asks QMP for the VM's state until it is `wanted`.
fn wait_state(program: &Program, dir: &Path, wanted: &str) {
    let mut stream = connect(program, &dir.join("qmp"));
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    stream.write_all(b"{\"execute\":\"qmp_capabilities\"}\n").expect("QMP reads");
    let mut text = String::new();
    let mut buffer = [0; 4096];
    let end = Instant::now() + LONG;
    loop {
        stream.write_all(b"{\"execute\":\"query-status\"}\n").expect("QMP reads");
        let n = stream.read(&mut buffer).expect("QMP answers");
        text += &String::from_utf8_lossy(&buffer[..n]);
        if text.contains(&format!("\"status\": \"{wanted}\""))
            || text.contains(&format!("\"status\":\"{wanted}\""))
        {
            return;
        }
        assert!(n > 0 && Instant::now() < end, "never `{wanted}`: {text}");
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn run(command: &mut Command) {
    let output = command.output().unwrap_or_else(|e| panic!("{command:?}: {e}"));
    assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Builds the small guest.
fn debuggee(dir: &Path) -> PathBuf {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("guests/debuggee/guest.S");
    let elf = dir.join("guest.elf");
    run(Command::new("gcc")
        .args(["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", "-g", "-o"])
        .arg(&elf)
        .arg(source));
    elf
}

/// The small guest on `accel`: `watch` says whether data can be watched.
fn small(accel: &str, watch: bool) {
    let dir = tempfile::tempdir().expect("directory");
    let elf = debuggee(dir.path());
    let args = [
        ["--machine", "q35"],
        ["--accel", accel],
        ["--cpus", "boot=2"],
        ["--memory", "size=64M"],
        ["--kernel", elf.to_str().expect("UTF-8")],
        ["--serial", "null"],
        ["--console", "off"],
    ];
    let mut vm = debugged(args.into_iter().flatten().map(str::to_owned).collect(), dir.path());
    wait_state(&vm, dir.path(), "debug");
    let text = gdb(dir.path(), &elf, SMALL);
    assert_in_order(
        &text,
        &[
            "AT 1",
            "vCPU 0 [running]",
            "vCPU 1 [halted]",
            "STEP 5",
            "SOFT 2 2",
            "HARD 3",
            "MANY 3",
            "0xe8",
            "BX 1001",
        ],
    );
    assert!(text.contains("detached"), "{text}");
    wait_state(&vm, dir.path(), "running");
    let text = gdb(dir.path(), &elf, WATCH);
    if watch {
        assert_in_order(
            &text,
            &["Old value", "New value", "WATCH 1", "Hardware access", "after_bump", "detached"],
        );
    } else {
        assert!(text.contains("Could not insert hardware watchpoint"), "{text}");
    }
    let text = gdb(dir.path(), &elf, OVER);
    assert_in_order(&text, &["OVER 1", "exited normally"]);
    assert!(vm.wait_exit(LONG).success(), "{}", vm.output());
}

/// Registers, steps, breakpoints. Those that are never reached take the debug registers first.
const SMALL: &str = r#"
printf "AT %d\n", $rip == (long)&_start
info threads
stepi
printf "STEP %d\n", $rip - (long)&_start
break *&bump
continue
continue
continue
printf "SOFT %d %d\n", *(int *)&counter, $rbx
delete
hbreak *&after_bump
continue
printf "HARD %d\n", *(int *)&counter
delete
break *&spare0
break *&spare1
break *&spare2
break *&spare3
break *&bump
break *&again
continue
continue
printf "MANY %d\n", *(int *)&counter
x/1xb &again
delete
set var $rbx = 1000
stepi
stepi
printf "BX %d\n", $rbx
detach
"#;

/// `incl counter` ends 7 bytes behind `bump`.
const WATCH: &str = r#"
watch *(int *)&counter
continue
printf "WATCH %d\n", $rip == (long)&bump + 7
delete
awatch *(int *)&copy
continue
info symbol $rip
delete
detach
"#;

/// To the end.
const OVER: &str = r#"
set var *(int *)&done = 1
hbreak *&over
continue
printf "OVER %d\n", *(int *)&done
delete
continue
"#;

#[test]
fn a_small_guest_under_translation() {
    small("tcg", true);
}

#[test]
fn needs_kvm_a_small_guest() {
    if std::env::var_os("HOLDFAST_NO_KVM").is_some_and(|v| v == "1") {
        eprintln!("skipped: needs /dev/kvm, and HOLDFAST_NO_KVM=1 says that there is none");
        return;
    }
    let flags = std::fs::read_to_string("/proc/cpuinfo").expect("/proc/cpuinfo");
    let hardware = flags.split_whitespace().any(|flag| matches!(flag, "vmx" | "svm"));
    small("kvm", hardware);
}

#[test]
fn waiting_for_no_debugger_is_refused() {
    let mut command = Command::new(holdfast_tests::holdfast());
    let output = command.args(["run", "--kernel", "/nonexistent", "--gdb-wait"]).output().expect("it runs");
    assert_eq!(output.status.code(), Some(2));
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(text.contains("--gdb-wait waits for a debugger; say with --gdb where it connects"), "{text}");
}

/// A symbol of the kernel.
#[derive(Debug, Clone)]
struct Symbol {
    name: String,
    address: u64,
    code: bool,
}

/// An ELF file with `symbols` and nothing else, by which gdb knows a kernel without its debugging package. `machine`
/// is the ELF machine number.
fn symbol_file(path: &Path, machine: u16, symbols: &[Symbol]) {
    let base = symbols.iter().map(|s| s.address).min().expect("symbols") & !0xfff;
    let end = symbols.iter().map(|s| s.address).max().expect("symbols") + 0x1000;
    let mut names = vec![0];
    let mut table = vec![0; 24];
    for symbol in symbols {
        let name = names.len() as u32;
        names.extend(symbol.name.bytes().chain([0]));
        table.extend(name.to_le_bytes());
        // Global; a function or an object, of the one section.
        table.extend([0x10 | if symbol.code { 2 } else { 1 }, 0, 1, 0]);
        table.extend(symbol.address.to_le_bytes());
        table.extend(8_u64.to_le_bytes());
    }
    let section_names = b"\0.text\0.symtab\0.strtab\0.shstrtab\0";
    let (table_at, names_at) = (64, 64 + table.len());
    let strings_at = names_at + names.len();
    let sections_at = strings_at + section_names.len();
    let mut elf = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    elf.extend(2_u16.to_le_bytes().into_iter().chain(machine.to_le_bytes()).chain(1_u32.to_le_bytes()));
    elf.extend([base, 0, sections_at as u64].into_iter().flat_map(u64::to_le_bytes));
    elf.extend(0_u32.to_le_bytes());
    elf.extend([64_u16, 56, 0, 64, 5, 4].into_iter().flat_map(u16::to_le_bytes));
    elf.extend(&table);
    elf.extend(&names);
    elf.extend(section_names);
    // name, type, flags, address, offset, size, link, info, alignment, entry size
    let sections: [[u64; 10]; 5] = [
        [0; 10],
        [1, 8, 6, base, 64, end - base, 0, 0, 16, 0],
        [7, 2, 0, 0, table_at as u64, table.len() as u64, 3, 1, 8, 24],
        [15, 3, 0, 0, names_at as u64, names.len() as u64, 0, 0, 1, 0],
        [23, 3, 0, 0, strings_at as u64, section_names.len() as u64, 0, 0, 1, 0],
    ];
    for [name, kind, flags, address, offset, size, link, info, align, entry] in sections {
        elf.extend([name as u32, kind as u32].into_iter().flat_map(u32::to_le_bytes));
        elf.extend([flags, address, offset, size].into_iter().flat_map(u64::to_le_bytes));
        elf.extend([link as u32, info as u32].into_iter().flat_map(u32::to_le_bytes));
        elf.extend([align, entry].into_iter().flat_map(u64::to_le_bytes));
    }
    std::fs::write(path, elf).expect("symbol file");
}

/// What is debugged: names as `/proc/kallsyms` has them.
const SYMBOLS: &str = "uptime_proc_show|seq_read_iter|schedule|jiffies_64|[a-z0-9_]*sys_geteuid";

/// Lets the guest's shell say where the kernel's symbols are.
fn symbols(vm: &mut Program) -> Vec<Symbol> {
    let from = vm.output().len();
    vm.type_in(&format!("grep -E ' ({SYMBOLS})$' /proc/kallsyms | sed 's/^/SY''M /'; echo LIS''TED\n"));
    vm.wait_for_after("LISTED", from, LONG);
    let text = vm.output();
    let parse = |line: &str| {
        let mut words = line.trim().strip_prefix("SYM ")?.split_whitespace();
        let address = u64::from_str_radix(words.next()?, 16).ok()?;
        let code = words.next()?.eq_ignore_ascii_case("t");
        Some(Symbol { name: words.next()?.to_owned(), address, code })
    };
    text.lines().filter_map(parse).collect()
}

/// Speaks gdb's protocol by itself: the guest runs, is interrupted, and is let go.
fn interrupted_by_hand(vm: &Program, dir: &Path) {
    let mut stream = connect(vm, &dir.join("gdb"));
    stream.set_read_timeout(Some(LONG)).expect("a timeout");
    let mut seen = Vec::new();
    let mut expect = |stream: &mut UnixStream, wanted: &[u8]| {
        let mut buffer = [0; 256];
        while !seen.windows(wanted.len()).any(|w| w == wanted) {
            let n = stream.read(&mut buffer).expect("an answer");
            assert!(n > 0, "closed after {}", String::from_utf8_lossy(&seen));
            seen.extend_from_slice(&buffer[..n]);
        }
        seen.clear();
    };
    stream.write_all(b"$?#3f").expect("sent");
    expect(&mut stream, b"#");
    stream.write_all(b"+$vCont;c#a8").expect("sent");
    expect(&mut stream, b"+");
    wait_state(vm, dir, "running");
    stream.write_all(b"\x03").expect("sent");
    expect(&mut stream, b"T02thread:");
    wait_state(vm, dir, "debug");
    stream.write_all(b"+$D#44").expect("sent");
    expect(&mut stream, b"OK");
    wait_state(vm, dir, "running");
}

/// Debian's kernel by symbol. `patch`: code that returns 1234.
fn kernel(mut args: Vec<String>, machine: u16, patch: &str, pc: &str) {
    let dir = tempfile::tempdir().expect("directory");
    let cmdline = args.iter_mut().find(|arg| arg.starts_with("console=")).expect("a command line");
    cmdline.push_str(" nokaslr");
    let mut vm = debugged(args, dir.path());
    wait_state(&vm, dir.path(), "debug");
    interrupted_by_hand(&vm, dir.path());
    vm.wait_for("BOOTED", LONG);
    vm.wait_for("# ", LONG);
    let symbols = symbols(&mut vm);
    let entries = ["__x64_sys_geteuid", "__riscv_sys_geteuid"];
    let geteuid = entries.iter().find(|name| symbols.iter().any(|s| s.name == **name));
    let geteuid = geteuid.unwrap_or_else(|| panic!("no geteuid among {symbols:?}"));
    let file = dir.path().join("symbols.elf");
    symbol_file(&file, machine, &symbols);
    // Something that calls what is debugged for as long as it takes.
    let from = vm.output().len();
    vm.type_in("while :; do id -u; cat /proc/uptime; done >/dev/null & echo STAR''TED\n");
    vm.wait_for_after("STARTED", from, LONG);
    let script = format!(
        "info threads\nbreak *&uptime_proc_show\ncontinue\nprintf \"SOFT %d\\n\", ${pc} == (long)&uptime_proc_show\n\
         backtrace 2\ncontinue\ninfo symbol ${pc}\ndelete\n\
         hbreak *&seq_read_iter\ncontinue\nprintf \"HARD %d\\n\", ${pc} == (long)&seq_read_iter\n\
         set $old = ${pc}\nstepi\nstepi\nprintf \"STEPPED %d\\n\", ${pc} != $old\ndelete\n\
         set $was = *(long *)&jiffies_64\nwatch *(long *)&jiffies_64\ncontinue\n\
         printf \"WATCHED %d\\n\", *(long *)&jiffies_64 != $was\ndelete\n\
         thread apply all -q info registers {pc}\n{patch}\n\
         printf \"PATCHED\\n\"\ndetach\n"
    );
    let text = gdb(dir.path(), &file, &script.replace("GETEUID", &format!("&{geteuid}")));
    assert_in_order(
        &text,
        &[
            "vCPU 0",
            "vCPU 1",
            "SOFT 1",
            "#0 ",
            "uptime_proc_show",
            "#1 ",
            "uptime_proc_show",
            "HARD 1",
            "STEPPED 1",
            "Old value",
            "New value",
            "WATCHED 1",
            "PATCHED",
            "detached",
        ],
    );
    // The kernel's code is what the debugger made of it, although it was translated.
    let from = vm.output().len();
    vm.type_in("kill %1; echo EUID=$(id -u)\n");
    vm.wait_for_after("EUID=1234", from, LONG);
    // And to the end under the debugger, which has to be there before.
    let attached = dir.path().join("attached");
    let script = format!("shell touch {}\ncontinue\n", attached.display());
    let text = std::thread::scope(|scope| {
        let debugger = scope.spawn(|| gdb(dir.path(), &file, &script));
        while !attached.exists() && !debugger.is_finished() {
            std::thread::sleep(Duration::from_millis(20));
        }
        vm.type_in("poweroff -f\n");
        debugger.join().expect("gdb")
    });
    assert!(text.contains("exited normally"), "{text}");
    assert!(vm.wait_exit(LONG).success(), "{}", vm.output());
}

#[test]
fn debians_amd64_kernel_by_symbol() {
    // mov $1234, %eax; ret
    let patch = "set {unsigned char[6]}GETEUID = {0xb8, 0xd2, 0x04, 0, 0, 0xc3}";
    kernel(x86_64_args(2, ""), 62, patch, "rip");
}

#[test]
fn debians_riscv64_kernel_by_symbol() {
    // li a0, 1234; ret
    let patch = "set {unsigned int}GETEUID = 0x4d200513\nset {unsigned short}((char *)GETEUID + 4) = 0x8082";
    kernel(riscv64_args(2, ""), 243, patch, "pc");
}
