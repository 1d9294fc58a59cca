"""ASGI in and out: a request's id, key and body; an answer, whole or piece by piece."""

from __future__ import annotations

import asyncio
import itertools
import re
import uuid
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from typing import Any

from cluster.gateway import errors
from cluster.gateway.errors import ApiError, Headers, Rejected
from cluster.request_records import REQUEST_ID

Message = MutableMapping[str, Any]
Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

_DONE = b"data: [DONE]\n\n"
_SANE_ID = re.compile(REQUEST_ID.encode())
# A refused body is read and thrown away for this long, so that a client that sends all before it
# reads sees our answer and not a reset connection.
_DISCARD_FOR_S = 5.0


class ClientGone(Exception):
    """The client closed the connection: nobody is left to answer."""


class RequestIds:
    """Ids that no other process and no earlier request has: a random prefix and a count.

    A count because asking the kernel for randomness costs more than all else an id needs."""

    def __init__(self) -> None:
        self._prefix = uuid.uuid4().hex[:20]
        self._count = itertools.count(1)

    def new(self) -> str:
        return f"{self._prefix}{next(self._count):x}"

    def for_client(self, headers: Mapping[bytes, bytes]) -> str:
        """The client's own id if it is fit to be put into headers and logs, else a new one."""
        given = headers.get(b"x-request-id")
        if given is not None and _SANE_ID.fullmatch(given):
            return given.decode("ascii")
        return self.new()


async def read_body(headers: Mapping[bytes, bytes], receive: Receive, limit_bytes: int) -> bytes:
    """The whole body; never more than `limit_bytes` are kept. Raises: ApiError 413; ClientGone."""
    length = headers.get(b"content-length")
    if length is not None and length.isdigit() and int(length) > limit_bytes:
        await _discard(receive)
        raise errors.body_too_large(limit_bytes)
    message = await receive()
    if message["type"] == "http.request" and not message.get("more_body", False):
        body: bytes = message.get("body", b"")
        if len(body) > limit_bytes:
            raise errors.body_too_large(limit_bytes)
        return body
    return await _read_pieces(message, receive, limit_bytes)


async def _read_pieces(message: Message, receive: Receive, limit_bytes: int) -> bytes:
    pieces: list[bytes] = []
    size = 0
    while True:
        if message["type"] == "http.disconnect":
            raise ClientGone
        piece: bytes = message.get("body", b"")
        size += len(piece)
        if size > limit_bytes:
            pieces.clear()
            if message.get("more_body", False):
                await _discard(receive)
            raise errors.body_too_large(limit_bytes)
        pieces.append(piece)
        if not message.get("more_body", False):
            return b"".join(pieces)
        message = await receive()


async def _discard(receive: Receive) -> None:
    try:
        async with asyncio.timeout(_DISCARD_FOR_S):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class Responder:
    """One answer. Knows how far it has come, so that an error can be told the right way."""

    __slots__ = (
        "_is_events",
        "_send",
        "has_all",
        "headers",
        "is_finished",
        "request_id",
        "route_headers",
        "status",
    )

    def __init__(self, send: Send, request_id: str) -> None:
        self._send = send
        self._is_events = False
        self.request_id = request_id
        self.headers: Headers = [(b"x-request-id", request_id.encode("ascii"))]
        self.route_headers: Headers = []  # which workers; set once they are chosen
        self.status = 0  # 0: nothing was sent yet
        self.is_finished = False
        # Everything that a client reads was sent. OpenAI's closes the connection at [DONE], before
        # the engine, and so we, have ended the stream.
        self.has_all = False

    @property
    def is_started(self) -> bool:
        return self.status != 0

    async def whole(self, status: int, body: bytes, headers: Headers) -> None:
        self.status = status
        self.is_finished = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"content-length", str(len(body)).encode("ascii")),
                    *self.headers,
                    *self.route_headers,
                    *headers,
                ],
            }
        )
        await self._send({"type": "http.response.body", "body": body})

    async def begin_events(self, status: int, headers: Headers) -> None:
        """Start a stream of server-sent events."""
        self.status = status
        self._is_events = True
        await self._send(
            {
                "type": "http.response.start",
                "status": status,
                "headers": [
                    (b"cache-control", b"no-cache"),
                    *self.headers,
                    *self.route_headers,
                    *headers,
                ],
            }
        )

    async def piece(self, body: bytes) -> None:
        self.has_all = body.endswith(_DONE)
        await self._send({"type": "http.response.body", "body": body, "more_body": True})

    async def end(self, body: bytes = b"") -> None:
        self.is_finished = True
        await self._send({"type": "http.response.body", "body": body})

    async def error(self, error: ApiError) -> None:
        """As a status and JSON if nothing was sent yet, else as a last event of the stream."""
        if not self.is_started:
            await self.whole(error.status, error.body(), error.headers())
        elif self._is_events and not self.is_finished:
            await self.end(error.sse())

    async def rejected(self, rejected: Rejected) -> None:
        """An engine's own words. To be said while nothing else was."""
        await self.whole(rejected.status, rejected.body, [(b"content-type", rejected.content_type)])
