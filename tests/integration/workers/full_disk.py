"""In a mount namespace of its own (as root): a worker whose log's disk is full from the start.

Arguments: FOLDER, to mount a tiny tmpfs on; FILE with a pickled WorkerSpec. Prints one JSON line
with what the worker reports before and after its disk has room again."""

import asyncio
import json
import os
import pickle
import subprocess
import sys
import time
from pathlib import Path

from live_worker import fault, reaches, streams

from cluster.identity import WorkerState
from cluster.settings import ClusterPaths
from cluster.workers.worker import EngineWorker

SIZE_BYTES = 64 << 10


def fill(folder):
    ballast = folder / "ballast"
    with ballast.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            print(error, file=sys.stderr)
    return ballast


async def lost(worker, more_than=0):
    deadline_s = time.monotonic() + 10
    while (report := await worker.report()).log_lines_lost <= more_than:
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.05)
    return report


async def chatter(report):
    """Requests that fail, each of which the engine writes a line about."""
    await fault(report, fail_transfers=True)
    for _ in range(5):
        params = {"do_remote_prefill": True, "do_remote_decode": False}
        async with streams(report, 1, 2, kv_transfer_params=params) as (answer,):
            await answer.text()


async def main(folder, spec):
    log = ClusterPaths(spec.cluster).worker_log(spec.id, spec.node_rank)
    assert folder in log.parents
    log.parent.mkdir(parents=True)
    ballast = fill(folder)
    worker = EngineWorker(spec, "127.0.0.1")
    await worker.start()
    ready = await reaches(worker, WorkerState.READY, WorkerState.FAILED)
    first = await lost(worker)
    async with streams(ready, 1, 20) as (answer,):
        text = await answer.text()
    ballast.unlink()
    await chatter(ready)
    written, _ = await worker.read_log(0, 1 << 16)
    os.kill(ready.engine_pid, 9)
    failed = await reaches(worker, WorkerState.FAILED)
    await worker.stop(0)
    said = {
        "state": ready.state,
        "message": ready.message,
        "lost": first.log_lines_lost,
        "is_whole": "[DONE]" in text,
        "written": written.decode(),
        "last_words": failed.last_words,
    }
    print(json.dumps(said))


mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_BYTES}", "tmpfs", sys.argv[1]]
subprocess.run(mount, check=True)
asyncio.run(main(Path(sys.argv[1]), pickle.loads(Path(sys.argv[2]).read_bytes())))
