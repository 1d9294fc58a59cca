"""`pdcluster explain`: from the controller over its API to what people and programs read."""

from __future__ import annotations

import asyncio
import json
from dataclasses import asdict
from types import SimpleNamespace
from typing import Any

import pytest
from control_world import World, desired
from fastapi.testclient import TestClient
from ports import free_port
from served_api import Served

from cluster.cli import explain as command
from cluster.cli import main, request_view
from cluster.control import controller, requests, wire
from cluster.control.api import Bearer, create_app
from cluster.control.client import Access, ControlClient
from cluster.control.requests import Explained, UnknownRequest
from cluster.errors import InvalidInput
from cluster.request_records import AttemptRecord, RequestRecord, pack
from cluster.traffic import GatewayReport
from cluster.transfers import TransferRecord

TOKEN = "pdctl-a-token"


def attempt(decode: str = "decode/1#2", **more: Any) -> AttemptRecord:
    values: dict[str, Any] = {
        "decode": decode,
        "prefill": "prefill/0#1",
        "connector": "nixl",
        "route": "disaggregated",
        "held_tokens": 480,
        "kept_tokens": 0,
        "decode_running": 3,
        "decode_waiting": 0,
        "decode_kv_usage": 0.21,
        "decode_choices": 4,
        "prefill_running": 1,
        "prefill_waiting": 2,
        "prefill_choices": 2,
        "asked_s": 0.002,
        "chosen_s": 0.0021,
        "prefill_s": 0.003,
        "prefilled_s": 0.123,
        "transfer_s": 0.124,
        "transferred_s": 0.144,
        "decode_s": 0.124,
        "first_s": 0.144,
        "ended_s": 0.9,
        **more,
    }
    return AttemptRecord(**values)


def record(*attempts: AttemptRecord, **more: Any) -> RequestRecord:
    values: dict[str, Any] = {
        "status": 200,
        "is_stream": True,
        "prompt_tokens": 512,
        "answer_tokens": 64,
        "read_s": 0.0005,
        "placed_s": 0.0006,
        "rendered_s": 0.002,
        "ended_s": 0.9,
        "attempts_made": len(attempts),
        **more,
    }
    kept = RequestRecord("r1", "r1-x", "c6b2cbac7734443d", "/v1/chat/completions", 1e9, **values)
    kept.attempts = list(attempts)
    return kept


def pulled(of_attempt: str = "0", **more: Any) -> TransferRecord:
    values: dict[str, Any] = {
        "tokens_held": 480,
        "tokens_pulled": 32,
        "blocks_pulled": 2,
        "bytes_pulled": 32768,
        "took_s": 0.012,
        **more,
    }
    return TransferRecord(f"chatcmpl-r1-x.{of_attempt}-0", "decode", "pulled", 1e9, 512, **values)


WELL = Explained(record(attempt(), trace_id="4b" * 16), (pulled(),))


# For people


def said(explained: Explained) -> str:
    return "\n".join(request_view.lines(explained))


def test_people_read_why_this_pair_what_was_held_and_pulled_and_how_long_it_took():
    text = said(WELL)
    for line in (
        "request r1: answered in 0.900 s (status 200)",
        "prompt 512 tokens, answer 64 tokens",
        f"trace {'4b' * 16}",
        "attempt 0: prefill/0#1 to decode/1#2 over nixl",
        "disaggregated: prefill computes the prompt, decode takes its KV blocks",
        "decode    one of 4 ready; 3 running, 0 waiting, KV 21% full",
        "prefill   one of 2 ready; 1 running, 2 waiting",
        "480 of 512 tokens in decode's prefix cache, as far as was known (94%)",
        "2 blocks, 32 tokens, 32.0 KiB in 0.012 s; 480 tokens were there",
        "route 0.000 s, prefill 0.120 s, transfer and first output 0.020 s, rest of the answer",
    ):
        assert line in text
    times = dict(line.rsplit(None, 2)[:2] for line in text.splitlines()[-5:])
    assert times == {
        "read": "0.0005",
        "queue": "0.0001",
        "render": "0.0014",
        "to the first output": "0.1440",
        "whole": "0.9000",
    }


def test_each_change_of_workers_is_told_with_its_cause():
    lost = attempt(cause="failed", stage="decode", why="the engine broke the connection")
    went_on = attempt("decode/0#5", route="recompute:decode-failed", prefill="", kept_tokens=7)
    text = said(Explained(record(lost, went_on), (pulled("0"), pulled("1", tokens_pulled=99))))
    assert "decode/1#2 failed in decode: the engine broke the connection" in text
    assert "behind 7 tokens of the answer" in text
    assert "recompute:decode-failed: no prefill worker could serve" in text
    assert "99 tokens" not in text  # nothing was to be pulled in the second
    assert text.count("32 tokens") == 1


def test_what_is_not_known_is_not_made_up():
    refused = said(Explained(record(status=429, error="", ended_s=0.01, rendered_s=None), ()))
    assert "refused in 0.010 s (status 429)" in refused
    assert "no workers were chosen for it" in refused
    assert "not told by the engine" in said(Explained(record(attempt()), ()))
    of_another = pulled("10")  # attempt 10, not 1
    assert "not told by the engine" in said(Explained(record(attempt(), attempt()), (of_another,)))
    failed = said(Explained(record(attempt(), status=502, error="engines failed"), ()))
    assert "failed after 0.900 s (status 502)" in failed
    assert "error: engines failed" in failed
    assert "its client left" in said(Explained(record(attempt(), status=499), ()))


