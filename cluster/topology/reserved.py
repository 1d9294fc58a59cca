"""Engine flags and environment variables that pdcluster sets itself, and the key to use instead.

Given twice, an engine takes whichever comes last, and the worker, the router and the fingerprint
would each believe something else. Called by: topology.pool_checks.
"""

from __future__ import annotations

from cluster.topology.schema import EngineName

_MODEL = "metadata.serving.model."
_NONE = "take it out: pdcluster sets it for each worker"
_PLAIN_HTTP = "take it out: engines speak plain HTTP to the gateway"
_TOKENIZER = f"use {_MODEL}id: the gateway reads the tokenizer from there"
_LENGTH = f"use {_MODEL}max_model_len_tokens, or the pool's own"
_WEIGHTS = "or the pool's model."
_NODES = "use the pool's nodes_per_replica"
_COPIES = "use the pool's nodes_per_replica and parallel.data"
_CONNECTOR = "use the island's connector and lease_s"
_ROOT = "take it out: the gateway calls /v1/... on the engine"

# Flag without dashes, or its first word up to a dot, -> what to do instead.
_VLLM = {
    "model": f"use {_MODEL}id",
    "tokenizer": _TOKENIZER,
    "served-model-name": f"use {_MODEL}served_name",
    "revision": f"use {_MODEL}revision",
    "quantization": f"use {_MODEL}quantization, {_WEIGHTS}quantization",
    "dtype": f"use {_MODEL}dtype",
    "kv-cache-dtype": f"use {_MODEL}kv_cache_dtype, {_WEIGHTS}kv_cache_dtype",
    "max-model-len": _LENGTH,
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
    "kv-transfer-config": _CONNECTOR,
    "kv-events-config": _NONE,
    "host": _NONE,
    "port": _NONE,
    "uds": _NONE,
    "api-key": _NONE,
    "api-server-count": "use replicas: one engine has one HTTP port here",
    "ssl-keyfile": _PLAIN_HTTP,
    "ssl-certfile": _PLAIN_HTTP,
    "root-path": _ROOT,
    "config": "take it out and write its flags here, so that they can be checked",
    "headless": _NODES,
    "nnodes": _NODES,
    "node-rank": _NODES,
    "master-addr": _NODES,
    "master-port": _NODES,
    "data-parallel-address": _COPIES,
    "data-parallel-rpc-port": _COPIES,
    "data-parallel-start-rank": _COPIES,
    "data-parallel-size-local": _COPIES,
}
# With the spellings that SGLang takes for the same flag.
_SGLANG = {
    **dict.fromkeys(("model-path", "model"), f"use {_MODEL}id"),
    **dict.fromkeys(("tokenizer-path",), _TOKENIZER),
    "served-model-name": f"use {_MODEL}served_name",
    "revision": f"use {_MODEL}revision",
    "quantization": f"use {_MODEL}quantization, {_WEIGHTS}quantization",
    "dtype": f"use {_MODEL}dtype",
    "kv-cache-dtype": f"use {_MODEL}kv_cache_dtype, {_WEIGHTS}kv_cache_dtype",
    "context-length": _LENGTH,
    "tool-call-parser": f"use {_MODEL}tool_call_parser",
    "reasoning-parser": f"use {_MODEL}reasoning_parser",
    "trust-remote-code": f"use {_MODEL}trust_remote_code",
    **dict.fromkeys(("tp-size", "tensor-parallel-size", "tp"), "use the pool's parallel.tensor"),
    **dict.fromkeys(
        ("pp-size", "pipeline-parallel-size", "pp"), "use the pool's parallel.pipeline"
    ),
    **dict.fromkeys(
        ("dp-size", "data-parallel-size", "dp"),
        "use the pool's parallel.data; for copies of attention only, attn-dp-size",
    ),
    **dict.fromkeys(
        ("nnodes", "node-rank", "dist-init-addr", "nccl-init-addr", "nccl-port"), _NODES
    ),
    "page-size": "use the pool's block_size_tokens",
    "max-running-requests": "use the pool's max_num_seqs",
    "chunked-prefill-size": "use the pool's max_batched_tokens",
    "disaggregation-mode": "use the pool's role",
    "disaggregation-transfer-backend": "use the island's connector",
    "disaggregation-bootstrap-port": _NONE,
    "enable-metrics": _NONE,
    "host": _NONE,
    "port": _NONE,
    "api-key": _NONE,
    "admin-api-key": "take it out: it would be seen in the list of processes",
    "config": "take it out and write its flags here; pdcluster gives its own file",
    "skip-tokenizer-init": "take it out: the engine renders what the gateway cannot",
    "fastapi-root-path": _ROOT,
    **dict.fromkeys(("ssl-keyfile", "ssl-certfile", "ssl-ca-certs"), _PLAIN_HTTP),
    **dict.fromkeys(
        (
            "speculative-algorithm",
            "speculative-num-steps",
            "speculative-eagle-topk",
            "speculative-num-draft-tokens",
        ),
        "use the pool's speculative: {algorithm, num-steps, eagle-topk, num-draft-tokens}",
    ),
}
_PAIRS_ITSELF = "take it out: xLLM's own service pairs such instances, not this gateway"
_XLLM = {
    "model": "use the pool's model.id",
    "model-id": f"use {_MODEL}served_name",
    "kv-cache-dtype": f"use {_MODEL}kv_cache_dtype, {_WEIGHTS}kv_cache_dtype",
    "tool-call-parser": f"use {_MODEL}tool_call_parser",
    "reasoning-parser": f"use {_MODEL}reasoning_parser",
    "dp-size": "use the pool's parallel.data",
    "max-seqs-per-batch": "use the pool's max_num_seqs",
    "max-tokens-per-batch": "use the pool's max_batched_tokens",
    "block-size": "use the pool's block_size_tokens",
    "max-cache-size": "use the pool's kv_cache_gib",
    **dict.fromkeys(
        ("draft-model", "num-speculative-tokens", "speculative-algorithm"),
        "use the pool's speculative",
    ),
    **dict.fromkeys(("nnodes", "node-rank", "master-node-addr"), "use the pool's parallel"),
    **dict.fromkeys(("host", "port", "devices", "device-id", "draft-devices"), _NONE),
    **dict.fromkeys(
        (
            "enable-disagg-pd",
            "instance-role",
            "etcd-addr",
            "disagg-pd-port",
            "transfer-listen-port",
            "kv-cache-transfer-mode",
            "enable-service-routing",
        ),
        _PAIRS_ITSELF,
    ),
}
_FLAGS: dict[EngineName, dict[str, str]] = {
    "vllm": _VLLM,
    "vllm_ascend": _VLLM,
    "simulated": _VLLM,
    "sglang": _SGLANG,
    "ktransformers": _SGLANG,
    "xllm": _XLLM,
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
    "SGLANG_HOST_IP": _NONE,
    "HCCL_IF_IP": _NONE,
    "PDCLUSTER_OWNER": _NONE,
    "RAY_ADDRESS": _NONE,
    "CUDA_VISIBLE_DEVICES": _DEVICES,
    "ASCEND_RT_VISIBLE_DEVICES": _DEVICES,
}


def canonical(flag: str) -> str:
    """One spelling for a flag: `max_num_seqs` is max-num-seqs; `x.y` sets a part of x."""
    return flag.lstrip("-").replace("_", "-").partition(".")[0]


def instead_of_flag(flag: str, engine: EngineName = "vllm") -> str | None:
    """What to do instead of giving this flag, or None if it is the operator's to give."""
    name, flags = canonical(flag), _FLAGS[engine]
    return flags.get(name) or flags.get(name.removeprefix("no-"))


def instead_of_variable(name: str) -> str | None:
    """What to do instead of setting this variable, or None if it is the operator's to set."""
    return _ENV.get(name)
