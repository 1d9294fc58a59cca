"""Start a node's xLLM processes, one per NPU, and end them together.

    python -m cluster.engines.xllm --count 16 --first-rank 0 --first-port 20001 -- \
        xllm --model=/models/m --nnodes=16 ...

Process i gets --node_rank, --port and --devices=npu:i besides what stands after `--`; its NPU is
counted among those that ASCEND_RT_VISIBLE_DEVICES shows. SIGTERM and SIGINT go on to all. When one
ends, the others are ended too, and its exit status is ours: a replica with a rank missing hangs.
Started by the supervisor of a worker whose engine is xllm.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from typing import Any

# Between SIGTERM and SIGKILL; the worker's supervisor ends what is left in any case.
GRACE_S = 5.0


def written(flags: Mapping[str, Any]) -> list[str]:
    """Flags as xLLM's gflags read them: --name=value, booleans as words, None not at all."""
    return [
        f"--{name}={str(value).lower() if isinstance(value, bool) else value}"
        for name, value in flags.items()
        if value is not None
    ]


def command_of(
    index: int, base: Sequence[str], first_rank: int, first_port: int, draft_devices: bool
) -> list[str]:
    """The command of the process for the node's NPU number `index`."""
    own: dict[str, Any] = {
        "port": first_port + index,
        "devices": f"npu:{index}",
        "draft_devices": f"npu:{index}" if draft_devices else None,
        "node_rank": first_rank + index,
    }
    return [*base, *written(own)]


def main(argv: Sequence[str] | None = None) -> int:
    """Returns when no process is left: the exit status of the one that ended first."""
    parser = argparse.ArgumentParser(description="Start a node's xLLM processes.")
    parser.add_argument("--count", type=int, required=True)
    parser.add_argument("--first-rank", type=int, required=True)
    parser.add_argument("--first-port", type=int, required=True)
    parser.add_argument("--draft-devices", action="store_true")
    parser.add_argument("base", nargs=argparse.REMAINDER)
    given = parser.parse_args(argv)
    base = given.base[1:] if given.base[:1] == ["--"] else given.base
    ranks: list[subprocess.Popen[bytes]] = []

    def forward(number: int, _frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    # Before the first process: a signal must not find some started and nobody to tell them.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    try:
        for index in range(given.count):
            words = command_of(index, base, given.first_rank, given.first_port, given.draft_devices)
            ranks.append(subprocess.Popen(words))
        return _first_end(ranks)
    finally:
        _end(ranks)


def _first_end(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until one of them ends. Reaps nothing else: the processes are all that we started."""
    while True:
        # Leaves the status for Popen, which would otherwise not learn of it.
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOWAIT)
        for rank in ranks:
            status = rank.poll()
            if status is not None:
                return status if status >= 0 else 128 - status


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    until_s = time.monotonic() + GRACE_S
    for rank in ranks:
        try:
            rank.wait(max(0.0, until_s - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
