"""Where a replica may go: what it asks of Ray, and why Ray cannot place it. Pure.

Called by: workers.handle.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from cluster.topology.labels import label_matches
from cluster.topology.schema import PoolSpec

_NAMES_SHOWN = 4
_NODE_ID = "ray.io/node-id"  # Ray sets this label on every node
# Resources that Ray takes as arguments of their own, not under `resources`.
_OWN_ARGUMENTS = {"CPU": "num_cpus", "GPU": "num_gpus", "memory": "memory"}


@dataclass(frozen=True, slots=True)
class PlacementRequest:
    """`nodes` different nodes, each with `resources` free and labels that match, and none of
    `avoided` (Ray's node ids)."""

    resources: Mapping[str, float]
    labels: Mapping[str, str] = field(default_factory=dict)
    nodes: int = 1
    avoided: tuple[str, ...] = ()

    @property
    def bundles(self) -> list[dict[str, float]]:
        return [dict(self.resources)] * self.nodes

    @property
    def strategy(self) -> str:
        return "STRICT_SPREAD" if self.nodes > 1 else "PACK"

    @property
    def label_selectors(self) -> list[dict[str, str]] | None:
        """One per bundle; None: any node will do."""
        selector = dict(self.labels)
        if self.avoided:
            # A topology cannot name it: Ray gives a node another id at each start.
            selector[_NODE_ID] = f"!in({','.join(self.avoided)})"
        return [selector] * self.nodes if selector else None

    @property
    def actor_options(self) -> dict[str, Any]:
        """Options that give one actor all of a bundle, so that Ray shows it all devices in it."""
        options: dict[str, Any] = {"num_cpus": 0, "resources": {}}
        for name, amount in self.resources.items():
            if name in _OWN_ARGUMENTS:
                options[_OWN_ARGUMENTS[name]] = amount
            else:
                options["resources"][name] = amount
        return options


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """One living node, as Ray counts it."""

    name: str  # its address
    labels: Mapping[str, str]
    total: Mapping[str, float]
    free: Mapping[str, float]


def request_of(pool: PoolSpec, avoided: Sequence[str] = ()) -> PlacementRequest:
    return PlacementRequest(
        resources=dict(pool.placement.resources),
        labels=dict(pool.placement.labels),
        nodes=pool.nodes_per_replica,
        avoided=tuple(avoided),
    )


def explain_unplaceable(request: PlacementRequest, nodes: Sequence[NodeFacts]) -> str:
    """One sentence: what is asked, and per kind of node what it lacks."""
    reasons: dict[str, list[str]] = {}
    fitting = 0
    for node in nodes:
        lacks = _lacks(request, node)
        if lacks:
            reasons.setdefault(lacks, []).append(node.name)
        else:
            fitting += 1
    asked = _asked(request)
    if fitting >= request.nodes:
        return f"waits for Ray to place {asked}"
    if not nodes:
        return f"needs {asked}; the cluster has no living node"
    found = "; ".join(f"on {_names(names)}: {lacks}" for lacks, names in reasons.items())
    fits = f"; fits on {fitting} of {request.nodes}" if request.nodes > 1 else ""
    return f"needs {asked}; {found}{fits}"


def could_take(request: PlacementRequest, nodes: Sequence[NodeFacts]) -> bool:
    """Whether `nodes` would do if nothing were on them."""
    empty = [replace(node, free=node.total) for node in nodes]
    return sum(not _lacks(request, node) for node in empty) >= request.nodes


def _lacks(request: PlacementRequest, node: NodeFacts) -> str:
    """What keeps the request off the node; "" if nothing does."""
    if node.labels.get(_NODE_ID) in request.avoided:
        return "drained"
    missing: list[str] = []
    for key, selector in request.labels.items():
        value = node.labels.get(key)
        if not label_matches(selector, value):
            missing.append(f"label {key}={value}" if value is not None else f"no label {key}")
    for name, amount in request.resources.items():
        total, free = node.total.get(name, 0.0), node.free.get(name, 0.0)
        if total <= 0:
            missing.append(f"no {name}")
        elif total < amount:
            missing.append(f"only {name} {total:g}")
        elif free < amount:
            missing.append(f"{name} {free:g} of {total:g} free")
    return ", ".join(missing)


def _asked(request: PlacementRequest) -> str:
    resources = ", ".join(f"{name} {amount:g}" for name, amount in request.resources.items())
    labels = ", ".join(f"{key}={value}" for key, value in request.labels.items())
    where = "a node" if request.nodes == 1 else f"{request.nodes} nodes, each"
    return f"{where} with {resources or 'nothing'}" + (f" and label {labels}" if labels else "")


def _names(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_NAMES_SHOWN])
    more = len(names) - _NAMES_SHOWN
    return f"{shown} and {more} more" if more > 0 else shown
