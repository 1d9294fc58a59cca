import asyncio
import json
import socket

import pytest

from cluster.errors import InvalidInput
from cluster.transfers import TransferRecord, TransferReporter
from cluster.workers.ledger import RING_RECORDS, Ledger, TransferSocket, send_release


def record(request_id="r1", side="decode", outcome="pulled", at_s=1000.0, **more):
    return TransferRecord(request_id, side, outcome, at_s, **more)


def test_totals_add_up_over_pulled_held_and_failed():
    ledger = Ledger(lease_s=30)
    ledger.add(record(outcome="pulled", tokens_pulled=64, tokens_held=16, bytes_pulled=4096))
    ledger.add(record(outcome="held", tokens_held=80))
    ledger.add(record(outcome="failed"))
    assert (ledger.transfers, ledger.transfer_failures) == (2, 1)
    assert (ledger.tokens_pulled, ledger.tokens_held, ledger.bytes_pulled) == (64, 96, 4096)


@pytest.mark.parametrize("outcome", ["taken", "released", "expired"])
def test_a_lease_is_open_from_granted_until_its_end_whatever_the_end(outcome):
    ledger = Ledger(lease_s=30)
    ledger.add(record("a", "prefill", "granted"))
    ledger.add(record("b", "prefill", "granted"))
    assert ledger.leases_open(1001.0) == 2
    ledger.add(record("a", "prefill", outcome))
    assert ledger.leases_open(1001.0) == 1


def test_a_lease_whose_end_was_never_reported_is_not_counted_for_ever():
    ledger = Ledger(lease_s=100)
    ledger.add(record("lost", "prefill", "granted", at_s=1000.0))
    ledger.add(record("young", "prefill", "granted", at_s=2900.0))
    assert ledger.leases_open(2999.0) == 2
    assert ledger.leases_open(3001.0) == 1


def test_a_reader_goes_on_after_the_number_it_has_seen():
    ledger = Ledger(lease_s=30)
    for index in range(5):
        ledger.add(record(f"r{index}"))
    assert [seq for seq, _ in ledger.after(3)] == [4, 5]
    assert ledger.after(5) == []


def test_the_ring_forgets_the_oldest_and_keeps_numbering():
    ledger = Ledger(lease_s=30)
    for index in range(RING_RECORDS + 10):
        ledger.add(record(f"r{index}"))
    kept = ledger.after(0)
    assert len(kept) == RING_RECORDS
    assert kept[0][0] == 11


async def test_the_socket_takes_records_and_survives_what_is_none(tmp_path):
    ledger = Ledger(lease_s=30)
    listener = TransferSocket(tmp_path / "t", ledger)
    listener.open()
    reporter = TransferReporter(str(tmp_path / "t"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"\xff no json", str(tmp_path / "t"))
        stranger.sendto(b'{"request_id": "x"}', str(tmp_path / "t"))
    reporter.send(record("good", bytes_pulled=7))
    for _ in range(500):
        if ledger.bytes_pulled == 7:
            break
        await asyncio.sleep(0.01)
    assert [entry.request_id for _, entry in ledger.after(0)] == ["good"]
    listener.close()
    listener.close()


async def test_a_socket_path_that_the_kernel_would_refuse_is_named_with_the_fix(tmp_path):
    with pytest.raises(InvalidInput, match="XDG_RUNTIME_DIR"):
        TransferSocket(tmp_path / ("x" * 120), Ledger(lease_s=30)).open()


def test_release_sends_the_ids_as_a_json_list_in_bounded_datagrams(tmp_path):
    path = tmp_path / "release"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as engine:
        engine.bind(str(path))
        engine.settimeout(5)
        assert send_release(path, [f"request-{index}" for index in range(300)])
        first, second = json.loads(engine.recv(1 << 16)), json.loads(engine.recv(1 << 16))
    assert len(first) == 256
    assert first[0] == "request-0"
    assert second[-1] == "request-299"


def test_release_to_an_engine_that_does_not_listen_says_so(tmp_path):
    assert not send_release(tmp_path / "nobody", ["a"])
