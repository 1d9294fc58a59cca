"""cluster.control.illness: which workers are replaced though they live, and which never are."""

from __future__ import annotations

from dataclasses import replace

import pytest

from cluster.control.illness import FOR_S, LAST_TIMES, UNLIKE, Ready, judge
from cluster.identity import Role, WorkerId
from cluster.traffic import Failure, GatewayReport, Standing

P0, P1 = WorkerId("p", 0, 1), WorkerId("p", 1, 1)
D0, D1 = WorkerId("d", 0, 1), WorkerId("d", 1, 1)
READY = [Ready(P0, Role.PREFILL), Ready(P1, Role.PREFILL)]
READY += [Ready(D0, Role.DECODE), Ready(D1, Role.DECODE)]
NOW_S = 1000.0


def failures(count=UNLIKE, over_s=FOR_S, peer="", is_proven=True, first=0):
    """The last of them was just now."""
    step_s = over_s / (count - 1)
    times = [NOW_S - over_s + step_s * number for number in range(count)]
    return tuple(
        Failure(first + number, str(peer), at_s, at_s, is_proven, "500: out of ideas")
        for number, at_s in enumerate(times)
    )


def report(*standings: Standing, gateway="g") -> GatewayReport:
    return GatewayReport(gateway, NOW_S, 1, 0, 0, standings=standings)


def well(worker, at_s=NOW_S - 0.1):
    return Standing(str(worker), at_s, at_s)


def judged(*standings: Standing, ready=READY, now_s=NOW_S):
    return judge([report(*standings)], ready, now_s)


def ill(worker, failed, answered_at_s=0.0, pulled_at_s=0.0):
    return Standing(str(worker), answered_at_s, pulled_at_s, failed)


def test_who_fails_request_after_request_that_others_answer_is_ill_in_the_engines_own_words():
    found = judged(well(P0), well(D1), ill(D0, failures()))
    assert list(found) == [D0]
    assert found[D0] == (
        "it failed 5 requests in 10 s; others answered them; said last: 500: out of ideas"
    )
    assert list(judged(well(P1), well(D0), well(D1), ill(P0, failures()))) == [P0]


def test_neither_few_failures_nor_many_at_once_nor_old_ones_make_anybody_ill():
    assert not judged(well(D1), ill(D0, failures(UNLIKE - 1, 60.0)))
    assert not judged(well(D1), ill(D0, failures(20, FOR_S - 0.1)))
    assert not judged(well(D1), ill(D0, failures()), now_s=NOW_S + 3600)


def test_one_answer_in_between_whoever_got_it_starts_the_count_anew():
    standing = ill(D0, failures(), answered_at_s=NOW_S - FOR_S / 2)
    assert not judged(well(D1), standing)
    other = report(well(D0, NOW_S - FOR_S / 2), gateway="another")
    assert not judge([report(well(D1), ill(D0, failures())), other], READY, NOW_S)


def test_what_gateways_saw_of_a_worker_counts_together():
    some, rest = failures()[:2], failures()[2:]
    reports = [report(well(D1), ill(D0, some)), report(ill(D0, rest), gateway="another")]
    assert list(judge(reports, READY, NOW_S)) == [D0]


def test_the_same_request_again_and_again_is_one_failure():
    again = tuple(replace(one, request=7) for one in failures(20, 60.0))
    assert not judged(well(D1), ill(D0, again))


def test_requests_that_nobody_answers_make_nobody_ill():
    poison = failures(20, 600.0, is_proven=False)
    assert not judged(well(P0), ill(D0, poison), ill(D1, poison))


def test_the_last_one_of_its_kind_stays_as_long_as_it_answers_anything():
    alone = [one for one in READY if one.id != D1]
    long_s = FOR_S * LAST_TIMES
    bad = failures(20, long_s, is_proven=False)
    assert not judged(ill(D0, bad, answered_at_s=NOW_S - 1), ready=alone)
    assert not judged(ill(D0, failures(20, long_s - 1, is_proven=False)), ready=alone)
    assert list(judged(ill(D0, bad), ready=alone)) == [D0]


