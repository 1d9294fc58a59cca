"""Stop strings in a stream of text: what may be shown, and when to stop. Pure."""

from __future__ import annotations

from collections.abc import Sequence


class StopScanner:
    """Holds back the last characters that may be the beginning of a stop string."""

    def __init__(self, stops: Sequence[str], include: bool) -> None:
        self._stops = stops
        self._include = include
        self._hold = max((len(stop) for stop in stops), default=1) - 1
        self._pending = ""

    def push(self, text: str) -> tuple[str, str | None]:
        """(what may be shown now, the stop string that was found)."""
        if not self._stops:
            return text, None
        self._pending += text
        found = [(self._pending.find(s), s) for s in self._stops if s in self._pending]
        if found:
            at, stop = min(found)
            shown = self._pending[: at + len(stop) if self._include else at]
            self._pending = ""
            return shown, stop
        cut = max(0, len(self._pending) - self._hold)
        shown, self._pending = self._pending[:cut], self._pending[cut:]
        return shown, None

    def rest(self) -> str:
        """What was held back, once no more text comes."""
        rest, self._pending = self._pending, ""
        return rest
