"""How far a change has got. In: the ask, what is wanted, what is seen. Out: done, failed, or what
it waits for. Pure; asked at every tick: a restarted controller goes on where the last one stopped.

Called by: control.history.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from cluster.control import rollout
from cluster.control.changes import (
    Apply,
    Ask,
    ChangeRole,
    ChangeState,
    DrainNode,
    DrainWorker,
    Scale,
)
from cluster.control.reconcile import Slot, SlotKey
from cluster.control.state import DesiredState
from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.report import WorkerReport

# Workers that find no room this long after they were asked for are told of as missing.
MISSED_AFTER_S = 15.0
# A worker that fails this often in a row is not waited for.
FAILURES_WAITED_FOR = 2
_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Seen:
    """The cluster at one moment. `now_s`: wall clock. `failed_before`: how often in a row each slot
    (POOL/INDEX) had failed when the change was asked for; that is not the change's fault."""

    desired: DesiredState
    reports: Sequence[WorkerReport]
    slots: Mapping[SlotKey, Slot] = field(default_factory=dict)
    last_words: Mapping[SlotKey, tuple[str, ...]] = field(default_factory=dict)
    now_s: float = 0.0
    failed_before: Mapping[str, int] = field(default_factory=dict)

    def failures(self, key: SlotKey) -> int:
        """How often a slot has failed since the change was asked for."""
        now, before = self.slots[key].failures, self.failed_before.get(f"{key[0]}/{key[1]}", 0)
        return now - before if now >= before else now

    def of(self, pool: str) -> list[WorkerReport]:
        return [report for report in self.reports if report.id.pool == pool]


@dataclass(frozen=True, slots=True)
class Outlook:
    """What `look` finds. `text`: what RUNNING waits for, or why it FAILED or was REPLACED."""

    state: ChangeState
    text: str = ""


_DONE = Outlook(ChangeState.DONE)


def look(ask: Ask, target: str, asked_at_s: float, seen: Seen) -> Outlook:
    """`target`: the generation of the worker, or the id of the node, that the ask was about when it
    was granted; "" else."""
    if isinstance(ask, Scale):
        return _scale(ask, asked_at_s, seen)
    if isinstance(ask, ChangeRole):
        return _role(ask, seen)
    if isinstance(ask, DrainWorker):
        return _drain_worker(WorkerId.parse(target), asked_at_s, seen)
    if isinstance(ask, DrainNode):
        return _drain_node(target, seen)
    if isinstance(ask, Apply):
        return _apply(ask, asked_at_s, seen)
    return _DONE


def _scale(ask: Scale, asked_at_s: float, seen: Seen) -> Outlook:
    pool = seen.desired.pool(ask.pool)
    if pool is None or pool.replicas.initial != ask.replicas:
        return Outlook(ChangeState.REPLACED, "another number of replicas was asked for meanwhile")
    return _whole([ask.pool], asked_at_s, seen)


def _role(ask: ChangeRole, seen: Seen) -> Outlook:
    wanted = WorkerId.parse(ask.worker)
    if seen.desired.pool(wanted.pool) is None or seen.desired.role_of(wanted) is not ask.role:
        return Outlook(ChangeState.REPLACED, "another role was asked for meanwhile")
    mine = [report for report in seen.reports if report.id.name == wanted.name]
    if any(r.role is ask.role and r.state is WorkerState.READY for r in mine):
        others = [r for r in mine if r.role is not ask.role]
        return _waits(others) if others else _DONE
    failed = _failed(seen, wanted.pool, wanted.index)
    if failed:
        return failed
    return _waits(mine) if mine else _waiting(f"{wanted.name} to be started again")


def _drain_worker(worker: WorkerId, asked_at_s: float, seen: Seen) -> Outlook:
    mine = [report for report in seen.reports if report.id == worker]
    if mine:
        return _waits(mine)
    return _whole([worker.pool], asked_at_s, seen)


def _drain_node(node: str, seen: Seen) -> Outlook:
    if node not in seen.desired.drained_nodes:
        return Outlook(ChangeState.REPLACED, "the node was returned meanwhile")
    left = [report for report in seen.reports if node in (report.node_id, *report.node_ids)]
    return _waits(left) if left else _DONE


