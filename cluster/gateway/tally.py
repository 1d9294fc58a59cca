"""What this replica counts for the controller: traffic per pair of pools, and notes for people.

Totals since it started. Requests count straight into their pair's `PairCounts`: plain attributes,
because a labelled metric costs ten times as much. What many requests have in common, such as the
death of the engine that they were at, becomes one note per second. Called by: gateway.exchange,
gateway.answer; read by gateway.reports.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Set
from dataclasses import dataclass

from cluster.gateway.route import Route
from cluster.gateway.standing import Standings
from cluster.identity import WorkerId
from cluster.traffic import GatewayNote, GatewayReport, PairTraffic, SpreadCounter

NOTES_KEPT = 32


class PairCounts:
    """See traffic.PairTraffic."""

    __slots__ = (
        "answer_tokens",
        "arrived",
        "finished",
        "held_tokens",
        "prompt_tokens",
        "tpot_s",
        "ttft_s",
    )

    def __init__(self) -> None:
        self.arrived = 0
        self.finished = 0
        self.prompt_tokens = 0
        self.held_tokens = 0
        self.answer_tokens = 0
        self.ttft_s = SpreadCounter()
        self.tpot_s = SpreadCounter()

    def finish(self, prompt_tokens: int, held_tokens: int, answer_tokens: int) -> None:
        """A request was answered. 0: not known."""
        self.finished += 1
        self.prompt_tokens += prompt_tokens
        self.held_tokens += min(held_tokens, prompt_tokens)
        self.answer_tokens += answer_tokens

    def traffic(self, prefill: str, decode: str) -> PairTraffic:
        return PairTraffic(
            prefill,
            decode,
            arrived=self.arrived,
            finished=self.finished,
            prompt_tokens=self.prompt_tokens,
            held_tokens=self.held_tokens,
            answer_tokens=self.answer_tokens,
            ttft_s=self.ttft_s.spread(),
            tpot_s=self.tpot_s.spread(),
        )


@dataclass(slots=True)
class _Alike:
    """Answers that fared alike since the last report."""

    request_id: str  # of the first
    why: str  # of the first
    count: int = 0


class Tally:
    """Owned by one event loop. `gateway`: the replica's own id; `wall_s`: seconds since 1970."""

    def __init__(self, gateway: str, wall_s: Callable[[], float]) -> None:
        self.gateway = gateway
        self.standings = Standings(wall_s)
        self._wall_s = wall_s
        self._pairs: dict[tuple[str, str], PairCounts] = {}
        self._notes: deque[GatewayNote] = deque(maxlen=NOTES_KEPT)
        self._noted = 0
        self._recoveries = 0
        self._continued: dict[tuple[str, str], _Alike] = {}
        self._lost: dict[str, _Alike] = {}

    def pair(self, route: Route) -> PairCounts:
        """The counts of the pools that `route` goes through."""
        key = (route.prefill.id.pool if route.prefill else "", route.decode.id.pool)
        counts = self._pairs.get(key)
        if counts is None:
            counts = self._pairs[key] = PairCounts()
        return counts

    def pairs(self, besides: Iterable[tuple[str, str]] = ()) -> tuple[PairTraffic, ...]:
        """All of them, now. `besides`: pairs to be shown from nought, if nothing went there yet."""
        silent = (PairTraffic(*key) for key in sorted(set(besides) - self._pairs.keys()))
        return (*(counts.traffic(*key) for key, counts in self._pairs.items()), *silent)

    def continued(self, worker: str, cause: str, request_id: str) -> None:
        """An answer that `worker` had begun goes on with another."""
        self._recoveries += 1
        alike = self._continued.setdefault((worker, cause), _Alike(request_id, cause))
        alike.count += 1

    def lost(self, worker: str, why: str, request_id: str) -> None:
        """A request of which `worker` was the last, and that got an error for an answer."""
        self._lost.setdefault(worker, _Alike(request_id, why)).count += 1

    def poisonous(self, workers: tuple[str, ...], request_id: str) -> None:
        """`workers` went away under one request."""
        names = ", ".join(workers)
        text = f"{names} went away while they worked on it; it was given to no other"
        self._note("RequestPoisonous", request_id, text, request_id)

    def report(
        self,
        snapshot_version: int,
        running: int,
        queued: int,
        refused: int,
        present: Set[WorkerId] = frozenset(),
    ) -> GatewayReport:
        """All of it, now. `present`: the workers that there are."""
        for (worker, cause), alike in self._continued.items():
            text = f"{_answers(alike.count)} went on elsewhere ({cause})"
            self._note("AnswerContinued", worker, text, alike.request_id)
        for worker, alike in self._lost.items():
            text = f"{_answers(alike.count)} ended with an error: {alike.why}"
            self._note("AnswerLost", worker, text, alike.request_id)
        self._continued.clear()
        self._lost.clear()
        return GatewayReport(
            gateway=self.gateway,
            at_s=self._wall_s(),
            snapshot_version=snapshot_version,
            running=running,
            queued=queued,
            refused=refused,
            recoveries=self._recoveries,
            pairs=self.pairs(),
            notes=tuple(self._notes),
            standings=self.standings.standings(present),
        )

    def _note(self, kind: str, subject: str, text: str, request_id: str) -> None:
        self._noted += 1
        self._notes.append(
            GatewayNote(self._noted, self._wall_s(), kind, subject, text, request_id)
        )


def _answers(count: int) -> str:
    return "1 answer" if count == 1 else f"{count} answers"
