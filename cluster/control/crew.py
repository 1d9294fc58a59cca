"""The workers that exist, and what is being done to them: starts, drains, removals, flips.

Each deed is a task in the background; the worker's entry says meanwhile what it is about, and the
next tick goes by that. Decides nothing. Called by: control.loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any

from cluster.control.clock import Clock
from cluster.control.events import WorkerLetGo, WorkerNotStarted
from cluster.control.fleet import Tracked, Workers
from cluster.control.flip import LET_GO_S, Way, flip
from cluster.errors import ClusterError
from cluster.identity import Role, WorkerId
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec

log = logging.getLogger(__name__)

# A worker that answers later is seen at the next tick.
REPORT_WAIT_S = 1.0


class Crew:
    """Owned by one controller. `way`: how a deed reaches gateways; `wake`: has the controller look
    again at once."""

    def __init__(self, cluster: str, workers: Workers, way: Way, wake: Callable[[], None]) -> None:
        self._cluster = cluster
        self._workers = workers
        self._way = way
        self._wake = wake
        self._tracked: dict[WorkerId, Tracked] = {}
        self._deeds: set[asyncio.Task[None]] = set()

    def __len__(self) -> int:
        return len(self._tracked)

    @property
    def _clock(self) -> Clock:
        return self._way.clock

    def in_order(self) -> list[Tracked]:
        return [self._tracked[worker] for worker in sorted(self._tracked)]

    def reports(self) -> list[WorkerReport]:
        """The latest of each, corrected by what has been decided since."""
        return [tracked.shown() for tracked in self.in_order()]

    def get(self, worker: WorkerId) -> Tracked | None:
        return self._tracked.get(worker)

    async def find(self, role_of: Callable[[WorkerId], Role]) -> list[WorkerId]:
        """Adopt what runs already. All that anything exists of, adopted or not."""
        found = await self._workers.find_all(self._cluster)
        handles = await asyncio.gather(
            *(self._workers.find(self._cluster, worker) for worker in found)
        )
        for worker, handle in zip(found, handles, strict=True):
            if handle is not None:
                self._tracked[worker] = Tracked.adopted(handle, role_of(worker), self._clock)
        return found

    async def observe(self, hung_after_s: float) -> None:
        """Ask every worker for its report; one that is late keeps its last one for now."""
        for tracked in self._tracked.values():
            tracked.ask()
        asked = [t.asking for t in self._tracked.values() if t.asking is not None]
        if asked:
            await asyncio.wait(asked, timeout=REPORT_WAIT_S)
        for tracked in self.in_order():
            for event in await tracked.take(self._workers, self._cluster, hung_after_s):
                self._way.emit(event)

    # Deeds

    def start(self, spec: WorkerSpec) -> None:
        tracked = Tracked.starting(spec.id, spec.role, spec.revision, self._clock)
        tracked.avoided = frozenset(spec.avoided_nodes)
        self._tracked[spec.id] = tracked
        tracked.spawning = self._do(self._spawn(tracked, spec), f"spawn {spec.id}")

    def drain(self, tracked: Tracked, grace_s: float) -> None:
        """Let it finish for `grace_s`; then what it has goes on elsewhere, and it ends."""
        tracked.is_draining = True
        self._do(self._drain(tracked, grace_s), f"drain {tracked.id}")

    def remove(self, tracked: Tracked) -> None:
        tracked.is_removing = True
        self._do(self._remove(tracked.id), f"remove {tracked.id}")

    def flip(self, tracked: Tracked, role: Role, grace_s: float) -> None:
        """As control.flip."""
        tracked.is_changing = True
        self._do(self._flip(tracked, role, grace_s), f"flip {tracked.id}")

    async def end_all(self, grace_s: float) -> None:
        """Stop every worker (requests in hand get up to `grace_s`) and remove it."""
        spawns = [t.spawning for t in self.in_order() if t.spawning is not None]
        await asyncio.gather(*spawns, return_exceptions=True)
        left = {*self._tracked, *await self._workers.find_all(self._cluster)}
        await asyncio.gather(*(self._end(worker, grace_s) for worker in sorted(left)))
        await asyncio.gather(*self._deeds, return_exceptions=True)
        self._tracked.clear()

    async def _spawn(self, tracked: Tracked, spec: WorkerSpec) -> None:
        try:
            tracked.handle = await self._workers.spawn(spec)
        except Exception as error:
            tracked.failed(f"{type(error).__name__}: {error}")
            self._way.emit(WorkerNotStarted(tracked.id, str(error)))

    async def _drain(self, tracked: Tracked, grace_s: float) -> None:
        if tracked.handle is not None:
            # The engine lives a little longer than its grace: long enough for gateways to break
            # off themselves, which loses nothing.
            stop = asyncio.ensure_future(tracked.handle.stop(grace_s + LET_GO_S))
            await asyncio.wait({stop}, timeout=grace_s)
            if not stop.done():
                tracked.lets_go = True
                self._way.emit(WorkerLetGo(tracked.id, f"its grace of {grace_s:g} s is over"))
                await self._way.publish()
            with contextlib.suppress(ClusterError):
                await stop
        tracked.stopped()
        self._wake()

    async def _remove(self, worker: WorkerId) -> None:
        try:
            await self._workers.remove(self._cluster, worker)
        finally:
            self._tracked.pop(worker, None)
            self._wake()

    async def _flip(self, tracked: Tracked, role: Role, grace_s: float) -> None:
        try:
            await flip(tracked, role, grace_s, self._way)
        finally:
            self._wake()

    async def _end(self, worker: WorkerId, grace_s: float) -> None:
        tracked = self._tracked.get(worker)
        handle = tracked.handle if tracked is not None else None
        if handle is not None:
            with contextlib.suppress(ClusterError):
                await handle.stop(grace_s)
        await self._workers.remove(self._cluster, worker)

    def _do(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        deed = asyncio.create_task(work, name=name)
        self._deeds.add(deed)
        deed.add_done_callback(self._done)
        return deed

    def _done(self, deed: asyncio.Task[None]) -> None:
        self._deeds.discard(deed)
        if not deed.cancelled() and deed.exception() is not None:
            log.error("%s failed", deed.get_name(), exc_info=deed.exception())
