"""Which workers a new snapshot lets go of, and who is told."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.gateway.fleet import Fleet
from cluster.gateway.leaving import Leaving, Why, leavings, to_drop
from cluster.gateway.route import Facts
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Snapshot, WorkerView

DECODE = WorkerView(
    WorkerId("d", 0, 3), Role.DECODE, "i", WorkerState.READY, "http://d-0:1", None, 1000, 1
)
OTHER = replace(DECODE, id=WorkerId("d", 1, 3), url="http://d-1:1")


def snapshot(*workers: WorkerView) -> Snapshot:
    return Snapshot(1, "c", "m", workers)


BEFORE = snapshot(DECODE, OTHER)
DRAINING = replace(DECODE, state=WorkerState.DRAINING)
NEXT = replace(DECODE, id=WorkerId("d", 0, 4), url="http://d-0:2")


@pytest.mark.parametrize(
    ("after", "why", "is_dropped"),
    [
        (DECODE, None, False),
        (DRAINING, None, False),  # it has time left
        (replace(DRAINING, lets_go=True), Why.DRAINED, False),
        (replace(DECODE, state=WorkerState.CHANGING, lets_go=True), Why.DRAINED, False),
        (replace(DECODE, state=WorkerState.HUNG), Why.HUNG, True),
        (replace(DECODE, state=WorkerState.HUNG, lets_go=True), Why.HUNG, True),
        (replace(DECODE, state=WorkerState.STOPPED, lets_go=True), Why.STOPPED, True),
        (replace(DECODE, state=WorkerState.FAILED), Why.GONE, True),
        (NEXT, Why.GONE, True),
        (replace(NEXT, url=DECODE.url), Why.GONE, False),  # another engine at the same address
    ],
)
def test_what_a_snapshot_says_of_a_worker_decides(after, why, is_dropped):
    then = snapshot(after, OTHER)
    left = leavings(BEFORE, then)
    assert left == (() if why is None else (Leaving(DECODE.id, DECODE.url, why),))
    assert to_drop(left, then) == ([DECODE.url] if is_dropped else [])


def test_a_worker_that_is_merely_missing_is_not_left():
    assert leavings(BEFORE, snapshot(OTHER)) == ()
    assert leavings(BEFORE, snapshot()) == ()


@pytest.mark.parametrize("both", [(DECODE, NEXT), (NEXT, DECODE)])
def test_a_worker_that_serves_beside_its_successor_is_not_left(both):
    assert leavings(BEFORE, snapshot(*both, OTHER)) == ()
    drained = tuple(replace(w, lets_go=w is DECODE) for w in both)
    assert [left.why for left in leavings(BEFORE, snapshot(*drained, OTHER))] == [Why.DRAINED]


def test_a_drained_worker_that_was_replaced_did_not_fail():
    before = snapshot(replace(DRAINING, lets_go=True), OTHER)
    assert leavings(before, snapshot(NEXT, OTHER))[0].why is Why.STOPPED


class Request:
    def __init__(self) -> None:
        self.told: list[tuple[WorkerId, Why]] = []

    def let_go(self, worker: WorkerId, why: Why) -> None:
        self.told.append((worker, why))


class Holds:
    def held_by_all(self, prompt_token_ids: object) -> dict[WorkerId, int]:
        return {}


def test_requests_at_work_are_told_and_others_are_not():
    fleet = Fleet(Holds(), 0, lambda: 0.0)
    fleet.update(BEFORE)
    here, there, past = Request(), Request(), Request()
    fleet.join(DECODE.id, here)
    fleet.join(OTHER.id, there)
    fleet.join(DECODE.id, past)
    fleet.part(DECODE.id, past)
    assert fleet.update(snapshot(replace(DRAINING, lets_go=True), OTHER)) == []
    assert here.told == [(DECODE.id, Why.DRAINED)]
    assert (there.told, past.told) == ([], [])
    assert fleet.update(snapshot(NEXT, OTHER)) == [DECODE.url]
    assert here.told[-1] == (DECODE.id, Why.STOPPED)


def test_a_worker_that_lets_go_takes_nothing_new_whatever_its_state():
    fleet = Fleet(Holds(), 0, lambda: 0.0)
    fleet.update(snapshot(replace(DECODE, role=Role.MIXED, lets_go=True)))
    assert fleet.route_beside(Facts(10), OTHER.id, frozenset()) is None
    fleet.update(snapshot(replace(DECODE, role=Role.MIXED)))
    assert fleet.route_beside(Facts(10), OTHER.id, frozenset()) is not None
    assert fleet.route_beside(Facts(10), DECODE.id, frozenset()) is None
