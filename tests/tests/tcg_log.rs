//! `--tcg-log`: guest code, IR and host code of small guests whose instructions are known.

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use holdfast_tests::Program;

const LONG: Duration = Duration::from_secs(240);

/// Runs `args` with `log` and gives what was logged.
fn logged(dir: &Path, args: &[&str], log: &str) -> String {
    let file = dir.join("log");
    let log = format!("file={},{log}", file.display());
    let all =
        [args, &["--serial", "null", "--console", "off", "--memory", "size=64M", "--tcg-log", &log]].concat();
    let mut vm = Program::run(&all);
    assert!(vm.wait_exit(LONG).success(), "{}", vm.output());
    std::fs::read_to_string(file).expect("a log")
}

fn x86_guest(dir: &Path) -> String {
    let (source, elf) = (dir.join("guest.S"), dir.join("guest.elf"));
    let text = ".section .note.Xen, \"a\", @note\n.long 4, 8, 18\n.asciz \"Xen\"\n.quad _start\n\
        .text\n.code32\n.globl _start\n_start: movl (%esp), %ecx\nmovw $0x604, %dx\nmovw $0x2000, %ax\noutw %ax, %dx\n0: jmp 0b\n";
    std::fs::write(&source, text).expect("source");
    let mut gcc = Command::new("gcc");
    gcc.args(["-nostdlib", "-static", "-no-pie", "-Wl,-Ttext=0x100000", "-Wl,--build-id=none", "-o"]);
    let output = gcc.arg(&elf).arg(&source).output().expect("gcc runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    elf.to_str().expect("UTF-8").to_owned()
}

#[test]
fn x86_code_is_logged_in_three_forms() {
    let dir = tempfile::tempdir().expect("directory");
    let elf = x86_guest(dir.path());
    let args = ["--arch", "x86_64", "--machine", "q35", "--accel", "tcg", "--kernel", &elf];
    let text = logged(dir.path(), &args, "guest=on,ir=on,host=on,int=on,filter=0x100000+64");
    for want in [
        "REGION 0x100000 vcpu 0 phys 0x100000",
        "mov dx,604h",
        "mov ax,2000h",
        "IR:\nregion 0x100000",
        "HOST: ",
    ] {
        assert!(text.contains(want), "`{want}` is missing in:\n{text}");
    }
    // What the call for an access out of the common leaves behind itself are no instructions.
    assert!(text.contains(": db ["), "{text}");
    assert!(
        text.lines().filter(|l| l.starts_with("REGION ")).all(|l| l.starts_with("REGION 0x1000")),
        "{text}"
    );
    // Somewhere else there is nothing.
    let text = logged(dir.path(), &args, "guest=on,filter=0x900000..0x900010");
    assert_eq!(text, "");
}

#[test]
fn riscv_code_is_logged() {
    let dir = tempfile::tempdir().expect("directory");
    // li a7, 8; ecall (legacy SBI shutdown); j .
    let code = [0x0080_0893_u32, 0x0000_0073, 0x0000_006f];
    // As long as a loader wants it.
    let mut program: Vec<u8> = code.iter().flat_map(|word| word.to_le_bytes()).collect();
    program.resize(4096, 0);
    let kernel = dir.path().join("program");
    std::fs::write(&kernel, program).expect("program");
    let kernel = kernel.to_str().expect("UTF-8");
    let args = ["--arch", "riscv64", "--machine", "virt", "--accel", "tcg", "--kernel", kernel];
    let text = logged(dir.path(), &args, "guest=on,int=on,filter=0x80200000..0x80200010");
    for want in [
        "REGION 0x80200000 ",
        "addi rd: 17, rs1: 0, imm: 8",
        "ecall",
        "INT: vcpu 0 at 0x80200004: exception 0x9",
    ] {
        assert!(text.contains(want), "`{want}` is missing in:\n{text}");
    }
}

#[test]
fn what_cannot_be_logged_is_refused_by_name() {
    let refused = |args: &[&str]| {
        let mut command = Command::new(holdfast_tests::holdfast());
        let output = command.arg("run").args(args).output().expect("it runs");
        assert!(!output.status.success());
        String::from_utf8_lossy(&output.stderr).into_owned()
    };
    let base = ["--kernel", "/nonexistent", "--tcg-log"];
    let says = |log: &str| refused(&[&base[..], &[log]].concat());
    assert!(says("file=/tmp/x").contains("logs nothing; switch on guest, ir, host or int"));
    let text = says("file=/tmp/x,guest=on,filter=12");
    assert!(text.contains("`12` is no range of addresses: START..END or START+LENGTH"), "{text}");
    let dir = tempfile::tempdir().expect("directory");
    let elf = x86_guest(dir.path());
    let args = ["--arch", "x86_64", "--accel", "tcg", "--kernel", &elf, "--console", "off"];
    let text = refused(&[&args[..], &["--tcg-log", "guest=on,file=/nonexistent/directory/log"]].concat());
    assert!(text.contains("tcg_log: `/nonexistent/directory/log` cannot be made"), "{text}");
}
