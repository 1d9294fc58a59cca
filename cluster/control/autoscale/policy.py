"""Decide what the pools should gain and lose so that their targets hold.

    load ─ need.need ─▶ a number per pool ─ windows, cooldowns, bounds ─▶ wish ─ Plan ─▶ actions
    measured latency ─ memory.corrected ─▶ takes the load for larger, within bounds

A pool gains what it has been short of during the whole of `up_window_s`; it loses what it could
spare, `headroom` included, at every moment of `down_window_s`. Between the two the number stays
where it is, which is why a steady load comes to rest. A side that is short takes a worker from the
other side first, if that one has had it to spare for `role_window_s` and roles can be exchanged.

Called by: the controller, every `interval_s`. Pure: sends nothing, reads no clock.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cluster.control.autoscale import memory as past
from cluster.control.autoscale.decision import (
    Action,
    Decision,
    NeedSample,
    PolicyState,
    PoolMemory,
    PoolVerdict,
)
from cluster.control.autoscale.need import Need, Unknown, need, tokens_per_s
from cluster.control.autoscale.plan import Plan, Wish
from cluster.control.autoscale.signals import DecodeLoad, PairSignals, PoolSignals, Signals, known
from cluster.identity import Role
from cluster.topology.scaling import ScalingSpec, SloTargetSpec

# A percentile of fewer requests than this is an accident.
_FEWEST_REQUESTS = 20
# A queue counts as left over from a shortage beyond this many TTFT targets' worth of arrivals:
# queues that chance makes at the right size stay below.
_QUEUE_TARGETS = 2.0

Aim = tuple[SloTargetSpec, PairSignals]


def decide(
    policy: ScalingSpec, signals: Signals, state: PolicyState, now_s: float
) -> tuple[Decision, PolicyState]:
    """What to do now, and what to remember for the next call.

    Pools without a target, and all of them in mode `manual`, are left alone. The caller carries the
    actions out, or only prints `Decision.lines()` if `policy.dry_run`. `now_s` is monotonic, in
    seconds. Raises nothing; what is not known leads to no action."""
    if policy.mode == "manual":
        return Decision(), state
    views = [
        _look(policy, signals, pool, aims, state.of(pool.name), now_s)
        for pool in signals.pools
        if (aims := _aims(policy, signals, pool))
    ]
    plan = Plan(signals, [view.wish for view in views])
    actions = plan.actions()
    gained, lost = plan.gained, plan.lost
    memories = {
        view.pool.name: replace(
            view.memory,
            gained_at_s=now_s if view.pool.name in gained else view.memory.gained_at_s,
            lost_at_s=now_s if view.pool.name in lost else view.memory.lost_at_s,
        )
        for view in views
    }
    touched = gained | lost
    return _decision(views, actions, touched, plan), PolicyState(memories)


@dataclass(frozen=True, slots=True)
class _View:
    """All that was worked out about one pool."""

    pool: PoolSignals
    serving: int
    ready: int
    need: Need | Unknown
    with_headroom: Need | Unknown
    memory: PoolMemory
    wish: Wish
    held: str


def _aims(policy: ScalingSpec, signals: Signals, pool: PoolSignals) -> list[Aim]:
    return [
        (target, signals.pair(target.prefill, target.decode))
        for target in policy.targets
        if pool.name in (target.prefill, target.decode)
    ]


def _look(
    policy: ScalingSpec,
    signals: Signals,
    pool: PoolSignals,
    aims: Sequence[Aim],
    memory: PoolMemory,
    now_s: float,
) -> _View:
    serving = [worker for worker in signals.workers if worker.serves == pool.name]
    ready = sum(worker.is_ready for worker in serving)
    asked = tokens_per_s(pool.load)
    if asked:
        memory = replace(memory, had_traffic=True)
    elif not memory.had_traffic:
        why = Unknown("no request has come yet" if asked == 0 else "its load is not known yet")
        return _View(pool, len(serving), ready, why, why, memory, Wish(pool), "nothing is done")
    memory = past.without_old_correction(memory, asked)
    if isinstance(pool.load, DecodeLoad):
        memory = past.with_steps(memory, pool.load.steps)
        pool = replace(pool, load=replace(pool.load, steps=memory.steps))
    plain = _strictest(pool, aims, memory.correction, _queue_per_s(policy, pool, aims))
    ample = _strictest(pool, aims, memory.correction * (1 + policy.headroom), 0.0)
    if isinstance(plain, Unknown) or isinstance(ample, Unknown):
        return _View(pool, len(serving), ready, plain, ample, memory, Wish(pool), "nothing is done")
    miss = _miss(signals, pool, aims) if plain.is_reachable else ""
    explained = plain.replicas > ready or len(serving) > ready
    memory = past.corrected(policy, memory, bool(miss) and not explained, asked or 0.0, now_s)
    sample = NeedSample(now_s, plain.replicas, max(plain.replicas, ample.replicas))
    memory = past.with_sample(policy, memory, sample)
    wish, held = _wish(policy, pool, len(serving), plain, ample, memory, miss, now_s)
    return _View(pool, len(serving), ready, plain, ample, memory, wish, held)


def _strictest(
    pool: PoolSignals, aims: Sequence[Aim], factor: float, queue_per_s: float
) -> Need | Unknown:
    """The largest need under any of the pool's targets, and its minimum at least."""
    needs = [need(pool, target, pair, factor, queue_per_s) for target, pair in aims]
    largest: Need | None = None
    for found in needs:
        if isinstance(found, Unknown):
            return found
        if largest is None or found.replicas > largest.replicas:
            largest = found
    if largest is None:
        return Unknown("it has no target")
    if largest.replicas < pool.least:
        why = f"{largest.why}; its minimum is {pool.least}"
        return replace(largest, replicas=pool.least, why=why)
    return largest


