#!/usr/bin/env python3
"""Moves the same translated riscv64 guest by Holdfast and by QEMU, each from one process to another over TCP between two network
namespaces with a veth between (root is needed; `--loopback` does without), driven by the same QMP commands; prints total time, downtime, bytes
and CPU seconds, and QEMU's figures divided by ours (above 1: we are better).

    tests/bench/migration.py [--large] [--warm] [--loopback] [--only CASE,...] [ROUNDS]

HOLDFAST_BIN (or a release build) and qemu-system-riscv64 are needed; HOLDFAST_BUILD is another build of ours to run in QEMU's place. Guests (tests/bench/ticker) of 256 MiB and two vCPUs: idle; busy, which
writes to 8 MiB and sums them up; dirtier, which writes to 48 MiB as fast as it can, with auto-converge. `idle post` and `busy post` go over by
post-copy. `--large` adds guests of 2 GiB, among them one that is idle but full of data, as it is and over a link of 10 Gbit/s (by tbf).
`--only` takes cases by their names in the table; the last is not there with `--loopback`. `--warm` lets a third process write to as much memory as the guest has and more right before each
migration: a host that is a virtual machine itself may have to ask its own host for memory, which takes longer than the migration. Each side
runs the guest alone; what matters is their ratio in one run.

`CPU` is both processes' but for their vCPUs', until a second behind the end, when both are at rest again. `with vCPUs` is all of theirs until the source is done; it is not
compared, for it is the more the less a guest that works stands.
`total it says` and `downtime it says` are what each program says of itself, and not compared either: ours last until the destination has said that it runs,
QEMU's until the source has sent the last byte, and its guest goes on some time behind that. `total` and `pause seen` are measured from outside, the same way for
both: the guest writes a dot to its serial port every few milliseconds, and both processes have it go to one FIFO. The longest gap between two dots from the beginning of the migration to
a second behind its end is the pause. The longest gap that begins before the source is done is the one in which the guest changes hands; where it and the source are at an end, the move is. The pause includes
what host CPUs that are busy with the migration add, and what code that is translated anew does. A guest that writes no dots at the destination has
not gone on: behind most moves of an idle riscv64 guest by QEMU 7.2 that is so, as if its timers were not started again. Such a move is left
out, said, and done again. `guest loses` is the guest's slowdown as time: how long it would have taken, at the rate of the two seconds before, for the dots that are missing
from the beginning of the migration to a quarter of a second behind that end. (What it does slowly at the destination counts, and taking little for long is no better than taking more for a shorter time.)
`full speed` (post-copy) is the time from the first dot at the destination to the end of the last gap that is longer
than twice the longest before the migration. Behind each post-copy case comes the histogram of how long our faults took, from the fault to its page
(`postcopy-latency-dist` of QMP's query-migrate, which QEMU has from 10.1 on), and QEMU's `postcopy-blocktime`.
"""
import atexit
import collections
import itertools
import json
import math
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(os.path.dirname(HERE))
HOLDFAST = os.environ.get("HOLDFAST_BIN", os.path.join(os.environ.get("CARGO_TARGET_DIR", ROOT + "/target"), "release/holdfast"))
QEMU = os.environ.get("QEMU", "qemu-system-riscv64")
BUILD = os.environ.get("HOLDFAST_BUILD")
OTHER = "other build" if BUILD else "QEMU"
LIMIT = 300
# How long faults of one post-copy case took, by doublings from a microsecond on, all rounds together.
LATENCY = collections.Counter()
# How often a move of ours, and of QEMU's, left a guest that stands, in one case.
STANDS = collections.Counter()
# How long the guest may write nothing at the end, in seconds.
SILENT = 0.5
# How long behind its end a move may still cost the guest something, in seconds.
BEHIND = 0.25
# How often a move is tried.
ATTEMPTS = 8
# Figures that are not the same thing on both sides, or of the guest's work.
UNLIKE = ("total it says ms", "downtime it says ms", "with vCPUs ms")
# Writes to so many MiB.
WARM = """
import mmap, sys
memory = mmap.mmap(-1, int(sys.argv[1]) << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory.madvise(mmap.MADV_HUGEPAGE)
for _ in range(int(sys.argv[1])):
    memory.write(bytes(1 << 20))
"""
# QEMU's figures of the case, one of each round.
BLOCKTIME = []


