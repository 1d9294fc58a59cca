"""What is asked of a running cluster (an Ask), and how far it has got (a Change). Values only.

    Ask ─▶ control.controller changes the desired state ─▶ Change, RUNNING
        ─▶ every tick, control.progress looks how far it is ─▶ DONE, FAILED or REPLACED

Operators ask through the control API, the autoscaler directly; both in these words.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from typing import Literal, get_args

from cluster.identity import Role
from cluster.topology.schema import ServingSpec

DEFAULT_GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Scale:
    """Have `replicas` of a pool. Those too many end: they finish what they have for up to
    `grace_s`, then it goes on elsewhere."""

    pool: str
    replicas: int
    grace_s: float = DEFAULT_GRACE_S
    kind: Literal["scale"] = "scale"


@dataclass(frozen=True, slots=True)
class ChangeRole:
    """Have `worker` (POOL/INDEX) serve in another role: without a new start where its engine can
    do both, else, if `may_restart`, with one."""

    worker: str
    role: Role
    grace_s: float = DEFAULT_GRACE_S
    may_restart: bool = False
    kind: Literal["role"] = "role"


@dataclass(frozen=True, slots=True)
class DrainWorker:
    """End `worker` once it has finished what it has; its pool starts another in its place."""

    worker: str
    grace_s: float = DEFAULT_GRACE_S
    kind: Literal["drain-worker"] = "drain-worker"


@dataclass(frozen=True, slots=True)
class DrainNode:
    """Have no workers on a node (its address, or Ray's id of it): start others elsewhere, where
    there is room, then end those that are there. It stays so until `ReturnNode`.

    `may_end_service`: also where nobody would be left to prefill, or to decode."""

    node: str
    grace_s: float = DEFAULT_GRACE_S
    may_end_service: bool = False
    kind: Literal["drain-node"] = "drain-node"


@dataclass(frozen=True, slots=True)
class ReturnNode:
    """Let a drained node take workers again."""

    node: str
    kind: Literal["return-node"] = "return-node"


@dataclass(frozen=True, slots=True)
class Apply:
    """Serve as `serving` says. Pools whose engines would be told something else are replaced one
    worker at a time; `surge`: start the new one before the old one ends."""

    serving: ServingSpec
    grace_s: float = DEFAULT_GRACE_S
    surge: bool = True
    kind: Literal["apply"] = "apply"


Ask = Scale | ChangeRole | DrainWorker | DrainNode | ReturnNode | Apply
KINDS = tuple(str(ask.__dataclass_fields__["kind"].default) for ask in get_args(Ask))


class ChangeState(enum.StrEnum):
    RUNNING = "running"
    DONE = "done"
    FAILED = "failed"  # `why` says what stood against it, and what is as it was before
    REPLACED = "replaced"  # a later one asked for something else of the same workers


@dataclass(frozen=True, slots=True)
class Step:
    """Something got done, or stands in the way."""

    at_s: float  # wall clock
    text: str


@dataclass(frozen=True, slots=True)
class Measure:
    """A figure before and after a change: `ready to prefill` 1 3."""

    what: str
    unit: str  # s; "": none
    before: float | None
    after: float | None


@dataclass(frozen=True, slots=True)
class Change:
    """One ask and what has become of it."""

    id: int
    kind: str  # of the ask
    what: str  # in words: `scale prefill from 1 to 3`
    asked_by: str  # who, as they say: `ada@ops`, `autoscaler`
    asked_at_s: float  # wall clock
    state: ChangeState = ChangeState.RUNNING
    ended_at_s: float | None = None
    waits_for: str = ""  # while RUNNING: what is missing, in words; "" once it has ended
    why: str = ""  # of FAILED and REPLACED
    steps: tuple[Step, ...] = ()
    measures: tuple[Measure, ...] = ()  # its effect, once DONE
    pools: tuple[str, ...] = ()  # whose workers it is about; (): any

    @property
    def took_s(self) -> float | None:
        return None if self.ended_at_s is None else self.ended_at_s - self.asked_at_s


@dataclass(frozen=True, slots=True)
class PlanStep:
    """One thing that an Apply would do. `keys`: of `metadata.serving` that call for it."""

    what: str
    keys: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{', '.join(self.keys)}: {self.what}" if self.keys else self.what


@dataclass(frozen=True, slots=True)
class Plan:
    """What an Apply would do. `refused`: keys that a running cluster cannot be given, and what to
    do instead; an Apply of it is refused then."""

    steps: tuple[PlanStep, ...] = ()
    refused: tuple[PlanStep, ...] = field(default=())

    @property
    def is_empty(self) -> bool:
        return not self.steps and not self.refused
