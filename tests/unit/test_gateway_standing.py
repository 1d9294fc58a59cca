"""cluster.gateway.standing: what a replica notes of how its workers serve."""

from __future__ import annotations

import pytest

from cluster.errors import EngineFailed
from cluster.gateway.errors import EngineLost
from cluster.gateway.recovery import Cause, Ended, Stage
from cluster.gateway.route import Route
from cluster.gateway.standing import Standings
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import WorkerView


def view(pool: str, role: Role) -> WorkerView:
    id_ = WorkerId(pool, 0, 1)
    return WorkerView(id_, role, "i", WorkerState.READY, "http://x:1", None, 10, 1)


P, D = view("p", Role.PREFILL), view("d", Role.DECODE)
FED, ALONE = Route(D, "disaggregated", P), Route(D, "local-prefill")
PRESENT = frozenset({P.id, D.id})


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def standings(clock: Clock) -> Standings:
    return Standings(clock)


def ended(error=None, stage=Stage.DECODE, cause=Cause.FAILED, **more) -> Ended:
    return Ended(cause, stage, error or EngineFailed("d/0", 500, "oh no"), **more)


def kept(standings: Standings) -> dict[str, list[tuple[int, str]]]:
    found = standings.standings(PRESENT)
    return {one.worker: [(f.request, f.peer) for f in one.failures] for one in found}


def fail(standings: Standings, route, request=1, is_proven=True, stage=Stage.DECODE) -> None:
    blame = standings.blame(route, ended(stage=stage))
    assert blame is not None
    standings.failed([blame], request, is_proven)


def test_a_failed_pull_is_noted_of_both_ends_and_any_other_failure_of_one(standings: Standings):
    fail(standings, FED, 1)
    fail(standings, ALONE, 2)
    fail(standings, FED, 3, stage=Stage.PREFILL)
    assert kept(standings) == {"d/0#1": [(1, "p/0#1"), (2, "")], "p/0#1": [(1, "d/0#1"), (3, "")]}


@pytest.mark.parametrize(
    "end",
    [
        ended(EngineFailed("d/0", 429, "busy")),
        ended(EngineFailed("d/0", 503, "full")),
        ended(EngineFailed("d/0", None, "in the middle of its answer")),
        ended(EngineLost("d/0", 500, "EngineCore encountered an issue")),
        ended(cause=Cause.DRAINED),
        ended(cause=Cause.HUNG),
    ],
)
def test_what_is_not_a_living_engines_server_error_is_noted_of_nobody(standings, end):
    assert standings.blame(FED, end) is None


def test_an_answer_ends_what_was_noted_and_one_without_a_pull_leaves_the_pulls(
    standings: Standings, clock: Clock
):
    fail(standings, FED, 1)
    fail(standings, ALONE, 2)
    clock.now_s = 101.0
    standings.answered(ALONE)
    assert kept(standings) == {"d/0#1": [(1, "p/0#1")], "p/0#1": [(1, "d/0#1")]}
    standings.answered(FED)
    assert kept(standings) == {"d/0#1": [], "p/0#1": []}
    assert {(s.answered_at_s, s.pulled_at_s) for s in standings.standings(PRESENT)} == {(101, 101)}


def test_the_same_request_is_one_failure_and_proven_once_it_was_answered(standings, clock):
    fail(standings, ALONE, 1, is_proven=True)
    clock.now_s = 130.0
    fail(standings, ALONE, 1, is_proven=False)
    ((failure,),) = [one.failures for one in standings.standings(PRESENT)]
    assert (failure.first_at_s, failure.last_at_s, failure.is_proven) == (100.0, 130.0, True)


def test_failures_are_bounded_and_the_oldest_and_the_newest_stay(standings: Standings):
    for request in range(1000):
        fail(standings, ALONE, request)
    requests = [request for request, _ in kept(standings)["d/0#1"]]
    assert len(requests) < 50
    assert (requests[0], requests[-1]) == (0, 999)


def test_workers_that_are_gone_are_forgotten(standings: Standings):
    fail(standings, FED)
    assert {one.worker for one in standings.standings(frozenset({D.id}))} == {"d/0#1"}
    assert {one.worker for one in standings.standings(PRESENT)} == {"d/0#1"}
