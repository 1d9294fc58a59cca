"""Start and stop an endpoint's gateway replicas.

    direct  detached Ray actors, each with its own uvicorn in the actor's event loop; replicas on
            one node share the port (SO_REUSEPORT, the kernel spreads connections)
    serve   one Ray Serve deployment behind Serve's HAProxy

Both run the same ASGI app and follow the cluster's controller by themselves. What the processes of
Ray must find in their environment for `serve` is `SERVE_ENV`: set it before Ray is started.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import hashlib
import logging
import os
import pickle
import socket
import uuid
from typing import Any, Literal

import psutil
import uvicorn

from cluster.errors import InvalidInput, StartFailed
from cluster.gateway.app import Gateway, create_app
from cluster.gateway.config import GatewayConfig
from cluster.gateway.release import RayReleaser
from cluster.gateway.reports import ControllerSink
from cluster.gateway.source import ControllerSource
from cluster.settings import gateway_actor, ray_namespace

log = logging.getLogger(__name__)

Ingress = Literal["direct", "serve"]

SERVE_ENV = {
    "RAY_SERVE_ENABLE_HA_PROXY": "1",
    # The app has its own ways to stay responsive; a second loop costs a thread hop per message.
    "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
    # HAProxy here learns within a second that a replica leaves; 30 s is meant for balancers that
    # must find out by themselves.
    "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "2",
}

_START_BOUND_S = 60.0
_BACKLOG = 2048
# Longer than the minute that many clients and balancers keep an idle connection.
_KEEP_ALIVE_S = 75
_LOOPBACK = ("127.", "::1", "localhost")


def start(config: GatewayConfig, count: int, ingress: Ingress) -> None:
    """Start `count` replicas; return when they accept connections. Ray must be connected.

    Replicas of the same configuration that run already are kept; others are replaced.
    Raises: InvalidInput: the port is taken, or Ray was started without SERVE_ENV. StartFailed.
    """
    if ingress == "direct":
        _start_direct(config, count)
    else:
        _start_serve(config, count)


def stop(cluster: str, ingress: Ingress, grace_s: float = 5.0) -> None:
    """End the replicas; requests in flight get `grace_s` to finish (`serve`: as Serve was told at
    the start, 20 s). Idempotent."""
    if ingress == "direct":
        _stop_direct(cluster, grace_s)
    else:
        _stop_serve(cluster)


# Direct


class GatewayReplica:
    """What Ray runs: one uvicorn. Begins to listen as soon as it is made, so that a replica that
    Ray restarts does not wait for anybody to tell it to."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config
        self._server = uvicorn.Server(_uvicorn_config(_app(config)))
        self._serving = asyncio.get_event_loop().create_task(self._serve(), name="gateway")

    async def ready(self) -> str:
        """Wait until connections are accepted; returns "" or why that will not happen."""
        while not self._server.started:
            if self._serving.done():
                return str(self._serving.exception() or "the server ended")
            await asyncio.sleep(0.02)
        return ""

    async def digest(self) -> str:
        return _digest(self._config)

    async def stop(self, grace_s: float) -> None:
        """Stop listening, let requests in flight finish, at most `grace_s`."""
        self._server.config.timeout_graceful_shutdown = max(1, round(grace_s))
        self._server.should_exit = True
        await asyncio.wait([self._serving], timeout=grace_s + 2)

    async def _serve(self) -> None:
        listener = _listen(self._config.host, self._config.port, is_shared=True)
        # What was made by now stays, and requests make few cycles: the collector need not look at
        # the one again and again, nor so often for the other (measured: 7 % of a request's time).
        gc.collect()
        gc.freeze()
        gc.set_threshold(20_000, 20, 100)
        await self._server.serve(sockets=[listener])


def _start_direct(config: GatewayConfig, count: int) -> None:
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    running = _direct_replicas(config.cluster)
    if running and not _are_current(running, config, count):
        _stop_direct(config.cluster, 5.0)
        running = []
    if not running:
        _check_port_is_free(config.host, config.port)
    # On loopback only this node's clients can reach a replica; else let nodes share the work, but
    # keep one here: this node's address is the one that people are told.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    stays_here = config.host.startswith(_LOOPBACK)
    replicas = [
        ray.remote(GatewayReplica)
        .options(
            name=gateway_actor(index),
            namespace=ray_namespace(config.cluster),
            lifetime="detached",
            get_if_exists=True,
            max_restarts=-1,
            num_cpus=0,
            max_concurrency=64,
            scheduling_strategy=here if stays_here or index == 0 else "SPREAD",
        )
        .remote(config)
        for index in range(count)
    ]
    try:
        problems = ray.get([replica.ready.remote() for replica in replicas], timeout=_START_BOUND_S)
    except ray.exceptions.RayError as error:
        _stop_direct(config.cluster, 0.0)
        raise StartFailed("gateway", str(error).partition("\n")[0]) from error
    for problem in filter(None, problems):
        _stop_direct(config.cluster, 0.0)
        raise StartFailed("gateway", problem)


def _stop_direct(cluster: str, grace_s: float) -> None:
    import ray

    replicas = _direct_replicas(cluster)
    asked = [replica.stop.remote(grace_s) for replica in replicas]
    for answer in asked:
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(answer, timeout=grace_s + 5)
    for replica in replicas:
        ray.kill(replica, no_restart=True)


def _direct_replicas(cluster: str) -> list[Any]:
    import ray

    names = [
        entry["name"]
        for entry in ray.util.list_named_actors(all_namespaces=True)
        if entry["namespace"] == ray_namespace(cluster) and entry["name"].startswith("gateway:")
    ]
    replicas: list[Any] = []
    for name in sorted(names):
        with contextlib.suppress(ValueError):  # ended since it was listed
            replicas.append(ray.get_actor(name, namespace=ray_namespace(cluster)))
    return replicas


def _are_current(replicas: list[Any], config: GatewayConfig, count: int) -> bool:
    import ray

    if len(replicas) != count:
        return False
    try:
        digests = ray.get([replica.digest.remote() for replica in replicas], timeout=10)
    except ray.exceptions.RayError:
        return False
    return set(digests) == {_digest(config)}


def _uvicorn_config(app: Gateway) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="on",
        access_log=False,
        log_level="warning",
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=_KEEP_ALIVE_S,
        backlog=_BACKLOG,
    )


# Serve


def _start_serve(config: GatewayConfig, count: int) -> None:
    import ray
    from ray import serve
    from ray.serve._private import constants

    if not constants.RAY_SERVE_ENABLE_HA_PROXY:
        raise InvalidInput(
            "gateway.ingress: serve needs "
            + " ".join(f"{name}={value}" for name, value in SERVE_ENV.items())
            + " in the environment before Ray is started; set it, or use `ingress: direct`"
        )
    if _serve_app(config.cluster) not in _serve_apps():
        _check_port_is_free(config.host, config.port)
    serve.start(
        proxy_location="HeadOnly" if config.host.startswith(_LOOPBACK) else "EveryNode",
        http_options={"host": config.host, "port": config.port},
    )
    limits = config.limits
    deployment = serve.deployment(
        name="gateway",
        num_replicas=count,
        # The app's own admission decides, and says so in OpenAI's words.
        max_ongoing_requests=limits.max_concurrent_requests + limits.max_queued_requests + 64,
        ray_actor_options={"num_cpus": 0, "runtime_env": {"env_vars": SERVE_ENV}},
        graceful_shutdown_timeout_s=20,
    )(serve.ingress()(_ServeReplica))
    try:
        serve.run(deployment.bind(config), name=_serve_app(config.cluster), route_prefix="/")
    except (RuntimeError, ray.exceptions.RayError) as error:
        raise StartFailed("gateway", str(error)) from error


class _ServeReplica:
    """Ray Serve makes the app of this in each replica."""

    def __init__(self, config: GatewayConfig) -> None:
        self._config = config

    def __serve_build_asgi_app__(self) -> Gateway:
        return _app(self._config)


def _stop_serve(cluster: str) -> None:
    from ray import serve

    if _serve_app(cluster) in _serve_apps():
        serve.delete(_serve_app(cluster))
        serve.shutdown()


def _serve_apps() -> list[str]:
    from ray import serve

    return list(serve.status().applications)


def _serve_app(cluster: str) -> str:
    return f"pdcluster-{cluster}"


# Both


def _app(config: GatewayConfig) -> Gateway:
    import ray

    # Serve gives its own loggers a handler, and ours none. Where the root has one, its level is
    # left to whoever gave it.
    logging.basicConfig(format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("cluster").setLevel(logging.INFO)
    replica = uuid.uuid4().hex
    return create_app(
        config,
        ControllerSource(config.cluster, replica),
        RayReleaser(config.cluster),
        # As workers are reached: loopback where Ray was started on loopback.
        ray.util.get_node_ip_address(),
        ControllerSink(config.cluster),
        replica,
    )


def _digest(config: GatewayConfig) -> str:
    return hashlib.sha256(pickle.dumps(config)).hexdigest()


def _listen(host: str, port: int, is_shared: bool) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if is_shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind((host, port))
        # A shared one listens when its server begins to: the kernel gives a part of the connections
        # to each that listens, and they would wait for a replica that is still starting.
        if not is_shared:
            listener.listen(_BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _check_port_is_free(host: str, port: int) -> None:
    """Raises: InvalidInput, naming who holds the port if that can be seen."""
    try:
        _listen(host, port, is_shared=False).close()
    except OSError as error:
        raise InvalidInput(
            f"gateway.port: {host}:{port} cannot be listened on ({os.strerror(error.errno or 0)}"
            f"{_holder(port)}); end that process or choose another port"
        ) from error


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            address = connection.laddr
            if connection.status != psutil.CONN_LISTEN or not address:
                continue
            if address.port == port:
                with contextlib.suppress(psutil.Error):
                    return f", held by {psutil.Process(connection.pid).name()} ({connection.pid})"
    return ""
