"""The control API against a fake controller, and its client against both."""

from __future__ import annotations

import json
import logging
import socket
import threading
from dataclasses import replace

import pytest
from fastapi.testclient import TestClient
from ports import free_port
from served_api import InPlaceOf, Served

from cluster.control import wire
from cluster.control.api import Bearer, create_app
from cluster.control.client import Access, ControlClient, ControlError
from cluster.control.events import Recorded, WorkerMoved, WorkerNotStarted, WorkerRemoved
from cluster.control.state import ClusterStatus, FailedSlot, LinkStatus, LogWindow, PoolStatus
from cluster.control.store import ApiAccess
from cluster.errors import ClusterError, InvalidInput, PeerGone
from cluster.identity import Role, WorkerId, WorkerState
from cluster.snapshot import Fingerprint, Link, Load
from cluster.transfers import TransferRecord
from cluster.workers.report import Counters, WorkerReport

TOKEN = "pdctl-a-token"
WORKER = WorkerId("decode", 0, 2)
REPORT = WorkerReport(
    id=WORKER,
    role=Role.DECODE,
    state=WorkerState.READY,
    message="",
    node_ip="127.0.0.1",
    url="http://127.0.0.1:20001",
    started_at_s=150.0,
    stage_s={"loading": 1.5},
    fingerprint=Fingerprint("m", "none", "float32", 16, "nixl", "1", "vllm", "0.32", "0"),
    kv={"engine_id": "e", "port": 5},
    load=Load(1, 2, 0.5),
    counters=Counters(spec_drafts=2, spec_accepted=3),
    last_words=("a line",),
)
EVENTS = (
    WorkerMoved(WORKER, WorkerState.STARTING, WorkerState.READY, ""),
    WorkerNotStarted(WORKER, "no such module"),
    WorkerRemoved(WORKER, "exit code 1", 2.0),
)
STATUS = ClusterStatus(
    cluster="c",
    model="m",
    version=7,
    controller_started_at_s=120.0,
    pools=(PoolStatus("decode", Role.DECODE, "vllm", desired=1, present=1, ready=1),),
    workers=(REPORT,),
    failed=(FailedSlot("decode/1", 2, None, "exit code 1", ("last", "words")),),
    links=(LinkStatus(Link("p", "decode", "nixl", 30.0, "recompute"), False, ("unlike",)),),
    events=tuple(Recorded(seq, 150.0, event).told() for seq, event in enumerate(EVENTS, 1)),
)
RECORD = TransferRecord("chat-r1-0", "decode", "pulled", 5.0, tokens_pulled=37, took_s=0.01)


class FakeController:
    def __init__(self):
        self.asked = []
        self.fault = None

    async def status(self):
        if self.fault is not None:
            raise self.fault
        return STATUS

    async def transfers(self, request_id):
        self.asked.append(request_id)
        return [RECORD]

    async def read_log(self, worker, offset, limit_bytes, rank=0):
        self.asked.append((worker, offset, limit_bytes, rank))
        if rank == 7:
            raise InvalidInput("rank of decode/0: found 7; it has ranks 0 to 1")
        if worker != "decode/0":
            raise PeerGone(worker, "no such worker runs now")
        if offset == 13:
            raise PeerGone("decode/0#2", "no answer for 10 s")
        return LogWindow(b"\xff\x00 a log", 99, 2)


@pytest.fixture
def controller():
    return FakeController()


@pytest.fixture
def bearer(app):
    app.bearer.replace(TOKEN)
    return app.bearer


class App:
    """One for all tests."""

    def __init__(self):
        self.bearer = Bearer(TOKEN)
        self.controls = InPlaceOf()
        self.app = create_app(self.controls, self.bearer)


@pytest.fixture(scope="module")
def app():
    return App()


@pytest.fixture
def http(app, controller, bearer):
    """With the token; a fault of the app is an answer, as for a real client."""
    app.controls.controller = controller
    client = TestClient(app.app, raise_server_exceptions=False)
    client.headers["authorization"] = f"Bearer {TOKEN}"
    return client


