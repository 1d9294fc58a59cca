"""What the gateway replicas have told of themselves: their latest reports, and what is new in them.

Called by: control.loop.
"""

from __future__ import annotations

from cluster.control.clock import Clock
from cluster.control.events import GatewayNoted
from cluster.traffic import GatewayReport

# They report about once a second.
HEARD_WITHIN_S = 10.0


class Gateways:
    """The latest report of each replica that has been heard of in the last seconds."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._reports: dict[str, tuple[GatewayReport, float]] = {}

    def take(self, report: GatewayReport) -> list[GatewayNoted]:
        """Take in a report; its notes that were not in the replica's last one."""
        before = self._reports.get(report.gateway)
        seen = max((note.number for note in before[0].notes), default=0) if before else 0
        self._reports[report.gateway] = (report, self._clock.now_s())
        return [
            GatewayNoted(note.subject, note.kind, note.text, note.request_id, report.gateway)
            for note in report.notes
            if note.number > seen
        ]

    def latest(self) -> tuple[GatewayReport, ...]:
        gone_s = self._clock.now_s() - HEARD_WITHIN_S
        self._reports = {name: found for name, found in self._reports.items() if found[1] >= gone_s}
        return tuple(report for report, _ in self._reports.values())
