"""From samples of the last while to Signals: what the policy decides on. Pure.

    Samples of `load_window_s` ─▶ arrivals, lengths, latencies, step times, acceptance
    what was learnt before     ─▶ speed of a prefill replica, lengths while nothing finishes

Engines do not say how long a prompt or a step took, so both follow from totals, from what clients
saw, and from how many sequences were there each time somebody looked:

    prefill   tokens/s of a busy replica = prompt tokens / time with something in its batch. Prefix
              hits count as tokens in this and in the prompts' lengths: what they save is speed.
    decode    step time = time per token at clients x tokens per step. Without streams to see it
              in: sequences x time x tokens per step / tokens made.

Called by: control.autoscaler, every `scaling.interval_s`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from cluster.control.autoscale.samples import Sample, Traffic, Work, traffic, work
from cluster.control.autoscale.signals import (
    DecodeLoad,
    PairSignals,
    PoolSignals,
    PrefillLoad,
    Signals,
    WorkerSignals,
    known,
)
from cluster.control.state import DesiredState, FailedSlot
from cluster.identity import Role, WorkerId
from cluster.topology.scaling import ScalingSpec, SloTargetSpec
from cluster.topology.schema import PoolSpec
from cluster.traffic import PairTraffic, added

# Of the load window, that must have been looked at before a rate is believed.
_COVERED = 0.9
# A replica that was seen busy less often has an unknown speed, and an unknown step time.
_FEWEST_LOOKS = 5
# A speed is a mean over about so much busy time: long, because a look only says busy or not.
_SPEED_OVER_S = 120.0
# With this much of its KV memory free, requests wait for their KV to arrive, not for room.
_ROOM_KV_USAGE = 0.8
# Workers that are wanted and not there yet; no worker has such an index.
_COMING_INDEX = 1_000_000


@dataclass(frozen=True, slots=True)
class Speed:
    """Prompt tokens and the busy time that they took, of all replicas of a pool, lately."""

    tokens: float = 0.0
    busy_s: float = 0.0
    looks: float = 0.0

    def followed(self, done: Work) -> Speed:
        """With what was done since; what is long ago fades by busy time, not by the clock."""
        kept = max(0.0, 1 - done.busy_s / _SPEED_OVER_S)
        return Speed(
            self.tokens * kept + done.prompt_tokens,
            self.busy_s * kept + done.busy_s,
            self.looks * kept + done.looks,
        )

    @property
    def tokens_per_s(self) -> float | None:
        if self.looks < _FEWEST_LOOKS or self.busy_s <= 0 or self.tokens <= 0:
            return None
        return self.tokens / self.busy_s


@dataclass(frozen=True, slots=True)
class Learnt:
    """What outlives the window, per pool. Begin anew when engines are told something else."""

    speeds: Mapping[str, Speed] = field(default_factory=dict)
    prompt_tokens: Mapping[str, float] = field(default_factory=dict)  # mean per request
    answer_tokens: Mapping[str, float] = field(default_factory=dict)

    def followed(self, before: Sample, now: Sample) -> Learnt:
        """With what workers did between two samples. Call it once for each two neighbours."""
        speeds = dict(self.speeds)
        done: dict[str, Work] = {}
        for (_, serves), part in work((before, now)).items():
            done[serves] = done.get(serves, Work()) + part
        for pool, part in done.items():
            speeds[pool] = speeds.get(pool, Speed()).followed(part)
        return replace(self, speeds=speeds)

    def with_lengths(self, came: Traffic) -> Learnt:
        """With the lengths of what finished in the window, where anything did."""
        prompts, answers = dict(self.prompt_tokens), dict(self.answer_tokens)
        for side, kept in ((0, prompts), (1, answers)):
            for pool in {pair[side] for pair in came.pairs}:
                parts = [part for pair, part in came.pairs.items() if pair[side] == pool]
                tokens = [p.answer_tokens if side else p.prompt_tokens for p in parts]
                finished = sum(part.finished for part in parts)
                if finished:
                    kept[pool] = sum(tokens) / finished
        return replace(self, prompt_tokens=prompts, answer_tokens=answers)


def within(samples: Sequence[Sample], window_s: float) -> tuple[Sample, ...]:
    """Those of the last `window_s` seconds, and one from before: it covers the window's begin."""
    if not samples:
        return ()
    begins_s = samples[-1].at_s - window_s
    first = max((i for i, s in enumerate(samples) if s.at_s <= begins_s), default=0)
    return tuple(samples[first:])


