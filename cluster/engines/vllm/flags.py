"""Flags of a vLLM server: from the topology's words to argv. Pure.

Called by: engines.vllm.adapter. A flag is a key without dashes; its value says how it is written:
True a bare flag, False its `no-` form, None nothing at all, dict and list as JSON.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from cluster.engines.base import HostFacts, LaunchContext, PortNeed
from cluster.engines.command import Flags, head_port
from cluster.errors import InvalidInput
from cluster.topology.schema import PoolSpec

# CPUs that multiply bfloat16 in hardware. Elsewhere it is emulated: 38 prompt tokens/s against
# 300-400 in float32, measured with SmolLM2-135M on two AVX2 cores.
_FAST_BFLOAT16 = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
# Rank 0's, where the nodes of one replica meet.
RENDEZVOUS = "rendezvous"


def argv(flags: Mapping[str, Any]) -> list[str]:
    """Flags in their order, as a command line has them."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None:
            continue
        if isinstance(value, bool):
            words.append(f"--{name}" if value else f"--no-{name}")
        elif isinstance(value, dict | list):
            words += [f"--{name}", json.dumps(value, separators=(",", ":"))]
        else:
            words += [f"--{name}", str(value)]
    return words


def model_flags(context: LaunchContext) -> Flags:
    """What is served, and how it is talked to."""
    model = context.model
    return {
        "served-model-name": model.public_name,
        "revision": model.revision,
        "quantization": model.quantization,
        "dtype": dtype(model.dtype, context.host_facts),
        "kv-cache-dtype": None if model.kv_cache_dtype == "auto" else model.kv_cache_dtype,
        "max-model-len": context.max_model_len_tokens,
        "trust-remote-code": model.trust_remote_code or None,
        "enable-auto-tool-choice": True if model.tool_call_parser else None,
        "tool-call-parser": model.tool_call_parser,
        "reasoning-parser": model.reasoning_parser,
    }


def dtype(asked: str, host: HostFacts) -> str:
    """`auto` on a CPU: the one of the two that its instructions do fast."""
    if asked != "auto" or host.platform != "cpu":
        return asked
    return "bfloat16" if host.cpu_flags & _FAST_BFLOAT16 else "float32"


def capacity_flags(context: LaunchContext) -> Flags:
    """Batches, blocks, memory, drafts."""
    pool = context.pool
    kv_bytes = None if pool.kv_cache_gib is None else int(pool.kv_cache_gib * 2**30)
    return {
        "block-size": pool.block_size_tokens,
        "max-num-seqs": pool.max_num_seqs,
        "max-num-batched-tokens": pool.max_batched_tokens,
        "kv-cache-memory-bytes": kv_bytes,
        # Reproducible in any process and language, so that blocks have one name in all engines.
        "prefix-caching-hash-algo": "sha256_cbor",
        "speculative-config": pool.speculative,
    }


def rendezvous_ports(pool: PoolSpec) -> list[PortNeed]:
    """Of a replica that spans nodes. Rank 0's is used, the others hold theirs idle."""
    return [PortNeed(RENDEZVOUS)] if pool.nodes_per_replica > 1 else []


def parallel_flags(context: LaunchContext) -> Flags:
    """Ranks inside the replica, and over its nodes. Raises: InvalidInput."""
    parallel, nodes = context.pool.parallel, context.pool.nodes_per_replica
    flags: Flags = {
        "tensor-parallel-size": parallel.tensor if parallel.tensor > 1 else None,
        "pipeline-parallel-size": parallel.pipeline if parallel.pipeline > 1 else None,
        "data-parallel-size": parallel.data if parallel.data > 1 else None,
        "enable-expert-parallel": parallel.expert or None,
    }
    if nodes == 1:
        return flags
    if parallel.data > 1:
        return flags | _data_parallel_nodes(context)
    return flags | _model_parallel_nodes(context)


def _data_parallel_nodes(context: LaunchContext) -> Flags:
    parallel, nodes = context.pool.parallel, context.pool.nodes_per_replica
    local, rest = divmod(parallel.data, nodes)
    if rest:
        raise InvalidInput(
            f"pools[{context.pool.name}].parallel.data: found {parallel.data} over {nodes} nodes; "
            f"write a multiple of nodes_per_replica"
        )
    flags: Flags = {
        "data-parallel-size-local": local,
        "data-parallel-address": context.head_host or context.host,
        "data-parallel-rpc-port": head_port(context, RENDEZVOUS),
    }
    if context.node_rank:
        flags |= {"headless": True, "data-parallel-start-rank": context.node_rank * local}
    return flags


def _model_parallel_nodes(context: LaunchContext) -> Flags:
    parallel, nodes = context.pool.parallel, context.pool.nodes_per_replica
    if parallel.tensor * parallel.pipeline % nodes:
        raise InvalidInput(
            f"pools[{context.pool.name}].parallel: found tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline} over {nodes} nodes; write a product that is a multiple of "
            "nodes_per_replica"
        )
    return {
        "nnodes": nodes,
        "node-rank": context.node_rank,
        "master-addr": context.head_host or context.host,
        "master-port": head_port(context, RENDEZVOUS),
        "headless": True if context.node_rank else None,
    }


def cpu_threads(context: LaunchContext) -> int:
    """OpenMP threads of a CPU engine: what the pool reserves, at least two where there are two.

    A small machine's prefill and decode engine take turns at a request: one may use both cores
    while the other waits."""
    reserved = math.ceil(context.pool.placement.resources.get("CPU", 0))
    return max(reserved, min(2, context.host_facts.cores))
