"""What a changed topology does to a running cluster: the plan, and whether a rollout is over. Pure.

    replicas            scaled
    pools               started, or drained
    what engines are    their workers replaced one at a time (a rollout): the next one starts,
    told                shows that it stays ready, and the old one drains; if new ones fail, all
                        goes back
    links, policies,    at once
    scaling
    endpoint, control,  refused: they belong to processes that a running cluster keeps, or that
    observability       `up` starts

While pools that feed each other are rolled out together, no old worker goes before each of them
has a new one that is ready: unlike revisions never exchange blocks (kv.fingerprint), so each kind
needs its own. Called by: control.operations, control.progress, control.loop,
control.controller.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from cluster.control.changes import Plan, PlanStep
from cluster.control.state import DesiredState, Rollout
from cluster.identity import WorkerState
from cluster.topology.checks import cross_faults
from cluster.topology.findings import dotted
from cluster.topology.schema import PoolSpec, ReplicasSpec, ServingSpec
from cluster.workers.report import WorkerReport

# A rollout whose new workers fail this often goes back.
FAILURES_ALLOWED = 1
_ABSENT = object()
_OF_THE_ENDPOINT = ("gateway", "control")
_TRACING = "observability.tracing"  # gateway replicas are started with it
_OF_THE_MODEL = tuple(
    f"model.{key}"
    for key in (
        *("id", "served_name", "dtype", "kv_cache_dtype"),
        *("max_model_len_tokens", "reasoning_parser"),
    )
)


def plan(desired: DesiredState, serving: ServingSpec) -> Plan:
    """What it takes to serve as `serving` says."""
    refused = [
        PlanStep(f"{finding.found}; {finding.fix}", (dotted(finding.key),))
        for finding in cross_faults(serving)
    ]
    refused += [
        PlanStep(
            f"found {pool.max_model_len_tokens}; the model is served with "
            f"{desired.max_model_len_tokens}; write that or less",
            (f"pools[{pool.name}].max_model_len_tokens",),
        )
        for pool in serving.pools
        if (pool.max_model_len_tokens or 0) > desired.max_model_len_tokens
    ]
    keys = differing(desired.serving, serving)
    refused += [PlanStep(why, (key,)) for key in keys if (why := _why_refused(key))]
    if refused:
        return Plan(refused=tuple(refused))
    after = target(desired, serving)
    steps: list[PlanStep] = []
    old = {pool.name: pool for pool in desired.serving.pools}
    new = {pool.name: pool for pool in after.serving.pools}
    for name in new.keys() - old.keys():
        steps.append(PlanStep(f"start {_count(new[name])} of new pool {name}", (f"pools[{name}]",)))
    for name in old.keys() - new.keys():
        steps.append(PlanStep(f"drain and end pool {name}", (f"pools[{name}]",)))
    told: set[str] = set()
    for name in rolled(desired, after):
        mine = tuple(key for key in keys if _concerns(key, name, after.serving))
        told |= set(mine)
        what = f"replace {_count(new[name])} of {name}, one at a time"
        steps.append(PlanStep(what, mine))
    for name in new.keys() & old.keys():
        was, wanted = old[name].replicas.initial, new[name].replicas.initial
        if was != wanted:
            what = f"scale {name} from {was} to {wanted}"
            steps.append(PlanStep(what, (f"pools[{name}].replicas.initial",)))
            told.add(f"pools[{name}].replicas.initial")
    pools = {f"pools[{name}]" for name in new.keys() ^ old.keys()}
    rest = tuple(
        key
        for key in keys
        if key not in told and key not in pools and not key.endswith(".replicas.initial")
    )
    if rest:
        steps.append(PlanStep("change at once, without ending anything", rest))
    return Plan(steps=tuple(sorted(steps, key=lambda step: step.what)))


def target(desired: DesiredState, serving: ServingSpec) -> DesiredState:
    """`desired` with `serving` in it. Pools that follow their load keep the replicas they have,
    within the new bounds."""
    now = {pool.name: pool.replicas.initial for pool in desired.serving.pools}
    follows: set[str] = set()
    if serving.scaling.mode == "slo" and not serving.scaling.dry_run:
        follows = {end for t in serving.scaling.targets for end in (t.prefill, t.decode)}
    kept = {
        pool.name: min(max(now[pool.name], pool.replicas.min), pool.replicas.max)
        for pool in serving.pools
        if pool.name in follows & now.keys()
    }
    return desired.model_copy(update={"serving": with_replicas(serving, kept)})


def with_replicas(serving: ServingSpec, replicas: dict[str, int]) -> ServingSpec:
    """`serving` with other numbers of replicas for the pools named; unknown names do nothing."""
    pools = [
        pool.model_copy(
            update={
                "replicas": ReplicasSpec(
                    initial=replicas[pool.name], min=pool.replicas.min, max=pool.replicas.max
                )
            }
        )
        if pool.name in replicas
        else pool
        for pool in serving.pools
    ]
    return serving.model_copy(update={"pools": pools})


def rolled(before: DesiredState, after: DesiredState) -> tuple[str, ...]:
    """Pools of both whose engines are told something else."""
    old = {pool.name for pool in before.serving.pools}
    return tuple(
        pool.name
        for pool in after.serving.pools
        if pool.name in old and before.revision(pool.name) != after.revision(pool.name)
    )


def may_retire(
    desired: DesiredState, rollout: Rollout | None, pool: str, reports: Sequence[WorkerReport]
) -> bool:
    """Whether old workers of `pool` may go: none of the pools rolled out with it would be left
    without one of its kind."""
    if rollout is None or pool not in rollout.pools:
        return True
    return all(
        desired.serving.pool(other).replicas.initial == 0 or _new_and_ready(desired, other, reports)
        for other in rollout.pools
        if desired.pool(other) is not None
    )


def is_over(desired: DesiredState, rollout: Rollout, reports: Sequence[WorkerReport]) -> bool:
    """All workers of its pools are of the new revision, and as many as wanted are ready."""
    for name in rollout.pools:
        pool = desired.pool(name)
        if pool is None:
            continue
        mine = [report for report in reports if report.id.pool == name]
        if any(is_outdated(desired, report) for report in mine):
            return False
        if len(_new_and_ready(desired, name, reports)) < pool.replicas.initial:
            return False
    return True


def is_outdated(desired: DesiredState, report: WorkerReport) -> bool:
    """Whether its engine was told something else than is wanted now. A worker that has not said
    what it was told is taken to be right."""
    if desired.pool(report.id.pool) is None or not report.revision:
        return False
    return report.revision != desired.revision(report.id.pool)


def rolled_back(desired: DesiredState, rollout: Rollout) -> DesiredState:
    """As before the rollout, with the replicas that are wanted now."""
    now = {pool.name: pool.replicas.initial for pool in desired.serving.pools}
    bounded = {
        pool.name: min(max(now[pool.name], pool.replicas.min), pool.replicas.max)
        for pool in rollout.before.pools
        if pool.name in now
    }
    serving = with_replicas(rollout.before, bounded)
    return desired.model_copy(update={"serving": serving, "rollout": None})


def differing(old: ServingSpec, new: ServingSpec) -> tuple[str, ...]:
    """Keys in which two of them differ; pools and islands by name."""
    return tuple(_differing("", _plain(old), _plain(new)))


def _new_and_ready(
    desired: DesiredState, pool: str, reports: Sequence[WorkerReport]
) -> list[WorkerReport]:
    return [
        report
        for report in reports
        if report.id.pool == pool
        and report.state is WorkerState.READY
        and not is_outdated(desired, report)
    ]


def _plain(serving: ServingSpec) -> dict[str, Any]:
    said = serving.model_dump(mode="json")
    for key in ("pools", "islands"):
        said[key] = {f"[{entry['name']}]": entry for entry in said[key]}
    return said


def _differing(at: str, old: Any, new: Any) -> Iterator[str]:
    if old == new:
        return
    if not isinstance(old, dict) or not isinstance(new, dict):
        yield at
        return
    for key in dict.fromkeys((*old, *new)):
        below = f"{at}{key}" if key.startswith("[") or not at else f"{at}.{key}"
        yield from _differing(below, old.get(key, _ABSENT), new.get(key, _ABSENT))


def _why_refused(key: str) -> str:
    is_traced = key.startswith(_TRACING)
    if key.partition(".")[0] in _OF_THE_ENDPOINT or key in _OF_THE_MODEL or is_traced:
        return (
            "the endpoint is started with it, and a running cluster keeps its endpoint; "
            "`pdcluster down`, then `pdcluster up FILE`"
        )
    if key.partition(".")[0] == "observability":
        return "`pdcluster up FILE` starts and ends Prometheus, also while the cluster serves"
    return ""


def _concerns(key: str, pool: str, serving: ServingSpec) -> bool:
    """Whether a key is part of what the engines of `pool` are told."""
    island = serving.island_of(pool)
    if key.startswith(f"pools[{pool}]."):
        return not key.startswith((f"pools[{pool}].replicas", f"pools[{pool}].relative_speed"))
    peers = (f"pools[{peer.name}].parallel" for peer in serving.peers_of(pool))
    if key.startswith(tuple(peers)):
        return True
    told = (f"islands[{island.name}].connector", f"islands[{island.name}].lease_s")
    return key.startswith(("model.", "health.hung_after_s", *told))


def _count(pool: PoolSpec) -> str:
    count = pool.replicas.initial
    return f"{count} worker" if count == 1 else f"{count} workers"
