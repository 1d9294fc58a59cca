"""What the cluster did in the last quarter of an hour: a Point about every two seconds, in memory.

    WorkerReports, GatewayReports, desired state ─ Recent.take ─▶ Totals that only grow
    Totals now and a little ago ─ points.point ─▶ Point, kept for KEPT_S

Workers and gateways count from their own start. One that was there before this controller looked
is counted from its first report on; one that starts later, and a counter that has become smaller,
from zero. For people who look, not for decisions: those have samples of their own
(control.autoscale.samples). Called by: control.loop, control.live.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from cluster.control.autoscale.samples import since
from cluster.control.clock import Clock
from cluster.control.points import (
    RATE_OVER_S,
    RATIO_OVER_S,
    Point,
    Totals,
    ago,
    came,
    pair_sum,
    plus,
    point,
)
from cluster.control.state import DesiredState
from cluster.identity import WorkerId
from cluster.traffic import GatewayReport
from cluster.workers.report import Counters, WorkerReport

EVERY_S = 2.0
KEPT_S = 900.0
# Gateways that were there before are heard of within this time of a controller's first look.
_KNOWN_BY_S = 10.0


class Recent:
    """Owned by the controller's loop. Keeps KEPT_S of points, and what the last one was made of."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._points: deque[Point] = deque(maxlen=int(KEPT_S / EVERY_S))
        self._window: deque[Totals] = deque()
        self._first_look_s: tuple[float, float] | None = None  # monotonic, wall
        self._worker_before: dict[WorkerId, WorkerReport] = {}
        self._gateway_before: dict[str, tuple[GatewayReport, float]] = {}
        self._seq = 0

    @property
    def seq(self) -> int:
        """Of the newest point; 0: there is none."""
        return self._seq

    def after(self, seq: int) -> tuple[Point, ...]:
        """Those that are kept and have a higher number, oldest first."""
        return tuple(point for point in self._points if point.seq > seq)

    def keeps(self, seq: int) -> bool:
        """Whether nothing that came after `seq` has been forgotten."""
        return any(point.seq == seq for point in self._points)

    def done_by(self, worker: WorkerId) -> tuple[Counters, float]:
        """What a worker did lately, and in how many seconds."""
        lately = self.lately()
        work = lately[0].workers.get(worker) if lately is not None else None
        if lately is None or work is None:
            return Counters(), 0.0
        now, then = lately
        return came(work, then.workers.get(worker, Counters())), now.at_s - then.at_s

    def lately(self) -> tuple[Totals, Totals] | None:
        """The totals now and RATE_OVER_S ago; None: they are the same ones yet."""
        if len(self._window) < 2:
            return None
        return self._window[-1], ago(self._window, RATE_OVER_S)

    def take(
        self,
        desired: DesiredState,
        reports: Sequence[WorkerReport],
        gateways: Sequence[GatewayReport],
    ) -> bool:
        """Make a point of what is known now, if the last one is old enough; whether it did."""
        now_s, wall_s = self._clock.now_s(), self._clock.wall_s()
        if self._window and now_s - self._window[-1].at_s < EVERY_S:
            return False
        if self._first_look_s is None:
            self._first_look_s = (now_s, wall_s)
        before = self._window[-1] if self._window else Totals(now_s)
        self._window.append(self._totals(now_s, before, reports, gateways))
        while len(self._window) > 1 and self._window[1].at_s <= now_s - RATIO_OVER_S:
            self._window.popleft()
        # By the clock where that is ahead, so that numbers grow over a restart, too.
        self._seq = max(self._seq + 1, int(wall_s * 1000))
        self._points.append(
            point(self._seq, wall_s, desired, reports, gateways, tuple(self._window))
        )
        return True

    def _totals(
        self,
        now_s: float,
        before: Totals,
        reports: Sequence[WorkerReport],
        gateways: Sequence[GatewayReport],
    ) -> Totals:
        pools, workers = dict(before.pools), {}
        for report in reports:
            new = self._new_of_worker(report)
            pools[report.id.pool] = plus(pools.get(report.id.pool, Counters()), new)
            workers[report.id] = plus(before.workers.get(report.id, Counters()), new)
        self._worker_before = {report.id: report for report in reports}
        pairs = dict(before.pairs)
        refused, recoveries = before.refused, before.recoveries
        for said in gateways:
            was = self._gateway_baseline(said, now_s)
            earlier = {(pair.prefill, pair.decode): pair for pair in was.pairs}
            for pair in said.pairs:
                key = (pair.prefill, pair.decode)
                pairs[key] = pair_sum(key, (since(pair, earlier.get(key)), pairs.get(key)))
            refused += max(0, said.refused - was.refused)
            recoveries += max(0, said.recoveries - was.recoveries)
            self._gateway_before[said.gateway] = (said, now_s)
        for name, (_, heard_s) in list(self._gateway_before.items()):
            if heard_s < now_s - KEPT_S:
                del self._gateway_before[name]
        return Totals(now_s, pools, pairs, workers, refused, recoveries)

    def _new_of_worker(self, report: WorkerReport) -> Counters:
        was = self._worker_before.get(report.id)
        if was is not None and was.started_at_s == report.started_at_s:
            return came(report.counters, was.counters)
        # Also an adopted one's first own report, which takes the place of what stood in for it.
        assert self._first_look_s is not None
        has_begun_since = report.started_at_s >= self._first_look_s[1]
        return came(report.counters, Counters()) if has_begun_since else Counters()

    def _gateway_baseline(self, said: GatewayReport, now_s: float) -> GatewayReport:
        known = self._gateway_before.get(said.gateway)
        if known is not None:
            return known[0]
        assert self._first_look_s is not None
        was_there = now_s - self._first_look_s[0] < _KNOWN_BY_S
        return said if was_there else GatewayReport(said.gateway, said.at_s, 0, 0, 0)
