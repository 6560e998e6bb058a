#!/usr/bin/env python3
"""Short x86-64 loops in a translated guest and natively: nanoseconds a round, best of five, and their ratio.

    tests/bench/loops.py [ROUNDS]

`registers-low` works on registers that stay in the host's, `registers-high` on those that translated code keeps in memory, each operation on what
the one before gave; `wide-low` and `wide-high` likewise with operations that do not depend on each other; `fp-chain` adds to a vector register once a round, `fp-chain-of-4` four times; `called` is a
call and a return, `inlined` the same without them; `chase` is one load that depends on the one before; `straddling` are five accesses of which some are
in one page and some in the next, `within` the same in one; each of `across-` is one access that begins in one page and ends in the next. So they tell what keeping
registers across blocks, or inlining calls, could save. Natively and in the guest in turn; the best of all rounds counts.
"""
import os
import shutil
import subprocess
import sys
import tempfile
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
HOLDFAST = os.environ.get("HOLDFAST_BIN", os.path.join(os.environ.get("CARGO_TARGET_DIR", ROOT + "/target"), "release/holdfast"))
LIMIT = 300


def figures(text):
    lines = [line.split() for line in text.splitlines() if line.startswith("LOOP ") and line.strip() != "LOOP end"]
    return {line[1]: float(line[2]) for line in lines if len(line) == 3}


def in_guest(guest, work):
    tree = os.path.join(work, "tree")
    os.makedirs(os.path.join(tree, "bin"), exist_ok=True)
    shutil.copy(os.path.join(work, "loops"), os.path.join(tree, "bin/loops"))
    script = os.path.join(tree, "bin/guest-tests")
    with open(script, "w") as out:
        out.write("#!/bin/sh\n/bin/loops\n")
    os.chmod(script, 0o755)
    archive = subprocess.run("find bin | cpio -o -H newc -R 0:0 --quiet", shell=True, cwd=tree, check=True, capture_output=True)
    initramfs, console = os.path.join(work, "initramfs.cpio"), os.path.join(work, "console")
    with open(os.path.join(guest, "initramfs.cpio"), "rb") as base, open(initramfs, "wb") as out:
        out.write(base.read() + archive.stdout)
    vm = subprocess.Popen(
        [HOLDFAST, "run", "--arch", "x86_64", "--accel", "tcg", "--memory", "size=512M", "--kernel", os.path.join(guest, "vmlinuz"),
         "--initramfs", initramfs, "--cmdline", "console=ttyS0 quiet holdfast.test=loops", "--serial", "file=" + console,
         "--console", "off"], stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + LIMIT
        while time.monotonic() < end and vm.poll() is None:
            time.sleep(0.1)
            if os.path.exists(console):
                with open(console, errors="replace") as text:
                    said = text.read()
                if "LOOP end" in said:
                    return figures(said)
        sys.exit("the guest does not finish")
    finally:
        vm.kill()
        vm.wait()


def main():
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    guest = subprocess.check_output([os.path.join(ROOT, "tests/guests/fetch-x86_64")], text=True).strip()
    with tempfile.TemporaryDirectory() as work:
        program = os.path.join(work, "loops")
        subprocess.run(["gcc", "-O2", "-static", "-o", program, os.path.join(HERE, "loops.c")], check=True)
        ours, native = [], []
        for _ in range(rounds):
            ours.append(in_guest(guest, work))
            native.append(figures(subprocess.check_output([program], text=True)))
    print("| loop | translated, ns | native, ns | ratio |\n|---|---|---|---|")
    for name in ours[0]:
        a, b = (min(r[name] for r in results) for results in (ours, native))
        print(f"| {name} | {a:.2f} | {b:.2f} | {a / b:.2f} |")


main()
