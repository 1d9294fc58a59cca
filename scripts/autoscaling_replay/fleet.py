"""Replicas of the simulated engine, who routes to them, and how they come, go and change roles.

A replica is `cluster.engines.simulated.engine.Engine`, the very code that a simulated pool runs,
without its HTTP server: admission, KV blocks, serial prefill, steps that grow with the batch,
drafts. What is not the engine's own: the transfer of KV is replaced by reading the prompt at the
links' speed, and routing takes the replica with the fewest requests in hand.
"""

from __future__ import annotations

import asyncio
from array import array
from collections.abc import Coroutine
from dataclasses import dataclass, field
from random import Random
from typing import Any

from autoscaling_replay.trace import Arrival
from cluster.engines.simulated.config import SimulatedConfig
from cluster.engines.simulated.engine import Engine
from cluster.engines.simulated.model import Vocabulary
from cluster.engines.simulated.request import Request
from cluster.identity import Role, WorkerId

PREFILL_TOKENS_PER_S = 6000.0
TRANSFER_TOKENS_PER_S = 400_000.0
STEP_S, STEP_PER_SEQUENCE_S = 0.09, 0.003
DRAFTS, ACCEPTED_PER_DRAFT = 5, 2.2
MAX_BATCH = 64
KV_TOKENS = 160_000
START_S = 60.0
ROLE_S = 1.0  # on top of finishing what it has


def _engine(role: Role, vocabulary: Vocabulary) -> Engine:
    is_prefill = role is Role.PREFILL
    timings = {
        "prefill_tokens_per_s": PREFILL_TOKENS_PER_S if is_prefill else TRANSFER_TOKENS_PER_S,
        # The pass over the prompt makes the first token as well.
        "decode_step_s": 0.0 if is_prefill else STEP_S,
        "decode_step_per_sequence_s": 0.0 if is_prefill else STEP_PER_SEQUENCE_S,
        "kv_capacity_tokens": KV_TOKENS,
        "accepted_per_draft": ACCEPTED_PER_DRAFT,
    }
    config = {
        "port": 0,
        "served_model_name": "simulated",
        "model_path": "simulated",
        "block_size_tokens": 64,
        "max_num_seqs": MAX_BATCH,
        "num_speculative_tokens": 0 if is_prefill else DRAFTS,
        "timings": timings,
    }
    return Engine(SimulatedConfig.model_validate(config), vocabulary)


@dataclass(eq=False)
class Replica:
    """One worker. It has an engine per role, of which one is in use."""

    id: WorkerId
    serves: Role
    engines: dict[Role, Engine]
    started_at_s: float
    is_ready: bool = False
    is_leaving: bool = False
    in_hand: int = 0
    busy_s: dict[Role, float] = field(default_factory=lambda: dict.fromkeys(Role, 0.0))
    busy_since_s: float | None = None  # there is something in hand
    steps: int = 0
    step_s: float = 0.0  # sum over those steps
    batch: float = 0.0  # sum over those steps
    idle: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self.idle.set()

    @property
    def engine(self) -> Engine:
        return self.engines[self.serves]

    @property
    def takes_work(self) -> bool:
        return self.is_ready and not self.is_leaving

    def begin(self, now_s: float) -> None:
        self.in_hand += 1
        self.idle.clear()
        if self.busy_since_s is None:
            self.busy_since_s = now_s

    def end(self, role: Role, now_s: float) -> None:
        """Before it changes its role a replica ends all it has, so its time is of one role."""
        self.in_hand -= 1
        if not self.in_hand and self.busy_since_s is not None:
            self.busy_s[role] += now_s - self.busy_since_s
            self.busy_since_s = None
            self.idle.set()

    def busy_until(self, role: Role, now_s: float) -> float:
        """Seconds with anything in hand, in that role."""
        since_s = self.busy_since_s if role is self.serves and self.is_ready else None
        return self.busy_s[role] + (0.0 if since_s is None else now_s - since_s)


@dataclass(slots=True)
class Served:
    """One request, from the client's side."""

    arrival: Arrival
    prefilled_s: float = 0.0
    first_s: float = 0.0
    last_s: float = 0.0

    @property
    def ttft_s(self) -> float:
        return self.first_s - self.arrival.at_s

    @property
    def tpot_s(self) -> float:
        return (self.last_s - self.first_s) / (self.arrival.answer_tokens - 1)


