"""Workers as Ray actors: spawn one, find it again, talk to it, remove it.

    spawn ─▶ placement group (one bundle per node of the replica, detached)
          ─▶ one detached, named actor per bundle, rank 0 first; each starts its engine
    find  ─▶ the same handle, from any process of the cluster's namespace

All `.remote()` calls to workers are here. The caller's own Ray namespace must be
`settings.ray_namespace(cluster)`: placement groups are named in the namespace of their maker.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Iterable
from dataclasses import dataclass, replace
from typing import Any, Protocol, TypeVar

import ray
from ray import exceptions as ray_exceptions
from ray.util.placement_group import PlacementGroup, placement_group_table
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from cluster.errors import InvalidInput, PeerGone
from cluster.identity import WorkerId, WorkerState
from cluster.settings import ray_namespace, worker_actor
from cluster.transfers import TransferRecord
from cluster.workers import nodes
from cluster.workers.gang import MeetingPlace, merge
from cluster.workers.placement import (
    PlacementRequest,
    explain_unplaceable,
    request_of,
)
from cluster.workers.raylet import end_with_raylet
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec
from cluster.workers.worker import EngineWorker

log = logging.getLogger(__name__)

# A worker's answers come from its memory: one that takes longer is not there.
ANSWER_BOUND_S = 10.0
# From a placed bundle to an actor that answers; a busy node imports slowly.
_ACTOR_START_BOUND_S = 90.0
_STOP_BOUND_S = 15.0

# A group is rescheduled when one of its nodes is lost; the ranks on the others live on.
_GROUP_WAS_PLACED = frozenset({"CREATED", "RESCHEDULING"})
_GROUP_LIVES = _GROUP_WAS_PLACED | {"PENDING"}

T = TypeVar("T")


class WorkerHandle(Protocol):
    """One replica, whatever it runs on. Every method raises PeerGone if it does not answer."""

    @property
    def id(self) -> WorkerId: ...

    async def start(self) -> None: ...

    async def report(self) -> WorkerReport: ...

    async def read_log(self, offset: int, limit_bytes: int, rank: int = 0) -> tuple[bytes, int]: ...

    async def transfers(self, after_seq: int) -> list[tuple[int, TransferRecord]]: ...

    async def release(self, request_ids: list[str]) -> None: ...

    async def quiesce(self, grace_s: float) -> bool: ...

    async def stop(self, grace_s: float) -> None: ...


class WorkerActor(EngineWorker):
    """What Ray runs: an EngineWorker that knows its node and its gang."""

    def __init__(self, spec: WorkerSpec) -> None:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        end_with_raylet()
        gang = RayGang(spec) if spec.pool.nodes_per_replica > 1 else None
        node_id = ray.get_runtime_context().get_node_id()
        super().__init__(spec, ray.util.get_node_ip_address(), gang=gang, node_id=node_id)


class RayGang:
    """workers.gang.Gang: the other ranks, found by their actors' names."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._spec = spec

    async def meeting_place(self) -> MeetingPlace:
        try:
            place: MeetingPlace = await self._actor(0).meeting_place.remote()
        except (ValueError, ray_exceptions.RayError) as error:
            if isinstance(error, ray_exceptions.RayTaskError) and isinstance(error.cause, PeerGone):
                raise error.cause from None
            why = f"rank 0: {str(error).partition(chr(10))[0]}"
            raise PeerGone(str(self._spec.id), why) from error
        return place

    def end_others(self) -> None:
        for rank in range(1, self._spec.pool.nodes_per_replica):
            with contextlib.suppress(ValueError):  # that one is gone
                self._actor(rank).stop.remote(0.0)

    def _actor(self, rank: int) -> Any:
        name = worker_actor(self._spec.id, rank)
        return ray.get_actor(name, namespace=ray_namespace(self._spec.cluster))


