"""Bring a cluster up. In: a topology file. Out: a cluster that answers, or nothing at all.

    validate ─ model ─ ports, secrets ─ Ray ─ controller ─ workers ─ gateway ─ ready
    └────── nothing started yet ─────┘ └── from here on, a failure or Ctrl-C ends all of it ──┘

A cluster that is up already is given what differs, if that is the pools' `replicas` or who scrapes
its metrics. Without waiting (`--no-wait`, on the head of a rack), `up` returns when the control API
and the endpoint answer; workers come as their nodes join.

The state file is written before the first process is started, so that also a killed `up` can be
cleaned up after. Called by: cli, launcher.demo.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from cluster.control.state import DesiredState
from cluster.control.store import ApiAccess
from cluster.engines.host import host_facts
from cluster.errors import ClusterError, PeerGone, TopologyError
from cluster.gateway.config import GatewayConfig
from cluster.launcher import (
    down,
    joined_ray,
    keys,
    listen,
    local_ray,
    plan,
    prometheus,
    remains,
    running,
    supervised,
)
from cluster.launcher.await_ready import await_control, await_endpoint, await_workers
from cluster.launcher.progress import Watcher
from cluster.launcher.running import Running
from cluster.launcher.validate import validate
from cluster.models import store
from cluster.settings import ClusterPaths
from cluster.topology import loader
from cluster.topology.findings import SERVING, dotted
from cluster.topology.schema import ControlSpec, Topology


class Terminated(KeyboardInterrupt):
    """SIGTERM: as Ctrl-C."""


@dataclass(frozen=True, slots=True)
class Up:
    """A cluster that is up. `was_up`: it ran before; `changed`: the pools it was given other
    `replicas` for."""

    running: Running
    was_up: bool
    took_s: float
    changed: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class _Wanted:
    """What one `up` is to reach, all that is known before anything is started."""

    topology: Topology
    path: Path
    paths: ClusterPaths
    desired: DesiredState
    ray_address: str  # "": a Ray of its own
    waits: bool

    @property
    def is_local(self) -> bool:
        return not self.ray_address


@dataclass(frozen=True, slots=True)
class _Secrets:
    key_hashes: tuple[bytes, ...] | None
    engine_key: str
    api: ApiAccess


def up(
    path: Path,
    watcher: Watcher,
    *,
    address: str | None = None,
    keep: bool = False,
    waits: bool = True,
) -> Up:
    """Start what the file says and return when the endpoint answers requests; with `waits` False,
    when the control API and the endpoint answer at all.

    `address`: a Ray cluster that runs already. `keep`: after a failure leave all as it is, to be
    looked at; `down` ends it.

    Raises: TopologyError, InvalidInput: nothing was started. Busy: another `up` is at work.
        StartFailed, ClusterError: all that was started has been ended again; a cluster that was up
        before stays.
    Cancel: KeyboardInterrupt (also on SIGTERM) ends all that was started, then goes on up."""
    begun_s = time.monotonic()
    watcher.stage("validate")
    topology = _load(path)
    paths = ClusterPaths(topology.cluster_name)
    ray_address = ""
    if address is None and local_ray.is_local(topology):
        local_ray.prepare_environment(paths)
        validate(path)
    else:
        ray_address = address or joined_ray.address_here(topology, path)
        joined_ray.prepare_environment(ray_address)
        _validate_accepted(path)
    with running.lock(paths), _sigterm_interrupts():
        found = running.read(paths)
        if found is not None and _is_as_before(found, topology, ray_address):
            found = _observe_again(topology, paths, found, watcher)
            return Up(found, True, time.monotonic() - begun_s)
        watcher.stage("model")
        model = store.resolve(topology.serving.model, watcher.note)
        host = "" if ray_address else local_ray.LOOPBACK
        desired = plan.desired_state(topology, model, host, host_facts())
        wanted = _Wanted(topology, path, paths, desired, ray_address, waits)
        runs = _where_it_may_run(found, wanted)
        if runs is not None:
            changed = _change(runs, wanted, watcher)
            if changed is not None:
                state, pools = changed
                return Up(state, True, time.monotonic() - begun_s, pools)
        remains.sweep(paths)
        if address is None:
            listen.check(topology, path)
        state = _starting(wanted)
        secrets = _secrets(wanted, watcher)
        try:
            running.write(paths, state)
            state = _start(wanted, state, secrets, watcher)
        except BaseException as error:
            if not keep:
                _clean_up(paths, watcher, error)
            raise
        return Up(state, False, time.monotonic() - begun_s)


def _start(wanted: _Wanted, state: Running, secrets: _Secrets, watcher: Watcher) -> Running:
    # These import Ray, whose environment must be ready by then (prepare_environment).
    from cluster.control import actor as controller
    from cluster.gateway import hosting

    serve_env = hosting.SERVE_ENV if state.ingress == "serve" else {}
    # Here too: Serve reads them in whichever process starts it, when it is first imported.
    os.environ.update(serve_env)
    watcher.stage("Ray")
    if wanted.is_local:
        head = local_ray.start_head(wanted.paths, wanted.topology.serving, serve_env)
        state = state.model_copy(update={"ray_address": head.address, "own_ray": head.own})
        running.write(wanted.paths, state)
        head.wait_until_up()
    with local_ray.connected(state) as context, _sigterm_interrupts():
        if serve_env and not wanted.is_local:
            joined_ray.refuse_without(serve_env)
        state = state.model_copy(update={"ray_address": context.address_info["gcs_address"]})
        watcher.stage("controller")
        client = controller.start(wanted.desired.cluster, secrets.engine_key, secrets.api)
        client.apply(wanted.desired)
        await_control(client)
        state = prometheus.as_wanted(wanted.topology, wanted.paths, state, secrets.api, watcher)
        if wanted.waits:
            watcher.stage("workers")
            await_workers(client, wanted.topology.serving, wanted.is_local, watcher)
        _start_gateway(wanted, secrets, watcher)
    return _finish(wanted, state, watcher)


def _change(
    state: Running, wanted: _Wanted, watcher: Watcher
) -> tuple[Running, tuple[str, ...]] | None:
    """Give a cluster that is up what differs. None: it is not up after all.

    Raises: ClusterError: something differs that takes a new start."""
    with local_ray.connected(state), _sigterm_interrupts():
        from cluster.control import actor as controller
        from cluster.gateway import hosting

        client = controller.find(state.cluster)
        before = client.desired() if client is not None else None
        if client is None:
            return None
        if before is None:  # an `up` that was killed had come no further
            controller.end(state.cluster)
            return None
        _refuse_restart(before, wanted)
        if state.ingress == "serve":
            os.environ.update(hosting.SERVE_ENV)
        watcher.stage("controller")
        secrets = _secrets(wanted, watcher)
        serving = wanted.topology.serving
        failed_before = frozenset(slot.worker for slot in client.status().failed)
        client = controller.start(state.cluster, secrets.engine_key, secrets.api)
        client.apply(wanted.desired)
        await_control(client)
        if serving.observability != before.serving.observability:
            state = prometheus.without(state, wanted.paths)
        state = prometheus.as_wanted(wanted.topology, wanted.paths, state, secrets.api, watcher)
        if wanted.waits:
            watcher.stage("workers")
            await_workers(client, serving, wanted.is_local, watcher, failed_before)
        _start_gateway(wanted, secrets, watcher)
    done = _starting(wanted).model_copy(
        update={
            "ray_address": state.ray_address,
            "own_ray": state.own_ray,
            "own_prometheus": state.own_prometheus,
            "prometheus_url": state.prometheus_url,
            "started_at_s": state.started_at_s,
        }
    )
    changed = tuple(
        pool.name
        for pool in wanted.desired.serving.pools
        if pool.replicas != before.serving.pool(pool.name).replicas
    )
    return _finish(wanted, done, watcher), changed


def _refuse_restart(before: DesiredState, wanted: _Wanted) -> None:
    keys_ = plan.needs_restart(before, wanted.desired)
    if keys_:
        name, path = wanted.paths.cluster, wanted.path
        raise ClusterError(
            f"cluster {name} is up, and {path} says otherwise in what a running cluster cannot be "
            f"given by `up`: {', '.join(keys_)}; `pdcluster apply {path}` shows what can be "
            f"changed while it serves, and does it; else first `pdcluster down --cluster {name}`, "
            f"then `pdcluster up {path}`"
        )


def _observe_again(
    topology: Topology, paths: ClusterPaths, state: Running, watcher: Watcher
) -> Running:
    """A Prometheus that has died is started anew, in a cluster where nothing else is to be done."""
    if state.own_prometheus is None or supervised.is_running(state.own_prometheus):
        return state
    access = _access(topology.serving.control, paths, watcher)
    return prometheus.as_wanted(topology, paths, state, access, watcher)


def _start_gateway(wanted: _Wanted, secrets: _Secrets, watcher: Watcher) -> None:
    from cluster.gateway import hosting

    watcher.stage("gateway")
    serving = wanted.topology.serving
    config = GatewayConfig.of(
        wanted.desired.cluster,
        serving,
        wanted.desired.model_path,
        secrets.key_hashes,
        secrets.engine_key,
    )
    hosting.start(config, serving.gateway.replicas, serving.gateway.ingress)


def _finish(wanted: _Wanted, state: Running, watcher: Watcher) -> Running:
    watcher.stage("ready")
    await_endpoint(state, wanted.waits)
    state = state.model_copy(update={"phase": "up"})
    running.write(wanted.paths, state)
    return state


def _load(path: Path) -> Topology:
    """Our half, before Ray is imported: what Ray must find in the environment depends on it."""
    try:
        return loader.load(path)
    except TopologyError:
        validate(path)  # tells the faults of Ray's half, too
        raise


def _validate_accepted(path: Path) -> None:
    """As `validate`, of a file whose nodes Ray has started already: it may be what Ray has made of
    the file on the head (~/ray_bootstrap_config.yaml), and Ray's half is not for us to judge.

    Raises: TopologyError."""
    try:
        validate(path)
    except TopologyError as error:
        ours = tuple(fault for fault in error.faults if fault.key.startswith(dotted(SERVING)))
        if ours:
            raise TopologyError(ours) from None


def _is_as_before(found: Running, topology: Topology, ray_address: str) -> bool:
    """Whether nothing is to be done, as far as this can be told without asking the cluster. On a
    Ray of others it cannot: that may have been started anew since."""
    is_own = not ray_address and found.own_ray is not None
    is_up = is_own and found.phase == "up" and found.is_alive()
    return is_up and found.topology_digest == running.digest(topology)


def _where_it_may_run(found: Running | None, wanted: _Wanted) -> Running | None:
    """Where to ask whether the cluster is up; None: nowhere."""
    if wanted.is_local:
        is_up = found is not None and found.phase == "up" and found.is_alive()
        return found if is_up else None
    if found is not None and found.own_ray is None:
        return found.model_copy(update={"ray_address": wanted.ray_address})
    return _starting(wanted)


def _starting(wanted: _Wanted) -> Running:
    topology, paths = wanted.topology, wanted.paths
    gateway, control = topology.serving.gateway, topology.serving.control
    key_file = keys.api_key_file(gateway.auth, paths) if gateway.auth is not None else None
    token_file = keys.token_file(control, paths)
    # What Ray knows the head by; a home folder that hosts share is read on the others, too.
    head = wanted.ray_address.rpartition(":")[0] or local_ray.LOOPBACK
    return Running(
        cluster=topology.cluster_name,
        phase="starting",
        topology_file=str(Path(topology.path).absolute()),
        topology_digest=running.digest(topology),
        started_at_s=time.time(),
        model=topology.serving.model.public_name,
        endpoint=plan.url(gateway.host, gateway.port, head),
        key_file=str(key_file) if key_file is not None else None,
        key_env=gateway.auth.keys_env if gateway.auth is not None else None,
        control_url=plan.url(control.host, control.port, head),
        token_file=str(token_file) if token_file is not None else None,
        token_env=control.token_env,
        ingress=gateway.ingress,
        ray_address=wanted.ray_address,
    )


def _secrets(wanted: _Wanted, watcher: Watcher) -> _Secrets:
    """All that the cluster needs; those that are made are kept. Raises: InvalidInput."""
    serving, paths = wanted.topology.serving, wanted.paths
    return _Secrets(
        key_hashes=keys.endpoint_hashes(serving.gateway.auth, paths, watcher.warn),
        engine_key=keys.kept_secret(paths.engine_key),
        api=_access(serving.control, paths, watcher),
    )


def _access(control: ControlSpec, paths: ClusterPaths, watcher: Watcher) -> ApiAccess:
    token = keys.control_token(control, paths, watcher.warn)
    return ApiAccess(control.host, control.port, token)


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
