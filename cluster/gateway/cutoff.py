"""End a request from outside: its deadline passed, or its client went away.

One mechanism for both, because both must do the same: cancel whatever the request is doing now,
which closes its connections to the engines, which makes the engines stop working for it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

from cluster.gateway.wire import ClientGone, Receive

# A request that is over sooner needs nobody to watch its client: a task to do so costs an eighth of
# a short request's CPU time (measured: 36 of 287 us).
_WATCH_AFTER_S = 0.02


class DeadlinePassed(Exception):
    """The request's time is up."""


class Cutoff:
    """Run the body of an `async with` until it ends, `deadline_at` passes, or the client leaves.

    `deadline_at` is in the loop's clock. Raises on exit: DeadlinePassed, ClientGone.
    A cancellation from anywhere else goes through."""

    __slots__ = ("_deadline_at", "_has_all", "_later", "_task", "_timer", "_watch", "_why")

    def __init__(self, deadline_at: float) -> None:
        self._deadline_at = deadline_at
        self._why: type[ClientGone | DeadlinePassed] | None = None
        self._later: asyncio.TimerHandle | None = None
        self._watch: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Cutoff:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        loop = asyncio.get_running_loop()
        self._timer = loop.call_at(self._deadline_at, self._cut, DeadlinePassed)
        return self

    def watch_client(self, receive: Receive, has_all: Callable[[], bool] = lambda: False) -> None:
        """To be called once the request's body is read: from then on the only thing `receive` can
        still tell is that the client is gone. It is looked for 20 ms from now, then at once.
        `has_all`: whether the client has its answer; then it may leave, and nothing is cut."""
        self._has_all = has_all
        self._later = asyncio.get_running_loop().call_later(
            _WATCH_AFTER_S, self._start_watching, receive
        )

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._timer.cancel()
        if self._later is not None:
            self._later.cancel()
        if self._watch is not None:
            self._watch.cancel()
        if self._why is None:
            return
        remaining = self._task.uncancel()
        if kind is asyncio.CancelledError and remaining == 0:
            raise self._why from error
        # The body ended by itself in the same turn of the loop in which it was cut: let it be.

    def _start_watching(self, receive: Receive) -> None:
        self._watch = asyncio.get_running_loop().create_task(
            self._watch_client(receive), name="watch client"
        )

    async def _watch_client(self, receive: Receive) -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        if not self._has_all():
            self._cut(ClientGone)

    def _cut(self, why: type[ClientGone | DeadlinePassed]) -> None:
        if self._why is None:
            self._why = why
            self._task.cancel()