class RayWorkerHandle:
    """A replica made of Ray actors, one per node, rank 0 first."""

    def __init__(self, worker: WorkerId, actors: list[Any], pending: _Pending | None) -> None:
        self._id = worker
        self._actors = actors
        self._pending = pending
        self._made_at_s = time.monotonic()

    @property
    def id(self) -> WorkerId:
        return self._id

    def __repr__(self) -> str:
        return f"RayWorkerHandle({self._id})"

    async def start(self) -> None:
        """Ask every rank to start its engine. Returns at once, also if none is placed yet."""
        for actor in self._actors:
            actor.start.remote()

    async def report(self) -> WorkerReport:
        """How the replica is. Before its actors answer for the first time: STARTING, and what
        Ray lacks to place it.

        Raises: PeerGone: an actor died or does not answer."""
        if self._pending is None:
            return merge(await self._ask(self._reports(), ANSWER_BOUND_S))
        unplaced = await asyncio.to_thread(self._pending.why_unplaced)
        if unplaced:
            self._made_at_s = time.monotonic()
            return replace(self._pending.report, message=unplaced)
        starting_s = time.monotonic() - self._made_at_s
        if starting_s < _ACTOR_START_BOUND_S:
            ready, _ = await asyncio.to_thread(
                ray.wait,
                [actor.__ray_ready__.remote() for actor in self._actors],
                num_returns=len(self._actors),
                timeout=0.5,
            )
            if len(ready) < len(self._actors):
                return replace(self._pending.report, message="its Ray actor is starting")
        merged = merge(await self._ask(self._reports(), ANSWER_BOUND_S))
        self._pending = None
        return merged

    async def _reports(self) -> list[WorkerReport]:
        return list(await asyncio.gather(*(actor.report.remote() for actor in self._actors)))

    async def read_log(self, offset: int, limit_bytes: int, rank: int = 0) -> tuple[bytes, int]:
        """As EngineWorker.read_log, of one rank. Raises: InvalidInput: there is no such rank."""
        if not 0 <= rank < len(self._actors):
            raise InvalidInput(
                f"rank of {self._id.name}: found {rank}; it has ranks 0 to {len(self._actors) - 1}"
            )
        answer = self._actors[rank].read_log.remote(offset, limit_bytes)
        return await self._ask(answer, ANSWER_BOUND_S)

    async def transfers(self, after_seq: int) -> list[tuple[int, TransferRecord]]:
        """As EngineWorker.transfers, of rank 0."""
        return await self._ask(self._actors[0].transfers.remote(after_seq), ANSWER_BOUND_S)

    async def release(self, request_ids: list[str]) -> None:
        calls = (actor.release.remote(request_ids) for actor in self._actors)
        await self._ask(asyncio.gather(*calls), ANSWER_BOUND_S)

    async def quiesce(self, grace_s: float) -> bool:
        """As EngineWorker.quiesce, of rank 0: it has the requests. Answers within `grace_s` and
        some seconds, or raises PeerGone."""
        answer = self._actors[0].quiesce.remote(grace_s)
        return await self._ask(answer, grace_s + ANSWER_BOUND_S)

    async def stop(self, grace_s: float) -> None:
        """As EngineWorker.stop: rank 0's requests end, then all ranks. One that waits for room has
        nothing to end. Raises PeerGone only after every rank that answers has ended."""
        if self._pending is not None and not await asyncio.to_thread(self._pending.is_placed):
            return  # its actors would answer once there is room
        head, *others = self._actors
        failed: list[BaseException | None] = []
        try:
            await self._ask(head.stop.remote(grace_s), grace_s + _STOP_BOUND_S)
        except PeerGone as error:
            failed.append(error)
        # Rank 0 has told them already, unless it is gone.
        failed += await self._stop_now(others)
        for gone in failed:
            if gone is not None:
                raise gone

    async def end(self) -> None:
        """End every rank that answers, without grace. Never raises."""
        await self._stop_now(self._actors)

    async def _stop_now(self, actors: list[Any]) -> list[BaseException | None]:
        calls: Iterable[Awaitable[None]] = (
            self._ask(actor.stop.remote(0.0), _STOP_BOUND_S) for actor in actors
        )
        return list(await asyncio.gather(*calls, return_exceptions=True))

    async def _ask(self, answer: Awaitable[T], bound_s: float) -> T:
        try:
            async with asyncio.timeout(bound_s):
                return await answer
        except TimeoutError as error:
            raise PeerGone(str(self._id), f"no answer for {bound_s:g} s") from error
        except ray_exceptions.RayActorError as error:
            raise PeerGone(str(self._id), str(error).partition("\n")[0]) from error


@dataclass(frozen=True, slots=True)
class _Pending:
    """A replica that Ray may not have placed yet."""

    group: PlacementGroup
    request: PlacementRequest
    report: WorkerReport

    def is_placed(self) -> bool:
        """Blocks on Ray."""
        return _group_state(self.group) == "CREATED"

    def why_unplaced(self) -> str:
        """ "" once it is placed. Blocks on Ray."""
        return "" if self.is_placed() else explain_unplaceable(self.request, nodes.living())


async def spawn(spec: WorkerSpec) -> WorkerHandle:
    """Create the replica's placement group and actors, and let its engine start.

    `spec` is rank 0's; the other ranks' are made from it. Returns before anything is placed: the
    handle's report says what is missing. Spawning the same id again returns the same replica.

    Raises: RuntimeError: the caller is in another Ray namespace."""
    handle = await asyncio.to_thread(_spawn, spec)
    await handle.start()
    return handle


