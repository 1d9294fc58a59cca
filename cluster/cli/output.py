"""What the CLI prints: JSON for programs, tables and progress for people.

Answers go to stdout; progress, warnings and errors to stderr, so that `--json` can be piped. With
`--json` an error is an answer, too: one line, `{"error": {"message", "type"}}`, as APIs have it.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, Self

from rich.console import Console
from rich.markup import escape
from rich.status import Status

from cluster.errors import InvalidInput, TopologyError
from cluster.identity import WorkerId, WorkerState
from cluster.workers.report import WorkerReport

# A pipe has no width: lines that are cut would be lost to whoever reads them.
out = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 200)
err = Console(stderr=True, highlight=False, soft_wrap=True)

_COLOURS = {
    WorkerState.READY: "green",
    WorkerState.FAILED: "red",
    WorkerState.HUNG: "red",
    WorkerState.STOPPED: "dim",
}


def print_json(value: Mapping[str, Any] | Sequence[Any]) -> None:
    sys.stdout.write(json.dumps(value, indent=2, default=str) + "\n")


class Refused(InvalidInput):
    """Nothing is done; `answer`: what `--json` has beside the error."""

    def __init__(self, message: str, answer: Mapping[str, Any]) -> None:
        super().__init__(message)
        self.answer = answer


def print_error_json(error: Exception) -> None:
    """`type` is the error's class; `notes` say more, if anything. Faults of a file come one by
    one, too."""
    said: dict[str, Any] = {"message": str(error), "type": type(error).__name__}
    if notes := getattr(error, "__notes__", ()):
        said["notes"] = list(notes)
    answer: dict[str, Any] = {"error": said}
    if isinstance(error, TopologyError):
        answer |= {"valid": False, "faults": [asdict(fault) for fault in error.faults]}
    elif isinstance(error, Refused):
        answer |= error.answer
    sys.stdout.write(json.dumps(answer, default=str) + "\n")


def state_text(state: WorkerState) -> str:
    """With rich's markup."""
    colour = _COLOURS.get(state, "yellow")
    return f"[{colour}]{state.value}[/{colour}]"


def bytes_text(count: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def span_text(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


class MovingLine:
    """What goes on now, on stderr, for as long as the `with` lasts. Without a terminal, or
    `is_silent`, nothing."""

    def __init__(self, is_silent: bool = False) -> None:
        self._moving: Status | None = None
        if err.is_terminal and not is_silent:
            self._moving = err.status("")

    def __enter__(self) -> Self:
        if self._moving is not None:
            self._moving.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._moving is not None:
            self._moving.stop()

    def _move(self, text: str) -> None:
        if self._moving is not None:
            self._moving.update(escape(text))


class Progress(MovingLine):
    """launcher.progress.Watcher on a terminal: one line per stage and per change of a worker, and
    a moving line for what goes on now. Without a terminal, the lines only."""

    def __init__(self) -> None:
        super().__init__()
        self._begun_s = time.monotonic()
        self._seen: dict[WorkerId, tuple[WorkerState, str]] = {}
        self._noted = ""

    def stage(self, name: str) -> None:
        self._line(f"[bold]{name}[/bold]")
        self._move(name)

    def note(self, text: str, fraction: float | None = None) -> None:
        percent = f" {fraction:.0%}" if fraction is not None else ""
        self._move(text + percent)
        # Without a moving line, a fraction would be a line of its own each time.
        if text != self._noted:
            self._noted = text
            self._line(f"  {text}")

    def worker(self, report: WorkerReport) -> None:
        now = (report.state, report.message)
        if self._seen.get(report.id) == now:
            return
        self._seen[report.id] = now
        stages = " ".join(f"{name} {span_text(s)}" for name, s in report.stage_s.items())
        why = report.message or stages
        self._line(f"  {report.id.name:14} {state_text(report.state)}  [dim]{why}[/dim]")

    def warn(self, text: str) -> None:
        err.print(f"[yellow]warning:[/yellow] {text}")

    def _line(self, text: str) -> None:
        err.print(f"[dim]{time.monotonic() - self._begun_s:6.1f} s[/dim]  {text}")
