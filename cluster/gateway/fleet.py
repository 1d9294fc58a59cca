"""What one gateway replica knows of the workers right now.

The newest snapshot, prepared for routing; the requests this replica has sent since, and those at
work, to be told when their worker lets go of them; the workers that failed it a moment ago; and,
where engines publish KV events, which blocks each worker holds.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from cluster.errors import NoCapacity
from cluster.gateway.leaving import Why, leavings, to_drop
from cluster.gateway.route import Conditions, Facts, Route, Table, choose, compile_table
from cluster.identity import WorkerId
from cluster.kv.fingerprint import differences
from cluster.snapshot import Snapshot, WorkerView

# Long enough for the controller to notice a death and say so in the next snapshot.
_SUSPECT_FOR_S = 3.0


class HeldBlocks(Protocol):
    """How much of a prompt's beginning each worker holds; kv.index.BlockIndex is one."""

    def held_by_all(self, prompt_token_ids: Sequence[int]) -> Mapping[WorkerId, int]: ...


class AtWork(Protocol):
    """A request that a worker has in hand."""

    def let_go(self, worker: WorkerId, why: Why) -> None:
        """Go on elsewhere, now. Must not raise; may be told more than once."""
        ...


class Fleet:
    """Mutable, owned by one event loop. `choose` is its only decision, and that is pure."""

    def __init__(
        self,
        held: HeldBlocks,
        local_prefill_below_tokens: int,
        now_s: Callable[[], float],
        first_turn: int = 0,
    ) -> None:
        self._held = held
        self._local_prefill_below_tokens = local_prefill_below_tokens
        self._now_s = now_s
        self._turn = first_turn
        # Its own: a request that an engine renders first would else skip every other worker.
        self._side_turn = first_turn
        self._table = Table(Snapshot(version=0, cluster="", model=""))
        self._changed = asyncio.Event()
        self._in_flight: Counter[WorkerId] = Counter()
        self._in_flight_then: Mapping[WorkerId, int] = {}
        self._suspect_until_s: dict[WorkerId, float] = {}
        self._at_work: dict[WorkerId, set[AtWork]] = {}

    @property
    def table(self) -> Table:
        return self._table

    @property
    def snapshot(self) -> Snapshot:
        return self._table.snapshot

    def in_flight(self, worker: WorkerId) -> int:
        return self._in_flight[worker]

    def update(self, snapshot: Snapshot) -> list[str]:
        """Take over a newer snapshot, and tell the requests whose workers let go of them. Returns
        the addresses of engines whose connections are to be broken: they are gone, or hang."""
        left = leavings(self.snapshot, snapshot)
        drop = to_drop(left, snapshot)
        self._table = compile_table(snapshot, differences)
        self._in_flight_then = dict(self._in_flight)
        current = {view.id for view in snapshot.workers}
        for worker in [known for known in self._suspect_until_s if known not in current]:
            del self._suspect_until_s[worker]
        for worker in [known for known, count in self._in_flight.items() if count == 0]:
            del self._in_flight[worker]
        for worker in [known for known, requests in self._at_work.items() if not requests]:
            del self._at_work[worker]
        self._changed.set()
        self._changed = asyncio.Event()
        for leaving in left:
            for request in tuple(self._at_work.get(leaving.worker, ())):
                request.let_go(leaving.worker, leaving.why)
        return drop

    async def changed(self) -> None:
        """Wait for the next snapshot."""
        await self._changed.wait()

    def suspect(self, worker: WorkerId) -> None:
        """Send `worker` nothing for a moment if anything else will do."""
        self._suspect_until_s[worker] = self._now_s() + _SUSPECT_FOR_S

    def busy(self, worker: WorkerId) -> Busy:
        """Count one request of ours at `worker` for as long as the `with` block lasts."""
        return Busy(self._in_flight, worker)

    def join(self, worker: WorkerId, request: AtWork) -> None:
        """`request` is to be told when `worker` lets go of it, until it parts."""
        requests = self._at_work.get(worker)
        if requests is None:
            requests = self._at_work[worker] = set()
        requests.add(request)

    def part(self, worker: WorkerId, request: AtWork) -> None:
        """It has nothing at `worker` any more."""
        self._at_work[worker].discard(request)

    def choose(
        self,
        facts: Facts,
        prompt_ids: Sequence[int] = (),
        excluded: frozenset[WorkerId] = frozenset(),
        failure: str = "",
        may_prefill_elsewhere: bool = True,
        avoided: frozenset[WorkerId] = frozenset(),
    ) -> tuple[Route, int]:
        """The route, and how many prompt tokens its decode worker is known to hold.

        `prompt_ids` empty: do not look for held blocks. `avoided`: only if nobody else will do.
        Raises: NoCapacity.
        """
        held = self._held.held_by_all(prompt_ids) if prompt_ids else {}
        self._turn += 1
        route = self._choose(
            self._turn, facts, held, excluded, failure, may_prefill_elsewhere, avoided
        )
        return route, held.get(route.decode.id, 0)

    def route_beside(
        self, facts: Facts, worker: WorkerId, excluded: frozenset[WorkerId]
    ) -> Route | None:
        """Where a request might go if `worker` were not there; None: nowhere. Takes no turn."""
        try:
            return self._choose(self._turn, facts, excluded=excluded | {worker})
        except NoCapacity:
            return None

    def any_decoder(self) -> WorkerView:
        """A worker for side work (rendering, tokenising). Raises: NoCapacity."""
        self._side_turn += 1
        return self._choose(self._side_turn, Facts(alone="side-work")).decode

    def _choose(
        self,
        turn: int,
        facts: Facts,
        held: Mapping[WorkerId, int] | None = None,
        excluded: frozenset[WorkerId] = frozenset(),
        failure: str = "",
        may_prefill_elsewhere: bool = True,
        avoided: frozenset[WorkerId] = frozenset(),
    ) -> Route:
        return choose(
            self._table,
            facts,
            Conditions(
                sent=self._sent(),
                held_tokens=held or {},
                excluded=excluded,
                suspects=self._suspects() | avoided,
                turn=turn,
                local_prefill_below_tokens=self._local_prefill_below_tokens,
                failure=failure,
                may_prefill_elsewhere=may_prefill_elsewhere,
            ),
        )

    def _sent(self) -> dict[WorkerId, int]:
        then = self._in_flight_then
        return {
            worker: count - then.get(worker, 0)
            for worker, count in self._in_flight.items()
            if count != then.get(worker, 0)
        }

    def _suspects(self) -> frozenset[WorkerId]:
        if not self._suspect_until_s:
            return frozenset()
        now_s = self._now_s()
        return frozenset(
            worker for worker, until_s in self._suspect_until_s.items() if until_s > now_s
        )


class Busy:
    """See `Fleet.busy`. A class because a generator would cost three times as much per request."""

    __slots__ = ("_counts", "_worker")

    def __init__(self, counts: Counter[WorkerId], worker: WorkerId) -> None:
        self._counts = counts
        self._worker = worker

    def __enter__(self) -> None:
        self._counts[self._worker] += 1

    def __exit__(self, *failure: object) -> None:
        self._counts[self._worker] -= 1
