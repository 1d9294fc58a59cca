"""What the controller tells the gateways: one immutable, versioned picture of the cluster.

Built by `control`, pushed by long-poll, read by `gateway` and `kv`. Plain frozen dataclasses:
cheap to send, safe to share between tasks, and all that a routing decision may look at.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.identity import TAKES_WORK, Role, WorkerId, WorkerState


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What an engine's KV blocks are, as far as another engine must know before it reads them.

    Whether two of them fit is for `kv.fingerprint` to say.
    """

    model: str  # digest of config and weight files, or hub id and revision
    quantization: str
    kv_dtype: str
    block_size_tokens: int
    connector: str
    connector_version: str
    engine: str
    engine_version: str
    hash_seed: str
    hardware: str = ""  # as the pool states it; "": not stated
    tensor_parallel: int = 1


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine said of itself at the last scrape."""

    running: int = 0
    waiting: int = 0
    kv_usage: float = 0.0  # 0..1


@dataclass(frozen=True, slots=True)
class WorkerView:
    """One replica as gateways see it."""

    id: WorkerId
    role: Role
    island: str
    state: WorkerState
    url: str  # the engine's own HTTP address, http://127.0.0.1:20001
    fingerprint: Fingerprint | None
    max_model_len_tokens: int
    kv_bytes_per_token: int
    # What the connector's dialect needs to address this engine, e.g. Mooncake's bootstrap_addr.
    kv: Mapping[str, str | int] = field(default_factory=dict)
    load: Load = field(default_factory=Load)
    # Work that one replica does beside others; the fastest pool of its side has 1.
    relative_speed: float = 1.0
    # Grows with each change of its role. A worker is seen in one role per epoch, and in none
    # (CHANGING) between two.
    epoch: int = 0
    # Its grace is over, or it hangs: what it has in hand is to go on elsewhere, now.
    lets_go: bool = False
    # Which model its engine loaded, as the topology states it; answers are continued within one.
    model_revision: str = ""

    @property
    def takes_work(self) -> bool:
        return self.state in TAKES_WORK


@dataclass(frozen=True, slots=True)
class Link:
    """An allowed way for KV blocks between two pools of one island."""

    prefill_pool: str
    decode_pool: str
    connector: str
    lease_s: float
    on_prefill_failure: str  # recompute | fail


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The cluster at one moment. `version` only grows, also across controller restarts."""

    version: int
    cluster: str
    model: str  # the name clients use
    workers: tuple[WorkerView, ...] = ()
    links: tuple[Link, ...] = ()
    # The longest prompt + answer that any pool is meant to take, whether or not it is up.
    longest_tokens: int = 0

    def worker(self, worker_id: WorkerId) -> WorkerView | None:
        """The worker of exactly this generation, or None."""
        for view in self.workers:
            if view.id == worker_id:
                return view
        return None
