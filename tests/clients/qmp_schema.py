"""Our `query-qmp-schema` against QEMU's: every command and event that we have is one of QEMU's, takes no
argument that QEMU's does not take, and returns no member that QEMU's does not return, with the same types."""

import asyncio
import os
import subprocess
import sys
import tempfile

from qemu.qmp import QMPClient

# Members that newer QEMUs have and the one at hand may not.
NEWER = {
    ("query-machines", "acpi"),
    ("blockdev-add", "header"),
    ("blockdev-reopen", "header"),
    ("chardev-add", "reconnect-ms"),
    ("migrate", "channels"),
    ("migrate-set-parameters", "direct-io"),
    ("query-migrate-parameters", "direct-io"),
    ("migrate-incoming", "channels"),
    ("migrate-incoming", "exit-on-error"),
    ("query-migrate", "postcopy-latency"),
    ("query-migrate", "postcopy-latency-dist"),
    ("query-block", "active"),
    ("query-block-jobs", "actively-synced"),
    ("query-block", "detached-header"),
    ("query-named-block-nodes", "active"),
    ("query-named-block-nodes", "detached-header"),
}
# Words that newer QEMUs have.
NEWER_WORDS = {"switchover-ack", "dirty-limit", "mapped-ram", "file"}
# What command lines may say, in types that commands share with them.
SHORTER = {
    (command, member)
    for command in ("blockdev-add", "blockdev-reopen", "nbd-server-start")
    for member in ("host", "port", "path")
}

# Takes the properties of the device too, which no schema has.
OPEN = {"device_add"}


async def schema_of(command, path):
    process = subprocess.Popen(command)
    try:
        for _ in range(600):
            if os.path.exists(path):
                break
            assert process.poll() is None, command
            await asyncio.sleep(0.05)
        client = QMPClient("schema")
        await client.connect(path)
        schema = {entity["name"]: entity for entity in await client.execute("query-qmp-schema")}
        await client.disconnect()
        return schema
    finally:
        process.terminate()
        process.wait()


def kind(schema, name):
    entity = schema[name]
    meta = entity["meta-type"]
    return entity["json-type"] if meta == "builtin" else meta


def members_of(schema, name):
    """The types of an object's members, those of all its variants included."""
    entity = schema[name]
    members = {}
    for member in entity["members"]:
        members.setdefault(member["name"], []).append(member["type"])
    for variant in entity.get("variants", []):
        for member, types in members_of(schema, variant["type"]).items():
            members.setdefault(member, []).extend(types)
    return members


def compare_any(where, ours, our_type, theirs, their_types, seen):
    """Compares with the types that a member has in different variants: one must fit."""
    failures = []
    for their_type in their_types:
        try:
            return compare(where, ours, our_type, theirs, their_type, seen)
        except AssertionError as failure:
            failures.append(str(failure))
    raise AssertionError(failures)


def compare(where, ours, our_type, theirs, their_type, seen):
    """Adds to `seen` how many types were compared."""
    our_kind, their_kind = kind(ours, our_type), kind(theirs, their_type)
    seen.append(where)
    if our_kind in ("value", "string") and their_kind == "alternate":
        pass
    elif our_kind == "array":
        assert their_kind == "array", (where, our_kind, their_kind)
        compare(where, ours, ours[our_type]["element-type"], theirs, theirs[their_type]["element-type"], seen)
    elif our_kind == "object":
        assert their_kind == "object", (where, our_kind, their_kind)
        members = members_of(theirs, their_type)
        for name, types in members_of(ours, our_type).items():
            if (where.split(".")[0], name) in NEWER | SHORTER and name not in members:
                continue
            if where in OPEN and name not in members:
                continue
            assert name in members, f"{where}.{name} is not QEMU's"
            if where.count(".") < 8:
                for our_member in types:
                    compare_any(f"{where}.{name}", ours, our_member, theirs, members[name], seen)
    elif our_kind == "enum":
        assert their_kind in ("enum", "string"), (where, our_kind, their_kind)
        if their_kind == "enum":
            words = lambda schema, name: {member["name"] for member in schema[name]["members"]}
            more = words(ours, our_type) - words(theirs, their_type) - NEWER_WORDS
            assert not more, (where, more)
    else:
        same = our_kind == their_kind or (our_kind == "string" and their_kind == "enum")
        assert same, (where, our_kind, their_kind)


async def run(directory):
    binary = os.environ["HOLDFAST_BIN"]
    ours = await schema_of([binary, "run", "--qmp", f"unix:{directory}/a"], f"{directory}/a")
    qemu = ["qemu-system-riscv64", "-machine", "none", "-nodefaults", "-display", "none"]
    theirs = await schema_of([*qemu, "-qmp", f"unix:{directory}/b,server=on,wait=off"], f"{directory}/b")
    seen = []
    for name, entity in ours.items():
        if entity["meta-type"] not in ("command", "event") or name == "query-qmp-schema":
            continue
        assert theirs.get(name, {}).get("meta-type") == entity["meta-type"], f"{name} is not QEMU's"
        compare(name, ours, entity["arg-type"], theirs, theirs[name]["arg-type"], seen)
        if entity["meta-type"] == "command":
            compare(name, ours, entity["ret-type"], theirs, theirs[name]["ret-type"], seen)
    assert len(seen) > 80, len(seen)
    print(f"QEMU's schema: {len(seen)} types agree", file=sys.stderr)


def main():
    with tempfile.TemporaryDirectory() as directory:
        asyncio.run(run(directory))


main()
