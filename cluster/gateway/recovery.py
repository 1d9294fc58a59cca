"""What to try next when a worker failed a request that has not been answered yet. Pure.

A prefill worker that fails is left out. A decode worker that answers a server error to a request
whose blocks it was to pull has most likely failed to pull them: then the prefill worker is left
out first, and only an error without any pull counts against decode. After `prefill_attempts`
prefill workers, the island's policy decides (`route.choose` applies it). While another island can
serve the request, `route.choose` keeps away from the whole island of a worker that is left out:
power and switches fail by the rack, and tries are few.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from cluster.errors import EngineFailed
from cluster.gateway.route import Route
from cluster.identity import WorkerId


class Stage(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


@dataclass(frozen=True, slots=True)
class Tries:
    """What a request has been through so far."""

    attempts: int  # bound for prefill and for decode failures, each
    prefill_failures: int = 0
    decode_failures: int = 0
    excluded: frozenset[WorkerId] = frozenset()
    why: str = ""  # of the last failure: prefill-failed | pull-failed | decode-failed

    @property
    def may_prefill_elsewhere(self) -> bool:
        return self.prefill_failures < self.attempts

    @property
    def may_go_on(self) -> bool:
        return self.decode_failures < self.attempts


def after(tries: Tries, route: Route, stage: Stage, error: EngineFailed) -> Tries:
    """The next state of `tries` once `route` failed in `stage`."""
    pulled = route.prefill is not None
    if route.prefill is not None and (stage is Stage.PREFILL or error.status is not None):
        return replace(
            tries,
            prefill_failures=tries.prefill_failures + 1,
            excluded=tries.excluded | {route.prefill.id},
            why="prefill-failed" if stage is Stage.PREFILL else "pull-failed",
        )
    return replace(
        tries,
        decode_failures=tries.decode_failures + 1,
        excluded=tries.excluded | {route.decode.id},
        why="decode-failed" if pulled or not tries.why else tries.why,
    )


def attempt_budget_s(left_s: float, tries: Tries) -> float:
    """How long one prefill may take: the time left, shared between the prefill attempts that may
    still come and the decode that must."""
    return left_s / (max(0, tries.attempts - tries.prefill_failures) + 1)
