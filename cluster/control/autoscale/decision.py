"""What the autoscaler wants done and why, and what it remembers between decisions. Values only.

Written by `policy`; carried out by the controller, or printed when `scaling.dry_run` is set.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.identity import Role, WorkerId


@dataclass(frozen=True, slots=True)
class ScaleUp:
    """Start `by` more replicas of `pool`."""

    pool: str
    by: int
    why: str

    def __str__(self) -> str:
        return f"{self.pool} +{self.by}: {self.why}"


@dataclass(frozen=True, slots=True)
class ScaleDown:
    """Drain and stop `by` replicas that belong to `pool` and serve in it; which, is for the
    controller to choose."""

    pool: str
    by: int
    why: str

    def __str__(self) -> str:
        return f"{self.pool} -{self.by}: {self.why}"


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Let `worker` finish what it has, then serve in pool `target` with `role`."""

    worker: WorkerId
    source: str  # pool it serves in now
    target: str
    role: Role
    why: str

    def __str__(self) -> str:
        return f"{self.worker.name} {self.source} -> {self.target}: {self.why}"


Action = ScaleUp | ScaleDown | ChangeRole


@dataclass(frozen=True, slots=True)
class PoolVerdict:
    """What was found out about one pool. `need` is None where it cannot be known."""

    pool: str
    serving: int  # replicas, those on their way too
    ready: int
    need: int | None
    need_with_headroom: int | None
    why: str  # how the need comes about, or what is not known
    held: str = ""  # why nothing is done about a difference; "" if there is none

    def __str__(self) -> str:
        need = "?" if self.need is None else str(self.need)
        if self.need_with_headroom != self.need:
            need += f" ({self.need_with_headroom} with headroom)"
        held = f"; {self.held}" if self.held else ""
        return f"{self.pool} has {self.serving}, needs {need}: {self.why}{held}"


@dataclass(frozen=True, slots=True)
class Decision:
    """The actions, and for every pool with a target how it stands."""

    actions: tuple[Action, ...] = ()
    verdicts: tuple[PoolVerdict, ...] = ()

    def lines(self) -> tuple[str, ...]:
        """For people: one line per action, then one per pool."""
        return (*map(str, self.actions), *map(str, self.verdicts))


@dataclass(frozen=True, slots=True)
class NeedSample:
    """What a pool needed at one moment."""

    at_s: float
    need: int  # for the load, a queue and the correction included
    need_with_headroom: int  # for the load times 1 + headroom, without the queue


@dataclass(frozen=True, slots=True)
class PoolMemory:
    """A pool's past as far as it matters. Times are the caller's monotonic seconds."""

    samples: tuple[NeedSample, ...] = ()  # oldest first
    # Decode: measured (batch, step time in s), one per size of batch, smallest first.
    steps: tuple[tuple[float, float], ...] = ()
    gained_at_s: float | None = None
    lost_at_s: float | None = None
    had_traffic: bool = False
    # Load is taken this many times larger, because latency was worse than the load explains.
    correction: float = 1.0
    corrected_at_load: float = 0.0  # tokens/s when it was last raised
    missed_since_s: float | None = None

    @property
    def changed_at_s(self) -> float | None:
        known = [at_s for at_s in (self.gained_at_s, self.lost_at_s) if at_s is not None]
        return max(known, default=None)


@dataclass(frozen=True, slots=True)
class PolicyState:
    """What one decision leaves for the next. Lost, it costs the windows' time, nothing else.

    Step times are remembered by batch, however long ago they were measured: begin with a new state
    when a pool gets other engine arguments."""

    pools: Mapping[str, PoolMemory] = field(default_factory=dict)

    def of(self, pool: str) -> PoolMemory:
        return self.pools.get(pool, PoolMemory())
