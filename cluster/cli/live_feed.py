"""What has been told of a cluster that is being watched: answers of GET /v1/live, put together.

Each holds what is new; a Feed holds the last quarter of an hour. Called by: cli.watch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cluster.control.autoscale.view import Scaling
from cluster.control.events import Told
from cluster.control.live import Live, WorkerLive
from cluster.control.wire import Looked

KEPT_S = 900.0
EVENTS_KEPT = 200

Value = float | None


class Feed:
    """`since` and `events_after` are to be sent with the next question."""

    def __init__(self) -> None:
        self.since = 0
        self.events_after = 0
        self.at_s: list[float] = []
        self.workers: dict[str, WorkerLive] = {}
        self.events: list[Told] = []
        self._series: dict[str, list[Value]] = {}
        self._now: tuple[Live, Scaling] | None = None

    @property
    def live(self) -> Live:
        """The last answer. Raises: AssertionError: there was none."""
        assert self._now is not None
        return self._now[0]

    @property
    def scaling(self) -> Scaling:
        """As `live`."""
        assert self._now is not None
        return self._now[1]

    def take(self, looked: Looked) -> None:
        """An answer to a question with `since` and `events_after` as they are."""
        live = looked.live
        self._now = (live, looked.scaling)
        if live.is_whole:
            self.workers.clear()
        self.workers.update({worker.id: worker for worker in live.workers})
        for id in live.gone:
            self.workers.pop(id, None)
        known = {told.seq for told in self.events}
        self.events += [told for told in live.events if told.seq not in known]
        self.events = self.events[-EVENTS_KEPT:]
        self.events_after = self.events[-1].seq if self.events else self.events_after
        self.since = live.seq
        self._grow(live.columns.at_s, live.columns.series)

    def column(self, name: str) -> Sequence[Value]:
        return self._series.get(name, [None] * len(self.at_s))

    def last(self, name: str) -> Value:
        """The newest value; None: not known."""
        column = self._series.get(name)
        return column[-1] if column else None

    def group(self, prefix: str) -> dict[str, Any]:
        """The newest values of `prefix`.NAME, by NAME."""
        start = f"{prefix}."
        return {
            name.removeprefix(start): column[-1]
            for name, column in self._series.items()
            if name.startswith(start) and column
        }

    def _grow(self, at_s: Sequence[float], series: Any) -> None:
        # A restarted controller has forgotten what was; what it adds comes behind that.
        newest = self.at_s[-1] if self.at_s else 0.0
        start = next((i for i, moment in enumerate(at_s) if moment > newest), len(at_s))
        added = len(at_s) - start
        if not added:
            return
        for name in self._series.keys() | series.keys():
            column = self._series.setdefault(name, [None] * len(self.at_s))
            column += series[name][start:] if name in series else [None] * added
        self.at_s += at_s[start:]
        old = sum(moment < self.at_s[-1] - KEPT_S for moment in self.at_s)
        del self.at_s[:old]
        for name, column in list(self._series.items()):
            del column[:old]
            if all(value is None for value in column):
                del self._series[name]
