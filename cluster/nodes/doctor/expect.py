"""What a topology asks of each of its hosts. Pure.

    Topology ─▶ Survey ─┬ HostPlan per host: who may run there, which ports, which model, how Ray's
                        │ Python is started
                        └ pairs of hosts between which KV blocks or control will travel

A pool may run on every host whose node type takes it, so every such host must be fit for it.
Called by: nodes.doctor.examine, cli.doctor.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from cluster.errors import InvalidInput
from cluster.nodes.config import Access, Hosts, uses_bare_hosts
from cluster.nodes.doctor.needs import ModelNeed, Needs, models_of, needs_of
from cluster.nodes.ssh import Host
from cluster.topology.agreement import NodeType
from cluster.topology.schema import PoolSpec, ServingSpec, Topology

LOOPBACK = "127.0.0.1"
_GCS_PORT = 6379
_PORT_FLAG = re.compile(r"--((?:[\w-]+-)?port)[ =](\d+)")
# Serve's HAProxy opens both beside the gateway's port (docs/api.md).
_HAPROXY_PORTS = {8404: "Serve's HAProxy, statistics", 9101: "Serve's HAProxy, metrics"}
# How Ray is started on a host; what stands before it (`ulimit`, `source venv`) counts for us, too.
_START = re.compile(
    r"(?P<before>.*?)(?P<python>\S+) -m cluster\.nodes\.start\b|(?P<bare>.*?)\bray start\b"
)
_STATED_AT_START = re.compile(r"--(resources|labels)\b")
_STORE_FLAG = re.compile(r"--object-store-memory[ =](\d+)")
_SHARED_IPC = re.compile(r"--ipc[ =]host")


@dataclass(frozen=True, slots=True)
class PortPlan:
    """A port that somebody will bind on a host: `address` as it will be bound."""

    port: int
    address: str
    who: str


@dataclass(frozen=True, slots=True)
class Container:
    """Ray's `docker` section as it holds for one host: Ray and the engines run inside."""

    image: str
    name: str
    command: str = "docker"
    is_ipc_shared: bool = False


@dataclass(frozen=True, slots=True)
class HostPlan:
    """One host. `access` is None for the machine that the doctor itself runs on.

    `before`, `python`: how Ray's Python is started there. `object_store_bytes`: as told to Ray;
    None: Ray decides."""

    address: str
    node_type: str
    access: Host | None
    is_head: bool = False
    resources: Mapping[str, float] = field(default_factory=dict)
    pools: tuple[PoolSpec, ...] = ()
    needs: Needs = field(default_factory=Needs)
    models: tuple[ModelNeed, ...] = ()
    ports: tuple[PortPlan, ...] = ()
    before: str = ""
    python: str = "python3"
    object_store_bytes: int | None = None
    container: Container | None = None
    commands: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Survey:
    """All hosts to look at. `pairs`: (from, to) addresses, `to` being the one that listens."""

    cluster: str
    serving: ServingSpec
    hosts: tuple[HostPlan, ...]
    pairs: tuple[tuple[str, str], ...] = ()

    @property
    def head(self) -> str:
        return next((plan.address for plan in self.hosts if plan.is_head), "")

    def only(self, addresses: list[str]) -> Survey:
        """Of these hosts only. Raises: InvalidInput: one is no host of the file."""
        known = {plan.address for plan in self.hosts}
        for address in addresses:
            if address not in known:
                raise InvalidInput(
                    f"--host: found {address}; the file has {', '.join(sorted(known))}"
                )
        return Survey(
            self.cluster,
            self.serving,
            tuple(plan for plan in self.hosts if plan.address in addresses),
            tuple(pair for pair in self.pairs if set(pair) <= set(addresses)),
        )


def survey(topology: Topology, *, is_this_machine: bool) -> Survey:
    """`is_this_machine`: the file describes the machine that this runs on, and no other.

    Raises: InvalidInput: the file lists no hosts; its provider makes them."""
    config, serving = topology.ray, topology.serving
    if is_this_machine:
        types = {"": NodeType("", most_workers=0, is_head=True, open_ended=True)}
        places: list[tuple[str, str, Host | None]] = [(LOOPBACK, "", None)]
    elif uses_bare_hosts(config):
        types, places = _bare(config)
    elif config.get("provider", {}).get("type") == "local" and "head_ip" in config["provider"]:
        types, places = _local(config)
    else:
        raise InvalidInput(
            f"{topology.path}: provider {config.get('provider', {}).get('type')} makes its own "
            "hosts; doctor looks at hosts that a file lists (cluster.nodes.BareHostProvider, local)"
        )
    hosts = tuple(_plan(topology, types[name], address, access) for address, name, access in places)
    return Survey(topology.cluster_name, serving, hosts, tuple(_pairs(serving, hosts)))


def _bare(
    config: Mapping[str, Any],
) -> tuple[dict[str, NodeType], list[tuple[str, str, Host | None]]]:
    entries = config["available_node_types"]
    # Ray takes the only type for the head's if none is named.
    hosts = Hosts.of({"head_node_type": next(iter(entries)), **config})
    commands = [
        *config.get("head_start_ray_commands", []),
        *config.get("worker_start_ray_commands", []),
    ]
    types = {
        name: NodeType(
            name,
            most_workers=len(hosts.types[name].hosts),
            is_head=name == hosts.head_type,
            resources=entry.get("resources", {}),
            labels=entry.get("labels", {}),
            open_ended=any(map(_STATED_AT_START.search, commands)),
        )
        for name, entry in entries.items()
    }
    places: list[tuple[str, str, Host | None]] = [
        (address, name, hosts.host(address))
        for name, entry in hosts.types.items()
        for address in entry.hosts
    ]
    return types, sorted(places, key=lambda place: place[0] != hosts.head)


