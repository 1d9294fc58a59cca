"""Snapshots on their way to the gateways: numbered, published when something has changed, and who
has seen which.

A gateway that asks for what comes after version N has taken in N: that is its acknowledgement.
Called by: control.loop.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Sequence

from cluster.control import snapshots
from cluster.control.clock import Clock
from cluster.control.state import DesiredState
from cluster.control.store import Store
from cluster.snapshot import Snapshot
from cluster.workers.report import WorkerReport

# Load alone is not worth waking every gateway at once.
LOAD_PERIOD_S = 1.0
# A gateway asks again after 20 s at the latest (gateway.source); one that does not is gone.
GATEWAY_GONE_AFTER_S = 30.0
# Versions are given out in runs, so that a busy second costs no write to the store.
_VERSIONS_PER_RUN = 1_000


class Publisher:
    """Owns the present snapshot. Lives in the controller's event loop."""

    def __init__(self, store: Store, clock: Clock) -> None:
        self._store = store
        self._clock = clock
        self._snapshot: Snapshot | None = None
        self._at_s = 0.0
        self._version = 0
        self._versions_until = 0
        self._published = asyncio.Condition()
        self._turn = asyncio.Lock()
        # Per gateway: the version it has taken in, and when it was last heard of.
        self._seen: dict[str, tuple[int, float]] = {}
        self._acknowledged = asyncio.Condition()

    @property
    def version(self) -> int:
        return self._version

    async def restore(self) -> None:
        """Go on above every version that a former controller may have given out."""
        given_out = await asyncio.to_thread(self._store.versions_given_out)
        self._version = self._versions_until = given_out

    async def publish(self, desired: DesiredState, reports: Sequence[WorkerReport]) -> None:
        """Give out a new snapshot, if it differs from the present one in what matters now."""
        async with self._turn:
            new = snapshots.build(desired, reports, self._version + 1)
            now_s = self._clock.now_s()
            change = snapshots.changed(self._snapshot, new)
            if change is snapshots.Change.NONE:
                return
            if change is snapshots.Change.LOAD and now_s - self._at_s < LOAD_PERIOD_S:
                return
            if new.version > self._versions_until:
                self._versions_until = new.version + _VERSIONS_PER_RUN
                await asyncio.to_thread(self._store.put_versions_given_out, self._versions_until)
            async with self._published:
                self._snapshot, self._version, self._at_s = new, new.version, now_s
                self._published.notify_all()

    async def next(self, after_version: int, timeout_s: float, gateway: str) -> Snapshot:
        """As Controller.next_snapshot."""
        if gateway:
            self._seen[gateway] = (after_version, self._clock.now_s())
            async with self._acknowledged:
                self._acknowledged.notify_all()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._published:
                await self._published.wait_for(lambda: self._version > after_version)
        async with self._published:
            await self._published.wait_for(lambda: self._snapshot is not None)
        assert self._snapshot is not None
        return self._snapshot

    async def acknowledged(self, version: int, within_s: float) -> bool:
        """Wait until every gateway has taken in `version`; False: one has not within `within_s`."""
        try:
            async with asyncio.timeout(within_s), self._acknowledged:
                await self._acknowledged.wait_for(lambda: self._have_all(version))
        except TimeoutError:
            return False
        return True

    def _have_all(self, version: int) -> bool:
        gone_s = self._clock.now_s() - GATEWAY_GONE_AFTER_S
        self._seen = {name: seen for name, seen in self._seen.items() if seen[1] >= gone_s}
        return all(seen >= version for seen, _ in self._seen.values())
