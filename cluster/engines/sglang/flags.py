"""Flags of an SGLang server: from the topology's words to argv. Pure.

Called by: engines.sglang.adapter, engines.ktransformers. True is a bare flag, False and None are
nothing at all (SGLang has few `no-` forms), dict and list are JSON.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from cluster.engines import command
from cluster.engines.base import LaunchContext, PortNeed
from cluster.engines.command import Flags
from cluster.errors import InvalidInput
from cluster.topology.schema import PoolSpec

MODULE = ("-m", "sglang.launch_server")
DIST = "sglang_dist"
# The rendezvous and the six ports that SGLang derives from it (server_args.py, PortArgs).
_DIST_SPAN = 7
_SPECULATIVE = "speculative-"
# What makes SGLang use TCP between its processes, on ports it derives from the rendezvous.
_ATTENTION_COPIES = frozenset({"attn-dp-size", "enable-dp-attention"})

_MODEL = {
    "id": "model-path",
    "revision": "revision",
    "quantization": "quantization",
    "dtype": "dtype",
    "kv_cache_dtype": "kv-cache-dtype",
    "trust_remote_code": "trust-remote-code",
    "tool_call_parser": "tool-call-parser",
    "reasoning_parser": "reasoning-parser",
}
_KNOWN = {
    "host": command.ADDRESS,
    "port": command.PORT,
    "config": "holds the key of the engine's HTTP port, which must not stand in a command",
    "enable-metrics": "load and progress are read from its metrics",
    "enable-cache-report": "answers say how many prompt tokens were cached",
    "page-size": "pool.block_size_tokens",
    "max-running-requests": "pool.max_num_seqs",
    "chunked-prefill-size": "pool.max_batched_tokens",
    "tp-size": "pool.parallel.tensor",
    "pp-size": "pool.parallel.pipeline",
    "dp-size": "pool.parallel.data",
    "ep-size": "pool.parallel.expert",
    "nnodes": "pool.nodes_per_replica",
    "node-rank": "pool.nodes_per_replica",
    "dist-init-addr": command.PORT,
    "disaggregation-mode": "pool.role",
    "disaggregation-transfer-backend": "island.connector",
    "disaggregation-bootstrap-port": command.PORT,
    "device": "the node has NPUs",
    "attention-backend": "the node has NPUs",
    "kt-weight-path": "model.id",
    "PYTHONHASHSEED": "the same on every node",
    "SGLANG_HOST_IP": "peers reach this engine by its node's address",
    "HF_HUB_OFFLINE": "the model is a local folder",
    "HCCL_SOCKET_IFNAME": "the interface that has the node's address",
    "NCCL_SOCKET_IFNAME": "the interface that has the node's address",
    "GLOO_SOCKET_IFNAME": "the interface that has the node's address",
}


def argv(flags: Mapping[str, Any]) -> list[str]:
    """Flags in their order, as a command line has them."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if isinstance(value, dict | list):
            words.append(json.dumps(value, separators=(",", ":")))
        elif value is not True:
            words.append(str(value))
    return words


def server_flags(context: LaunchContext) -> Flags:
    """All that does not depend on prefill and decode being apart. Raises: InvalidInput."""
    model, pool = context.model, context.pool
    if pool.kv_cache_gib is not None:
        raise InvalidInput(
            f"pools[{pool.name}].kv_cache_gib: found {pool.kv_cache_gib:g}; SGLang takes a share "
            "of memory; write `engine_args: {mem-fraction-static: 0.8}`"
        )
    flags: Flags = {
        "model-path": context.model_path,
        "host": context.host,
        "port": context.ports["http"],
        "served-model-name": model.public_name,
        "revision": model.revision,
        "quantization": model.quantization,
        "dtype": None if model.dtype == "auto" else model.dtype,
        "kv-cache-dtype": None if model.kv_cache_dtype == "auto" else model.kv_cache_dtype,
        "context-length": context.max_model_len_tokens,
        "trust-remote-code": model.trust_remote_code,
        "tool-call-parser": model.tool_call_parser,
        "reasoning-parser": model.reasoning_parser,
        "page-size": pool.block_size_tokens,
        "max-running-requests": pool.max_num_seqs,
        "chunked-prefill-size": pool.max_batched_tokens,
        **_parallel(context),
        **{f"{_SPECULATIVE}{_dashed(k)}": v for k, v in (pool.speculative or {}).items()},
        "enable-metrics": True,
        "enable-cache-report": True,
    }
    if context.host_facts.platform == "npu":
        flags |= {"device": "npu", "attention-backend": "ascend"}
    return flags


def _parallel(context: LaunchContext) -> Flags:
    sizes, nodes = context.pool.parallel, context.pool.nodes_per_replica
    command.ranks_per_node(context.pool)
    flags: Flags = {
        "tp-size": sizes.tensor if sizes.tensor > 1 else None,
        "pp-size": sizes.pipeline if sizes.pipeline > 1 else None,
        "dp-size": sizes.data if sizes.data > 1 else None,
        "ep-size": sizes.tensor if sizes.expert else None,
    }
    if nodes > 1:
        flags |= {"nnodes": nodes, "node-rank": context.node_rank}
    if DIST in context.ports:
        host = context.head_host or context.host
        host = f"[{host}]" if ":" in host else host
        flags["dist-init-addr"] = f"{host}:{command.head_port(context, DIST)}"
    return flags


def rendezvous_ports(pool: PoolSpec) -> list[PortNeed]:
    """Without these, SGLang talks over Unix sockets."""
    copies = any(value for k, value in pool.engine_args.items() if _dashed(k) in _ATTENTION_COPIES)
    return [PortNeed(DIST, _DIST_SPAN)] if pool.nodes_per_replica > 1 or copies else []


def known_origins(context: LaunchContext) -> dict[str, str]:
    """Flag or variable -> key or reason, for `Launch.origins`."""
    speculative = context.pool.speculative or {}
    return {
        **_KNOWN,
        **{f"{_SPECULATIVE}{_dashed(key)}": f"pool.speculative.{key}" for key in speculative},
        **command.model_origins(context, _MODEL),
        "context-length": command.length_origin(context),
        "served-model-name": command.served_name_origin(context),
    }


def _dashed(key: str) -> str:
    return key.replace("_", "-")
