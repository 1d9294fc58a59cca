"""From what a worker is told to what its engine's adapter must know, on the worker's own node.

Called by: workers.worker, once per start.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import psutil

from cluster.engines.base import LaunchContext
from cluster.engines.host import devices_of, host_facts, interface_of, platform_of
from cluster.models.store import place_on_node
from cluster.workers.gang import Gang, MeetingPlace
from cluster.workers.spec import WorkerSpec

log = logging.getLogger(__name__)


async def launch_context(
    spec: WorkerSpec,
    node_ip: str,
    ports: Mapping[str, int],
    runtime_dir: Path,
    gang: Gang | None,
) -> LaunchContext:
    """Looks at the node, makes a builtin model if it is not here yet (minutes at worst), and
    waits for rank 0's meeting place unless this is rank 0.

    Raises: ModelError: the model is not on this node; PeerGone: rank 0 ended first."""
    host = host_of(spec, node_ip)
    model_path = await asyncio.to_thread(
        place_on_node,
        spec.model,
        spec.model_path,
        spec.model_digest,
        node_ip,
        lambda what, _part: log.info("%s model %s", spec.id, what),
    )
    found = await asyncio.to_thread(host_facts)
    facts = replace(found, platform=platform_of(spec.pool, found.platform))
    head = MeetingPlace()
    if spec.node_rank > 0 and gang is not None:
        head = await gang.meeting_place()
    return LaunchContext(
        worker=spec.id,
        role=spec.role,
        model=spec.model,
        model_path=model_path,
        pool=spec.pool,
        island=spec.island,
        host=host,
        host_facts=facts,
        ports=ports,
        runtime_dir=str(runtime_dir),
        python=spec.pool.interpreter or sys.executable,
        engine_key=spec.engine_key,
        node_rank=spec.node_rank,
        head_host=head.host,
        head_ports=head.ports or ports,
        peers=spec.peers,
        devices=devices_of(facts.platform, os.environ),
        interface=interface_of(host, _addresses()),
    )


def host_of(spec: WorkerSpec, node_ip: str) -> str:
    """The address that the engine binds and that its peers know."""
    return spec.host or node_ip


def _addresses() -> Mapping[str, list[str]]:
    return {
        name: [entry.address for entry in entries]
        for name, entries in psutil.net_if_addrs().items()
    }
