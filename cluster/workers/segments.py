"""Which shared-memory segments an engine's tree makes, while it makes them.

Once a process is gone nobody can tell whose its segments were. Called by: workers.supervisor, and
runs inside it: standard library only.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import time

from cluster.workers import tree

_IN_CREATE_OR_MOVED_TO = 0x100 | 0x80
# A segment is made first and mapped a little later: look at once, and again after this long.
_LATE_S = 3.0
# Others may make segments at any rate; we look at most this often.
_PAUSE_S = 0.5
# Without inotify (its instances are limited per user) the folder is listed this often.
_POLL_S = 5.0


class Segments:
    """Which /dev/shm segments the tree has made or used since we began."""

    def __init__(self, record: str | None) -> None:
        self.attributed: dict[str, int] = {}
        self._record = record
        self._before = set(tree.segments().items())
        self._last_look_s = -_PAUSE_S
        self._soon_s: float | None = None
        self._late_s: float | None = None
        self.inotify_fd = self._watch()
        if self.inotify_fd < 0:
            self._late_s = time.monotonic()

    def appeared(self, now_s: float) -> None:
        """Something was made in /dev/shm, by whomever."""
        with contextlib.suppress(OSError):
            os.read(self.inotify_fd, 1 << 16)
        if self._soon_s is None:
            self._soon_s = max(now_s, self._last_look_s + _PAUSE_S)
        self._late_s = now_s + _LATE_S

    def due_in_s(self, now_s: float) -> float | None:
        due = [at_s for at_s in (self._soon_s, self._late_s) if at_s is not None]
        return max(0.0, min(due) - now_s) if due else None

    def look_if_due(self, now_s: float) -> None:
        if self.due_in_s(now_s) != 0.0:
            return
        self._last_look_s = now_s
        self._soon_s = None
        if self._late_s is not None and self._late_s <= now_s:
            self._late_s = now_s + _POLL_S if self.inotify_fd < 0 else None
        self.look()

    def look(self) -> None:
        born = {
            name: inode
            for name, inode in tree.segments().items()
            if (name, inode) not in self._before and self.attributed.get(name) != inode
        }
        if not born:
            return
        used = tree.segments_used_by(process.pid for process in tree.descendants(os.getpid()))
        found = {name: inode for name, inode in born.items() if inode in used}
        if found:
            self.attributed.update(found)
            self._write_record()

    def _watch(self) -> int:
        libc = ctypes.CDLL(None, use_errno=True)
        fd: int = libc.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC)
        if fd >= 0 and (
            libc.inotify_add_watch(fd, tree.SHM_DIR.encode(), _IN_CREATE_OR_MOVED_TO) < 0
        ):
            os.close(fd)
            return -1
        return fd

    def _write_record(self) -> None:
        # For the owner, should it have to clean up after us.
        if self._record is not None:
            with contextlib.suppress(OSError), open(self._record, "w", encoding="utf-8") as file:
                json.dump(self.attributed, file)
