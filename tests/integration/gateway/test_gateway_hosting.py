"""The gateway inside Ray: plain actors that share a port, and Ray Serve behind HAProxy."""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import openai
import psutil
import pytest
from gateway_ray_host import ANSWER, Order
from ports import free_port
from processes import cmdline

from cluster.gateway.auth import hash_key
from cluster.gateway.config import GatewayConfig
from cluster.identity import Role
from cluster.snapshot import Link, Snapshot

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(180)]

ROOT = Path(__file__).parents[3]
TO_THE_END = {"ignore_eos": True}
MESSAGES = [{"role": "user", "content": "Hello there, how are you today?"}]


class Host:
    """The other process. Blocking calls: Ray takes its time."""

    def __init__(self, process: subprocess.Popen[bytes], port: int) -> None:
        self._process = process
        self.url = f"http://127.0.0.1:{port}"
        self.openai = openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="sk-test")

    def hear(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            text = line.decode().strip()
            if text.startswith(ANSWER):
                return text.removeprefix(ANSWER)
        raise AssertionError("the other process ended")

    def say(self, line: str) -> str:
        assert self._process.stdin is not None
        self._process.stdin.write(f"{line}\n".encode())
        self._process.stdin.flush()
        return self.hear()

    def replicas(self) -> list[psutil.Process]:
        children = psutil.Process(self._process.pid).children(recursive=True)
        return [child for child in children if "GatewayReplica" in cmdline(child)]


@contextlib.contextmanager
def hosting(order: Order, **environment: str) -> Iterator[Host]:
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "tests" / "gateway_ray_host.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment},
    )
    try:
        assert process.stdin is not None
        process.stdin.write(pickle.dumps(order))
        process.stdin.flush()
        yield Host(process, order.config.port)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            raise


@pytest.fixture
def decode(start_engine):
    return start_engine(Role.DECODE, decode_step_s=0.02)


@pytest.fixture
def order(start_engine, decode, tools, model_path) -> Iterator[Order]:
    prefill = start_engine(Role.PREFILL)
    config = GatewayConfig(
        cluster="hosted",
        model="simulated",
        model_path=model_path,
        port=free_port(),
        key_hashes=(hash_key("sk-test"),),
        engine_key="engine-key",
    )
    snapshot = Snapshot(
        version=1,
        cluster="hosted",
        model="simulated",
        workers=(tools.view(prefill), tools.view(decode)),
        links=(Link("prefill", "decode", "nixl", 20.0, "recompute"),),
    )
    # Ray's sockets need a short path.
    with tempfile.TemporaryDirectory(prefix="gw", dir="/tmp") as ray_dir:
        yield Order(config, snapshot, 2, "direct", ray_dir)


async def chat_until_it_works(host: Host, within_s: float = 20.0):
    async with asyncio.timeout(within_s):
        while True:
            with contextlib.suppress(openai.APIError):
                return await host.openai.chat.completions.with_raw_response.create(
                    model="simulated", messages=MESSAGES, max_tokens=5, extra_body=TO_THE_END
                )
            await asyncio.sleep(0.1)


async def test_direct_replicas_share_a_port_survive_a_kill_and_finish_streams(order, tools):
    with hosting(order) as host:
        assert host.hear() == "up"
        raw = await chat_until_it_works(host)
        assert raw.headers["x-pdcluster-route"] == "disaggregated"

        assert host.say("start") == "up"
        before = host.replicas()
        assert len(before) == 2

        before[0].send_signal(signal.SIGKILL)
        assert (await chat_until_it_works(host)).parse().usage.completion_tokens == 5

        async def are_two_again() -> bool:
            return len(host.replicas()) == 2

        await tools.eventually(are_two_again, 30.0)
        await chat_until_it_works(host)

        async def is_all_told() -> bool:
            """By each replica under its own id; the killed one may have told of itself, too."""
            versions, counts = host.say("told").split("; ")
            return versions in ("[1, 1]", "[1, 1, 1]") and counts != "[]"

        await tools.eventually(is_all_told, 10.0)
        stream = await host.openai.chat.completions.create(
            model="simulated", messages=MESSAGES, max_tokens=50, stream=True, extra_body=TO_THE_END
        )
        chunks = [await anext(stream)]
        stopping = asyncio.create_task(asyncio.to_thread(host.say, "stop"))
        chunks += [chunk async for chunk in stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        assert await stopping == "stopped"

        async def are_gone() -> bool:
            """Ray says that it ends a process before that has ended."""
            return host.replicas() == []

        await tools.eventually(are_gone, 10.0)
        with pytest.raises(openai.APIConnectionError):
            await host.openai.models.list()


async def test_direct_refuses_a_port_that_somebody_else_holds(order):
    with socket.socket() as foreign:
        # As hard as it gets: the holder would share the port.
        foreign.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        foreign.bind(("127.0.0.1", order.config.port))
        foreign.listen()
        with hosting(order) as host:
            answer = host.hear()
            assert answer.startswith("InvalidInput: gateway.port: 127.0.0.1:")
            assert str(order.config.port) in answer
            assert f"({os.getpid()})" in answer
            assert host.replicas() == []


async def test_serve_streams_and_passes_disconnects_on(order, decode, tools):
    order.ingress = "serve"
    environment = {
        # The defaults are fixed, and one machine may run several tests.
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{order.ray_dir}/ha/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{order.ray_dir}/ha/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{order.ray_dir}/ha",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{order.ray_dir}/ha/server-state",
    }
    with hosting(order, **environment) as host:
        assert host.hear() == "up"
        raw = await chat_until_it_works(host, 60.0)
        assert raw.headers["x-pdcluster-route"] == "disaggregated"

        stream = await host.openai.chat.completions.create(
            model="simulated", messages=MESSAGES, max_tokens=50, stream=True, extra_body=TO_THE_END
        )
        gaps = 0
        async for _ in stream:
            gaps += 1
        assert gaps > 20  # not one lump at the end

        headers = {"Authorization": "Bearer sk-test"}
        request = {"messages": MESSAGES, "max_tokens": 3000, "stream": True, **TO_THE_END}
        url = f"{host.url}/v1/chat/completions"
        async with (
            aiohttp.ClientSession(headers=headers) as session,
            session.post(url, json=request) as response,
        ):
            await response.content.readuntil(b"\n\n")
            assert await decode.running() == 1
            response.close()

        async def is_free() -> bool:
            return await decode.running() == 0

        await tools.eventually(is_free, 10.0)
        assert host.say("stop") == "stopped"
