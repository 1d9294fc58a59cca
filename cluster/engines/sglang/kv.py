"""How SGLang hands KV over between prefill and decode servers. Pure.

Prefill has a bootstrap server; each request names its address and a room, and is sent to both sides
at once. The bytes go over the transfer backend. Sources: python/sglang/srt/disaggregation.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.engines.base import LaunchContext, PortNeed
from cluster.engines.command import Flags
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import PoolSpec

BOOTSTRAP = "sglang_bootstrap"
_BACKENDS = {"sglang_mooncake": "mooncake", "sglang_nixl": "nixl", "sglang_ascend": "ascend"}
# Both sides of the Ascend backend meet at a store that one of the prefill nodes opens.
_STORE = "ASCEND_MF_STORE_URL"
# A request with this host moves nothing (disaggregation/utils.py, FAKE_BOOTSTRAP_HOST); SGLang's
# own warm-up and /health use it.
_NOBODY = {"bootstrap_host": "2.2.2.2", "bootstrap_room": 0}


def moves_kv(role: Role) -> bool:
    return role is not Role.MIXED


def ports(pool: PoolSpec) -> list[PortNeed]:
    return [PortNeed(BOOTSTRAP)] if pool.role is Role.PREFILL else []


def flags(context: LaunchContext) -> Flags:
    """Raises: InvalidInput."""
    if not moves_kv(context.role):
        return {}
    connector = context.island.connector
    if connector not in _BACKENDS:
        raise InvalidInput(
            f"islands[{context.island.name}].connector: found {connector}; sglang speaks "
            f"{', '.join(_BACKENDS)}"
        )
    if connector == "sglang_ascend" and _STORE not in context.pool.env:
        raise InvalidInput(
            f"pools[{context.pool.name}].env.{_STORE}: missing, and SGLang's ascend backend needs "
            "it; write `tcp://HOST:PORT`, the address of a node that runs a prefill worker, the "
            "same in all pools of the island"
        )
    return {
        "disaggregation-mode": context.role.value,
        "disaggregation-transfer-backend": _BACKENDS[connector],
        "disaggregation-bootstrap-port": context.ports.get(BOOTSTRAP),
    }


def probe(role: Role) -> Mapping[str, Any]:
    """What a one-token generation needs beside its prompt."""
    return _NOBODY if moves_kv(role) else {}


def address(context: LaunchContext) -> dict[str, str | int]:
    """What WorkerView.kv says of this worker."""
    if BOOTSTRAP not in context.ports:
        return {}
    return {"bootstrap_host": context.host, "bootstrap_port": context.ports[BOOTSTRAP]}