def test_transfers_of_several_prompts_are_added_up():
    two = Explained(record(attempt()), (pulled("0p0"), pulled("0p1")))
    assert "4 blocks, 64 tokens, 64.0 KiB in 0.024 s" in said(two)


def test_attempts_that_were_not_kept_are_counted():
    text = said(Explained(record(*[attempt()] * 12, attempts_made=40), ()))
    assert "28 more attempts, not kept" in text
    assert "attempt 39:" in text


def test_an_id_that_was_used_again_is_told():
    assert "the newest of 3 requests with this id" in said(Explained(record(attempt()), (), 2))


# The command


@pytest.fixture
def control(monkeypatch: pytest.MonkeyPatch):
    found = SimpleNamespace(explain=lambda request_id: WELL)
    at = SimpleNamespace(control=lambda: found)
    monkeypatch.setattr(command, "target", lambda topology, cluster: at)
    return found


def test_programs_read_all_of_it(control, capsys):
    assert main.run(["explain", "r1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads(json.dumps(asdict(WELL)))
    assert main.run(["explain", "r1"]) == 0
    assert "request r1: answered" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "code"), [(UnknownRequest("no request r1 is known"), 1), (InvalidInput("no id"), 2)]
)
def test_faults_have_their_exit_code_and_words(control, capsys, error, code):
    def explain(request_id: str) -> Explained:
        raise error

    control.explain = explain
    assert main.run(["explain", "r1"]) == code
    assert str(error) in capsys.readouterr().err


# The controller


@pytest.fixture
async def world():
    world = World()
    await world.controller.step()
    await world.controller.apply(desired(decode=2))
    await world.steps(3)
    return world


async def heard(world: World, kept: RequestRecord) -> int:
    report = GatewayReport("g", 0.0, 1, 0, 0, records_to=1, records=(pack(kept),))
    return await world.controller.gateway_report(report)


async def test_transfers_are_asked_of_the_workers_that_had_the_request(world):
    assert await heard(world, record(attempt("d/1#1", prefill="p/0#1"))) == 1
    late = TransferRecord("x-r1-x.0", "decode", "pulled", 9.0)
    early = TransferRecord("x-r1-x.0", "prefill", "granted", 8.0)
    world.workers["d/1#1"].records = [late, TransferRecord("y-r2", "decode", "held", 1.0)]
    world.workers["p/0#1"].records = [early]
    world.workers["d/0#1"].transfers = None  # would raise
    explained = await world.controller.explain("r1")
    assert explained.transfers == (early, late)
    assert (explained.request.request_id, explained.alike) == ("r1", 0)


async def test_a_worker_that_does_not_answer_keeps_nothing_else_back(world, monkeypatch):
    monkeypatch.setattr(controller, "TRANSFERS_WITHIN_S", 0.01)
    await heard(world, record(attempt("d/1#1", prefill="p/0#1")))

    async def hang(after_seq: int) -> list[Any]:
        await asyncio.sleep(3600)
        return []

    world.workers["d/1#1"].transfers = hang
    explained = await world.controller.explain("r1")
    assert (explained.transfers, explained.request.status) == ((), 200)


async def test_an_unknown_request_is_refused(world, monkeypatch):
    monkeypatch.setattr(requests, "TOLD_WITHIN_S", 0.01)
    with pytest.raises(UnknownRequest):
        await world.controller.explain("r1")


# The API


class Controls:
    async def explain(self, request_id: str) -> Explained:
        if request_id != "r1":
            raise UnknownRequest(f"no request {request_id} is known: it has not ended yet")
        return WELL


def test_the_api_answers_and_refuses_in_its_own_shape():
    client = TestClient(create_app(Controls(), Bearer(TOKEN)), raise_server_exceptions=False)
    assert client.get("/v1/requests/r1").status_code == 401
    client.headers["authorization"] = f"Bearer {TOKEN}"
    answer = client.get("/v1/requests/r1")
    assert wire.read_explained(answer.content) == WELL
    unknown = client.get("/v1/requests/r2")
    assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "unknown_request")
    wrong = client.get("/v1/requests/a%20b")
    assert (wrong.status_code, wrong.json()["error"]["type"]) == (400, "invalid_request")
    document = client.get("/openapi.json").json()
    route = document["paths"]["/v1/requests/{request_id}"]["get"]
    assert "security" in route
    assert {"200", "400", "401", "404"} <= set(route["responses"])
    assert "Explained" in document["components"]["schemas"]


def test_the_client_tells_unknown_from_wrong():
    port = free_port()
    served = Served(Controls(), port, TOKEN)
    try:
        served.wait_until(lambda: not served.server.problem)
        client = ControlClient(Access(f"http://127.0.0.1:{port}", TOKEN))
        assert client.explain("r1") == WELL
        with pytest.raises(UnknownRequest, match="no request r2 is known"):
            client.explain("r2")
        with pytest.raises(InvalidInput, match="request_id"):
            client.explain("no/such?id")
    finally:
        served.end()