def signals(
    desired: DesiredState,
    samples: Sequence[Sample],
    failed: Iterable[FailedSlot],
    learnt: Learnt,
    exchangeable: Iterable[tuple[str, str]],
) -> tuple[Signals, Learnt]:
    """What is known at the newest of `samples` (oldest first, at least one).

    `failed`: places whose workers fail; one is not counted as coming until it is ready.
    `exchangeable`: pairs whose workers change roles without a new start."""
    policy = desired.serving.scaling
    window = within(samples, policy.load_window_s)
    span_s = window[-1].at_s - window[0].at_s
    came = traffic(window, desired)
    learnt = learnt.with_lengths(came)
    is_covered = span_s >= _COVERED * policy.load_window_s and any(s.gateways for s in window)
    rates = _Rates(came, span_s if is_covered else None)
    done = work(window)
    now = window[-1]
    pools = []
    for name in _targeted(policy):
        spec = desired.pool(name)
        if spec is None:
            continue
        load: PrefillLoad | DecodeLoad
        if spec.role is Role.PREFILL:
            load = _prefill(name, rates, now, learnt)
        else:
            load = _decode(spec, rates, now, done, learnt)
        pools.append(PoolSignals(name, spec.replicas.min, spec.replicas.max, load))
    pairs = set(exchangeable)
    return (
        Signals(
            pools=tuple(pools),
            pairs=tuple(_pair(target, came, pairs) for target in policy.targets),
            workers=_workers(desired, now, failed),
        ),
        learnt,
    )


@dataclass(frozen=True, slots=True)
class _Rates:
    """Requests per second. `span_s` None: they were not watched for long enough."""

    came: Traffic
    span_s: float | None

    def per_s(self, side: int, pool: str) -> float | None:
        """Arrivals at a pool, with its share of those that the gateways had no room for."""
        if self.span_s is None:
            return None
        arrived = {pair: part.arrived for pair, part in self.came.pairs.items()}
        own = sum(count for pair, count in arrived.items() if pair[side] == pool)
        everything = sum(arrived.values())
        share = own / everything if everything else 0.0
        return (own + share * self.came.kept_out) / self.span_s


def _prefill(name: str, rates: _Rates, now: Sample, learnt: Learnt) -> PrefillLoad:
    serving = [worker for worker in now.workers if worker.serves == name and worker.is_ready]
    return PrefillLoad(
        requests_per_s=rates.per_s(0, name),
        prompt_tokens=learnt.prompt_tokens.get(name),
        tokens_per_s_per_replica=learnt.speeds.get(name, Speed()).tokens_per_s,
        # A replica reads one prompt, or as many as fit into a step; further ones wait.
        waiting=float(sum(w.waiting + max(0, w.running - 1) for w in serving)),
    )


def _decode(
    spec: PoolSpec,
    rates: _Rates,
    now: Sample,
    done: Mapping[tuple[WorkerId, str], Work],
    learnt: Learnt,
) -> DecodeLoad:
    name, most = spec.name, _max_batch(spec)
    serving = [worker for worker in now.workers if worker.serves == name and worker.is_ready]
    own = [part for (_, serves), part in done.items() if serves == name]
    waiting = sum(
        worker.waiting
        for worker in serving
        if not (known(worker.kv_usage) or 0.0) < _ROOM_KV_USAGE
        or (most is not None and worker.running >= most)
    )
    acceptance = _acceptance(own)
    return DecodeLoad(
        requests_per_s=rates.per_s(1, name),
        answer_tokens=learnt.answer_tokens.get(name),
        acceptance_length=acceptance,
        steps=_steps(name, rates.came, own, acceptance),
        batch=_mean([float(worker.running) for worker in serving]),
        kv_usage=_mean([worker.kv_usage for worker in serving]),
        waiting=float(waiting),
        max_batch=most,
    )


