"""A controller against fake workers, a fake store and a clock that is set by hand."""

from __future__ import annotations

import asyncio
import contextlib
from types import SimpleNamespace

from cluster.control.controller import Controller
from cluster.control.state import DesiredState
from cluster.control.store import Store
from cluster.errors import PeerGone
from cluster.identity import WorkerId, WorkerState
from cluster.snapshot import Fingerprint, Load
from cluster.topology.schema import ServingSpec
from cluster.workers.report import WorkerReport

PRINT = Fingerprint("m", "none", "float32", 16, "nixl", "1", "simulated", "1", "0")


class FakeClock:
    def __init__(self):
        self.time_s = 1000.0

    def now_s(self):
        return self.time_s

    def wall_s(self):
        return self.time_s + 1_700_000_000.0


class FakeEntries(dict):
    def put(self, key, value):
        self[key] = value

    def delete(self, key):
        self.pop(key, None)


class FakeHandle:
    """A worker that does what the test says."""

    def __init__(self, spec):
        self.spec = spec
        self.id = spec.id
        self.state = WorkerState.READY
        self.message = ""
        self.fingerprint = PRINT
        self.load = Load()
        self.is_dead = False
        self.is_mute = False
        self.records = []
        self.stopped_with_s = None
        self.last_words = ()
        self.node_id = "node-a"
        self.node_ip = "127.0.0.1"
        self.quiet = asyncio.Event()
        self.quiet.set()

    async def start(self): ...

    async def report(self):
        if self.is_mute:
            raise PeerGone(str(self.id), "no answer for 10 s")
        if self.is_dead:
            raise PeerGone(str(self.id), "the actor died")
        return WorkerReport(
            id=self.id,
            role=self.spec.role,
            state=self.state,
            message=self.message,
            node_ip=self.node_ip,
            url=f"http://127.0.0.1:{20000 + self.id.index}",
            started_at_s=0.0,
            fingerprint=self.fingerprint,
            load=self.load,
            last_words=self.last_words,
            revision=self.spec.revision,
            node_id=self.node_id,
        )

    async def read_log(self, offset, limit_bytes, rank=0):
        return b"the log of " + str(self.id).encode() + b":%d" % rank, 5

    async def transfers(self, after_seq):
        return list(enumerate(self.records))

    async def release(self, request_ids): ...

    async def quiesce(self, grace_s):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.quiet.wait(), grace_s)
        return self.quiet.is_set()

    async def stop(self, grace_s):
        self.stopped_with_s = grace_s
        self.state = WorkerState.STOPPED


class FakeWorkers:
    """What Ray holds: it outlives controllers."""

    def __init__(self):
        self.alive = {}
        self.spawned = []
        self.prints = {}
        self.ray_nodes = ()

    async def nodes(self):
        return self.ray_nodes

    async def spawn(self, spec):
        self.spawned.append(spec)
        handle = FakeHandle(spec)
        handle.fingerprint = self.prints.get(spec.id.pool, PRINT)
        self.alive[spec.id] = handle
        return handle

    async def find(self, cluster, worker):
        handle = self.alive.get(worker)
        if handle is not None and handle.is_dead:
            await self.remove(cluster, worker)
            return None
        return handle

    async def find_all(self, cluster):
        return sorted(self.alive)

    async def remove(self, cluster, worker):
        self.alive.pop(worker, None)

    def __getitem__(self, text):
        return self.alive[WorkerId.parse(text)]


def serving(prefill=1, decode=1, **more):
    return ServingSpec.model_validate(
        {
            "model": {"id": "simulated"},
            "pools": [
                {"name": "p", "role": "prefill", "engine": "simulated", "replicas": prefill},
                {"name": "d", "role": "decode", "engine": "simulated", "replicas": decode},
            ],
            "islands": [{"name": "i", "pools": ["p", "d"]}],
            "health": {"restart_backoff_s": 2.0, "hung_after_s": 30.0},
            **more,
        }
    )


def desired(**more):
    return DesiredState(
        cluster="c",
        serving=serving(**more),
        model_path="/models/simulated",
        model_digest="m",
        max_model_len_tokens=1024,
        kv_bytes_per_token=64,
        host="127.0.0.1",
    )


class World:
    def __init__(self):
        self.clock = FakeClock()
        self.workers = FakeWorkers()
        self.store = Store(FakeEntries())
        self.store.put_engine_key("the engines' key")
        self.controller = self.new_controller()

    def new_controller(self):
        return Controller("c", self.workers, self.store, self.clock)

    async def steps(self, count=1, each_s=0.5):
        for _ in range(count):
            self.clock.time_s += each_s
            await self.controller.step()
            # Spawns and removals are tasks of their own.
            for _ in range(5):
                await asyncio.sleep(0)

    async def events(self, kind):
        status = await self.controller.status()
        return [
            SimpleNamespace(subject=told.subject, **told.fields)
            for told in status.events
            if told.kind == kind.__name__
        ]

    async def snapshot(self):
        return await self.controller.next_snapshot(0, 1.0)
