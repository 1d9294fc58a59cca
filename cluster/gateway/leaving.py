"""Which workers are to be left, as a new snapshot tells. Pure.

    DRAINED  it is to end or changes its role, and the time that its requests had is over
    STOPPED  it has ended on request
    HUNG     it makes no progress; nobody waits for it any more
    GONE     it failed or was replaced. A host without power sends no FIN: only this tells

Requests that such a worker has in hand go on elsewhere (`attempt`), by the same loop as after a
failure. Only a drained one still does what it has: what cannot go on elsewhere may stay with it.
Called by: gateway.fleet, gateway.attempt.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable
from dataclasses import dataclass

from cluster.identity import ENDED, WorkerId, WorkerState
from cluster.snapshot import Snapshot, WorkerView


class Why(enum.StrEnum):
    DRAINED = "drained"
    STOPPED = "stopped"
    HUNG = "hung"
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Leaving:
    worker: WorkerId
    url: str
    why: Why


def leavings(before: Snapshot, after: Snapshot) -> tuple[Leaving, ...]:
    """The workers that let go of their requests, each with the first reason that fits.

    Gone is only what `after` says has ended or was replaced: a worker that is merely missing may be
    one that a restarted controller has not found again yet."""
    newest = {(view.id.pool, view.id.index): view for view in after.workers}
    # One that is being replaced may serve beside the next generation for a while.
    present = {view.id: view for view in after.workers}
    found: dict[WorkerId, Leaving] = {}
    for old in before.workers:
        why = _why_ended(old, present.get(old.id) or newest.get((old.id.pool, old.id.index)))
        if why is not None:
            found[old.id] = Leaving(old.id, old.url, why)
    for view in after.workers:
        if view.state is WorkerState.HUNG:
            found.setdefault(view.id, Leaving(view.id, view.url, Why.HUNG))
        elif view.lets_go and view.state not in ENDED:
            found.setdefault(view.id, Leaving(view.id, view.url, Why.DRAINED))
    return tuple(found.values())


def to_drop(left: Iterable[Leaving], after: Snapshot) -> list[str]:
    """Addresses of engines whose connections are of no use: also those of side work, which nobody
    tells. A drained engine keeps its own; an address that somebody has taken over stays."""
    useless = [leaving for leaving in left if leaving.why is not Why.DRAINED]
    hung = {leaving.worker for leaving in useless if leaving.why is Why.HUNG}
    used = {v.url for v in after.workers if v.state not in ENDED and v.id not in hung}
    return [leaving.url for leaving in useless if leaving.url not in used]


def _why_ended(old: WorkerView, new: WorkerView | None) -> Why | None:
    if new is None:
        return None
    if new.id == old.id and new.state in ENDED:
        return Why.STOPPED if new.state is WorkerState.STOPPED else Why.GONE
    if new.id.generation > old.id.generation:
        return Why.STOPPED if old.lets_go else Why.GONE
    return None
