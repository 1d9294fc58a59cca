"""A prefill and a decode engine started through their adapter, as the contract suite needs them.

Whatever a worker would do for an engine is done here in the plainest way: ports, environment,
the two datagram sockets, a log file, an end.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from cluster.engines.base import LaunchContext, Probes
from cluster.engines.client import EngineClient, EngineSample
from cluster.engines.host import host_facts
from cluster.engines.registry import adapter as engine_adapter
from cluster.identity import Role, WorkerId
from cluster.topology.schema import IslandSpec, ModelSpec, PoolSpec
from cluster.transfers import RELEASE_SOCKET_ENV, SOCKET_ENV, TransferRecord, parse
from cluster.workers.ports import reserve

KEY = "contract-key"
HOST = "127.0.0.1"
ROOT = Path(__file__).parents[2]


@dataclass
class Engine:
    """One running engine."""

    role: Role
    url: str
    kv: dict[str, str | int]
    process: subprocess.Popen[bytes]
    log: Path
    records_socket: socket.socket
    release_path: Path
    adapter: Any
    probes: Probes
    records: list[TransferRecord] = field(default_factory=list)

    def recorded(self, request_id: str) -> list[str]:
        """Outcomes reported so far for requests whose id contains `request_id`."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.records.append(parse(self.records_socket.recv(65_536)))
        return [r.outcome for r in self.records if request_id in r.request_id]

    def release(self, *request_ids: str) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
            sender.sendto(json.dumps(request_ids).encode(), str(self.release_path))

    def last_words(self) -> str:
        return self.log.read_text(errors="replace")[-4000:]


@dataclass
class Pair:
    """Two engines of one island. `model` is the name clients use."""

    prefill: Engine
    decode: Engine
    connector: str
    model: str
    block_size_tokens: int
    max_model_len_tokens: int
    capacity_tokens: int


@contextlib.contextmanager
def running_pair(
    engine: str,
    connector: str,
    model: ModelSpec,
    model_path: str,
    folder: Path,
    pools: dict[Role, dict[str, Any]],
    ready_within_s: float,
    capacity_tokens: int,
) -> Iterator[Pair]:
    """Start both, wait until both generate, end both."""
    island = IslandSpec(name="contract", pools=["prefill", "decode"], connector=connector)
    with contextlib.ExitStack() as stack:
        engines = {}
        for role, more in pools.items():
            pool = PoolSpec(name=role.value, role=role, engine=engine, **more)
            engines[role] = stack.enter_context(
                running_engine(pool, island, model, model_path, folder)
            )
        for one in engines.values():
            asyncio.run(wait_ready(one, model.public_name, ready_within_s))
        sample = asyncio.run(sample_of(engines[Role.DECODE]))
        assert model.max_model_len_tokens is not None
        yield Pair(
            engines[Role.PREFILL],
            engines[Role.DECODE],
            connector,
            model.public_name,
            sample.block_size_tokens,
            model.max_model_len_tokens,
            capacity_tokens,
        )


@contextlib.contextmanager
def running_engine(
    pool: PoolSpec,
    island: IslandSpec,
    model: ModelSpec,
    model_path: str,
    folder: Path,
    generation: int = 1,
) -> Iterator[Engine]:
    """One engine, not waited for."""
    adapter = engine_adapter(pool.engine)
    with contextlib.ExitStack() as stack:
        lease = stack.enter_context(reserve(adapter.ports(pool, island), HOST, random.Random()))
        context = LaunchContext(
            worker=WorkerId(pool.name, 0, generation),
            role=pool.role,
            model=model,
            model_path=model_path,
            pool=pool,
            island=island,
            host=HOST,
            host_facts=host_facts(),
            ports=lease.ports,
            runtime_dir=str(folder),
            python=sys.executable,
            engine_key=KEY,
        )
        launch = adapter.launch(context)
        name = f"{pool.name}-{generation}"
        records_path, release_path = folder / f"{name}.rec", folder / f"{name}.rel"
        records = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
        records.bind(str(records_path))
        records.setblocking(False)
        environment = {
            **os.environ,
            **launch.env,
            **launch.secret_env,
            SOCKET_ENV: str(records_path),
            RELEASE_SOCKET_ENV: str(release_path),
            "PYTHONPATH": str(ROOT),
        }
        log = folder / f"{name}.log"
        with log.open("wb") as sink:
            process = subprocess.Popen(
                launch.argv, env=environment, stdout=sink, stderr=subprocess.STDOUT
            )
        try:
            yield Engine(
                pool.role,
                f"http://{HOST}:{lease.ports['http']}",
                dict(adapter.kv_address(context)),
                process,
                log,
                records,
                release_path,
                adapter,
                adapter.probes(context),
            )
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            records_path.unlink()


@contextlib.asynccontextmanager
async def session():
    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as opened:
        yield opened


async def wait_ready(engine: Engine, model: str, within_s: float) -> None:
    deadline_s = time.monotonic() + within_s
    async with session() as opened:
        client = EngineClient(engine.url, KEY, opened, engine.probes)
        while not await client.is_up():
            assert engine.process.poll() is None, engine.last_words()
            assert time.monotonic() < deadline_s, engine.last_words()
            await asyncio.sleep(0.05)
        await client.generate_one(model)


async def sample_of(engine: Engine) -> EngineSample:
    async with session() as opened:
        client = EngineClient(engine.url, KEY, opened, engine.probes)
        return await client.sample(engine.adapter.metrics)


async def eventually(question, within_s: float = 20.0) -> bool:
    """Ask until the answer is true; `question` may be plain or async."""
    deadline_s = time.monotonic() + within_s
    while True:
        answer = question()
        if asyncio.iscoroutine(answer):
            answer = await answer
        if answer or time.monotonic() > deadline_s:
            return bool(answer)
        await asyncio.sleep(0.05)


def moved(before: EngineSample, after: EngineSample) -> dict[str, int]:
    """What counters gained."""
    names = [f.name for f in dataclasses.fields(EngineSample)]
    return {
        name: getattr(after, name) - getattr(before, name)
        for name in names
        if isinstance(getattr(after, name), int)
    }
