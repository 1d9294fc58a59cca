"""What an engine worker says of itself.

Written by `workers.worker`, read by `control` and the CLI.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.identity import TAKES_WORK, Role, WorkerId, WorkerState
from cluster.snapshot import Fingerprint, Load


@dataclass(frozen=True, slots=True)
class Counters:
    """Totals since the engine started."""

    prompt_tokens: int = 0
    generation_tokens: int = 0
    external_tokens: int = 0  # prompt tokens that came by KV transfer
    spec_drafts: int = 0
    spec_accepted: int = 0
    transfers: int = 0
    transfer_failures: int = 0
    bytes_pulled: int = 0
    tokens_held: int = 0
    tokens_pulled: int = 0
    leases_open: int = 0  # prefill: granted and not yet taken, released or expired
    spec_accepted_per_position: tuple[int, ...] = ()  # of each draft's first token, its second, ...

    @property
    def acceptance_length(self) -> float | None:
        """Mean tokens per decode step: 1 + accepted / drafts (vLLM's definition)."""
        return 1 + self.spec_accepted / self.spec_drafts if self.spec_drafts else None

    @property
    def acceptance_per_position(self) -> tuple[float, ...]:
        """Share of the drafts whose token at this position was accepted, 0..1 (vLLM's definition);
        () without drafts, or from an engine that does not count them."""
        if not self.spec_drafts:
            return ()
        return tuple(count / self.spec_drafts for count in self.spec_accepted_per_position)


@dataclass(frozen=True, slots=True)
class WorkerReport:
    """One worker, now."""

    id: WorkerId
    role: Role
    state: WorkerState
    message: str  # why it is in this state, for people; "" when READY
    node_ip: str
    url: str
    started_at_s: float  # wall clock
    stage_s: Mapping[str, float] = field(default_factory=dict)  # seconds spent per start stage
    fingerprint: Fingerprint | None = None
    max_model_len_tokens: int = 0
    kv_bytes_per_token: int = 0
    kv: Mapping[str, str | int] = field(default_factory=dict)
    load: Load = field(default_factory=Load)
    counters: Counters = field(default_factory=Counters)
    rss_bytes: int = 0
    engine_pid: int | None = None
    last_words: tuple[str, ...] = ()  # tail of the engine's log once it FAILED
    # The controller's, which decides over roles: see snapshot.WorkerView.
    epoch: int = 0
    lets_go: bool = False
    revision: str = ""  # as its spec says
    node_id: str = ""  # Ray's id of rank 0's node; "": not placed yet
    node_ids: tuple[str, ...] = ()  # of all its ranks
    metrics_path: str = "/metrics"  # where its engine has them, below `url`
    log_lines_lost: int = 0  # lines of the engine's output that its log's disk did not take

    @property
    def takes_work(self) -> bool:
        return self.state in TAKES_WORK
