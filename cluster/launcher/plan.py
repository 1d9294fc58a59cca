"""From a topology and what is known of its model to the values that `up` hands on. Pure.

Called by: launcher.up, launcher.render.
"""

from __future__ import annotations

from cluster.control.state import DesiredState
from cluster.engines.base import HostFacts
from cluster.engines.vllm.flags import dtype
from cluster.errors import InvalidInput
from cluster.models.store import ResolvedModel
from cluster.sizing.kv import kv_bytes_per_token
from cluster.topology.schema import ModelSpec, Topology

_DTYPE_BYTES = {"float32": 4.0, "bfloat16": 2.0, "float16": 2.0, "auto": 2.0}


def desired_state(
    topology: Topology, model: ResolvedModel, host: str, host_facts: HostFacts
) -> DesiredState:
    """`host`: the address engines bind; "": each node's own."""
    return DesiredState(
        cluster=topology.cluster_name,
        serving=topology.serving,
        model_path=model.path,
        model_digest=model.digest,
        max_model_len_tokens=model.max_model_len_tokens,
        kv_bytes_per_token=_kv_bytes(topology.serving.model, model, host_facts),
        host=host,
    )


def endpoint_url(topology: Topology) -> str:
    """Where clients on this machine reach the endpoint."""
    gateway = topology.serving.gateway
    # An address to bind is not one to connect to.
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(gateway.host, gateway.host)
    if ":" in host and not host.startswith("["):
        host = f"[{host}]"
    return f"http://{host}:{gateway.port}"


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
