from __future__ import annotations

import pytest

from cluster.errors import EngineFailed
from cluster.gateway.recovery import Stage, Tries, after, attempt_budget_s
from cluster.gateway.route import Route
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Link, WorkerView


def view(pool: str, role: Role) -> WorkerView:
    return WorkerView(WorkerId(pool, 0, 1), role, "i", WorkerState.READY, "http://x:1", None, 10, 1)


P, D = view("p", Role.PREFILL), view("d", Role.DECODE)
PAIR = Route(D, "disaggregated", P, Link("p", "d", "nixl", 30.0, "recompute"))
ALONE = Route(D, "recompute:pull-failed")
BROKE = EngineFailed("x", None, "broke")
ERROR = EngineFailed("x", 500, "error")


@pytest.mark.parametrize("error", [BROKE, ERROR])
def test_failed_prefill_is_left_out_and_decode_is_not(error):
    tries = after(Tries(2), PAIR, Stage.PREFILL, error)
    assert tries.excluded == {P.id}
    assert tries.why == "prefill-failed"
    assert tries.may_prefill_elsewhere
    assert not after(tries, PAIR, Stage.PREFILL, error).may_prefill_elsewhere


def test_server_error_of_decode_that_was_to_pull_is_blamed_on_the_pull():
    tries = after(Tries(2), PAIR, Stage.DECODE, ERROR)
    assert (tries.excluded, tries.why) == ({P.id}, "pull-failed")
    assert tries.may_go_on


def test_decode_that_breaks_off_is_left_out():
    tries = after(Tries(2), PAIR, Stage.DECODE, BROKE)
    assert (tries.excluded, tries.why) == ({D.id}, "decode-failed")


def test_decode_failures_are_bounded_whatever_came_before():
    tries = Tries(2)
    for route, stage in [(PAIR, Stage.PREFILL), (PAIR, Stage.DECODE), (ALONE, Stage.DECODE)]:
        tries = after(tries, route, stage, ERROR)
    assert tries.may_go_on
    assert not after(tries, ALONE, Stage.DECODE, ERROR).may_go_on


def test_prefill_may_use_its_share_of_the_time_left():
    assert attempt_budget_s(90.0, Tries(2)) == 30.0
    assert attempt_budget_s(90.0, Tries(2, prefill_failures=1)) == 45.0
