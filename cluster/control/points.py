"""From what was counted to what is drawn: a Point of the cluster, and Points as Columns. Pure.

    Totals now and a little ago ─ point ─▶ Point: gauges, rates, percentiles, ratios
    Points ─ columns ─▶ Columns, as a page or a terminal draws them

Called by: control.recent, control.live.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import starmap, zip_longest
from operator import add, sub

from cluster.control.autoscale.samples import since
from cluster.control.state import DesiredState
from cluster.identity import Role, WorkerId, WorkerState
from cluster.traffic import GatewayReport, PairTraffic, Spread, added
from cluster.workers.report import Counters, WorkerReport

# Long enough that single requests do not make a rate jump, short enough to see it change.
RATE_OVER_S = 10.0
# Percentiles and ratios need more to rest on.
RATIO_OVER_S = 30.0

Pair = tuple[str, str]

_NO_NUMBERS_THAT_GROW = ("leases_open", "spec_accepted_per_position")
_GROWING = tuple(f.name for f in fields(Counters) if f.name not in _NO_NUMBERS_THAT_GROW)


@dataclass(frozen=True, slots=True)
class Totals:
    """What was done since this controller looked first. Nothing in it ever becomes smaller."""

    at_s: float  # monotonic
    pools: Mapping[str, Counters] = field(default_factory=dict)
    pairs: Mapping[Pair, PairTraffic] = field(default_factory=dict)
    workers: Mapping[WorkerId, Counters] = field(default_factory=dict)
    refused: int = 0
    recoveries: int = 0


@dataclass(frozen=True, slots=True)
class PoolPoint:
    """One pool, or all together. A pool's workers count here, whichever role they serve in."""

    desired: int
    ready: int
    running: int  # sequences in its engines
    waiting: int
    kv_usage: float | None  # 0..1, mean of the workers that are ready
    prompt_tokens_per_s: float
    generation_tokens_per_s: float
    acceptance_length: float | None  # tokens per decode step; None: nothing was drafted
    transfers_per_s: float
    bytes_per_s: float  # pulled
    transfer_failures_per_s: float
    held_share: float | None  # 0..1 of the prompts' tokens that decode had already


@dataclass(frozen=True, slots=True)
class TrafficPoint:
    """What clients saw of one pair of pools, or of all."""

    requests_per_s: float
    finished_per_s: float
    ttft_p50_s: float | None
    ttft_p95_s: float | None
    ttft_p99_s: float | None
    tpot_p50_s: float | None
    tpot_p95_s: float | None
    tpot_p99_s: float | None


@dataclass(frozen=True, slots=True)
class GatewaysPoint:
    """All gateway replicas together. `running`, `queued`: requests, now."""

    replicas: int
    running: int
    queued: int
    refused_per_s: float
    recoveries_per_s: float


@dataclass(frozen=True, slots=True)
class RolePoint:
    desired: int
    ready: int


@dataclass(frozen=True, slots=True)
class Point:
    """The cluster at one moment: gauges now, rates over RATE_OVER_S, percentiles and ratios over
    RATIO_OVER_S."""

    seq: int  # grows from point to point, also over restarts of the controller
    at_s: float  # wall clock
    traffic: TrafficPoint
    gateways: GatewaysPoint
    engines: PoolPoint  # of all pools
    pools: Mapping[str, PoolPoint]
    roles: Mapping[Role, RolePoint]
    pairs: Mapping[Pair, TrafficPoint]


@dataclass(frozen=True, slots=True)
class Columns:
    """Points, turned by ninety degrees. Every column is as long as `at_s`; None: not known, or the
    pool was not there. Names: traffic.*, gateways.*, engines.*, pool.NAME.*, role.NAME.*,
    pair.A>B.*, with the fields of the classes above."""

    at_s: tuple[float, ...] = ()
    series: Mapping[str, tuple[float | None, ...]] = field(default_factory=dict)


def point(
    seq: int,
    wall_s: float,
    desired: DesiredState,
    reports: Sequence[WorkerReport],
    gateways: Sequence[GatewayReport],
    window: Sequence[Totals],
) -> Point:
    """`window`: totals, oldest first; the last one is of now."""
    now, rate, ratio = window[-1], ago(window, RATE_OVER_S), ago(window, RATIO_OVER_S)
    span_s = now.at_s - rate.at_s
    return Point(
        seq=seq,
        at_s=wall_s,
        traffic=_traffic(_all(now), _all(rate), _all(ratio), span_s),
        gateways=GatewaysPoint(
            replicas=len(gateways),
            running=sum(said.running for said in gateways),
            queued=sum(said.queued for said in gateways),
            refused_per_s=_per_s(now.refused - rate.refused, span_s),
            recoveries_per_s=_per_s(now.recoveries - rate.recoveries, span_s),
        ),
        engines=_pool(
            sum(pool.replicas.initial for pool in desired.serving.pools),
            reports,
            _work(now),
            _work(rate),
            _work(ratio),
            span_s,
        ),
        pools={
            pool.name: _pool(
                pool.replicas.initial,
                [report for report in reports if report.id.pool == pool.name],
                now.pools.get(pool.name, Counters()),
                rate.pools.get(pool.name, Counters()),
                ratio.pools.get(pool.name, Counters()),
                span_s,
            )
            for pool in desired.serving.pools
        },
        roles=_roles(desired, reports),
        pairs={
            pair: _traffic(total, rate.pairs.get(pair), ratio.pairs.get(pair), span_s)
            for pair, total in now.pairs.items()
        },
    )


