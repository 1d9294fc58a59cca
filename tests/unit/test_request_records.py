"""Records of requests on their way: filled, packed, numbered, kept, found again."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from cluster.control import requests
from cluster.control.requests import KEPT, KEPT_TROUBLED, Requests, UnknownRequest
from cluster.errors import EngineFailed
from cluster.gateway.journal import KEPT as JOURNAL_KEPT
from cluster.gateway.journal import Journal
from cluster.gateway.recovery import Cause, Ended, Stage
from cluster.gateway.route import Route, Table
from cluster.gateway.story import Story
from cluster.gateway.trace_context import PassedOn
from cluster.identity import Role, WorkerId, WorkerState
from cluster.request_records import MOST_ATTEMPTS, RequestRecord, pack, unpack
from cluster.snapshot import Link, Load, Snapshot, WorkerView
from cluster.traffic import GatewayReport


def view(pool: str, role: Role) -> WorkerView:
    load = Load(3, 1, 0.25)
    return WorkerView(
        WorkerId(pool, 0, 2), role, "i", WorkerState.READY, "http://x:1", None, 10, 1, load=load
    )


ROUTE = Route(
    view("d", Role.DECODE),
    "disaggregated",
    view("p", Role.PREFILL),
    Link("p", "d", "nixl", 20.0, "recompute"),
)
TABLE = Table(Snapshot(1, "c", "m"), decode_choices=4, prefill_choices=2)


def record(request_id: str = "r", **more: Any) -> RequestRecord:
    return RequestRecord(request_id, f"{request_id}-x", "g", "/v1/completions", 100.0, **more)


def story(attempts: int = 1) -> Story:
    told = Story("r")
    told.keep(record(), PassedOn(""))
    for _ in range(attempts):
        told.attempt(ROUTE, TABLE, held_tokens=32, kept_tokens=5, asked_s=0.5)
    return told


def test_a_record_says_by_what_the_pair_was_chosen():
    kept = story().end(200, 2.0)
    assert kept is not None
    attempt = unpack(pack(kept)).attempts[0]
    assert (attempt.prefill, attempt.decode, attempt.connector) == ("p/0#2", "d/0#2", "nixl")
    assert (attempt.route, attempt.held_tokens, attempt.kept_tokens) == ("disaggregated", 32, 5)
    assert (attempt.decode_running, attempt.decode_waiting, attempt.decode_kv_usage) == (3, 1, 0.25)
    assert (attempt.decode_choices, attempt.prefill_choices) == (4, 2)
    assert attempt.asked_s == 0.5
    assert attempt.cause == ""


def test_a_record_crosses_whole():
    told = story(2)
    error = EngineFailed("p/0", None, "it broke")
    told.left("p/0", Ended(Cause.FAILED, Stage.PREFILL, error))
    kept = told.end(200, 2.0)
    assert kept is not None
    kept.attempts[0].first_s = 1.5
    assert unpack(pack(kept)) == kept
    assert (kept.status, kept.ended_s, kept.first_s) == (200, 2.0, 1.5)
    last = kept.attempts[-1]
    assert (last.cause, last.stage, last.why) == ("failed", "prefill", "it broke")


def is_troubled(kept: RequestRecord) -> bool:
    return pack(kept)[1]


def test_what_went_wrong_is_known_without_unpacking():
    assert not is_troubled(record(status=200))
    assert not is_troubled(record(status=400))  # the client's own
    assert not is_troubled(record(status=499))
    assert is_troubled(record(status=503))
    assert is_troubled(record(status=200, error="a stream that broke"))
    moved = story(2).end(200, 1.0)
    assert moved is not None
    assert is_troubled(moved)


def test_a_record_is_bounded_whatever_happens():
    told = story(60)
    for attempt in (kept := told.record or record()).attempts:
        attempt.why = "x" * 203
    kept.attempts[-1].why = "the last"
    packed = pack(kept)
    assert len(packed[2]) < 6 * 1024
    found = unpack(packed)
    assert (len(found.attempts), found.attempts_made) == (MOST_ATTEMPTS, 60)
    assert found.attempts[-1].why == "the last"
    assert len(kept.attempts) == 60  # spans have all of them
    ordinary = story().end(200, 1.0)
    assert ordinary is not None
    assert len(pack(ordinary)[2]) < 400


@pytest.mark.parametrize("data", [b"", b"\x93\x01\x02\x03", b"\x92\x91\x01\x90"])
def test_what_is_no_record_is_told_apart(data: bytes):
    with pytest.raises(ValueError, match="not a request record"):
        unpack(("r", False, data))


# From a gateway to the controller


class Clock:
    now = 1000.0

    def now_s(self) -> float:
        return self.now

    def wall_s(self) -> float:
        return self.now


def report(journal: Journal, gateway: str = "g") -> GatewayReport:
    empty = GatewayReport(gateway, 0.0, 1, 0, 0)
    return replace(empty, records_to=journal.number, records=journal.unknown())


def keep(journal: Journal, *ids: str, **more: Any) -> None:
    for number, id in enumerate(ids):
        journal.add(pack(record(id, answer_tokens=number, status=200, **more)))


async def ids_found(kept: Requests, *ids: str) -> list[str]:
    return [(await kept.find(id))[0].request_id for id in ids]


async def test_the_controller_gets_each_record_once():
    journal, kept = Journal(), Requests(Clock())
    keep(journal, "a", "b")
    journal.known(kept.take(report(journal)))
    assert journal.unknown() == ()
    keep(journal, "c")
    assert [id for id, _, _ in journal.unknown()] == ["c"]
    lost_answer = report(journal)
    kept.take(lost_answer)
    keep(journal, "d")
    journal.known(kept.take(report(journal)))
    assert await ids_found(kept, "a", "b", "c", "d") == ["a", "b", "c", "d"]
    assert [(await kept.find(id))[1] for id in "abcd"] == [0, 0, 0, 0]


async def test_a_lost_report_is_made_up_for_by_the_next():
    journal, kept = Journal(), Requests(Clock())
    keep(journal, "a")
    report(journal)  # nobody hears it
    journal.known(0)
    keep(journal, "b")
    journal.known(kept.take(report(journal)))
    assert await ids_found(kept, "a", "b") == ["a", "b"]


async def test_a_restarted_controller_gets_what_gateways_still_have():
    journal, before = Journal(), Requests(Clock())
    keep(journal, "a", "b")
    journal.known(before.take(report(journal)))
    after = Requests(Clock())
    journal.known(after.take(report(journal)))  # nothing new in it: it has none, and says so
    keep(journal, "c")
    journal.known(after.take(report(journal)))
    assert await ids_found(after, "a", "b", "c") == ["a", "b", "c"]


async def test_a_gateway_keeps_the_newest_while_nobody_fetches():
    journal, kept = Journal(), Requests(Clock())
    keep(journal, *(f"r{number}" for number in range(JOURNAL_KEPT + 5)))
    assert len(journal.unknown()) == JOURNAL_KEPT
    for _ in range(2):  # the first answer is that it has none of this replica's
        journal.known(kept.take(report(journal)))
    assert await ids_found(kept, "r5", f"r{JOURNAL_KEPT + 4}") == ["r5", f"r{JOURNAL_KEPT + 4}"]
    assert journal.unknown() == ()


async def test_replicas_are_counted_apart():
    kept = Requests(Clock())
    one, other = Journal(), Journal()
    keep(one, "a", "b")
    keep(other, "c")
    assert kept.take(report(one, "g1")) == 2
    assert kept.take(report(other, "g2")) == 1
    assert await ids_found(kept, "a", "b", "c") == ["a", "b", "c"]


async def test_memory_is_bounded_and_trouble_outlives_the_rest(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "TOLD_WITHIN_S", 0.01)
    clock = Clock()
    journal, kept = Journal(), Requests(clock)
    keep(journal, "bad", error="it failed")
    for _ in range(KEPT // JOURNAL_KEPT + 2):
        keep(journal, *(f"r{journal.number + n}" for n in range(JOURNAL_KEPT - 1)))
        journal.known(kept.take(report(journal)))
        clock.now += 1
    assert await ids_found(kept, "bad") == ["bad"]
    assert (len(kept._well), len(kept._troubled)) == (KEPT, 1)
    assert kept._troubled.maxlen == KEPT_TROUBLED
    with pytest.raises(UnknownRequest, match=rf"older than what is kept \({KEPT + 1} of the last"):
        await kept.find("r1")


async def test_of_several_with_one_id_the_newest_is_told():
    journal, kept = Journal(), Requests(Clock())
    keep(journal, "a", "b", "a")
    kept.take(report(journal))
    # They arrived at the same time; the later one took longer.
    kept._well[-1] = (0.0, pack(record("a", ended_s=9.0)))
    found, alike = await kept.find("a")
    assert (found.ended_s, alike) == (9.0, 1)


async def test_one_that_has_just_ended_is_waited_for():
    journal, kept = Journal(), Requests(Clock())
    asked = asyncio.create_task(kept.find("a"))
    await asyncio.sleep(0.01)
    assert not asked.done()
    keep(journal, "b")
    journal.known(kept.take(report(journal)))
    await asyncio.sleep(0.01)
    assert not asked.done()
    keep(journal, "a")
    kept.take(report(journal))
    assert (await asyncio.wait_for(asked, 5))[0].request_id == "a"


async def test_an_unknown_one_is_told_with_what_is_known(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(requests, "TOLD_WITHIN_S", 0.01)
    clock, journal = Clock(), Journal()
    kept = Requests(clock)
    with pytest.raises(UnknownRequest, match=r"no request nobody is known: .* not heard of any"):
        await kept.find("nobody")
    keep(journal, "a")
    kept.take(report(journal))
    clock.now += 90
    with pytest.raises(UnknownRequest, match=r"not ended yet.*older.*\(1 of the last 90 s\)"):
        await kept.find("nobody")
