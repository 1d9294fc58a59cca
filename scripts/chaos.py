#!/usr/bin/env python3
"""Random faults under mixed traffic, and every answer held against an undisturbed engine's.

    .venv/bin/python scripts/chaos.py                       200 faults on simulated engines
    .venv/bin/python scripts/chaos.py --seed 7 --faults 20  as another run did, but shorter
    .venv/bin/python scripts/chaos.py --engines real        real vLLM engines on the CPU, 12 faults

Brings up a cluster of its own (own folders, free ports, loopback), torments it, takes it down.
The seed says which faults come in which order and what is asked; whom a fault hits also depends on
who is ready then. Exit code 0 only if no request failed, no answer was wrong, nothing is held that
was not held before, and `down` left nothing. Ctrl-C ends it and leaves nothing behind.
"""

import argparse
import asyncio
import json
import random
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from chaos_run import report  # noqa: E402
from chaos_run.home import CommandFailed  # noqa: E402
from chaos_run.run import Options, Run, run  # noqa: E402
from chaos_run.schedule import Kind  # noqa: E402

_FAULTS = {"simulated": 200, "real": 12}
_RATE_PER_S = {"simulated": 0.5, "real": 0.1}
_CLIENTS = {"simulated": 12, "real": 8}


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--engines", choices=("simulated", "real"), default="simulated")
    parser.add_argument("--faults", type=int, help="how many; default 200, real engines 12")
    parser.add_argument("--seed", type=int, help="default: any; it is printed")
    parser.add_argument("--rate", type=float, help="faults per second; default 0.5, real 0.1")
    parser.add_argument("--duration", type=float, help="seconds; no further fault after that")
    parser.add_argument("--clients", type=int, help="how many ask; default 12, real engines 8")
    parser.add_argument(
        "--only", action="append", default=[], choices=[k.name.lower() for k in Kind], help="kind"
    )
    parser.add_argument("--json", type=Path, help="file for every figure")
    given = parser.parse_args()
    seed = random.SystemRandom().randrange(1 << 32) if given.seed is None else given.seed
    options = Options(
        seed=seed,
        faults=given.faults or _FAULTS[given.engines],
        rate_per_s=given.rate or _RATE_PER_S[given.engines],
        clients=given.clients or _CLIENTS[given.engines],
        engines=given.engines,
        duration_s=given.duration,
        kinds=tuple(Kind[name.upper()] for name in given.only),
    )
    print(f"seed {seed}", file=sys.stderr, flush=True)
    try:
        outcome = asyncio.run(_interruptible(options))
    except (KeyboardInterrupt, asyncio.CancelledError):
        print("ended before its time; nothing is left of it", file=sys.stderr)
        return 130
    except CommandFailed as failed:
        print(failed, file=sys.stderr)
        return 1
    found = report.summary(outcome)
    if given.json:
        given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(report.table(found))
    return 0 if found["is_well"] else 1


async def _interruptible(options: Options) -> Run:
    began_s = time.monotonic()

    def say(text: str) -> None:
        print(f"{time.monotonic() - began_s:7.1f} s  {text}", file=sys.stderr, flush=True)

    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    return await run(options, say)


if __name__ == "__main__":
    sys.exit(main())
