"""Events, counted for Prometheus. In: each event, as it is emitted. Out: ControllerMetrics.

A counter begins at 0 with its controller, as Prometheus expects of a process that was restarted.
Called by: control.loop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from cluster.control.changes import KINDS, ChangeState
from cluster.control.events import (
    ChangeEnded,
    Event,
    RoleChanged,
    WorkerDraining,
    WorkerMoved,
    WorkerRemoved,
    WorkerStarted,
)
from cluster.control.reconcile import SlotKey
from cluster.identity import Role, WorkerId, WorkerState
from cluster.observe.controller_metrics import ControllerMetrics


class Counted:
    """`kind_of`: the kind of the change with this id. `now_s`: monotonic seconds."""

    def __init__(
        self,
        metrics: ControllerMetrics,
        kind_of: Callable[[int], str],
        now_s: Callable[[], float],
    ) -> None:
        self._metrics = metrics
        self._kind_of = kind_of
        self._now_s = now_s
        self._failed: set[SlotKey] = set()  # whose next worker is a restart
        self._starting: dict[WorkerId, float] = {}  # when each was started

    def know(self, pools: Sequence[str]) -> None:
        """Have the counters of these pools, and those of changes, shown from 0: a rate needs two
        values, and what is counted first would be missing from it."""
        for pool in pools:
            for counter in (self._metrics.starts, self._metrics.restarts, self._metrics.drains):
                counter.labels(pool)
            self._metrics.time_to_ready_s.labels(pool)
            for role in Role:
                self._metrics.role_changes.labels(pool, role.value)
        for kind in KINDS:
            for state in ChangeState:
                if state is not ChangeState.RUNNING:
                    self._metrics.changes.labels(kind, state.value)

    def take(self, event: Event) -> None:
        match event:
            case WorkerStarted(worker=worker):
                self._started(worker)
            case WorkerMoved(worker=worker, now=WorkerState.READY):
                began_s = self._starting.pop(worker, None)
                # Absent: it was ready before, or another controller started it.
                if began_s is not None:
                    took_s = self._now_s() - began_s
                    self._metrics.time_to_ready_s.labels(worker.pool).observe(took_s)
            case WorkerDraining(worker=worker):
                self._metrics.drains.labels(worker.pool).inc()
            case WorkerRemoved(worker=worker, restart_in_s=restart_in_s):
                self._starting.pop(worker, None)
                if restart_in_s is not None:
                    self._failed.add((worker.pool, worker.index))
            case RoleChanged(worker=worker, now=role):
                self._metrics.role_changes.labels(worker.pool, role.value).inc()
            case ChangeEnded(change=change, state=state):
                self._metrics.changes.labels(self._kind_of(change), state).inc()
            case _:
                pass

    def _started(self, worker: WorkerId) -> None:
        self._starting[worker] = self._now_s()
        self._metrics.starts.labels(worker.pool).inc()
        slot = (worker.pool, worker.index)
        if slot in self._failed:
            self._failed.discard(slot)
            self._metrics.restarts.labels(worker.pool).inc()
