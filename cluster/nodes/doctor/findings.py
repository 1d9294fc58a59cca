"""What the doctor says: which host, what was found, what it should be, how to mend it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Severity = Literal["error", "warning"]


@dataclass(frozen=True, slots=True)
class HostFinding:
    """error: the topology cannot work so. warning: it may work, slower or not for long."""

    severity: Severity
    host: str
    check: str
    found: str
    expected: str
    fix: str


def size(count: float) -> str:
    """Bytes for people: `640 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if count >= 10 or unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError("unreachable")


def listed(names: list[str], most: int = 4) -> str:
    """`a, b, c and 3 more`."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[:most])} and {len(names) - most} more"
