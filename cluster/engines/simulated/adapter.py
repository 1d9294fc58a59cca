"""The simulated engine as an EngineAdapter: its whole configuration stands in argv."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from cluster.engines.base import Launch, LaunchContext, MetricNames, PortNeed
from cluster.engines.simulated.config import (
    EventsConfig,
    FaultSpec,
    KvConfig,
    KvRole,
    SimulatedConfig,
)
from cluster.engines.vllm import kv
from cluster.engines.vllm.adapter import METRICS
from cluster.errors import InvalidInput
from cluster.identity import Role
from cluster.topology.schema import IslandSpec, PoolSpec, SimulatedSpec

SIDE_CHANNEL = "kv_transfer"
DEFAULT_BLOCK_SIZE_TOKENS = 16
DEFAULT_MAX_MODEL_LEN_TOKENS = 131_072
# `engine_args` that this engine knows.
_FAULTS, _FAULT_ENDPOINT = "faults", "fault-endpoint"

_ROLES: Mapping[Role, KvRole] = {Role.PREFILL: "kv_producer", Role.DECODE: "kv_consumer"}


class SimulatedAdapter:
    """Same API, metrics and dialects as vLLM; see the package."""

    name = "simulated"
    metrics: MetricNames = METRICS

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        needs = [PortNeed("http"), PortNeed(kv.EVENTS), PortNeed(kv.REPLAY)]
        if kv.moves_kv(pool.role):
            needs.append(PortNeed(SIDE_CHANNEL))
            if island.connector == "mooncake" and pool.role is Role.PREFILL:
                needs.append(PortNeed(kv.BOOTSTRAP))
        return tuple(needs)

    def launch(self, context: LaunchContext) -> Launch:
        """Raises: InvalidInput."""
        if context.pool.nodes_per_replica > 1:
            raise InvalidInput(
                f"pools[{context.pool.name}].nodes_per_replica: found "
                f"{context.pool.nodes_per_replica}; a simulated replica has one node; write 1"
            )
        config = _config(context).model_dump_json(exclude_defaults=True)
        return Launch(
            argv=(context.python, "-m", "cluster.engines.simulated", "--config-json", config),
            env=dict(context.pool.env),
            secret_env={"VLLM_API_KEY": context.engine_key},
        )

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        return kv.address(context)

    def connector_version(self, context: LaunchContext) -> str:
        return f"simulated {context.island.connector} 1"


def _config(context: LaunchContext) -> SimulatedConfig:
    pool = context.pool
    args = {name.replace("_", "-"): value for name, value in pool.engine_args.items()}
    unknown = set(args) - {_FAULTS, _FAULT_ENDPOINT}
    if unknown:
        raise InvalidInput(
            f"pools[{pool.name}].engine_args: found {', '.join(sorted(unknown))}; the simulated "
            f"engine knows {_FAULTS} and {_FAULT_ENDPOINT}"
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
        faults=_faults(pool.name, args.get(_FAULTS) or {}),
        fault_endpoint=bool(args.get(_FAULT_ENDPOINT)),
    )


def _faults(pool: str, stated: Any) -> FaultSpec:
    try:
        return FaultSpec.model_validate(stated)
    except ValidationError as error:
        raise InvalidInput(f"pools[{pool}].engine_args.{_FAULTS}: {error}") from error


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
