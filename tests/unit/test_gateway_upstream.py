"""The HTTP client to engines, against a server that says exactly what a test tells it to."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from cluster.gateway import liveness
from cluster.gateway.upstream import NotReached, Upstream, UpstreamLost

OK = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"


class Server:
    """Answers each request with what `script` yields for it; counts connections."""

    def __init__(self) -> None:
        self.connections = 0
        self.requests: list[bytes] = []
        self.heard = asyncio.Event()
        self.closed = asyncio.Event()
        self.answer = self.say_ok

    async def serve(self, reader, writer) -> None:
        self.connections += 1
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                length = int(head.lower().partition(b"content-length: ")[2].split(b"\r\n")[0])
                self.requests.append(head + await reader.readexactly(length))
                self.heard.set()
                if await self.answer(reader, writer) is False:
                    break
        self.closed.set()
        writer.close()

    @staticmethod
    async def say_ok(reader, writer):
        writer.write(OK)


@pytest.fixture
async def server():
    scripted = Server()
    running = await asyncio.start_server(scripted.serve, "127.0.0.1", 0)
    scripted.running = running
    scripted.url = f"http://127.0.0.1:{running.sockets[0].getsockname()[1]}"
    yield scripted
    running.close()


@pytest.fixture
async def upstream():
    client = Upstream("Bearer secret")
    yield client
    await client.close()
    await client.close()


async def ask(upstream, server) -> bytes:
    async with await upstream.request("POST", server.url, "/v1/x", b"body", "id-1") as response:
        assert response.status == 200
        return await response.read()


async def test_connections_are_kept_and_requests_are_whole(server, upstream):
    for _ in range(3):
        assert await ask(upstream, server) == b"ok"
    assert server.connections == 1
    assert server.requests[0].startswith(b"POST /v1/x HTTP/1.1\r\n")
    assert b"\r\nauthorization: Bearer secret\r\n" in server.requests[0]
    assert b"\r\nx-request-id: id-1\r\n" in server.requests[0]
    assert server.requests[0].endswith(b"\r\n\r\nbody")


async def test_connection_closed_while_idle_is_replaced(server, upstream):
    async def say_and_close(reader, writer):
        writer.write(OK)
        return False

    server.answer = say_and_close
    assert await ask(upstream, server) == b"ok"
    await server.closed.wait()
    assert await ask(upstream, server) == b"ok"
    assert server.connections == 2


async def test_connection_closed_instead_of_an_answer_is_tried_once_more(server, upstream):
    async def close_second(reader, writer):
        if len(server.requests) == 2:
            return False
        writer.write(OK)
        return None

    server.answer = close_second
    assert await ask(upstream, server) == b"ok"
    assert await ask(upstream, server) == b"ok"
    assert len(server.requests) == 3


async def test_fresh_connection_that_is_closed_is_lost(server, upstream):
    async def close(reader, writer):
        return False

    server.answer = close
    with pytest.raises(UpstreamLost) as lost:
        await ask(upstream, server)
    assert not isinstance(lost.value, NotReached)  # it may have read the request
    assert len(server.requests) == 1


async def test_an_engine_that_dies_with_a_request_on_a_kept_connection_may_have_read_it(
    server, upstream
):
    assert await ask(upstream, server) == b"ok"

    async def die(reader, writer):
        server.running.close()
        return False

    server.answer = die
    with pytest.raises(UpstreamLost, match=r"broke the connection, and now .* cannot") as lost:
        await ask(upstream, server)
    assert not isinstance(lost.value, NotReached)


async def test_nobody_there_is_lost(upstream):
    with pytest.raises(NotReached, match="cannot be reached"):
        await upstream.request("POST", "http://127.0.0.1:9", "/")
    with pytest.raises(UpstreamLost, match="not an engine's address"):
        await upstream.request("POST", "https://127.0.0.1:9", "/")


@pytest.mark.parametrize("says", [b"nonsense\r\n\r\n", b"HTTP/1.1 200 OK\r\ncontent-le"])
async def test_what_is_not_http_is_lost(server, upstream, says):
    async def speak(reader, writer):
        writer.write(says)
        await writer.drain()
        return False

    server.answer = speak
    with pytest.raises(UpstreamLost):
        await ask(upstream, server)


async def test_pieces_come_as_they_arrive_and_a_break_comes_after_them(server, upstream):
    said = asyncio.Event()

    async def break_off(reader, writer):
        writer.write(CHUNKED + b"3\r\none\r\n")
        await said.wait()
        writer.write(b"3\r\ntwo\r\n")
        await writer.drain()
        return False

    server.answer = break_off
    async with await upstream.request("POST", server.url, "/") as response:
        assert await response.next_piece() == b"one"
        said.set()
        assert await response.next_piece() == b"two"
        with pytest.raises(UpstreamLost):
            await response.next_piece()


async def test_chunked_answer_ends_and_gives_the_connection_back(server, upstream):
    async def speak(reader, writer):
        writer.write(CHUNKED + b"3\r\none\r\n3\r\ntwo\r\n0\r\n\r\n")

    server.answer = speak
    for _ in range(2):
        async with await upstream.request("POST", server.url, "/") as response:
            assert await response.next_piece() == b"onetwo"
            assert await response.next_piece() == b""
    assert server.connections == 1


async def test_answer_left_early_closes_its_connection(server, upstream):
    async def speak_for_ever(reader, writer):
        writer.write(CHUNKED)
        while not reader.at_eof():
            writer.write(b"1\r\nx\r\n")
            await writer.drain()
            await asyncio.sleep(0.001)
        return False

    server.answer = speak_for_ever
    async with await upstream.request("POST", server.url, "/") as response:
        await response.next_piece()
    await asyncio.wait_for(server.closed.wait(), 5)


async def test_cancelled_request_closes_its_connection(server, upstream):
    async def say_nothing(reader, writer):
        await reader.read()
        return False

    server.answer = say_nothing
    task = asyncio.create_task(ask(upstream, server))
    await server.heard.wait()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    await asyncio.wait_for(server.closed.wait(), 5)


@pytest.mark.parametrize("is_kept", [False, True])
async def test_drop_breaks_what_is_under_way_for_good(server, upstream, is_kept):
    async def say_nothing(reader, writer):
        await reader.read()
        return False

    if is_kept:
        await ask(upstream, server)
        server.heard.clear()
    server.answer = say_nothing
    task = asyncio.create_task(ask(upstream, server))
    await server.heard.wait()
    upstream.drop(server.url)
    with pytest.raises(UpstreamLost):
        await task
    assert server.connections == 1


async def test_a_stream_that_is_broken_off_hands_over_what_has_come(server, upstream):
    async def speak(reader, writer):
        writer.write(CHUNKED + b"3\r\none\r\n")
        await reader.read()
        return False

    server.answer = speak
    async with await upstream.request("POST", server.url, "/") as response:
        await asyncio.sleep(0.05)
        response.break_off("it drains")
        assert await response.next_piece() == b"one"
        with pytest.raises(UpstreamLost, match="it drains"):
            await response.next_piece()
    await asyncio.wait_for(server.closed.wait(), 5)


async def test_a_complete_answer_cannot_be_broken_off(server, upstream):
    async with await upstream.request("POST", server.url, "/") as response:
        await asyncio.sleep(0.05)
        response.break_off("it drains")
        assert await response.next_piece() == b"ok"
        assert await response.next_piece() == b""


async def test_connections_are_probed_by_the_kernel(server, upstream, monkeypatch):
    probed = []
    probe = liveness.probe
    monkeypatch.setattr(liveness, "probe", lambda made: (probed.append(made), probe(made)))
    async with await upstream.request("POST", server.url, "/"):
        (connected,) = probed
        assert connected.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
        idle_s, between_s, probes = (
            connected.getsockopt(socket.IPPROTO_TCP, option)
            for option in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL, socket.TCP_KEEPCNT)
        )
        assert idle_s + between_s * probes <= liveness.CUT_NOTICED_WITHIN_S
        # It would also end connections to engines that are merely busy.
        assert connected.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 0
        assert not liveness.is_cut(connected)


async def test_answer_that_nobody_reads_makes_the_engine_wait(server, upstream):
    sent = 0

    async def flood(reader, writer):
        nonlocal sent
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\n\r\n" % (64 * 2**20))
        for _ in range(64 * 16):
            writer.write(b"x" * 65536)
            await writer.drain()
            sent += 65536

    server.answer = flood
    async with await upstream.request("POST", server.url, "/") as response:
        await response.next_piece()
        await asyncio.sleep(0.3)
        assert sent < 32 * 2**20
        size = len(await response.read())
    assert size > 60 * 2**20


async def test_interim_answers_are_passed_over(server, upstream):
    async def speak(reader, writer):
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n" + OK)

    server.answer = speak
    assert await ask(upstream, server) == b"ok"
