"""Helpers for tests that start and kill real processes: what is left of them, and where."""

import asyncio
import contextlib
import os
import shlex
import shutil
import signal
import socket
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from cluster.identity import Role, WorkerId
from cluster.models.store import resolve
from cluster.settings import OWNER_ENV
from cluster.topology.schema import HealthSpec, IslandSpec, ModelSpec, PoolSpec
from cluster.workers import tree
from cluster.workers.spec import WorkerSpec
from cluster.workers.worker import EngineWorker

SIMULATED = ModelSpec(id="simulated")

NASTY = Path(__file__).parent / "nasty_tree.py"
ROOT = Path(__file__).parents[3]
# The promise: after any death, nothing of ours is left for longer than this.
GONE_WITHIN_S = 5.0


class Remains:
    """What a tree under one owner mark may leave behind: processes, segments, a port."""

    def __init__(self):
        self.name = f"pdcluster-test-{uuid.uuid4().hex[:10]}"
        self.owner = f"{self.name}/decode/0#1:0"
        self.port = None

    @property
    def processes(self):
        return [process.pid for process in tree.marked(self.name + "/")]

    @property
    def segments(self):
        return sorted(name for name in os.listdir("/dev/shm") if self.name in name)

    @property
    def listens(self):
        if self.port is None:
            return False
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    def assert_gone(self, within_s=GONE_WITHIN_S):
        until(lambda: not (self.processes or self.segments or self.listens), within_s, self)

    def __repr__(self):
        lines = []
        for pid in self.processes:
            with contextlib.suppress(OSError):
                lines.append(Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" "))
        return f"left: {lines} {self.segments} listens={self.listens}"


def until(holds, within_s=20.0, what="it"):
    deadline_s = time.monotonic() + within_s
    while not holds():
        assert time.monotonic() < deadline_s, f"not within {within_s} s: {what!r}"
        time.sleep(0.05)


@pytest.fixture
def remains():
    """A fresh owner mark; whatever bears it is ended after the test, passed or not."""
    left = Remains()
    yield left
    for process in tree.marked(left.name + "/"):
        tree.send(process, signal.SIGKILL)
    for name in left.segments:
        os.unlink(f"/dev/shm/{name}")


@pytest.fixture
def environment(remains):
    return {**os.environ, OWNER_ENV: remains.owner, "PYTHONPATH": str(ROOT)}


@pytest.fixture
def nasty(remains):
    """The command line of a tree that does everything to be left behind."""
    return [sys.executable, str(NASTY), remains.name]


@pytest.fixture
def eventually():
    return until


@pytest.fixture
def homes(tmp_path_factory, monkeypatch):
    """Our folders, away from the user's. Short: a Unix socket path has at most 107 bytes."""
    runtime = Path(tempfile.mkdtemp(prefix="pdw-", dir="/tmp"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(runtime))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path_factory.mktemp("state")))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
    yield runtime
    shutil.rmtree(runtime)


@pytest.fixture
def make_spec(homes, remains):
    """A worker of the simulated engine. Keyword arguments are keys of its pool, but for
    `hung_after_s`, `index`, `role`, `connector`, `lease_s`."""
    resolved = resolve(SIMULATED, lambda _what, _fraction: None)

    def make(*, hung_after_s=60.0, index=0, role="decode", connector="nixl", lease_s=30.0, **pool):
        name = role
        return WorkerSpec(
            cluster=remains.name,
            id=WorkerId(name, index, 1),
            role=Role(role),
            model=SIMULATED,
            model_path=resolved.path,
            model_digest=resolved.digest,
            max_model_len_tokens=4096,
            kv_bytes_per_token=1024,
            pool=PoolSpec(name=name, role=Role(role), engine="simulated", **pool),
            island=IslandSpec(name="cpu", pools=[name], connector=connector, lease_s=lease_s),
            health=HealthSpec(hung_after_s=hung_after_s),
            engine_key="worker-test-secret",
            host="127.0.0.1",
        )

    return make


@pytest.fixture
async def start(make_spec, remains):
    """Starts workers without Ray and stops them after the test; nothing may be left of them."""
    workers = []

    async def begin(**options):
        worker = EngineWorker(make_spec(**options), "127.0.0.1")
        workers.append(worker)
        await worker.start()
        return worker

    yield begin
    await asyncio.gather(*(worker.stop(0) for worker in workers))
    remains.assert_gone(within_s=1.0)


@pytest.fixture
def wrapped_interpreter(tmp_path, nasty):
    """A Python that first starts the nasty tree next to itself: an engine with bad children."""
    path = tmp_path / "python"
    command = " ".join(shlex.quote(word) for word in nasty)
    path.write_text(f'#!/bin/sh\n{command} &\nexec {shlex.quote(sys.executable)} "$@"\n')
    path.chmod(0o755)
    return str(path)
