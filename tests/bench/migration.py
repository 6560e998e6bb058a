#!/usr/bin/env python3
"""Moves the same translated riscv64 guest by Holdfast and by QEMU, each from one process to another over loopback TCP, driven by the
same QMP commands; prints total time, downtime, bytes and CPU seconds, and QEMU's figures divided by ours (above 1: we are better).

    tests/bench/migration.py [ROUNDS]

HOLDFAST_BIN (or a release build) and qemu-system-riscv64 are needed. Guests: idle, one that counts; busy, one that writes to
memory and sums it up. 256 MiB, two vCPUs. Each side runs the guest alone; what matters is their ratio in one run.
"""
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
HOLDFAST = os.environ.get("HOLDFAST_BIN", os.path.join(os.environ.get("CARGO_TARGET_DIR", ROOT + "/target"), "release/holdfast"))
QEMU = os.environ.get("QEMU", "qemu-system-riscv64")
LIMIT = 300


class Qmp:
    def __init__(self, path):
        end = time.time() + LIMIT
        while True:
            try:
                self.socket = socket.socket(socket.AF_UNIX)
                self.socket.connect(path)
                break
            except OSError:
                if time.time() > end:
                    raise
                time.sleep(0.05)
        self.lines = self.socket.makefile("r")
        self.lines.readline()
        self.command("qmp_capabilities")

    def command(self, name, **arguments):
        self.socket.sendall(json.dumps({"execute": name, "arguments": arguments}).encode() + b"\n")
        while True:
            answer = json.loads(self.lines.readline())
            if "error" in answer:
                raise RuntimeError(f"{name}: {answer['error']['desc']}")
            if "return" in answer:
                return answer["return"]


def command_line(ours, guest, work, name, test):
    kernel, initramfs = os.path.join(guest, "Image"), os.path.join(guest, "initramfs.cpio")
    append, console = f"console=ttyS0 quiet holdfast.test={test}", os.path.join(work, "console-" + name)
    qmp = "unix:" + os.path.join(work, name)
    if ours:
        return [HOLDFAST, "run", "--arch", "riscv64", "--accel", "tcg", "--cpus", "boot=2", "--memory", "size=256M", "--kernel",
                kernel, "--initramfs", initramfs, "--cmdline", append, "--serial", "file=" + console, "--console", "off",
                "--qmp", qmp]
    return [QEMU, "-M", "virt", "-accel", "tcg", "-smp", "2", "-m", "256M", "-kernel", kernel, "-initrd", initramfs, "-append",
            append, "-serial", "file:" + console, "-display", "none", "-monitor", "none", "-qmp", qmp + ",server=on,wait=off"]


def cpu_seconds(process):
    with open(f"/proc/{process.pid}/stat") as stat:
        fields = stat.read().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for_counts(path, count):
    end = time.time() + LIMIT
    while time.time() < end:
        if os.path.exists(path) and open(path, errors="replace").read().count("COUNT") >= count:
            return
        time.sleep(0.1)
    sys.exit(f"the guest does not work: {path}")


def move(ours, guest, test):
    with tempfile.TemporaryDirectory() as work:
        source = subprocess.Popen(command_line(ours, guest, work, "a", test), stdout=subprocess.DEVNULL)
        target = None
        try:
            wait_for_counts(os.path.join(work, "console-a"), 15)
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
            line = command_line(ours, guest, work, "b", test) + ["--incoming" if ours else "-incoming", "defer"]
            target = subprocess.Popen(line, stdout=subprocess.DEVNULL)
            here, there = Qmp(os.path.join(work, "a")), Qmp(os.path.join(work, "b"))
            there.command("migrate-incoming", uri=f"tcp:127.0.0.1:{port}")
            here.command("migrate-set-parameters", **{"max-bandwidth": 10 << 30, "downtime-limit": 300})
            # A guest that writes faster than RAM moves is slowed by both.
            here.command("migrate-set-capabilities", capabilities=[{"capability": "auto-converge", "state": True}])
            before = cpu_seconds(source) + cpu_seconds(target)
            here.command("migrate", uri=f"tcp:127.0.0.1:{port}")
            end = time.time() + LIMIT
            while True:
                info = here.command("query-migrate")
                if time.time() > end:
                    sys.exit(f"the migration does not end: {info}")
                if info["status"] == "completed":
                    break
                if info["status"] == "failed":
                    sys.exit(f"the migration failed: {info}")
                time.sleep(0.005)
            cpu = cpu_seconds(source) + cpu_seconds(target) - before
            end = time.time() + LIMIT
            while there.command("query-status")["status"] != "running" and time.time() < end:
                time.sleep(0.01)
            return {"total ms": info["total-time"], "downtime ms": info["downtime"],
                    "MiB": info["ram"]["transferred"] / (1 << 20), "CPU s": cpu}
        finally:
            for process in (source, target):
                if process:
                    process.kill()
                    process.wait()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    guest = subprocess.check_output([os.path.join(ROOT, "tests/guests/fetch-riscv64")], text=True).strip()
    print(f"{'guest':6} {'figure':12} {'Holdfast':>10} {'QEMU':>10} {'ratio':>7}   (medians of {rounds})")
    for name, test in (("idle", "counter"), ("busy", "mover")):
        results = {True: [], False: []}
        for _ in range(rounds):
            for ours in (True, False):
                results[ours].append(move(ours, guest, test))
        for figure in results[True][0]:
            ours, theirs = (statistics.median(r[figure] for r in results[who]) for who in (True, False))
            print(f"{name:6} {figure:12} {ours:10.2f} {theirs:10.2f} {theirs / max(ours, 0.01):7.2f}")


main()
