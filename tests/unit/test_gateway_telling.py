"""What a gateway replica tells of its traffic: to the controller in counts and notes, to a log."""

from __future__ import annotations

import asyncio
import logging
import pickle
from typing import Any

import pytest

from cluster.errors import EngineFailed, NoCapacity
from cluster.gateway import errors, reports
from cluster.gateway.course import Course
from cluster.gateway.recovery import Cause, Ended, Stage
from cluster.gateway.requests import Endpoint, parse
from cluster.gateway.route import Route
from cluster.gateway.story import SLOW_S, Story, key_values
from cluster.gateway.tally import NOTES_KEPT, Tally
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Fingerprint, WorkerView
from cluster.traffic import GatewayReport


def view(pool: str, role: Role, engine: str = "vllm") -> WorkerView:
    print_ = Fingerprint("m", "none", "auto", 16, "nixl", "1", engine, "1", "0")
    return WorkerView(
        WorkerId(pool, 0, 1), role, "i", WorkerState.READY, "http://x:1", print_, 10, 1
    )


P, D = view("p", Role.PREFILL), view("d", Role.DECODE)
FED, ALONE = Route(D, "disaggregated", P), Route(D, "local-prefill")


@pytest.fixture
def tally() -> Tally:
    return Tally("replica-1", lambda: 1234.5)


def test_requests_are_counted_by_the_pools_that_they_go_through(tally: Tally):
    for route, answer in ((FED, 7), (FED, 0), (ALONE, 3)):
        counts = tally.pair(route)
        counts.arrived += 1
        counts.ttft_s.add(0.1)
        counts.finish(100, 160, answer)
    tally.pair(FED).arrived += 1
    report = tally.report(9, 2, 1, 4)
    assert (report.gateway, report.at_s, report.snapshot_version) == ("replica-1", 1234.5, 9)
    assert (report.running, report.queued, report.refused) == (2, 1, 4)
    fed, alone = report.pairs
    assert (fed.prefill, fed.decode, alone.prefill) == ("p", "d", "")
    assert (fed.arrived, fed.finished, fed.answer_tokens) == (3, 2, 7)
    # Whole blocks are held, and a prompt's last one is not full.
    assert (fed.prompt_tokens, fed.held_tokens) == (200, 200)
    assert (fed.ttft_s.total, fed.tpot_s.total) == (2, 0)
    assert fed.ttft_s.percentile_s(50) == pytest.approx(0.1, rel=0.25)
    assert pickle.loads(pickle.dumps(report)) == report


def test_a_dead_worker_with_many_streams_is_one_note(tally: Tally):
    for number in range(1000):
        tally.continued("d/0", "failed", f"r{number}")
    tally.continued("d/1", "drained", "r")
    report = tally.report(1, 0, 0, 0)
    assert report.recoveries == 1001
    assert [(note.number, note.subject, note.text) for note in report.notes] == [
        (1, "d/0", "1000 answers went on elsewhere (failed)"),
        (2, "d/1", "1 answer went on elsewhere (drained)"),
    ]
    assert report.notes[0].request_id == "r0"
    again = tally.report(1, 0, 0, 0)
    assert again.notes == report.notes  # who has seen number 2 need not look again
    tally.lost("d/0", "it has a grammar", "r5")
    assert tally.report(1, 0, 0, 0).notes[-1].kind == "AnswerLost"


def test_notes_are_bounded_and_their_numbers_grow(tally: Tally):
    for number in range(100):
        tally.poisonous(("d/0", "d/1"), f"r{number}")
    notes = tally.report(1, 0, 0, 0).notes
    assert [note.number for note in notes] == list(range(101 - NOTES_KEPT, 101))
    assert (notes[-1].kind, notes[-1].subject) == ("RequestPoisonous", "r99")
    assert "d/0, d/1" in notes[-1].text


def test_a_request_that_goes_well_has_no_line():
    assert Story("id").line("/v1/completions", 200, SLOW_S - 1) is None
    assert Story("id").line("/v1/completions", 499, 1.0) is None


def test_a_clients_own_mistake_has_no_line():
    story = Story("id")
    story.failed(errors.bad_request("no"))
    assert story.line("/v1/completions", 400, 0.1) is None


