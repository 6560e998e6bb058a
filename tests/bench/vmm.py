"""Figures of the VMM itself: what it costs before the guest runs, and beside the guest's RAM.

`tests/bench/run` prints them with its own; alone:

    tests/bench/vmm.py [--runs N]
"""
import argparse
import os
import resource
import socket
import statistics
import struct
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))

# MiB, as Firecracker's own figure has it.
MEMORY = 128

NAMES = [
    ("api-cpu-ms", "CPU from process start to the API socket", "ms"),
    ("idle-rss", "RSS of a VMM that waits for a VM", "MiB"),
    ("tcg-first-ms", "CPU of a whole run, riscv64 `virt`, translated, that ends at the guest's first instructions", "ms"),
    ("kvm-first-ms", "CPU of a whole run, x86-64 `q35`, KVM, that ends at the guest's first instructions", "ms"),
    ("tcg-beside", "RSS beside guest RAM, an idle riscv64 Linux, translated", "MiB"),
    ("kvm-beside", "RSS beside guest RAM, an idle x86-64 guest, KVM", "MiB"),
]


def kvm_usable():
    return os.environ.get("HOLDFAST_NO_KVM") != "1" and os.access("/dev/kvm", os.R_OK | os.W_OK)


def pvh_kernel(path, code):
    """An ELF file that is entered by PVH, in 32-bit mode, at its `code`."""
    base, entry = 0x100000, 0x100000
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", entry)
    header = 64 + 2 * 56
    ident = b"\x7fELF\x02\x01\x01" + bytes(9)
    ehdr = ident + struct.pack("<HHIQQQIHHHHHH", 2, 62, 1, entry, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 7, header + len(note), base, base, len(code), len(code), 1)
    notes = struct.pack("<IIQQQQQQ", 4, 4, header, 0, 0, len(note), len(note), 4)
    with open(path, "wb") as f:
        f.write(ehdr + load + notes + note + code)


# mov dx, 0x501; mov al, 0; out dx, al: the debug exit port ends the process with status 1.
X86_EXIT = bytes.fromhex("66ba0105b000ee") + b"\xf4\xeb\xfd"
# cli; hlt; jmp to hlt: idle for ever.
X86_IDLE = bytes.fromhex("faf4ebfd")
# lui t0, 0x100; lui t1, 0x5; addi t1, t1, 0x555; sw t1, 0(t0); j .: the test finisher switches the machine off.
RISCV_EXIT = struct.pack("<5I", 0x001002B7, 0x00005337, 0x55530313, 0x0062A023, 0x0000006F)


def common(accel, more):
    return ["run", "--accel", accel, "--cpus", "boot=1", "--memory", f"size={MEMORY}M", "--serial", "null",
            "--console", "off"] + more


def cpu_of_run(command, status):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run(command, stderr=subprocess.DEVNULL, timeout=120).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if code != status:
        sys.exit(f"{command} ended with {code}, not {status}")
    return 1000 * (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)


def beside_ram(pid):
    """RSS in MiB of all mappings but guest RAM: the smallest that can hold it."""
    mappings = []
    with open(f"/proc/{pid}/smaps") as f:
        for line in f:
            words = line.split()
            if words[0] == "Size:":
                mappings.append([int(words[1]), 0])
            elif words[0] == "Rss:":
                mappings[-1][1] = int(words[1])
    ram = min((m for m in mappings if m[0] >= MEMORY << 10), key=lambda m: m[0])
    return (sum(m[1] for m in mappings) - ram[1]) / 1024


def connect(path):
    for _ in range(5000):
        probe = socket.socket(socket.AF_UNIX)
        try:
            probe.connect(path)
            return
        except OSError:
            time.sleep(0.001)
        finally:
            probe.close()
    sys.exit("the API socket never came up")


def waiting(binary, work):
    path = os.path.join(work, "api")
    proc = subprocess.Popen([binary, "run", "--api-socket", path], stderr=subprocess.DEVNULL)
    try:
        connect(path)
        cpu = 0
        for tid in os.listdir(f"/proc/{proc.pid}/task"):
            with open(f"/proc/{proc.pid}/task/{tid}/schedstat") as f:
                cpu += int(f.read().split()[0])
        with open(f"/proc/{proc.pid}/status") as f:
            rss = next(int(line.split()[1]) for line in f if line.startswith("VmRSS"))
        return {"api-cpu-ms": cpu / 1e6, "idle-rss": rss / 1024}
    finally:
        proc.kill()
        proc.wait()


def idle(command, ready):
    proc = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        ready(proc)
        return beside_ram(proc.pid)
    finally:
        proc.kill()
        proc.wait()


def booted(serial):
    def ready(proc):
        for _ in range(3000):
            if os.path.exists(serial) and b"BOOTED" in open(serial, "rb").read():
                # The shell has nothing to do.
                time.sleep(2)
                return
            if proc.poll() is not None:
                break
            time.sleep(0.1)
        sys.exit("the idle guest did not boot")
    return ready


def figures(binary, guest):
    """One round."""
    with tempfile.TemporaryDirectory() as work:
        def file(name):
            return os.path.join(work, name)
        found = waiting(binary, work)
        with open(file("exit.bin"), "wb") as f:
            f.write(RISCV_EXIT)
        virt = ["--arch", "riscv64"]
        found["tcg-first-ms"] = cpu_of_run([binary] + common("tcg", virt + ["--firmware", file("exit.bin")]), 0)
        linux = virt + ["--kernel", guest + "/Image", "--initramfs", guest + "/initramfs.cpio", "--cmdline",
                        "console=ttyS0 quiet"]
        command = [binary] + common("tcg", linux)
        command[command.index("null")] = "file=" + file("serial")
        found["tcg-beside"] = idle(command, booted(file("serial")))
        if kvm_usable():
            pvh_kernel(file("exit.elf"), X86_EXIT)
            pvh_kernel(file("idle.elf"), X86_IDLE)
            exits = ["--arch", "x86_64", "--machine", "q35,debug_exit=0x501", "--kernel", file("exit.elf")]
            found["kvm-first-ms"] = cpu_of_run([binary] + common("kvm", exits), 1)
            idles = ["--arch", "x86_64", "--kernel", file("idle.elf")]
            found["kvm-beside"] = idle([binary] + common("kvm", idles), lambda _: time.sleep(2))
    return found


def rows(rounds):
    """Lines of a Markdown table with the medians."""
    lines = ["| of the VMM itself | median |", "|---|---|"]
    for name, text, unit in NAMES:
        values = [r[name] for r in rounds if name in r]
        cell = f"{statistics.median(values):.1f} {unit}" if values else "no usable /dev/kvm"
        lines.append(f"| {text} | {cell} |")
    return lines


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=5)
    runs = parser.parse_args().runs
    binary = os.environ.get("HOLDFAST_BIN", os.path.join(ROOT, "target/release/holdfast"))
    guest = subprocess.check_output([os.path.join(ROOT, "tests/guests/fetch-riscv64")], text=True).strip()
    print("\n".join(rows([figures(binary, guest) for _ in range(runs)])))


if __name__ == "__main__":
    main()
