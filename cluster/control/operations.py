"""From an ask to the next desired state. Pure: changes nothing, or says why not and what would do.

`apply_ask` is called by control.controller under its lock; what comes of it is reached by
reconciling, like everything else. DrainWorker alone leaves no trace in the desired state: its pool
goes on wanting a worker in that place.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cluster.control import roles, rollout
from cluster.control.changes import (
    Apply,
    Ask,
    ChangeRole,
    DrainNode,
    DrainWorker,
    ReturnNode,
    Scale,
)
from cluster.control.reconcile import PoolWanted
from cluster.control.state import DesiredState, Rollout
from cluster.errors import InvalidInput
from cluster.identity import Role, WorkerId, WorkerState
from cluster.topology.findings import did_you_mean
from cluster.topology.schema import PoolSpec
from cluster.workers.nodes import RayNode
from cluster.workers.placement import could_take, explain_unplaceable, request_of
from cluster.workers.report import WorkerReport

_SERVES = frozenset({WorkerState.READY, WorkerState.CHANGING})


def apply_ask(
    desired: DesiredState, ask: Ask, reports: Sequence[WorkerReport], change: int
) -> DesiredState:
    """What is to be reached once `ask` is granted. `change`: the id it gets.

    Raises: InvalidInput."""
    if not isinstance(ask, ReturnNode) and not (math.isfinite(ask.grace_s) and ask.grace_s >= 0):
        raise InvalidInput(f"grace_s: found {ask.grace_s}; write a number of seconds, 0 or more")
    if isinstance(ask, Scale):
        return _scaled(desired, ask)
    if isinstance(ask, ChangeRole):
        return _with_role(desired, ask, reports)
    if isinstance(ask, DrainWorker):
        worker_of(ask.worker, reports)
        return desired.model_copy(update={"grace_s": ask.grace_s})
    if isinstance(ask, DrainNode):
        node = node_of(ask.node, desired, reports)
        address = next((r.node_ip for r in reports if r.node_id == node), "")
        drained = {node: address, **desired.drained_nodes}
        return desired.model_copy(update={"drained_nodes": drained, "grace_s": ask.grace_s})
    if isinstance(ask, ReturnNode):
        return _with_node(desired, ask, reports)
    return _applied(desired, ask, change)


def describe(desired: DesiredState, ask: Ask) -> str:
    """The ask in words, against what was wanted before: `scale prefill from 1 to 3`."""
    if isinstance(ask, Scale):
        pool = desired.pool(ask.pool)
        was = pool.replicas.initial if pool is not None else 0
        return f"scale {ask.pool} from {was} to {ask.replicas}"
    if isinstance(ask, ChangeRole):
        return f"have {ask.worker} serve as {ask.role}"
    if isinstance(ask, DrainWorker):
        return f"drain {ask.worker}"
    if isinstance(ask, DrainNode):
        return f"drain node {ask.node}"
    if isinstance(ask, ReturnNode):
        return f"return node {ask.node}"
    steps = "; ".join(step.what for step in rollout.plan(desired, ask.serving).steps)
    return f"apply a topology: {steps}" if steps else "apply a topology: nothing differs"


def pools_of(desired: DesiredState, ask: Ask, reports: Sequence[WorkerReport]) -> tuple[str, ...]:
    """The pools whose workers an ask is about."""
    if isinstance(ask, Scale):
        return (ask.pool,)
    if isinstance(ask, ChangeRole | DrainWorker):
        return (WorkerId.parse(ask.worker).pool,)
    if isinstance(ask, DrainNode | ReturnNode):
        node = node_of(ask.node, desired, reports)
        return tuple(sorted({r.id.pool for r in reports if node in (r.node_id, *r.node_ids)}))
    changed = rollout.differing(desired.serving, ask.serving)
    names = {pool.name for pool in (*desired.serving.pools, *ask.serving.pools)}
    return tuple(
        sorted(name for name in names if any(f"pools[{name}]" in key for key in changed))
    ) or tuple(sorted(names))


def worker_of(name: str, reports: Sequence[WorkerReport]) -> WorkerReport:
    """The newest generation of a worker that lives. Raises: InvalidInput."""
    try:
        wanted = WorkerId.parse(name)
    except ValueError as error:
        raise InvalidInput(f"worker: {error}") from None
    found = [r for r in reports if r.id.name == wanted.name]
    if not found:
        known = ", ".join(sorted({report.id.name for report in reports})) or "none"
        raise InvalidInput(f"worker: found {name}; there is none of this name, but: {known}")
    return max(found, key=lambda report: report.id)


def node_of(name: str, desired: DesiredState, reports: Sequence[WorkerReport]) -> str:
    """Ray's id of a node, given that or its address. Raises: InvalidInput."""
    by_name: dict[str, set[str]] = {}
    for report in reports:
        if report.node_id:
            by_name.setdefault(report.node_ip, set()).add(report.node_id)
        for node in (report.node_id, *report.node_ids):
            if node:
                by_name.setdefault(node, set()).add(node)
    for node, address in desired.drained_nodes.items():
        by_name.setdefault(node, set()).add(node)
        if address:
            by_name.setdefault(address, set()).add(node)
    found = by_name.get(name, set())
    if len(found) == 1:
        return next(iter(found))
    if found:
        raise InvalidInput(
            f"node: found {name}, which several nodes have: {', '.join(sorted(found))}; write one "
            "of these ids"
        )
    known = ", ".join(sorted(name for name in by_name if name)) or "none"
    raise InvalidInput(
        f"node: found {name}; no worker is on it. Nodes with workers, or drained: {known}"
    )