def _queue_per_s(policy: ScalingSpec, pool: PoolSignals, aims: Sequence[Aim]) -> float:
    """What a queue adds to the load, if it is to be gone within `load_window_s`.

    At the right size clients wait no longer than their target, so the queue stays below arrivals
    times target; only what is beyond that is left over from a shortage."""
    waiting, per_s = known(pool.load.waiting), known(pool.load.requests_per_s)
    if not waiting or per_s is None:
        return 0.0
    targets = [target.ttft_s for target, _ in aims if target.ttft_s is not None]
    usual = _QUEUE_TARGETS * per_s * min(targets, default=policy.load_window_s)
    return max(0.0, waiting - max(usual, 1.0)) / policy.load_window_s


def _miss(signals: Signals, pool: PoolSignals, aims: Sequence[Aim]) -> str:
    """How the pool's side of a pair is missing its target, or an empty string.

    A late first token is prefill's, unless requests stand before full batches."""
    for target, pair in aims:
        if pair.requests < _FEWEST_REQUESTS:
            continue
        ttft_s, tpot_s = known(pair.ttft_s), known(pair.tpot_s)
        if ttft_s is not None and target.ttft_s is not None and ttft_s > target.ttft_s:
            late = f"TTFT p{target.percentile:g} is {ttft_s:.3g} s of {target.ttft_s:g}"
            decode = signals.pool(target.decode)
            is_prefills = decode is None or (known(decode.load.waiting) or 0.0) < 1
            if is_prefills == (pool.role is Role.PREFILL):
                return late
        slow = tpot_s is not None and target.tpot_s is not None and tpot_s > target.tpot_s
        if slow and pool.role is Role.DECODE:
            said = f"{1e3 * (tpot_s or 0):.3g} ms of {1e3 * (target.tpot_s or 0):g}"
            return f"TPOT p{target.percentile:g} is {said}"
    return ""


def _wish(
    policy: ScalingSpec,
    pool: PoolSignals,
    serving: int,
    plain: Need,
    ample: Need,
    memory: PoolMemory,
    miss: str,
    now_s: float,
) -> tuple[Wish, str]:
    """What the pool should become, and why it is not now what it needs."""
    why = plain.why
    if memory.correction > 1:
        why += f" (load taken {memory.correction:.2f}-fold: latency was worse than it explains)"
    if plain.replicas > serving:
        lasting = past.lowest_need(memory, policy.up_window_s, now_s)
        if lasting is None or lasting.need <= serving:
            return Wish(pool), f"not yet for {policy.up_window_s:g} s"
        rest_s = past.rest_s(memory.gained_at_s, policy.up_cooldown_s, now_s)
        if rest_s > 0:
            return Wish(pool), f"it gained lately, {rest_s:.0f} s to go"
        longer = past.lowest_need(memory, policy.role_window_s, now_s)
        can_wait = longer is None or longer.need <= serving
        return Wish(pool, gain_to=lasting.need_with_headroom, can_wait=can_wait, why=why), ""
    if ample.replicas >= serving:
        return Wish(pool), ""
    spare = f"{serving - ample.replicas} to spare"
    if miss:
        return Wish(pool), f"{spare}, but {miss}"
    why = f"with {policy.headroom:.0%} headroom {ample.why}"
    rest_s = past.rest_s(memory.gained_at_s, policy.down_cooldown_s, now_s)
    if rest_s > 0:
        return Wish(pool), f"{spare}, it gained lately, {rest_s:.0f} s to go"
    lend_to = past.highest_need(memory, policy.role_window_s, now_s)
    wish = Wish(pool, now_to=ample.replicas, lend_to=lend_to, why=why)
    rest_s = past.rest_s(memory.changed_at_s, policy.down_cooldown_s, now_s)
    if rest_s > 0:
        return wish, f"{spare}, it lost lately, {rest_s:.0f} s to go"
    stop_to = past.highest_need(memory, policy.down_window_s, now_s)
    held = f"{spare}, not yet for {policy.down_window_s:g} s"
    return replace(wish, stop_to=stop_to), held


def _decision(
    views: Sequence[_View], actions: tuple[Action, ...], touched: frozenset[str], plan: Plan
) -> Decision:
    verdicts = tuple(
        PoolVerdict(
            view.pool.name,
            view.serving,
            view.ready,
            view.need.replicas if isinstance(view.need, Need) else None,
            view.with_headroom.replicas if isinstance(view.with_headroom, Need) else None,
            view.need.why,
            "" if view.pool.name in touched else plan.blocked.get(view.pool.name, view.held),
        )
        for view in views
    )
    return Decision(actions, verdicts)
