"""xLLM as an EngineAdapter. Pure.

xLLM reads quantisation, dtype and the longest sequence from the weights' folder; it has no flags
for them, and none for a key: its port is open to whoever reaches the node.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import PurePath

from cluster.engines import command
from cluster.engines.base import Launch, LaunchContext, MetricNames, PortNeed, Probes
from cluster.engines.command import Flags
from cluster.engines.xllm.ranks import written
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import IslandSpec, PoolSpec

# brpc shows xLLM's variables (xllm/core/common/metrics.cpp) as Prometheus text there.
_PROBES = Probes(metrics="/brpc_metrics", version="")
_METRICS = MetricNames(
    running="num_running_requests",
    waiting="num_waiting_requests",
    kv_usage="kv_cache_utilization_perc",
    prompt_tokens="num_processing_tokens_total_prompt",
    generation_tokens="num_processing_tokens_total_generated",
    cache_info="",
    steps="num_model_execution_total_eager",
)
_MASTER = "xllm_master"
_RANKS = ("-m", "cluster.engines.xllm")
_KNOWN = {
    "host": command.ADDRESS,
    "model_id": "model.id",
    "master_node_addr": command.PORT,
    "nnodes": "one process per NPU: pool.parallel and pool.nodes_per_replica",
    "max_seqs_per_batch": "pool.max_num_seqs",
    "max_tokens_per_batch": "pool.max_batched_tokens",
    "block_size": "pool.block_size_tokens",
    "max_cache_size": "pool.kv_cache_gib",
    "dp_size": "pool.parallel.data",
    "ep_size": "pool.parallel.expert",
    "count": "one process per NPU: pool.parallel and pool.nodes_per_replica",
    "first-rank": "the node's place in the replica",
    "first-port": command.PORT,
    "draft-devices": "pool.speculative.draft_model",
    "HCCL_IF_IP": "the node's own address",
    "HCCL_SOCKET_IFNAME": "the interface that has the node's address",
}
_MODEL = {
    "id": "model",
    "tool_call_parser": "tool_call_parser",
    "reasoning_parser": "reasoning_parser",
    "kv_cache_dtype": "kv_cache_dtype",
}


class XllmAdapter:
    """xLLM as of July 2026. `interpreter` is its executable."""

    name = "xllm"
    metrics: MetricNames = _METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        return (PortNeed("http", command.ranks_per_node(pool)), PortNeed(_MASTER))

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        _refuse(context)
        pool = context.pool
        local = command.ranks_per_node(pool)
        flags = _flags(context) | command.passed_through(pool, "_")
        starter: Flags = {
            "count": local,
            "first-rank": context.node_rank * local,
            "first-port": context.ports["http"],
            "draft-devices": "draft_model" in flags or None,
        }
        env = {**_env(context), **pool.env}
        known = {
            **_KNOWN,
            **{key: f"pool.speculative.{key}" for key in pool.speculative or {}},
            **command.model_origins(context, _MODEL),
        }
        starter_words = [
            word
            for name, value in starter.items()
            if value is not None
            for word in (f"--{name}", *([] if value is True else [str(value)]))
        ]
        return Launch(
            argv=(
                *(sys.executable, *_RANKS, *starter_words, "--"),
                *(pool.interpreter or "xllm", *written(flags)),
            ),
            env=env,
            origins=command.origins({**starter, **flags}, env, pool, known),
        )

    def probes(self, context: LaunchContext) -> Probes:
        return _PROBES

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return {}

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        return command.why_fixed_role(pool, "xllm hands no KV over by us: its pools are mixed")

    def connector_version(self, context: LaunchContext) -> str:
        return "none"


def _refuse(context: LaunchContext) -> None:
    pool = context.pool
    if context.host_facts.platform != "npu":
        raise InvalidInput(
            f"pools[{pool.name}].engine: found xllm on a node without NPUs "
            f"({context.host_facts.platform}); choose a node with NPUs by placement"
        )
    if context.role is not Role.MIXED:
        raise InvalidInput(
            f"pools[{pool.name}].role: found {context.role}; xLLM pairs its prefill and decode "
            "instances through its own service and etcd; write `role: mixed`"
        )
    if not PurePath(context.model_path).is_absolute():
        raise InvalidInput(
            f"pools[{pool.name}].model.id: found {context.model_path}; xLLM loads folders only; "
            "write the folder's path on the pool's nodes"
        )
    if pool.parallel.pipeline > 1:
        raise InvalidInput(
            f"pools[{pool.name}].parallel.pipeline: found {pool.parallel.pipeline}; xLLM has no "
            "pipeline ranks; write 1"
        )
    if pool.nodes_per_replica > 1 and "rank_tablefile" not in command.passed_through(pool, "_"):
        raise InvalidInput(
            f"pools[{pool.name}].engine_args.rank_tablefile: missing; xLLM needs HCCL's rank table "
            "for a replica that spans nodes; write the file's path, the same on every node"
        )


def _flags(context: LaunchContext) -> Flags:
    model, pool = context.model, context.pool
    world = command.ranks_per_node(pool) * pool.nodes_per_replica
    host = context.head_host or context.host
    kv_bytes = None if pool.kv_cache_gib is None else int(pool.kv_cache_gib * 2**30)
    return {
        "model": context.model_path,
        "model_id": model.public_name,
        "host": context.host,
        "master_node_addr": f"{host}:{command.head_port(context, _MASTER)}",
        "nnodes": world,
        "max_tokens_per_batch": pool.max_batched_tokens,
        "max_seqs_per_batch": pool.max_num_seqs,
        "block_size": pool.block_size_tokens,
        "max_cache_size": kv_bytes,
        "kv_cache_dtype": None if model.kv_cache_dtype == "auto" else model.kv_cache_dtype,
        "tool_call_parser": model.tool_call_parser,
        "reasoning_parser": model.reasoning_parser,
        "dp_size": pool.parallel.data,
        "ep_size": world if pool.parallel.expert else None,
        **(pool.speculative or {}),
    }


def _env(context: LaunchContext) -> dict[str, str]:
    if context.pool.nodes_per_replica == 1:
        return {}
    env = {"HCCL_IF_IP": context.host}
    return {**env, "HCCL_SOCKET_IFNAME": context.interface} if context.interface else env