class Hosts:
    """Two network namespaces with a veth between, or the loopback interface."""

    def __init__(self):
        self.loopback = "--loopback" in sys.argv
        self.names = [f"migration{os.getpid()}{n}" for n in "ab"]
        self.address = "127.0.0.1" if self.loopback else "10.231.77.2"
        if self.loopback:
            return
        atexit.register(self.close)
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "veth0", "netns", self.names[0], "type", "veth", "peer", "name", "veth0", "netns", self.names[1])
        for n, name in enumerate(self.names, 1):
            self.ip("-n", name, "address", "add", f"10.231.77.{n}/30", "dev", "veth0")
            self.ip("-n", name, "link", "set", "veth0", "up")

    def ip(self, *words):
        subprocess.run(["ip", *words], check=True)

    def limit(self, rate):
        """Has the link carry no more than that from the first to the second; None: as much as it can."""
        if not self.loopback:
            link = ["tc", "-n", self.names[0], "qdisc"]
            subprocess.run([*link, "del", "dev", "veth0", "root"], stderr=subprocess.DEVNULL)
            if rate:
                subprocess.run([*link, "add", "dev", "veth0", "root", "tbf", "rate", rate, "burst", "10mb", "latency", "50ms"], check=True)

    def on(self, n, command):
        return command if self.loopback else ["ip", "netns", "exec", self.names[n], *command]

    def port(self):
        if not self.loopback:
            return 4444
        with socket.socket() as free:
            free.bind((self.address, 0))
            return free.getsockname()[1]

    def close(self):
        for name in self.names:
            subprocess.run(["ip", "netns", "delete", name])


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


class Dots:
    """When the guest wrote, as the reader of the FIFO saw it."""

    def __init__(self, path):
        os.mkfifo(path)
        self.fd = os.open(path, os.O_RDWR)
        self.times, self.text, self.begun = [], b"", threading.Event()
        threading.Thread(target=self.read, daemon=True).start()

    def read(self):
        while True:
            data, now = os.read(self.fd, 4096), time.monotonic()
            if self.begun.is_set():
                self.times.append((now, data.count(b".")))
                continue
            self.text += data
            if b"TICKER" in self.text:
                self.begun.set()

    def gaps(self, start, end):
        times = [t for t, _ in list(self.times) if start <= t <= end]
        return [(later - earlier, later) for earlier, later in zip(times, times[1:])]

    def count(self, start, end):
        return sum(count for t, count in list(self.times) if start <= t <= end)

    def rate(self, start, end):
        return self.count(start, end) / (end - start)

    def lost(self, start, end, rate):
        """How many seconds of work at `rate` are missing."""
        return end - start - self.count(start, end) / rate


def pack(guest, work):
    """The initramfs, with the ticker in place of the tests."""
    os.makedirs(work + "/root/bin")
    shutil.copy(os.path.join(HERE, "ticker"), work + "/root/bin/guest-tests")
    archive = subprocess.run("find . | cpio -o -H newc -R 0:0 --quiet", shell=True, cwd=work + "/root", check=True, capture_output=True)
    with open(os.path.join(guest, "initramfs.cpio"), "rb") as base, open(work + "/initramfs.cpio", "wb") as out:
        out.write(base.read() + archive.stdout)


def command_line(ours, guest, work, name, test, mib):
    kernel, initramfs = os.path.join(guest, "Image"), os.path.join(work, "initramfs.cpio")
    append, console = f"console=ttyS0 quiet holdfast.test={test}", os.path.join(work, "console")
    qmp = "unix:" + os.path.join(work, name)
    if ours or BUILD:
        return [HOLDFAST if ours else BUILD, "run", "--arch", "riscv64", "--accel", "tcg", "--cpus", "boot=2", "--memory", f"size={mib}M", "--kernel",
                kernel, "--initramfs", initramfs, "--cmdline", append, "--serial", "file=" + console, "--console", "off",
                "--qmp", qmp]
    return [QEMU, "-M", "virt", "-accel", "tcg", "-smp", "2", "-m", f"{mib}M", "-kernel", kernel, "-initrd", initramfs, "-append",
            append, "-serial", "file:" + console, "-display", "none", "-name", "guest,debug-threads=on", "-monitor", "none", "-qmp", qmp + ",server=on,wait=off"]


