"""What the controller exports to Prometheus. One object per controller, its own registry.

What happens is counted here (`control.counted` calls); what is, is read when somebody scrapes
(`control.exported`). Declared in `catalogue`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from prometheus_client import CollectorRegistry, generate_latest

from cluster.observe import catalogue
from cluster.observe.metric import Reader, Sample


class ControllerMetrics:
    """Counters and a histogram of events. `read`: samples of catalogue.CONTROLLER_READ, now."""

    def __init__(self, read: Callable[[], Iterable[Sample]]) -> None:
        self.registry = CollectorRegistry()
        self.starts = catalogue.WORKER_STARTS.counter(self.registry)
        self.restarts = catalogue.WORKER_RESTARTS.counter(self.registry)
        self.drains = catalogue.WORKER_DRAINS.counter(self.registry)
        self.role_changes = catalogue.ROLE_CHANGES.counter(self.registry)
        self.changes = catalogue.CHANGES.counter(self.registry)
        self.time_to_ready_s = catalogue.TIME_TO_READY.histogram(self.registry)
        self.registry.register(Reader(catalogue.CONTROLLER_READ, read))

    def exposition(self) -> bytes:
        """The text format that Prometheus scrapes."""
        return generate_latest(self.registry)
