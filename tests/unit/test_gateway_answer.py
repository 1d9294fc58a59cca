"""cluster.gateway.answer: what an engine's error in the middle of its stream is taken for."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, cast

import pytest

from cluster.errors import EngineFailed
from cluster.gateway.answer import Answer
from cluster.gateway.course import Course
from cluster.gateway.engines import Engines
from cluster.gateway.recovery import Cause, Ended, Stage, Tries, after
from cluster.gateway.requests import Endpoint, parse
from cluster.gateway.route import Route
from cluster.gateway.tally import PairCounts
from cluster.gateway.wire import Message, Responder
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Fingerprint, WorkerView

ROLE = {"delta": {"role": "assistant", "content": ""}}
TOKEN = {"delta": {"content": "a"}, "token_ids": [7]}
ERROR = b'data: {"error": {"message": "Internal server error", "code": 500}}\n\n'


def worker(role: Role) -> WorkerView:
    fingerprint = Fingerprint("m", "", "", 16, "nixl", "1", "vllm", "1", "0")
    return WorkerView(
        id=WorkerId(role.value, 0, 1),
        role=role,
        island="i",
        state=WorkerState.READY,
        url="",
        fingerprint=fingerprint,
        max_model_len_tokens=100,
        kv_bytes_per_token=1,
    )


def event(choice: dict[str, Any]) -> bytes:
    said = {"id": "a", "created": 1, "model": "m", "choices": [{"index": 0, **choice}]}
    return b"data: " + json.dumps(said, separators=(",", ":")).encode() + b"\n\n"


class Upstream:
    """An engine's answer, piece by piece."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self.headers = {b"content-type": b"text/event-stream"}
        self._pieces = list(pieces)

    async def open(self, *_call: object) -> Upstream:
        return self

    async def next_piece(self) -> bytes:
        return self._pieces.pop(0) if self._pieces else b""


async def failure_of(
    course: Course, answer: Answer, *pieces: bytes, answers: Callable[[], None] = pytest.fail
) -> EngineFailed:
    answer._engines = cast(Engines, Upstream(pieces))
    await answer.begin(worker(Role.DECODE), {}, "r.0")
    with pytest.raises(EngineFailed) as failed:
        await answer.pass_on(course, PairCounts(), answers)
    return failed.value


@pytest.mark.parametrize("in_one_piece", [True, False])
async def test_an_error_behind_a_role_is_a_failed_pull_and_behind_a_token_it_is_not(
    in_one_piece: bool,
) -> None:
    async def send(_message: Message) -> None:
        pass

    body = {"messages": [{"role": "user", "content": "hi"}], "stream": True, "temperature": 0}
    request = parse(Endpoint.CHAT, json.dumps(body).encode(), "m")
    course = Course(request, [1, 2, 3], has_reasoning_parser=False)
    none = cast(Engines, None)

    def decode(ids: Sequence[int]) -> str:
        return "a" * len(ids)

    answer = Answer(none, request, Responder(send, "r"), 0.0, decode)

    def pieces(*events: bytes) -> list[bytes]:
        return [b"".join(events)] if in_one_piece else list(events)

    pull = await failure_of(course, answer, *pieces(event(ROLE), ERROR))
    assert pull.status == 500
    assert course.interrupted(decode) == ""
    told: list[str] = []
    behind = pieces(event(ROLE), event(TOKEN), ERROR)
    later = await failure_of(course, answer, *behind, answers=lambda: told.append("it answers"))
    assert later.status is None
    assert told == ([] if in_one_piece else ["it answers"])
    # And so for the engine that goes on with it.
    assert course.interrupted(decode) == ""
    assert course.kept_tokens == 1
    again = await failure_of(course, answer, *pieces(event(ROLE), ERROR))
    assert again.status == 500

    prefill = worker(Role.PREFILL)
    route = Route(prefill=prefill, decode=worker(Role.DECODE), link=None, why="disaggregated")
    tries = after(Tries(2), route, Ended(Cause.FAILED, Stage.DECODE, again, has_flowed=True))
    assert tries.excluded == {prefill.id}
    assert tries.why == "pull-failed"
