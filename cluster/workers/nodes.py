"""What Ray knows of the cluster's nodes: those that live, and those that fell silent.

Called by: workers.handle, control.actor. Blocks on Ray's head, but for `look`.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import ray

from cluster.workers.placement import NodeFacts

# Of Ray's reasons (gcs.proto, NodeDeathInfo): ended by its own word; by the autoscaler, when idle.
_ENDED_ON_REQUEST = frozenset({1, 4})


@dataclass(frozen=True, slots=True)
class RayNode:
    """A node, by the id that Ray gave it at its start: a host that comes back is another."""

    id: str
    is_alive: bool
    facts: NodeFacts
    silence: str = ""  # why Ray holds it for dead, if nobody ended it; "" of one that lives


def living() -> list[NodeFacts]:
    return [node.facts for node in known() if node.is_alive]


async def look() -> tuple[RayNode, ...]:
    """All nodes that Ray remembers. Raises: whatever Ray does when its head is away."""
    return await asyncio.to_thread(known)


def known() -> tuple[RayNode, ...]:
    # Ray has no public call for what is free per node; its own libraries use this one.
    free = ray._private.state.available_resources_per_node()
    return tuple(_of(node, free.get(node["NodeID"], {})) for node in ray.nodes())


def _of(node: dict[str, Any], free: dict[str, float]) -> RayNode:
    is_alive = bool(node["Alive"])
    silence = ""
    if not is_alive and node.get("DeathReason") not in _ENDED_ON_REQUEST:
        silence = node.get("DeathReasonMessage") or "Ray holds it for dead"
    return RayNode(
        id=node["NodeID"],
        is_alive=is_alive,
        facts=NodeFacts(
            name=node["NodeManagerAddress"],
            labels=node.get("Labels", {}),
            total=node["Resources"],
            free=free,
        ),
        silence=silence,
    )
