"""Where decode engines say where they want a prompt's blocks pushed. One small HTTP server.

An engine that runs vLLM-Ascend's layerwise connector posts to the URL that came with its request
as soon as it has room for the prompt; it sends no token and ignores the answer. So the path is the
secret: each request gets one of its own that nobody can guess, and it is gone with the request.

Its own listener, because engines on other hosts must reach it at the node's address, which the
endpoint for clients need not be bound to. Not started before a request needs it.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from typing import Any

import orjson
from aiohttp import web

from cluster.errors import NoCapacity

# A million prompt tokens are 8,000 block numbers at 128 tokens each: well below 1 MiB.
_MAX_BODY_BYTES = 4 * 2**20
_PREFIX = "/v1/metaserver/"
_RETRY_AFTER_S = 5.0

log = logging.getLogger(__name__)


class Metaserver:
    """Used from one event loop. Memory: the requests that wait, and no more."""

    def __init__(
        self, host: str, token: Callable[[], str] = lambda: secrets.token_urlsafe(24)
    ) -> None:
        """`host`: the address of this node that engines reach."""
        self._host = host
        self._token = token
        self._waiting: dict[str, asyncio.Future[Any]] = {}
        self._starting = asyncio.Lock()
        self._runner: web.AppRunner | None = None
        self._port = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def address(self) -> tuple[str, int] | None:
        """Where it listens, if it does."""
        return None if self._runner is None else (self._host, self._port)

    async def start(self) -> None:
        """Listen, on a port that the kernel chooses. May be called again: it listens once.

        Raises: NoCapacity, if the node's address cannot be listened on."""
        if self._runner is not None:
            return
        async with self._starting:
            if self._runner is not None:
                return
            app = web.Application(client_max_size=_MAX_BODY_BYTES)
            app.router.add_post(_PREFIX + "{token}", self._take)
            runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
            await runner.setup()
            try:
                await web.TCPSite(runner, self._host, 0).start()
            except OSError as error:
                await runner.cleanup()
                why = f"this gateway cannot listen on {self._host} for decode engines: {error}"
                raise NoCapacity(why, _RETRY_AFTER_S) from error
            self._runner, self._port = runner, runner.addresses[0][1]
            log.info("metaserver listens host=%s port=%d", self._host, self._port)

    def expect(self) -> Expected:
        """Room for one message: `with metaserver.expect() as expected`. Needs `start`."""
        return Expected(self, self._token())

    async def close(self) -> None:
        """May be called twice."""
        runner, self._runner = self._runner, None
        if runner is not None:
            await runner.cleanup()

    async def _take(self, request: web.Request) -> web.Response:
        waiting = self._waiting.get(request.match_info["token"])
        if waiting is None:
            return web.json_response({"error": "nobody waits for this"}, status=404)
        try:
            message = orjson.loads(await request.read())
        except orjson.JSONDecodeError as error:
            return web.json_response({"error": f"not JSON: {error}"}, status=400)
        # An engine that did not hear the answer says it again; the first time counts.
        if not waiting.done():
            waiting.set_result(message)
        return web.json_response({"status": "ok"})

    # Called by Expected.

    def _url(self, token: str) -> str:
        host = f"[{self._host}]" if ":" in self._host else self._host
        return f"http://{host}:{self._port}{_PREFIX}{token}"


class Expected:
    """See `Metaserver.expect`. After the block its URL answers 404."""

    __slots__ = ("_message", "_metaserver", "_token", "url")

    def __init__(self, metaserver: Metaserver, token: str) -> None:
        self._metaserver = metaserver
        self._token = token
        self._message: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.url = metaserver._url(token)

    async def message(self) -> Any:
        """The JSON that was posted. Cancel: safe, it can be asked for again."""
        return await asyncio.shield(self._message)

    def __enter__(self) -> Expected:
        self._metaserver._waiting[self._token] = self._message
        return self

    def __exit__(self, *failure: object) -> None:
        del self._metaserver._waiting[self._token]
        self._message.cancel()
