"""What a test may ask of a process that can end at any moment: gone is an answer, not an error."""

from __future__ import annotations

import psutil


def cmdline(process: psutil.Process) -> str:
    """Its words, with a space between; "" of one that has ended, reaped or not."""
    try:
        return " ".join(process.cmdline())
    except (psutil.Error, OSError):
        return ""


def environ(process: psutil.Process) -> dict[str, str]:
    """The environment it was started with; {} of one that has ended."""
    try:
        return process.environ()
    except (psutil.Error, OSError):
        return {}
