"""What a gateway replica tells the controller of the traffic it sees, about once a second.

Totals since the replica started, so that a lost report loses nothing: who reads two of them takes
the difference. Percentiles are read from counts over fixed bounds, which add up over replicas.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass, field

from cluster.request_records import PackedRecord

# Upper bounds in seconds, 1 ms to about 700 s, each 1.25 times the one before: a percentile is off
# by at most 25 % of itself, at 40 ms as at 40 s.
# Four digits: they are labels, too, when Prometheus scrapes them.
BOUNDS_S: tuple[float, ...] = tuple(float(f"{0.001 * 1.25**power:.4g}") for power in range(61))


@dataclass(frozen=True, slots=True)
class Spread:
    """How some durations are spread: counts per bound of BOUNDS_S, the last one for what is longer
    than all of them (so len(BOUNDS_S) + 1 counts; empty: nothing yet), and their sum in seconds."""

    counts: tuple[int, ...] = ()
    sum_s: float = 0.0

    @property
    def total(self) -> int:
        return sum(self.counts)

    def since(self, before: Spread) -> Spread:
        """What came after `before`. A replica that began anew counts from zero: then all of it."""
        if not before.counts or before.total > self.total:
            return self
        counts = tuple(now - then for now, then in zip(self.counts, before.counts, strict=True))
        return Spread(counts, self.sum_s - before.sum_s)

    def percentile_s(self, percentile: float) -> float | None:
        """The duration that `percentile` (0 to 100) per cent of them keep; None: there are none.

        Interpolated within its bounds, as Prometheus' histogram_quantile does."""
        total = self.total
        if not total:
            return None
        rank = total * percentile / 100
        seen = 0
        for index, count in enumerate(self.counts):
            if count and seen + count >= rank:
                if index == len(BOUNDS_S):
                    return BOUNDS_S[-1]
                low = BOUNDS_S[index - 1] if index else 0.0
                return low + (BOUNDS_S[index] - low) * max(0.0, rank - seen) / count
            seen += count
        return BOUNDS_S[-1]


class SpreadCounter:
    """Counts durations into a Spread. One `add` costs a bisection."""

    __slots__ = ("_counts", "_sum_s")

    def __init__(self) -> None:
        self._counts = [0] * (len(BOUNDS_S) + 1)
        self._sum_s = 0.0

    def add(self, duration_s: float) -> None:
        self._counts[bisect.bisect_left(BOUNDS_S, duration_s)] += 1
        self._sum_s += duration_s

    def spread(self) -> Spread:
        return Spread(tuple(self._counts), self._sum_s)


def added(spreads: Sequence[Spread]) -> Spread:
    """All of them together."""
    filled = [spread for spread in spreads if spread.counts]
    counts = tuple(sum(column) for column in zip(*(s.counts for s in filled), strict=True))
    return Spread(counts, sum(spread.sum_s for spread in filled))


@dataclass(frozen=True, slots=True)
class PairTraffic:
    """Requests of one pair of pools, totals since the replica started. `prefill` "": the decode
    pool prefilled by itself."""

    prefill: str
    decode: str
    arrived: int = 0  # routed, whatever became of them
    finished: int = 0
    prompt_tokens: int = 0  # of those that finished
    held_tokens: int = 0  # of those, known to be in the decode worker's prefix cache
    answer_tokens: int = 0
    ttft_s: Spread = field(default_factory=Spread)
    tpot_s: Spread = field(default_factory=Spread)  # one per streamed answer: its mean


@dataclass(frozen=True, slots=True)
class GatewayNote:
    """Something that people should hear of. `kind` is of a fixed set, in capitals like an event's:
    RequestPoisonous, AnswerContinued, AnswerLost."""

    number: int  # grows by one per note of this replica
    at_s: float  # wall clock
    kind: str
    subject: str  # the worker or the request that it is about
    text: str
    request_id: str = ""


@dataclass(frozen=True, slots=True)
class Failure:
    """A request that a worker answered with a server error. Times are wall clock; the same request
    that fails again is the same failure, later."""

    request: int  # of requests that say the same it is the same
    peer: str  # the worker at the other end of a pull that failed; "": none had a part in it
    first_at_s: float
    last_at_s: float
    is_proven: bool  # somebody answered the request after all: it was not at fault
    why: str  # the engine's own words


@dataclass(frozen=True, slots=True)
class Standing:
    """How a worker (POOL/INDEX#GENERATION) has served this replica. Times are wall clock; 0:
    never. `failures`: since it last answered; those with a peer, since it last had a part in a
    pull that went well."""

    worker: str
    answered_at_s: float = 0.0
    pulled_at_s: float = 0.0
    failures: tuple[Failure, ...] = ()


@dataclass(frozen=True, slots=True)
class GatewayReport:
    """One replica, now. `gateway` is its own for its life: a replica that is restarted is another.

    `notes`: the latest few; who has seen a number need not look at it again. `records`: of requests
    that have ended; numbered one by one, the last one is `records_to`."""

    gateway: str
    at_s: float  # wall clock
    snapshot_version: int
    running: int
    queued: int
    refused: int = 0  # total of requests that found no room
    recoveries: int = 0  # total of answers that went on with another engine
    pairs: tuple[PairTraffic, ...] = ()
    notes: tuple[GatewayNote, ...] = ()
    standings: tuple[Standing, ...] = ()  # of the workers that there are
    metrics_url: str = ""  # of this replica alone, for Prometheus; "": it has none
    records_to: int = 0
    records: tuple[PackedRecord, ...] = ()
