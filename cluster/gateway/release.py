"""Give prefill's blocks back when nobody will pull them: ask the worker that owns the engine.

The gateway's own view of a worker actor, on purpose smaller than `workers.handle`: a gateway may
run in another Ray namespace (Ray Serve's), and must never create or remove a worker.
"""

from __future__ import annotations

import asyncio
from itertools import count
from typing import Any

from cluster.errors import PeerGone
from cluster.identity import WorkerId
from cluster.settings import ray_namespace, worker_actor

_ANSWER_BOUND_S = 10.0


class RayReleaser:
    """kv.coordinator.Releaser over Ray."""

    def __init__(self, cluster: str) -> None:
        self._namespace = ray_namespace(cluster)

    async def release(self, worker: WorkerId, request_ids: list[str]) -> None:
        """Raises: PeerGone: the worker ended (its blocks with it) or does not answer."""
        import ray

        actors = await asyncio.to_thread(self._ranks, worker)
        if not actors:
            raise PeerGone(str(worker), "it has ended")
        try:
            async with asyncio.timeout(_ANSWER_BOUND_S):
                await asyncio.gather(*(actor.release.remote(request_ids) for actor in actors))
        except TimeoutError as error:
            raise PeerGone(str(worker), f"no answer for {_ANSWER_BOUND_S:g} s") from error
        except ray.exceptions.RayActorError as error:
            raise PeerGone(str(worker), str(error).partition("\n")[0]) from error

    def _ranks(self, worker: WorkerId) -> list[Any]:
        import ray

        actors: list[Any] = []
        for rank in count():
            try:
                name = worker_actor(worker, rank)
                actors.append(ray.get_actor(name, namespace=self._namespace))
            except ValueError:
                return actors
        return actors