ROUTES = [
    "/v1/status",
    "/v1/transfers?request_id=r1",
    "/v1/workers/decode/0/log",
    "/openapi.json",
    "/no/such/path",
    "/health/",
]


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize(
    "header", [None, "", "Bearer", "Bearer ", "Bearer wrong", TOKEN, f"Basic {TOKEN}"]
)
def test_without_the_token_nothing_is_told_not_even_what_exists(http, controller, path, header):
    del http.headers["authorization"]
    answer = http.get(path, headers={"authorization": header} if header is not None else {})
    assert answer.status_code == 401
    assert answer.headers["www-authenticate"] == "Bearer"
    assert answer.json()["error"]["type"] == "unauthorized"
    assert controller.asked == []


def test_a_body_without_the_token_is_not_read(http):
    answer = http.post(
        "/v1/status", content=b"{not json", headers={"authorization": "Bearer wrong"}
    )
    assert answer.status_code == 401


def test_health_asks_for_no_token_and_tells_nothing(http):
    del http.headers["authorization"]
    answer = http.get("/health")
    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


def test_another_token_ends_the_former_one(http, bearer):
    bearer.replace("another")
    assert http.get("/v1/status").status_code == 401
    assert http.get("/v1/status", headers={"authorization": "bearer another"}).status_code == 200


def test_status_crosses_the_wire_whole(http):
    answer = http.get("/v1/status")
    assert answer.headers["content-type"] == "application/json"
    assert wire.read_status(answer.content) == STATUS
    said = answer.json()
    assert said["workers"][0]["state"] == "ready"
    assert said["events"][1] == {
        "seq": 2,
        "at_s": 150.0,
        "kind": "WorkerNotStarted",
        "subject": "decode/0#2",
        "text": "decode/0#2 not started why='no such module'",
        "fields": {"why": "no such module"},
    }


def test_a_newer_heads_further_keys_are_ignored(http):
    said = http.get("/v1/status").json()
    said["new"] = said["workers"][0]["newer"] = 1
    assert wire.read_status(json.dumps(said).encode()) == STATUS


def test_transfers_are_those_of_the_request(http, controller):
    answer = http.get("/v1/transfers", params={"request_id": "r1"})
    assert wire.read_transfers(answer.content) == (RECORD,)
    assert controller.asked == ["r1"]


def test_a_log_is_bytes_with_the_place_to_go_on_and_whose_it_is(http, controller):
    answer = http.get("/v1/workers/decode/0/log", params={"offset": -40, "limit_bytes": 40})
    assert answer.content == b"\xff\x00 a log"
    assert answer.headers["content-type"] == "application/octet-stream"
    assert answer.headers["x-next-offset"] == "99"
    assert answer.headers["x-worker-generation"] == "2"
    assert controller.asked == [("decode/0", -40, 40, 0)]


@pytest.mark.parametrize(
    ("path", "status", "kind", "said"),
    [
        ("/v1/workers/decode/7/log", 404, "worker_gone", "no such worker"),
        ("/v1/workers/decode/0/log?offset=13", 503, "worker_gone", "no answer for 10 s"),
        ("/v1/workers/decode/x/log", 400, "invalid_request", "index"),
        ("/v1/workers/decode/-1/log", 400, "invalid_request", "index"),
        ("/v1/workers/De%20code/0/log", 400, "invalid_request", "pool"),
        ("/v1/workers/decode/0/log?limit_bytes=0", 400, "invalid_request", "limit_bytes"),
        (f"/v1/workers/decode/0/log?limit_bytes={1 << 40}", 400, "invalid_request", "limit_bytes"),
        ("/v1/transfers", 400, "invalid_request", "request_id"),
        ("/v1/transfers?request_id=", 400, "invalid_request", "request_id"),
        ("/v1/nothing", 404, "not_found", "Not Found"),
    ],
)
def test_each_fault_has_its_status_type_and_words(http, path, status, kind, said):
    answer = http.get(path)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert set(error) == {"message", "type"}
    assert error["type"] == kind
    assert said in error["message"]


def test_a_wrong_method_is_told_in_the_same_shape(http):
    answer = http.post("/v1/status")
    assert answer.status_code == 405
    assert answer.headers["allow"] == "GET"
    assert answer.json()["error"]["type"] == "method_not_allowed"


def test_a_mistake_of_ours_tells_no_insides(http, controller, caplog):
    controller.fault = RuntimeError("secret insides")
    with caplog.at_level(logging.CRITICAL):
        answer = http.get("/v1/status")
    assert answer.status_code == 500
    assert "insides" not in answer.text
    controller.fault = ClusterError("the store does not answer")
    answer = http.get("/v1/status")
    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "unavailable")


