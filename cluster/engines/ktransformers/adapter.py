"""KTransformers as an EngineAdapter: SGLang's command and the --kt-* flags. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from cluster.engines import command
from cluster.engines.base import Launch, LaunchContext, MetricNames, PortNeed, Probes
from cluster.engines.sglang import adapter as sglang
from cluster.engines.sglang.flags import rendezvous_ports, server_flags
from cluster.engines.sglang.metrics import METRICS
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import IslandSpec, PoolSpec


class KTransformersAdapter:
    """`sglang-kt` with KT-Kernel. How many experts stay on the GPUs, and how many threads serve the
    rest, is the pool's to say in `engine_args` (kt-num-gpu-experts, kt-cpuinfer, ...)."""

    name = "ktransformers"
    metrics: MetricNames = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        return (PortNeed("http"), *rendezvous_ports(pool))

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        if context.role is not Role.MIXED:
            raise InvalidInput(
                f"pools[{context.pool.name}].role: found {context.role}; KTransformers hands no KV "
                "to another engine; write `role: mixed`"
            )
        # The experts on the CPU are read from the same folder unless engine_args say another.
        return sglang.launch(
            context, {**server_flags(context), "kt-weight-path": context.model_path}
        )

    def probes(self, context: LaunchContext) -> Probes:
        return Probes(version="/server_info")

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return {}

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        return command.why_fixed_role(pool, "ktransformers hands no KV over: its pools are mixed")

    def connector_version(self, context: LaunchContext) -> str:
        return "none"
