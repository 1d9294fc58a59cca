"""cluster.kv.connectors.silence: connections whose other end says nothing are ended, others not."""

from __future__ import annotations

import socket
import struct
import time

import pytest

from cluster.kv.connectors import silence
from cluster.kv.connectors.silence import SILENT_FOR_S, SilenceBound, end_silent, silent_s


class Told:
    """A socket of which the kernel says this."""

    def __init__(self, retransmits: int, probes: int, last_ack_ms: int) -> None:
        self._info = struct.pack("=8B13I", 1, 0, retransmits, probes, *[0] * 16, last_ack_ms)

    def getsockopt(self, level: int, option: int, length: int) -> bytes:
        assert (level, option) == (socket.IPPROTO_TCP, socket.TCP_INFO)
        return self._info[:length]


@pytest.mark.parametrize(
    ("retransmits", "probes", "last_ack_ms", "silent"),
    [
        (0, 0, 60_000, 0.0),  # nobody has asked anything
        (1, 0, 60_000, 0.0),  # one packet was lost, or is on its way again
        (0, 1, 60_000, 0.0),
        (5, 0, 12_500, 12.5),
        (0, 4, 12_500, 12.5),
    ],
)
def test_silent_is_who_answers_nothing_again_and_again(retransmits, probes, last_ack_ms, silent):
    assert silent_s(Told(retransmits, probes, last_ack_ms)) == silent


def test_a_peer_that_does_not_read_for_a_while_is_not_silent() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as sender,
    ):
        receiver, _ = server.accept()
        with receiver:
            sender.setblocking(False)
            sent = 0
            while True:
                try:
                    sent += sender.send(bytes(1 << 20))
                except BlockingIOError:
                    break
            # Full: the kernel asks for room 0.2 s later, then at ever longer intervals.
            until_s = time.monotonic() + 2.0
            while time.monotonic() < until_s:
                assert end_silent(0.1) == 0
                time.sleep(0.1)
            sender.setblocking(True)
            got = 0
            while got < sent:
                got += len(receiver.recv(1 << 20))
            sender.sendall(b"x")
            assert receiver.recv(1) == b"x"


def test_a_silent_connection_is_ended_as_if_its_peer_had_closed_it(monkeypatch) -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as silent,
        socket.create_connection(server.getsockname()) as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    ):
        own_port = silent.getsockname()[1]

        def told(connected: socket.socket) -> float:
            return 12.0 if connected.getsockname()[1] == own_port else 0.0

        monkeypatch.setattr(silence, "silent_s", told)
        assert end_silent(12.5) == 0
        assert end_silent(11.5) == 1
        silent.settimeout(5)
        assert silent.recv(1) == b""
        with pytest.raises(BrokenPipeError):
            silent.sendall(b"x")
        # Neither was closed, nor the other one touched.
        accepted = [server.accept()[0] for _ in range(2)]
        other.sendall(b"x")
        assert any(peer.getpeername() == other.getsockname() for peer in accepted)
        for peer in accepted:
            peer.close()


def test_looks_are_at_most_one_a_second(monkeypatch) -> None:
    looked: list[float] = []
    monkeypatch.setattr(silence, "end_silent", looked.append)
    bound = SilenceBound()
    bound.look()
    bound.look()
    assert looked == [SILENT_FOR_S]
    bound._next_look_s = 0.0
    bound.look()
    assert looked == [SILENT_FOR_S] * 2
