"""SGLang as an EngineAdapter. Pure.

Its key can be given in the command or in a configuration file only: it gets a file of its own,
which --config reads before the command line.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import PurePath

from cluster.engines import command
from cluster.engines.base import Launch, LaunchContext, MetricNames, PortNeed, Probes
from cluster.engines.command import Flags
from cluster.engines.packages import installed
from cluster.engines.sglang import kv
from cluster.engines.sglang.flags import (
    MODULE,
    argv,
    known_origins,
    rendezvous_ports,
    server_flags,
)
from cluster.engines.sglang.metrics import METRICS
from cluster.topology.schema import IslandSpec, PoolSpec

KEY_FILE = "sglang.yaml"
_TRANSFER_PACKAGES = {
    "sglang_mooncake": ("mooncake-transfer-engine", "mooncake-transfer-engine-cuda13"),
    "sglang_nixl": ("nixl-cu12", "nixl-cu13", "nixl"),
    "sglang_ascend": ("memfabric-hybrid", "memfabric_hybrid"),
}


class SglangAdapter:
    """SGLang 0.5.23 on CUDA; its Ascend build takes the same flags."""

    name = "sglang"
    metrics: MetricNames = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        return (PortNeed("http"), *rendezvous_ports(pool), *kv.ports(pool))

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        return launch(context, {**server_flags(context), **kv.flags(context)})

    def probes(self, context: LaunchContext) -> Probes:
        return Probes(version="/server_info", one_token=kv.probe(context.role))

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return kv.address(context)

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        reason = "sglang is started for one role (--disaggregation-mode); another takes a new start"
        return command.why_fixed_role(pool, reason)

    def connector_version(self, context: LaunchContext) -> str:
        connector = context.island.connector
        version = installed(context.python, _TRANSFER_PACKAGES.get(connector, ()))
        return f"{connector} {version or 'of unknown version'}"


def launch(context: LaunchContext, flags: Flags) -> Launch:
    """A server with these flags, the pool's `engine_args` over them, and its key in a file."""
    flags = flags | command.passed_through(context.pool)
    flags["config"] = f"{context.runtime_dir}/{KEY_FILE}" if context.engine_key else None
    env = {**_env(context), **context.pool.env}
    return Launch(
        argv=(context.python, *MODULE, *argv(flags)),
        env=env,
        origins=command.origins(flags, env, context.pool, known_origins(context)),
        # Quoted as JSON is, which is YAML too: a key of digits only must stay text.
        secret_files={KEY_FILE: f"api-key: {json.dumps(context.engine_key)}\n"}
        if context.engine_key
        else {},
    )


def _env(context: LaunchContext) -> dict[str, str]:
    env = {"SGLANG_HOST_IP": context.host, "PYTHONHASHSEED": "0"}
    if PurePath(context.model_path).is_absolute():
        env["HF_HUB_OFFLINE"] = "1"
    spans = context.pool.nodes_per_replica > 1 or kv.moves_kv(context.role)
    if context.interface and spans:
        collectives = "HCCL" if context.host_facts.platform == "npu" else "NCCL"
        env |= {
            f"{collectives}_SOCKET_IFNAME": context.interface,
            "GLOO_SOCKET_IFNAME": context.interface,
        }
    return env
