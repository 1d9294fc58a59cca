"""How a vLLM-Ascend engine hands KV blocks over: its own connectors, not ours. Pure.

    ascend_mooncake    MooncakeConnectorV1: prefill keeps its blocks, decode pulls them
    ascend_layerwise   MooncakeLayerwiseConnector: prefill pushes layer by layer, asked through a
                       metaserver

Both listen on kv_port + data rank x ranks of a copy + device (vllm_ascend/distributed/kv_transfer/
kv_p2p/mooncake_connector.py), and both want to be told the sizes of the other side.
"""

from __future__ import annotations

from typing import Any

from cluster.engines import command
from cluster.engines.base import LaunchContext, PortNeed
from cluster.engines.vllm.kv import lease_s, moves_kv
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import PoolSpec

PORT = "ascend_kv"
_CONNECTORS = {
    "ascend_mooncake": "MooncakeConnectorV1",
    "ascend_layerwise": "MooncakeLayerwiseConnector",
}
_ROLES = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}
_PREFILL_CONTEXT = ("prefill-context-parallel-size", "prefill_context_parallel_size")


def ports(pool: PoolSpec) -> list[PortNeed]:
    """Every node keeps the whole replica's span: its ranks count from the replica's first."""
    if not moves_kv(pool.role):
        return []
    sizes = pool.parallel
    return [PortNeed(PORT, sizes.data * sizes.tensor * sizes.pipeline * _context_ranks(pool))]


def _context_ranks(pool: PoolSpec) -> int:
    stated = (pool.engine_args.get(name) for name in _PREFILL_CONTEXT)
    return next((value for value in stated if isinstance(value, int)), 1)


def transfer_config(context: LaunchContext) -> dict[str, Any] | None:
    """--kv-transfer-config, or None for a worker that moves nothing. Raises: InvalidInput."""
    if not moves_kv(context.role):
        return None
    connector = context.island.connector
    if connector not in _CONNECTORS:
        raise InvalidInput(
            f"islands[{context.island.name}].connector: found {connector}; vllm_ascend speaks "
            f"{' and '.join(_CONNECTORS)}"
        )
    extra: dict[str, Any] = {"prefill": _sizes(context, Role.PREFILL)}
    extra["decode"] = _sizes(context, Role.DECODE)
    if connector == "ascend_mooncake":
        extra = {"use_ascend_direct": True, **extra}
    return {
        "kv_connector": _CONNECTORS[connector],
        "kv_role": _ROLES[context.role],
        "kv_port": _kv_port(context),
        "engine_id": _engine_id(context),
        # The gateway sees the failure and decides by the island's policy.
        "kv_load_failure_policy": "fail",
        "kv_connector_extra_config": extra,
    }


def transfer_env(context: LaunchContext) -> dict[str, str]:
    if not moves_kv(context.role) or context.island.connector != "ascend_mooncake":
        return {}
    return {"VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": str(lease_s(context))}


def _kv_port(context: LaunchContext) -> int:
    """Nodes that share one copy must count from the same port; copies of their own need not."""
    if context.pool.parallel.data > 1:
        return context.ports[PORT]
    return command.head_port(context, PORT)


def _engine_id(context: LaunchContext) -> str:
    """Peers keep addresses by engine id and port. The ports of two nodes may be the same numbers,
    so nodes with copies of their own need ids of their own."""
    worker = context.worker
    replica = f"{worker.pool}-{worker.index}-{worker.generation}"
    return f"{replica}-{context.node_rank}" if context.pool.parallel.data > 1 else replica


def _sizes(context: LaunchContext, role: Role) -> dict[str, int]:
    """Sizes of the side that has `role`. Raises: InvalidInput: there is none, or not just one."""
    sides = (context.pool,) if context.role is role else context.peers
    found = {(p.parallel.data, p.parallel.tensor, p.parallel.pipeline) for p in sides}
    if len(found) != 1:
        said = ", ".join(f"{p.name}: data {p.parallel.data}, tensor {p.parallel.tensor}, pipeline "
                         f"{p.parallel.pipeline}" for p in sides)  # fmt: skip
        raise InvalidInput(
            f"pools[{context.pool.name}]: found {said or 'no pool'} at the other end of its links; "
            f"vLLM-Ascend's connector takes one size for all {role} pools; give them one size, or "
            "islands of their own"
        )
    data, tensor, pipeline = found.pop()
    sizes = {"dp_size": data, "tp_size": tensor}
    return {**sizes, "pp_size": pipeline} if pipeline > 1 else sizes
