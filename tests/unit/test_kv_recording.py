"""What the connectors write down and how they are told to let go, without an engine."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cluster.kv.connectors.recording import (
    MAX_CLAIMS,
    Claims,
    PullLog,
    RecordingConnector,
    SendLog,
    block_bytes,
)
from cluster.kv.connectors.release import (
    MAX_REMEMBERED_RELEASES,
    REMEMBER_RELEASE_S,
    Releases,
    parse_release,
    release_socket_path,
)
from cluster.transfers import RELEASE_SOCKET_ENV, TransferRecord


class Reporter:
    def __init__(self) -> None:
        self.records: list[TransferRecord] = []

    def send(self, record: TransferRecord) -> None:
        self.records.append(record)


class FakeClock:
    def __init__(self) -> None:
        self.now_s = 10.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def reporter() -> Reporter:
    return Reporter()


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def pulls(reporter: Reporter, clock: FakeClock) -> PullLog:
    return PullLog(reporter, [1000], now_s=clock, wall_s=lambda: 7.0)  # type: ignore[arg-type]


def test_a_pull_is_told_with_what_was_held_and_what_was_moved(
    pulls: PullLog, reporter: Reporter, clock: FakeClock
) -> None:
    pulls.considered("r", 128)
    pulls.began("r", 300, 172, [[5, 6]])
    assert reporter.records == []
    clock.now_s += 0.25
    pulls.ended({"r"}, (), ())
    assert reporter.records == [
        TransferRecord(
            "r",
            "decode",
            "pulled",
            7.0,
            prompt_tokens=300,
            tokens_held=128,
            tokens_pulled=172,
            blocks_pulled=2,
            bytes_pulled=2000,
            took_s=0.25,
        )
    ]


def test_with_nothing_to_pull_the_transfer_is_held(pulls: PullLog, reporter: Reporter) -> None:
    pulls.considered("r", 256)
    pulls.began("r", 256, 0, [])
    (record,) = reporter.records
    assert (record.outcome, record.tokens_held, record.tokens_pulled) == ("held", 256, 0)
    pulls.ended({"r"}, (), ())
    assert len(reporter.records) == 1


@pytest.mark.parametrize("told", ["by request", "by block", "by block, earlier"])
def test_a_failed_pull_claims_no_bytes(pulls: PullLog, reporter: Reporter, told: str) -> None:
    pulls.began("bad", 100, 100, [[1, 2]])
    pulls.began("good", 100, 100, [[3, 4]])
    if told == "by request":
        pulls.ended({"bad", "good"}, {"bad"}, ())
    elif told == "by block":
        pulls.ended({"bad", "good"}, (), {2})
    else:
        pulls.ended((), (), {2})
        pulls.ended({"bad", "good"}, (), ())
    by_id = {record.request_id: record for record in reporter.records}
    assert (by_id["bad"].outcome, by_id["bad"].bytes_pulled) == ("failed", 0)
    assert by_id["good"].outcome == "pulled"


def test_bytes_count_every_group_layer_and_rank() -> None:
    plain = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(page_size_bytes=10), layer_names=["a"] * 3
    )
    united = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(page_size_bytes=70, kv_cache_specs={}), layer_names=["a"] * 3
    )
    assert block_bytes([plain, united], ranks=2) == (60, 140)


def test_pinned_blocks_end_taken_expired_or_released(reporter: Reporter, clock: FakeClock) -> None:
    sends = SendLog(reporter, now_s=clock, wall_s=lambda: 7.0)  # type: ignore[arg-type]
    sends.pinned(["a", "b", "c"])
    sends.release_asked(["c"])
    clock.now_s += 2.0
    sends.taken(["a"])
    sends.let_go(["b", "c"])
    assert [(r.request_id, r.outcome, r.took_s) for r in reporter.records] == [
        ("a", "taken", 2.0),
        ("b", "expired", 2.0),
        ("c", "released", 2.0),
    ]
    assert not sends.releasing


def test_what_was_taken_before_its_release_came_is_taken(reporter: Reporter) -> None:
    sends = SendLog(reporter)  # type: ignore[arg-type]
    sends.release_asked(["a"])
    sends.taken(["a"])
    assert [record.outcome for record in reporter.records] == ["taken"]
    assert not sends.releasing


def test_only_one_rank_speaks() -> None:
    SendLog(None).let_go(["a"])


# -- release -------------------------------------------------------------------------------------


@dataclass
class Inbox:
    path: str
    releases: Releases
    clock: FakeClock
    _socket: socket.socket = field(
        default_factory=lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    )

    def send(self, *ids: object) -> None:
        self._socket.sendto(json.dumps(ids).encode(), self.path)

    def send_bytes(self, data: bytes) -> None:
        self._socket.sendto(data, self.path)


@pytest.fixture
def inbox(tmp_path: Path, clock: FakeClock) -> Iterator[Inbox]:
    path = str(tmp_path / "r.sock")
    inbox = Inbox(path, Releases(path, clock), clock)
    yield inbox
    inbox.releases.close()
    inbox._socket.close()


ID = "0123456789abcdef"
ENGINES_ID = f"chatcmpl-{ID}-1a2b3c4d"


def test_a_pinned_request_is_released_once_by_a_part_of_its_id(inbox: Inbox) -> None:
    inbox.releases.pin(ENGINES_ID)
    inbox.releases.pin("chatcmpl-somebody-else-1a2b3c4d")
    assert inbox.releases.due() == frozenset()
    inbox.send(ID)
    assert inbox.releases.due() == {ENGINES_ID}
    assert inbox.releases.due() == frozenset()


def test_a_release_that_came_before_the_request_ended_is_remembered(inbox: Inbox) -> None:
    inbox.send(ID)
    assert inbox.releases.due() == frozenset()
    inbox.releases.pin(ENGINES_ID)
    assert inbox.releases.due() == {ENGINES_ID}


def test_a_remembered_release_is_forgotten_in_time(inbox: Inbox) -> None:
    inbox.send(ID)
    inbox.releases.due()
    inbox.clock.now_s += REMEMBER_RELEASE_S
    inbox.releases.pin(ENGINES_ID)
    assert inbox.releases.due() == frozenset()


def test_releases_that_match_nothing_take_bounded_memory(inbox: Inbox) -> None:
    for start in range(0, 3 * MAX_REMEMBERED_RELEASES, 500):
        inbox.send(*(f"request-{number:08d}" for number in range(start, start + 500)))
        inbox.releases.due()
    assert len(inbox.releases._remembered) == MAX_REMEMBERED_RELEASES


def test_a_request_that_was_taken_meanwhile_is_not_due(inbox: Inbox) -> None:
    inbox.releases.pin(ENGINES_ID)
    inbox.releases.unpin([ENGINES_ID])
    inbox.send(ID)
    assert inbox.releases.due() == frozenset()


@pytest.mark.parametrize("part", ["0123456789abcde", "123456789abcdef", "a2b3c4d1"])
def test_an_id_matches_whole_or_not_at_all(inbox: Inbox, part: str) -> None:
    inbox.releases.pin(ENGINES_ID)
    inbox.send(part)
    assert inbox.releases.due() == frozenset()


@pytest.mark.parametrize(
    "datagram", [b"", b"{", b"{}", b"7", b'"x"', b"[1, null]", b'["short"]', b'[""]', b"\xff\xfe"]
)
def test_a_malformed_release_is_left_out(inbox: Inbox, datagram: bytes) -> None:
    assert parse_release(datagram) == []
    inbox.releases.pin(ENGINES_ID)
    inbox.send_bytes(datagram)
    inbox.send(ID)
    assert inbox.releases.due() == {ENGINES_ID}


def test_a_stale_socket_is_replaced_and_ours_is_removed_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "r.sock"
    first = Releases(str(path))
    second = Releases(str(path))
    assert stat.S_ISSOCK(path.stat().st_mode)
    second.close()
    second.close()
    assert not path.exists()
    first.close()


def test_data_parallel_ranks_listen_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(RELEASE_SOCKET_ENV, raising=False)
    assert release_socket_path(0) is None
    monkeypatch.setenv(RELEASE_SOCKET_ENV, "/run/r.sock")
    assert (release_socket_path(0), release_socket_path(2)) == ("/run/r.sock", "/run/r.sock.2")


# -- the mixin, over a stock connector that does what vLLM's do ----------------------------------


class StockConnector:
    """The parts of a NIXL connector that the mixin builds upon."""

    def __init__(self) -> None:
        self.connector_scheduler: Any = SimpleNamespace(_reqs_need_recv={})
        self.connector_worker: Any = None
        self._connector_metadata: Any = None

    def on_new_request(self, request: Any) -> None:
        pass

    def get_num_new_matched_tokens(self, request: Any, computed: int) -> tuple[int, bool]:
        return request.num_prompt_tokens - computed, True

    def update_state_after_alloc(self, request: Any, blocks: Any, external: int) -> None:
        if (request.kv_transfer_params or {}).get("do_remote_prefill"):
            self.connector_scheduler._reqs_need_recv[request.request_id] = (request, blocks)
            request.kv_transfer_params["do_remote_prefill"] = False

    def request_finished_all_groups(self, request: Any, ids: Any) -> tuple[bool, None]:
        return bool((request.kv_transfer_params or {}).get("do_remote_decode")), None

    def build_connector_meta(self, scheduler_output: Any) -> Any:
        return SimpleNamespace()

    def update_connector_output(self, output: Any) -> None:
        pass

    def start_load_kv(self, context: Any) -> None:
        pass

    def shutdown(self) -> None:
        pass


class Connector(RecordingConnector, StockConnector):
    pass


@pytest.fixture
def connector(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, reporter: Reporter
) -> Iterator[Connector]:
    monkeypatch.setenv(RELEASE_SOCKET_ENV, str(tmp_path / "r.sock"))
    monkeypatch.setattr("cluster.kv.connectors.recording.TransferReporter", lambda: reporter)
    connector = Connector()
    group = SimpleNamespace(
        kv_cache_spec=SimpleNamespace(page_size_bytes=500), layer_names=["a", "b"]
    )
    connector._record(
        SimpleNamespace(
            parallel_config=SimpleNamespace(tensor_parallel_size=1, data_parallel_index=0)
        ),
        SimpleNamespace(kv_cache_groups=[group], transfer_group_ids=(0,)),
    )
    yield connector
    connector.shutdown()


def request(**params: object) -> Any:
    return SimpleNamespace(
        request_id=ENGINES_ID, num_prompt_tokens=300, kv_transfer_params=params or None
    )


def output(**told: object) -> Any:
    known = {
        "finished_recving": None,
        "finished_sending": None,
        "failed_recving": set(),
        "invalid_block_ids": set(),
    }
    return SimpleNamespace(**{**known, **told})


def test_decode_side_records_a_pull(connector: Connector, reporter: Reporter) -> None:
    wants = request(do_remote_prefill=True)
    assert connector.get_num_new_matched_tokens(wants, 128) == (172, True)
    connector.update_state_after_alloc(wants, [[4, 5]], 172)
    connector.update_connector_output(output(finished_recving={ENGINES_ID}))
    (record,) = reporter.records
    assert (record.outcome, record.tokens_held, record.tokens_pulled) == ("pulled", 128, 172)
    assert (record.blocks_pulled, record.bytes_pulled) == (2, 2000)


@pytest.mark.parametrize("key", ["remote_request_id", "transfer_id"])
def test_a_transfer_is_pulled_by_the_first_request_that_names_it(
    connector: Connector, key: str
) -> None:
    params = {"do_remote_prefill": True, key: "t"}
    first, second = request(), request()
    second.request_id = "another"
    first.kv_transfer_params = second.kv_transfer_params = params
    for one in (first, second, first):
        connector.on_new_request(one)
    assert first.kv_transfer_params["do_remote_prefill"] is True
    assert second.kv_transfer_params["do_remote_prefill"] is False


def test_claims_take_bounded_memory() -> None:
    claims = Claims()
    for number in range(2 * MAX_CLAIMS):
        assert claims.take({"transfer_id": f"t{number}"}, f"r{number}")
    assert len(claims._claimed_by) == MAX_CLAIMS


def test_a_request_without_transfer_leaves_no_record(
    connector: Connector, reporter: Reporter
) -> None:
    plain = request()
    connector.get_num_new_matched_tokens(plain, 0)
    connector.update_state_after_alloc(plain, [[1]], 0)
    connector.request_finished_all_groups(plain, ([1],))
    connector.update_connector_output(output(finished_recving={ENGINES_ID}))
    assert reporter.records == []


def test_prefill_side_grants_and_passes_a_release_to_the_workers(
    connector: Connector, reporter: Reporter, tmp_path: Path
) -> None:
    connector.request_finished_all_groups(request(do_remote_decode=True), ([1],))
    assert [(record.side, record.outcome) for record in reporter.records] == [
        ("prefill", "granted")
    ]
    assert not hasattr(connector.build_connector_meta(None), "pdcluster_release")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sender:
        sender.sendto(json.dumps([ID]).encode(), str(tmp_path / "r.sock"))
    meta = connector.build_connector_meta(None)
    assert meta.pdcluster_release == {ENGINES_ID}

    released: list[Any] = []
    worker_side = Connector()
    worker_side.connector_scheduler = None
    worker_side.connector_worker = SimpleNamespace(release=released.append)
    worker_side._connector_metadata = meta
    worker_side.start_load_kv(None)
    assert released == [{ENGINES_ID}]


def test_what_the_workers_freed_is_no_longer_pinned(connector: Connector) -> None:
    connector.request_finished_all_groups(request(do_remote_decode=True), ([1],))
    connector.update_connector_output(output(finished_sending={ENGINES_ID}))
    assert connector._releases is not None
    assert not connector._releases._pinned


def test_requests_that_never_got_blocks_are_forgotten(connector: Connector) -> None:
    wants = request(do_remote_prefill=True)
    connector.get_num_new_matched_tokens(wants, 0)
    connector.request_finished_all_groups(wants, ((),))
    assert connector._pulls is not None
    assert not connector._pulls._held
