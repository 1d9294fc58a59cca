"""Process trees and shared-memory segments, as the kernel shows them in /proc.

A tree is found by descent (`descendants`) or, when nobody is left to descend from, by the owner
mark that every process of ours carries in its environment (`marked`), or, where Ray has overwritten
that, by the folder it writes to (`of_ray_in`). A signal goes through a
pidfd after a second look at the process, so that a pid which was given away in between is never
hit. Called by: workers.supervisor, workers.process, and whoever ends a cluster on this machine.

Runs inside the supervisor: standard library only. Linux only.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

SHM_DIR = "/dev/shm"
OWNER_ENV = "PDCLUSTER_OWNER"  # settings.OWNER_ENV, without the imports of `settings`
_RAY_TITLE = b"ray::"


@dataclass(frozen=True, slots=True)
class Process:
    """One process. `start_ticks` tells it from a later one with the same pid."""

    pid: int
    ppid: int
    start_ticks: int
    state: str  # one letter, as in /proc/PID/stat; Z is a zombie
    rss_bytes: int


def read_process(pid: int) -> Process | None:
    """The process as it is now, or None if there is none."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as stat:
            # The name in parentheses may hold spaces and parentheses: count from the last one.
            fields = stat.read().rpartition(b")")[2].split()
    except OSError:
        return None
    return Process(
        pid=pid,
        ppid=int(fields[1]),
        start_ticks=int(fields[19]),
        state=chr(fields[0][0]),
        rss_bytes=int(fields[21]) * os.sysconf("SC_PAGE_SIZE"),
    )


def processes() -> list[Process]:
    """Every process of this pid namespace."""
    found = (read_process(pid) for pid in _pids())
    return [process for process in found if process is not None]


def descendants(root: int) -> list[Process]:
    """All processes below `root`, zombies included, `root` itself not."""
    children: dict[int, list[Process]] = {}
    for process in processes():
        children.setdefault(process.ppid, []).append(process)
    found: list[Process] = []
    pending = [root]
    while pending:
        for child in children.get(pending.pop(), ()):
            found.append(child)
            pending.append(child.pid)
    return found


def marked(owner: str) -> list[Process]:
    """Living processes whose environment carries the owner mark `owner`; a mark that ends in `/`
    stands for every mark that begins so (all of a cluster)."""
    wanted = f"{OWNER_ENV}={owner}".encode()
    found: list[Process] = []
    for pid in _pids():
        try:
            with open(f"/proc/{pid}/environ", "rb") as environ:
                entries = environ.read().split(b"\0")
        except OSError:
            continue
        if any(
            entry.startswith(wanted) if owner.endswith("/") else entry == wanted
            for entry in entries
        ):
            process = read_process(pid)
            if process is not None and process.state != "Z":
                found.append(process)
    return found


def of_ray_in(folders: Iterable[str]) -> list[Process]:
    """Living processes of Ray that hold a file below one of `folders` open, such as their log.

    Ray's agents and actors set their title over their environment, and so over the owner mark
    (measured, Ray 2.60: /proc/PID/environ is empty lines). Who else reads a log there has no such
    title."""
    below = tuple(os.path.join(os.path.realpath(folder), "") for folder in folders)
    found: list[Process] = []
    for pid in _pids() if below else ():
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/cmdline", "rb") as cmdline:
                if not cmdline.read().startswith(_RAY_TITLE):
                    continue
            files = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            process = read_process(pid) if any(file.startswith(below) for file in files) else None
            if process is not None and process.state != "Z":
                found.append(process)
    return found


def send(process: Process, number: signal.Signals) -> None:
    """Signal exactly this process. One that is gone or not ours to signal is left alone."""
    try:
        handle = os.pidfd_open(process.pid)
    except OSError:
        return
    try:
        now = read_process(process.pid)
        if now is not None and now.start_ticks == process.start_ticks:
            with contextlib.suppress(OSError):
                signal.pidfd_send_signal(handle, number)
    finally:
        os.close(handle)


def end_marked(owner: str, *, bound_s: float) -> list[Process]:
    """SIGKILL every process with the owner mark until none is left or `bound_s` seconds passed.

    For when the supervisor that should have done it is gone. Blocks. Returns who is still there
    (a process in an uninterruptible system call)."""
    deadline_s = time.monotonic() + bound_s
    while left := [process for process in marked(owner) if process.pid != os.getpid()]:
        for process in left:
            send(process, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            return left
        time.sleep(0.02)
    return []


def segments() -> dict[str, int]:
    """Shared-memory segments that exist now: name in /dev/shm → inode. Files of our user only."""
    found: dict[str, int] = {}
    with contextlib.suppress(OSError), os.scandir(SHM_DIR) as entries:
        for entry in entries:
            with contextlib.suppress(OSError):
                status = entry.stat(follow_symlinks=False)
                if status.st_uid == os.getuid() and entry.is_file(follow_symlinks=False):
                    found[entry.name] = status.st_ino
    return found


def segments_used_by(pids: Iterable[int]) -> set[int]:
    """Inodes of the segments in /dev/shm that these processes map or hold open.

    Not their names: glibc makes a semaphore under a passing name, and by that one it stays known
    to the process that made it."""
    try:
        device = os.stat(SHM_DIR).st_dev
    except OSError:
        return set()
    inodes: set[int] = set()
    for pid in pids:
        inodes |= _mapped(pid, device)
        inodes |= _opened(pid, device)
    return inodes


def remove_segments(wanted: Mapping[str, int]) -> list[str]:
    """Unlink those of `wanted` (name → inode) that are still the same file and that no process
    uses any more. Returns the names removed."""
    present = segments()
    candidates = {name: inode for name, inode in wanted.items() if present.get(name) == inode}
    if not candidates:
        return []
    used = segments_used_by(_pids())
    removed: list[str] = []
    for name in sorted(name for name, inode in candidates.items() if inode not in used):
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(SHM_DIR, name))
            removed.append(name)
    return removed


def _pids() -> list[int]:
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


def _mapped(pid: int, device: int) -> set[int]:
    # A line is: address perms offset dev inode path; another mount has another dev.
    dev = f" {os.major(device):02x}:{os.minor(device):02x} ".encode()
    inodes: set[int] = set()
    with contextlib.suppress(OSError), open(f"/proc/{pid}/maps", "rb") as maps:
        for line in maps:
            if b" /dev/shm/" in line and dev in line:
                inodes.add(int(line.split(maxsplit=5)[4]))
    return inodes


def _opened(pid: int, device: int) -> set[int]:
    inodes: set[int] = set()
    folder = f"/proc/{pid}/fd"
    with contextlib.suppress(OSError):
        for number in os.listdir(folder):
            with contextlib.suppress(OSError):
                if os.readlink(f"{folder}/{number}").startswith("/dev/shm/"):
                    status = os.stat(f"{folder}/{number}")
                    if status.st_dev == device:
                        inodes.add(status.st_ino)
    return inodes
