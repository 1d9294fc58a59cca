"""Engine flags and environment variables that pdcluster sets itself, and the key to use instead.

Given twice, an engine takes whichever comes last, and the worker, the router and the fingerprint
would each believe something else. Called by: topology.pool_checks.
"""

from __future__ import annotations

_MODEL = "metadata.serving.model."
_NONE = "take it out: pdcluster sets it for each worker"

# Flag without dashes, or its first word up to a dot, -> what to do instead.
_FLAGS = {
    "model": f"use {_MODEL}id",
    "tokenizer": f"use {_MODEL}id: the gateway reads the tokenizer from there",
    "served-model-name": f"use {_MODEL}served_name",
    "revision": f"use {_MODEL}revision",
    "quantization": f"use {_MODEL}quantization",
    "dtype": f"use {_MODEL}dtype",
    "kv-cache-dtype": f"use {_MODEL}kv_cache_dtype",
    "max-model-len": f"use {_MODEL}max_model_len_tokens, or the pool's own",
    "tool-call-parser": f"use {_MODEL}tool_call_parser",
    "reasoning-parser": f"use {_MODEL}reasoning_parser",
    "trust-remote-code": f"use {_MODEL}trust_remote_code",
    "tensor-parallel-size": "use the pool's parallel.tensor",
    "pipeline-parallel-size": "use the pool's parallel.pipeline",
    "data-parallel-size": "use the pool's parallel.data",
    "enable-expert-parallel": "use the pool's parallel.expert",
    "kv-cache-memory-bytes": "use the pool's kv_cache_gib",
    "block-size": "use the pool's block_size_tokens",
    "max-num-seqs": "use the pool's max_num_seqs",
    "max-num-batched-tokens": "use the pool's max_batched_tokens",
    "speculative-config": "use the pool's speculative",
    "kv-transfer-config": "use the island's connector and lease_s",
    "kv-events-config": _NONE,
    "host": _NONE,
    "port": _NONE,
    "uds": _NONE,
    "api-key": _NONE,
    "api-server-count": "use replicas: one engine has one HTTP port here",
    "ssl-keyfile": "take it out: engines speak plain HTTP to the gateway",
    "ssl-certfile": "take it out: engines speak plain HTTP to the gateway",
    "root-path": "take it out: the gateway calls /v1/... on the engine",
    "config": "take it out and write its flags here, so that they can be checked",
    "headless": "use the pool's nodes_per_replica",
    "nnodes": "use the pool's nodes_per_replica",
    "node-rank": "use the pool's nodes_per_replica",
    "master-addr": "use the pool's nodes_per_replica",
    "master-port": "use the pool's nodes_per_replica",
    "data-parallel-address": "use the pool's nodes_per_replica and parallel.data",
    "data-parallel-rpc-port": "use the pool's nodes_per_replica and parallel.data",
    "data-parallel-start-rank": "use the pool's nodes_per_replica and parallel.data",
    "data-parallel-size-local": "use the pool's nodes_per_replica and parallel.data",
}

_DEVICES = "take it out: Ray sets it; ask for devices with placement.resources"
_ENV = {
    "VLLM_API_KEY": _NONE,
    "VLLM_HOST_IP": _NONE,
    "VLLM_PORT": _NONE,
    "VLLM_NIXL_SIDE_CHANNEL_HOST": _NONE,
    "VLLM_NIXL_SIDE_CHANNEL_PORT": _NONE,
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": _NONE,
    "VLLM_MOONCAKE_ABORT_REQUEST_TIMEOUT": "use the island's lease_s",
    "PDCLUSTER_OWNER": _NONE,
    "RAY_ADDRESS": _NONE,
    "CUDA_VISIBLE_DEVICES": _DEVICES,
    "ASCEND_RT_VISIBLE_DEVICES": _DEVICES,
}


def canonical(flag: str) -> str:
    """One spelling for a flag: `max_num_seqs` is max-num-seqs; `x.y` sets a part of x."""
    return flag.lstrip("-").replace("_", "-").partition(".")[0]


def instead_of_flag(flag: str) -> str | None:
    """What to do instead of giving this flag, or None if it is the operator's to give."""
    name = canonical(flag)
    return _FLAGS.get(name) or _FLAGS.get(name.removeprefix("no-"))


def instead_of_variable(name: str) -> str | None:
    """What to do instead of setting this variable, or None if it is the operator's to set."""
    return _ENV.get(name)
