"""What the gateway asks of engines, over their own HTTP ports.

Translates at the edge: a broken connection or a server error becomes `EngineFailed` (and which kind
of it, `EngineLost` or `EngineNotReached`), what the engine holds against the client's request
becomes `Rejected`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import orjson

from cluster.errors import EngineFailed, NoCapacity
from cluster.gateway import bodies
from cluster.gateway.errors import EngineLost, EngineNotReached, Rejected, is_mark
from cluster.gateway.fleet import Fleet
from cluster.gateway.render import CannotRender
from cluster.gateway.requests import Endpoint
from cluster.gateway.upstream import NotReached, Upstream, UpstreamLost, UpstreamResponse
from cluster.snapshot import WorkerView

# These say something about the engine or about us, not about the client's request.
_NOT_THE_CLIENTS_FAULT = frozenset({401, 403, 407, 408, 429})
# vLLM answers 403 where an endpoint is switched off.
_NO_SUCH_ENDPOINT = frozenset({403, 404, 405, 501})
_EXCERPT_CHARACTERS = 300
_HEALTH_PATH, _HEALTH_WITHIN_S = "/health", 2.0
_RETRY_AFTER_S = 2.0
_ERROR_EVENT = b'data: {"error"'
# vLLM's server outlives its engine process for a moment, and tells all requests so.
_DEATH_NOTE = "EngineCore encountered an issue"


class Engines:
    """Calls to engines. Every method: Cancel: closes the connection, so the engine stops."""

    def __init__(self, upstream: Upstream, fleet: Fleet, model: str) -> None:
        self._upstream = upstream
        self._fleet = fleet
        self._model = model

    async def compute_prompt(
        self,
        worker: WorkerView,
        prompt_ids: Sequence[int],
        fields: Mapping[str, Any],
        client_body: Mapping[str, Any],
        request_id: str,
        trace: str = "",
    ) -> dict[str, Any]:
        """Let `worker` compute (or take) a prompt's KV blocks by asking for one token.

        `fields`: of the connector's dialect. `trace`, here and below: header lines that tell the
        engine of the trace (trace_context). Returns the engine's parsed answer.
        Raises: EngineFailed, Rejected.
        """
        body = bodies.one_token(self._model, prompt_ids, fields, client_body)
        answer = await self.ask(worker, Endpoint.COMPLETIONS, orjson.dumps(body), request_id, trace)
        return _json_object(worker, answer)

    async def run(
        self, worker: WorkerView, path: str, body: bytes, request_id: str, trace: str = ""
    ) -> None:
        """A request whose answer nobody needs, streamed or not, to its end.

        Raises: EngineFailed, Rejected.
        """
        async with await self.open(worker, path, body, request_id, trace) as response:
            piece = await next_piece(worker, response)
            if piece.startswith(_ERROR_EVENT):
                raise early_error(worker, piece)
            while piece:
                piece = await next_piece(worker, response)

    async def open(
        self, worker: WorkerView, path: str, body: bytes, request_id: str, trace: str = ""
    ) -> UpstreamResponse:
        """Begin a request; the caller closes the response. Raises: EngineFailed, Rejected."""
        try:
            response = await self._upstream.request(
                "POST", worker.url, path, body, request_id, trace
            )
        except NotReached as error:
            raise EngineNotReached(worker.id.name, None, str(error)) from error
        except UpstreamLost as error:
            raise EngineLost(worker.id.name, None, str(error)) from error
        if response.status == 200:
            return response
        async with response:
            raise await _failure(worker, response)

    async def check_up(self, worker: WorkerView) -> None:
        """Raises, if `worker` is already gone: EngineNotReached.

        The kernel takes connections for a killed process until it has freed its memory, and breaks
        them then: as if the process had died of what came over them. Silence says nothing, and what
        is answered neither: SGLang's answer to this is 503 under load."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_HEALTH_WITHIN_S):
                try:
                    answer = await self._upstream.request("GET", worker.url, _HEALTH_PATH)
                    async with answer:
                        await answer.read()
                except UpstreamLost as error:
                    raise EngineNotReached(worker.id.name, None, str(error)) from error

    async def ask(
        self, worker: WorkerView, path: str, body: bytes, request_id: str, trace: str = ""
    ) -> bytes:
        """A request's whole answer. Raises: EngineFailed, Rejected."""
        async with await self.open(worker, path, body, request_id, trace) as response:
            return await read(worker, response)

    async def ask_any(self, path: str, body: bytes, request_id: str, trace: str = "") -> bytes:
        """The whole answer of whichever engine is least busy. If it fails, another is asked.

        Raises: EngineFailed, NoCapacity, Rejected."""
        worker = self._fleet.any_decoder()
        try:
            return await self.ask(worker, path, body, request_id, trace)
        except EngineFailed as error:
            other = self._other(worker, error)
        return await self.ask(other, path, body, request_id, trace)

    async def render(
        self, endpoint: Endpoint, body: dict[str, Any], request_id: str, trace: str = ""
    ) -> list[list[int]]:
        """Token ids per prompt, as an engine would make them. If one fails, another is asked.

        Raises: EngineFailed, NoCapacity, Rejected, CannotRender.
        """
        worker = self._fleet.any_decoder()
        try:
            return await self._render(worker, endpoint, body, request_id, trace)
        except EngineFailed as error:
            other = self._other(worker, error)
        return await self._render(other, endpoint, body, request_id, trace)

    def _other(self, failed: WorkerView, error: EngineFailed) -> WorkerView:
        """Raises, if there is no other: NoCapacity where the engine is not there, else `error`."""
        if is_mark(error):
            self._fleet.suspect(failed.id)
        other = self._fleet.any_decoder()
        if other.id == failed.id:
            if isinstance(error, EngineLost | EngineNotReached):
                raise NoCapacity(f"{error}; there is no other", _RETRY_AFTER_S) from error
            raise error
        return other

    async def _render(
        self,
        worker: WorkerView,
        endpoint: Endpoint,
        body: dict[str, Any],
        request_id: str,
        trace: str,
    ) -> list[list[int]]:
        try:
            path, sent = f"{endpoint}/render", orjson.dumps(body)
            answer = orjson.loads(await self.ask(worker, path, sent, request_id, trace))
            found = answer if isinstance(answer, list) else [answer]
            return [list(prompt["token_ids"]) for prompt in found]
        except (orjson.JSONDecodeError, KeyError, TypeError) as error:
            raise EngineFailed(worker.id.name, 200, "its rendering is not readable") from error
        except (EngineFailed, Rejected) as error:
            if error.status in _NO_SUCH_ENDPOINT:
                raise CannotRender("engine-has-no-render-endpoint") from None
            raise


