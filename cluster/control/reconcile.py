"""Reconcile pools. In: pools wanted, workers observed, the history of each slot, now. Out: actions.

A slot is a place in a pool (pool, index). Each start in it gets a new generation; it holds one
worker, or two while one is being replaced. Called by: control.loop at every tick. Pure: sends
nothing, reads no clock.

    slot empty,  wanted,  pause over   ─▶ Start
    worker FAILED, HUNG or vanished    ─▶ Remove, and the slot pauses before its next Start
    worker READY but ill (`ill`)       ─▶ Replace: it drains, and its slot pauses as after a failure
    worker STOPPED                     ─▶ Remove
    worker that no node has taken, and that other nodes might now (`misplaced`)
                                       ─▶ Remove; the next Start asks anew
    worker not wanted                  ─▶ Drain; the highest index of a pool goes first
    worker outdated (`outdated`)       ─▶ Start the next generation beside it; once that is ready,
                                          Drain it. One slot of a pool at a time.
    worker in another role than wanted ─▶ Flip
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from cluster.identity import Role, WorkerId, WorkerState
from cluster.topology.schema import HealthSpec

SlotKey = tuple[str, int]

# A replacement that finds no room for this long takes the place of the worker that it replaces.
NO_ROOM_AFTER_S = 10.0
# A new worker has shown nothing yet by being ready for a moment.
PROVEN_AFTER_S = 3.0


@dataclass(frozen=True, slots=True)
class Slot:
    """What a slot has been through. Times are the controller's monotonic seconds."""

    generation: int = 0  # of its latest start; 0: none yet
    failures: int = 0  # in a row
    not_before_s: float = 0.0
    why: str = ""  # of the latest failure


@dataclass(frozen=True, slots=True)
class PoolWanted:
    """`replicas` are wanted; at no time may more than `most` exist, and one more while one is
    being replaced.

    `kept`: indices that go last when replicas are too many (workers that serve in another role).
    `surge` False: a worker to be replaced ends before the next one starts.
    `may_retire` False: outdated workers stay for now, also where the next one is ready."""

    name: str
    replicas: int
    most: int
    kept: frozenset[int] = frozenset()
    surge: bool = True
    may_retire: bool = True

    @property
    def indices(self) -> frozenset[int]:
        """The slots that are to have a worker: those kept, then the lowest."""
        count = min(self.replicas, self.most)
        kept = sorted(self.kept)[:count]
        others = (index for index in range(count + len(kept)) if index not in self.kept)
        return frozenset([*kept, *(next(others) for _ in range(count - len(kept)))])


@dataclass(frozen=True, slots=True)
class Observed:
    """One worker as last seen. `is_gone`: its actor is dead, whatever its last state was."""

    id: WorkerId
    state: WorkerState
    ready_for_s: float = 0.0
    is_gone: bool = False
    message: str = ""
    outdated: str = ""  # why it is to be replaced; "": it need not be
    must_go: bool = False  # if outdated: also where nothing can take its place
    ill: str = ""  # what speaks against it, though it lives; "": nothing
    misplaced: str = ""  # why it is to be asked for anew, having no node yet
    unplaced_for_s: float = 0.0  # since its start, if no node has taken it yet
    flips_to: Role | None = None  # the role it is to serve in, if unlike the present one

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

    @property
    def is_leaving(self) -> bool:
        return (
            self.has_stopped
            or self.has_failed
            or self.state is WorkerState.DRAINING
            or bool(self.misplaced)
        )

    @property
    def is_ill(self) -> bool:
        return bool(self.ill) and self.state is WorkerState.READY and not self.is_gone

    @property
    def is_proven(self) -> bool:
        return self.state is WorkerState.READY and self.ready_for_s >= PROVEN_AFTER_S


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
class Replace:
    """Let a worker that is ill end soon; what it has goes on elsewhere, and its slot pauses."""

    worker: WorkerId
    why: str
    slot: Slot  # the slot afterwards


@dataclass(frozen=True, slots=True)
class Remove:
    """End what is left of the worker, without grace."""

    worker: WorkerId
    why: str
    slot: Slot  # the slot afterwards


@dataclass(frozen=True, slots=True)
class Flip:
    """Let the worker finish what it has, then serve in another role, without a new start."""

    worker: WorkerId
    role: Role
    why: str


Action = Start | Drain | Replace | Remove | Flip


def reconcile(
    pools: Sequence[PoolWanted],
    observed: Sequence[Observed],
    slots: Mapping[SlotKey, Slot],
    health: HealthSpec,
    now_s: float,
) -> tuple[Action, ...]:
    """The steps towards `pools` that can be taken now. At most one per worker."""
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
    actions: list[Action] = _removals(observed, slots, health, now_s)
    by_index: dict[int, list[Observed]] = {}
    for worker in observed:
        by_index.setdefault(worker.id.index, []).append(worker)
    staying = 0
    for index in sorted(by_index, reverse=True):
        alive = [worker for worker in by_index[index] if not worker.is_leaving]
        if index in pool.indices:
            ill = [worker for worker in alive if worker.is_ill]
            actions += [_replace(worker, slots, health, now_s) for worker in ill]
            alive = [worker for worker in alive if worker not in ill]
            leaving = _replaced(pool, alive)
        else:
            leaving = {
                worker: f"the pool wants {min(pool.replicas, pool.most)}" for worker in alive
            }
        actions += [Drain(worker.id, why) for worker, why in leaving.items()]
        for worker in alive:
            if worker in leaving:
                continue
            staying += 1
            if worker.flips_to is not None and worker.state is WorkerState.READY:
                why = f"it is to serve as {worker.flips_to}"
                actions.append(Flip(worker.id, worker.flips_to, why))
    actions += _starts(pool, by_index, slots, now_s)
    actions += _replacement(pool, by_index, slots, now_s, actions)
    return actions


