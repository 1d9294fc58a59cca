"""The simulated engine as an EngineAdapter: its whole configuration stands in argv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster.engines import command
from cluster.engines.base import Launch, LaunchContext, MetricNames, PortNeed, Probes
from cluster.engines.command import head_port
from cluster.engines.simulated.config import (
    EventsConfig,
    FaultSpec,
    KvConfig,
    KvRole,
    RanksConfig,
    SimulatedConfig,
    meets_in_rooms,
)
from cluster.engines.simulated.handover import FAKE_BOOTSTRAP_HOST
from cluster.engines.vllm import kv
from cluster.engines.vllm.adapter import METRICS
from cluster.engines.vllm.flags import RENDEZVOUS, rendezvous_ports
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import ConnectorName, IslandSpec, PoolSpec, SimulatedSpec

SIDE_CHANNEL = "kv_transfer"
DEFAULT_BLOCK_SIZE_TOKENS = 16
DEFAULT_MAX_MODEL_LEN_TOKENS = 131_072
# `engine_args` that this engine knows.
_FAULTS, _FAULT_ENDPOINT, _SGLANG_METRICS = "faults", "fault-endpoint", "sglang-metrics"
_CORE_PROCESS = "core-process"
_KNOWN_ARGS = {_CORE_PROCESS, _FAULTS, _FAULT_ENDPOINT, _SGLANG_METRICS}

_ROLES: Mapping[Role, KvRole] = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


class SimulatedAdapter:
    """vLLM's API and metrics, and whichever connector's flow the island names; see the package."""

    name = "simulated"
    metrics: MetricNames = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        needs = [PortNeed("http"), PortNeed(kv.EVENTS), PortNeed(kv.REPLAY)]
        needs += rendezvous_ports(pool)
        if kv.moves_kv(pool.role):
            needs.append(PortNeed(SIDE_CHANNEL))
            if _has_bootstrap(island.connector) and pool.role is Role.PREFILL:
                needs.append(PortNeed(kv.BOOTSTRAP))
        return tuple(needs)

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        config = _config(context).model_dump_json(exclude_defaults=True)
        return Launch(
            argv=(context.python, "-m", "cluster.engines.simulated", "--config-json", config),
            env=dict(context.pool.env),
            secret_env={"VLLM_API_KEY": context.engine_key},
            origins={"--config-json": "keys of the pool, the model and the island as one text"}
            | {name: f"pool.env.{name}" for name in context.pool.env},
        )

    def probes(self, context: LaunchContext) -> Probes:
        if kv.moves_kv(context.role) and meets_in_rooms(context.island.connector):
            alone = {"bootstrap_host": FAKE_BOOTSTRAP_HOST, "bootstrap_room": 0}
            return Probes(one_token=alone, death="/health")
        return Probes(death="/health")

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        address = kv.address(context)
        if kv.BOOTSTRAP in context.ports:
            address["bootstrap_port"] = context.ports[kv.BOOTSTRAP]
        return address

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        return command.why_fixed_role(pool, kv.why_fixed_role(island.connector))

    def connector_version(self, context: LaunchContext) -> str:
        return f"simulated {context.island.connector} 1"


def _has_bootstrap(connector: ConnectorName) -> bool:
    return connector == "mooncake" or meets_in_rooms(connector)


def _config(context: LaunchContext) -> SimulatedConfig:
    pool = context.pool
    args = {name.replace("_", "-"): value for name, value in pool.engine_args.items()}
    unknown = set(args) - _KNOWN_ARGS
    if unknown:
        raise InvalidInput(
            f"pools[{pool.name}].engine_args: found {', '.join(sorted(unknown))}; the simulated "
            f"engine knows {', '.join(sorted(_KNOWN_ARGS))}"
        )
    timings = pool.simulated or SimulatedSpec()
    limit = context.max_model_len_tokens
    return SimulatedConfig(
        host=context.host,
        port=context.ports["http"],
        served_model_name=context.model.public_name,
        model_path=context.model_path,
        max_model_len_tokens=limit or min(DEFAULT_MAX_MODEL_LEN_TOKENS, timings.kv_capacity_tokens),
        block_size_tokens=pool.block_size_tokens or DEFAULT_BLOCK_SIZE_TOKENS,
        max_num_seqs=pool.max_num_seqs or 256,
        num_speculative_tokens=(pool.speculative or {}).get("num_speculative_tokens", 0),
        timings=timings,
        kv=_kv(context),
        events=EventsConfig(
            endpoint=kv.endpoint(context.host, context.ports[kv.EVENTS]),
            replay_endpoint=kv.endpoint(context.host, context.ports[kv.REPLAY]),
        ),
        ranks=_ranks(context),
        faults=_faults(pool.name, args.get(_FAULTS) or {}),
        sglang_metrics=bool(args.get(_SGLANG_METRICS)),
        core_process=bool(args.get(_CORE_PROCESS)),
        fault_endpoint=bool(args.get(_FAULT_ENDPOINT)),
    )


def _faults(pool: str, stated: Any) -> FaultSpec:
    try:
        return FaultSpec.model_validate(stated)
    except ValidationError as error:
        raise InvalidInput(f"pools[{pool}].engine_args.{_FAULTS}: {error}") from error


def _ranks(context: LaunchContext) -> RanksConfig | None:
    if context.pool.nodes_per_replica == 1:
        return None
    return RanksConfig(
        nodes=context.pool.nodes_per_replica,
        node_rank=context.node_rank,
        head_host=context.head_host or context.host,
        head_port=head_port(context, RENDEZVOUS),
    )


def _kv(context: LaunchContext) -> KvConfig | None:
    if not kv.moves_kv(context.role):
        return None
    connector = context.island.connector
    return KvConfig(
        dialect=connector,
        role="kv_both" if connector == "nixl" else _ROLES[context.role],
        host=context.host,
        port=context.ports[SIDE_CHANNEL],
        bootstrap_port=context.ports.get(kv.BOOTSTRAP, 0),
        lease_s=context.island.lease_s,
    )
