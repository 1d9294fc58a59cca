"""Where the flags and variables of a vLLM server come from, for `pdcluster render --explain`. Pure.

Called by: the adapters vllm and vllm_ascend. Reasons are sentences without a full stop.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cluster.engines import command
from cluster.engines.base import LaunchContext

_POOL = {
    "block-size": "pool.block_size_tokens",
    "max-num-seqs": "pool.max_num_seqs",
    "max-num-batched-tokens": "pool.max_batched_tokens",
    "kv-cache-memory-bytes": "pool.kv_cache_gib",
    "speculative-config": "pool.speculative",
    "tensor-parallel-size": "pool.parallel.tensor",
    "pipeline-parallel-size": "pool.parallel.pipeline",
    "data-parallel-size": "pool.parallel.data",
    "enable-expert-parallel": "pool.parallel.expert",
    "kv-transfer-config": "island.connector",
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "island.lease_s",
}
_NODES = (
    "data-parallel-size-local",
    "data-parallel-address",
    "data-parallel-rpc-port",
    "data-parallel-start-rank",
    "headless",
    "nnodes",
    "node-rank",
    "master-addr",
    "master-port",
)
_MODEL = {
    "id": "model",
    "revision": "revision",
    "quantization": "quantization",
    "dtype": "dtype",
    "kv_cache_dtype": "kv-cache-dtype",
    "trust_remote_code": "trust-remote-code",
    "tool_call_parser": "tool-call-parser",
    "reasoning_parser": "reasoning-parser",
}
_REASONS = {
    "host": command.ADDRESS,
    "port": command.PORT,
    "prefix-caching-hash-algo": "blocks get the same name in every engine",
    "enforce-eager": "nothing to compile on a CPU for a model this small",
    "distributed-executor-backend": "the lightest one that can run these ranks on a CPU",
    "kv-events-config": "the gateway learns which blocks are where",
    "enable-prompt-tokens-details": "answers say how many prompt tokens were cached",
    "enable-scale-out": "the gateway asks the engine to render what it cannot render itself",
    "disable-uvicorn-access-log": "a line per request and probe would drown the log",
    "api-server-count": "a replica has one HTTP port",
    "VLLM_HOST_IP": "peers reach this engine by its node's address",
    "VLLM_NO_USAGE_STATS": "nothing is sent out",
    "PYTHONHASHSEED": "blocks get the same name in every engine",
    "VLLM_RPC_BASE_PATH": "the engine's sockets go with the worker's folder",
    "HF_HUB_OFFLINE": "the model is a local folder",
    "OMP_NUM_THREADS": "the cores that the pool reserves, at least two where there are two",
    "VLLM_CPU_OMP_THREADS_BIND": "its own binding puts every engine on the same cores",
    "TORCHDYNAMO_DISABLE": "no step waits for the compiler, as nothing else is compiled either",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "one process less for a single rank on a CPU",
    "VLLM_NIXL_SIDE_CHANNEL_HOST": command.ADDRESS,
    "VLLM_NIXL_SIDE_CHANNEL_PORT": command.PORT,
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": command.PORT,
}


def of(
    context: LaunchContext,
    flags: Mapping[str, Any],
    env: Mapping[str, str],
    further: Mapping[str, str] | None = None,
) -> dict[str, str]:
    """`Launch.origins`. `further`: reasons of the adapter's own."""
    known = {**_known(context), **(further or {})}
    # The CPU build takes the model as a flag, `vllm serve` as a word.
    return {"--model": known["model"], **command.origins(flags, env, context.pool, known)}


def _known(context: LaunchContext) -> Mapping[str, str]:
    """Flag or variable -> key or reason."""
    model = command.model_origins(context, _MODEL)
    return {
        **_REASONS,
        **_POOL,
        **dict.fromkeys(_NODES, "pool.nodes_per_replica"),
        **model,
        "enable-auto-tool-choice": model[_MODEL["tool_call_parser"]],
        "max-model-len": command.length_origin(context),
        "served-model-name": command.served_name_origin(context),
    }
