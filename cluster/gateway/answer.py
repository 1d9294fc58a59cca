"""One decode engine's answer to one request: begun, then passed on to the client.

Bytes of a stream are not parsed: only cut at event boundaries, so that what follows a broken event
is still readable, and given to the request's `course`, which remembers what was sent. Called by:
gateway.exchange.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

import orjson

from cluster.errors import EngineFailed
from cluster.gateway.course import RECOMPUTED, Course
from cluster.gateway.engines import Engines, first_piece, next_piece, read, server_error
from cluster.gateway.errors import Headers
from cluster.gateway.requests import GatewayRequest
from cluster.gateway.splice import Diverged
from cluster.gateway.tally import PairCounts
from cluster.gateway.tape import Decode
from cluster.gateway.upstream import UpstreamResponse
from cluster.gateway.wire import Responder
from cluster.snapshot import WorkerView

_ERROR_EVENT = b'data: {"error"'


class HandedBack(EngineFailed):
    """The engine is sound and gave the request up half answered, to be recomputed elsewhere."""


class Answer:
    """`begin`, `pass_on`, and `close` whatever happened. A closed one may begin anew."""

    def __init__(
        self,
        engines: Engines,
        request: GatewayRequest,
        responder: Responder,
        began_at: float,
        decode: Decode,
    ) -> None:
        """`began_at`: when the client's request arrived, in the loop's clock. `decode`: ids to
        text."""
        self._engines = engines
        self._request = request
        self._out = responder
        self._began_at = began_at
        self.decode = decode
        self._response: UpstreamResponse | None = None
        self._piece = b""
        self._tokens_before = 0  # of the answer, from other engines
        self._first_at: float | None = None  # of the whole answer, whichever engine began it

    async def begin(
        self, worker: WorkerView, body: Mapping[str, Any], request_id: str, trace: str = ""
    ) -> None:
        """Call `worker`; return when a stream's first piece, or the whole answer, has come.

        Raises: EngineFailed, Rejected. Cancel: safe; close it then."""
        sent = orjson.dumps(body)
        response = await self._engines.open(worker, self._request.endpoint, sent, request_id, trace)
        self._worker, self._response = worker, response
        is_stream = self._request.is_stream
        self._piece = await (first_piece if is_stream else read)(worker, response)

    async def pass_on(
        self, course: Course, counts: PairCounts, answers: Callable[[], None]
    ) -> None:
        """Give the client what has begun, to its end. `counts`: of the pair that answers;
        `answers`: told once it is certain that it does.

        Raises: EngineFailed: the engine broke it off; HandedBack. Further text of the same answer
        may come from another engine then, as `course` says."""
        response = self._response
        assert response is not None
        content_type = response.headers.get(b"content-type", b"application/json")
        headers = [(b"content-type", content_type)]
        if self._request.is_stream:
            await self._stream(response, headers, course, counts, answers)
            return
        answer = course.whole(self._piece, self.decode)
        answers()
        if answer is None:
            raise self._handed_back()
        await self._out.whole(200, answer, headers)

    def break_off(self, why: str) -> None:
        """End a stream as if the engine had broken it; `pass_on` raises then, unless all of it has
        come."""
        if self._response is not None:
            self._response.break_off(why)

    def close(self) -> None:
        """Close the call if it is not over, so that the engine stops. May be called twice."""
        if self._response is not None:
            self._response.close()

    async def _stream(
        self,
        response: UpstreamResponse,
        headers: Headers,
        course: Course,
        counts: PairCounts,
        answers: Callable[[], None],
    ) -> None:
        clock = asyncio.get_running_loop().time
        course.start(self._worker)
        self._tokens_before = course.answer_tokens
        first_at = clock()
        if not self._out.is_started:
            self._first_at = first_at
            counts.ttft_s.add(first_at - self._began_at)
            await self._out.begin_events(200, headers)
        piece, rest, gaps = self._piece, b"", 0
        while piece:
            if rest or not piece.endswith(b"\n\n"):
                piece, rest = _whole_events(rest + piece)
            if piece:
                await self._take(piece, course)
            if gaps == 1:
                # Not at the first piece: before vLLM knows of an error, it gives a chat its role.
                answers()
            piece = await next_piece(self._worker, response)
            gaps += 1
        if gaps == 1:
            answers()
        tokens = course.answer_tokens
        if tokens > 1 and self._first_at is not None:
            counts.tpot_s.add((clock() - self._first_at) / (tokens - 1))
        await self._out.end(rest)

    async def _take(self, piece: bytes, course: Course) -> None:
        is_handed_back, is_error = RECOMPUTED in piece, _ERROR_EVENT in piece
        if is_handed_back:
            piece = piece[: piece.rfind(b"data: ", 0, piece.find(RECOMPUTED))]
        elif is_error:
            piece, _, told = piece.partition(_ERROR_EVENT)
        try:
            sent = course.take(piece)
        except Diverged:
            raise EngineFailed(
                self._worker.id.name,
                None,
                "it was to go on with a broken answer and said something else",
            ) from None
        if sent:
            await self._out.piece(sent)
        if is_handed_back:
            raise self._handed_back()
        if is_error:
            # vLLM gives a chat its role before it knows whether the prompt's blocks come: without a
            # token of this engine it is an answer that has not begun.
            has_begun = course.answer_tokens > self._tokens_before
            raise server_error(self._worker, None if has_begun else 500, _ERROR_EVENT + told)

    def _handed_back(self) -> HandedBack:
        return HandedBack(self._worker.id.name, None, "it gave the request back to be recomputed")


def _whole_events(data: bytes) -> tuple[bytes, bytes]:
    cut = data.rfind(b"\n\n") + 2
    return (b"", data) if cut == 1 else (data[:cut], data[cut:])
