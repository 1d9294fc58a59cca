"""HTTP/1.1 to engines: keep-alive connections, bodies handed over as they arrive.

A client of our own because this is the gateway's hot path. Measured against engines that answer
at once, one core: a general client costs about three times this one's CPU time per request
(scripts/bench_gateway --clients). It does no more than engines need: POST and GET, plain HTTP,
fixed-length or chunked answers, no redirects, no cookies, no compression.

Closing a response before its end closes its connection; that is how an engine learns that nobody
waits for the rest. A host that is cut off is noticed within seconds (`liveness`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Any, cast
from urllib.parse import urlsplit

import httptools

from cluster.gateway import liveness

_CONNECT_TIMEOUT_S = 3.0
# vLLM's server closes a connection that idles for 5 s: stay clear of that race.
_IDLE_LIMIT_S = 3.0
# An answer nobody reads may fill this much before the engine is made to wait.
_HIGH_WATER_BYTES = 256 * 1024


class UpstreamLost(ConnectionError):
    """The engine could not be reached, or broke off before its answer was complete."""


class NotReached(UpstreamLost):
    """It took no connection, so it knows nothing of the request."""


class Upstream:
    """A pool of connections per engine. Used from one event loop only."""

    def __init__(self, authorization: str = "") -> None:
        self._authorization = f"authorization: {authorization}\r\n" if authorization else ""
        self._origins: dict[str, _Origin] = {}
        self._look: asyncio.TimerHandle | None = None

    async def request(
        self,
        method: str,
        url: str,
        path: str,
        body: bytes = b"",
        request_id: str = "",
        lines: str = "",
    ) -> UpstreamResponse:
        """Send a request; return when the answer's head has arrived.

        `request_id` must be free of control characters; `lines`: further headers, each with its
        line's end. Raises: UpstreamLost.
        Cancel: closes the connection. The caller closes the response, best by `async with`.
        """
        origin = self._origins.get(url)
        if origin is None:
            origin = self._origins[url] = _Origin(url, self._authorization)
        head = (
            f"{method} {path} HTTP/1.1\r\n{origin.headers}x-request-id: {request_id}\r\n"
            f"{lines}content-length: {len(body)}\r\n\r\n"
        ).encode("latin-1")
        connection = origin.idle_connection()
        if connection is None:
            return await self._begin(await origin.connect(), head + body)
        try:
            return await self._begin(connection, head + body)
        except UpstreamLost as lost:
            # Closed between two requests; if it answered nothing, it also did nothing. Not so if
            # it is we who gave up on it, or its host that does not answer.
            was_closed = isinstance(lost.__cause__, ConnectionError | None)
            if connection.heard_anything or origin.is_dropped or not was_closed:
                raise
        return await self._begin(await origin.connect_again(), head + body)

    def drop(self, url: str) -> None:
        """Break every connection to an engine that is known to be gone: a dead host sends no FIN,
        its requests would wait for their deadlines."""
        origin = self._origins.pop(url, None)
        if origin is not None:
            origin.abort()

    async def close(self) -> None:
        """May be called twice."""
        for url in list(self._origins):
            self.drop(url)
        if self._look is not None:
            self._look.cancel()

    async def _begin(self, connection: _Connection, request: bytes) -> UpstreamResponse:
        if self._look is None:
            self._look_later()
        response = UpstreamResponse(connection)
        await response.begin(request)
        return response

    def _look_later(self) -> None:
        loop = asyncio.get_running_loop()
        self._look = loop.call_later(liveness.CHECK_EVERY_S, self._look_for_cuts)

    def _look_for_cuts(self) -> None:
        self._look = None
        if sum(origin.break_cut() for origin in self._origins.values()):
            self._look_later()


class _Origin:
    """One engine: where it is, and the connections to it."""

    def __init__(self, url: str, authorization: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or parts.hostname is None:
            raise NotReached(f"{url} is not an engine's address; expected http://HOST:PORT")
        self._url = url
        self._host = parts.hostname
        self._port = parts.port or 80
        self.headers = (
            f"host: {parts.netloc}\r\n{authorization}content-type: application/json\r\n"
            "accept: */*\r\n"
        )
        self._idle: deque[tuple[float, _Connection]] = deque()
        self._all: set[_Connection] = set()
        self.is_dropped = False

    def idle_connection(self) -> _Connection | None:
        """The most recently used one that is still good."""
        now_s = asyncio.get_running_loop().time()
        while self._idle:
            since_s, connection = self._idle.pop()
            if connection.is_open and now_s - since_s < _IDLE_LIMIT_S:
                return connection
            connection.abort()
        return None

    async def connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self), self._host, self._port
                )
        except TimeoutError:
            raise NotReached(f"{self._url} took no connection in {_CONNECT_TIMEOUT_S:g} s") from (
                None
            )
        except OSError as error:
            raise NotReached(f"{self._url} cannot be reached: {error}") from error
        self._all.add(connection)
        return connection

    async def connect_again(self) -> _Connection:
        """After a kept connection was lost with a request on it, which may have been read."""
        try:
            return await self.connect()
        except NotReached as error:
            raise UpstreamLost(f"the engine broke the connection, and now {error}") from error

    def break_cut(self) -> int:
        """Break the connections whose requests do not get through; how many still wait for the
        head of an answer."""
        waiting = 0
        for connection in list(self._all):
            if connection.response is not None and not connection.response.has_head:
                waiting += 1
                connection.break_if_cut()
        return waiting

    def put_back(self, connection: _Connection) -> None:
        self._idle.append((asyncio.get_running_loop().time(), connection))
        # The oldest go first; one look per return keeps the pool as small as the recent load.
        since_s, oldest = self._idle[0]
        if asyncio.get_running_loop().time() - since_s >= _IDLE_LIMIT_S:
            self._idle.popleft()
            oldest.abort()

    def forget(self, connection: _Connection) -> None:
        self._all.discard(connection)

    def abort(self) -> None:
        self.is_dropped = True
        for connection in list(self._all):
            connection.abort()


class _Connection(asyncio.Protocol):
    """One connection, one request at a time."""

    def __init__(self, origin: _Origin) -> None:
        self._origin = origin
        self._transport: asyncio.Transport | None = None
        self.response: UpstreamResponse | None = None
        self.heard_anything = False
        self._writable = asyncio.Event()
        self._writable.set()

    @property
    def is_open(self) -> bool:
        return self._transport is not None and not self._transport.is_closing()

    async def send(self, response: UpstreamResponse, data: bytes) -> None:
        if self._transport is None:
            raise UpstreamLost("the engine closed the connection")
        self.response = response
        self.heard_anything = False
        self._transport.write(data)
        if not self._writable.is_set():
            await self._writable.wait()

    def pause(self) -> None:
        if self._transport is not None and self._transport.is_reading():
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None and not self._transport.is_reading():
            self._transport.resume_reading()

    def release(self) -> None:
        """The answer is complete: the connection may serve the next request."""
        self.response = None
        if self.is_open:
            self.resume()
            self._origin.put_back(self)

    def abort(self) -> None:
        if self._transport is not None:
            self._transport.abort()

    def break_if_cut(self) -> None:
        if self.is_open and liveness.is_cut(self._socket()):
            if self.response is not None:
                self.response.lost(TimeoutError("its host is cut off"))
            self.abort()

    def _socket(self) -> liveness.Socket:
        assert self._transport is not None
        return cast(liveness.Socket, self._transport.get_extra_info("socket"))

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        liveness.probe(self._socket())

    def data_received(self, data: bytes) -> None:
        if self.response is None:
            self.abort()  # an engine that speaks out of turn
            return
        self.heard_anything = True
        self.response.feed(data)

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        self._writable.set()
        self._origin.forget(self)
        if self.response is not None:
            self.response.lost(error)


class UpstreamResponse:
    """An answer on its way in. `status` and `headers` are there; the body comes by `next_piece`."""

    def __init__(self, connection: _Connection) -> None:
        self._connection = connection
        self._parser: Any = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.has_head = False
        self._complete = False
        self._lost: UpstreamLost | None = None
        self._pieces: list[bytes] = []
        self._buffered_bytes = 0
        self._is_bounded = True
        self._waiter: asyncio.Future[None] | None = None

    async def begin(self, request: bytes) -> None:
        """Raises: UpstreamLost. Cancel: closes the connection."""
        try:
            await self._connection.send(self, request)
            while not self.has_head:
                await self._wait()
        except BaseException:
            self.close()
            raise

    async def next_piece(self) -> bytes:
        """All of the body that has arrived since the last call; b"" at its end.

        Raises: UpstreamLost, after what had arrived was handed over. Cancel: safe."""
        while not self._pieces:
            if self._complete:
                return b""
            await self._wait()
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        if self._buffered_bytes > _HIGH_WATER_BYTES:
            self._connection.resume()
        self._buffered_bytes = 0
        return piece

    async def read(self) -> bytes:
        """The whole rest of the body. Raises: UpstreamLost."""
        self._is_bounded = False
        while not self._complete:
            self._connection.resume()
            await self._wait()
        body = b"".join(self._pieces)
        self._pieces.clear()
        return body

    def break_off(self, why: str) -> None:
        """Lose the answer for a reason of our own, once what has arrived was handed over. Does
        nothing to a complete one."""
        if not self._complete and self._lost is None:
            self._lost = UpstreamLost(why)
            self.close()
            self._wake()

    def close(self) -> None:
        """Close the connection unless the answer is complete. May be called twice."""
        if self._connection.response is not self:
            return
        self._connection.response = None
        self._connection.abort()

    async def __aenter__(self) -> UpstreamResponse:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    async def _wait(self) -> None:
        if self._lost is not None:
            raise self._lost
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    # Called by the connection.

    def feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._connection.abort()
            self.lost(error)
            return
        over = self._is_bounded and self._buffered_bytes > _HIGH_WATER_BYTES
        if over and not self._complete:
            self._connection.pause()
        self._wake()

    def lost(self, error: Exception | None) -> None:
        if not self._complete and self._lost is None:
            self._lost = UpstreamLost(
                "the engine broke the connection" + (f": {error}" if error else "")
            )
            self._lost.__cause__ = error
        self._wake()

    # Called by httptools.

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self.has_head = self.status >= 200
        if not self.has_head:
            self.headers.clear()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._buffered_bytes += len(body)

    def on_message_complete(self) -> None:
        if not self.has_head:
            return  # 100 Continue
        self._complete = True
        if self._parser.should_keep_alive():
            self._connection.release()
        else:
            self._connection.response = None
            self._connection.abort()
