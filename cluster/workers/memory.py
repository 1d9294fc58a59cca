"""Did an engine end for lack of memory? What the kernel counts, and what its own log says.

    kills_so_far   the kernel's counters of processes that it ended for memory, read from /proc and
                   the memory cgroup this process is in (an engine is in its worker's)
    shortage       from the counters before and after, how it ended and its last words: a sentence

Called by: workers.worker. `shortage` is pure.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

# What interpreters, allocators and device runtimes say when they get no more.
_REFUSED = re.compile(
    r"\bMemoryError\b|\bstd::bad_alloc\b|Cannot allocate memory|\bOutOfMemoryError\b"
    r"|out of memory|DefaultCPUAllocator: can't allocate",
    re.IGNORECASE,
)
_SHOWN_CHARACTERS = 200


@dataclass(frozen=True, slots=True)
class Kills:
    """Processes ended for memory since the machine, or the cgroup, began. None: not told here."""

    node: int | None
    cgroup: int | None


def kills_so_far(root: Path = Path("/")) -> Kills:
    """Reads two or three small files, well below a millisecond. Never raises. `root`: where /proc
    and /sys are (tests)."""
    node = _count(root / "proc/vmstat", "oom_kill")
    found = (_count(path, "oom_kill") for path in _cgroup_files(root))
    return Kills(node, next((count for count in found if count is not None), None))


def shortage(was_killed: bool, before: Kills, after: Kills, last_words: Sequence[str]) -> str:
    """Why memory may be the reason that an engine ended by itself; "" if nothing speaks for it.

    `was_killed`: by a signal that nobody of ours sent. `before`: the counters a little earlier; who
    else was ended meanwhile is counted too."""
    in_cgroup = _grown(before.cgroup, after.cgroup)
    if in_cgroup:
        return f"out of memory: the kernel ended {_processes(in_cgroup)} of its memory cgroup"
    refused = next((line for line in reversed(last_words) if _REFUSED.search(line)), None)
    if refused is not None:
        return f"out of memory: {refused.strip()[:_SHOWN_CHARACTERS]}"
    on_node = _grown(before.node, after.node)
    if on_node:
        return f"out of memory? the kernel ended {_processes(on_node)} of this node for memory"
    if was_killed and after.node is None and after.cgroup is None:
        return "out of memory? the kernel's counters cannot be read here"
    return ""


def _grown(before: int | None, after: int | None) -> int:
    return 0 if before is None or after is None else max(0, after - before)


def _processes(count: int) -> str:
    return "a process" if count == 1 else f"{count} processes"


def _cgroup_files(root: Path) -> Iterable[Path]:
    """Of the memory cgroup, version 2 then 1; in a container its own is mounted at the top."""
    paths = {"": "", "memory": ""}
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            for name in controllers.split(","):
                paths[name] = path.lstrip("/")
    mounted = root / "sys/fs/cgroup"
    yield mounted / paths[""] / "memory.events"
    yield mounted / "memory.events"
    yield mounted / "memory" / paths["memory"] / "memory.oom_control"
    yield mounted / "memory/memory.oom_control"


def _count(path: Path, name: str) -> int | None:
    with contextlib.suppress(OSError, ValueError):
        for line in path.read_text().splitlines():
            words = line.split()
            if words[:1] == [name]:
                return int(words[1])
    return None
