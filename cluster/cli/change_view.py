"""What is shown of a Change. In: the change. Out: a plain dict (`--json`), or words.

The dict's keys are an interface for scripts: add, never rename. Called by: cli.changes, cli.follow.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich.markup import escape
from rich.table import Table

from cluster.cli import output
from cluster.control.changes import Change, ChangeState, Measure, Step

COLOURS = {
    ChangeState.RUNNING: "yellow",
    ChangeState.DONE: "green",
    ChangeState.FAILED: "red",
    ChangeState.REPLACED: "red",
}


def of(change: Change) -> dict[str, Any]:
    return {**asdict(change), "took_s": change.took_s}


def step_line(change: Change, step: Step) -> str:
    """With rich's markup. Times are the controller's, since the change was asked for."""
    since_s = max(0.0, step.at_s - change.asked_at_s)
    return f"[dim]{since_s:6.1f} s[/dim]  {escape(step.text)}"


def draw_end(change: Change) -> None:
    """Its effect, and how it ended or that it goes on; on stdout."""
    if change.measures:
        output.out.print(_measures(change.measures))
    output.out.print(_ending(change))


def draw(change: Change) -> None:
    """All of it."""
    output.out.print(
        f"change {change.id}: {change.what}; asked for by {change.asked_by} at "
        f"{_moment(change.asked_at_s)}",
        markup=False,
    )
    for step in change.steps:
        output.out.print(step_line(change, step))
    draw_end(change)


def draw_list(changes: Sequence[Change]) -> None:
    if not changes:
        output.out.print("nothing has been changed, as far as the controller remembers")
        return
    table = Table("id", "asked at", "by", "state", "took", "what", box=None, pad_edge=False)
    for change in changes:
        took_s = change.took_s
        table.add_row(
            str(change.id),
            _moment(change.asked_at_s),
            escape(change.asked_by),
            _state(change.state),
            output.span_text(took_s) if took_s is not None else "-",
            escape(change.what),
        )
    output.out.print(table)


def _measures(measures: Sequence[Measure]) -> Table:
    table = Table("effect", "before", "after", box=None, pad_edge=False)
    for measure in measures:
        before, after = (_figure(value, measure.unit) for value in (measure.before, measure.after))
        table.add_row(escape(measure.what), before, after)
    return table


def _figure(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "s":  # those below a second matter, too
        return f"{value:.3g} s" if value < 60 else output.span_text(value)
    return f"{value:,.4g} {unit}".rstrip()


def _ending(change: Change) -> str:
    what = f"{_state(change.state)}: {escape(change.what)}"
    if change.state is ChangeState.RUNNING:
        waits_for = f"; waits for: {escape(change.waits_for)}" if change.waits_for else ""
        return f"{what}{waits_for}"
    took = f" after {output.span_text(change.took_s)}" if change.took_s is not None else ""
    why = f"; {escape(change.why)}" if change.why else ""
    return f"{what}{took}{why}"


def _state(state: ChangeState) -> str:
    return f"[{COLOURS[state]}]{state.value}[/{COLOURS[state]}]"


def _moment(at_s: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at_s))
