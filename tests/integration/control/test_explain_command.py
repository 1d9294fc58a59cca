"""`pdcluster explain` over a running cluster, as an operator types it."""

from __future__ import annotations

import json
import time
import urllib.request

import pytest

pytestmark = pytest.mark.integration

PREFIX = "Tell me of the lighthouse keepers of the northern coast, at length. " * 6


def key_of(cluster):
    return (cluster.home.state(cluster.name) / "api-key").read_text().strip()


def ask(cluster, text, request_id=""):
    """One answer; its `x-request-id`."""
    endpoint = cluster.status()["endpoint"]
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 4, "stream": True}
    headers = {"authorization": f"Bearer {key_of(cluster)}", "content-type": "application/json"}
    if request_id:
        headers["x-request-id"] = request_id
    asked = urllib.request.Request(
        f"{endpoint}/v1/chat/completions", json.dumps(body).encode(), headers
    )
    with urllib.request.urlopen(asked, timeout=30) as answer:
        answer.read()
        return answer.headers["x-request-id"]


def explain(cluster, request_id):
    return cluster.home.json("explain", request_id, "--cluster", cluster.name)


def test_a_request_that_has_just_ended_is_explained(cluster):
    request_id = ask(cluster, PREFIX + "First.")
    found = explain(cluster, request_id)
    record = found["request"]
    assert record["request_id"] == request_id
    assert (record["status"], record["is_stream"], record["error"]) == (200, True, "")
    assert abs(record["arrived_at_s"] - time.time()) < 60
    assert record["answer_tokens"] >= 1
    (attempt,) = record["attempts"]
    assert attempt["prefill"].startswith("prefill/")
    assert attempt["decode"].startswith("decode/")
    assert attempt["route"] == "disaggregated"
    marks = [record[f"{name}_s"] for name in ("read", "placed", "rendered")]
    marks += [attempt[f"{name}_s"] for name in ("asked", "chosen", "prefill", "prefilled")]
    marks += [attempt[f"{name}_s"] for name in ("decode", "first", "ended")]
    assert marks == sorted(marks)
    assert marks[-1] <= record["ended_s"] < 30
    # What the engines say of it is of this request, and of what it pulled.
    outcomes = {(one["side"], one["outcome"]) for one in found["transfers"]}
    assert ("decode", "pulled") in outcomes
    pulled = next(one for one in found["transfers"] if one["outcome"] == "pulled")
    assert 0 < pulled["tokens_pulled"] <= record["prompt_tokens"] == pulled["prompt_tokens"]


def test_a_later_turn_says_what_decode_held(cluster):
    ask(cluster, PREFIX + "Second.")
    own = f"explained-{time.time_ns()}"
    assert ask(cluster, PREFIX + "Second. Go on.", own) == own
    text = cluster.home.run("explain", own, "--cluster", cluster.name).stdout
    assert f"request {own}: answered in" in text
    found = explain(cluster, own)
    (attempt,) = found["request"]["attempts"]
    assert f"attempt 0: {attempt['prefill']} to {attempt['decode']} over nixl" in text
    held = max(one["tokens_held"] for one in found["transfers"])
    assert held > 0
    assert f"{held} tokens were there (decode's own figures)" in text
    for name in ("route", "held", "pulled", "took", "queue", "render", "whole"):
        assert f"{name} " in text


def test_an_unknown_request_is_an_error_that_says_why(cluster):
    ask(cluster, "something")
    done = cluster.home.run("explain", "nobody", "--cluster", cluster.name, exit_code=1)
    assert "no request nobody is known: it has not ended yet" in done.stderr
    assert done.stdout == ""
    done = cluster.home.run("explain", "a b", "--cluster", cluster.name, exit_code=2)
    assert "request_id" in done.stderr


def test_a_killed_controller_learns_them_again(cluster):
    request_id = ask(cluster, "Who remembers?")
    before = explain(cluster, request_id)["request"]
    (process,) = cluster.home.actor(cluster.name, "ControllerActor")
    process.kill()
    process.wait(10)
    deadline_s = time.monotonic() + 40
    while True:
        done = cluster.home.start("explain", request_id, "--cluster", cluster.name, "--json")
        told, _ = done.communicate(timeout=60)
        if done.returncode == 0:
            break
        assert time.monotonic() < deadline_s
    assert json.loads(told)["request"] == before
