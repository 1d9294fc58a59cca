"""End a cluster on this host: Ray, the workers' engines, everything that carries its mark.

    python3 -m cluster.nodes.end --cluster NAME

`ray down` runs it on every host, the provider on a host that leaves the cluster. Idempotent: where
nothing runs, nothing happens. Ray's processes are killed at once; workers' supervisors then notice
that their owner is gone and end their engines in order; what is left after that is killed too.
Exit code 1: a process stays, held by the kernel.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass

from cluster.nodes.marks import Belonging, belonging, forget_sessions
from cluster.nodes.state import Store
from cluster.settings import ClusterPaths
from cluster.workers import tree

# Supervisors whose owner went end their engines by themselves, within this time.
_OWN_END_S = 4.0
_KILL_BOUND_S = 10.0


@dataclass(frozen=True, slots=True)
class Ended:
    """`ended`: processes that were there; `left`: those that still are."""

    ended: int
    left: tuple[int, ...]


def end_cluster(cluster: str) -> Ended:
    """End all of the cluster's processes here, then remove its shared memory and run-time files.
    Blocks for some seconds, never longer than a quarter of a minute."""
    ours = _family()
    found = _found(cluster, ours)
    count = len(found.ray) + len(found.workers)
    _kill(found.ray)
    patient_until_s = time.monotonic() + _OWN_END_S
    while (left := _found(cluster, ours)).workers and time.monotonic() < patient_until_s:
        _kill(left.ray)
        time.sleep(0.05)
    deadline_s = time.monotonic() + _KILL_BOUND_S
    # Those first found, too: an orphan of Ray's has nothing left to find it by.
    remaining = found.ray | found.workers | left.ray | left.workers
    while remaining and time.monotonic() < deadline_s:
        _kill(remaining)
        time.sleep(0.02)
        left = _found(cluster, ours)
        remaining = _still(remaining) | left.ray | left.workers
    paths = ClusterPaths(cluster)
    tree.remove_segments(dict(_segments(paths)))
    shutil.rmtree(paths.runtime, ignore_errors=True)
    with contextlib.suppress(OSError):  # another cluster's folder is in it
        paths.runtime.parent.rmdir()
    if not remaining:
        paths.running.unlink(missing_ok=True)
        forget_sessions(cluster)
    return Ended(count, tuple(sorted(remaining)))


def _found(cluster: str, ours: frozenset[int]) -> Belonging:
    found = belonging(cluster)
    return Belonging(
        {pid: process for pid, process in found.ray.items() if pid not in ours},
        {pid: process for pid, process in found.workers.items() if pid not in ours},
    )


def _kill(processes: dict[int, tree.Process]) -> None:
    for process in processes.values():
        tree.send(process, signal.SIGKILL)


def _still(processes: dict[int, tree.Process]) -> dict[int, tree.Process]:
    """Those that have not ended, nor given their pid to another."""
    return {
        pid: now
        for pid, before in processes.items()
        if (now := tree.read_process(pid)) is not None
        and now.start_ticks == before.start_ticks
        and now.state != "Z"
    }


def _family() -> frozenset[int]:
    """This process and all above it: `cluster.nodes.start`, whose mark is the cluster's, ends what
    a former start left, and must not end itself."""
    found = []
    pid = os.getpid()
    while pid > 0 and pid not in found:
        found.append(pid)
        process = tree.read_process(pid)
        pid = process.ppid if process is not None else 0
    return frozenset(found)


def _segments(paths: ClusterPaths) -> Iterator[tuple[str, int]]:
    """Shared-memory segments that supervisors noted down and did not come to remove."""
    for record in paths.runtime.rglob("segments.json"):
        with contextlib.suppress(OSError, ValueError):
            yield from json.loads(record.read_text(encoding="utf-8")).items()


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python3 -m cluster.nodes.end", description="End a cluster's processes on this host."
    )
    parser.add_argument("--cluster", required=True, help="cluster_name of the topology")
    cluster = parser.parse_args().cluster
    done = end_cluster(cluster)
    if done.left:
        pids = ", ".join(map(str, done.left))
        sys.exit(f"not ended: pid {pids}; the kernel holds them, try again later")
    Store.of(cluster).forget()
    print(f"{done.ended} processes ended")


if __name__ == "__main__":
    main()
