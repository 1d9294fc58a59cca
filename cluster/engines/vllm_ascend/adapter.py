"""vLLM-Ascend as an EngineAdapter. Pure.

What differs from vLLM on CUDA: connectors and their ports, the variables by which HCCL finds its
network, and no --enable-scale-out, a flag of vLLM 0.30 and later (vLLM-Ascend 0.23 builds on vLLM
0.23), before which /v1/.../render answers without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from cluster.engines import command
from cluster.engines.base import (
    Launch,
    LaunchContext,
    MetricNames,
    PortNeed,
    Probes,
)
from cluster.engines.command import Flags
from cluster.engines.packages import installed
from cluster.engines.vllm import kv as vllm_kv
from cluster.engines.vllm import origins
from cluster.engines.vllm.adapter import METRICS, common_env
from cluster.engines.vllm.flags import (
    argv,
    capacity_flags,
    model_flags,
    parallel_flags,
    rendezvous_ports,
)
from cluster.engines.vllm_ascend import kv
from cluster.errors import InvalidInput
from cluster.topology.schema import IslandSpec, PoolSpec

# Its Mooncake transport takes ports at random from 20000 up to 20000 + 1000 per NPU of the node,
# which is 35999 on an A3 (docs/source/tutorials/features/pd_disaggregation_mooncake_multi_node.md);
# from 32768 the kernel takes what it likes. Below 15000 nobody does.
PORTS = range(10_000, 15_000)


class VllmAscendAdapter:
    """vLLM-Ascend 0.23 and later."""

    name = "vllm_ascend"
    metrics: MetricNames = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        needs = (
            PortNeed("http"),
            *vllm_kv.event_ports(pool),
            *kv.ports(pool),
            *rendezvous_ports(pool),
        )
        return tuple(replace(need, window=PORTS) for need in needs)

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        platform = context.host_facts.platform
        if platform != "npu":
            raise InvalidInput(
                f"pools[{context.pool.name}].engine: found vllm_ascend on a node without NPUs "
                f"({platform}); choose a node with NPUs by placement, or write `engine: vllm`"
            )
        flags: Flags = {
            "host": context.host,
            "port": context.ports["http"],
            **model_flags(context),
            **capacity_flags(context),
            **parallel_flags(context),
            "api-server-count": 1 if _leads_nodes(context) else None,
            "kv-transfer-config": kv.transfer_config(context),
            "kv-events-config": vllm_kv.events_config(context),
            "enable-prompt-tokens-details": True,
            "disable-uvicorn-access-log": True,
        } | command.passed_through(context.pool)
        env = {
            **common_env(context),
            **kv.transfer_env(context),
            **_network(context),
            **context.pool.env,
        }
        module = ("-m", "vllm.entrypoints.cli.main", "serve")
        network = dict.fromkeys(_NETWORK, _NETWORK_REASON)
        return Launch(
            argv=(context.python, *module, context.model_path, *argv(flags)),
            env=env,
            secret_env={"VLLM_API_KEY": context.engine_key},
            origins=origins.of(context, flags, env, network),
        )

    def probes(self, context: LaunchContext) -> Probes:
        return Probes(death="/health")

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        """The answer of a prefill call says where its blocks are; only events are found by this."""
        return vllm_kv.address(context)

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        return command.why_fixed_role(pool, vllm_kv.why_fixed_role(island.connector))

    def connector_version(self, context: LaunchContext) -> str:
        # Its connectors come with the plugin; the library below them is built from source.
        version = installed(context.python, ("vllm-ascend", "vllm_ascend"))
        return f"{context.island.connector} {version or 'of unknown version'}"


_NETWORK = ("HCCL_IF_IP", "GLOO_SOCKET_IFNAME", "TP_SOCKET_IFNAME", "HCCL_SOCKET_IFNAME")
_NETWORK_REASON = "the node's own address and the interface that has it"


def _network(context: LaunchContext) -> dict[str, str]:
    """Which of the node's networks HCCL and Gloo use towards other nodes."""
    if context.pool.nodes_per_replica == 1 and not vllm_kv.moves_kv(context.role):
        return {}
    found = {"HCCL_IF_IP": context.host}
    if context.interface:
        found |= dict.fromkeys(_NETWORK[1:], context.interface)
    return found


def _leads_nodes(context: LaunchContext) -> bool:
    pool = context.pool
    return pool.nodes_per_replica > 1 and pool.parallel.data > 1 and context.node_rank == 0
