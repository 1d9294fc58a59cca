"""`logs`: a worker's engine log, from this machine's files or by way of the controller."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from cluster.cli import output
from cluster.cli.target import Cluster, controller_of, running_cluster
from cluster.errors import InvalidInput
from cluster.identity import WorkerId
from cluster.launcher.running import Running
from cluster.settings import ClusterPaths

_FOLLOW_S = 0.3
_CHUNK_BYTES = 1 << 18
_LINE_BYTES = 400  # a generous guess, to read no more of a long log than -n asks for


def logs(
    worker: Annotated[str, typer.Argument(help="POOL/INDEX, as in decode/0.")],
    cluster: Cluster = None,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with new lines.")] = False,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="Last lines to show.")] = 100,
) -> None:
    """Show a worker's engine log. With -f also across restarts of the worker.

    Example: pdcluster logs decode/0 -f
    """
    at = running_cluster(None, cluster)
    try:
        wanted = WorkerId.parse(worker)
    except ValueError as error:
        raise InvalidInput(str(error)) from error
    log = _newest_log(at, wanted)
    if log is None:
        _remote_logs(at, wanted, follow, lines)
    else:
        _local_logs(at, wanted, log, follow, lines)


def _newest_log(at: Running, worker: WorkerId) -> Path | None:
    """The log of the worker's latest generation on this machine, or of the one asked for."""
    folder = ClusterPaths(at.cluster).logs
    generation = worker.generation or "*"
    found = [
        path
        for path in folder.glob(f"{worker.pool}-{worker.index}.{generation}.log")
        if path.name.split(".")[1].isdigit()
    ]
    return max(found, key=lambda path: int(path.name.split(".")[1]), default=None)


def _local_logs(at: Running, worker: WorkerId, log: Path, follow: bool, lines: int) -> None:
    from cluster.workers.logs import read_window

    offset = _write_tail(*read_window(log, -lines * _LINE_BYTES, lines * _LINE_BYTES), lines)
    while follow:
        data, offset = read_window(log, offset, _CHUNK_BYTES)
        _write(data)
        if data:
            continue
        newest = _newest_log(at, worker)
        if newest is not None and newest != log:
            log, offset = newest, 0
            output.err.print(f"[dim]--- {worker.name} was restarted: {log.name}[/dim]")
        time.sleep(_FOLLOW_S)


def _remote_logs(at: Running, worker: WorkerId, follow: bool, lines: int) -> None:
    """From the node that runs the worker, by way of the controller."""
    from cluster.launcher import local_ray

    with local_ray.connected(at):
        client = controller_of(at)
        window = client.read_log(worker.name, -lines * _LINE_BYTES, lines * _LINE_BYTES)
        offset = _write_tail(*window, lines)
        while follow:
            data, offset = client.read_log(worker.name, offset, _CHUNK_BYTES)
            _write(data)
            if not data:
                time.sleep(_FOLLOW_S)


def _write_tail(data: bytes, offset: int, lines: int) -> int:
    tail = data.splitlines(keepends=True)[-lines:] if lines else []
    _write(b"".join(tail))
    return offset


def _write(data: bytes) -> None:
    sys.stdout.buffer.write(data)
    sys.stdout.buffer.flush()