def _local(
    config: Mapping[str, Any],
) -> tuple[dict[str, NodeType], list[tuple[str, str, Host | None]]]:
    provider, access = config["provider"], Access.of(config["auth"])
    workers = [str(ip) for ip in provider.get("worker_ips") or []]
    addresses = [str(provider["head_ip"]), *workers]
    types = {
        "head": NodeType("head", most_workers=0, is_head=True, open_ended=True),
        "workers": NodeType("workers", most_workers=len(workers), open_ended=True),
    }
    return types, [
        (
            address,
            "workers" if index else "head",
            Host(
                address,
                user=access.ssh_user,
                key=access.ssh_private_key,
                proxy_command=access.ssh_proxy_command,
            ),
        )
        for index, address in enumerate(addresses)
    ]


def _plan(topology: Topology, kind: NodeType, address: str, access: Host | None) -> HostPlan:
    config, serving = topology.ray, topology.serving
    pools = tuple(pool for pool in serving.pools if _may_run(pool, kind))
    is_here = access is None
    start = "" if is_here else _start_command(config, kind.is_head)
    before, python = _interpreter(start)
    container = None if is_here else _container(config, kind)
    store = _STORE_FLAG.search(start)
    return HostPlan(
        address=address,
        node_type=kind.name,
        access=access,
        is_head=kind.is_head,
        resources=kind.resources,
        pools=pools,
        needs=needs_of(serving, pools),
        models=models_of(serving, pools),
        ports=tuple(_ports(serving, kind, address, start, is_here)),
        before=before,
        python=python,
        object_store_bytes=int(store[1]) if store else None,
        container=container,
        commands=tuple(_commands(kind, container, is_here)),
    )


def _may_run(pool: PoolSpec, kind: NodeType) -> bool:
    """Whether Ray may place a node of one of the pool's replicas there."""
    takes = (
        (known := kind.amount(name)) is None or known >= amount
        for name, amount in pool.placement.resources.items()
    )
    labels = pool.placement.labels.items()
    return all(kind.may_match(key, selector) for key, selector in labels) and all(takes)


def _start_command(config: Mapping[str, Any], is_head: bool) -> str:
    key = "head_start_ray_commands" if is_head else "worker_start_ray_commands"
    commands = [text for text in config.get(key, []) if isinstance(text, str)]
    return next((text for text in commands if _START.search(text)), "")


def _interpreter(start: str) -> tuple[str, str]:
    """(what the shell does first, the Python that runs Ray) by a start command."""
    match = _START.search(start)
    if match is None:
        return "", "python3"
    if match["python"] is not None:
        return match["before"], match["python"]
    return match["bare"], "python3"


def _container(config: Mapping[str, Any], kind: NodeType) -> Container | None:
    docker = {**config.get("docker", {})}
    own = config.get("available_node_types", {}).get(kind.name, {}).get("docker", {})
    docker.update(own)
    name = docker.get("container_name")
    side = "head" if kind.is_head else "worker"
    image = docker.get(f"{side}_image") or docker.get("image")
    if not name or not image:
        return None
    options = [*docker.get("run_options", []), *docker.get(f"{side}_run_options", [])]
    return Container(
        image=str(image),
        name=str(name),
        command="podman" if docker.get("use_podman") else "docker",
        is_ipc_shared=any(_SHARED_IPC.search(str(option)) for option in options),
    )


def _commands(kind: NodeType, container: Container | None, is_here: bool) -> Iterator[str]:
    """Programs that Ray or the provider call on the host itself."""
    if is_here:
        return
    yield "rsync"
    if kind.is_head:
        yield "flock"
        if container is None:
            yield "ssh"
    if container is not None:
        yield container.command


def _ports(
    serving: ServingSpec, kind: NodeType, address: str, start: str, is_here: bool
) -> Iterator[PortPlan]:
    if kind.is_head:
        gateway, control = serving.gateway, serving.control
        yield PortPlan(gateway.port, gateway.host, "gateway.port")
        yield PortPlan(control.port, control.host, "control.port")
        if gateway.ingress == "serve":
            for port, who in _HAPROXY_PORTS.items():
                yield PortPlan(port, "0.0.0.0", who)
    if is_here:
        return  # `pdcluster up` reserves Ray's ports anew each time
    stated = {flag: int(port) for flag, port in _PORT_FLAG.findall(start)}
    if kind.is_head:
        stated = {"port": _GCS_PORT, **stated}
    for flag, port in stated.items():
        yield PortPlan(port, address, f"Ray's --{flag}")


def _pairs(serving: ServingSpec, hosts: tuple[HostPlan, ...]) -> Iterator[tuple[str, str]]:
    """KV travels either way between linked pools (one side asks, bytes flow back over connections
    that either may open); the gateway and the controller on the head talk to every worker's host,
    and every host's Ray to the head."""
    pairs: set[tuple[str, str]] = set()
    linked = set(serving.pairs())
    for one in hosts:
        for other in hosts:
            is_linked = any(
                (a.name, b.name) in linked or (b.name, a.name) in linked
                for a in one.pools
                for b in other.pools
            )
            if one.address != other.address and (is_linked or one.is_head or other.is_head):
                pairs.add((one.address, other.address))
    yield from sorted(pairs)
