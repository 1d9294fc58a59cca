"""`logs`: a worker's engine log, from this machine's files or by way of the controller."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, TopologyFile, target
from cluster.control.client import ControlClient
from cluster.control.wire import MOST_LOG_BYTES
from cluster.errors import InvalidInput, PeerGone
from cluster.identity import WorkerId
from cluster.launcher.target import Target
from cluster.settings import ClusterPaths

_FOLLOW_S = 0.3
_CHUNK_BYTES = 1 << 18
_LINE_BYTES = 400  # a generous guess, to read no more of a long log than -n asks for


def logs(
    worker: Annotated[str, typer.Argument(help="POOL/INDEX, as in decode/0.")],
    topology: TopologyFile = None,
    cluster: Cluster = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show.")] = 100,
    rank: Annotated[
        int, typer.Option("--rank", min=0, help="Which node, of a replica that spans several.")
    ] = 0,
) -> None:
    """Show a worker's engine log. With -f also across restarts of the worker.

    Example: pdcluster logs decode/0 -f
    """
    try:
        wanted = WorkerId.parse(worker)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    at = target(topology, cluster)
    # All here means one node, whose replicas have no other ranks than 0.
    log = _newest_log(at.cluster, wanted) if _is_all_here(at) and not rank else None
    if log is None:
        _remote_logs(at.control(), wanted, rank, follow, lines)
    else:
        _local_logs(at.cluster, wanted, log, follow, lines)


def _is_all_here(at: Target) -> bool:
    """Whether every worker runs on this machine. On a rack's head, an older log of a worker that
    runs elsewhere now would be taken for its present one."""
    return at.here is not None and at.here.own_ray is not None


def _newest_log(cluster: str, worker: WorkerId) -> Path | None:
    """The log of the worker's latest generation on this machine, or of the one asked for."""
    folder = ClusterPaths(cluster).logs
    generation = worker.generation or "*"
    found = [
        path
        for path in folder.glob(f"{worker.pool}-{worker.index}.{generation}.log")
        if path.name.split(".")[1].isdigit()
    ]
    return max(found, key=lambda path: int(path.name.split(".")[1]), default=None)


def _local_logs(cluster: str, worker: WorkerId, log: Path, follow: bool, lines: int) -> None:
    from cluster.workers.logs import read_window

    offset = _write_tail(*read_window(log, -lines * _LINE_BYTES, lines * _LINE_BYTES), lines)
    while follow:
        data, offset = read_window(log, offset, _CHUNK_BYTES)
        _write(data)
        if data:
            continue
        newest = _newest_log(cluster, worker)
        if newest is not None and newest != log:
            log, offset = newest, 0
            output.err.print(f"[dim]--- {worker.name} was restarted: {log.name}[/dim]")
        time.sleep(_FOLLOW_S)


def _remote_logs(
    control: ControlClient, worker: WorkerId, rank: int, follow: bool, lines: int
) -> None:
    """From the node that runs the worker, by way of the control API."""
    most = min(lines * _LINE_BYTES, MOST_LOG_BYTES)
    try:
        window = control.read_log(worker, -most, max(1, most), rank)
    except PeerGone as error:
        error.add_note("`pdcluster status` shows why, and the last words of one that failed")
        raise
    if worker.generation not in (0, window.generation):
        now = replace(worker, generation=window.generation)
        raise InvalidInput(f"{worker} is gone; it is {now} now")
    offset, generation = _write_tail(window.data, window.next_offset, lines), window.generation
    while follow:
        try:
            window = control.read_log(worker, offset, _CHUNK_BYTES, rank)
        except PeerGone:  # it is being replaced
            time.sleep(_FOLLOW_S)
            continue
        if window.generation != generation:
            offset, generation = 0, window.generation
            output.err.print(f"[dim]--- {worker.name} was restarted: generation {generation}[/dim]")
            continue
        _write(window.data)
        offset = window.next_offset
        if not window.data:
            time.sleep(_FOLLOW_S)


def _write_tail(data: bytes, offset: int, lines: int) -> int:
    tail = data.splitlines(keepends=True)[-lines:] if lines else []
    _write(b"".join(tail))
    return offset


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
