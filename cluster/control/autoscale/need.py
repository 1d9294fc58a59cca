"""How many replicas a load needs under a target. Pure; the formulas are in sizing.queueing.

In: what was measured of one pool, the target of one of its pairs. Out: a number, and a sentence
that says how it comes about. Called by: policy.

The number follows from the load (arrivals, lengths) and from the speed of one replica, never from
how the present number of replicas fares: a steady load has one answer, whatever is running.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from cluster.control.autoscale.signals import (
    DecodeLoad,
    PairSignals,
    PoolSignals,
    PrefillLoad,
    known,
)
from cluster.sizing import queueing
from cluster.sizing.queueing import Lengths, StepModel
from cluster.topology.scaling import SloTargetSpec

# Prefill replicas, and decode replicas without a TPOT target, are at most this busy: estimates of
# load and speed are some per cent off, and a queue near 1 has no bound.
_MOST_BUSY = 0.85
# Where the target cannot be met, more replicas would be spent on nothing.
_MOST_BUSY_UNREACHABLE = 0.7
# A prompt that takes longer than this share of the target by itself leaves no room for a queue.
_OWN_SHARE = 0.9
_MOST_KV_USAGE = 0.9
# How far beyond the largest batch ever measured the line of step times is believed, and from which
# batch on that matters.
_EXTRAPOLATION = 3.0
_SMALL_BATCH = 8.0
# Where fewer sequences than this fit, they queue rather than share.
_FEW = 2.0


@dataclass(frozen=True, slots=True)
class Unknown:
    """The need cannot be told; `why` names what is missing."""

    why: str


@dataclass(frozen=True, slots=True)
class Need:
    """`replicas` are needed (1 ≤ … ≤ the limit asked about)."""

    replicas: int
    why: str
    # False: no number of replicas meets the target; utilisation is bounded instead.
    is_reachable: bool = True
    is_enough: bool = True  # False: more than the limit would be needed


def tokens_per_s(load: PrefillLoad | DecodeLoad) -> float | None:
    """What the pool is asked for: prompt tokens to compute, or answer tokens. None: not known."""
    per_s = known(load.requests_per_s)
    if per_s == 0:
        return 0.0
    each = known(load.prompt_tokens if isinstance(load, PrefillLoad) else load.answer_tokens)
    return None if per_s is None or each is None else per_s * each


def need(
    pool: PoolSignals,
    target: SloTargetSpec,
    pair: PairSignals,
    factor: float = 1.0,
    backlog_per_s: float = 0.0,
) -> Need | Unknown:
    """What `factor` times the load of `pool` needs, at most `pool.most`.

    `backlog_per_s`: requests of a queue that are to be served besides, per second."""
    load = pool.load
    per_s = known(load.requests_per_s)
    if per_s is None:
        return Unknown("arrivals are not measured")
    per_s = per_s * factor + backlog_per_s
    if per_s == 0:
        return Need(1, "no request arrives")
    if isinstance(load, PrefillLoad):
        return _prefill(load, target, pair, per_s, max(1, pool.most))
    return _decode(load, target, per_s, max(1, pool.most))


def _prefill(
    load: PrefillLoad, target: SloTargetSpec, pair: PairSignals, per_s: float, most: int
) -> Need | Unknown:
    tokens, speed = known(load.prompt_tokens), known(load.tokens_per_s_per_replica)
    if tokens is None:
        return Unknown("prompt lengths are not measured")
    if not speed:
        return Unknown("the speed of one replica is not measured")
    squared_cv = known(load.prompt_tokens_squared_cv)
    arrivals_cv = known(load.arrivals_squared_cv)
    # A prompt that is held completely still costs its last token.
    service = Lengths(max(tokens, 1.0) / speed, 1.0 if squared_cv is None else squared_cv)
    busy = per_s * service.mean
    said = f"{per_s:.3g} prompts/s of {tokens:,.0f} tokens at {speed:,.0f} tokens/s "
    said += f"keep {busy:.2f} busy"
    if target.ttft_s is None:
        return _bounded(busy, _MOST_BUSY, most, f"{said}; no TTFT target, at most {_MOST_BUSY:.0%}")
    allowed = 1 - target.percentile / 100
    limit_s = target.ttft_s - (known(pair.handover_s) or 0.0)
    goal = f"TTFT p{target.percentile:g} {target.ttft_s:g} s"
    if queueing.longer_than(service, limit_s * _OWN_SHARE) > allowed:
        said += (
            f"; {goal} is out of reach of any number: reading takes {service.mean:.3g} s on "
            f"average and {_quantile(service, allowed):.3g} s at that percentile, so replicas are "
            f"kept at most {_MOST_BUSY_UNREACHABLE:.0%} busy"
        )
        return _bounded(busy, _MOST_BUSY_UNREACHABLE, most, said, is_reachable=False)

    def late(replicas: int) -> float:
        if busy / replicas > _MOST_BUSY:
            return 1.0
        arrivals = 1.0 if arrivals_cv is None else arrivals_cv
        return queueing.late_share(replicas, per_s, service, limit_s, arrivals)

    count = _first(most, lambda replicas: late(replicas) <= allowed)
    if count is None:
        return Need(most, f"{said}; {goal} needs more than {most}", is_enough=False)
    said += f"; with {count}, {late(count):.1%} are later than {goal}"
    if count > 1:
        share = busy / (count - 1)
        fewer = f"{late(count - 1):.1%}" if share <= _MOST_BUSY else f"they are {share:.0%} busy"
        said += f", with {count - 1} {fewer}"
    return Need(count, said)


def _decode(load: DecodeLoad, target: SloTargetSpec, per_s: float, most: int) -> Need | Unknown:
    answer = known(load.answer_tokens)
    if answer is None:
        return Unknown("answer lengths are not measured")
    steps = queueing.fit_steps((b, t) for b, t in load.steps if known(b) and known(t))
    if steps is None:
        return Unknown("step times are not measured")
    acceptance = max(1.0, known(load.acceptance_length) or 1.0)
    rate = per_s * max(answer, 1.0)
    room, room_why = _room(load)
    said = (
        f"{rate:,.0f} tokens/s at {acceptance:.2f} per step of {1e3 * steps.base_s:.3g} + "
        f"{1e3 * steps.per_sequence_s:.3g} ms x batch"
    )
    if target.tpot_s is None:
        most_tokens_per_s = _fastest(room, steps, acceptance)
        said += f"; no TPOT target, at most {_MOST_BUSY:.0%} of {most_tokens_per_s:,.0f} tokens/s"
        return _bounded(rate / most_tokens_per_s, _MOST_BUSY, most, said)
    goal = f"TPOT p{target.percentile:g} {1e3 * target.tpot_s:g} ms"
    if steps.step_s(1) / acceptance > target.tpot_s:
        most_tokens_per_s = _fastest(room, steps, acceptance)
        said += (
            f"; {goal} is out of reach of any number: a sequence alone takes "
            f"{1e3 * steps.step_s(1) / acceptance:.3g} ms per token, so replicas are kept at most "
            f"{_MOST_BUSY_UNREACHABLE:.0%} of {most_tokens_per_s:,.0f} tokens/s busy"
        )
        share = rate / most_tokens_per_s
        return _bounded(share, _MOST_BUSY_UNREACHABLE, most, said, is_reachable=False)
    if room < _FEW:
        most_tokens_per_s = _fastest(room, steps, acceptance)
        said += f"; {room_why} leaves room for {room:.3g} sequences, so replicas are kept at most "
        said += f"{_MOST_BUSY_UNREACHABLE:.0%} of {most_tokens_per_s:,.0f} tokens/s busy"
        return _bounded(rate / most_tokens_per_s, _MOST_BUSY_UNREACHABLE, most, said)
    allowed, why = _largest_batch(target.tpot_s * acceptance, steps), goal
    if room < allowed:
        allowed, why = room, room_why

    def batch(replicas: int) -> float:
        return queueing.batch_at(replicas, rate, acceptance, steps, target.percentile / 100)

    count = _first(most, lambda replicas: batch(replicas) <= allowed)
    if count is None:
        too_few = f"; {why} allows a batch of {allowed:.3g}, which needs more than {most}"
        return Need(most, said + too_few, is_enough=False)
    said += f"; {why} allows a batch of {_figure(allowed)}, {count} hold {batch(count):.3g}"
    if count > 1:
        said += f", {count - 1} would hold {_figure(batch(count - 1))}"
    return Need(count, said)


def _room(load: DecodeLoad) -> tuple[float, str]:
    """The largest batch that a replica takes for other reasons than its pace, and the reason."""
    seen = max((known(batch) or 0.0 for batch, _ in load.steps), default=0.0)
    rooms = [(max(_SMALL_BATCH, _EXTRAPOLATION * seen), f"the largest batch seen ({seen:.3g})")]
    if load.max_batch:
        rooms.append((float(load.max_batch), "the engine's batch limit"))
    usage, batch = known(load.kv_usage), known(load.batch)
    if usage and batch:
        rooms.append((_MOST_KV_USAGE * batch / usage, "KV memory"))
    room, why = min(rooms)
    return max(1.0, room), why


def _largest_batch(step_s: float, steps: StepModel) -> float:
    if steps.per_sequence_s <= 0:
        return math.inf
    return (step_s - steps.base_s) / steps.per_sequence_s


def _fastest(batch: float, steps: StepModel, acceptance: float) -> float:
    """Tokens/s of one replica with its batch full."""
    return acceptance * batch / steps.step_s(batch)


def _bounded(busy: float, bound: float, most: int, why: str, is_reachable: bool = True) -> Need:
    # 1e-9: three replicas' worth at 1/3 each must not come out as four.
    count = max(1, math.ceil(min(busy / bound, most + 1) - 1e-9))
    return Need(min(count, most), why, is_reachable, is_enough=count <= most)


def _first(most: int, is_enough: Callable[[int], bool]) -> int | None:
    return next((count for count in range(1, most + 1) if is_enough(count)), None)


def _quantile(service: Lengths, above: float) -> float:
    points = service.quantiles()
    return points[min(len(points) - 1, int((1 - above) * len(points)))]


def _figure(value: float) -> str:
    return "without end" if math.isinf(value) else f"{value:.3g}"
