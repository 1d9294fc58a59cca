"""Serve the control API in the controller's own event loop, for as long as the controller lives.

A port that is taken is tried again and again: a controller that was killed leaves its port to the
one that comes after it, and one without its API still keeps the cluster. Called by: control.actor.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections.abc import Callable

import uvicorn

from cluster.control.api import Bearer, Controls, create_app
from cluster.control.store import ApiAccess

log = logging.getLogger(__name__)

_RETRY_S = 0.5


class ApiServer:
    """The API of `controls` at the address of `access`."""

    def __init__(self, controls: Controls, access: ApiAccess) -> None:
        self._host, self._port = access.host, access.port
        self._bearer = Bearer(access.token)
        self._app = create_app(controls, self._bearer)
        self._problem = "it has not begun to listen"

    @property
    def problem(self) -> str:
        """Why it does not answer; "" if it does."""
        return self._problem

    def take(self, access: ApiAccess) -> None:
        """Ask for another token from now on. The address stays."""
        self._bearer.replace(access.token)

    async def run(self) -> None:
        """Serve until cancelled."""
        while True:
            try:
                listener = _listen(self._host, self._port)
            except OSError as error:
                self._say(f"{self._host}:{self._port}: {(error.strerror or str(error)).lower()}")
            else:
                await self._serve(listener)
            await asyncio.sleep(_RETRY_S)

    async def _serve(self, listener: socket.socket) -> None:
        config = uvicorn.Config(
            self._app,
            ws="none",
            lifespan="off",
            access_log=False,
            log_level="warning",
            server_header=False,
            proxy_headers=False,
        )
        try:
            await _Server(config, lambda: self._say("")).serve(sockets=[listener])
        except Exception:
            log.exception("control API ended")
        finally:
            listener.close()
            self._say("its server ended")

    def _say(self, problem: str) -> None:
        if problem != self._problem:
            at = f"{self._host}:{self._port}"
            log.info("control API %s", f"not served why={problem!r}" if problem else f"at {at}")
        self._problem = problem


class _Server(uvicorn.Server):
    """Says when it has begun."""

    def __init__(self, config: uvicorn.Config, say_begun: Callable[[], None]) -> None:
        super().__init__(config)
        self._say_begun = say_begun

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._say_begun()


def _listen(host: str, port: int) -> socket.socket:
    """Raises: OSError."""
    family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, proto)
    try:
        # Connections of a former controller that linger are not in the way.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        listener.listen()
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener
