"""Bring a cluster up. In: a topology file. Out: a cluster that answers, or nothing at all.

    validate ─ model ─ ports, keys ─ Ray ─ controller ─ workers ─ gateway ─ ready
    └──── nothing started yet ────┘ └── from here on, a failure or Ctrl-C ends all of it ──┘

The state file is written before the first process is started, so that also a killed `up` can be
cleaned up after. Called by: cli, launcher.demo.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import psutil

from cluster.control.state import ClusterStatus, DesiredState
from cluster.engines.host import host_facts
from cluster.errors import ClusterError, Fault, PeerGone, StartFailed, TopologyError
from cluster.gateway.config import GatewayConfig
from cluster.identity import WorkerState
from cluster.launcher import down, keys, local_ray, plan, remains, running
from cluster.launcher.endpoint import Endpoint
from cluster.launcher.progress import Watcher
from cluster.launcher.running import Running
from cluster.launcher.validate import validate
from cluster.models import store
from cluster.settings import ClusterPaths
from cluster.topology import loader, source
from cluster.topology.schema import Topology

if TYPE_CHECKING:
    from cluster.control.actor import ControllerClient

_POLL_S = 0.25
_READY_BOUND_S = 60.0
# On one machine nothing will come that a worker could still wait for.
_LOCAL_PLACEMENT_BOUND_S = 60.0


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Up:
    """A cluster that is up."""

    running: Running
    was_up: bool  # it ran already, nothing was done
    took_s: float


def up(path: Path, watcher: Watcher, *, address: str | None = None, keep: bool = False) -> Up:
    """Start what the file says and return when the endpoint answers.

    `address`: a Ray cluster that runs already. `keep`: after a failure leave all as it is, to be
    looked at; `down` ends it.

    Raises: TopologyError, InvalidInput: nothing was started. Busy: another `up` is at work.
        StartFailed, ClusterError: all that was started has been ended again.
    Cancel: KeyboardInterrupt (also on SIGTERM) ends all that was started, then goes on up."""
    begun_s = time.monotonic()
    watcher.stage("validate")
    topology = _load(path)
    paths = ClusterPaths(topology.cluster_name)
    if address is None and local_ray.is_local(topology):
        local_ray.prepare_environment(paths)
    validate(path)
    with running.lock(paths), _sigterm_interrupts():
        found = _running_already(paths, topology, path)
        if found is not None:
            return Up(found, True, time.monotonic() - begun_s)
        remains.sweep(paths)
        watcher.stage("model")
        model = store.resolve(topology.serving.model, watcher.note)
        is_local = address is None and local_ray.is_local(topology)
        ray_address = None if is_local else address or _ray_here(topology, path)
        _check_port(topology, path)
        hashes = keys.endpoint_hashes(topology.serving.gateway.auth, paths, watcher.warn)
        host = local_ray.LOOPBACK if is_local else ""
        desired = plan.desired_state(topology, model, host, host_facts())
        state = _starting(topology, paths, ray_address or "")
        try:
            running.write(paths, state)
            state = _start(paths, topology, desired, state, hashes, watcher)
        except BaseException as error:
            if not keep:
                _clean_up(paths, watcher, error)
            raise
        return Up(state, False, time.monotonic() - begun_s)


def _start(
    paths: ClusterPaths,
    topology: Topology,
    desired: DesiredState,
    state: Running,
    hashes: tuple[bytes, ...] | None,
    watcher: Watcher,
) -> Running:
    # These import Ray, whose environment must be ready by then (local_ray.prepare_environment).
    from cluster.control import actor as controller
    from cluster.gateway import hosting

    gateway = topology.serving.gateway
    engine_key = keys.kept_secret(paths.engine_key)
    watcher.stage("Ray")
    if not state.ray_address:
        extra = hosting.SERVE_ENV if gateway.ingress == "serve" else {}
        # Here too: Serve reads them in whichever process starts it, when it is first imported.
        os.environ.update(extra)
        head = local_ray.start_head(paths, topology.serving, extra)
        state = state.model_copy(update={"ray_address": head.address, "own_ray": head.own})
        running.write(paths, state)
        head.wait_until_up()
    with local_ray.connected(state) as context, _sigterm_interrupts():
        state = state.model_copy(update={"ray_address": context.address_info["gcs_address"]})
        watcher.stage("controller")
        client = controller.start(desired.cluster, engine_key)
        client.apply(desired)
        watcher.stage("workers")
        _await_workers(client, topology, state.own_ray is not None, watcher)
        watcher.stage("gateway")
        config = GatewayConfig.of(
            desired.cluster, topology.serving, desired.model_path, hashes, engine_key
        )
        hosting.start(config, gateway.replicas, gateway.ingress)
    watcher.stage("ready")
    _await_endpoint(state)
    state = state.model_copy(update={"phase": "up"})
    running.write(paths, state)
    return state


def _load(path: Path) -> Topology:
    """Our half, before Ray is imported: what Ray must find in the environment depends on it."""
    try:
        return loader.load(path)
    except TopologyError:
        validate(path)  # tells the faults of Ray's half, too
        raise


def _running_already(paths: ClusterPaths, topology: Topology, path: Path) -> Running | None:
    """The cluster, if it is up as the file says. Raises: ClusterError: it is up otherwise."""
    found = running.read(paths)
    if found is None or found.phase != "up" or not _is_up(found):
        return None
    if found.topology_digest == running.digest(topology):
        return found
    raise ClusterError(
        f"cluster {found.cluster} is up from {found.topology_file}, and {path} says something "
        f"else; first `pdcluster down --cluster {found.cluster}`, then `pdcluster up {path}`"
    )


def _is_up(found: Running) -> bool:
    """Whether the cluster of the state file still is. A Ray of others is asked."""
    if found.own_ray is not None or not found.is_alive():
        return found.is_alive()
    try:
        with local_ray.connected(found):
            from cluster.control import actor as controller

            return controller.find(found.cluster) is not None
    except ClusterError:
        return False


def _starting(topology: Topology, paths: ClusterPaths, ray_address: str) -> Running:
    gateway = topology.serving.gateway
    auth = gateway.auth
    key_file = None
    if auth is not None and auth.keys_env is None:
        key_file = str((auth.keys_file or paths.api_key).absolute())
    return Running(
        cluster=topology.cluster_name,
        phase="starting",
        topology_file=str(Path(topology.path).absolute()),
        topology_digest=running.digest(topology),
        started_at_s=time.time(),
        model=topology.serving.model.public_name,
        endpoint=plan.endpoint_url(topology),
        key_file=key_file,
        key_env=auth.keys_env if auth is not None else None,
        ingress=gateway.ingress,
        ray_address=ray_address,
    )


def _ray_here(topology: Topology, path: Path) -> str:
    """The address of the Ray cluster that this machine is the head of. Raises: ClusterError."""
    from ray._private.utils import read_ray_address

    found = os.environ.get("RAY_ADDRESS") or read_ray_address()
    if found:
        return str(found)
    kind = (topology.ray.get("provider") or {}).get("type")
    raise ClusterError(
        f"{path} describes nodes beyond this machine (provider.type: {kind}), and no Ray runs "
        f"here; run `ray up {path}`: Ray starts the nodes, and on the head, where Ray then runs, "
        f"`pdcluster up {path}` brings the serving up (put it into head_start_ray_commands, or "
        f"run it there with `ray exec {path} 'pdcluster up FILE'`)"
    )


def _check_port(topology: Topology, path: Path) -> None:
    """Raises: TopologyError: the endpoint's port is taken."""
    gateway = topology.serving.gateway
    family = socket.AF_INET6 if ":" in gateway.host else socket.AF_INET
    with contextlib.closing(socket.socket(family, socket.SOCK_STREAM)) as probe:
        # As the gateway itself: connections that linger after a `down` are not in the way.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((gateway.host, gateway.port))
            probe.listen(1)
            return
        except OSError as error:
            key = ("metadata", "serving", "gateway", "port")
            holder = _holder(gateway.port)
            raise TopologyError(
                (
                    Fault(
                        file=str(path),
                        line=source.read(path).line(key),
                        key=".".join(key),
                        found=f"{gateway.host}:{gateway.port} cannot be listened on "
                        f"({(error.strerror or str(error)).lower()}{holder})",
                        fix="end what listens there, or write another port",
                    ),
                )
            ) from error


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:] == (port,):
                if connection.pid is None:
                    return ", held by another user's process"
                with contextlib.suppress(psutil.Error):
                    name = psutil.Process(connection.pid).name()
                    return f", held by {name}, pid {connection.pid}"
    return ""


def _await_workers(
    client: ControllerClient, topology: Topology, is_local: bool, watcher: Watcher
) -> None:
    """Raises: StartFailed: a worker failed, or cannot be placed."""
    wanted = sum(pool.replicas.initial for pool in topology.serving.pools)
    longest_s = max(pool.start_timeout_s for pool in topology.serving.pools)
    place_until_s = time.monotonic() + (_LOCAL_PLACEMENT_BOUND_S if is_local else longest_s)
    while True:
        status = client.status()
        for report in status.workers:
            watcher.worker(report)
        for failed in status.failed:
            raise StartFailed(failed.worker, failed.why, failed.last_words)
        ready = sum(report.state is WorkerState.READY for report in status.workers)
        if ready == wanted:
            return
        if time.monotonic() > place_until_s:
            _refuse_unplaced(status)
        time.sleep(_POLL_S)


def _refuse_unplaced(status: ClusterStatus) -> None:
    for report in status.workers:
        if report.state is WorkerState.STARTING and not report.node_ip:
            why = f"it is not placed: {report.message or 'Ray says nothing of why'}"
            raise StartFailed(report.id.name, why)


def _await_endpoint(state: Running) -> None:
    endpoint = Endpoint(state.endpoint, keys.first_key(state.key_file, state.key_env))
    deadline_s = time.monotonic() + _READY_BOUND_S
    while why := endpoint.why_not_ready():
        if time.monotonic() > deadline_s:
            raise StartFailed("gateway", f"not ready after {_READY_BOUND_S:g} s: {why}")
        time.sleep(0.05)


def _clean_up(paths: ClusterPaths, watcher: Watcher, error: BaseException) -> None:
    """End what was started. A second Ctrl-C meanwhile is not heard: this takes seconds."""
    watcher.stage("cleaning up")
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        down.end(paths, 0.0, watcher, is_hasty=True)
    except (ClusterError, PeerGone) as further:
        error.add_note(f"cleaning up met: {further}")
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def _sigterm_interrupts() -> Iterator[None]:
    """SIGTERM ends `up` as Ctrl-C does. Ray sets a handler of its own when it connects."""

    def interrupt(_number: int, _frame: FrameType | None) -> None:
        raise Terminated

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
