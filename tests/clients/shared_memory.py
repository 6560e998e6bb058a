#!/usr/bin/env python3
"""A vhost-user back end that does nothing but map files into the guest's sight, on request of standard input.

Usage: shared_memory.py SOCKET SIZE...   (the sizes of its shared memory regions, by number; 0 is none)

Each line `map ID OFFSET LENGTH START WRITABLE FILE` or `unmap ID OFFSET LENGTH` is sent to the front end
(VHOST_USER_BACKEND_SHMEM_MAP, _UNMAP) when there is one, and what that answers is printed: 0 or a negative errno.
Written from QEMU's documentation of the protocol, `interop/vhost-user`."""

import array
import os
import socket
import struct
import sys
import threading

VERSION, REPLY, NEED_REPLY = 1, 4, 8
VIRTIO_F_VERSION_1, PROTOCOL_FEATURES = 1 << 32, 1 << 30
REPLY_ACK, BACKEND_REQ, SHMEM = 1 << 3, 1 << 5, 1 << 22
GET_FEATURES, GET_VRING_BASE, GET_PROTOCOL_FEATURES, SET_BACKEND_REQ_FD, GET_SHMEM_CONFIG = 1, 11, 15, 21, 44
SHMEM_MAP, SHMEM_UNMAP = 9, 10

channel = []
ready = threading.Event()


def exactly(stream, size):
    data = b""
    while len(data) < size:
        part = stream.recv(size - len(data))
        if not part:
            raise EOFError
        data += part
    return data


def serve(stream, sizes):
    """Answers the front end. Its rings are left alone."""
    while True:
        header, fds, _, _ = socket.recv_fds(stream, 12, 64)
        if not header:
            return
        header += exactly(stream, 12 - len(header))
        request, flags, size = struct.unpack("<III", header)
        body = exactly(stream, size)
        answer = None
        if request == GET_FEATURES:
            answer = struct.pack("<Q", VIRTIO_F_VERSION_1 | PROTOCOL_FEATURES)
        elif request == GET_PROTOCOL_FEATURES:
            answer = struct.pack("<Q", REPLY_ACK | BACKEND_REQ | SHMEM)
        elif request == GET_VRING_BASE:
            answer = body
        elif request == GET_SHMEM_CONFIG:
            count = sum(size != 0 for size in sizes)
            answer = struct.pack(f"<II{len(sizes)}Q", count, 0, *sizes)
        elif flags & NEED_REPLY:
            answer = struct.pack("<Q", 0)
        if answer is not None:
            stream.sendall(struct.pack("<III", request, VERSION | REPLY, len(answer)) + answer)
        if request == SET_BACKEND_REQ_FD:
            channel.append(socket.socket(fileno=fds.pop()))
            ready.set()
        for fd in fds:
            os.close(fd)


def ask(request, words, fds):
    """Sends a request for shared memory and gives what is answered."""
    shmid, offset, length, start, writable = words
    body = struct.pack("<B7xQQQQ", shmid, start, offset, length, writable)
    message = struct.pack("<III", request, VERSION | NEED_REPLY, len(body)) + body
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    channel[0].sendmsg([message], rights)
    got, flags, size = struct.unpack("<III", exactly(channel[0], 12))
    assert (got, flags & REPLY, size) == (request, REPLY, 8), (got, flags, size)
    return struct.unpack("<q", exactly(channel[0], 8))[0]


def main():
    path, sizes = sys.argv[1], [int(size, 0) for size in sys.argv[2:]]
    if os.path.exists(path):
        os.unlink(path)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen(1)
    threading.Thread(target=lambda: serve(listener.accept()[0], sizes), daemon=True).start()
    print("LISTENS", flush=True)
    for line in sys.stdin:
        ready.wait()
        what, *words = line.split()
        if what == "map":
            with open(words.pop(), "r+b" if words[4] == "1" else "rb") as file:
                result = ask(SHMEM_MAP, [int(word, 0) for word in words], [file.fileno()])
        else:
            result = ask(SHMEM_UNMAP, [int(word, 0) for word in words] + [0, 0], [])
        print(f"RESULT {result}", flush=True)


main()
