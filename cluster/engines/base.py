"""The adapter protocol: all that pdcluster needs to know of an engine.

In: what the topology says and where the engine will run. Out: exactly the command its vendor
documents, its environment, its ports, how to tell that it is ready, and what its metrics are
called. Adapters are pure: they start nothing and read no clock. `workers` acts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from cluster.identity import Role, WorkerId
from cluster.topology.schema import IslandSpec, ModelSpec, PoolSpec

Platform = Literal["cpu", "cuda", "npu"]


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What a node is, as far as a command line depends on it."""

    platform: Platform
    cpu_flags: frozenset[str] = frozenset()
    cores: int = 1


@dataclass(frozen=True, slots=True)
class PortNeed:
    """`span` consecutive ports under one name; the first is the one in `LaunchContext.ports`.

    `window`: where they must lie; None: wherever the node has room for engines."""

    name: str
    span: int = 1
    window: range | None = None


@dataclass(frozen=True, slots=True)
class LaunchContext:
    """One node of one replica, about to start."""

    worker: WorkerId
    role: Role
    model: ModelSpec
    model_path: str  # local folder, or hub id
    pool: PoolSpec
    island: IslandSpec
    host: str  # the address peers reach this node at; also what the engine binds
    host_facts: HostFacts
    ports: Mapping[str, int]
    runtime_dir: str  # private to this worker generation; removed with it
    python: str  # interpreter that runs the engine
    engine_key: str  # bearer token of the engine's own HTTP port
    node_rank: int = 0
    head_host: str = ""  # rank 0's address, for replicas that span nodes
    head_ports: Mapping[str, int] = field(default_factory=dict)  # what rank 0 reserved
    peers: tuple[PoolSpec, ...] = ()  # pools at the other end of this pool's links
    # Accelerators that Ray gave this worker, by the numbers its visible-devices variable has.
    devices: tuple[str, ...] = ()
    interface: str = ""  # the network interface that has `host`; "": not found

    @property
    def max_model_len_tokens(self) -> int | None:
        """Longest prompt + answer; None: as the model's config says."""
        return self.pool.max_model_len_tokens or self.model.max_model_len_tokens


@dataclass(frozen=True, slots=True)
class Launch:
    """What to run. `secret_env` is merged into `env` at exec time and never printed.

    `origins` says where each flag (`--max-num-seqs`) and variable came from: a key of the serving
    half relative to the pool, model or island (`pool.max_num_seqs`, `pool.engine_args.x`,
    `model.dtype`, `island.lease_s`), or a sentence of the adapter why it is set. What is not in
    it, the adapter sets for itself.

    `secret_files`: texts by name, for engines that read a secret from a file only. Each is in the
    worker's runtime folder before the start, readable by its user alone, and is never printed."""

    argv: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    secret_env: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)
    secret_files: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Probes:
    """How a running engine is asked how it is: paths on its HTTP port, and what its one-token
    generation needs besides model and prompt.

    `death`: the path that answers 5xx at once when the engine is dead behind a living HTTP server,
    and only then. "": it has none, as where a loaded engine may answer 503 too."""

    health: str = "/health"
    metrics: str = "/metrics"
    version: str = "/version"  # "": the engine does not tell
    one_token: Mapping[str, Any] = field(default_factory=dict)
    death: str = ""


@dataclass(frozen=True, slots=True)
class MetricNames:
    """Prometheus series of the engine. An empty name: the engine has no such series."""

    running: str
    waiting: str
    kv_usage: str
    prompt_tokens: str
    generation_tokens: str
    cache_info: str  # info series whose labels carry block_size and cache_dtype
    spec_drafts: str = ""
    spec_accepted: str = ""
    external_tokens: str = ""
    steps: str = ""
    block_size: str = ""  # gauge with the tokens of a KV block, where no info series has them
    spec_accepted_per_position: str = ""  # counter with a label `position`, from 0


class EngineAdapter(Protocol):
    """One engine. Implementations: see engines.registry."""

    name: str
    metrics: MetricNames

    def ports(self, pool: PoolSpec, island: IslandSpec) -> tuple[PortNeed, ...]:
        """Ports one node of a replica needs. Always contains `http`."""
        ...

    def launch(self, context: LaunchContext) -> Launch:
        """The exact command and environment. Raises: InvalidInput if the pool cannot work."""
        ...

    def probes(self, context: LaunchContext) -> Probes:
        """How to ask the engine that `launch` starts."""
        ...

    def kv_address(self, context: LaunchContext) -> Mapping[str, str | int]:
        """What `WorkerView.kv` must carry for the island's connector. Pure part only: what must
        be asked of the running engine (Mooncake's engine id) is the dialect's work."""
        ...

    def why_fixed_role(self, pool: PoolSpec, island: IslandSpec) -> str:
        """ "" if one running engine of this pool can serve as prefill and as decode: then `launch`
        gives the same command and environment for both. Else a sentence that says why a change of
        role takes a new start, or cannot be."""
        ...

    def connector_version(self, context: LaunchContext) -> str:
        """For the fingerprint: name and version of the package that moves the bytes."""
        ...
