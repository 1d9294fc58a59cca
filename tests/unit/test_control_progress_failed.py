"""When a change is given up: a worker fails again and again, or finds no room."""

from __future__ import annotations

from control_world import desired

from cluster.control.changes import ChangeState, Scale
from cluster.control.progress import FAILURES_WAITED_FOR, MISSED_AFTER_S, Seen, look
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


def test_of_a_pool_that_finds_no_room_those_that_have_ended_are_not_named():
    def without_room(*states: WorkerState) -> Seen:
        reports = [
            WorkerReport(WorkerId("d", index, 1), Role.DECODE, state, "needs CPU", "", "", 0.0)
            for index, state in enumerate(states)
        ]
        return Seen(desired(prefill=1, decode=1), reports, now_s=MISSED_AFTER_S + 1)

    ended = without_room(WorkerState.STARTING, WorkerState.STOPPED)
    assert look(Scale("d", 1), "", 0.0, ended).state is ChangeState.RUNNING
    found = look(Scale("d", 1), "", 0.0, without_room(WorkerState.STARTING))
    assert found.state is ChangeState.FAILED
    assert found.text.startswith("no room for d/0: needs CPU")
