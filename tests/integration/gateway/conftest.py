"""Real simulated engines in processes of their own, and the real gateway app under uvicorn in the
test's event loop, fed by a snapshot given by hand."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import aiohttp
import openai
import pytest
import uvicorn
from engine_forks import Forked, forks
from ports import free_port

from cluster.engines.simulated.config import (
    EventsConfig,
    KvConfig,
    KvRole,
    SimulatedConfig,
    meets_in_rooms,
)
from cluster.engines.simulated.handover import FAKE_BOOTSTRAP_HOST
from cluster.gateway.app import create_app
from cluster.gateway.auth import hash_key
from cluster.gateway.config import GatewayConfig
from cluster.gateway.parts import Parts
from cluster.gateway.source import StaticSource
from cluster.identity import Role, WorkerId, WorkerState
from cluster.models import store
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView
from cluster.topology.schema import LimitsSpec, ModelSpec, SimulatedSpec

MODEL = "simulated"
KEY = "sk-test"
ENGINE_KEY = "engine-key"
CONTEXT_TOKENS = 4096
BLOCK_TOKENS = 16

_ONE_ROLE_EACH: dict[Role, KvRole] = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}
_BOTH: dict[Role, KvRole] = dict.fromkeys(Role, "kv_both")
_KV_ROLES = {"nixl": _BOTH, "mooncake": _BOTH}
# One of each flow: SGLang's backends differ in who moves the bytes, not in what is said.
FLOWS = ["nixl", "mooncake", "ascend_mooncake", "ascend_layerwise", "sglang_mooncake"]


@dataclass
class Engine:
    """One simulated engine process."""

    role: Role
    url: str
    process: Forked
    kv: dict[str, str | int]
    log: Path
    alone: dict[str, str | int] = field(default_factory=dict)  # fields without which it refuses

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    async def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
        """POST `body`, or GET without one."""
        headers = {"Authorization": f"Bearer {ENGINE_KEY}"}
        async with aiohttp.ClientSession(self.url, headers=headers) as session:
            sent = {**self.alone, **(body or {})} if path.startswith("/v1/") else body
            call = session.get(path) if body is None else session.post(path, json=sent)
            async with call as response:
                if response.content_type == "application/json":
                    return await response.json()
                return await response.text()

    async def fault(self, **faults: Any) -> None:
        await self.ask("/simulate/fault", faults)

    async def metric(self, name: str, having: str = "") -> float:
        """Sum of the series of `name` whose labels contain `having`."""
        total = 0.0
        for line in str(await self.ask("/metrics")).splitlines():
            if line.startswith(name) and line[len(name)] in "{ " and having in line:
                total += float(line.rpartition(" ")[2])
        return total

    async def running(self) -> float:
        return await self.metric("vllm:num_requests_running") + await self.metric(
            "vllm:num_requests_waiting"
        )

    async def pulled_tokens(self) -> float:
        return await self.metric(
            "vllm:prompt_tokens_by_source_total", having='source="external_kv_transfer"'
        )


@dataclass
class Gateway:
    """A gateway replica in this process."""

    url: str
    source: StaticSource
    snapshot: Snapshot
    openai: openai.AsyncOpenAI
    session: aiohttp.ClientSession
    released: list[str]  # ids of requests whose blocks prefill was told to let go of
    parts: Parts

    def publish(self, *workers: WorkerView) -> None:
        """Replace what the gateway knows of the cluster."""
        self.snapshot = replace(self.snapshot, version=self.snapshot.version + 1, workers=workers)
        self.source.publish(self.snapshot)

    @property
    def is_idle(self) -> bool:
        """Whether nothing is kept of any request."""
        coordinator = self.parts.coordinator
        held = (coordinator.open_transfers, coordinator.open_leases())
        return held == (0, 0) and self.parts.metaserver.waiting == 0 and not open_calls()

    async def post(
        self, path: str, body: Any, key: str | None = KEY, **headers: str
    ) -> tuple[int, dict[str, str], Any]:
        """Status, headers and JSON of an answer. `body` may be bytes."""
        if key is not None:
            headers["Authorization"] = f"Bearer {key}"
        sent = {"data": body} if isinstance(body, bytes) else {"json": body}
        async with self.session.post(path, headers=headers, **sent) as response:
            answered = {name.lower(): value for name, value in response.headers.items()}
            return response.status, answered, await response.json()

    async def metric(self, name: str, having: str = "") -> float:
        total = 0.0
        async with self.session.get("/metrics") as response:
            for line in (await response.text()).splitlines():
                if line.startswith(name) and line[len(name)] in "{ " and having in line:
                    total += float(line.rpartition(" ")[2])
        return total


def open_calls() -> list[str]:
    """Tasks of the gateway's that still call an engine."""
    names = [task.get_name() for task in asyncio.all_tasks()]
    return [name for name in names if name.startswith(("prefill ", "decode ", "stage "))]


