"""A small cluster for the autoscaler's tests: fluid queues, a start delay, nothing random.

`World.tick` moves time by one interval, measures, asks `decide`, and carries out what it says.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from cluster.control.autoscale.decision import (
    Decision,
    PolicyState,
    ScaleDown,
    ScaleUp,
)
from cluster.control.autoscale.policy import decide
from cluster.control.autoscale.signals import (
    DecodeLoad,
    PairSignals,
    PoolSignals,
    PrefillLoad,
    Signals,
    WorkerSignals,
)
from cluster.identity import WorkerId
from cluster.topology.scaling import ScalingSpec, SloTargetSpec

POLICY = ScalingSpec(
    mode="slo",
    up_window_s=15.0,
    up_cooldown_s=30.0,
    targets=[SloTargetSpec(prefill="prefill", decode="decode", ttft_s=2.0, tpot_s=0.05)],
)
# What tests start from: three prefill and three decode replicas' worth, in round figures.
PREFILL = PrefillLoad(requests_per_s=10.0, prompt_tokens=2000.0, tokens_per_s_per_replica=10_000.0)
DECODE = DecodeLoad(
    requests_per_s=10.0,
    answer_tokens=120.0,
    steps=((1.0, 0.021), (10.0, 0.030), (20.0, 0.040)),
    batch=20.0,
    kv_usage=0.4,
)


def workers(pool: str, count: int, ready: int | None = None, first: int = 0) -> tuple:
    ready = count if ready is None else ready
    return tuple(
        WorkerSignals(WorkerId(pool, first + i, 1), pool, is_ready=i < ready) for i in range(count)
    )


def signals(
    prefill: PrefillLoad = PREFILL,
    decode: DecodeLoad = DECODE,
    *,
    have: tuple[int, int] = (3, 3),
    ready: tuple[int | None, int | None] = (None, None),
    bounds: tuple[tuple[int, int], tuple[int, int]] = ((1, 16), (1, 16)),
    exchangeable: bool = False,
    **pair: float,
) -> Signals:
    return Signals(
        pools=(
            PoolSignals("prefill", *bounds[0], prefill),
            PoolSignals("decode", *bounds[1], decode),
        ),
        pairs=(PairSignals("prefill", "decode", exchangeable, **pair),),
        workers=(*workers("prefill", have[0], ready[0]), *workers("decode", have[1], ready[1])),
    )


def settle(
    given: Signals,
    policy: ScalingSpec = POLICY,
    for_s: float = 600.0,
    state: PolicyState | None = None,
) -> Decision:
    """What is decided at last, if these are the signals all the time and nothing is carried out.

    Decisions on the way are not acted on, so cooldowns are taken out."""
    patient = policy.model_copy(update={"up_cooldown_s": 0.0, "down_cooldown_s": 0.0})
    state, decision, now_s = state or PolicyState(), Decision(), 0.0
    while now_s <= for_s:
        decision, state = decide(patient, given, state, now_s)
        now_s += policy.interval_s
    return decision


@dataclass
class World:
    """Truth: rates, lengths, speeds. `seen` distorts what is measured of them."""

    per_s: float = 10.0
    prompt_tokens: float = 2000.0
    answer_tokens: float = 120.0
    prefill_tokens_per_s: float = 10_000.0
    step_s: tuple[float, float] = (0.02, 0.001)
    acceptance: float = 1.0
    max_batch: float = 64.0
    start_s: float = 40.0
    exchangeable: bool = True
    bounds: tuple[int, int] = (1, 16)
    policy: ScalingSpec = POLICY
    ttft_s: float | None = (
        None  # what is measured while `ttft_needs` prefill replicas are not ready
    )
    ttft_needs: int = 0
    seen: float = 1.0
    now_s: float = 0.0
    state: PolicyState = field(default_factory=PolicyState)
    ready_at_s: dict[WorkerId, float] = field(default_factory=dict)
    serves: dict[WorkerId, str] = field(default_factory=dict)
    queued_tokens: float = 0.0
    points: list[tuple[float, float]] = field(default_factory=list)
    actions: list[tuple[float, str]] = field(default_factory=list)

    def start(self, pool: str, count: int, at_s: float | None = None) -> None:
        used = {worker.index for worker in self.serves if worker.pool == pool}
        free = (index for index in range(1000) if index not in used)
        for _ in range(count):
            worker = WorkerId(pool, next(free), 1)
            self.serves[worker] = pool
            self.ready_at_s[worker] = self.now_s if at_s is None else at_s

    def count(self, pool: str, ready_only: bool = False) -> int:
        return sum(
            serves == pool and (not ready_only or self.ready_at_s[worker] <= self.now_s)
            for worker, serves in self.serves.items()
        )

    def tick(self) -> Decision:
        step_s = self.policy.interval_s
        self.now_s += step_s
        offered = self.per_s * self.prompt_tokens
        served = self.count("prefill", True) * self.prefill_tokens_per_s
        self.queued_tokens = max(0.0, self.queued_tokens + (offered - served) * step_s)
        decision, self.state = decide(self.policy, self.measure(), self.state, self.now_s)
        self.apply(decision)
        return decision

    def batch(self) -> float:
        base, each = self.step_s
        replicas = max(1, self.count("decode", True))
        flow = self.per_s * self.answer_tokens / self.acceptance / replicas
        if flow * each >= 1:
            return self.max_batch
        return min(self.max_batch, flow * base / (1 - flow * each))

    def measure(self) -> Signals:
        batch = self.batch()
        if self.per_s > 0:
            self.points = [(batch, self.step_s[0] + self.step_s[1] * batch)]
        per_s = self.per_s * self.seen
        missed = self.ttft_s is not None and self.count("prefill", True) < self.ttft_needs
        return Signals(
            pools=(
                PoolSignals(
                    "prefill",
                    *self.bounds,
                    PrefillLoad(
                        per_s,
                        self.prompt_tokens if per_s else None,
                        tokens_per_s_per_replica=self.prefill_tokens_per_s,
                        waiting=self.queued_tokens / self.prompt_tokens,
                    ),
                ),
                PoolSignals(
                    "decode",
                    *self.bounds,
                    DecodeLoad(
                        per_s,
                        self.answer_tokens if per_s else None,
                        self.acceptance,
                        tuple(self.points),
                        batch=batch,
                        kv_usage=batch / 100,
                        max_batch=int(self.max_batch),
                    ),
                ),
            ),
            pairs=(
                PairSignals(
                    "prefill",
                    "decode",
                    self.exchangeable,
                    ttft_s=self.ttft_s if missed else 0.1,
                    tpot_s=0.01,
                    requests=math.ceil(per_s * self.policy.load_window_s),
                ),
            ),
            workers=tuple(
                WorkerSignals(worker, serves, self.ready_at_s[worker] <= self.now_s)
                for worker, serves in self.serves.items()
            ),
        )

    def apply(self, decision: Decision) -> None:
        for action in decision.actions:
            self.actions.append((self.now_s, str(action)))
            if isinstance(action, ScaleUp):
                self.start(action.pool, action.by, self.now_s + self.start_s)
            elif isinstance(action, ScaleDown):
                own = [w for w, serves in self.serves.items() if w.pool == serves == action.pool]
                # The youngest, so that those on their way go first.
                own.sort(key=lambda worker: (self.ready_at_s[worker], worker.index))
                for worker in own[len(own) - action.by :]:
                    del self.serves[worker], self.ready_at_s[worker]
            else:
                self.serves[action.worker] = action.target
                self.ready_at_s[action.worker] = self.now_s + 2.0
