"""A controller's outside as the autoscaler sees it, made of plain figures: offered load goes in,
reports and totals come out. Prompts queue for prefill; latencies are what a test says they are.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from random import Random

from cluster.control.autoscaler import Autoscaler
from cluster.control.changes import Change, ChangeRole, ChangeState, Scale
from cluster.control.rollout import with_replicas
from cluster.control.state import ClusterStatus, DesiredState, FailedSlot
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Load
from cluster.topology.schema import ServingSpec
from cluster.traffic import BOUNDS_S, GatewayReport, PairTraffic, Spread
from cluster.workers.report import Counters, WorkerReport

SCALING = {
    "mode": "slo",
    "targets": [{"prefill": "prefill", "decode": "decode", "ttft_s": 2, "tpot_s": 0.05}],
    "interval_s": 5,
    "load_window_s": 30,
    "up_window_s": 10,
    "role_window_s": 20,
    "down_window_s": 60,
    "up_cooldown_s": 10,
    "down_cooldown_s": 30,
}


def desired(
    prefill: tuple[int, int, int] = (1, 1, 8),
    decode: tuple[int, int, int] = (1, 1, 8),
    engine: str = "vllm",
    roles: dict[str, Role] | None = None,
    **scaling: object,
) -> DesiredState:
    """`prefill`, `decode`: replicas now, least, most. Engines that need a new start for another
    role, unless `engine` is simulated."""

    def pool(role: str, replicas: tuple[int, int, int]) -> dict[str, object]:
        initial, least, most = replicas
        bounds = {"initial": initial, "min": least, "max": most}
        return {"name": role, "role": role, "engine": engine, "replicas": bounds}

    serving = ServingSpec.model_validate(
        {
            "model": {"id": "m"},
            "pools": [pool("prefill", prefill), pool("decode", decode)],
            "islands": [{"name": "one", "pools": ["prefill", "decode"]}],
            "gateway": {"host": "127.0.0.1", "port": 8000},
            "scaling": {**SCALING, **scaling},
        }
    )
    return DesiredState(
        cluster="c",
        serving=serving,
        model_path="/m",
        model_digest="d",
        max_model_len_tokens=8192,
        kv_bytes_per_token=1024,
        roles=roles or {},
    )


def report(
    worker: WorkerId,
    role: Role | None = None,
    state: WorkerState = WorkerState.READY,
    load: Load = Load(),  # noqa: B008
    counters: Counters = Counters(),  # noqa: B008
) -> WorkerReport:
    if role is None:
        role = Role(worker.pool) if worker.pool in set(Role) else Role.MIXED
    url = "http://127.0.0.1:1"
    return WorkerReport(
        worker, role, state, "", "127.0.0.1", url, 0.0, load=load, counters=counters
    )


def spread(count: int, duration_s: float) -> Spread:
    counts = [0] * (len(BOUNDS_S) + 1)
    counts[next(i for i, bound in enumerate(BOUNDS_S) if bound >= duration_s)] = count
    return Spread(tuple(counts), count * duration_s)


@dataclass
class Offered:
    """Requests per second, and what they are like."""

    per_s: float
    prompt_tokens: int = 2000
    answer_tokens: int = 10
    ttft_s: float = 0.4
    tpot_s: float = 0.02


@dataclass
class FakeClock:
    time_s: float = 1000.0

    def now_s(self) -> float:
        return self.time_s

    def wall_s(self) -> float:
        return 1_700_000_000.0 + self.time_s


@dataclass
class ScaledCluster:
    """autoscaler.Scalable. `second` lets time pass; workers that are asked for take `start_s`."""

    wanted: DesiredState
    offered: Offered
    prefill_tokens_per_s: float = 10_000.0
    step_s: float = 0.02
    start_s: float = 20.0
    clock: FakeClock = field(default_factory=FakeClock)
    asked: list[tuple[object, str, str]] = field(default_factory=list)
    events: list[object] = field(default_factory=list)
    log: list[Change] = field(default_factory=list)
    failed: list[FailedSlot] = field(default_factory=list)
    refuses: str = ""
    ends_as: ChangeState = ChangeState.DONE  # what is asked for; failed: nothing changes
    is_silent: bool = False  # gateways are not heard of

    def __post_init__(self) -> None:
        self._rng = Random(7)
        self._since: dict[WorkerId, float] = {}
        self._totals: dict[WorkerId, Counters] = {}
        self._load: dict[WorkerId, Load] = {}
        self._traffic = PairTraffic("prefill", "decode")
        self._owed = 0.0
        self._queued_tokens = 0
        self._place(-1e9)
        self.autoscaler = Autoscaler(self, self.clock, self.events.append)

    async def desired(self) -> DesiredState | None:
        return self.wanted

    async def status(self) -> ClusterStatus:
        workers = tuple(
            report(
                worker,
                self.wanted.role_of(worker),
                WorkerState.READY if self._is_ready(worker) else WorkerState.LOADING,
                self._load.get(worker, Load()),
                self._totals.get(worker, Counters()),
            )
            for worker in sorted(self._since)
        )
        return ClusterStatus("c", "m", 1, 0.0, (), workers, tuple(self.failed), (), ())

    async def gateways(self) -> tuple[GatewayReport, ...]:
        if self.is_silent:
            return ()
        return (GatewayReport("g1", self.clock.wall_s(), 1, 0, 0, pairs=(self._traffic,)),)

    async def changes(self) -> tuple[Change, ...]:
        return tuple(self.log)

    async def ask(self, ask: object, asked_by: str, why: str = "") -> Change:
        if self.refuses:
            raise InvalidInput(self.refuses)
        self.asked.append((ask, asked_by, why))
        if self.ends_as is ChangeState.FAILED:
            pass
        elif isinstance(ask, Scale):
            serving = with_replicas(self.wanted.serving, {ask.pool: ask.replicas})
            self.wanted = self.wanted.model_copy(update={"serving": serving})
        elif isinstance(ask, ChangeRole):
            roles = {**self.wanted.roles, ask.worker: ask.role}
            self.wanted = self.wanted.model_copy(update={"roles": roles})
        self._place(self.clock.time_s)
        change = Change(len(self.log) + 1, "scale", str(ask), asked_by, self.clock.wall_s())
        self.log.append(replace(change, state=self.ends_as, ended_at_s=self.clock.wall_s()))
        return change

    def lose(self, worker: str) -> None:
        """Its place fails from now on."""
        self.failed.append(FailedSlot(worker, 3, 8.0, "exit code 1"))
        self._since = {w: since_s for w, since_s in self._since.items() if w.name != worker}

    def serving(self, role: Role) -> int:
        return sum(self.wanted.role_of(worker) is role for worker in self._since)

    async def second(self, count: int = 1) -> None:
        for _ in range(count):
            self.clock.time_s += 1.0
            self._work()
            await self.autoscaler.step()

    def _place(self, since_s: float) -> None:
        for pool in self.wanted.serving.pools:
            for index in range(64):
                worker = WorkerId(pool.name, index, 1)
                if worker.name in {slot.worker for slot in self.failed}:
                    continue
                if index < pool.replicas.initial:
                    self._since.setdefault(worker, since_s)
                else:
                    self._since.pop(worker, None)

    def _is_ready(self, worker: WorkerId) -> bool:
        return self.clock.time_s - self._since[worker] >= self.start_s

    def _work(self) -> None:
        """A second of the offered load, shared by those that are ready."""
        offered = self.offered
        self._owed += offered.per_s
        count = math.floor(self._owed)
        self._owed -= count
        self._queued_tokens += count * offered.prompt_tokens
        prefill, decode = self._ready(Role.PREFILL), self._ready(Role.DECODE)
        done = min(self._queued_tokens, int(len(prefill) * self.prefill_tokens_per_s))
        self._queued_tokens -= done
        waiting = self._queued_tokens // offered.prompt_tokens // max(1, len(prefill))
        for worker in prefill:
            tokens = done // len(prefill)
            is_busy = self._rng.random() < tokens / self.prefill_tokens_per_s
            self._load[worker] = Load(int(is_busy), waiting)
            self._add(worker, prompt_tokens=tokens)
        finished = done // offered.prompt_tokens
        for worker in decode:
            tokens = finished * offered.answer_tokens // len(decode)
            batch = int(tokens * self.step_s + self._rng.random())  # Little's law
            self._load[worker] = Load(batch, kv_usage=min(1.0, batch / 100))
            self._add(worker, generation_tokens=tokens)
        was = self._traffic
        self._traffic = replace(
            was,
            arrived=was.arrived + count,
            finished=was.finished + finished,
            prompt_tokens=was.prompt_tokens + finished * offered.prompt_tokens,
            answer_tokens=was.answer_tokens + finished * offered.answer_tokens,
            ttft_s=_plus(was.ttft_s, spread(finished, offered.ttft_s)),
            tpot_s=_plus(was.tpot_s, spread(finished, offered.tpot_s)),
        )

    def _ready(self, role: Role) -> list[WorkerId]:
        return [
            worker
            for worker in sorted(self._since)
            if self.wanted.role_of(worker) is role and self._is_ready(worker)
        ]

    def _add(self, worker: WorkerId, prompt_tokens: int = 0, generation_tokens: int = 0) -> None:
        was = self._totals.get(worker, Counters())
        self._totals[worker] = replace(
            was,
            prompt_tokens=was.prompt_tokens + prompt_tokens,
            generation_tokens=was.generation_tokens + generation_tokens,
        )


def _plus(one: Spread, other: Spread) -> Spread:
    if not one.counts:
        return other
    counts = tuple(a + b for a, b in zip(one.counts, other.counts, strict=True))
    return Spread(counts, one.sum_s + other.sum_s)
