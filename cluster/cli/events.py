"""`events`: what has happened in a cluster, and with -f what happens."""

from __future__ import annotations

import json as json_module
import re
import sys
import time
from dataclasses import asdict
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, TopologyFile, target
from cluster.control.events import Told
from cluster.control.wire import LONGEST_WAIT_S
from cluster.errors import InvalidInput

_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def events(
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new ones.")] = False,
    since: Annotated[
        str | None,
        typer.Option(
            "--since",
            metavar="SPAN",
            help="Only those of the last 30s, 10m, 2h or 1d. Default: all that are kept.",
        ),
    ] = None,
    topology: TopologyFile = None,
    cluster: Cluster = None,
    json: Annotated[bool, typer.Option("--json", help="Print JSON, one line for each.")] = False,
) -> None:
    """Show what has happened: what changed, who asked, why, how long it took.

    Example: pdcluster events -f --since 10m
    """
    from_s = time.time() - span_s(since) if since is not None else 0.0
    control = target(topology, cluster).control()
    found = control.events()
    seen = 0
    while True:
        for told in found:
            if told.at_s >= from_s:
                _print(told, json)
            seen = max(seen, told.seq)
        if not follow:
            return
        sys.stdout.flush()
        found = control.events(seen, LONGEST_WAIT_S)


def span_s(text: str, option: str = "--since") -> float:
    """Seconds of `30s`, `10m`, `2h`, `1d`, as `option` has them. Raises: InvalidInput."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text)
    if match is None:
        raise InvalidInput(f"{option}: found {text}; write a span, as in 30s, 10m, 2h or 1d")
    return float(match[1]) * _UNIT_S[match[2]]


def _print(told: Told, json: bool) -> None:
    if json:
        sys.stdout.write(json_module.dumps(asdict(told)) + "\n")
        return
    moment = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(told.at_s))
    output.out.print(f"{moment}  {told.text}", markup=False)
