"""Transfer records reach whoever listens, and never disturb the engine that sends them."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from cluster.transfers import TransferRecord, TransferReporter, parse

RECORD = TransferRecord("cmpl-abc-0", "decode", "pulled", 1.5, 100, 64, 36, 3, 4096, 0.01)


def test_a_record_arrives_as_it_was_sent(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        listener.settimeout(5)
        TransferReporter(path).send(RECORD)
        assert parse(listener.recv(65536)) == RECORD


def test_sending_to_nobody_is_harmless(tmp_path: Path) -> None:
    TransferReporter(str(tmp_path / "nobody")).send(RECORD)
    TransferReporter(None).send(RECORD)


def test_a_full_socket_drops_the_record_and_does_not_block(tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(path)
        reporter = TransferReporter(path)
        for _ in range(10_000):  # nobody reads
            reporter.send(RECORD)


@pytest.mark.parametrize("datagram", [b"", b"\xff", b"[]", b"{}", b'{"request_id": 1, "extra": 2}'])
def test_what_is_not_a_record_is_refused(datagram: bytes) -> None:
    with pytest.raises(ValueError, match="not a transfer record"):
        parse(datagram)