async def find(cluster: str, worker: WorkerId) -> WorkerHandle | None:
    """The replica of exactly this generation, or None. One that is not whole (not placed yet, or
    a rank's actor dead) is removed: it serves nobody."""
    handle = await asyncio.to_thread(_find, cluster, worker)
    if handle is None:
        await remove(cluster, worker)
        return None
    # The maker may have gone before its start arrived; a second start does nothing.
    await handle.start()
    return handle


async def find_all(cluster: str) -> list[WorkerId]:
    """Every replica of which anything exists in Ray: for a controller that begins anew."""
    return await asyncio.to_thread(_find_all, cluster)


async def remove(cluster: str, worker: WorkerId) -> None:
    """End the replica's engine, actors and placement group, without grace. Idempotent."""
    group, actors = await asyncio.to_thread(_parts, cluster, worker)
    state = await asyncio.to_thread(_group_state, group) if group is not None else "REMOVED"
    if state in _GROUP_WAS_PLACED:
        # Devices are free only when the engine is gone, and a killed actor's takes longer.
        await RayWorkerHandle(worker, actors, None).end()
    await asyncio.to_thread(_remove, group, actors)


def _spawn(spec: WorkerSpec) -> RayWorkerHandle:
    _check_namespace(spec.cluster)
    request = request_of(spec.pool, spec.avoided_nodes)
    group, _ = _parts(spec.cluster, spec.id)
    if group is None:
        group = ray.util.placement_group(
            request.bundles,
            strategy=request.strategy,
            name=str(spec.id),
            lifetime="detached",
            bundle_label_selector=request.label_selectors,
        )
    remote_class = ray.remote(WorkerActor)
    actors = [
        remote_class.options(
            name=worker_actor(spec.id, rank),
            namespace=ray_namespace(spec.cluster),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=0,
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group=group, placement_group_bundle_index=rank
            ),
            **request.actor_options,
        ).remote(replace(spec, node_rank=rank))
        for rank in range(request.nodes)
    ]
    report = WorkerReport(
        id=spec.id,
        role=spec.role,
        state=WorkerState.STARTING,
        message="",
        node_ip="",
        url="",
        started_at_s=time.time(),
        max_model_len_tokens=spec.max_model_len_tokens,
        kv_bytes_per_token=spec.kv_bytes_per_token,
    )
    return RayWorkerHandle(spec.id, actors, _Pending(group, request, report))


def _find(cluster: str, worker: WorkerId) -> RayWorkerHandle | None:
    group, actors = _parts(cluster, worker)
    if group is None or _group_state(group) != "CREATED" or len(actors) < group.bundle_count:
        return None
    return RayWorkerHandle(worker, actors, None)


def _find_all(cluster: str) -> list[WorkerId]:
    _check_namespace(cluster)
    names = [
        entry["name"].removeprefix("worker:").rpartition(":")[0]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == ray_namespace(cluster) and entry["name"].startswith("worker:")
    ]
    return sorted({WorkerId.parse(name) for name in [*names, *_groups_of_workers()]})


def _groups_of_workers() -> list[str]:
    """Names of this namespace's living placement groups: one may have lost all its actors."""
    names: list[str] = []
    for group_id, row in placement_group_table().items():
        if row["state"] not in _GROUP_LIVES:
            continue
        with contextlib.suppress(ValueError):  # not a replica's; or another namespace's
            WorkerId.parse(row["name"])
            if ray.util.get_placement_group(row["name"]).id.hex() == group_id:
                names.append(row["name"])
    return names


def _parts(cluster: str, worker: WorkerId) -> tuple[PlacementGroup | None, list[Any]]:
    """What exists of a replica in Ray: its placement group, and its actors by rank."""
    _check_namespace(cluster)
    group: PlacementGroup | None = None
    with contextlib.suppress(ValueError):  # there is none of this name
        group = ray.util.get_placement_group(str(worker))
    if group is not None and _group_state(group) not in _GROUP_LIVES:
        group = None
    prefix = worker_actor(worker).removesuffix("0")
    names = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == ray_namespace(cluster) and entry["name"].startswith(prefix)
    ]
    actors: list[Any] = []
    for name in sorted(names, key=lambda name: int(name.removeprefix(prefix))):
        with contextlib.suppress(ValueError):  # died since it was listed
            actors.append(ray.get_actor(name, namespace=ray_namespace(cluster)))
    return group, actors


def _remove(group: PlacementGroup | None, actors: list[Any]) -> None:
    for actor in actors:
        ray.kill(actor, no_restart=True)
    if group is not None:
        ray.util.remove_placement_group(group)


def _group_state(group: PlacementGroup) -> str:
    return str(placement_group_table(group).get("state", "REMOVED"))


def _check_namespace(cluster: str) -> None:
    namespace = ray.get_runtime_context().namespace
    if namespace != ray_namespace(cluster):
        raise RuntimeError(
            f"the Ray namespace here is {namespace!r}; connect with "
            f"ray.init(namespace={ray_namespace(cluster)!r})"
        )
