"""The states of a worker: which moves exist, and the one place that makes them.

    STARTING ─▶ LOADING ─▶ WARMING ─▶ READY ◀──▶ HUNG
        └──────────┴───────────┴────────┴─────────┴──▶ DRAINING ─▶ STOPPED
        └──────────┴───────────┴────────┴─────────┴──▶ FAILED

Called by: workers.worker only. Reads no clock.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping

from cluster.identity import ENDED, WorkerState

log = logging.getLogger(__name__)


class Cause(enum.StrEnum):
    """What makes a worker change its state."""

    SPOKE = "the engine writes to its log"
    LISTENS = "the engine's HTTP port answers"
    GENERATED = "the engine generated a token"
    RUNS = "the process runs; this node of the replica has no HTTP port"
    STUCK = "no progress"
    MOVED = "progress again"
    STOP_ASKED = "stop was asked"
    GONE = "nothing of the engine is left"
    BROKE = "the engine failed"


_S = WorkerState
MOVES: Mapping[tuple[WorkerState, Cause], WorkerState] = {
    (_S.STARTING, Cause.SPOKE): _S.LOADING,
    # An engine without a model may listen before it ever wrote a line.
    (_S.STARTING, Cause.LISTENS): _S.WARMING,
    (_S.LOADING, Cause.LISTENS): _S.WARMING,
    (_S.WARMING, Cause.GENERATED): _S.READY,
    (_S.STARTING, Cause.RUNS): _S.READY,
    (_S.READY, Cause.STUCK): _S.HUNG,
    (_S.HUNG, Cause.MOVED): _S.READY,
    **{
        (state, Cause.STOP_ASKED): _S.DRAINING
        for state in (_S.STARTING, _S.LOADING, _S.WARMING, _S.READY, _S.HUNG)
    },
    **{
        (state, Cause.BROKE): _S.FAILED
        for state in (_S.STARTING, _S.LOADING, _S.WARMING, _S.READY, _S.HUNG)
    },
    (_S.DRAINING, Cause.GONE): _S.STOPPED,
}
_TIMED = (_S.STARTING, _S.LOADING, _S.WARMING)


class IllegalMove(Exception):
    """A mistake in our own code: no such move exists."""

    def __init__(self, state: WorkerState, cause: Cause) -> None:
        super().__init__(state, cause)
        self.state = state
        self.cause = cause

    def __str__(self) -> str:
        return f"a worker that is {self.state} cannot move because {self.cause}"


def step(state: WorkerState, cause: Cause) -> WorkerState:
    """Raises: IllegalMove."""
    try:
        return MOVES[state, cause]
    except KeyError:
        raise IllegalMove(state, cause) from None


class Lifecycle:
    """The state of one worker, why it is in it, and how long each start stage took."""

    def __init__(self, worker: str, now_s: float) -> None:
        self._worker = worker
        self._state = WorkerState.STARTING
        self._message = ""
        self._since_s = now_s
        self._stage_s: dict[str, float] = {}

    @property
    def state(self) -> WorkerState:
        return self._state

    @property
    def message(self) -> str:
        return self._message

    @property
    def has_ended(self) -> bool:
        return self._state in ENDED

    def stage_s(self, now_s: float) -> dict[str, float]:
        """Seconds per start stage, the present one counted up to `now_s`."""
        if self._state in _TIMED:
            return {**self._stage_s, self._state.value: now_s - self._since_s}
        return dict(self._stage_s)

    def move(self, cause: Cause, now_s: float, message: str = "") -> None:
        """The only writer of the state. Raises: IllegalMove."""
        was, took_s = self._state, now_s - self._since_s
        self._state = step(was, cause)
        self._message = message
        self._since_s = now_s
        if was in _TIMED:
            self._stage_s[was.value] = took_s
        log.info("%s %s was=%s took_s=%.2f cause=%s", self._worker, self._state, was, took_s, cause)

    def note(self, message: str) -> None:
        """Say something new of the same state."""
        self._message = message
