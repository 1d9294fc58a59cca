"""The client of the control API, when it changes a cluster: over a real socket, which may break."""

from __future__ import annotations

import http.client
import json
import socketserver
import threading
from dataclasses import replace

import pytest
from changing_cluster import ASKS, SERVING, ChangingCluster
from ports import free_port
from served_api import Served

from cluster.control import wire
from cluster.control.changes import (
    Change,
    Measure,
    Plan,
    PlanStep,
    Scale,
)
from cluster.control.client import Access, ControlClient, ControlError, UnknownName
from cluster.errors import InvalidInput
from cluster.topology.schema import ServingSpec

TOKEN = "pdctl-a-token"


@pytest.fixture
def cluster():
    return ChangingCluster()


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def client(cluster, port):
    served = Served(cluster, port, TOKEN)
    served.wait_until(lambda: not served.server.problem)
    yield ControlClient(Access(f"http://127.0.0.1:{port}", TOKEN, asked_by="ada@ops"))
    served.end()


@pytest.mark.parametrize("ask", ASKS, ids=lambda ask: ask.kind)
def test_the_client_asks_in_its_callers_name(client, cluster, ask):
    assert client.ask(ask, "rain") == cluster.known[1]
    assert cluster.asked == [(ask, "ada@ops", "rain")]


def test_the_client_reads_what_there_is(client, cluster):
    change = client.ask(Scale("decode", 2))
    assert client.change(change.id) == change
    assert client.changes() == (change,)
    assert client.events(1) == (cluster.happened[1],)
    assert client.events(2, 0.01) == ()
    cluster.answers = Plan((PlanStep("start decode/1"),))
    assert client.plan(SERVING) == cluster.answers


def test_a_refusal_is_the_operators_to_mend_and_carries_no_address(client, cluster):
    cluster.refuses = "write at most 64"
    with pytest.raises(InvalidInput, match=r"^write at most 64$"):
        client.ask(Scale("decode", 99))
    with pytest.raises(UnknownName, match=r"^no pool xyz"):
        client.ask(Scale("xyz", 1))
    with pytest.raises(UnknownName, match="no change 9"):
        client.change(9)
    with pytest.raises(InvalidInput, match=r"does not take it: .*replicas"):
        client.ask(Scale("decode", -1))


def test_a_head_that_has_no_such_route_is_not_an_unknown_name(client):
    with pytest.raises(ControlError, match="404 Not Found"):
        client._post("/v1/pools/decode/shrink", {})


class LosesAnswers:
    """A proxy to the API that breaks off the first `lost` answers, after the API has acted."""

    def __init__(self, lost, port):
        self.lost, self.port, self.keys = lost, port, []

    def __enter__(self):
        outer = self

        class Handler(socketserver.StreamRequestHandler):
            def handle(self):
                request = self.rfile.readline().decode().split()
                headers = http.client.parse_headers(self.rfile)
                body = self.rfile.read(int(headers.get("content-length", 0)))
                outer.keys.append(headers.get("idempotency-key"))
                onward = http.client.HTTPConnection("127.0.0.1", outer.port, timeout=10)
                onward.request(request[0], request[1], body, dict(headers))
                answer = onward.getresponse()
                said = answer.read()
                onward.close()
                if outer.lost:
                    outer.lost -= 1
                    return
                head = f"HTTP/1.1 {answer.status} x\r\ncontent-length: {len(said)}\r\n\r\n"
                self.wfile.write(head.encode() + said)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join(10)


def test_a_request_whose_answer_was_lost_is_sent_again_and_done_once(client, cluster, port):
    with LosesAnswers(2, port) as proxy:
        url = f"http://127.0.0.1:{proxy.server.server_address[1]}"
        patient = ControlClient(replace(client.access, url=url, patience_s=20.0))
        assert patient.ask(Scale("decode", 2)) == cluster.known[1]
        assert len(cluster.asked) == 1
        assert len(proxy.keys) == 3
        assert patient.ask(Scale("decode", 3)).id == 2
    assert len(set(proxy.keys)) == 2


def test_without_patience_a_lost_answer_is_told(client, cluster, port):
    with LosesAnswers(1, port) as proxy:
        url = f"http://127.0.0.1:{proxy.server.server_address[1]}"
        with pytest.raises(ControlError, match="does not answer"):
            ControlClient(replace(client.access, url=url)).ask(Scale("decode", 2))


def test_only_what_was_stated_of_a_serving_goes_out_and_means_the_same():
    body = wire.serving_body(SERVING)["serving"]
    assert ServingSpec.model_validate(body) == SERVING
    assert "kv_cache_gib" not in body["pools"][0]
    json.dumps(body, allow_nan=False)


def test_a_newer_heads_further_keys_are_ignored():
    change = Change(1, "scale", "scale it", "a@b", 1.0, measures=(Measure("x", "s", None, 1.0),))
    said = json.loads(wire.change_json(change))
    said["new"] = said["measures"][0]["newer"] = 1
    assert wire.read_change(json.dumps(said).encode()) == change