def columns(points: Sequence[Point]) -> Columns:
    """The points, oldest first, by name."""
    series: dict[str, list[float | None]] = {}
    for number, one in enumerate(points):
        for name, value in _named(one):
            column = series.setdefault(name, [])
            column.extend([None] * (number - len(column)))
            column.append(value)
    for column in series.values():
        column.extend([None] * (len(points) - len(column)))
    return Columns(
        tuple(round(one.at_s, 1) for one in points),
        {name: tuple(column) for name, column in series.items()},
    )


def came(now: Counters, before: Counters) -> Counters:
    """What was counted after `before`. If anything has become smaller, the engine began anew: then
    all of it."""
    if any(getattr(now, name) < getattr(before, name) for name in _GROWING):
        return replace(now, leases_open=0)
    return _each(sub, now, before)


def plus(one: Counters, other: Counters) -> Counters:
    return _each(add, one, other)


def _each(of: Callable[[int, int], int], one: Counters, other: Counters) -> Counters:
    positions = one.spec_accepted_per_position, other.spec_accepted_per_position
    return Counters(
        **{name: of(getattr(one, name), getattr(other, name)) for name in _GROWING},
        spec_accepted_per_position=tuple(starmap(of, zip_longest(*positions, fillvalue=0))),
    )


def pair_since(now: PairTraffic | None, before: PairTraffic | None) -> PairTraffic:
    return since(now, before) if now is not None else PairTraffic("", "")


def pair_sum(key: Pair, parts: Iterable[PairTraffic | None]) -> PairTraffic:
    known = [part for part in parts if part is not None]
    return PairTraffic(
        *key,
        arrived=sum(part.arrived for part in known),
        finished=sum(part.finished for part in known),
        prompt_tokens=sum(part.prompt_tokens for part in known),
        held_tokens=sum(part.held_tokens for part in known),
        answer_tokens=sum(part.answer_tokens for part in known),
        ttft_s=added([part.ttft_s for part in known]),
        tpot_s=added([part.tpot_s for part in known]),
    )


def shown(value: float) -> float:
    """Four digits: nobody reads more, and they would make answers long."""
    return float(f"{value:.4g}")


def ago(window: Sequence[Totals], seconds: float) -> Totals:
    """The newest totals that are at least so old; the oldest if none is."""
    by_s = window[-1].at_s - seconds
    return next((totals for totals in reversed(window) if totals.at_s <= by_s), window[0])


def _all(totals: Totals) -> PairTraffic:
    return pair_sum(("", ""), totals.pairs.values())


def _traffic(
    now: PairTraffic, rate: PairTraffic | None, ratio: PairTraffic | None, span_s: float
) -> TrafficPoint:
    lately, longer = since(now, rate), since(now, ratio)
    return TrafficPoint(
        _per_s(lately.arrived, span_s),
        _per_s(lately.finished, span_s),
        *_percentiles(longer.ttft_s),
        *_percentiles(longer.tpot_s),
    )


def _percentiles(spread: Spread) -> tuple[float | None, float | None, float | None]:
    p50, p95, p99 = (
        None if (found := spread.percentile_s(percentile)) is None else shown(found)
        for percentile in (50, 95, 99)
    )
    return p50, p95, p99


def _work(totals: Totals) -> Counters:
    done = Counters()
    for part in totals.pools.values():
        done = plus(done, part)
    return done


def _pool(
    desired: int,
    reports: Sequence[WorkerReport],
    now: Counters,
    rate: Counters,
    ratio: Counters,
    span_s: float,
) -> PoolPoint:
    ready = [report for report in reports if report.state is WorkerState.READY]
    lately, longer = came(now, rate), came(now, ratio)
    moved = longer.tokens_held + longer.tokens_pulled
    length = longer.acceptance_length
    return PoolPoint(
        desired=desired,
        ready=len(ready),
        running=sum(report.load.running for report in reports),
        waiting=sum(report.load.waiting for report in reports),
        kv_usage=shown(sum(r.load.kv_usage for r in ready) / len(ready)) if ready else None,
        prompt_tokens_per_s=_per_s(lately.prompt_tokens, span_s),
        generation_tokens_per_s=_per_s(lately.generation_tokens, span_s),
        acceptance_length=shown(length) if length is not None else None,
        transfers_per_s=_per_s(lately.transfers, span_s),
        bytes_per_s=_per_s(lately.bytes_pulled, span_s),
        transfer_failures_per_s=_per_s(lately.transfer_failures, span_s),
        held_share=shown(longer.tokens_held / moved) if moved else None,
    )


def _roles(desired: DesiredState, reports: Sequence[WorkerReport]) -> dict[Role, RolePoint]:
    wanted: dict[Role, int] = {}
    for pool in desired.serving.pools:
        wanted[pool.role] = wanted.get(pool.role, 0) + pool.replicas.initial
    for name, role in desired.roles.items():
        own = desired.pool(WorkerId.parse(name).pool)
        if own is not None and own.role is not role:
            wanted[own.role] -= 1
            wanted[role] = wanted.get(role, 0) + 1
    return {
        role: RolePoint(
            count,
            sum(report.role is role and report.state is WorkerState.READY for report in reports),
        )
        for role, count in wanted.items()
    }


def _per_s(count: float, span_s: float) -> float:
    return shown(count / span_s) if span_s > 0 else 0.0


def _named(one: Point) -> Iterable[tuple[str, float | None]]:
    groups: list[tuple[str, object]] = [
        ("traffic", one.traffic),
        ("gateways", one.gateways),
        ("engines", one.engines),
    ]
    groups += [(f"pool.{name}", pool) for name, pool in one.pools.items()]
    groups += [(f"role.{role}", counts) for role, counts in one.roles.items()]
    groups += [(f"pair.{a or 'none'}>{b}", seen) for (a, b), seen in one.pairs.items()]
    for prefix, group in groups:
        for part in fields(group):  # type: ignore[arg-type]
            yield f"{prefix}.{part.name}", getattr(group, part.name)
