"""What changes a cluster, over HTTP, against a controller that notes what is asked of it."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace

import httpx
import pytest
from changing_cluster import ASKS, DONE, SERVING, STATUS, ChangingCluster
from fastapi.testclient import TestClient
from served_api import InPlaceOf

from cluster.control import api_changes, wire
from cluster.control.api import Bearer, create_app
from cluster.control.changes import (
    Apply,
    DrainNode,
    DrainWorker,
    Measure,
    Plan,
    PlanStep,
    ReturnNode,
    Scale,
    Step,
)

TOKEN = "pdctl-a-token"
POSTS = {
    "/v1/pools/decode/scale": {"replicas": 2},
    "/v1/workers/decode/0/role": {"role": "prefill"},
    "/v1/workers/decode/0/drain": {},
    "/v1/nodes/10.0.0.7/drain": {},
    "/v1/nodes/10.0.0.7/return": {},
    "/v1/plan": wire.serving_body(SERVING),
    "/v1/apply": wire.serving_body(SERVING),
}


@pytest.fixture
def cluster():
    return ChangingCluster()


@pytest.fixture(scope="module")
def in_place():
    return InPlaceOf()


@pytest.fixture(scope="module")
def app(in_place):
    return create_app(in_place, Bearer(TOKEN))


@pytest.fixture
def http(app, in_place, cluster):
    in_place.controller = cluster
    return client_of(app)


@pytest.fixture
def new_http(cluster):
    """Of an API that has no keys yet."""
    return client_of(create_app(cluster, Bearer(TOKEN)))


def client_of(app):
    client = TestClient(app, raise_server_exceptions=False)
    client.headers["authorization"] = f"Bearer {TOKEN}"
    return client


def error_of(answer, status, kind):
    assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), answer.text
    return answer.json()["error"]["message"]


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.kind)
def test_every_ask_reaches_the_controller_as_it_was_meant(http, cluster, ask):
    path, body = wire.posted(ask)
    answer = http.post(path, json={**body, "why": "rain"}, headers={"x-pdcluster-asked-by": "a@b"})
    assert answer.status_code == 202
    assert wire.read_change(answer.content) == cluster.known[1]
    assert cluster.asked == [(ask, "a@b", "rain")]


def test_what_is_left_out_has_its_default(http, cluster):
    http.post("/v1/pools/decode/scale", json={"replicas": 2})
    http.post("/v1/workers/decode/0/drain")
    http.post("/v1/nodes/n/drain")
    http.post("/v1/nodes/n/return")
    http.post("/v1/apply", json=wire.serving_body(SERVING))
    asks = [Scale("decode", 2), DrainWorker("decode/0"), DrainNode("n"), ReturnNode("n")]
    assert cluster.asked == [(ask, "unknown", "") for ask in [*asks, Apply(SERVING)]]


@pytest.mark.parametrize("path", POSTS)
@pytest.mark.parametrize("header", [None, "Bearer wrong"])
def test_without_the_token_nothing_is_asked(http, cluster, path, header):
    del http.headers["authorization"]
    headers = {"authorization": header} if header else {}
    assert http.post(path, json=POSTS[path], headers=headers).status_code == 401
    assert cluster.asked == cluster.planned == []


@pytest.mark.parametrize("path", [path for path in POSTS if path != "/v1/plan"])
@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"grace": 5}, "grace"),
        ({"grace_s": -1}, "grace_s"),
        ({"grace_s": float("nan")}, "grace_s"),
        ({"grace_s": float("inf")}, "grace_s"),
        ({"grace_s": "5"}, "grace_s"),
        ({"grace_s": True}, "grace_s"),
        ({"why": "x" * 501}, "why"),
        ({"why": "two\nlines"}, "why"),
        ({"why": "\x1b[2J"}, "why"),
    ],
    ids=lambda value: str(value)[:24] if isinstance(value, dict) else "",
)
def test_a_wrong_value_is_named_and_nothing_is_done(http, cluster, path, wrong, said):
    body = json.dumps({**POSTS[path], **wrong})
    answer = http.post(path, content=body, headers={"content-type": "application/json"})
    assert said in error_of(answer, 400, "invalid_request")
    assert cluster.asked == []


@pytest.mark.parametrize(
    ("path", "body", "said"),
    [
        ("/v1/pools/decode/scale", {}, "replicas"),
        ("/v1/pools/decode/scale", {"replicas": -1}, "replicas"),
        ("/v1/pools/decode/scale", {"replicas": 1.5}, "replicas"),
        ("/v1/pools/decode/scale", {"replicas": True}, "replicas"),
        ("/v1/pools/decode/scale", [], "dictionary"),
        ("/v1/pools/De%20code/scale", {"replicas": 1}, "pool"),
        ("/v1/workers/decode/0/role", {}, "role"),
        ("/v1/workers/decode/0/role", {"role": "mixed"}, "role"),
        ("/v1/workers/decode/0/role", {"role": "prefill", "may_restart": 1}, "may_restart"),
        ("/v1/workers/decode/x/drain", {}, "index"),
        ("/v1/workers/decode/-1/drain", {}, "index"),
        ("/v1/nodes/a%20b/drain", {}, "node"),
        ("/v1/nodes/a/return", {"grace_s": 1}, "grace_s"),
        ("/v1/apply", {}, "serving"),
        ("/v1/apply", {"serving": {"model": {"id": "m"}}}, "serving.pools"),
        ("/v1/plan", {"serving": []}, "serving"),
        ("/v1/plan", {**wire.serving_body(SERVING), "surge": True}, "surge"),
    ],
)
def test_what_the_document_does_not_allow_is_named(http, cluster, path, body, said):
    assert said in error_of(http.post(path, json=body), 400, "invalid_request")
    assert cluster.asked == cluster.planned == []


@pytest.mark.parametrize(
    "headers",
    [
        {"x-pdcluster-asked-by": "x" * 129},
        {"x-pdcluster-asked-by": b"\x1b[2J"},
        {"x-pdcluster-asked-by": ""},
        {"x-pdcluster-asked-by": "\u00e4da".encode("latin-1")},
        {"idempotency-key": "k" * 129},
        {"idempotency-key": "a b"},
    ],
)
def test_a_wrong_header_is_named(http, cluster, headers):
    answer = http.post("/v1/pools/decode/scale", json={"replicas": 2}, headers=headers)
    assert next(iter(headers)) in error_of(answer, 400, "invalid_request")
    assert cluster.asked == []


def test_what_the_controller_refuses_comes_with_its_own_words(http, cluster):
    cluster.refuses = "replicas of decode: found 99; write at most 64"
    answer = http.post("/v1/pools/decode/scale", json={"replicas": 99})
    assert error_of(answer, 400, "refused") == cluster.refuses


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("/v1/pools/decod/scale", "no pool decod; did you mean `decode`?"),
        ("/v1/workers/xyz/9/drain", "no worker xyz/9; write one of: decode/0, decode/1"),
        ("/v1/workers/decode/7/role", "no worker decode/7; did you mean"),
    ],
)
def test_an_unknown_name_is_told_with_those_there_are(http, cluster, path, said):
    body = {"scale": {"replicas": 1}, "role": {"role": "decode"}, "drain": {}}
    answer = http.post(path, json=body[path.rpartition("/")[2]])
    assert said in error_of(answer, 404, "unknown_name")
    assert cluster.asked == []


def test_a_change_is_told_as_it_is_now(http, cluster):
    http.post("/v1/pools/decode/scale", json={"replicas": 2})
    cluster.course = [
        {"waits_for": "decode/1 loads", "steps": (Step(101.0, "decode/1 started"),)},
        {**DONE, "measures": (Measure("ready replicas of decode", "replicas", 1, 2),)},
    ]
    running = wire.read_change(http.get("/v1/changes/1").content)
    assert (running.waits_for, running.took_s) == ("decode/1 loads", None)
    done = wire.read_change(http.get("/v1/changes/1").content)
    assert (done, done.took_s) == (cluster.known[1], 2.5)
    assert wire.read_changes(http.get("/v1/changes").content) == (done,)


def test_a_change_that_is_not_known_is_told_so(http):
    assert "no change 9" in error_of(http.get("/v1/changes/9"), 404, "unknown_name")
    assert "id" in error_of(http.get("/v1/changes/x"), 400, "invalid_request")


def test_a_plan_is_made_and_nothing_asked(http, cluster):
    cluster.answers = Plan(
        (PlanStep("replace 2 workers of decode", ("pools[decode].engine_args",)),),
        (PlanStep("pdcluster down, then up", ("gateway.port",)),),
    )
    answer = http.post("/v1/plan", json=wire.serving_body(SERVING))
    assert (answer.status_code, wire.read_plan(answer.content)) == (200, cluster.answers)
    assert (cluster.planned, cluster.asked) == ([SERVING], [])


def test_events_are_those_after_a_number(http, cluster):
    def seen(query):
        return [told.seq for told in wire.read_events(http.get(f"/v1/events{query}").content)]

    assert seen("") == [1, 2]
    assert seen("?after=1") == [2]
    assert seen("?after=2&wait_s=0.01") == []
    assert wire.read_events(http.get("/v1/events").content) == tuple(cluster.happened)


@pytest.mark.parametrize(
    ("query", "said"),
    [("after=-1", "after"), ("wait_s=31", "wait_s"), ("wait_s=-1", "wait_s"), ("wait_s=nan", "w")],
)
def test_events_are_waited_for_within_bounds(http, query, said):
    assert said in error_of(http.get(f"/v1/events?{query}"), 400, "invalid_request")


# Requests that come twice

SCALE = ("/v1/pools/decode/scale", {"replicas": 2})


def post(http, key, path="/v1/pools/decode/scale", **body):
    return http.post(path, json=body or {"replicas": 2}, headers={"idempotency-key": key})


def test_a_repeated_request_is_the_same_change_as_it_is_now(new_http, cluster):
    first = wire.read_change(post(new_http, "k1").content)
    cluster.course = [DONE]
    again = post(new_http, "k1")
    assert again.status_code == 202
    assert wire.read_change(again.content) == replace(first, **DONE)
    assert wire.read_change(post(new_http, "k2").content).id == 2
    assert len(cluster.asked) == 2


def test_a_repeat_is_known_also_when_what_it_is_about_is_gone(new_http, cluster, monkeypatch):
    first = post(new_http, "k", "/v1/workers/decode/0/drain", grace_s=1.0)
    gone = replace(STATUS, workers=(), failed=())

    async def status():
        return gone

    monkeypatch.setattr(cluster, "status", status)
    again = post(new_http, "k", "/v1/workers/decode/0/drain", grace_s=1.0)
    assert again.content == first.content
    assert len(cluster.asked) == 1


def test_a_key_is_of_one_request_only(new_http, cluster):
    post(new_http, "k")
    assert "make a new one" in error_of(post(new_http, "k", replicas=3), 400, "refused")
    assert len(cluster.asked) == 1


def test_a_refused_request_may_come_again(new_http, cluster):
    cluster.refuses = "not now"
    assert post(new_http, "k").status_code == 400
    cluster.refuses = ""
    assert post(new_http, "k").status_code == 202


def test_the_oldest_keys_are_forgotten(new_http, cluster, monkeypatch):
    monkeypatch.setattr(api_changes, "KEYS_KEPT", 2)
    for key in ("k1", "k2", "k3", "k3", "k2"):
        post(new_http, key)
    assert len(cluster.asked) == 3
    post(new_http, "k1")
    assert len(cluster.asked) == 4


def test_a_change_that_the_controller_has_forgotten_is_told_as_it_began(new_http, cluster):
    first = post(new_http, "k")
    cluster.known.clear()
    assert post(new_http, "k").content == first.content


async def test_a_request_that_comes_again_while_it_is_under_way_is_one_change(cluster):
    cluster.asking.clear()
    app = create_app(cluster, Bearer(TOKEN))
    headers = {"authorization": f"Bearer {TOKEN}", "idempotency-key": "k"}
    transport = httpx.ASGITransport(app)
    async with (
        httpx.AsyncClient(transport=transport, base_url="http://x", headers=headers) as client,
        asyncio.TaskGroup() as group,
    ):
        asked = [group.create_task(client.post(SCALE[0], json=SCALE[1])) for _ in range(3)]
        await cluster.was_asked.wait()
        for _ in range(100):  # the others get as far as they get
            await asyncio.sleep(0)
        assert len(cluster.asked) == 1
        cluster.asking.set()
    assert {task.result().content for task in asked} == {wire.change_json(cluster.known[1])}
    assert len(cluster.asked) == 1


# The document

ERRORS_OF_ALL = {"401", "503", "default"}


@pytest.mark.parametrize(
    ("path", "method", "ok", "errors"),
    [
        ("/v1/pools/{pool}/scale", "post", "202", {"400", "404"}),
        ("/v1/workers/{pool}/{index}/role", "post", "202", {"400", "404"}),
        ("/v1/workers/{pool}/{index}/drain", "post", "202", {"400", "404"}),
        ("/v1/nodes/{node}/drain", "post", "202", {"400"}),
        ("/v1/nodes/{node}/return", "post", "202", {"400"}),
        ("/v1/plan", "post", "200", {"400"}),
        ("/v1/apply", "post", "202", {"400"}),
        ("/v1/changes", "get", "200", {"400"}),
        ("/v1/changes/{id}", "get", "200", {"400", "404"}),
        ("/v1/events", "get", "200", {"400"}),
        ("/v1/scaling", "get", "200", set()),
        ("/v1/live", "get", "200", {"400"}),
        ("/v1/status", "get", "200", set()),
        ("/v1/transfers", "get", "200", {"400"}),
        ("/v1/workers/{pool}/{index}/log", "get", "200", {"400", "404"}),
    ],
)
def test_the_document_has_every_route_with_its_answers(http, path, method, ok, errors):
    document = http.get("/openapi.json").json()
    route = document["paths"][path][method]
    assert set(route["responses"]) == {ok, *errors, *ERRORS_OF_ALL}
    for status, answer in route["responses"].items():
        assert answer["description"]
        if status != ok:
            schema = answer["content"]["application/json"]["schema"]
            assert schema == {"$ref": "#/components/schemas/Refusal"}
    assert route["description"]
    assert route["security"] == [{"HTTPBearer": []}]
    assert ("requestBody" in route) == (method == "post")
    if ok == "202":
        assert route["responses"][ok]["content"]["application/json"]["schema"] == {
            "$ref": "#/components/schemas/Change"
        }
        headers = {p["name"] for p in route["parameters"] if p["in"] == "header"}
        assert headers == {"x-pdcluster-asked-by", "idempotency-key"}


def test_every_route_has_its_errors_in_one_shape_and_an_id_of_its_own(http):
    document = http.get("/openapi.json").json()
    routes = [
        route
        for path, verbs in document["paths"].items()
        for route in verbs.values()
        if path.startswith("/v1")
    ]
    assert len(routes) > 12
    for route in routes:
        assert route["responses"].keys() >= {"401", "default"}
        assert "422" not in route["responses"]
        for status, answer in route["responses"].items():
            if status not in ("200", "202"):
                schema = answer["content"]["application/json"]["schema"]
                assert schema == {"$ref": "#/components/schemas/Refusal"}
    ids = {route["operationId"] for route in routes}
    assert len(ids) == len(routes)
