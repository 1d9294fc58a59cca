"""An engine's host whose cable is pulled: no FIN, no reset, and an engine that only looks like it.

The host is a network namespace of its own behind a virtual cable. Needs root and iproute2.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cluster.gateway.liveness import CUT_NOTICED_WITHIN_S
from cluster.gateway.upstream import NotReached, Upstream, UpstreamLost

pytestmark = pytest.mark.e2e

# Answers GET /now at once, begins a stream for /stream, says nothing to all else and reads no body
# larger than its buffer.
SERVER = """
import asyncio, sys

async def serve(reader, writer):
    while True:
        head = await reader.readuntil(b"\\r\\n\\r\\n")
        if b" /now " in head:
            writer.write(b"HTTP/1.1 200 OK\\r\\ncontent-length: 2\\r\\n\\r\\nok")
        elif b" /stream " in head:
            writer.write(b"HTTP/1.1 200 OK\\r\\ntransfer-encoding: chunked\\r\\n\\r\\n")
            writer.write(b"1\\r\\nx\\r\\n")
        else:
            await asyncio.sleep(1e6)

async def main():
    server = await asyncio.start_server(serve, sys.argv[1], 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()

asyncio.run(main())
"""
HERE, THERE = "10.79.13.1", "10.79.13.2"


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@contextlib.contextmanager
def engine(address: str, *prefix: str) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    argv = [*prefix, sys.executable, "-c", SERVER, address]
    process = subprocess.Popen(argv, stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        yield f"http://{address}:{int(process.stdout.readline())}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def host() -> Iterator[str]:
    """A host at THERE; its name is also that of its end of the cable."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("needs root and iproute2")
    name = f"cut{os.getpid()}"
    ip("netns", "add", name)
    try:
        ip("link", "add", f"{name}a", "type", "veth", "peer", "name", name, "netns", name)
        ip("address", "add", f"{HERE}/30", "dev", f"{name}a")
        ip("link", "set", f"{name}a", "up")
        ip("-n", name, "address", "add", f"{THERE}/30", "dev", name)
        ip("-n", name, "link", "set", name, "up")
        yield name
    finally:
        ip("netns", "del", name)


async def how_long(call: Any) -> tuple[type[BaseException] | None, float]:
    began_s = time.monotonic()
    try:
        await call
    except Exception as error:
        return type(error), time.monotonic() - began_s
    return None, time.monotonic() - began_s


async def test_a_host_that_is_cut_off_is_noticed_and_an_engine_that_stands_still_is_not(
    host: str,
) -> None:
    upstream = Upstream()
    with (
        engine(THERE, "ip", "netns", "exec", host) as (far, _),
        engine("127.0.0.1") as (near, stopped),
    ):
        stream = await upstream.request("GET", far, "/stream")
        assert await stream.next_piece() == b"x"
        waiting = asyncio.create_task(upstream.request("POST", far, "/silent"))
        still = await upstream.request("GET", near, "/stream")
        assert await still.next_piece() == b"x"
        # Megabytes to an engine that does not read, as of one that is busy with a long prompt.
        unread = asyncio.create_task(upstream.request("POST", near, "/silent", b"x" * 20_000_000))
        async with await upstream.request("GET", far, "/now") as kept:
            assert await kept.read() == b"ok"
        await asyncio.sleep(0.2)
        stopped.send_signal(signal.SIGSTOP)
        ip("-n", host, "link", "set", host, "down")
        found = await asyncio.wait_for(
            asyncio.gather(
                how_long(stream.next_piece()),
                how_long(waiting),
                how_long(upstream.request("GET", far, "/now")),  # on the connection that was kept
            ),
            30,
        )
        # It is looked once a second, on a machine that may be busy.
        assert [error for error, _ in found] == [UpstreamLost] * 3
        assert max(took_s for _, took_s in found) < CUT_NOTICED_WITHIN_S + 2
        assert (await how_long(upstream.request("GET", far, "/now")))[0] is NotReached
        standing = asyncio.create_task(still.next_piece())
        await asyncio.sleep(2)
        assert not unread.done()
        assert not standing.done()
        unread.cancel()
        standing.cancel()
        still.close()
        await upstream.close()
