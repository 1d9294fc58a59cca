"""What the autoscaler knows: load, speed and latency as measured, and who serves where.

Built by the controller once per decision, read by `policy` and `need`. None, NaN and infinity all
mean "not known". Rates are means over `scaling.load_window_s`.
"""

from __future__ import annotations

from dataclasses import dataclass

from cluster.identity import Role, WorkerId


@dataclass(frozen=True, slots=True)
class PrefillLoad:
    """What is offered to a prefill pool, and how fast one replica of it works."""

    requests_per_s: float | None = None  # arrivals, those the gateway refused too
    # Mean per request. Prefix hits are in this and in the speed, or in neither.
    prompt_tokens: float | None = None
    # Squared coefficients of variation: 1 for exponential gaps and lengths, 0 for a metronome.
    prompt_tokens_squared_cv: float | None = None
    arrivals_squared_cv: float | None = None
    tokens_per_s_per_replica: float | None = None  # computed while it is busy
    waiting: float = 0.0  # requests that no replica has begun


@dataclass(frozen=True, slots=True)
class DecodeLoad:
    """What is offered to a decode pool, and how its steps were."""

    requests_per_s: float | None = None
    answer_tokens: float | None = None  # mean per request, of those that finished
    acceptance_length: float | None = None  # tokens per step; None: no drafts, so 1
    # (batch of a replica, step time in s), as measured since the last decision.
    steps: tuple[tuple[float, float], ...] = ()
    batch: float | None = None  # sequences in a replica's batch, mean over the replicas
    kv_usage: float | None = None  # 0..1, mean over the replicas
    waiting: float = 0.0  # requests that wait for room in a batch
    max_batch: int | None = None  # what the engine allows per replica


@dataclass(frozen=True, slots=True)
class PoolSignals:
    """A pool with its bounds (`replicas.min`, `replicas.max` of the topology)."""

    name: str
    least: int
    most: int
    load: PrefillLoad | DecodeLoad

    @property
    def role(self) -> Role:
        return Role.PREFILL if isinstance(self.load, PrefillLoad) else Role.DECODE


@dataclass(frozen=True, slots=True)
class WorkerSignals:
    """A worker that serves or is on its way. One that drains in order to stop is not listed, nor
    one that fails again and again: it would count as coming for ever.

    `id.pool` is where it belongs, `serves` the pool whose part it plays; the two differ after a
    change of role. While it changes, `serves` is where it is going and it is not ready."""

    id: WorkerId
    serves: str
    is_ready: bool = True
    requests: int = 0  # in hand


@dataclass(frozen=True, slots=True)
class PairSignals:
    """A pair of pools, and what its clients saw: percentiles as the pair's target asks for."""

    prefill: str
    decode: str
    is_exchangeable: bool = False  # workers of both change role without a restart
    ttft_s: float | None = None
    tpot_s: float | None = None
    requests: int = 0  # that the two percentiles rest on
    handover_s: float = 0.0  # mean from the end of prefill to the first token, waiting left out


@dataclass(frozen=True, slots=True)
class Signals:
    """All of it, at one moment."""

    pools: tuple[PoolSignals, ...]
    pairs: tuple[PairSignals, ...]
    workers: tuple[WorkerSignals, ...]

    def pool(self, name: str) -> PoolSignals | None:
        return next((pool for pool in self.pools if pool.name == name), None)

    def pair(self, prefill: str, decode: str) -> PairSignals:
        """An unknown pair is one of which nothing was measured."""
        found = (p for p in self.pairs if (p.prefill, p.decode) == (prefill, decode))
        return next(found, PairSignals(prefill, decode))


# Beyond these, a figure is a fault of measuring, and would overflow what is computed from it.
_LARGEST, _SMALLEST = 1e12, 1e-9


def known(value: float | None) -> float | None:
    """The value, if it is one: not missing, not NaN, not below 0, not without bound."""
    if value is None or not 0 <= value <= _LARGEST:
        return None
    return value if value >= _SMALLEST else 0.0
