"""Which host gets which node, and what a changed file means for nodes that run. Pure.

    choose ─ hosts for new nodes: free ones, those that answer first
    change ─ State and a new file ─ nodes that go, each with the reason

Called by: nodes.on_head, nodes.head.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from cluster.errors import ClusterError
from cluster.nodes.config import Hosts
from cluster.nodes.state import Node, State


class TooFewHosts(ClusterError):
    """Ray asks for more nodes of a type than there are free hosts."""


@dataclass(frozen=True, slots=True)
class Leaving:
    """A node that must end, and why."""

    node_id: str
    host: str
    why: str


def node_id(host: str, launched_at_ms: int) -> str:
    """Ray's autoscaler never takes back a node under an id that it has ended: a host that is used
    again needs a new one."""
    return f"{host}_{launched_at_ms}"


def address_of(node: str) -> str:
    """The host of a node id. The head's id is its bare address."""
    return node.partition("_")[0]


def choose(
    hosts: Sequence[str], taken: Collection[str], silent: Collection[str], count: int
) -> tuple[str, ...]:
    """`count` hosts that are not taken, in the file's order, those that do not answer last: one of
    them is better than none, Ray tries it until it answers.

    Raises: TooFewHosts."""
    free = [host for host in hosts if host not in taken]
    if len(free) < count:
        used = ", ".join(host for host in hosts if host in taken) or "none"
        raise TooFewHosts(f"Ray asks for {count} more of {len(hosts)} hosts; in use: {used}")
    return tuple(sorted(free, key=lambda host: host in silent)[:count])


def with_new(
    state: State,
    node_type: str,
    tags: Mapping[str, str],
    hosts: Sequence[str],
    launched_at_ms: int,
) -> State:
    """The state with one more node of this type on each of `hosts`."""
    nodes = dict(state.nodes)
    for host in hosts:
        start = state.starts.get(node_type, "")
        nodes[node_id(host, launched_at_ms)] = Node(
            host=host, node_type=node_type, tags=dict(tags), start=start
        )
    return state.model_copy(update={"nodes": nodes})


def change(
    state: State, hosts: Hosts, starts: Mapping[str, str], *, is_new_head: bool
) -> tuple[Leaving, ...]:
    """Worker nodes that cannot stay when `hosts` and `starts` hold. `is_new_head`: Ray on the head
    begins anew, and no node of the former one can join it."""
    leaving = []
    for name, node in state.nodes.items():
        if node.is_head:
            continue
        entry = hosts.types.get(node.node_type)
        if entry is None or node.host not in entry.hosts or node.node_type == hosts.head_type:
            where = f"is no host of {node.node_type} any more"
        elif node.start != starts.get(node.node_type, ""):
            where = f"is started in another way now (node type {node.node_type})"
        elif is_new_head:
            where = "belongs to the head's former Ray"
        else:
            continue
        leaving.append(Leaving(name, node.host, where))
    return tuple(leaving)


def start_digests(config: Mapping[str, Any]) -> dict[str, str]:
    """Per node type, a digest of all that decides how Ray starts on its hosts: a node stays as
    long as this stays the same."""
    said = {}
    for name, entry in config["available_node_types"].items():
        own = {
            "resources": entry.get("resources", {}),
            "labels": entry.get("labels", {}),
            "user": entry["node_config"].get("ssh_user"),
            "docker": [config.get("docker", {}), entry.get("docker", {})],
            "start": config.get("worker_start_ray_commands", []),
            "file_mounts": sorted(config.get("file_mounts", {})),
        }
        for key in ("worker_setup_commands", "initialization_commands"):
            own[key] = entry.get(key, config.get(key, []))
        said[name] = hashlib.sha256(json.dumps(own, sort_keys=True).encode()).hexdigest()[:16]
    return said