def _apply(ask: Apply, asked_at_s: float, seen: Seen) -> Outlook:
    if rollout.target(seen.desired, ask.serving).serving != seen.desired.serving:
        return Outlook(ChangeState.REPLACED, "something else was asked for meanwhile")
    gone = {report.id.pool for report in seen.reports} - {p.name for p in ask.serving.pools}
    left = [report for report in seen.reports if report.id.pool in gone]
    if left:
        return _waits(left)
    if seen.desired.rollout is not None:
        rolling = seen.desired.rollout.pools
        old = [r for r in seen.reports if rollout.is_outdated(seen.desired, r)]
        fresh = [
            r
            for r in seen.reports
            if r.id.pool in rolling and r not in old and r.state is not WorkerState.READY
        ]
        names = ", ".join(sorted({report.id.name for report in old}))
        text = _words(fresh) or (f"{names} to be replaced" if names else "")
        return _waiting(text or "the last new worker to prove itself")
    return _whole([pool.name for pool in ask.serving.pools], asked_at_s, seen)


def _whole(pools: Sequence[str], asked_at_s: float, seen: Seen) -> Outlook:
    """Whether pools have just the workers they want, all ready."""
    going: list[WorkerReport] = []
    coming: list[WorkerReport] = []
    missing = 0
    for name in pools:
        pool = seen.desired.pool(name)
        wanted = pool.replicas.initial if pool is not None else 0
        mine = seen.of(name)
        ready = [r for r in mine if r.state in (WorkerState.READY, WorkerState.CHANGING)]
        leaving = [r for r in mine if r.state in (WorkerState.DRAINING, WorkerState.STOPPED)]
        going += leaving
        coming += [r for r in mine if r not in ready and r not in leaving]
        if len(ready) > wanted:  # one will be told to go at the next tick
            going += ready[wanted:]
        missing += max(0, wanted - len(ready))
        if len(ready) < wanted:
            failed = _failed(seen, name, None)
            if failed:
                return failed
    if not going and not missing:
        return _DONE if not coming else _waits(coming)
    placed = [report for report in coming if report.node_ip]
    unplaced = [report for report in coming if not report.node_ip]
    is_late = seen.now_s - asked_at_s > MISSED_AFTER_S
    if unplaced and not placed and not going and len(unplaced) >= missing and is_late:
        # They differ in nothing but their number.
        why = f"no room for {_names(unplaced)}: {unplaced[0].message}"
        return Outlook(ChangeState.FAILED, f"{why}; they start as soon as there is room")
    if not (going or coming):
        return _waiting(f"{missing} more to be started")
    return _waits([*going, *coming])


def _failed(seen: Seen, pool: str, index: int | None) -> Outlook | None:
    spec = seen.desired.pool(pool)
    serving = {(r.id.pool, r.id.index) for r in seen.reports if r.state is WorkerState.READY}
    for (name, at), slot in sorted(seen.slots.items()):
        if name != pool or (index is not None and at != index):
            continue
        if (name, at) in serving or (spec is not None and at >= spec.replicas.initial):
            continue  # it failed before, and is back, or not wanted any more
        failures = seen.failures((name, at))
        if failures >= FAILURES_WAITED_FOR:
            words = seen.last_words.get((name, at), ())
            last = f"; its last words: {words[-1]}" if words else ""
            why = f"{name}/{at} failed {failures} times in a row: {slot.why}{last}"
            return Outlook(ChangeState.FAILED, why)
    return None


def _waits(workers: Sequence[WorkerReport]) -> Outlook:
    return _waiting(_words(workers))


def _waiting(text: str) -> Outlook:
    return Outlook(ChangeState.RUNNING, text)


def _names(workers: Sequence[WorkerReport]) -> str:
    more = len(workers) - _SHOWN
    shown = ", ".join(worker.id.name for worker in workers[:_SHOWN])
    return f"{shown} and {more} more" if more > 0 else shown


def _words(workers: Sequence[WorkerReport]) -> str:
    said = [
        f"{worker.id.name} ({worker.state}{f': {worker.message}' if worker.message else ''})"
        for worker in workers[:_SHOWN]
    ]
    more = len(workers) - _SHOWN
    return ", ".join(said) + (f" and {more} more" if more > 0 else "")


def ready_by_role(reports: Sequence[WorkerReport]) -> dict[Role, int]:
    """How many workers serve in each role."""
    found = dict.fromkeys(Role, 0)
    for report in reports:
        if report.state is WorkerState.READY:
            found[report.role] += 1
    return found
