"""What a request may still try, after all that can end an attempt."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import EngineFailed
from cluster.gateway.errors import EngineLeft, EngineLost, EngineNotReached, is_mark
from cluster.gateway.recovery import (
    Cause,
    Ended,
    Stage,
    Tries,
    after,
    attempt_budget_s,
    transfer_failure,
)
from cluster.gateway.route import Route
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Link, WorkerView


def view(pool: str, role: Role, index: int = 0) -> WorkerView:
    return WorkerView(
        WorkerId(pool, index, 1), role, "i", WorkerState.READY, "http://x:1", None, 10, 1
    )


def pair(number: int) -> Route:
    link = Link("p", "d", "nixl", 30.0, "recompute")
    prefill, decode = view("p", Role.PREFILL, number), view("d", Role.DECODE, number)
    return Route(decode, "disaggregated", prefill, link)


P, D = view("p", Role.PREFILL), view("d", Role.DECODE)
PAIR = pair(0)
ALONE = Route(D, "recompute:pull-failed")
LOST = EngineLost("x", None, "broke")
DEAD = EngineLost("x", 500, "its engine process died")
LATE = EngineFailed("x", None, "took too long")
ERROR = EngineFailed("x", 500, "error")
NOBODY = EngineNotReached("x", None, "refused")
LEFT = EngineLeft("x", None, "it hangs")


def failed(stage: Stage, error: EngineFailed, *, has_flowed: bool = False) -> Ended:
    return Ended(Cause.FAILED, stage, error, has_flowed)


@pytest.mark.parametrize("error", [LOST, LATE, ERROR, NOBODY])
def test_failed_prefill_is_left_out_and_decode_is_not(error):
    tries = after(Tries(2), PAIR, failed(Stage.PREFILL, error))
    assert tries.excluded == {P.id}
    assert tries.why == "prefill-failed"
    assert tries.may_prefill_elsewhere


def test_prefill_is_tried_elsewhere_as_often_as_is_configured():
    tries = after(Tries(2), pair(0), failed(Stage.PREFILL, ERROR))
    tries = after(tries, pair(1), failed(Stage.PREFILL, ERROR))
    assert not tries.may_prefill_elsewhere
    assert tries.may_go_on  # decode may still compute the prompt itself


def test_server_error_of_decode_that_was_to_pull_is_blamed_on_the_pull():
    tries = after(Tries(2), PAIR, failed(Stage.DECODE, ERROR))
    assert (tries.excluded, tries.why) == ({P.id}, "pull-failed")
    assert tries.may_go_on


@pytest.mark.parametrize(
    ("ended", "cause"),
    [
        (failed(Stage.PREFILL, ERROR), "prefill-failed"),
        (failed(Stage.DECODE, ERROR), "pull-failed"),
        (failed(Stage.DECODE, DEAD), "decode-failed"),
        (failed(Stage.DECODE, LATE), "decode-failed"),
        (Ended(Cause.HUNG, Stage.PREFILL, LEFT), "hung"),
        (Ended(Cause.DRAINED, Stage.DECODE, LEFT), "drained"),
    ],
)
def test_blocks_that_do_not_come_have_one_cause(ended, cause):
    assert transfer_failure(ended).value == cause


@pytest.mark.parametrize("error", [LOST, DEAD, LATE])
def test_decode_that_breaks_off_or_dies_is_left_out(error):
    tries = after(Tries(2), PAIR, failed(Stage.DECODE, error))
    assert (tries.excluded, tries.why) == ({D.id}, "decode-failed")


def test_decode_failures_are_bounded_whatever_came_before():
    tries = Tries(2)
    for route, stage in [(PAIR, Stage.PREFILL), (PAIR, Stage.DECODE), (ALONE, Stage.DECODE)]:
        tries = after(tries, route, failed(stage, ERROR))
    assert tries.may_go_on
    assert not after(tries, ALONE, failed(Stage.DECODE, ERROR)).may_go_on


def test_prefill_may_use_its_share_of_the_time_left():
    assert attempt_budget_s(90.0, Tries(2)) == 30.0
    assert attempt_budget_s(90.0, Tries(2, prefill_failures=1)) == 45.0


def test_drains_and_hand_backs_cost_no_attempt_and_leave_nobody_out():
    tries = Tries(2)
    for _ in range(5):
        tries = after(tries, PAIR, Ended(Cause.DRAINED, Stage.DECODE, LEFT))
        tries = after(tries, PAIR, Ended(Cause.RECOMPUTED, Stage.DECODE, LATE, has_flowed=True))
    assert tries.may_go_on
    assert tries.may_prefill_elsewhere
    assert tries.excluded == frozenset()
    assert (tries.prefill_failures, tries.decode_failures, tries.why) == (0, 0, "")


@pytest.mark.parametrize("stage", Stage)
@pytest.mark.parametrize("error", [NOBODY, LEFT], ids=["refused", "gone by the controller's word"])
def test_a_worker_that_had_nothing_of_the_request_costs_no_attempt(error, stage):
    """A whole node is lost: its workers are gone one after the other, the next one answers."""
    tries = Tries(2)
    for number in range(6):
        tries = after(tries, pair(number), failed(stage, error))
    assert tries.may_prefill_elsewhere
    assert tries.may_go_on
    assert len(tries.excluded) == 6


def test_a_worker_that_hangs_with_a_request_costs_an_attempt():
    tries = after(Tries(1), PAIR, Ended(Cause.HUNG, Stage.DECODE, LEFT))
    assert not tries.may_go_on


def test_what_gave_a_request_back_is_avoided_and_not_left_out():
    tries = after(Tries(2), PAIR, Ended(Cause.RECOMPUTED, Stage.DECODE, LATE, has_flowed=True))
    assert (tries.gave_back, tries.excluded) == ({D.id}, frozenset())


def test_an_answer_that_flowed_may_break_more_often_than_attempts_allow():
    tries = Tries(2)
    for number in range(5):
        tries = after(tries, pair(number), failed(Stage.DECODE, LOST, has_flowed=True))
    assert tries.may_go_on
    assert not tries.is_poisonous


@pytest.mark.parametrize("stages", [(a, b) for a in Stage for b in Stage])
def test_two_engines_that_go_away_under_a_request_are_enough(stages):
    tries = after(Tries(9), pair(0), failed(stages[0], LOST))
    assert not tries.is_poisonous
    assert tries.is_suspect
    tries = after(tries, pair(1), failed(stages[1], DEAD))
    assert tries.is_poisonous


@pytest.mark.parametrize("error", [LATE, ERROR, NOBODY, LEFT])
def test_what_an_engine_survives_is_no_sign_of_poison(error):
    tries = after(Tries(9), pair(0), failed(Stage.PREFILL, LOST))
    tries = after(tries, pair(1), failed(Stage.PREFILL, error))
    hung = after(tries, pair(2), Ended(Cause.HUNG, Stage.DECODE, LEFT))
    assert not hung.is_poisonous


ends = st.builds(
    Ended,
    st.sampled_from(Cause),
    st.sampled_from(Stage),
    st.sampled_from([LOST, DEAD, LATE, ERROR, NOBODY, LEFT]),
    st.booleans(),
)


@given(st.lists(ends, min_size=70, max_size=80))
def test_every_request_comes_to_an_end(history):
    tries = Tries(2)
    lost = 0
    for number, ended in enumerate(history):
        # A prefill bound that is reached sends the request to decode alone.
        route = pair(number) if tries.may_prefill_elsewhere else Route(D, "recompute:x")
        if route.prefill is None:
            ended = Ended(ended.cause, Stage.DECODE, ended.error, ended.has_flowed)
        tries = after(tries, route, ended)
        is_lost = ended.error in (LOST, DEAD) and not ended.has_flowed
        lost += is_lost and ended.cause in (Cause.FAILED, Cause.HUNG)
        assert tries.is_poisonous == (lost >= 2)
        if tries.is_poisonous or not tries.may_go_on:
            return
    pytest.fail("it still goes on")


@pytest.mark.parametrize("status", [400, 404, 408, 422, 429])
def test_an_answer_of_4xx_is_no_mark_against_a_worker(status):
    assert not is_mark(EngineFailed("d/0", status, "no"))
    assert is_mark(ERROR)
    assert is_mark(LOST)
