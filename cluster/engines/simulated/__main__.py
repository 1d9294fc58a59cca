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
from pathlib import Path

import uvloop
import zmq
from aiohttp import web
from pydantic import ValidationError

from cluster.engines.simulated.config import KvConfig, SimulatedConfig
from cluster.engines.simulated.engine import Engine
from cluster.engines.simulated.model import Vocabulary
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
    engine = Engine(config, vocabulary)
    await engine.start()
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
    if config.kv is not None and config.kv.dialect == "mooncake":
        runners.append(await serve_bootstrap(config.kv, engine))
    port = runner.addresses[0][1]
    print(f"simulated engine {engine.engine_id} serves {config.host}:{port}", flush=True)
    await stop.wait()
    for each in runners:
        await each.cleanup()
    await engine.close()
    if release is not None:
        loop.remove_reader(release.fileno())
        release.close()


async def serve_bootstrap(kv: KvConfig, engine: Engine) -> web.AppRunner:
    """Mooncake's registry of one prefill engine: GET /query as vLLM's bootstrap server has it."""
    assert engine.side_channel is not None
    address = f"{kv.host}:{engine.side_channel.port}"
    ranks = {"0": {"engine_id": engine.engine_id, "worker_addr": {"0": {"0": address}}}}

    async def query(request: web.Request) -> web.Response:
        return web.json_response(ranks)

    app = web.Application()
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
                engine.grants.release(parts)

    asyncio.get_running_loop().add_reader(listening.fileno(), obey)
    return listening


if __name__ == "__main__":
    sys.exit(main())
