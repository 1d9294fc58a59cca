"""The controller as a Ray actor: start it, find it, talk to it, end it.

All `.remote()` calls to the controller are here, but for the gateways' long-poll
(gateway.source). The actor is detached, lives on the head node, and restarts whatever killed it;
its state is elsewhere (control.store). It serves the control API itself (control.api_server). The
caller's Ray namespace must be `settings.ray_namespace(cluster)`.

ControllerClient blocks; it is for the launcher, on the head. Others use the control API.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any

import ray
from ray import exceptions as ray_exceptions

from cluster.control.api_server import ApiServer
from cluster.control.autoscale.view import Scaling
from cluster.control.autoscaler import Autoscaler
from cluster.control.clock import SystemClock
from cluster.control.controller import Controller
from cluster.control.state import ClusterStatus, DesiredState
from cluster.control.store import ApiAccess, RayKeyValue, Store
from cluster.errors import ClusterError, PeerGone
from cluster.identity import WorkerId
from cluster.settings import CONTROLLER_ACTOR, ray_namespace
from cluster.workers import handle as workers
from cluster.workers.handle import WorkerHandle
from cluster.workers.nodes import RayNode, look
from cluster.workers.spec import WorkerSpec

# A restarting controller imports Ray and finds its workers before it answers.
ANSWER_BOUND_S = 30.0
_STOP_BOUND_S = 30.0
# Ray's own resource of the head node. A sliver: it binds the actor to the node, and takes nothing.
_ON_HEAD = {"node:__internal_head__": 0.001}


class RayWorkers:
    """control.fleet.Workers over workers.handle."""

    async def spawn(self, spec: WorkerSpec) -> WorkerHandle:
        return await workers.spawn(spec)

    async def find(self, cluster: str, worker: WorkerId) -> WorkerHandle | None:
        return await workers.find(cluster, worker)

    async def find_all(self, cluster: str) -> list[WorkerId]:
        return await workers.find_all(cluster)

    async def remove(self, cluster: str, worker: WorkerId) -> None:
        await workers.remove(cluster, worker)

    async def nodes(self) -> tuple[RayNode, ...]:
        return await look()


class ControllerActor(Controller):
    """What Ray runs: a Controller that begins by itself, also after a restart, and its API."""

    # Ray awaits a coroutine __init__ in the actor's own event loop.
    async def __init__(self, cluster: str) -> None:  # type: ignore[misc]
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
        self._kept = Store(RayKeyValue(cluster))
        super().__init__(cluster, RayWorkers(), self._kept, SystemClock())
        self._running = asyncio.create_task(self.run(), name=f"run {cluster}")
        self._autoscaler = Autoscaler(self, SystemClock(), self.emit)
        self._scaling = asyncio.create_task(self._autoscaler.run(), name=f"autoscaler {cluster}")
        self._api: ApiServer | None = None
        access = await asyncio.to_thread(self._kept.api_access)
        if access is not None:
            self._api = ApiServer(self, access)
            self._serving = asyncio.create_task(self._api.run(), name=f"API of {cluster}")

    async def apply(self, desired: DesiredState) -> None:
        """As Controller.apply; also takes the token that the store holds now."""
        await super().apply(desired)
        access = await asyncio.to_thread(self._kept.api_access)
        if access is not None and self._api is not None:
            self._api.take(access)

    async def scaling(self) -> Scaling:
        """What the autoscaler has decided last."""
        return self._autoscaler.scaling()

    async def api_problem(self) -> str:
        """Why the control API does not answer; "" if it does."""
        return self._api.problem if self._api is not None else "it was started without one"


class ControllerClient:
    """Blocking calls to the controller. Every method raises PeerGone if it does not answer."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def apply(self, desired: DesiredState) -> None:
        self._ask(self._actor.apply.remote(desired), ANSWER_BOUND_S)

    def desired(self) -> DesiredState | None:
        found: DesiredState | None = self._ask(self._actor.desired.remote(), ANSWER_BOUND_S)
        return found

    def status(self) -> ClusterStatus:
        found: ClusterStatus = self._ask(self._actor.status.remote(), ANSWER_BOUND_S)
        return found

    def api_problem(self) -> str:
        """As ControllerActor.api_problem."""
        found: str = self._ask(self._actor.api_problem.remote(), ANSWER_BOUND_S)
        return found

    def shutdown(self, grace_s: float) -> None:
        """As Controller.shutdown."""
        self._ask(self._actor.shutdown.remote(grace_s), grace_s + _STOP_BOUND_S)

    def _ask(self, answer: Any, bound_s: float) -> Any:
        try:
            return ray.get(answer, timeout=bound_s)
        except ray_exceptions.GetTimeoutError as error:
            raise PeerGone("the controller", f"no answer for {bound_s:g} s") from error
        except ray_exceptions.RayTaskError as error:
            if isinstance(error.cause, ClusterError):
                raise error.cause from None
            raise
        except ray_exceptions.RayError as error:
            raise PeerGone("the controller", str(error).partition("\n")[0]) from error


def start(cluster: str, engine_key: str, access: ApiAccess) -> ControllerClient:
    """Start the cluster's controller, or find the one that runs. The secrets go to the key-value
    store, never through the actor's arguments, which Ray shows and logs; a controller that runs
    takes them with the next `apply`."""
    store = Store(RayKeyValue(cluster))
    store.put_engine_key(engine_key)
    store.put_api_access(access)
    actor = (
        ray.remote(ControllerActor)
        .options(
            name=CONTROLLER_ACTOR,
            namespace=ray_namespace(cluster),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            # A call that met a controller in the middle of its restart is sent again.
            max_task_retries=-1,
            num_cpus=0,
            resources=_ON_HEAD,
            # Gateways wait inside `next_snapshot`, each taking a place.
            max_concurrency=10_000,
        )
        .remote(cluster)
    )
    return ControllerClient(actor)


def find(cluster: str) -> ControllerClient | None:
    """The running controller, or None."""
    try:
        return ControllerClient(ray.get_actor(CONTROLLER_ACTOR, namespace=ray_namespace(cluster)))
    except ValueError:
        return None


def end(cluster: str) -> None:
    """End the actor for good. Workers are not touched: `shutdown` first. Idempotent."""
    with contextlib.suppress(ValueError):
        ray.kill(ray.get_actor(CONTROLLER_ACTOR, namespace=ray_namespace(cluster)), no_restart=True)
