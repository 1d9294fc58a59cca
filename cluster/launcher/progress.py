"""What `up` and `down` tell whoever watches. The CLI draws it; tests record it."""

from __future__ import annotations

from typing import Protocol

from cluster.workers.report import WorkerReport


class Watcher(Protocol):
    """Calls come from one thread, in order."""

    def stage(self, name: str) -> None:
        """A stage begins; the one before is done."""
        ...

    def note(self, text: str, fraction: float | None = None) -> None:
        """News within the stage. `fraction`: 0..1, None while nobody can say."""
        ...

    def worker(self, report: WorkerReport) -> None:
        """A worker as it is now; called again whenever it was asked."""
        ...

    def warn(self, text: str) -> None: ...


class Silent:
    """Tells nobody."""

    def stage(self, name: str) -> None: ...

    def note(self, text: str, fraction: float | None = None) -> None: ...

    def worker(self, report: WorkerReport) -> None: ...

    def warn(self, text: str) -> None: ...
