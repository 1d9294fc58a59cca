"""scripts/chaos.py's pure parts: what a seed decides, and what is seen of a wrong answer."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from chaos_run import asks, shape
from chaos_run.answers import Answer, NotAnAnswer, differences
from chaos_run.schedule import REAL, SIMULATED, Kind, schedule

from cluster.control.state import ClusterStatus, PoolStatus
from cluster.identity import Role, WorkerId, WorkerState
from cluster.workers.report import WorkerReport

USAGE = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_the_same_seed_gives_the_same_faults_and_another_one_others():
    one, other = (schedule(7, 200, 0.5, SIMULATED) for _ in range(2))
    assert one == other
    assert one != schedule(8, 200, 0.5, SIMULATED)
    assert {planned.kind for planned in one} == set(Kind)
    assert {planned.kind for planned in schedule(7, 200, 0.5, REAL)} == set(REAL)


def test_the_same_seed_asks_the_same_questions():
    def first(seed: int) -> list[asks.Ask]:
        client = asks.client("m", seed, 3)
        return [next(client), *(client.send(f"answer {n}") for n in range(30))]

    assert first(1) == first(1)
    assert first(1) != first(2)
    many = [ask for seed in range(10) for ask in first(seed)]
    assert {(ask.path, ask.is_stream) for ask in many} == {
        (path, is_stream) for path in (asks.CHAT, asks.COMPLETIONS) for is_stream in (True, False)
    }


def event(text: str, token: int, finish: str | None = None, **more: object) -> bytes:
    choice = {"index": 0, "text": text, "token_ids": [token], "finish_reason": finish}
    return b"data: " + json.dumps({"id": "x", "choices": [choice], **more}).encode()


def told(*events: bytes) -> Answer:
    answer = Answer()
    for one in events:
        answer.add_event(one)
    return answer


RIGHT = (event("a", 1), event("b", 2, "length", usage=USAGE), b"data: [DONE]")


def test_a_stream_equals_the_whole_answer():
    whole = Answer()
    choice = {"index": 0, "text": "ab", "token_ids": [1, 2], "finish_reason": "length"}
    whole.add_whole(json.dumps({"id": "y", "choices": [choice], "usage": USAGE}).encode())
    assert differences(told(*RIGHT), whole, is_chat_stream=False) == []


@pytest.mark.parametrize(
    ("events", "said"),
    [
        (RIGHT[1:], "text from character 0"),
        ((RIGHT[0], *RIGHT), "text from character 1"),
        ((event("a", 9), *RIGHT[1:]), "token ids from 0"),
        (RIGHT[:2], "does not end with [DONE]"),
        ((RIGHT[0], event("b", 2), RIGHT[2]), "finish"),
        ((*RIGHT[:2], RIGHT[1], RIGHT[2]), "text from character 2"),
        ((RIGHT[0], event("b", 2, "length", usage={**USAGE, "total_tokens": 6})), "usage"),
        ((RIGHT[0], *(one.replace(b'"x"', b'"z"') for one in RIGHT[1:])), "2 ids"),
    ],
    ids=[
        "lost",
        "doubled",
        "other id",
        "cut",
        "no finish",
        "said twice",
        "usage",
        "another answer",
    ],
)
def test_every_way_of_being_wrong_is_seen(events, said):
    found = differences(told(*events), told(*RIGHT), is_chat_stream=False)
    assert said in "; ".join(found)


def test_logprobs_may_differ_by_a_real_engines_last_bits_and_no_more():
    def with_logprob(value: float) -> Answer:
        told_with = {"content": [{"token": "a", "logprob": value}]}
        choice = {"index": 0, "text": "a", "finish_reason": "length", "logprobs": told_with}
        answer = Answer()
        answer.add_whole(json.dumps({"id": "x", "choices": [choice]}).encode())
        return answer

    wanted = with_logprob(-0.125)
    assert differences(with_logprob(-0.1251), wanted, is_chat_stream=False) == []
    (found,) = differences(with_logprob(-0.14), wanted, is_chat_stream=False)
    assert "logprobs from 0 of 1" in found


def test_what_is_no_answer_is_called_that():
    with pytest.raises(NotAnAnswer):
        told(b"data: <html>")


def status(prefill: int = 3, decode: int = 3, **roles: Role) -> ClusterStatus:
    """`roles`: of workers like prefill_0 that serve in another role."""
    pools = tuple(
        PoolStatus(role.value, role, "simulated", count, count, count)
        for role, count in ((Role.PREFILL, prefill), (Role.DECODE, decode))
    )
    reports = tuple(
        WorkerReport(
            WorkerId(pool.name, index, 1),
            roles.get(f"{pool.name}_{index}", pool.role),
            WorkerState.READY,
            "",
            "127.0.0.1",
            "",
            0.0,
        )
        for pool in pools
        for index in range(pool.desired)
    )
    return ClusterStatus("c", "m", 1, 0.0, pools, reports, (), (), ())


def test_no_change_leaves_fewer_than_two_of_a_role():
    now = status(prefill_0=Role.DECODE)
    assert shape.by_role(now) == {Role.PREFILL: 2, Role.DECODE: 4}
    may = shape.may_change_role(now, now.workers)
    assert {report.role for report in may} == {Role.DECODE}
    prefill, decode = now.pools
    assert shape.sizes(now, prefill, 3) == [4]
    assert shape.sizes(now, decode, 3) == [2, 4]
    missing = replace(now, workers=())
    assert shape.sizes(missing, prefill, 3) == [2, 4]


def test_a_pool_shrinks_only_while_another_of_the_same_role_is_usable():
    now = status(prefill_2=Role.DECODE)
    assert shape.leaves_one(now.workers, now.workers, "prefill", 2)
    without_decode = [report for report in now.workers if report.id.pool == "prefill"]
    assert not shape.leaves_one(now.workers, without_decode, "prefill", 2)
