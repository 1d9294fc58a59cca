"""Run a simulated engine: `python -m cluster.engines.simulated --config FILE`.

Loads for as long as it is told to, then listens. Ends on SIGTERM or SIGINT with 0; with 1 if it
cannot start, its reason as the last line on stderr.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import uvloop
import zmq
from aiohttp import web
from pydantic import ValidationError

from cluster.engines.simulated.config import KvConfig, SimulatedConfig, meets_in_rooms
from cluster.engines.simulated.core import keep_core
from cluster.engines.simulated.engine import Engine
from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.ranks import Assembly, follow
from cluster.engines.simulated.server import Server
from cluster.errors import ClusterError, InvalidInput
from cluster.transfers import RELEASE_SOCKET_ENV

KEY_ENV = "VLLM_API_KEY"
LARGEST_DATAGRAM_BYTES = 65_536
# Requests are cut off, not waited for. aiohttp reads 0 as for ever.
SHUTDOWN_S = 0.05


def main() -> int:
    parser = argparse.ArgumentParser(prog="cluster.engines.simulated")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--config", type=Path, metavar="FILE")
    source.add_argument("--config-json", metavar="JSON")
    arguments = parser.parse_args()
    try:
        text = arguments.config_json or arguments.config.read_text()
        config = SimulatedConfig.model_validate_json(text)
        uvloop.run(run(config))
    except (ClusterError, ValidationError, OSError, zmq.ZMQError) as error:
        print(error, file=sys.stderr, flush=True)
        return 1
    return 0


async def run(config: SimulatedConfig) -> None:
    """Serve until SIGTERM or SIGINT. Raises: InvalidInput, OSError, zmq.ZMQError."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    capacity = config.timings.kv_capacity_tokens
    if capacity < config.max_model_len_tokens:
        raise InvalidInput(
            f"kv_capacity_tokens: {capacity} is less than max_model_len_tokens "
            f"{config.max_model_len_tokens}; raise it or lower max_model_len_tokens"
        )
    vocabulary = Vocabulary(config.model_path)
    load_s = config.timings.load_s + config.faults.extra_load_s
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), load_s)
        return  # told to stop while loading
    if config.faults.start_failure is not None:
        raise InvalidInput(config.faults.start_failure)
    if config.ranks is not None and config.ranks.node_rank > 0:
        await _unless(stop, follow(config.ranks))
        return
    engine = Engine(config, vocabulary)
    await engine.start()
    assembly: Assembly | None = None
    if config.ranks is not None:
        assembly = Assembly(config.ranks, lambda rank: lose(engine, rank))
        if not await _unless(stop, assembly.start()):
            return
    release = bind_release_socket(engine)
    runner = web.AppRunner(
        Server(engine, os.environ.get(KEY_ENV, "")).app(),
        access_log=None,
        handler_cancellation=True,
        shutdown_timeout=SHUTDOWN_S,
    )
    await runner.setup()
    await web.TCPSite(runner, config.host, config.port, backlog=1024).start()
    runners = [runner]
    if config.kv is not None and config.kv.bootstrap_port:
        runners.append(await serve_bootstrap(config.kv, engine))
    port = runner.addresses[0][1]
    print(f"simulated engine {engine.engine_id} serves {config.host}:{port}", flush=True)
    core: asyncio.Task[None] | None = None
    if config.core_process:
        core = asyncio.create_task(keep_core(engine.faults, stop.set), name="core process")
    await stop.wait()
    if core is not None:
        core.cancel()
        await asyncio.gather(core, return_exceptions=True)
    for each in runners:
        await each.cleanup()
    if assembly is not None:
        await assembly.close()
    await engine.close()
    if release is not None:
        loop.remove_reader(release.fileno())
        release.close()


def lose(engine: Engine, rank: int) -> None:
    """What a replica is without one of its ranks: see `ranks`."""
    print(f"rank {rank} is lost", flush=True)
    engine.faults.change({"hang": True})


async def _unless(stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
    """Whether `work` was done before `stop`."""
    task, stopped = asyncio.create_task(work), asyncio.create_task(stop.wait())
    try:
        await asyncio.wait({task, stopped}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            await task
        return task.done()
    finally:
        task.cancel()
        stopped.cancel()


async def serve_bootstrap(kv: KvConfig, engine: Engine) -> web.AppRunner:
    """Where decode finds a prefill engine: GET /query as vLLM's Mooncake bootstrap server has it,
    GET /route as SGLang's."""
    side_channel = engine.handover.side_channel
    assert side_channel is not None
    address = f"{kv.host}:{side_channel.port}"
    ranks = {"0": {"engine_id": engine.engine_id, "worker_addr": {"0": {"0": address}}}}

    async def query(request: web.Request) -> web.Response:
        return web.json_response(ranks)

    async def route(request: web.Request) -> web.Response:
        return web.json_response({"rank_ip": kv.host, "rank_port": side_channel.port})

    app = web.Application()
    if meets_in_rooms(kv.dialect):
        app.router.add_get("/route", route)
    else:
        app.router.add_get("/query", query)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=SHUTDOWN_S)
    await runner.setup()
    await web.TCPSite(runner, kv.host, kv.bootstrap_port).start()
    return runner


def bind_release_socket(engine: Engine) -> socket.socket | None:
    """Obey release commands (cluster.transfers). None: nobody gave a path."""
    path = os.environ.get(RELEASE_SOCKET_ENV)
    if not path:
        return None
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    listening.setblocking(False)
    Path(path).unlink(missing_ok=True)
    listening.bind(path)

    def obey() -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                datagram = listening.recv(LARGEST_DATAGRAM_BYTES)
                try:
                    parts = [str(part) for part in json.loads(datagram)]
                except (ValueError, TypeError):
                    print(f"not a release command: {datagram[:80]!r}", flush=True)
                    continue
                engine.handover.grants.release(parts)

    asyncio.get_running_loop().add_reader(listening.fileno(), obey)
    return listening


if __name__ == "__main__":
    sys.exit(main())
