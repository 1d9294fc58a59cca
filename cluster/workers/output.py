"""The log file of an engine's output.

Called by: workers.supervisor, and runs inside it: standard library only.
"""

from __future__ import annotations

import os


class Log:
    """A file of bounded size that never raises: what cannot be written is counted as lost."""

    def __init__(self, path: str, limit_bytes: int) -> None:
        self.lines_dropped = 0
        self.why_dropped = ""  # the last of them
        self._path = path
        self._limit_bytes = limit_bytes
        self._noted = 0
        self._fd = -1
        self._size = 0

    def write(self, data: bytes) -> None:
        try:
            if self._fd < 0:
                self._open()
            if self._size and self._size + len(data) > self._limit_bytes:
                cut = data.rfind(b"\n") + 1
                self._append(data[:cut])
                data = data[cut:]
                self._rotate()
            if self._noted < self.lines_dropped:
                lost = self.lines_dropped - self._noted
                self._append(f"pdcluster: {lost} lines lost here: {self.why_dropped}\n".encode())
                self._noted = self.lines_dropped
            self._append(data)
        except OSError as error:
            self.why_dropped = error.strerror or str(error)
            self.lines_dropped += data.count(b"\n")

    def _open(self) -> None:
        self._fd = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._fd).st_size

    def _rotate(self) -> None:
        os.replace(self._path, self._path + ".1")
        os.close(self._fd)
        self._fd = -1
        self._open()

    def _append(self, data: bytes) -> None:
        while data:
            written = os.write(self._fd, data)
            self._size += written
            data = data[written:]
