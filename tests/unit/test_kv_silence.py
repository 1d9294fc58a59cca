"""cluster.kv.connectors.silence: the kernel ends connections whose other end says nothing."""

from __future__ import annotations

import socket

from cluster.kv.connectors.silence import SILENT_FOR_S, SilenceBound, bound_silence


def timeout_ms(tcp: socket.socket) -> int:
    return tcp.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT)


def test_all_tcp_connections_are_bounded_and_stay_open_and_blocking_as_they_were() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as blocking,
        socket.create_connection(server.getsockname()) as other,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    ):
        other.setblocking(False)
        assert timeout_ms(blocking) == 0
        assert bound_silence(3.5) >= 2
        assert (timeout_ms(blocking), timeout_ms(other)) == (3500, 3500)
        assert blocking.gettimeout() is None
        assert other.gettimeout() == 0.0
        accepted, _ = server.accept()
        with accepted:
            blocking.sendall(b"x")
            assert accepted.recv(1) == b"x"


def test_looks_are_at_most_one_a_second() -> None:
    bound = SilenceBound()
    bound.look()
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as late,
    ):
        bound.look()
        assert timeout_ms(late) == 0
        bound._next_look_s = 0.0
        bound.look()
        assert timeout_ms(late) == SILENT_FOR_S * 1000
