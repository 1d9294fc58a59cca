"""What to try next when a worker did not answer a request, or not to its end. Pure.

    FAILED      the engine failed it. A prefill worker that fails is left out. A decode worker that
                answers a server error to a request whose blocks it was to pull has most likely
                failed to pull them: then the prefill worker is left out first, and only an error
                without any pull counts against decode
    HUNG        the same, noticed from outside
    DRAINED     the worker lets go of what it has (`leaving`): nobody failed
    RECOMPUTED  the engine gave it back, to be recomputed (`course`)

After `attempts` prefill failures the island's policy decides (`route.choose` applies it); after
`attempts` decode failures it is over. Each of the others has its own, wider bound. What says
nothing about the request costs no attempt: an engine that took no connection, or that is gone by
the controller's word and has broken none, is left out, and there are only so many. While another
island can serve the request, `route.choose` keeps away from the whole island of a worker that is
left out: power and switches fail by the rack, and tries are few.

A request under which two engines went away, before they had answered anything of it, is taken for
the cause (`is_poisonous`) and is given to no third, whatever the policy. `quarantine` sees to it
that its neighbours are not taken for it.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

from cluster.errors import EngineFailed
from cluster.gateway.errors import EngineLeft, EngineLost, EngineNotReached
from cluster.gateway.route import Route
from cluster.identity import WorkerId
from cluster.kv.lease import Failure

# An engine that is short of KV blocks may give a request back again and again.
_MOST_GIVEN_BACK = 8
# Engines that went away while the answer flowed from them. Each one has got it further.
_MOST_BREAKS = 8
_MOST_NOT_REACHED = 16
# Drains come as people and the autoscaler ask for them; a long answer may see many.
_MOST_MOVES = 32
_POISONOUS_AFTER = 2


class Stage(enum.StrEnum):
    PREFILL = "prefill"
    DECODE = "decode"


class Cause(enum.StrEnum):
    """What ended an attempt. Metric labels."""

    FAILED = "failed"
    HUNG = "hung"
    DRAINED = "drained"
    RECOMPUTED = "recomputed"


# Why an attempt was given up before the first byte: metric labels, too.
WHYS = (
    *("prefill-failed", "pull-failed", "decode-failed"),
    *(cause.value for cause in Cause if cause is not Cause.FAILED),
)


@dataclass(frozen=True, slots=True)
class Ended:
    """How an attempt ended that was not the last."""

    cause: Cause
    stage: Stage
    error: EngineFailed
    has_flowed: bool = False  # a part of the answer had come from this worker


@dataclass(frozen=True, slots=True)
class Tries:
    """What a request has been through so far."""

    attempts: int  # bound for prefill and for decode failures, each
    prefill_failures: int = 0
    decode_failures: int = 0
    breaks: int = 0
    not_reached: int = 0
    moves: int = 0
    given_back: int = 0
    excluded: frozenset[WorkerId] = frozenset()
    gave_back: frozenset[WorkerId] = frozenset()  # asked again only where nobody else will do
    lost: tuple[WorkerId, ...] = ()  # engines that went away under it, having answered nothing
    why: str = ""  # of the last failure: prefill-failed | pull-failed | decode-failed

    @property
    def may_prefill_elsewhere(self) -> bool:
        return self.prefill_failures < self.attempts

    @property
    def may_go_on(self) -> bool:
        return (
            self.decode_failures < self.attempts
            and self.breaks < _MOST_BREAKS
            and self.not_reached < _MOST_NOT_REACHED
            and self.moves <= _MOST_MOVES
            and self.given_back < _MOST_GIVEN_BACK
        )

    @property
    def may_move(self) -> bool:
        """Whether it is to leave one more drained worker that would let it stay."""
        return self.moves < _MOST_MOVES

    @property
    def is_poisonous(self) -> bool:
        return len(self.lost) >= _POISONOUS_AFTER

    @property
    def is_suspect(self) -> bool:
        """Whether one more loss would make it poisonous."""
        return len(self.lost) == _POISONOUS_AFTER - 1


def after(tries: Tries, route: Route, ended: Ended) -> Tries:
    """The next state of `tries` once `route` has come to nothing, or to a part of the answer."""
    match ended.cause:
        case Cause.DRAINED:
            return replace(tries, moves=tries.moves + 1)
        case Cause.RECOMPUTED:
            gave_back = tries.gave_back | {route.decode.id}
            return replace(tries, given_back=tries.given_back + 1, gave_back=gave_back)
        case Cause.FAILED | Cause.HUNG:
            return _after_failure(tries, route, ended)


def _after_failure(tries: Tries, route: Route, ended: Ended) -> Tries:
    prefill, error = route.prefill, ended.error
    is_lost = isinstance(error, EngineLost)
    is_pull = _is_pull(ended)
    if prefill is not None and (is_pull or ended.stage is Stage.PREFILL):
        failed = prefill.id
        why = "pull-failed" if is_pull else "prefill-failed"
    else:
        failed = route.decode.id
        why = "decode-failed" if prefill is not None or not tries.why else tries.why
    tries = replace(tries, excluded=tries.excluded | {failed}, why=why)
    if is_lost and not ended.has_flowed:
        tries = replace(tries, lost=(*tries.lost, failed))
    if isinstance(error, EngineNotReached):
        return replace(tries, not_reached=tries.not_reached + 1)
    if ended.has_flowed and isinstance(error, EngineLost | EngineLeft):
        return replace(tries, breaks=tries.breaks + 1)
    if isinstance(error, EngineLeft) and ended.cause is Cause.FAILED:
        # A death under the request breaks its connection long before the controller tells of it.
        return replace(tries, not_reached=tries.not_reached + 1)
    if prefill is not None and failed == prefill.id:
        return replace(tries, prefill_failures=tries.prefill_failures + 1)
    return replace(tries, decode_failures=tries.decode_failures + 1)


def transfer_failure(ended: Ended) -> Failure:
    """Why the blocks of an attempt with two workers did not get to decode, if they did not."""
    match ended.cause:
        case Cause.HUNG:
            return Failure.HUNG
        case Cause.DRAINED:
            return Failure.DRAINED
    if ended.stage is Stage.PREFILL:
        return Failure.PREFILL_FAILED
    return Failure.PULL_FAILED if _is_pull(ended) else Failure.DECODE_FAILED


def _is_pull(ended: Ended) -> bool:
    """Whether decode answered an error: it has most likely failed to pull the blocks."""
    is_lost = isinstance(ended.error, EngineLost)
    return ended.stage is Stage.DECODE and ended.error.status is not None and not is_lost


def attempt_budget_s(left_s: float, tries: Tries) -> float:
    """How long one prefill may take: the time left, shared between the prefill attempts that may
    still come and the decode that must."""
    return left_s / (max(0, tries.attempts - tries.prefill_failures) + 1)