def cpu_seconds(process):
    """CPU time of a process, and how much of it was not its vCPUs'."""
    # The clock of another process, as clock_getcpuclockid(3) names it: threads that have ended count too.
    everything = time.clock_gettime(~process.pid << 3 | 2)
    guest = 0
    tasks = f"/proc/{process.pid}/task"
    for task in os.listdir(tasks):
        # Threads of the migration end, vCPUs do not.
        try:
            with open(f"{tasks}/{task}/comm") as name, open(f"{tasks}/{task}/schedstat") as spent:
                guest += name.read().startswith(("vcpu", "CPU ")) * int(spent.read().split()[0]) / 1e9
        except (FileNotFoundError, ProcessLookupError):
            pass
    return everything, everything - guest


def cpu_of(processes, before=(0, 0)):
    return tuple(sum(figures) - old for figures, old in zip(zip(*map(cpu_seconds, processes)), before))


def move(ours, guest, test, mib, postcopy, hosts):
    with tempfile.TemporaryDirectory() as work:
        pack(guest, work)
        dots = Dots(work + "/console")
        source = subprocess.Popen(hosts.on(0, command_line(ours, guest, work, "a", test, mib)), stdout=subprocess.DEVNULL)
        target = None
        try:
            if not dots.begun.wait(LIMIT):
                sys.exit("the guest does not work")
            settled = time.monotonic()
            time.sleep(2)
            uri = f"tcp:{hosts.address}:{hosts.port()}"
            line = command_line(ours, guest, work, "b", test, mib) + ["--incoming" if ours or BUILD else "-incoming", "defer"]
            target = subprocess.Popen(hosts.on(1, line), stdout=subprocess.DEVNULL)
            here, there = Qmp(os.path.join(work, "a")), Qmp(os.path.join(work, "b"))
            # A guest that writes faster than RAM moves is slowed by both.
            wanted = [{"capability": "postcopy-ram" if postcopy else "auto-converge", "state": True}]
            here.command("migrate-set-capabilities", capabilities=wanted)
            if postcopy:
                # QEMU counts how long vCPUs stood if told to; we always count.
                blocktime = [] if ours or BUILD else [{"capability": "postcopy-blocktime", "state": True}]
                there.command("migrate-set-capabilities", capabilities=wanted + blocktime)
            there.command("migrate-incoming", uri=uri)
            here.command("migrate-set-parameters", **{"max-bandwidth": 10 << 30, "downtime-limit": 300})
            if "--warm" in sys.argv:
                subprocess.run([sys.executable, "-c", WARM, str(mib + 600)], check=True)
            time.sleep(0.5)
            before = cpu_of((source, target))
            began = time.monotonic()
            usual = max((gap for gap, _ in dots.gaps(settled, began)), default=0)
            here.command("migrate", uri=uri)
            end, switched = time.monotonic() + LIMIT, not postcopy
            while True:
                info = here.command("query-migrate")
                if time.monotonic() > end or info["status"] in ("failed", "postcopy-paused"):
                    sys.exit(f"the migration does not succeed: {info}")
                if info["status"] == "completed":
                    break
                if not switched and info["status"] == "active":
                    here.command("migrate-start-postcopy")
                    switched = True
                time.sleep(0.005)
            done = time.monotonic()
            cpu = cpu_of((source, target), before)
            while there.command("query-status")["status"] != "running" and time.monotonic() < end:
                time.sleep(0.01)
            time.sleep(1)
            now, own = time.monotonic(), cpu_of((source, target), before)[1]
            gaps = dots.gaps(began, now)
            if not gaps or now - gaps[-1][1] > SILENT:
                STANDS[ours] += 1
                return None
            seen, resumed = max(gaps)
            # When the guest goes on at the destination: behind the longest gap of those that begin before the source is done.
            there_again = max((gap for gap in gaps if gap[1] - gap[0] <= done), default=(0, done))[1]
            arrived = max(done, there_again)
            result = {"total ms": (arrived - began) * 1000, "total it says ms": info["total-time"], "pause seen ms": seen * 1000, "MiB": info["ram"]["transferred"] / (1 << 20),
                      "CPU ms": own * 1000, "with vCPUs ms": cpu[0] * 1000,
                      "guest loses ms": dots.lost(began, arrived + BEHIND, dots.rate(settled, settled + 2)) * 1000}
            if test == "full":
                result["MiB a second"] = info["ram"]["transferred"] / (1 << 20) / (arrived - began)
            if postcopy:
                slow = [at for gap, at in gaps if at >= resumed and gap > 2 * usual]
                result["full speed ms"] = (max(slow) - resumed) * 1000 if slow else 0
                result["faults"] = info["ram"]["postcopy-requests"]
                waited = there.command("query-migrate")
                if "postcopy-blocktime" in waited:
                    BLOCKTIME.append(waited)
                if ours:
                    LATENCY.update({n: count for n, count in enumerate(waited.get("postcopy-latency-dist", []))})
            else:
                result["downtime it says ms"] = info["downtime"]
            return result
        finally:
            for process in (source, target):
                if process:
                    process.kill()
                    process.wait()


