"""Reading an engine's log: windows for `pdcluster logs`, and its last words when it failed.

The supervisor writes the file and moves it to FILE.1 when it is full. Called by: workers.worker.
"""

from __future__ import annotations

import re
from pathlib import Path

_TAIL_BYTES = 1 << 16
LAST_WORDS_LINES = 20
_CLOSING_LINES = 5
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_TRACEBACK = "Traceback (most recent call last):"
# `ValueError: ...` or `pkg.mod.SomeError`, behind whatever prefix the engine gives its lines.
_RAISED = re.compile(r"(?:^|\s)(?:[\w.]+\.)?\w*(?:Error|Exception|Exit|Interrupt)(?::\s|$)")


def read_window(path: Path, offset: int, limit_bytes: int) -> tuple[bytes, int]:
    """Up to `limit_bytes` of the log from `offset`, and the offset to go on from.

    A negative offset counts from the end. An offset beyond the end means that the log was moved
    away since: the rest of the old file comes first, then the new one from its beginning.
    No log yet: nothing, and offset 0. Raises: OSError.
    """
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return b"", 0
    if offset < 0:
        offset = max(0, size + offset)
    if offset > size:
        old = path.with_name(path.name + ".1")
        old_size = old.stat().st_size if old.exists() else 0
        if offset < old_size:
            data = _read(old, offset, limit_bytes)
            after = offset + len(data)
            return data, after if after < old_size else 0
        offset = 0
    data = _read(path, offset, limit_bytes)
    return data, offset + len(data)


def last_words(path: Path) -> tuple[str, ...]:
    """The lines of the log's tail that say most about why the engine ended. Never raises."""
    try:
        data, _ = read_window(path, -_TAIL_BYTES, _TAIL_BYTES)
    except OSError as error:
        return (f"the log cannot be read: {error}",)
    return telling_lines(data.decode(errors="replace"))


def telling_lines(text: str) -> tuple[str, ...]:
    """At most LAST_WORDS_LINES lines: the end of the first traceback, which is the cause where
    later ones only pass it on, and the log's own end."""
    lines = [line.rstrip() for line in _ANSI.sub("", text).splitlines() if line.strip()]
    closing_from = max(0, len(lines) - _CLOSING_LINES)
    begin = next((at for at, line in enumerate(lines) if _TRACEBACK in line), None)
    if begin is None:
        return tuple(lines[-LAST_WORDS_LINES:])
    raised = next(
        (at for at in range(begin + 1, len(lines)) if _RAISED.search(lines[at])), len(lines) - 1
    )
    room = LAST_WORDS_LINES - _CLOSING_LINES
    cause = range(max(begin, raised - room + 1), raised + 1)
    chosen = sorted({*cause, *range(closing_from, len(lines))})
    return tuple(lines[at] for at in chosen)


def _read(path: Path, offset: int, limit_bytes: int) -> bytes:
    with path.open("rb") as file:
        file.seek(offset)
        return file.read(max(0, limit_bytes))
