"""Reconcile pools. In: pools wanted, workers observed, the history of each slot, now. Out: actions.

A slot is a place in a pool (pool, index). It holds at most one worker; each start in it gets a
new generation. Called by: control.controller at every tick. Pure: sends nothing, reads no clock.

    slot empty,  wanted,  pause over  ─▶ Start
    worker FAILED, HUNG or vanished   ─▶ Remove, and the slot pauses before its next Start
    worker STOPPED                    ─▶ Remove
    worker not wanted                 ─▶ Drain; the highest index of a pool goes first
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.identity import WorkerId, WorkerState
from cluster.topology.schema import HealthSpec

SlotKey = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot has been through. Times are the controller's monotonic seconds."""

    generation: int = 0  # of its latest start; 0: none yet
    failures: int = 0  # in a row
    not_before_s: float = 0.0
    why: str = ""  # of the latest failure


@dataclass(frozen=True, slots=True)
class PoolWanted:
    """`replicas` are wanted; at no time may more than `most` exist."""

    name: str
    replicas: int
    most: int


@dataclass(frozen=True, slots=True)
class Observed:
    """One worker as last seen. `is_gone`: its actor is dead, whatever its last state was."""

    id: WorkerId
    state: WorkerState
    ready_for_s: float = 0.0
    is_gone: bool = False
    message: str = ""

    @property
    def slot(self) -> SlotKey:
        return (self.id.pool, self.id.index)

    @property
    def has_stopped(self) -> bool:
        """It ended because it was asked to."""
        return self.state is WorkerState.STOPPED or (
            self.is_gone and self.state is WorkerState.DRAINING
        )

    @property
    def has_failed(self) -> bool:
        return not self.has_stopped and (
            self.is_gone or self.state in (WorkerState.FAILED, WorkerState.HUNG)
        )


@dataclass(frozen=True, slots=True)
class Start:
    worker: WorkerId
    why: str
    slot: Slot  # the slot afterwards


@dataclass(frozen=True, slots=True)
class Drain:
    """Let the worker finish what it has, then stop it."""

    worker: WorkerId
    why: str


@dataclass(frozen=True, slots=True)
class Remove:
    """End what is left of the worker, without grace."""

    worker: WorkerId
    why: str
    slot: Slot  # the slot afterwards


Action = Start | Drain | Remove


def reconcile(
    pools: Sequence[PoolWanted],
    observed: Sequence[Observed],
    slots: Mapping[SlotKey, Slot],
    health: HealthSpec,
    now_s: float,
) -> tuple[Action, ...]:
    """The steps towards `pools` that can be taken now. At most one per slot."""
    wanted = {pool.name: pool for pool in pools}
    actions: list[Action] = []
    for name in sorted({worker.id.pool for worker in observed} - wanted.keys()):
        gone = PoolWanted(name, replicas=0, most=0)
        actions += _reconcile_pool(gone, _of_pool(observed, name), slots, health, now_s)
    for pool in pools:
        actions += _reconcile_pool(pool, _of_pool(observed, pool.name), slots, health, now_s)
    return tuple(actions)


def after_failure(
    slot: Slot, ready_for_s: float, health: HealthSpec, now_s: float, why: str
) -> Slot:
    """The slot's history once its worker has failed.

    A worker that had been ready for longer than the longest pause failed for a new reason: the
    count begins again."""
    failures = 1 if ready_for_s > health.restart_backoff_max_s else slot.failures + 1
    return replace(slot, failures=failures, not_before_s=now_s + pause_s(failures, health), why=why)


def pause_s(failures: int, health: HealthSpec) -> float:
    """Seconds between the last of `failures` (≥ 1) in a row and the next start."""
    # 2.0**1024 overflows; no pause doubles that often.
    doubled = health.restart_backoff_s * 2.0 ** min(failures - 1, 64)
    return min(doubled, max(health.restart_backoff_max_s, health.restart_backoff_s))


def _of_pool(observed: Iterable[Observed], pool: str) -> list[Observed]:
    return [worker for worker in observed if worker.id.pool == pool]


def _reconcile_pool(
    pool: PoolWanted,
    observed: list[Observed],
    slots: Mapping[SlotKey, Slot],
    health: HealthSpec,
    now_s: float,
) -> list[Action]:
    replicas = min(pool.replicas, pool.most)
    actions: list[Action] = []
    newest = {worker.slot: worker.id for worker in sorted(observed, key=lambda w: w.id)}
    for worker in sorted(observed, key=lambda worker: worker.id, reverse=True):
        slot = slots.get(worker.slot, Slot(generation=worker.id.generation))
        is_newest = newest[worker.slot] == worker.id
        is_wanted = is_newest and worker.id.index < replicas
        if worker.has_failed:
            why = _why_failed(worker)
            if is_newest:
                slot = after_failure(slot, worker.ready_for_s, health, now_s, why)
            actions.append(Remove(worker.id, why, slot))
        elif worker.has_stopped:
            actions.append(Remove(worker.id, "it has stopped", slot))
        elif not is_wanted and worker.state is not WorkerState.DRAINING:
            why = f"the pool wants {replicas}" if is_newest else "it was replaced"
            actions.append(Drain(worker.id, why))
    room = pool.most - len(observed)
    for index in range(replicas):
        key = (pool.name, index)
        slot = slots.get(key, Slot())
        if room <= 0:
            break
        if key in newest or now_s < slot.not_before_s:
            continue
        room -= 1
        generation = slot.generation + 1
        why = f"restart after: {slot.why}" if slot.failures else f"the pool wants {replicas}"
        actions.append(
            Start(WorkerId(pool.name, index, generation), why, replace(slot, generation=generation))
        )
    return actions


def _why_failed(worker: Observed) -> str:
    if worker.is_gone:
        return worker.message or "its actor is gone"
    return worker.message or f"it is {worker.state}"
