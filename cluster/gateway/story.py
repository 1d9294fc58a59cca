"""What became of one request, in one log line: only of those that people ask about.

    request ID failed path=/v1/completions status=502 took_s=3.1 left="decode/0 failed: ..." why=...

Said are failures of ours, requests that changed workers on their way, and slow ones; always with
the id that the client got in x-request-id. A request that goes well costs no line. Lengths and
names only, no prompts, no tokens. Called by: gateway.app, gateway.exchange.
"""

from __future__ import annotations

import json
import logging
from dataclasses import dataclass

from cluster.gateway.errors import ApiError

SLOW_S = 60.0
_CLIENT_LEFT = 499
_WHY_CHARACTERS = 200
_STEPS_TOLD = 6


@dataclass(frozen=True, slots=True)
class Step:
    """A worker that did not answer the request to its end, and why."""

    worker: str
    cause: str
    why: str


class Story:
    """Of one request. Costs next to nothing while nothing happens."""

    __slots__ = ("_steps", "error", "request_id")

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.error = ""  # what the client was told, if it was our fault
        self._steps: list[Step] = []

    def failed(self, error: ApiError) -> None:
        """The client is told `error`. One that is its own doing is not worth a line, except when
        engines have suffered from it."""
        if error.status >= 500 or self._steps:
            self.error = error.message

    def left(self, worker: str, cause: str, why: str) -> None:
        """It goes on without `worker`."""
        self._steps.append(Step(worker, cause, why))

    def line(self, path: str, status: int, took_s: float) -> tuple[int, str] | None:
        """Log level and text; None: not worth a line. `status`: 499 if the client left."""
        if not (self.error or self._steps or took_s >= SLOW_S):
            return None
        if self.error:
            verb = "failed"
        elif status == _CLIENT_LEFT:
            verb = "left by its client"
        else:
            verb = "finished"
        fields: dict[str, object] = {
            "path": path,
            "status": status,
            "took_s": f"{took_s:.3f}",
        }
        if self._steps:
            fields["attempts"] = len(self._steps) + (0 if self.error else 1)
            told = self._steps[:_STEPS_TOLD]
            fields["left"] = "; ".join(f"{one.worker} {one.cause}: {one.why}" for one in told)
        if self.error:
            fields["why"] = self.error
        level = logging.WARNING if self.error else logging.INFO
        return level, f"request {self.request_id} {verb} {key_values(fields)}"


def key_values(fields: dict[str, object]) -> str:
    """`k=v k="a value of several words"`: what has blanks or quotes is quoted, and cut."""
    return " ".join(f"{key}={_value(str(value))}" for key, value in fields.items())


def _value(text: str) -> str:
    if text and text.isprintable() and not any(c in text for c in ' "='):
        return text
    cut = text if len(text) <= _WHY_CHARACTERS else text[:_WHY_CHARACTERS] + "..."
    return json.dumps(cut, ensure_ascii=False)
