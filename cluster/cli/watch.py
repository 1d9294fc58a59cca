"""`watch`: a running cluster, live.

    a thread    asks the control API every interval        ─▶ queue
    the command takes answers into a Feed, draws them, listens for q

On a terminal it draws on the alternate screen, which is gone afterwards, also after Ctrl-C or an
error. Elsewhere it prints a plain frame, or a line of JSON, each interval.
"""

from __future__ import annotations

import contextlib
import json as json_module
import os
import queue
import select
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator
from typing import Annotated

import typer
from rich.console import Console, Group
from rich.live import Live as LiveDisplay

from cluster.cli import watch_view
from cluster.cli.live_feed import Feed
from cluster.cli.target import Cluster, MaybeFile, target
from cluster.control.client import ControlClient
from cluster.control.wire import Looked
from cluster.errors import ClusterError

_LOOK_S = 0.1
_PLAIN_WIDTH = 100


def watch(
    file: MaybeFile = None,
    cluster: Cluster = None,
    interval: Annotated[
        float, typer.Option("--interval", min=0.2, help="Seconds from one look to the next.")
    ] = 2.0,
    once: Annotated[bool, typer.Option("--once", help="Show it once and end.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each.")] = False,
) -> None:
    """Watch pools, TTFT, acceptance length, KV transfer, changes and events, live.

    q or Ctrl-C ends it. The control port has the same as a web page.

    Example: pdcluster watch --interval 1
    """
    control = target(file, cluster).control()
    with contextlib.suppress(KeyboardInterrupt):
        if once or json or not (sys.stdout.isatty() and sys.stdin.isatty()):
            _print_frames(control, interval, once, json)
        else:
            _draw(control, interval)


def _print_frames(control: ControlClient, interval_s: float, once: bool, json: bool) -> None:
    """Raises: ControlError."""
    feed = Feed()
    is_tty = sys.stdout.isatty()
    width = None if is_tty or "COLUMNS" in os.environ else _PLAIN_WIDTH
    console = Console(highlight=False, width=width)
    while True:
        begun_s = time.monotonic()
        seen = feed.events_after
        feed.take(control.live(feed.since, feed.events_after))
        if json:
            new = sum(told.seq > seen for told in feed.events)
            said = watch_view.of(feed, new)
            sys.stdout.write(json_module.dumps(said, default=str) + "\n")
        else:
            for line in watch_view.frame(feed, console.width, None):
                console.print(line)
        if once:
            return
        if not json:
            console.print()
        sys.stdout.flush()
        time.sleep(max(0.0, interval_s - (time.monotonic() - begun_s)))


def _draw(control: ControlClient, interval_s: float) -> None:
    """Raises: ControlError: already the first question got no answer."""
    feed = Feed()
    feed.take(control.live())
    console = Console(highlight=False)
    asker = _Asker(control, feed.since, feed.events_after, interval_s)
    asker.start()
    notice = ""
    drawn: object = None
    with (
        _keys() as pressed,
        LiveDisplay(console=console, screen=True, auto_refresh=False) as display,
    ):
        while True:
            with contextlib.suppress(queue.Empty):
                answer = asker.answers.get_nowait()
                drawn = None
                if isinstance(answer, Looked):
                    feed.take(answer)
                    notice = ""
                else:
                    notice = "no answer; trying again"
            if drawn != console.size:
                drawn = console.size
                lines = watch_view.frame(feed, console.width, console.height, notice)
                display.update(Group(*lines), refresh=True)
            if pressed(_LOOK_S) in ("q", "Q", "\x03"):
                return


class _Asker(threading.Thread):
    """Puts an answer, or why there is none, into `answers` every interval. A question may take as
    long as the client's patience; nobody waits for that when the command ends."""

    def __init__(
        self, control: ControlClient, since: int, events_after: int, interval_s: float
    ) -> None:
        super().__init__(name="ask the control API", daemon=True)
        self.answers: queue.SimpleQueue[Looked | ClusterError] = queue.SimpleQueue()
        self._control = control
        self._since, self._events_after = since, events_after
        self._interval_s = interval_s

    def run(self) -> None:
        while True:
            time.sleep(self._interval_s)
            try:
                looked = self._control.live(self._since, self._events_after)
            except ClusterError as error:
                self.answers.put(error)
                continue
            self._since = looked.live.seq
            self._events_after = max(
                (told.seq for told in looked.live.events), default=self._events_after
            )
            self.answers.put(looked)


class _Pressed:
    """Waits up to so many seconds for a key; "" if there was none."""

    def __call__(self, wait_s: float) -> str:
        ready, _, _ = select.select([sys.stdin], [], [], wait_s)
        return os.read(sys.stdin.fileno(), 1).decode(errors="replace") if ready else ""


@contextlib.contextmanager
def _keys() -> Iterator[_Pressed]:
    """Keys as they are pressed, unseen. The terminal is as before afterwards."""
    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setcbreak(sys.stdin)
        yield _Pressed()
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
