"""What the autoscaler gets to see: load and speed over a window, from counters and the clients.

Once per decision, `look` turns the difference between now and `window_s` ago into Signals. The
gateways' part (arrivals, lengths, TTFT, TPOT) comes from `arrived` and `finished`.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from autoscaling_replay.fleet import MAX_BATCH, Fleet, Replica, Served
from autoscaling_replay.trace import Arrival
from cluster.control.autoscale.signals import (
    DecodeLoad,
    PairSignals,
    PoolSignals,
    PrefillLoad,
    Signals,
    WorkerSignals,
)
from cluster.identity import Role

# Speed and lengths change slowly; rates are what must be fresh.
_LONG_WINDOWS = 4


@dataclass(frozen=True, slots=True)
class _Totals:
    """Sums over all replicas there ever were."""

    at_s: float
    computed_tokens: float
    busy_s: dict[Role, float]
    drafts: int
    accepted: int


class Meter:
    """Feed it, then `look`."""

    def __init__(self, fleet: Fleet, window_s: float, percentile: float, most: int) -> None:
        self._fleet, self._window_s, self._most = fleet, window_s, most
        self._percentile = percentile
        self._arrived: deque[Arrival] = deque()
        self._finished: deque[Served] = deque()
        self._totals: deque[_Totals] = deque()
        self._seen: dict[Replica, tuple[int, float, float]] = {}
        self._known: dict[Replica, None] = {}  # in the order of starts: sums must come out alike
        self._handover_s = 0.0

    def arrived(self, arrival: Arrival) -> None:
        self._arrived.append(arrival)

    def finished(self, served: Served) -> None:
        self._finished.append(served)

    def look(self, now_s: float, is_exchangeable: bool, least: int = 1) -> Signals:
        self._known |= dict.fromkeys(self._fleet.replicas)
        self._totals.append(self._total(now_s))
        long_s = _LONG_WINDOWS * self._window_s
        while self._arrived and self._arrived[0].at_s < now_s - long_s:
            self._arrived.popleft()
        while self._finished and self._finished[0].last_s < now_s - long_s:
            self._finished.popleft()
        while len(self._totals) > 1 and self._totals[1].at_s <= now_s - long_s:
            self._totals.popleft()
        return Signals(
            pools=(
                PoolSignals("prefill", least, self._most, self._prefill(now_s)),
                PoolSignals("decode", least, self._most, self._decode(now_s)),
            ),
            pairs=(self._pair(now_s, is_exchangeable),),
            workers=tuple(
                WorkerSignals(r.id, r.serves.value, r.is_ready, r.in_hand)
                for r in self._fleet.replicas
                if not r.is_leaving
            ),
        )

    def busy_share(self, role: Role, window_s: float) -> float | None:
        """Mean share of the window in which a replica had anything in hand; None: not known."""
        newest = self._totals[-1]
        oldest = next((t for t in self._totals if t.at_s >= newest.at_s - window_s), newest)
        ready = sum(r.is_ready for r in self._fleet.of(role))
        span_s = newest.at_s - oldest.at_s
        if not ready or not span_s:
            return None
        return (newest.busy_s[role] - oldest.busy_s[role]) / span_s / ready

    def batch_share(self) -> float:
        """How full the batches of decode are, those who wait for room counted too."""
        ready = [r for r in self._fleet.of(Role.DECODE) if r.is_ready]
        held = sum(r.in_hand for r in ready)
        return held / (MAX_BATCH * len(ready)) if ready else 1.0

    def _total(self, now_s: float) -> _Totals:
        engines = [engine for r in self._known for engine in r.engines.values()]
        return _Totals(
            now_s,
            sum(r.engines[Role.PREFILL].metrics.computed_tokens for r in self._known),
            {
                role: sum(r.busy_until(role, now_s) for r in self._known)
                for role in (Role.PREFILL, Role.DECODE)
            },
            sum(engine.metrics.drafts for engine in engines),
            sum(sum(engine.metrics.accepted_at) for engine in engines),
        )

    def _per_s(self, now_s: float) -> float:
        span_s = min(self._window_s, now_s)
        return sum(a.at_s > now_s - span_s for a in self._arrived) / span_s if span_s else 0.0

    def _prefill(self, now_s: float) -> PrefillLoad:
        recent = [a.prompt_tokens for a in self._arrived if a.at_s > now_s - self._window_s]
        mean, squared_cv = _mean(recent), None
        if mean and len(recent) > 5:
            squared_cv = sum((t - mean) ** 2 for t in recent) / len(recent) / mean**2
        serving = [r for r in self._fleet.of(Role.PREFILL) if r.is_ready]
        first, last = self._totals[0], self._totals[-1]
        tokens = last.computed_tokens - first.computed_tokens
        busy_s = last.busy_s[Role.PREFILL] - first.busy_s[Role.PREFILL]
        return PrefillLoad(
            requests_per_s=self._per_s(now_s),
            prompt_tokens=mean,
            prompt_tokens_squared_cv=squared_cv,
            tokens_per_s_per_replica=tokens / busy_s if busy_s > 0 and tokens > 0 else None,
            # A replica reads one prompt; the others in its hand wait.
            waiting=self._fleet.waiting[Role.PREFILL] + sum(max(0, r.in_hand - 1) for r in serving),
        )

    def _decode(self, now_s: float) -> DecodeLoad:
        serving = [r for r in self._fleet.of(Role.DECODE) if r.is_ready]
        first, last = self._totals[0], self._totals[-1]
        drafts = last.drafts - first.drafts
        since_s = now_s - self._window_s
        answers = [s.arrival.answer_tokens for s in self._finished if s.last_s > since_s]
        return DecodeLoad(
            requests_per_s=self._per_s(now_s),
            answer_tokens=_mean(answers or [s.arrival.answer_tokens for s in self._finished]),
            acceptance_length=1 + (last.accepted - first.accepted) / drafts if drafts else None,
            steps=tuple(self._steps(serving)),
            batch=_mean([r.engine.metrics.running for r in serving]),
            kv_usage=_mean([r.engine.metrics.kv_usage for r in serving]),
            waiting=self._fleet.waiting[Role.DECODE]
            + sum(r.engine.metrics.waiting for r in serving),
            max_batch=MAX_BATCH,
        )

    def _steps(self, serving: Sequence[Replica]) -> list[tuple[float, float]]:
        points = []
        for replica in serving:
            steps, step_s, batch = self._seen.get(replica, (0, 0.0, 0.0))
            self._seen[replica] = (replica.steps, replica.step_s, replica.batch)
            if (count := replica.steps - steps) > 0:
                points.append(((replica.batch - batch) / count, (replica.step_s - step_s) / count))
        return points

    def _pair(self, now_s: float, is_exchangeable: bool) -> PairSignals:
        recent = [s for s in self._finished if s.last_s > now_s - self._window_s]
        if recent and not any(r.engine.metrics.waiting for r in self._fleet.of(Role.DECODE)):
            self._handover_s = sum(s.first_s - s.prefilled_s for s in recent) / len(recent)
        return PairSignals(
            "prefill",
            "decode",
            is_exchangeable,
            ttft_s=_quantile([s.ttft_s for s in recent], self._percentile),
            tpot_s=_quantile([s.tpot_s for s in recent], self._percentile),
            requests=len(recent),
            handover_s=self._handover_s,
        )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _quantile(values: Sequence[float], percentile: float) -> float | None:
    if not values:
        return None
    return sorted(values)[min(len(values) - 1, math.floor(len(values) * percentile / 100))]
