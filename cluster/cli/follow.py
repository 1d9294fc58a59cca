"""Ask for a change, wait for its end, and show how it goes, on stderr: a line per step, and what it
waits for as a moving line. Without a terminal: a line whenever it waits for something else.

Called by: cli.changes, cli.apply.
"""

from __future__ import annotations

import re
import time
from dataclasses import asdict

import typer

from cluster.cli import change_view, output
from cluster.control.changes import Ask, Change, ChangeState, Plan
from cluster.control.client import ControlClient, ControlError, UnknownName
from cluster.control.wire import MOST_WHY_CHARACTERS, WHY_PATTERN
from cluster.errors import ClusterError, InvalidInput
from cluster.launcher.target import Target

FAILED, INTERRUPTED = 1, 130
_ENDED_BADLY = frozenset({ChangeState.FAILED, ChangeState.REPLACED})
_POLL_S = 0.3
_NUMBER = re.compile(r"\d+(\.\d+)?")


def checked_why(why: str) -> str:
    """What was typed for --why. Raises: InvalidInput."""
    if len(why) > MOST_WHY_CHARACTERS or re.fullmatch(WHY_PATTERN, why) is None:
        most = f"one line of at most {MOST_WHY_CHARACTERS} characters"
        raise InvalidInput(f"--why: found {len(why)} characters, or several lines; write {most}")
    return why


def carry_out(
    at: Target,
    control: ControlClient,
    ask: Ask,
    why: str,
    *,
    no_wait: bool,
    json: bool,
    plan: Plan | None = None,
) -> None:
    """Ask, wait, show. `plan`: of an Apply; JSON has it beside the change.

    Raises: InvalidInput: refused; ClusterError: the controller does not answer, or does
    not know the change any more; typer.Exit with code 1: it failed, or a later one took its place.
    Cancel: Ctrl-C ends the waiting, with exit code 130; the change goes on."""
    try:
        change = control.ask(ask, why)
    except KeyboardInterrupt:
        said = f"the change may have begun; `pdcluster changes{_which(at)}` lists them"
        output.err.print(said, markup=False)
        raise typer.Exit(INTERRUPTED) from None
    if not no_wait:
        change = _follow(at, control, change, is_silent=json)
    if json:
        told = change_view.of(change)
        output.print_json(told if plan is None else {"plan": asdict(plan), "change": told})
    else:
        change_view.draw_end(change)
        if no_wait:
            output.out.print(_how_to_look(at, change), markup=False)
    if change.state in _ENDED_BADLY:
        raise typer.Exit(FAILED)


def _follow(at: Target, control: ControlClient, change: Change, is_silent: bool) -> Change:
    """`change` as it ended; `is_silent`: nothing is shown meanwhile."""
    look = _how_to_look(at, change)
    try:
        with _Shown(is_silent) as shown:
            shown.take(change)
            while change.state is ChangeState.RUNNING:
                time.sleep(_POLL_S)
                change = control.change(change.id)
                shown.take(change)
    except KeyboardInterrupt:
        output.err.print(f"change {change.id} goes on; {look}", markup=False)
        raise typer.Exit(INTERRUPTED) from None
    except UnknownName as error:
        raise ClusterError(
            f"the controller was restarted, and does not know change {change.id} ({change.what}) "
            "any more; `pdcluster status` and `pdcluster events` show what became of it"
        ) from error
    except ControlError as error:
        error.add_note(f"change {change.id} ({change.what}) had begun; {look}")
        raise
    return change


def _how_to_look(at: Target, change: Change) -> str:
    return f"`pdcluster changes {change.id}{_which(at)}` shows how far it is"


def _which(at: Target) -> str:
    return f" --cluster {at.cluster}" if at.here is not None else ""


class _Shown(output.MovingLine):
    """What of one change has been shown."""

    def __init__(self, is_silent: bool) -> None:
        super().__init__(is_silent)
        self._is_silent = is_silent
        self._steps = 0
        self._waited_for = ""

    def take(self, change: Change) -> None:
        """Show what is new of it."""
        if self._is_silent:
            return
        for step in change.steps[self._steps :]:
            output.err.print(change_view.step_line(change, step))
        self._steps = len(change.steps)
        self._move(change.waits_for or change.what)
        if output.err.is_terminal:
            return
        # That a count went from 8 to 7 is no line of its own.
        waited_for = _NUMBER.sub("", change.waits_for)
        if waited_for and waited_for != self._waited_for:
            output.err.print(f"          waits for: {change.waits_for}", markup=False)
        self._waited_for = waited_for
