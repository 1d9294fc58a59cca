"""What `pdcluster scaling` shows: the last decision, by pool and by target. Values only.

Made by control.autoscaler, sent by control.api_scaling.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from cluster.control.autoscale.decision import Decision
from cluster.control.autoscale.signals import Signals, known
from cluster.topology.scaling import ScalingSpec


@dataclass(frozen=True, slots=True)
class PoolScaling:
    """One pool with a target. `need` None: it cannot be known; `why` says what is missing."""

    pool: str
    least: int
    most: int
    serving: int  # those on their way too
    ready: int
    need: int | None
    need_with_headroom: int | None
    why: str
    held: str  # why a difference is left alone for now; "": there is none


@dataclass(frozen=True, slots=True)
class TargetScaling:
    """A target of a pair against what its clients saw in the load window. None: not known, or no
    such target."""

    prefill: str
    decode: str
    percentile: float
    ttft_target_s: float | None
    ttft_s: float | None
    tpot_target_s: float | None
    tpot_s: float | None
    requests: int  # that the figures rest on


@dataclass(frozen=True, slots=True)
class ScalingAction:
    """Something of the last decision. `outcome`: asked | would | held | refused."""

    what: str  # scale prefill from 1 to 2
    outcome: str
    why: str
    change: int | None = None  # id, if it was asked
    problem: str = ""  # of held and refused


@dataclass(frozen=True, slots=True)
class Scaling:
    """`decided_at_s` None: it has not decided yet; `problem` says why, if that is not in order."""

    mode: str  # manual | slo
    dry_run: bool
    interval_s: float
    decided_at_s: float | None = None  # wall clock
    actions: tuple[ScalingAction, ...] = ()
    pools: tuple[PoolScaling, ...] = ()
    targets: tuple[TargetScaling, ...] = ()
    problem: str = ""


def scaling(
    policy: ScalingSpec,
    signals: Signals,
    decision: Decision,
    actions: tuple[ScalingAction, ...],
    held: Mapping[str, str],
    decided_at_s: float,
) -> Scaling:
    """`held`: why nothing is done about a pool ("": any), beyond what the decision says."""
    pools = []
    for verdict in decision.verdicts:
        pool = signals.pool(verdict.pool)
        pools.append(
            PoolScaling(
                pool=verdict.pool,
                least=pool.least if pool is not None else 0,
                most=pool.most if pool is not None else 0,
                serving=verdict.serving,
                ready=verdict.ready,
                need=verdict.need,
                need_with_headroom=verdict.need_with_headroom,
                why=verdict.why,
                held=held.get(verdict.pool) or held.get("") or verdict.held,
            )
        )
    return Scaling(
        mode=policy.mode,
        dry_run=policy.dry_run,
        interval_s=policy.interval_s,
        decided_at_s=decided_at_s,
        actions=actions,
        pools=tuple(pools),
        targets=tuple(_target(policy, signals, number) for number in range(len(policy.targets))),
    )


def _target(policy: ScalingSpec, signals: Signals, number: int) -> TargetScaling:
    target = policy.targets[number]
    pair = signals.pair(target.prefill, target.decode)
    return TargetScaling(
        prefill=target.prefill,
        decode=target.decode,
        percentile=target.percentile,
        ttft_target_s=target.ttft_s,
        ttft_s=known(pair.ttft_s),
        tpot_target_s=target.tpot_s,
        tpot_s=known(pair.tpot_s),
        requests=pair.requests,
    )
