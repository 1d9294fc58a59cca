"""What would run: every worker's command, environment and host, before anything is started.

Needs neither Ray nor the model. Ports are examples: the real ones are reserved on the node at
each start. Secrets are masked. Called by: cli.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from cluster.engines import registry
from cluster.engines.base import HostFacts, LaunchContext, PortNeed
from cluster.engines.host import host_facts, platform_of
from cluster.identity import WorkerId
from cluster.launcher import local_ray
from cluster.models import cache, store
from cluster.settings import ClusterPaths
from cluster.topology.schema import ModelSpec, PoolSpec, Topology
from cluster.workers.ports import DEFAULT_WINDOW

MASK = "***"

# What stands for what is known on the node only.
_HOST, _HEAD, _INTERFACE = "NODE_IP", "HEAD_IP", "INTERFACE"


@dataclass(frozen=True, slots=True)
class Rendered:
    """One node of one replica."""

    worker: str  # pool/index
    pool: str
    node_rank: int
    role: str
    host: str  # an address, or what a node must have
    argv: tuple[str, ...]
    env: Mapping[str, str]  # what the engine gets beyond what its node has
    secret_files: Mapping[str, str]  # name in the worker's folder -> masked text
    origins: Mapping[str, str]  # as engines.base.Launch has them

    def shell(self) -> str:
        """As one would type it."""
        env = " ".join(f"{name}={shlex.quote(value)}" for name, value in self.env.items())
        return f"env {env} {shlex.join(self.argv)}" if env else shlex.join(self.argv)


def render(topology: Topology) -> tuple[Rendered, ...]:
    """In the order of the file. Raises: InvalidInput: an engine cannot run a pool as written."""
    next_port = DEFAULT_WINDOW.start
    rendered: list[Rendered] = []
    for pool in topology.serving.pools:
        needs = registry.adapter(pool.engine).ports(pool, topology.serving.island_of(pool.name))
        for index in range(pool.replicas.initial):
            head_ports: dict[str, int] = {}
            for rank in range(pool.nodes_per_replica):
                ports, next_port = _ports(needs, next_port)
                head_ports = head_ports or ports
                rendered.append(_render(topology, pool, index, rank, ports, head_ports))
    return tuple(rendered)


def _render(
    topology: Topology,
    pool: PoolSpec,
    index: int,
    rank: int,
    ports: Mapping[str, int],
    head_ports: Mapping[str, int],
) -> Rendered:
    adapter = registry.adapter(pool.engine)
    worker = WorkerId(pool.name, index, generation=1)
    is_local = local_ray.is_local(topology)
    model = topology.serving.model_of(pool.name)
    context = LaunchContext(
        worker=worker,
        role=pool.role,
        model=model,
        model_path=_model_path(model),
        pool=pool,
        island=topology.serving.island_of(pool.name),
        host=local_ray.LOOPBACK if is_local else _host(pool, rank),
        host_facts=_host_facts(pool, is_local),
        ports=ports,
        runtime_dir=str(ClusterPaths(topology.cluster_name).runtime / "w" / f"{pool.name}-{index}"),
        python=pool.interpreter or sys.executable,
        engine_key=MASK,
        node_rank=rank,
        head_host="" if rank == 0 else (local_ray.LOOPBACK if is_local else _HEAD),
        head_ports=head_ports,
        peers=topology.serving.peers_of(pool.name),
        interface="" if is_local else _INTERFACE,
    )
    launch = adapter.launch(context)
    return Rendered(
        worker=worker.name,
        pool=pool.name,
        node_rank=rank,
        role=pool.role.value,
        host=local_ray.LOOPBACK if is_local else _node(pool),
        argv=launch.argv,
        env={**launch.env, **dict.fromkeys(launch.secret_env, MASK)},
        secret_files=launch.secret_files,
        origins=launch.origins,
    )


def _host(pool: PoolSpec, rank: int) -> str:
    return _HEAD if rank == 0 and pool.nodes_per_replica > 1 else _HOST


def _ports(needs: tuple[PortNeed, ...], next_port: int) -> tuple[dict[str, int], int]:
    """Examples: ports of a window of their own begin where it begins, the others one after the
    other from `next_port`, whose next value comes back."""
    ports: dict[str, int] = {}
    in_window: dict[range, int] = {}
    for need in needs:
        if need.window is None:
            ports[need.name], next_port = next_port, next_port + need.span
        else:
            at = in_window.get(need.window, need.window.start)
            ports[need.name], in_window[need.window] = at, at + need.span
    return ports, next_port


def _model_path(model: ModelSpec) -> str:
    """Where the model will be: the same path as `up` finds, without making it."""
    if model.id in store.BUILTIN:
        return str(cache.models_dir() / f"{model.id}-{store.BUILTIN[model.id].REVISION}")
    place = Path(model.id).expanduser()
    return str(place.absolute()) if place.exists() else model.id


def _host_facts(pool: PoolSpec, is_local: bool) -> HostFacts:
    """This machine's; of another one only what the pool says of it is known."""
    here = host_facts()
    return replace(here, platform=platform_of(pool, here.platform if is_local else "cpu"))


def _node(pool: PoolSpec) -> str:
    resources = ", ".join(
        f"{name}: {amount:g}" for name, amount in pool.placement.resources.items()
    )
    labels = ", ".join(f"{key}={value}" for key, value in pool.placement.labels.items())
    return f"a node with {resources}" + (f" and {labels}" if labels else "")
