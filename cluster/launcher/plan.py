"""From a topology and what is known of its model to the values that `up` hands on. Pure.

Called by: launcher.up, launcher.render.
"""

from __future__ import annotations

import re

from cluster.control.rollout import differing
from cluster.control.state import DesiredState
from cluster.engines.base import HostFacts
from cluster.engines.vllm.flags import dtype
from cluster.errors import InvalidInput
from cluster.models.store import ResolvedModel
from cluster.sizing.kv import kv_bytes_per_token
from cluster.topology.schema import ModelSpec, Topology

_CHANGED_BY_UP = re.compile(r"(pools\[[^\]]+\]\.replicas|observability(?!\.tracing))(\..+)?")
_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}


def desired_state(
    topology: Topology, model: ResolvedModel, host: str, host_facts: HostFacts
) -> DesiredState:
    """`host`: the address engines bind; "": each node's own.

    Raises: InvalidInput: a pool is to take longer requests than the model."""
    for pool in topology.serving.pools:
        if (pool.max_model_len_tokens or 0) > model.max_model_len_tokens:
            raise InvalidInput(
                f"pools[{pool.name}].max_model_len_tokens: found {pool.max_model_len_tokens}; the "
                f"model's config says {model.max_model_len_tokens}; write that or less, or, if "
                "the engine is told how to go beyond, state model.max_model_len_tokens"
            )
    return DesiredState(
        cluster=topology.cluster_name,
        serving=topology.serving,
        model_path=model.path,
        model_digest=model.digest,
        max_model_len_tokens=model.max_model_len_tokens,
        kv_bytes_per_token=_kv_bytes(topology.serving.model, model, host_facts),
        host=host,
    )


def url(host: str, port: int, head: str = "127.0.0.1") -> str:
    """The URL of what is bound to `host`. All interfaces are no address to connect to: `head`, the
    head's own, stands for them."""
    reached = head if is_wildcard(host) else host
    return f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}"


def is_wildcard(host: str) -> bool:
    return host in ("0.0.0.0", "::")


def needs_restart(before: DesiredState, after: DesiredState) -> tuple[str, ...]:
    """Keys in which two states differ that `up` does not give a running cluster: all but the pools'
    `replicas`, and `observability` less its traces, which gateways are started with. Empty: `after`
    can be applied to a cluster that runs as `before`."""
    keys = tuple(
        key for key in differing(before.serving, after.serving) if not _CHANGED_BY_UP.fullmatch(key)
    )
    facts = ("model_path", "max_model_len_tokens", "host")
    keys += tuple(key for key in facts if getattr(before, key) != getattr(after, key))
    files = ("model_digest", "kv_bytes_per_token")
    if any(getattr(before, key) != getattr(after, key) for key in files):
        keys += ("files of the model",)
    return keys


def _kv_bytes(spec: ModelSpec, model: ResolvedModel, host: HostFacts) -> int:
    """Bytes of KV per token; 0 if the config does not say (a hub id, an unknown architecture)."""
    kept = spec.kv_cache_dtype
    size = 1.0 if kept.startswith(("fp8", "int8")) else _DTYPE_BYTES.get(kept, 2.0)
    if kept == "auto":
        size = _DTYPE_BYTES[dtype(spec.dtype, host)]
    try:
        return kv_bytes_per_token(model.config, size)
    except InvalidInput:
        return 0
