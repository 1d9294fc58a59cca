"""The changes that were asked of this cluster: begun, followed until they end, kept for a while.

Those that run are in the store, so that a restarted controller goes on following them; what it
follows them by is `progress.look`, which needs nothing else. Called by: control.loop.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pydantic import TypeAdapter

from cluster.control.changes import Apply, Ask, Change, ChangeState, Measure, Step
from cluster.control.events import ChangeAsked, ChangeEnded, Event, PoolsRolledBack, describe
from cluster.control.progress import Seen, look, ready_by_role
from cluster.identity import Role, WorkerId
from cluster.traffic import GatewayReport, added

CHANGES_KEPT = 200
_STEPS_KEPT = 60
_PERCENTILE = 95.0


@dataclass(frozen=True, slots=True)
class Record:
    """A change with what it takes to follow it. `target`: as progress.look."""

    change: Change
    ask: Ask
    pools: tuple[str, ...]
    target: str = ""
    before: Mapping[str, float] = field(default_factory=dict)
    failed_before: Mapping[str, int] = field(default_factory=dict)  # as progress.Seen


_RECORDS = TypeAdapter(tuple[Record, ...])


class History:
    """Owned by the controller. `emit`: where its events go. `wall_s`: wall clock in seconds."""

    def __init__(self, emit: Callable[[Event], None], wall_s: Callable[[], float]) -> None:
        self._emit = emit
        self._wall_s = wall_s
        self._records: dict[int, Record] = {}
        self._last_id = 0

    def restore(self, saved: bytes) -> None:
        """Take over what another controller left."""
        for record in _RECORDS.validate_json(saved or b"[]"):
            self._records[record.change.id] = record
        self._last_id = max(self._records, default=0)

    def saved(self) -> bytes:
        """All of it, for the store: the running ones, and the last that have ended."""
        return _RECORDS.dump_json(tuple(self._records.values()))

    def next_id(self) -> int:
        return self._last_id + 1

    def begin(
        self,
        ask: Ask,
        what: str,
        asked_by: str,
        why: str,
        pools: tuple[str, ...],
        target: str,
        seen: Seen,
        figures: Mapping[str, float],
    ) -> Change:
        """A change that was granted, of a cluster that was so at that moment."""
        self._last_id += 1
        change = Change(self._last_id, ask.kind, what, asked_by, self._wall_s(), pools=pools)
        failed = {
            f"{pool}/{index}": slot.failures
            for (pool, index), slot in seen.slots.items()
            if slot.failures
        }
        self._records[change.id] = Record(change, ask, pools, target, figures, failed)
        while len(self._records) > CHANGES_KEPT:
            del self._records[next(iter(self._records))]
        self._emit(ChangeAsked(what, change.id, asked_by, why))
        return change

    def note(self, event: Event, text: str | None = None) -> None:
        """An event may be a step of changes that run."""
        subject = getattr(event, "worker", None)
        if not isinstance(subject, WorkerId):
            return
        step = Step(self._wall_s(), text or describe(event))
        for record in self._running():
            if subject.pool in record.pools:
                steps = (*record.change.steps, step)[-_STEPS_KEPT:]
                self._put(record, replace(record.change, steps=steps))

    def follow(self, seen: Seen, figures: Mapping[str, float]) -> bool:
        """See how far those that run are. Whether one of them has ended."""
        has_ended = False
        for record in self._running():
            change = record.change
            now = replace(seen, failed_before=record.failed_before)
            outlook = look(record.ask, record.target, change.asked_at_s, now)
            if outlook.state is ChangeState.RUNNING:
                if outlook.text != change.waits_for:
                    self._put(record, replace(change, waits_for=outlook.text))
                continue
            has_ended = True
            self._end(record, outlook.state, outlook.text, figures)
        return has_ended

    def rolled_back(self, change: int, why: str, figures: Mapping[str, float]) -> None:
        """The rollout of a change went back."""
        record = self._records.get(change)
        pools = ", ".join(record.pools) if record is not None else ""
        self._emit(PoolsRolledBack(pools, change, why))
        if record is not None and record.change.state is ChangeState.RUNNING:
            text = f"{why}; all is as it was before"
            self._end(record, ChangeState.FAILED, text, figures)

    def replace_applies(self) -> None:
        """Another topology takes the place of those that are being applied."""
        for record in self._running():
            if isinstance(record.ask, Apply):
                self._end(record, ChangeState.REPLACED, "another topology was applied", {})

    def find(self, change: int) -> Change:
        """Raises: KeyError."""
        return self._records[change].change

    def all(self) -> tuple[Change, ...]:
        """Newest last."""
        return tuple(record.change for record in self._records.values())

    def has_running(self) -> bool:
        return bool(self._running())

    def _running(self) -> list[Record]:
        return [r for r in self._records.values() if r.change.state is ChangeState.RUNNING]

    def _put(self, record: Record, change: Change) -> None:
        self._records[change.id] = replace(record, change=change)

    def _end(
        self, record: Record, state: ChangeState, why: str, figures: Mapping[str, float]
    ) -> None:
        ended = replace(
            record.change,
            state=state,
            ended_at_s=self._wall_s(),
            waits_for="",
            why=why,
            measures=measures(record.before, figures) if figures else (),
        )
        self._put(record, ended)
        assert ended.took_s is not None
        self._emit(ChangeEnded(ended.what, ended.id, state.value, ended.took_s, why))


def figures(seen: Seen, gateways: Sequence[GatewayReport]) -> dict[str, float]:
    """What a change's effect is measured by: `what [unit]` and the value now."""
    ready = ready_by_role(seen.reports)
    found = {
        "ready to prefill": float(ready[Role.PREFILL]),
        "ready to decode": float(ready[Role.DECODE] + ready[Role.MIXED]),
        "requests in hand": float(sum(r.load.running + r.load.waiting for r in seen.reports)),
    }
    if gateways:
        found["answers gone on with another engine"] = float(sum(g.recoveries for g in gateways))
        found["requests refused"] = float(sum(g.refused for g in gateways))
        spreads = [pair.ttft_s for gateway in gateways for pair in gateway.pairs]
        ttft_s = added(spreads).percentile_s(_PERCENTILE)
        if ttft_s is not None:
            found[f"TTFT p{_PERCENTILE:g} so far [s]"] = ttft_s
    return found


def measures(before: Mapping[str, float], after: Mapping[str, float]) -> tuple[Measure, ...]:
    """Two sets of figures, side by side; what was nothing and is nothing is left out."""
    found: list[Measure] = []
    for name in dict.fromkeys((*before, *after)):
        if not before.get(name) and not after.get(name):
            continue
        what, _, unit = name.partition(" [")
        found.append(Measure(what, unit.rstrip("]"), before.get(name), after.get(name)))
    return tuple(found)
