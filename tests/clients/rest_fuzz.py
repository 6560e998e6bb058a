"""schemathesis against the REST API: our OpenAPI description, our server, its cases.

schemathesis speaks TCP, so a forwarder stands between it and the UNIX socket. Its checks `not_a_server_error`,
`unsupported_method`, `negative_data_rejection` and `positive_data_acceptance` are left out: Cloud Hypervisor,
whose statuses these are, answers 500 in the wrong state and 400 to a wrong method, and reads bodies leniently.
"""

import asyncio
import os
import pathlib
import subprocess
import sys
import tempfile
import threading

CHECKS = "status_code_conformance,content_type_conformance,response_headers_conformance,response_schema_conformance"
# Each case is a request or a few; the server must survive all of them.
CASES = os.environ.get("HOLDFAST_REST_CASES", "60")


async def pump(reader, writer):
    try:
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()
    except (ConnectionError, OSError):
        pass
    finally:
        writer.close()


def forward(path, ready):
    """Forwards TCP connections to the UNIX socket at `path` for as long as the process lives."""

    async def client(reader, writer):
        upstream_reader, upstream_writer = await asyncio.open_unix_connection(path)
        await asyncio.gather(pump(reader, upstream_writer), pump(upstream_reader, writer))

    async def serve():
        server = await asyncio.start_server(client, "127.0.0.1", 0)
        ready.append(server.sockets[0].getsockname()[1])
        await server.serve_forever()

    threading.Thread(target=lambda: asyncio.run(serve()), daemon=True).start()


def main():
    schemathesis = sys.argv[1]
    binary = os.environ["HOLDFAST_BIN"]
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/api"
        process = subprocess.Popen([binary, "run", "--api-socket", path], cwd=directory)
        while not os.path.exists(path) and process.poll() is None:
            pass
        ready = []
        forward(path, ready)
        while not ready:
            pass
        # `vmm.shutdown` would end the server in the middle: it is left out.
        description = pathlib.Path(directory, "openapi.json")
        describe = os.environ.get("HOLDFAST_DESCRIBE_BIN", binary)
        description.write_bytes(subprocess.run([describe, "openapi"], check=True, capture_output=True).stdout)
        command = [
            schemathesis, "run", str(description), "--url", f"http://127.0.0.1:{ready[0]}/api/v1",
            "--checks", CHECKS, "--max-examples", CASES, "--phases", "examples,coverage,fuzzing",
            "--exclude-path", "/vmm.shutdown", "--workers", "1", "--no-color", "--seed", "1",
            "--generation-database", "none",
        ]
        done = subprocess.run(command, check=False, cwd=directory).returncode
        # Once more with a VM that nothing takes away, so that there is something to ask about.
        if process.poll() is None:
            client = [describe, "ctl", "--api-socket", path]
            subprocess.run([*client, "delete"], check=True)
            subprocess.run([*client, "create"], check=True, input=b'{"console": {"mode": "Off"}}')
            keep = ["/vm.create", "/vm.delete", "/vm.restore"]
            command += [word for route in keep for word in ("--exclude-path", route)]
            done = done or subprocess.run(command, check=False, cwd=directory).returncode
        alive = process.poll() is None
        ended = None
        if alive:
            subprocess.run([describe, "ctl", "--api-socket", path, "shutdown-vmm"], check=True)
            ended = process.wait(60)
        process.kill()
        assert alive, f"the server died: {process.returncode}"
        assert ended == 0, f"exit status {ended}"
        assert done == 0, f"schemathesis: {done}"
    print("schemathesis: no failure", file=sys.stderr)


main()