def test_lines_tell_what_happened_with_the_clients_id():
    story = Story("my-id")
    error = EngineFailed("decode/0", None, "the engine broke the connection")
    story.left("decode/0", Ended(Cause.FAILED, Stage.DECODE, error))
    level, text = story.line("/v1/completions", 200, 1.25) or (0, "")
    assert level == logging.INFO
    assert text == (
        "request my-id finished path=/v1/completions status=200 took_s=1.250 attempts=2 "
        'left="decode/0 failed: the engine broke the connection"'
    )
    story.failed(errors.from_cluster(NoCapacity("nobody is there", 2.0)))
    level, text = story.line("/v1/completions", 503, 1.5) or (0, "")
    assert level == logging.WARNING
    assert text.startswith("request my-id failed ")
    assert text.endswith('attempts=1 left="decode/0 failed: the engine broke the connection" '
                         'why="nobody is there"')  # fmt: skip
    assert "slow finished" in (Story("slow").line("/x", 200, SLOW_S) or (0, ""))[1]


def test_values_of_lines_stay_on_one_line():
    assert key_values({"a": 1, "b": "x y", "c": "", "d": 'q"'}) == r'a=1 b="x y" c="" d="q\""'
    text = key_values({"why": "line\n" * 1000})
    assert "\n" not in text
    assert len(text) < 500


EVENT = b'data: {"id":"a","choices":[{"text":"x","token_ids":[1,2]}]}\n\n'


@pytest.mark.parametrize(
    ("engine", "more", "tokens"),
    [
        ("vllm", b"", 6),  # as told
        ("sglang", b"", 3),  # events stand for tokens
        ("vllm", b',"stop":["x"],"n":2', 3),
    ],
)
def test_answer_tokens_are_told_or_seen(engine: str, more: bytes, tokens: int):
    request = parse(
        Endpoint.COMPLETIONS, b'{"prompt":"p","stream":true,"temperature":0' + more + b"}", "m"
    )
    course = Course(request, [1, 2, 3], has_reasoning_parser=False)
    course.start(view("d", Role.DECODE, engine))
    event = EVENT if engine == "vllm" else EVENT.replace(b',"token_ids":[1,2]', b"")
    for _ in range(3):
        course.take(event)
    assert course.answer_tokens == tokens


@pytest.mark.parametrize("usage", [b'"completion_tokens":17', b'"completion_tokens": 17, "x": 1'])
def test_answer_tokens_of_a_whole_answer_are_its_engines_figure(usage: bytes):
    request = parse(Endpoint.COMPLETIONS, b'{"prompt":"p"}', "m")
    course = Course(request, [1, 2, 3], has_reasoning_parser=False)
    assert course.whole(b'{"choices":[{"text":"x"}],"usage":{%s}}' % usage, lambda ids: "")
    assert course.answer_tokens == 17
    assert course.whole(b'{"choices":[{"text":"x"}]}', lambda ids: "")
    assert course.answer_tokens == 17


class Sink:
    def __init__(self) -> None:
        self.heard: list[Any] = []
        self.is_stuck = asyncio.Event()

    async def send(self, report: GatewayReport) -> int:
        self.heard.append(report)
        if len(self.heard) == 2:
            await self.is_stuck.wait()
        return len(self.heard)


async def test_reports_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch, tally: Tally):
    """A controller that does not answer holds up the next report, and nothing else."""
    monkeypatch.setattr(reports, "EVERY_S", 0.001)
    sink = Sink()
    made = 0

    def report() -> GatewayReport:
        nonlocal made
        made += 1
        return tally.report(made, 0, 0, 0)

    known: list[int] = []
    reporting = asyncio.create_task(reports.keep_reporting(sink, report, known.append))
    await asyncio.sleep(0.1)
    assert made == 2
    sink.is_stuck.set()
    await asyncio.sleep(0.1)
    reporting.cancel()
    assert made > 3
    assert [heard.snapshot_version for heard in sink.heard] == list(range(1, made + 1))
    assert known == list(range(1, len(known) + 1))