StartEngine = Callable[..., Engine]
StartGateway = Callable[..., contextlib.AbstractAsyncContextManager[Gateway]]


@pytest.fixture(scope="session")
def model_path() -> str:
    return store.resolve(ModelSpec(id="simulated"), lambda what, fraction: None).path


@contextlib.contextmanager
def engines_in(folder: Path, model_path: str) -> Iterator[StartEngine]:
    """A function that starts engines; all of them end with the block."""
    started: list[Engine] = []

    def start(
        role: Role = Role.DECODE,
        dialect: str = "nixl",
        events: bool = False,
        block_size_tokens: int = BLOCK_TOKENS,
        max_model_len_tokens: int = CONTEXT_TOKENS,
        lease_s: float = 20.0,
        **timings: float,
    ) -> Engine:
        is_found = dialect == "mooncake" or meets_in_rooms(dialect)
        bootstrap_port = free_port() if is_found and role is Role.PREFILL else 0
        events_port = free_port() if events else 0
        config = SimulatedConfig(
            port=0,
            served_model_name=MODEL,
            model_path=model_path,
            max_model_len_tokens=max_model_len_tokens,
            block_size_tokens=block_size_tokens,
            timings=SimulatedSpec(
                **{"prefill_tokens_per_s": 500_000.0, "decode_step_s": 0.001, **timings}
            ),
            kv=KvConfig(
                dialect=dialect,
                role=_KV_ROLES.get(dialect, _ONE_ROLE_EACH)[role],
                port=0,
                bootstrap_port=bootstrap_port,
                lease_s=lease_s,
            ),
            events=EventsConfig(endpoint=f"tcp://127.0.0.1:{events_port}") if events else None,
            fault_endpoint=True,
        )
        file = folder / f"engine-{len(started)}.json"
        file.write_text(config.model_dump_json())
        log = file.with_suffix(".log")
        process = forks().start(["--config", str(file)], log, {"VLLM_API_KEY": ENGINE_KEY})
        kv: dict[str, str | int] = {}
        if bootstrap_port:
            kv["bootstrap_addr"] = f"http://127.0.0.1:{bootstrap_port}"
            kv["bootstrap_port"] = bootstrap_port
        if events:
            kv["events"] = f"tcp://127.0.0.1:{events_port}"
        engine = Engine(role, "", process, kv, log)
        if meets_in_rooms(dialect):
            engine.alone = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
        started.append(engine)
        engine.url = f"http://{_address(engine)}"
        return engine

    try:
        yield start
    finally:
        for engine in started:
            engine.process.terminate()
        for engine in started:
            try:
                engine.process.wait(10)
            except subprocess.TimeoutExpired:
                engine.kill()


def _address(engine: Engine) -> str:
    deadline_s = time.monotonic() + 90
    while True:
        text = engine.log.read_text(errors="replace")
        if " serves " in text:
            return text.partition(" serves ")[2].split()[0]
        assert engine.process.poll() is None, text
        assert time.monotonic() < deadline_s, text
        time.sleep(0.02)


@pytest.fixture
def start_engine(tmp_path: Path, model_path: str) -> Iterator[StartEngine]:
    """Engines of one test alone: for those that break them."""
    with engines_in(tmp_path, model_path) as start:
        yield start


@pytest.fixture(scope="module")
def start_shared_engine(
    tmp_path_factory: pytest.TempPathFactory, model_path: str
) -> Iterator[StartEngine]:
    with engines_in(tmp_path_factory.mktemp("engines"), model_path) as start:
        yield start


