"""A whole life of a VM through the unmodified qemu.qmp client, with REST looking on."""

import asyncio
import http.client
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

from qemu.qmp import QMPClient
from qemu.qmp.qmp_client import ExecuteError

LIMIT = 120


class UnixHttp(http.client.HTTPConnection):
    def __init__(self, path):
        super().__init__("localhost", timeout=LIMIT)
        self.path = path

    def connect(self):
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(LIMIT)
        self.sock.connect(self.path)


def rest_state(path):
    connection = UnixHttp(path)
    connection.request("GET", "/api/v1/vm.info")
    response = connection.getresponse()
    assert response.status == 200, response.status
    state = json.load(response)["state"]
    connection.close()
    return state


def arguments(directory):
    guest = pathlib.Path(os.environ["HOLDFAST_RISCV64_GUEST"])
    return [
        os.environ["HOLDFAST_BIN"], "run", "--name", "qmp-guest",
        "--arch", "riscv64", "--machine", "virt", "--accel", "tcg",
        "--cpus", "boot=2", "--memory", "size=256M",
        "--kernel", str(guest / "Image"), "--initramfs", str(guest / "initramfs.cpio"),
        "--cmdline", "console=ttyS0", "--serial", f"file={directory}/serial", "--console", "off",
        "--platform", "system_uuid=6ba7b810-9dad-11d1-80b4-00c04fd430c8",
        "--qmp", f"unix:{directory}/qmp", "--api-socket", f"{directory}/api",
        "--event-monitor", f"path={directory}/events",
    ]


async def expect_event(client, name):
    while True:
        event = await asyncio.wait_for(client.events.get(), LIMIT)
        assert event["timestamp"]["seconds"] > 1_600_000_000, event
        if event["event"] == name:
            return event


async def fails(client, command, error_class, arguments=None):
    try:
        await client.execute(command, arguments)
    except ExecuteError as error:
        assert error.error_class == error_class, (command, error.error_class)
        return
    raise AssertionError(f"{command} did not fail")


async def queries(client):
    names = {command["name"] for command in await client.execute("query-commands")}
    schema = await client.execute("query-qmp-schema")
    assert names == {entity["name"] for entity in schema if entity["meta-type"] == "command"}
    assert (await client.execute("query-name"))["name"] == "qmp-guest"
    assert (await client.execute("query-uuid"))["UUID"] == "6ba7b810-9dad-11d1-80b4-00c04fd430c8"
    assert (await client.execute("query-kvm"))["enabled"] is False
    assert any(machine["name"] == "virt" for machine in await client.execute("query-machines"))
    assert [cpu["cpu-index"] for cpu in await client.execute("query-cpus-fast")] in ([0], [0, 1])
    for command in ("query-version", "query-chardev", "query-block", "query-pci"):
        await client.execute(command)
    for line in ("info status", "info registers", "info mtree", "info qtree", "info jit", "xp /4xw 0x80000000"):
        text = await client.execute("human-monitor-command", {"command-line": line})
        assert isinstance(text, str) and text, line
        assert not text.startswith("unknown command"), text
    await fails(client, "no-such-command", "CommandNotFound")
    await fails(client, "stop", "GenericError", {"nonsense": 1})


async def life(directory):
    process = subprocess.Popen(arguments(directory))
    path = f"{directory}/qmp"
    try:
        client, other = QMPClient("first"), QMPClient("second")
        for _ in range(LIMIT * 10):
            if os.path.exists(path) or process.poll() is not None:
                break
            await asyncio.sleep(0.1)
        await client.connect(path)
        await other.connect(path)
        api = f"{directory}/api"
        while (await client.execute("query-status"))["status"] != "running":
            await asyncio.sleep(0.1)
        assert rest_state(api) == "Running"
        await queries(client)

        await client.execute("stop")
        await expect_event(client, "STOP")
        await expect_event(other, "STOP")
        assert (await other.execute("query-status")) == {"running": False, "status": "paused"}
        assert rest_state(api) == "Paused", "the same VM over REST"
        await other.execute("cont")
        await expect_event(client, "RESUME")
        assert rest_state(api) == "Running"
        await client.execute("system_reset")
        reset = await expect_event(client, "RESET")
        assert reset["data"]["guest"] is False, reset
        await power_button(client)

        await client.execute("quit")
        shutdown = await expect_event(client, "SHUTDOWN")
        assert shutdown["data"] == {"guest": False, "reason": "host-qmp-quit"}, shutdown
        assert await asyncio.to_thread(process.wait, LIMIT) == 0
        for each in (client, other):
            try:
                await each.disconnect()
            except EOFError:
                pass
    finally:
        process.kill()
    events = pathlib.Path(directory, "events").read_text(encoding="utf-8")
    names = [json.loads(text)["event"] for text in events.strip().split("\n\n")]
    expected = ["starting", "booted", "paused", "resumed", "rebooted", "shutdown"]
    assert [name for name in names if name in expected][:5] == expected[:5], names
    assert names[-1] == "shutdown", names


async def power_button(client):
    try:
        await client.execute("system_powerdown")
    except ExecuteError as error:
        # A machine without a power button says so, and tells nobody that it was pressed.
        assert "button" in str(error), error
        return
    await expect_event(client, "POWERDOWN")


def main():
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(life(directory))
    print("qemu.qmp: a whole life", file=sys.stderr)


main()