def copied():
    """MiB that one core copies from memory to memory in a second: the best of eight."""
    source, target = bytearray(os.urandom(1 << 20) * 256), bytearray(256 << 20)
    best = math.inf
    for _ in range(8):
        began = time.monotonic()
        memoryview(target)[:] = source
        best = min(best, time.monotonic() - began)
    return round(256 / best)


def main():
    only = sys.argv[sys.argv.index("--only") + 1].split(",") if "--only" in sys.argv else []
    arguments = [a for a in sys.argv[1:] if a.isdecimal()]
    rounds = int(arguments[0]) if arguments else 3
    guest = subprocess.check_output([os.path.join(ROOT, "tests/guests/fetch-riscv64")], text=True).strip()
    cases = [(test, 256, False, None) for test in ("idle", "busy", "dirtier")] + [(test, 256, True, None) for test in ("idle", "busy")]
    if "--large" in sys.argv:
        cases += [(test, 2048, False, None) for test in ("idle", "busy", "dirtier", "full")] + [("full", 2048, False, "10gbit")]
    if "--loopback" in sys.argv:
        cases = [case for case in cases if not case[3]]
    names = [f"{test}{' post' if postcopy else ''} {mib} MiB{' ' + rate if rate else ''}" for test, mib, postcopy, rate in cases]
    if unknown := set(only) - set(names):
        sys.exit(f"no such case: {', '.join(sorted(unknown))} (of {', '.join(names)})")
    hosts = Hosts()
    print(f"{'guest':25} {'figure':20} {'Holdfast':>10} {OTHER:>10} {'ratio':>7}   (medians of {rounds})")
    print(f"one core copies {copied()} MiB a second from memory to memory")
    for name, (test, mib, postcopy, rate) in zip(names, cases):
        if only and name not in only:
            continue
        hosts.limit(rate)
        results = {True: [], False: []}
        for _ in range(rounds):
            for ours in (True, False):
                attempts = (move(ours, guest, test, mib, postcopy, hosts) for _ in range(ATTEMPTS))
                results[ours].extend(itertools.islice(filter(None, attempts), 1))
        for ours, count in STANDS.items():
            print(f"{name:25} {count} times the guest did not go on behind a move by {'Holdfast' if ours else OTHER}")
        STANDS.clear()
        for figure in (results[True] or [{}])[0]:
            ours, theirs = (statistics.median([r[figure] for r in results[who]] or [math.nan]) for who in (True, False))
            ratio = ours / max(theirs, 0.01) if figure == "MiB a second" else theirs / max(ours, 0.01)
            compared = "" if figure in UNLIKE else f"{ratio:7.2f}"
            print(f"{name:25} {figure:20} {ours:10.2f} {theirs:10.2f} {compared}", flush=True)
        faults = [f"{1 << n}: {LATENCY[n]}" for n in sorted(LATENCY) if LATENCY[n]]
        if faults:
            print(f"{name:25} Holdfast's faults by how long they took, from so many µs to twice as many: {', '.join(faults)}")
        if BLOCKTIME:
            both = [(round["postcopy-blocktime"], round["postcopy-vcpu-blocktime"]) for round in BLOCKTIME]
            print(f"{name:25} QEMU's ms in which all vCPUs stood, and each of them: {both}")
        LATENCY.clear()
        BLOCKTIME.clear()


main()