def test_the_document_names_every_path_and_the_token(http):
    document = http.get("/openapi.json").json()
    reading = {"/v1/status", "/v1/transfers", "/v1/workers/{pool}/{index}/log"}
    assert reading < set(document["paths"])
    for path, methods in document["paths"].items():
        for method in methods.values():
            assert ("security" in method) == (path != "/health")
    assert document["components"]["securitySchemes"]["HTTPBearer"]["scheme"] == "bearer"
    assert "ClusterStatus" in document["components"]["schemas"]


def test_the_token_is_in_no_repr():
    assert TOKEN not in repr(ApiAccess("h", 1, TOKEN)) + repr(Access("http://h", TOKEN))


# The client, over a real socket


@pytest.fixture
def port():
    return free_port()


@pytest.fixture
def served(controller, port):
    served = Served(controller, port, TOKEN)
    served.wait_until(lambda: not served.server.problem)
    yield served
    served.end()


@pytest.fixture
def access(port):
    return Access(
        f"http://127.0.0.1:{port}", TOKEN, check="look at X", token_advice="set PDCLUSTER_Y"
    )


def test_the_client_gets_what_the_controller_says(served, access):
    client = ControlClient(access)
    assert client.status() == STATUS
    assert client.transfers("r1") == (RECORD,)
    assert client.read_log(WORKER, -5, 5) == LogWindow(b"\xff\x00 a log", 99, 2)


def test_a_longer_piece_of_a_log_than_there_is_in_one_answer_is_cut(served, access, controller):
    ControlClient(access).read_log(WORKER, 0, 1 << 40)
    assert controller.asked == [("decode/0", 0, wire.MOST_LOG_BYTES, 0)]


def test_the_log_of_another_node_of_a_replica_is_asked_for_by_its_rank(served, access, controller):
    client = ControlClient(access)
    client.read_log(WORKER, 0, 5, rank=1)
    assert controller.asked == [("decode/0", 0, 5, 1)]
    with pytest.raises(InvalidInput, match=r"^rank of decode/0: found 7; it has ranks 0 to 1"):
        client.read_log(WORKER, 0, 5, rank=7)


def test_a_refused_token_is_told_with_what_to_set(served, access):
    with pytest.raises(ControlError, match=r"refuses the token; set PDCLUSTER_Y"):
        ControlClient(replace(access, token="x")).status()


def test_a_worker_that_is_not_there_can_be_told_from_other_faults(served, access):
    with pytest.raises(PeerGone) as gone:
        ControlClient(access).read_log(WorkerId("decode", 7), 0, 5)
    assert (gone.value.worker, gone.value.why) == ("decode/7", "no such worker runs now")


def test_nobody_listening_is_told_with_the_address_and_what_to_look_at(access, port):
    with pytest.raises(ControlError, match=rf"127.0.0.1:{port} does not answer.*; look at X"):
        ControlClient(access).status()


def test_a_controller_that_is_being_restarted_is_waited_for(access, controller, port):
    late = []
    timer = threading.Timer(0.5, lambda: late.append(Served(controller, port, TOKEN)))
    timer.start()
    try:
        assert ControlClient(replace(access, patience_s=20.0)).status() == STATUS
    finally:
        timer.join()
        late[0].end()


def test_what_is_no_control_api_is_told_apart(access, port):
    with socket.create_server(("127.0.0.1", port)) as listener:

        def answer():
            connection, _ = listener.accept()
            connection.recv(4096)
            connection.sendall(b"HTTP/1.0 200 OK\r\n\r\n<html>")
            connection.close()

        thread = threading.Thread(target=answer, daemon=True)
        thread.start()
        with pytest.raises(ControlError, match="none that this pdcluster knows"):
            ControlClient(access).status()
        thread.join()


def test_a_taken_port_is_told_and_tried_again(controller, port, access):
    holder = socket.create_server(("127.0.0.1", port))
    served = Served(controller, port, TOKEN)
    try:
        served.wait_until(lambda: "address already in use" in served.server.problem)
        holder.close()
        served.wait_until(lambda: not served.server.problem)
        assert ControlClient(access).status() == STATUS
    finally:
        holder.close()
        served.end()