class Fleet:
    """All replicas. Scalers call start, stop and change_role; they take effect by themselves."""

    def __init__(self, vocabulary: Vocabulary, seed: int) -> None:
        self._vocabulary = vocabulary
        self._rng = Random(f"{seed} prompts")
        self._loop = asyncio.get_running_loop()
        self._changes: set[asyncio.Task[None]] = set()
        self._numbers = dict.fromkeys(Role, 0)
        self._room = asyncio.Condition()
        self.replicas: list[Replica] = []
        self.waiting = dict.fromkeys(Role, 0)  # no replica of the role is ready
        self.ended_worker_s = 0.0

    def of(self, role: Role) -> list[Replica]:
        """Those that serve, and those on their way."""
        return [r for r in self.replicas if r.serves is role and not r.is_leaving]

    def worker_s(self, now_s: float) -> float:
        """What has been paid for: from start to end, loading and draining included."""
        return self.ended_worker_s + sum(now_s - r.started_at_s for r in self.replicas)

    def start(self, role: Role, count: int, load_s: float = START_S) -> None:
        for _ in range(count):
            index = self._numbers[role]
            self._numbers[role] += 1
            engines = {r: _engine(r, self._vocabulary) for r in (Role.PREFILL, Role.DECODE)}
            replica = Replica(WorkerId(role.value, index, 1), role, engines, self._loop.time())
            self.replicas.append(replica)
            self._change(self._load(replica, load_s))

    def stop(self, role: Role, count: int) -> None:
        """Those on their way first, then the ones with the least in hand."""
        own = [r for r in self.of(role) if r.id.pool == role.value]
        own.sort(key=lambda r: (r.is_ready, r.in_hand, -r.id.index))
        for replica in own[:count]:
            replica.is_leaving = True
            self._change(self._end(replica))

    def change_role(self, worker: WorkerId, role: Role) -> None:
        replica = next(r for r in self.replicas if r.id == worker)
        replica.is_ready = False
        old, replica.serves = replica.serves, role
        self._change(self._turn(replica, old))

    async def serve(self, arrival: Arrival) -> Served:
        served = Served(arrival)
        prompt = array("I")
        prompt.frombytes(self._rng.randbytes(4 * arrival.prompt_tokens))
        await self._run(Role.PREFILL, Request("", prompt, 1, ignore_eos=True), served)
        served.prefilled_s = self._loop.time()
        answer = Request("", prompt, arrival.answer_tokens, arrival.answer_tokens, ignore_eos=True)
        await self._run(Role.DECODE, answer, served)
        return served

    async def _run(self, role: Role, request: Request, served: Served) -> None:
        replica = await self._choose(role)
        engine, loop = replica.engine, self._loop
        replica.begin(loop.time())
        try:
            last_s = 0.0
            async for _ in engine.generate(request):
                now_s = loop.time()
                if last_s:
                    replica.steps += 1
                    replica.step_s += now_s - last_s
                    replica.batch += engine.metrics.running
                else:
                    served.first_s = now_s
                last_s = now_s
            served.last_s = last_s
        finally:
            replica.end(role, loop.time())

    async def _choose(self, role: Role) -> Replica:
        while not (ready := [r for r in self.replicas if r.serves is role and r.takes_work]):
            self.waiting[role] += 1
            async with self._room:
                await self._room.wait()
            self.waiting[role] -= 1
        return min(ready, key=lambda r: r.in_hand)

    def _change(self, change: Coroutine[Any, Any, None]) -> None:
        task = self._loop.create_task(change)
        self._changes.add(task)
        task.add_done_callback(self._changes.discard)

    async def _load(self, replica: Replica, load_s: float) -> None:
        await asyncio.sleep(load_s)
        await self._ready(replica)

    async def _turn(self, replica: Replica, old: Role) -> None:
        await replica.idle.wait()
        await asyncio.sleep(ROLE_S)
        await self._ready(replica)

    async def _ready(self, replica: Replica) -> None:
        replica.is_ready = True
        async with self._room:
            self._room.notify_all()

    async def _end(self, replica: Replica) -> None:
        await replica.idle.wait()
        self.replicas.remove(replica)
        self.ended_worker_s += self._loop.time() - replica.started_at_s