def check_drain(
    desired: DesiredState, node: str, reports: Sequence[WorkerReport], living: Sequence[RayNode]
) -> None:
    """Raises: InvalidInput: without the node nobody would prefill, or nobody decode: all that do
    are on it, and no other living node could take one that does."""
    rest = [one.facts for one in living if one.id != node]
    for is_prefill, what in ((True, "prefill"), (False, "decode")):
        serving = [
            report
            for report in reports
            if (report.role is Role.PREFILL) is is_prefill and report.state in _SERVES
        ]
        if not serving or any(node not in (r.node_id, *r.node_ids) for r in serving):
            continue
        asked = [
            (pool.name, request_of(pool, tuple(desired.drained_nodes)))
            for pool in desired.serving.pools
            if pool.replicas.initial > 0 and pool.name in {report.id.pool for report in serving}
        ]
        if not living or not asked or any(could_take(request, rest) for _, request in asked):
            continue
        lacks = "; ".join(f"{name} {explain_unplaceable(request, rest)}" for name, request in asked)
        raise InvalidInput(
            f"node: found {node}; all that {what} are on it, and "
            + (f"no other could take one ({lacks})" if rest else "there is no other node")
            + f", so nobody would {what}; add a node first, or `--force` (may_end_service)"
        )


def _scaled(desired: DesiredState, ask: Scale) -> DesiredState:
    pool = _pool(desired, ask.pool)
    least, most = pool.replicas.min, pool.replicas.max
    if not least <= ask.replicas <= most:
        is_over = ask.replicas > most
        bound = f"at most {most} (replicas.max)" if is_over else f"at least {least} (replicas.min)"
        raise InvalidInput(
            f"replicas of {ask.pool}: found {ask.replicas}; the topology allows {bound}; change it "
            "there and `pdcluster apply FILE`, or ask for a number within"
        )
    if ask.replicas == 0 and not _others_decode(desired, pool):
        raise InvalidInput(
            f"replicas of {ask.pool}: found 0; no other pool decodes, so nobody would answer; "
            "`pdcluster down` ends the cluster"
        )
    serving = rollout.with_replicas(desired.serving, {ask.pool: ask.replicas})
    return _with_fit_roles(desired.model_copy(update={"serving": serving, "grace_s": ask.grace_s}))


def _others_decode(desired: DesiredState, pool: PoolSpec) -> bool:
    if pool.role is Role.PREFILL:
        return True
    return any(
        other.role is not Role.PREFILL and other.replicas.initial > 0
        for other in desired.serving.pools
        if other.name != pool.name
    )


