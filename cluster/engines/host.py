"""What this node is, as far as an engine's command line depends on it.

Looks at device files and /proc only: importing torch to ask costs seconds and memory.
"""

from __future__ import annotations

import os
from pathlib import Path

from cluster.engines.base import HostFacts, Platform


def host_facts(root: Path = Path("/")) -> HostFacts:
    """Facts of the node this runs on. `root`: where /dev and /proc are (tests)."""
    return HostFacts(
        platform=_platform(root / "dev"),
        cpu_flags=_cpu_flags(root / "proc/cpuinfo"),
        cores=len(os.sched_getaffinity(0)),
    )


def _platform(dev: Path) -> Platform:
    if any(dev.glob("davinci[0-9]*")):
        return "npu"
    if any(dev.glob("nvidia[0-9]*")):
        return "cuda"
    return "cpu"


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):  # x86, Arm
            return frozenset(value.split())
    return frozenset()