async def read(worker: WorkerView, response: UpstreamResponse) -> bytes:
    """The rest of an answer. Raises: EngineFailed."""
    try:
        return await response.read()
    except UpstreamLost as error:
        raise EngineLost(worker.id.name, None, str(error)) from error


async def first_piece(worker: WorkerView, response: UpstreamResponse) -> bytes:
    """The beginning of a stream; never b"".

    Raises: EngineFailed, Rejected, also where the stream begins with the engine's error."""
    piece = await next_piece(worker, response)
    if not piece:
        raise EngineFailed(worker.id.name, None, "its stream ended before the first token")
    if piece.startswith(_ERROR_EVENT):
        raise early_error(worker, piece)
    return piece


async def next_piece(worker: WorkerView, response: UpstreamResponse) -> bytes:
    """What has arrived; b"" at the end. Raises: EngineFailed."""
    try:
        return await response.next_piece()
    except UpstreamLost as error:
        raise EngineLost(worker.id.name, None, str(error)) from error


def early_error(worker: WorkerView, piece: bytes) -> EngineFailed | Rejected:
    """An engine reports an error as the first event of a stream: nothing was sent yet, so it can
    still be told, or made good, the right way."""
    event = piece.partition(b"\n\n")[0].removeprefix(b"data: ")
    try:
        status = int(orjson.loads(event)["error"]["code"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        status = 500
    if 400 <= status < 500:
        return Rejected(status, event, b"application/json")
    return server_error(worker, status, event)


async def _failure(worker: WorkerView, response: UpstreamResponse) -> EngineFailed | Rejected:
    body = await read(worker, response)
    status = response.status
    if (400 <= status < 500 and status not in _NOT_THE_CLIENTS_FAULT) or status == 501:
        content_type = response.headers.get(b"content-type", b"application/json")
        return Rejected(status, body, content_type)
    return server_error(worker, status, body)


def server_error(worker: WorkerView, status: int | None, body: bytes) -> EngineFailed:
    """What an engine says of itself. `status` None: in the middle of a stream."""
    why = excerpt(body)
    return (EngineLost if _DEATH_NOTE in why else EngineFailed)(worker.id.name, status, why)


def excerpt(body: bytes) -> str:
    """An engine's error body, short enough for a log line."""
    return body.decode("utf-8", "replace").strip()[:_EXCERPT_CHARACTERS] or "no body"


def _json_object(worker: WorkerView, answer: bytes) -> dict[str, Any]:
    try:
        loaded = orjson.loads(answer)
    except orjson.JSONDecodeError as error:
        raise EngineFailed(worker.id.name, 200, f"its answer is not JSON: {error}") from error
    if not isinstance(loaded, dict):
        raise EngineFailed(worker.id.name, 200, "its answer is not a JSON object")
    return loaded