def _removals(
    observed: list[Observed],
    slots: Mapping[SlotKey, Slot],
    health: HealthSpec,
    now_s: float,
) -> list[Action]:
    newest: dict[SlotKey, WorkerId] = {}
    for worker in sorted(observed, key=lambda worker: worker.id):
        newest[worker.slot] = worker.id
    actions: list[Action] = []
    for worker in sorted(observed, key=lambda worker: worker.id, reverse=True):
        slot = slots.get(worker.slot, Slot(generation=worker.id.generation))
        if worker.has_failed:
            why = _why_failed(worker)
            if newest[worker.slot] == worker.id:
                slot = after_failure(slot, worker.ready_for_s, health, now_s, why)
            actions.append(Remove(worker.id, why, slot))
        elif worker.has_stopped:
            actions.append(Remove(worker.id, "it has stopped", slot))
        elif worker.misplaced:
            actions.append(Remove(worker.id, worker.misplaced, slot))
    return actions


def _keeper(alive: Sequence[Observed]) -> Observed | None:
    """Of a slot's workers, the one that is to stay: of those that need no replacement the newest,
    else one that is ready."""
    return max(
        alive,
        key=lambda w: (not w.outdated, bool(w.outdated) and w.state is WorkerState.READY, w.id),
        default=None,
    )


def _replaced(pool: PoolWanted, alive: list[Observed]) -> dict[Observed, str]:
    """Workers of one wanted slot that another has taken the place of, and why they go."""
    keeper = _keeper(alive)
    if keeper is None:
        return {}
    others = [worker for worker in sorted(alive, key=lambda w: w.id) if worker is not keeper]
    if keeper.outdated:
        return dict.fromkeys(others, "it was replaced")
    leaving: dict[Observed, str] = {}
    for worker in others:
        if not worker.outdated:
            leaving[worker] = "it was replaced"
        elif worker.state is not WorkerState.READY:
            leaving[worker] = worker.outdated  # it serves nobody
        elif keeper.unplaced_for_s > NO_ROOM_AFTER_S and pool.may_retire:
            leaving[worker] = f"{worker.outdated}; there is no room for another beside it"
        elif keeper.is_proven and pool.may_retire:
            leaving[worker] = worker.outdated
    return leaving


def _starts(
    pool: PoolWanted,
    by_index: Mapping[int, list[Observed]],
    slots: Mapping[SlotKey, Slot],
    now_s: float,
) -> list[Action]:
    """Workers for slots that are empty."""
    room = pool.most - sum(map(len, by_index.values()))
    actions: list[Action] = []
    for index in sorted(pool.indices):
        slot = slots.get((pool.name, index), Slot())
        if room <= 0:
            break
        if index in by_index or now_s < slot.not_before_s:
            continue
        room -= 1
        why = f"restart after: {slot.why}" if slot.failures else f"the pool wants {pool.replicas}"
        actions.append(_start(pool.name, index, slot, why))
    return actions


def _replacement(
    pool: PoolWanted,
    by_index: Mapping[int, list[Observed]],
    slots: Mapping[SlotKey, Slot],
    now_s: float,
    others: Sequence[Action],
) -> list[Action]:
    """The next step for an outdated worker: at most one of a pool at a time, and none while
    something else is under way in it. A replacement that waits for room holds up none that must
    go: on a drained node the others would stay for as long as there is no room elsewhere."""
    if any(isinstance(action, Start | Replace) for action in others):
        return []
    due: list[Observed] = []
    waits_for_room = False
    for index in sorted(pool.indices & by_index.keys()):
        if any(worker.is_leaving for worker in by_index[index]):
            return []
        keeper = _keeper(by_index[index])
        assert keeper is not None
        if keeper.outdated:
            due.append(keeper)
        elif keeper.unplaced_for_s > NO_ROOM_AFTER_S and len(by_index[index]) == 1:
            waits_for_room = True
        elif keeper.state is not WorkerState.READY or len(by_index[index]) > 1:
            return []  # it starts, or its predecessor is about to go
    due = [
        worker
        for worker in due
        if now_s >= slots.get(worker.slot, Slot()).not_before_s
        and (worker.must_go or not waits_for_room)
    ]
    if not due:
        return []
    # What serves nobody goes first.
    worker = min(due, key=lambda w: (w.state is WorkerState.READY, w.id))
    if not pool.surge:
        return [Drain(worker.id, worker.outdated)]
    if sum(map(len, by_index.values())) > pool.most:
        return []
    slot = slots.get(worker.slot, Slot(generation=worker.id.generation))
    return [_start(pool.name, worker.id.index, slot, f"instead of {worker.id}: {worker.outdated}")]


def _replace(
    worker: Observed, slots: Mapping[SlotKey, Slot], health: HealthSpec, now_s: float
) -> Replace:
    slot = slots.get(worker.slot, Slot(generation=worker.id.generation))
    slot = after_failure(slot, worker.ready_for_s, health, now_s, worker.ill)
    return Replace(worker.id, worker.ill, slot)


def _start(pool: str, index: int, slot: Slot, why: str) -> Start:
    generation = slot.generation + 1
    return Start(WorkerId(pool, index, generation), why, replace(slot, generation=generation))


def _why_failed(worker: Observed) -> str:
    if worker.is_gone:
        return worker.message or "its actor is gone"
    return worker.message or f"it is {worker.state}"