def _acceptance(parts: Sequence[Work]) -> float | None:
    drafts = sum(part.drafts for part in parts)
    return 1 + sum(part.accepted for part in parts) / drafts if drafts else None


def _steps(
    name: str, came: Traffic, parts: Sequence[Work], acceptance: float | None
) -> tuple[tuple[float, float], ...]:
    """(batch, step time) of the pool in the window, if enough was seen; the batch is the mean that
    its sequences were in."""
    done = sum(parts, Work())
    per_token = added([part.tpot_s for pair, part in came.pairs.items() if pair[1] == name])
    is_seen, is_streamed = done.looks >= _FEWEST_LOOKS, per_token.total >= _FEWEST_LOOKS
    if done.generation_tokens <= 0 or not (is_seen or is_streamed):
        return ()
    if is_streamed:
        per_token_s = per_token.sum_s / per_token.total
    else:
        per_token_s = done.sequence_s / done.generation_tokens
    if is_seen:
        batch = done.squared_sequence_s / done.sequence_s
    else:
        # Answers are over before somebody looks: how many are there follows from Little's law, and
        # one that comes joins them.
        batch = 1 + per_token_s * done.generation_tokens / done.ready_s
    return ((batch, per_token_s * (acceptance or 1.0)),)


def _max_batch(spec: PoolSpec) -> int | None:
    return spec.max_num_seqs * spec.parallel.data if spec.max_num_seqs is not None else None


def _pair(target: SloTargetSpec, came: Traffic, exchangeable: set[tuple[str, str]]) -> PairSignals:
    key = (target.prefill, target.decode)
    seen = came.pairs.get(key, PairTraffic(*key))
    counts = [
        spread.total
        for spread, goal_s in ((seen.ttft_s, target.ttft_s), (seen.tpot_s, target.tpot_s))
        if goal_s is not None
    ]
    return PairSignals(
        *key,
        is_exchangeable=key in exchangeable,
        ttft_s=seen.ttft_s.percentile_s(target.percentile),
        tpot_s=seen.tpot_s.percentile_s(target.percentile),
        requests=min(counts, default=0),
    )


def _workers(
    desired: DesiredState, now: Sample, failed: Iterable[FailedSlot]
) -> tuple[WorkerSignals, ...]:
    """Those that serve, those that start, and as many more as are wanted and not there yet. A slot
    with two generations (one is being replaced) has the older one, as long as that is ready."""
    failing = {slot.worker for slot in failed}
    slots: dict[tuple[str, int], WorkerSignals] = {}
    for worker in sorted(now.workers, key=lambda worker: (worker.is_ready, worker.id)):
        if worker.is_ready or worker.id.name not in failing:
            slots[worker.id.pool, worker.id.index] = WorkerSignals(
                worker.id, worker.serves, worker.is_ready, worker.running + worker.waiting
            )
    found = list(slots.values())
    for pool in desired.serving.pools:
        broken = {name for name in failing if WorkerId.parse(name).pool == pool.name}
        there = {w.id.name for w in found if w.id.pool == pool.name}
        coming = pool.replicas.initial - len(there | broken)
        found += [
            WorkerSignals(WorkerId(pool.name, _COMING_INDEX + number), pool.name, is_ready=False)
            for number in range(coming)
        ]
    return tuple(found)


def _targeted(policy: ScalingSpec) -> tuple[str, ...]:
    return tuple(
        dict.fromkeys(name for target in policy.targets for name in (target.prefill, target.decode))
    )


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