def test_two_that_are_ill_do_not_both_count_as_the_others_stand_in():
    assert not judged(ill(D0, failures()), ill(D1, failures()))


def test_a_decode_that_pulls_from_nobody_is_ill_where_others_pull_from_the_same():
    pulls = (*failures(3, peer=P0), *failures(3, peer=P1, first=10))
    found = judged(well(P0), well(P1), well(D1), ill(D0, pulls, answered_at_s=NOW_S))
    assert list(found) == [D0]
    assert "for want of blocks (p/0#1, p/1#1)" in found[D0]


def test_a_decode_that_cannot_pull_from_one_dead_prefill_is_not_ill_and_the_prefill_is():
    found = judged(
        well(P1),
        ill(P0, (*failures(4, peer=D0), *failures(4, peer=D1, first=10))),
        ill(D0, failures(8, 30.0, peer=P0), answered_at_s=NOW_S),
        ill(D1, failures(8, 30.0, peer=P0), answered_at_s=NOW_S),
    )
    assert list(found) == [P0]


def test_decodes_of_another_island_cannot_be_asked_whether_a_prefill_is_dead():
    ready = [replace(one, island="b" if one.id == D1 else "a") for one in READY]
    then_s = NOW_S - 1
    found = judged(
        well(P1),
        ill(P0, failures(peer=D0)),
        ill(D0, failures(peer=P0), answered_at_s=then_s, pulled_at_s=then_s),
        ready=ready,
    )
    assert list(found) == [P0]


def test_a_pair_that_fails_while_each_end_moves_blocks_with_others_makes_neither_ill():
    then_s = NOW_S - 1
    found = judged(
        ill(P0, failures(20, 60.0, peer=D0), then_s, then_s),
        ill(D0, failures(20, 60.0, peer=P0), then_s, then_s),
        well(P1),
        well(D1),
    )
    assert not found


def test_the_only_prefill_stays_while_one_decode_of_two_pulls_from_it():
    ready = [one for one in READY if one.id != P1]
    found = judged(
        ill(P0, failures(peer=D0), NOW_S - 1, NOW_S - 1),
        ill(D0, failures(peer=P0), answered_at_s=NOW_S),
        well(D1),
        ready=ready,
    )
    assert list(found) == [D0]


def test_a_decode_that_fails_to_pull_from_two_that_nobody_else_asked_is_the_ill_one():
    pulls = (*failures(3, peer=P0), *failures(3, peer=P1, first=10))
    found = judged(
        ill(P0, failures(3, peer=D0)), ill(P1, failures(3, peer=D0, first=10)),
        ill(D0, pulls, answered_at_s=NOW_S), Standing(str(D1), NOW_S, 0.0),
    )  # fmt: skip
    assert list(found) == [D0]


def test_of_one_pair_prefill_is_tried_first_and_then_decode():
    pair = [Ready(P0, Role.PREFILL), Ready(D0, Role.DECODE)]
    long_s = FOR_S * LAST_TIMES
    bad = failures(20, long_s, peer=P0, is_proven=False)
    toward = failures(20, long_s, peer=D0, is_proven=False)
    assert list(judged(ill(P0, toward), ill(D0, bad), ready=pair)) == [P0]
    again = replace(pair[0], id=replace(P0, generation=2))
    more = failures(20, long_s, peer=again.id, is_proven=False, first=100)
    found = judged(
        ill(again.id, failures(20, long_s, peer=D0, is_proven=False, first=100)),
        ill(D0, (*bad, *more)),
        ready=[again, pair[1]],
    )
    assert list(found) == [D0]


@pytest.mark.parametrize(("before", "for_s"), [(1, 2 * FOR_S), (2, 4 * FOR_S), (60, 120.0)])
def test_what_a_new_start_did_not_cure_is_given_ever_more_time(before, for_s):
    ready = [replace(one, failures=before) if one.id == D0 else one for one in READY]
    assert not judged(well(D1), ill(D0, failures(9, for_s - 1)), ready=ready)
    assert list(judged(well(D1), ill(D0, failures(9, for_s)), ready=ready)) == [D0]