def view(
    engine: Engine, index: int = 0, dialect: str = "nixl", state: WorkerState = WorkerState.READY
) -> WorkerView:
    """An engine as the controller would publish it."""
    return WorkerView(
        id=WorkerId(engine.role.value, index, 1),
        role=engine.role,
        island="test",
        state=state,
        url=engine.url,
        fingerprint=Fingerprint("m", "none", "auto", 16, dialect, "1", "simulated", "1", "0"),
        max_model_len_tokens=CONTEXT_TOKENS,
        kv_bytes_per_token=1024,
        kv=engine.kv,
    )


class _Releaser:
    """Leases run out by themselves; who asked for an early end is kept."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    async def release(self, worker: WorkerId, request_ids: list[str]) -> None:
        self.asked += request_ids


@pytest.fixture
def start_gateway(model_path: str) -> StartGateway:
    """`async with start_gateway(view(...), ...) as gateway`."""

    @contextlib.asynccontextmanager
    async def start(
        *workers: WorkerView,
        policy: str = "recompute",
        dialect: str = "nixl",
        limits: LimitsSpec | None = None,
        wait_ready: bool = True,
        **settings: Any,
    ) -> AsyncIterator[Gateway]:
        snapshot = Snapshot(
            version=1,
            cluster="test",
            model=MODEL,
            workers=workers,
            links=(Link("prefill", "decode", dialect, 20.0, policy),),
        )
        source = StaticSource(snapshot)
        releaser = _Releaser()
        config = GatewayConfig(
            cluster="test",
            model=MODEL,
            model_path=settings.pop("model_path", model_path),
            key_hashes=(hash_key(KEY),),
            engine_key=ENGINE_KEY,
            limits=limits or LimitsSpec(),
            **settings,
        )
        listener = socket.socket()
        listener.bind(("127.0.0.1", 0))
        app = create_app(config, source, releaser)
        server = uvicorn.Server(
            uvicorn.Config(
                app,
                lifespan="on",
                ws="none",
                access_log=False,
                log_level="warning",
                timeout_graceful_shutdown=2,
            )
        )
        server.capture_signals = contextlib.nullcontext  # pytest keeps its own
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        client = openai.AsyncOpenAI(base_url=f"{url}/v1", api_key=KEY, max_retries=0, timeout=60)
        async with aiohttp.ClientSession(url) as session:
            while not server.started:
                assert not serving.done()
                await asyncio.sleep(0.01)
            gateway = Gateway(url, source, snapshot, client, session, releaser.asked, app._parts)
            if wait_ready:
                await eventually_ready(gateway)
            try:
                yield gateway
            finally:
                await client.close()
                server.should_exit = True
                await serving

    return start


async def eventually_ready(gateway: Gateway) -> None:
    deadline_s = time.monotonic() + 60
    while True:
        async with gateway.session.get("/ready") as response:
            if response.status == 200:
                return
        assert time.monotonic() < deadline_s, "never ready"
        await asyncio.sleep(0.02)


async def eventually(question: Callable[[], Any], within_s: float = 60.0) -> None:
    """Wait until the (async) question is answered with true; fail if it never is."""
    deadline_s = time.monotonic() + within_s
    while not await question():
        assert time.monotonic() < deadline_s, "never became true"
        await asyncio.sleep(0.02)


@pytest.fixture(scope="session")
def tools() -> Any:
    """Functions that tests share: view, eventually."""
    return _Tools


class _Tools:
    view = staticmethod(view)
    eventually = staticmethod(eventually)


@dataclass
class PairOfEngines:
    """One prefill and one decode engine, and their dialect."""

    dialect: str
    prefill: Engine
    decode: Engine
    views: tuple[WorkerView, WorkerView] = field(init=False)

    def __post_init__(self) -> None:
        self.views = (
            view(self.prefill, dialect=self.dialect),
            view(self.decode, dialect=self.dialect),
        )


@pytest.fixture(scope="module", params=FLOWS)
def pair(request: pytest.FixtureRequest, start_shared_engine: StartEngine) -> PairOfEngines:
    dialect: str = request.param
    return PairOfEngines(
        dialect,
        start_shared_engine(Role.PREFILL, dialect),
        start_shared_engine(Role.DECODE, dialect),
    )
