"""What is wanted (DesiredState) and what is shown (ClusterStatus). Values only.

DesiredState is written by the launcher, kept in Ray's GCS key-value store, and survives the
controller. It holds no secret: the engines' key has an entry of its own (control.store).
ClusterStatus is made anew for whoever asks.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict

from cluster.control.events import Told
from cluster.identity import Role, WorkerId
from cluster.snapshot import Link
from cluster.topology.schema import PoolSpec, ServingSpec, SimulatedSpec
from cluster.workers.report import WorkerReport
from cluster.workers.spec import WorkerSpec

# Engines whose arguments say how the pools at the other end of their links are split.
_TOLD_OF_PEERS = frozenset({"vllm_ascend"})
# What a worker that is not wanted any more gets to finish what it has, if nobody says otherwise.
DRAIN_GRACE_S = 300.0


class Rollout(BaseModel):
    """A change of what engines are told, under way. `before` is what it goes back to."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    change: int  # id of the Change
    pools: tuple[str, ...]  # whose workers are replaced
    before: ServingSpec
    surge: bool = True


class DesiredState(BaseModel):
    """What a cluster should serve, and what `up` found out about the model.

    `pools[].replicas.initial` is what is wanted now. `roles`: workers (POOL/INDEX) that serve in
    another role than their pool. `drained_nodes`: Ray's ids of nodes that take no workers, and
    their addresses, which nobody else tells once no worker is there."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    cluster: str
    serving: ServingSpec
    model_path: str
    model_digest: str
    max_model_len_tokens: int
    kv_bytes_per_token: int
    host: str = ""  # address that engines bind; "": each node's own Ray address
    roles: dict[str, Role] = {}
    drained_nodes: dict[str, str] = {}
    grace_s: float = DRAIN_GRACE_S  # as whoever last made workers superfluous said
    rollout: Rollout | None = None

    def role_of(self, worker: WorkerId) -> Role:
        """The role it is to serve in. Raises: KeyError: there is no such pool."""
        return self.roles.get(worker.name) or self.serving.pool(worker.pool).role

    def revision(self, name: str) -> str:
        """Digest of what the engines of a pool are told, less what can be changed while they run,
        and after an @ the revision of the model. Defaults are left out: a later version's further
        keys make no new revision.

        Raises: KeyError."""
        pool, island = self.serving.pool(name), self.serving.island_of(name)
        told = {
            "pool": _told(pool),
            "model": self.serving.model_of(name).model_dump(mode="json", exclude_defaults=True),
            "connector": island.connector,
            "lease_s": island.lease_s,
            "hung_after_s": self.serving.health.hung_after_s,
            "peers": [_shape(peer) for peer in self.serving.peers_of(name)]
            if pool.engine in _TOLD_OF_PEERS
            else [],
            "files": self.model_digest,
            "max_model_len_tokens": self.max_model_len_tokens,
        }
        digest = hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]
        return f"{digest}@{self.serving.model_of(name).revision or 'main'}"

    def pool(self, name: str) -> PoolSpec | None:
        return next((pool for pool in self.serving.pools if pool.name == name), None)

    def kv_bytes_per_token_of(self, pool: PoolSpec) -> int:
        """A simulated engine's blocks have the size its own config says."""
        if pool.engine == "simulated":
            return (pool.simulated or SimulatedSpec()).kv_bytes_per_token
        return self.kv_bytes_per_token

    def worker_spec(self, worker: WorkerId, engine_key: str) -> WorkerSpec:
        """What rank 0 of a new generation is told. Raises: KeyError: there is no such pool."""
        pool = self.serving.pool(worker.pool)
        model = self.serving.model_of(worker.pool)
        path, digest = self.model_path, self.model_digest
        if model.id != self.serving.model.id:
            # Looked for on the pool's own nodes, by its engine.
            path, digest = model.id, f"id:{model.id}@{model.revision or 'main'}"
        return WorkerSpec(
            cluster=self.cluster,
            id=worker,
            role=self.role_of(worker),
            model=model,
            model_path=path,
            model_digest=digest,
            max_model_len_tokens=pool.max_model_len_tokens or self.max_model_len_tokens,
            kv_bytes_per_token=self.kv_bytes_per_token_of(pool),
            pool=pool,
            island=self.serving.island_of(worker.pool),
            health=self.serving.health,
            engine_key=engine_key,
            host=self.host,
            peers=self.serving.peers_of(pool.name),
            revision=self.revision(pool.name),
            avoided_nodes=tuple(self.drained_nodes),
        )


def model_revision_of(revision: str) -> str:
    """The model's part of a revision; "": not known."""
    return revision.partition("@")[2]


def _told(pool: PoolSpec) -> object:
    left_out = {"replicas", "relative_speed"}
    return pool.model_dump(mode="json", exclude_defaults=True, exclude=left_out)


def _shape(pool: PoolSpec) -> object:
    parts = {"name", "role", "parallel", "nodes_per_replica"}
    return pool.model_dump(mode="json", exclude_defaults=True, include=parts)


@dataclass(frozen=True, slots=True)
class PoolStatus:
    """One pool: how many replicas are wanted, exist, and take work."""

    name: str
    role: Role
    engine: str
    desired: int
    present: int
    ready: int


@dataclass(frozen=True, slots=True)
class FailedSlot:
    """A place of a pool whose worker failed, and when it gets or got the next one."""

    worker: str  # pool/index
    failures: int  # in a row
    restart_in_s: float | None  # None: the next one is there
    why: str  # of the latest failure
    last_words: tuple[str, ...] = ()  # tail of the failed engine's log


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """A pair of pools over which KV may move, and what stands against it."""

    link: Link
    is_open: bool
    mismatches: tuple[str, ...] = ()  # plain sentences, one per pair of unlike workers


@dataclass(frozen=True, slots=True)
class SilentHost:
    """A host that is not heard of any more and was not ended on request."""

    address: str
    since_s: float  # wall clock; when this controller noticed
    why: str


class LogWindow(NamedTuple):
    """A piece of an engine's log, where the next one begins, and whose log it is: the offsets of
    another generation are another file's."""

    data: bytes
    next_offset: int
    generation: int


@dataclass(frozen=True, slots=True)
class ClusterStatus:
    """The cluster as its controller sees it at this moment."""

    cluster: str
    model: str
    version: int
    controller_started_at_s: float  # wall clock
    pools: tuple[PoolStatus, ...]
    workers: tuple[WorkerReport, ...]
    failed: tuple[FailedSlot, ...]
    links: tuple[LinkStatus, ...]
    events: tuple[Told, ...]  # newest last
    silent_hosts: tuple[SilentHost, ...] = ()
