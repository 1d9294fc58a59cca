"""What gateways and workers had said at one moment (Sample), and what came about between two. Pure.

    GatewayReports, WorkerReports, the desired state ─ sample ─▶ Sample, one every second or so
    Samples ─ traffic ─▶ what clients asked of each pair of pools
            ─ work ────▶ how long each worker was busy, and what it got done

Totals are compared, so a report that was lost loses nothing. A total that has become smaller
belongs to somebody who began anew: then all of it is new. Called by: autoscale.gather.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

from cluster.control.state import DesiredState
from cluster.identity import ENDED, Role, WorkerId, WorkerState
from cluster.topology.scaling import SloTargetSpec
from cluster.traffic import GatewayReport, PairTraffic, added
from cluster.workers.report import WorkerReport

Pair = tuple[str, str]


@dataclass(frozen=True, slots=True)
class WorkerSample:
    """One worker as far as it matters here. Totals are since its engine started.

    `serves`: the pool whose part it plays, its own unless its role was changed."""

    id: WorkerId
    serves: str
    is_ready: bool
    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    accepted: int = 0


@dataclass(frozen=True, slots=True)
class Sample:
    at_s: float  # the controller's monotonic clock
    gateways: tuple[GatewayReport, ...]
    workers: tuple[WorkerSample, ...]


@dataclass(frozen=True, slots=True)
class Work:
    """What one worker did in one part."""

    ready_s: float = 0.0
    busy_s: float = 0.0  # with anything in its batch
    sequence_s: float = 0.0  # batch x time
    squared_sequence_s: float = 0.0  # batch x batch x time
    looks: int = 0  # that found it busy
    prompt_tokens: int = 0
    generation_tokens: int = 0
    drafts: int = 0
    accepted: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(
            self.ready_s + other.ready_s,
            self.busy_s + other.busy_s,
            self.sequence_s + other.sequence_s,
            self.squared_sequence_s + other.squared_sequence_s,
            self.looks + other.looks,
            self.prompt_tokens + other.prompt_tokens,
            self.generation_tokens + other.generation_tokens,
            self.drafts + other.drafts,
            self.accepted + other.accepted,
        )


@dataclass(frozen=True, slots=True)
class Traffic:
    """Of all gateways together: per pair, and how many found no room or still wait for it."""

    pairs: Mapping[Pair, PairTraffic]
    kept_out: int = 0


def sample(
    at_s: float,
    desired: DesiredState,
    reports: Iterable[WorkerReport],
    gateways: Iterable[GatewayReport],
) -> Sample:
    """Workers that drain in order to end, or have ended, are left out."""
    targets = desired.serving.scaling.targets
    gone = (WorkerState.DRAINING, *ENDED)
    return Sample(
        at_s,
        tuple(gateways),
        tuple(
            _worker(report, serves)
            for report in reports
            if report.state not in gone
            and (serves := plays(report.id.pool, _role(desired, report), desired, targets))
        ),
    )


def plays(pool: str, role: Role, desired: DesiredState, targets: Sequence[SloTargetSpec]) -> str:
    """The pool whose part a worker of `pool` plays in `role`: its own, or the other side of the
    first target that has it. "": it plays none that anybody scales."""
    spec = desired.pool(pool)
    if spec is None:
        return ""
    if spec.role is role:
        return pool
    for target in targets:
        if role is Role.DECODE and target.prefill == pool:
            return target.decode
        if role is Role.PREFILL and target.decode == pool:
            return target.prefill
    return ""


def traffic(samples: Sequence[Sample], desired: DesiredState) -> Traffic:
    """What came from the first sample to the last. Of a gateway that was not heard of in one of
    them, from when to when it was."""
    first: dict[str, GatewayReport] = {}
    last: dict[str, GatewayReport] = {}
    for one in samples:
        for report in one.gateways:
            first.setdefault(report.gateway, report)
            last[report.gateway] = report
    found: dict[Pair, list[PairTraffic]] = {}
    kept_out = 0
    for gateway, report in last.items():
        before = first[gateway]
        kept_out += _new(report.refused, before.refused) + report.queued - before.queued
        earlier = {(pair.prefill, pair.decode): pair for pair in before.pairs}
        for pair in report.pairs:
            came = since(pair, earlier.get((pair.prefill, pair.decode)))
            found.setdefault(_played(came, desired), []).append(came)
    pairs = {key: _sum(key, parts) for key, parts in found.items()}
    return Traffic(pairs, max(0, kept_out))


def since(now: PairTraffic, before: PairTraffic | None) -> PairTraffic:
    """What came after `before`, which the same gateway said of the same pair."""
    if before is None or now.arrived < before.arrived or now.finished < before.finished:
        return now
    return replace(
        now,
        arrived=now.arrived - before.arrived,
        finished=now.finished - before.finished,
        prompt_tokens=_new(now.prompt_tokens, before.prompt_tokens),
        held_tokens=_new(now.held_tokens, before.held_tokens),
        answer_tokens=_new(now.answer_tokens, before.answer_tokens),
        ttft_s=now.ttft_s.since(before.ttft_s),
        tpot_s=now.tpot_s.since(before.tpot_s),
    )


def work(samples: Sequence[Sample]) -> dict[tuple[WorkerId, str], Work]:
    """What every worker did in every part that it played, from the first sample to the last.

    Time counts from look to look, half of it with the batch of either, as long as the worker was
    ready in the same part at both."""
    done: dict[tuple[WorkerId, str], Work] = {}
    for before, after in pairwise(samples):
        span_s = after.at_s - before.at_s
        earlier = {worker.id: worker for worker in before.workers}
        for worker in after.workers:
            was = earlier.get(worker.id)
            if was is None or was.serves != worker.serves or span_s <= 0:
                continue
            if was.is_ready and worker.is_ready:
                key = (worker.id, worker.serves)
                done[key] = done.get(key, Work()) + _between(was, worker, span_s)
    return done


def _between(was: WorkerSample, now: WorkerSample, span_s: float) -> Work:
    batches = [float(max(0, worker.running)) for worker in (was, now)]
    return Work(
        ready_s=span_s,
        busy_s=span_s * sum(batch > 0 for batch in batches) / 2,
        sequence_s=span_s * sum(batches) / 2,
        squared_sequence_s=span_s * sum(batch * batch for batch in batches) / 2,
        looks=int(now.running > 0),
        prompt_tokens=_new(now.prompt_tokens, was.prompt_tokens),
        generation_tokens=_new(now.generation_tokens, was.generation_tokens),
        drafts=_new(now.drafts, was.drafts),
        accepted=_new(now.accepted, was.accepted),
    )


def _new(now: int, before: int) -> int:
    return now - before if now >= before else now


def _worker(report: WorkerReport, serves: str) -> WorkerSample:
    load, totals = report.load, report.counters
    return WorkerSample(
        report.id,
        serves,
        report.state is WorkerState.READY,
        load.running,
        load.waiting,
        load.kv_usage,
        totals.prompt_tokens,
        totals.generation_tokens,
        totals.spec_drafts,
        totals.spec_accepted,
    )


def _role(desired: DesiredState, report: WorkerReport) -> Role:
    """Where it is going, if it is on its way."""
    return desired.role_of(report.id) if desired.pool(report.id.pool) is not None else report.role


def _played(pair: PairTraffic, desired: DesiredState) -> Pair:
    """The pair as targets name it, although a worker in another role took part."""
    targets = desired.serving.scaling.targets
    prefill = plays(pair.prefill, Role.PREFILL, desired, targets) if pair.prefill else ""
    return prefill, plays(pair.decode, Role.DECODE, desired, targets) or pair.decode


def _sum(pair: Pair, parts: Sequence[PairTraffic]) -> PairTraffic:
    return PairTraffic(
        *pair,
        arrived=sum(part.arrived for part in parts),
        finished=sum(part.finished for part in parts),
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        held_tokens=sum(part.held_tokens for part in parts),
        answer_tokens=sum(part.answer_tokens for part in parts),
        ttft_s=added([part.ttft_s for part in parts]),
        tpot_s=added([part.tpot_s for part in parts]),
    )
