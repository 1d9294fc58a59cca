"""Where snapshots come from: the controller's Ray actor by long-poll, or a fixed one.

A dead controller stops changes, not serving: `ControllerSource` keeps asking, and the gateway
keeps the last snapshot it saw.
"""

from __future__ import annotations

import asyncio
import logging
from typing import Protocol

from cluster.settings import CONTROLLER_ACTOR, ray_namespace
from cluster.snapshot import Snapshot

log = logging.getLogger(__name__)

_POLL_S = 20.0
_BACKOFF_S = 0.5
_BACKOFF_MAX_S = 5.0


class SnapshotSource(Protocol):
    """A stream of snapshots, newest only."""

    async def next(self, after_version: int) -> Snapshot:
        """Wait for a snapshot newer than `after_version`, which the caller routes by from now on;
        0 gives the first there is. Never raises on its own account. Cancel: safe."""
        ...


class StaticSource:
    """Snapshots given by hand: for tests, benchmarks, and engines that nobody manages."""

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._changed = asyncio.Event()

    def publish(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._changed.set()
        self._changed = asyncio.Event()

    async def next(self, after_version: int) -> Snapshot:
        while self._snapshot.version <= after_version:
            await self._changed.wait()
        return self._snapshot


class ControllerSource:
    """Long-polls the cluster's controller. To be used inside a process that Ray runs."""

    def __init__(self, cluster: str, replica: str) -> None:
        """`replica`: the gateway's own id. Its calls tell the controller which snapshot each
        gateway routes by: a change of role waits for that."""
        self._cluster = cluster
        self._replica = replica

    async def next(self, after_version: int) -> Snapshot:
        import ray

        backoff_s = _BACKOFF_S
        while True:
            try:
                # By name each time: a restarted controller is another actor with the same name.
                controller = await asyncio.to_thread(
                    ray.get_actor, CONTROLLER_ACTOR, namespace=ray_namespace(self._cluster)
                )
                while True:
                    snapshot = await controller.next_snapshot.remote(
                        after_version, _POLL_S, self._replica
                    )
                    backoff_s = _BACKOFF_S
                    if isinstance(snapshot, Snapshot) and snapshot.version > after_version:
                        return snapshot
            except (ValueError, ray.exceptions.RayError) as error:
                log.warning(
                    "controller not reached why=%s next_try_s=%.1f",
                    type(error).__name__,
                    backoff_s,
                )
            await asyncio.sleep(backoff_s)
            backoff_s = min(backoff_s * 2, _BACKOFF_MAX_S)
