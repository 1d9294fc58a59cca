"""When a change is given up because a worker fails again and again."""

from __future__ import annotations

from control_world import desired

from cluster.control.changes import ChangeState, Scale
from cluster.control.progress import FAILURES_WAITED_FOR, Seen, look
from cluster.control.reconcile import Slot
from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.report import WorkerReport

CRASHED = Slot(generation=3, failures=FAILURES_WAITED_FOR, why="exit code 1")


def seen(index: int = 0, **states: WorkerState) -> Seen:
    """The decode pool wants two; `states` by index."""
    reports = [
        WorkerReport(WorkerId("d", int(name[1:]), 3), Role.DECODE, state, "", "127.0.0.1", "", 0.0)
        for name, state in states.items()
    ]
    return Seen(desired(prefill=1, decode=2), reports, {("d", index): CRASHED}, {}, 1.0)


def test_a_change_is_given_up_over_a_worker_that_fails_again_and_again():
    found = look(Scale("d", 2), "", 0.0, seen(d0=WorkerState.STARTING, d1=WorkerState.READY))
    assert found.state is ChangeState.FAILED
    assert "d/0 failed 2 times in a row: exit code 1" in found.text


def test_a_worker_that_failed_before_and_is_back_is_held_against_no_change():
    found = look(Scale("d", 2), "", 0.0, seen(d0=WorkerState.READY, d1=WorkerState.STARTING))
    assert found.state is ChangeState.RUNNING
    found = look(Scale("d", 2), "", 0.0, seen(d0=WorkerState.READY, d1=WorkerState.READY))
    assert found.state is ChangeState.DONE


def test_a_worker_that_is_wanted_no_more_is_held_against_no_change():
    found = look(Scale("d", 2), "", 0.0, seen(5, d0=WorkerState.READY, d1=WorkerState.STARTING))
    assert found.state is ChangeState.RUNNING
