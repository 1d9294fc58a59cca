"""Requests under which an engine went away go on one at a time per worker, until they are answered.

One of those that an engine had in hand when it died may be the cause. Sent on together they would
take the next engine down together, and nobody could tell which one did it: the neighbours of a
poison request would look as poisonous as it is. One at a time, an engine that goes away again names
its request (`recovery.Tries.is_poisonous`). That it is still there is asked of it before, so that
a host that takes all its engines along names nobody (`attempt`).

Nobody waits for ever: a request whose turn has not come within TURN_WITHIN_S goes on beside the
others. Called by: gateway.attempt.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Iterable

from cluster.identity import WorkerId

TURN_WITHIN_S = 10.0


class Quarantine:
    """Lives in one event loop."""

    def __init__(self) -> None:
        self._suspects: Counter[WorkerId] = Counter()
        self._changed = asyncio.Event()

    @contextlib.asynccontextmanager
    async def turn(self, workers: Iterable[WorkerId]) -> AsyncIterator[None]:
        """Wait until no other suspect is at any of `workers`, and be the one that is. Cancel:
        safe."""
        wanted = tuple(workers)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(TURN_WITHIN_S):
                while any(self._suspects[worker] for worker in wanted):
                    await self._changed.wait()
        self._suspects.update(wanted)
        try:
            yield
        finally:
            self._suspects.subtract(wanted)
            self._suspects += Counter()  # forget those with none
            self._changed.set()
            self._changed = asyncio.Event()
