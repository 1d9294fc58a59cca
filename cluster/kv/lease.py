"""The states of one transfer, as the coordinator sees it. Pure.

    OFFERED ──prefilled──▶ GRANTED ──decode asked──▶ PULLING ──finished──▶ PULLED
       │                     │                          │
       │                     ├──lease ran out──▶ EXPIRED ◀──lease ran out──┤
       │                     │                          │
       └────── abandoned, or finished without a pull ───┴──▶ RELEASED
    OFFERED ──decode waits──▶ PULLING, where prefill keeps nothing (push, both together)
    any open state ──prefill worker replaced──▶ LOST

A call that comes after the end changes nothing; every other pair that is not in MOVES is a fault
of the caller. One test walks all pairs.
"""

from __future__ import annotations

import enum


class State(enum.StrEnum):
    OFFERED = "offered"  # prefill is being asked; it pins nothing yet, as far as we know
    GRANTED = "granted"  # prefill keeps the blocks for decode
    PULLING = "pulling"  # decode was told where they are, or waits for them
    PULLED = "pulled"  # decode has them; prefill lets go by itself
    RELEASED = "released"  # given up; prefill was told to let go
    EXPIRED = "expired"  # prefill let go by itself
    LOST = "lost"  # the prefill worker was replaced, its blocks are gone


class Cause(enum.StrEnum):
    PREFILLED = "prefilled"
    DECODE_ASKED = "decode asked"
    DECODE_WAITS = "decode waits"
    FINISHED = "finished"
    ABANDONED = "abandoned"
    LEASE_RAN_OUT = "lease ran out"
    WORKER_REPLACED = "worker replaced"


class Failure(enum.StrEnum):
    """Why a transfer's blocks did not get to decode. Metric labels."""

    PREFILL_FAILED = "prefill-failed"
    PULL_FAILED = "pull-failed"  # decode's engine answered an error instead of the blocks
    DECODE_FAILED = "decode-failed"
    HUNG = "hung"
    DRAINED = "drained"
    REFUSED = "refused"  # an engine had something against the request
    GIVEN_UP = "given-up"  # nobody's fault: the client left, or the request's time was up
    EXPIRED = "expired"  # prefill's lease ran out
    LOST = "lost"  # the prefill worker was replaced


ENDED = frozenset({State.PULLED, State.RELEASED, State.EXPIRED, State.LOST})

MOVES: dict[tuple[State, Cause], State] = {
    (State.OFFERED, Cause.PREFILLED): State.GRANTED,
    (State.GRANTED, Cause.DECODE_ASKED): State.PULLING,
    (State.PULLING, Cause.DECODE_ASKED): State.PULLING,
    (State.OFFERED, Cause.DECODE_WAITS): State.PULLING,
    (State.PULLING, Cause.FINISHED): State.PULLED,
    # Decode answered without having been told of the blocks: nobody will fetch them.
    (State.OFFERED, Cause.FINISHED): State.RELEASED,
    (State.GRANTED, Cause.FINISHED): State.RELEASED,
    # OFFERED too: prefill may have pinned blocks that its answer did not get to tell of.
    (State.OFFERED, Cause.ABANDONED): State.RELEASED,
    (State.GRANTED, Cause.ABANDONED): State.RELEASED,
    (State.PULLING, Cause.ABANDONED): State.RELEASED,
    (State.GRANTED, Cause.LEASE_RAN_OUT): State.EXPIRED,
    (State.PULLING, Cause.LEASE_RAN_OUT): State.EXPIRED,
    (State.OFFERED, Cause.WORKER_REPLACED): State.LOST,
    (State.GRANTED, Cause.WORKER_REPLACED): State.LOST,
    (State.PULLING, Cause.WORKER_REPLACED): State.LOST,
}


class IllegalMove(AssertionError):
    """A transfer was used in an order that makes no sense: a fault in our own code."""

    def __init__(self, state: State, cause: Cause) -> None:
        super().__init__(f"a transfer that is {state} cannot take: {cause}")
        self.state = state
        self.cause = cause


def step(state: State, cause: Cause) -> State:
    """The next state; `state` itself once it has ended. Raises: IllegalMove."""
    if state in ENDED:
        return state
    try:
        return MOVES[state, cause]
    except KeyError:
        raise IllegalMove(state, cause) from None
