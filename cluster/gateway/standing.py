"""How each worker has served this replica: when it last answered, and what it has failed since.

    failed      a server error (5xx) to a request, noted once it is known what became of that: one
                that somebody else answered was not at fault itself
    with a peer decode failed a request whose blocks it was to pull: noted of both ends, because
                one such failure does not tell whose fault it was
    not noted   4xx; 503, by which an engine says that it is full; whatever broke off, hangs or is
                gone, which the workers' own watchdog sees; errors in the middle of an answer

What it means is for control.illness to say. Called by: gateway.exchange; read through tally.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace

from cluster.errors import EngineFailed
from cluster.gateway.errors import EngineLost
from cluster.gateway.recovery import Cause, Ended, Stage
from cluster.gateway.route import Route
from cluster.identity import WorkerId
from cluster.traffic import Failure, Standing

# Unlike failures kept of a worker: many more than it takes to judge it.
_KEPT = 32
_IS_FULL = 503


@dataclass(frozen=True, slots=True)
class Blame:
    """One failed attempt that says something about a worker."""

    worker: WorkerId
    peer: WorkerId | None
    at_s: float
    why: str


def _is_server_error(error: EngineFailed) -> bool:
    status = error.status  # None in the middle of an answer
    return (
        status is not None
        and status >= 500
        and status != _IS_FULL
        and not isinstance(error, EngineLost)
    )


class _Record:
    __slots__ = ("answered_at_s", "failures", "pulled_at_s")

    def __init__(self) -> None:
        self.answered_at_s = 0.0
        self.pulled_at_s = 0.0
        self.failures: dict[tuple[int, str], Failure] = {}

    def note(self, failure: Failure) -> None:
        key = (failure.request, failure.peer)
        before = self.failures.get(key)
        if before is not None:
            is_proven = before.is_proven or failure.is_proven
            failure = replace(failure, first_at_s=before.first_at_s, is_proven=is_proven)
        elif len(self.failures) >= _KEPT:
            # The oldest stay: they say how long it has been so.
            self.failures.popitem()
        self.failures[key] = failure


class Standings:
    """Owned by one event loop. `wall_s`: seconds since 1970."""

    def __init__(self, wall_s: Callable[[], float]) -> None:
        self._wall_s = wall_s
        self._records: dict[WorkerId, _Record] = {}

    def blame(self, route: Route, ended: Ended) -> Blame | None:
        """Whom an attempt that failed just now speaks against; None: nobody (see above)."""
        error = ended.error
        if ended.cause is not Cause.FAILED or not _is_server_error(error):
            return None
        at_s, why = self._wall_s(), f"{error.status}: {error.why}"
        if route.prefill is not None and ended.stage is Stage.PREFILL:
            return Blame(route.prefill.id, None, at_s, why)
        peer = route.prefill.id if route.prefill is not None else None
        return Blame(route.decode.id, peer, at_s, why)

    def answered(self, route: Route) -> None:
        """Its engines have answered a request, or a first part of the answer."""
        now_s = self._wall_s()
        has_pulled = route.prefill is not None
        for view in (route.decode, route.prefill):
            if view is None:
                continue
            record = self._of(view.id)
            record.answered_at_s = now_s
            if has_pulled:
                record.pulled_at_s = now_s
            if record.failures:
                kept = record.failures.items() if not has_pulled else ()
                record.failures = {key: failure for key, failure in kept if failure.peer}

    def failed(self, blames: Sequence[Blame], request: int, is_proven: bool) -> None:
        """What became of the request whose attempts failed so. `request`: says which it was."""
        for one in blames:
            ends = [(one.worker, str(one.peer) if one.peer is not None else "")]
            if one.peer is not None:
                ends.append((one.peer, str(one.worker)))
            for worker, peer in ends:
                failure = Failure(request, peer, one.at_s, one.at_s, is_proven, one.why)
                self._of(worker).note(failure)

    def standings(self, present: Set[WorkerId]) -> tuple[Standing, ...]:
        """Of all of `present` that have been asked anything; the others are forgotten."""
        for worker in [known for known in self._records if known not in present]:
            del self._records[worker]
        return tuple(
            Standing(
                str(worker),
                record.answered_at_s,
                record.pulled_at_s,
                tuple(record.failures.values()),
            )
            for worker, record in self._records.items()
        )

    def _of(self, worker: WorkerId) -> _Record:
        record = self._records.get(worker)
        if record is None:
            record = self._records[worker] = _Record()
        return record