def _with_role(
    desired: DesiredState, ask: ChangeRole, reports: Sequence[WorkerReport]
) -> DesiredState:
    report = worker_of(ask.worker, reports)
    name, pool = report.id.name, _pool(desired, report.id.pool)
    if ask.role not in roles.OTHER:
        raise InvalidInput(f"role of {name}: found {ask.role}; write prefill or decode")
    if desired.role_of(report.id) is ask.role and report.role is ask.role:
        return desired
    never = roles.why_never(desired.serving, pool.name)
    if never:
        raise InvalidInput(f"role of {name}: found {ask.role}; it cannot change: {never}")
    why = roles.why_restart(desired.serving, pool.name)
    if why and not ask.may_restart:
        raise InvalidInput(
            f"role of {name}: found {ask.role}; that takes a new start of its engine: {why}; "
            "if that is what you want, `--restart` (may_restart)"
        )
    if report.state is not WorkerState.READY and not why:
        raise InvalidInput(
            f"role of {name}: it is {report.state}; only a ready worker changes its role without "
            "a new start; wait until it is"
        )
    if ask.role is Role.PREFILL and not _can_still_answer(reports, report):
        raise InvalidInput(
            f"role of {name}: found prefill; it is the only one ready that decodes, so nobody "
            "would answer; first have another one decode: `pdcluster scale` or `pdcluster role`"
        )
    wanted = {**desired.roles, name: ask.role}
    return _with_fit_roles(desired.model_copy(update={"roles": wanted, "grace_s": ask.grace_s}))


def _can_still_answer(reports: Sequence[WorkerReport], leaving: WorkerReport) -> bool:
    return any(
        report.role is not Role.PREFILL and report.state is WorkerState.READY
        for report in reports
        if report.id != leaving.id
    )


def _with_node(
    desired: DesiredState, ask: ReturnNode, reports: Sequence[WorkerReport]
) -> DesiredState:
    node = node_of(ask.node, desired, reports)
    if node not in desired.drained_nodes:
        listed = ", ".join(desired.drained_nodes) or "none"
        raise InvalidInput(f"node: found {ask.node}, which is not drained; drained are: {listed}")
    rest = {other: at for other, at in desired.drained_nodes.items() if other != node}
    return desired.model_copy(update={"drained_nodes": rest})


def _applied(desired: DesiredState, ask: Apply, change: int) -> DesiredState:
    planned = rollout.plan(desired, ask.serving)
    if planned.refused:
        raise InvalidInput("\n".join(map(str, planned.refused)))
    after = _with_fit_roles(
        rollout.target(desired, ask.serving).model_copy(update={"grace_s": ask.grace_s})
    )
    pools = rollout.rolled(desired, after)
    running = desired.rollout
    if not pools:
        return after
    # One that takes the place of another that is under way goes back to where that began.
    before = running.before if running is not None else desired.serving
    pools = tuple(dict.fromkeys((*pools, *(running.pools if running is not None else ()))))
    known = {pool.name for pool in after.serving.pools}
    begun = Rollout(
        change=change,
        pools=tuple(name for name in pools if name in known),
        before=before,
        surge=ask.surge,
    )
    return after.model_copy(update={"rollout": begun})


def _with_fit_roles(desired: DesiredState) -> DesiredState:
    """Without roles of workers that are not wanted any more; and where those that are left would
    leave nobody to decode, or to prefill, the lent ones of that kind return to their own role."""
    fit = roles.without_stale(desired.roles, desired.serving)
    wanted = {
        WorkerId(pool.name, index).name: pool.role
        for pool in desired.serving.pools
        for index in PoolWanted(
            pool.name, pool.replicas.initial, pool.replicas.max, roles.lent(fit, pool.name)
        ).indices
    }
    fit = {name: role for name, role in fit.items() if name in wanted}
    for own in roles.OTHER:
        has_own = own in wanted.values()
        if has_own and own not in {fit.get(name, role) for name, role in wanted.items()}:
            fit = {name: role for name, role in fit.items() if wanted[name] is not own}
    return desired.model_copy(update={"roles": fit})


def _pool(desired: DesiredState, name: str) -> PoolSpec:
    pool = desired.pool(name)
    if pool is None:
        fix = did_you_mean(name, [pool.name for pool in desired.serving.pools])
        raise InvalidInput(f"pool: found {name}; {fix}")
    return pool
