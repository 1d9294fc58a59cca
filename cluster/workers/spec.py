"""All that one worker actor is told: a value, built by control, sent once, never changed."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.identity import Role, WorkerId
from cluster.topology.schema import HealthSpec, IslandSpec, ModelSpec, PoolSpec


@dataclass(frozen=True, slots=True)
class WorkerSpec:
    """One node of one replica generation."""

    cluster: str
    id: WorkerId
    role: Role
    model: ModelSpec
    model_path: str  # local folder, or hub id
    model_digest: str
    max_model_len_tokens: int
    kv_bytes_per_token: int
    pool: PoolSpec
    island: IslandSpec
    health: HealthSpec
    engine_key: str = field(repr=False)  # bearer token of the engine's HTTP port
    host: str = ""  # address to bind and to give to peers; "": the node's Ray address
    node_rank: int = 0
    peers: tuple[PoolSpec, ...] = ()  # pools at the other end of this pool's links
    # Digest of all that its engine was told: a worker of another revision is to be replaced.
    revision: str = ""
    avoided_nodes: tuple[str, ...] = ()  # Ray node ids that take no new workers now

    @property
    def owner(self) -> str:
        """The owner mark (settings.OWNER_ENV) of every process of this worker."""
        return f"{self.cluster}/{self.id}:{self.node_rank}"
