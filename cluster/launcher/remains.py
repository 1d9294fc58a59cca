"""What a cluster that ended badly left on this machine, and its removal.

Ours is what carries the owner mark of this cluster and has the same state folder: a cluster of the
same name under another XDG_STATE_HOME is somebody else's. And what of Ray writes to our head's
folder, whose name is made of the state folder's. Nothing is found by its name alone.
Called by: launcher.up before it starts anything, launcher.down after it has asked nicely.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from cluster.launcher import local_ray
from cluster.launcher.running import short_runtime
from cluster.settings import ClusterPaths
from cluster.workers import tree

_GONE_BOUND_S = 10.0


def processes(paths: ClusterPaths) -> list[tree.Process]:
    """Living processes of this cluster, this one not."""
    return [*_marked(paths, f"{paths.cluster}/"), *tree.of_ray_in([str(short_runtime(paths))])]


def folders(paths: ClusterPaths) -> list[Path]:
    """Runtime folders of this cluster that exist."""
    return [folder for folder in (paths.runtime, short_runtime(paths)) if folder.exists()]


def sweep(paths: ClusterPaths, patience_s: float = 0.0) -> list[tree.Process]:
    """Kill, unlink and remove all that is left: Ray's head at once, of the rest what does not end
    by itself within `patience_s` seconds. Blocks, at most some seconds more.

    Returns who is still there: processes in an uninterruptible system call."""
    patient_until_s = time.monotonic() + patience_s
    while (left := processes(paths)) and time.monotonic() < patient_until_s:
        # A head that an `up` did not come to note down, so nobody has ended it in order: it would
        # go on starting. Its agents outlive it, without a mark.
        _kill(_marked(paths, local_ray.owner(paths.cluster)))
        _kill(tree.of_ray_in([str(short_runtime(paths))]))
        time.sleep(0.05)
    deadline_s = time.monotonic() + _GONE_BOUND_S
    while left and time.monotonic() < deadline_s:
        _kill(left)
        time.sleep(0.02)
        left = processes(paths)
    tree.remove_segments(dict(_segments(paths)))
    for folder in folders(paths):
        shutil.rmtree(folder, ignore_errors=True)
    for parent in (paths.runtime.parent, short_runtime(paths).parent):
        with contextlib.suppress(OSError):  # another cluster's folder is in it
            parent.rmdir()
    return left


def _marked(paths: ClusterPaths, owner: str) -> list[tree.Process]:
    return [
        process
        for process in tree.marked(owner)
        if process.pid != os.getpid() and _state_folder(process.pid, paths.cluster) == paths.state
    ]


def _kill(processes: Iterable[tree.Process]) -> None:
    for process in processes:
        tree.send(process, signal.SIGKILL)


def _segments(paths: ClusterPaths) -> Iterator[tuple[str, int]]:
    """Shared-memory segments that supervisors noted down and did not come to remove."""
    for folder in folders(paths):
        for record in folder.rglob("segments.json"):
            with contextlib.suppress(OSError, ValueError):
                yield from json.loads(record.read_text(encoding="utf-8")).items()


def _state_folder(pid: int, cluster: str) -> Path | None:
    """Where the process, by its environment, keeps the state of `cluster`."""
    try:
        entries = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    except OSError:
        return None
    environ = dict(entry.decode(errors="replace").partition("=")[::2] for entry in entries)
    home = environ.get("XDG_STATE_HOME") or Path(environ.get("HOME", "/")) / ".local/state"
    return Path(home) / "pdcluster" / cluster
