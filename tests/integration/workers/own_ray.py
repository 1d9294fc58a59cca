"""A Ray of its own with one worker in it, for tests that kill parts of it.

Argument: FILE with a pickled WorkerSpec, and Ray's temporary folder. Prints one JSON line with pids
when the worker is ready, then sleeps: whoever started this ends it.
"""

import asyncio
import json
import os
import pickle
import sys
from pathlib import Path

import ray

from cluster.settings import ray_namespace
from cluster.workers import handle


async def main(spec, ray_dir):
    ray.init(
        address="local",
        num_cpus=2,
        include_dashboard=False,
        _temp_dir=ray_dir,
        namespace=ray_namespace(spec.cluster),
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    worker = await handle.spawn(spec)
    report = await worker.report()
    while report.state not in ("ready", "failed"):
        await asyncio.sleep(0.1)
        report = await worker.report()
    actor = ray.get_actor(f"worker:{spec.id}:0", namespace=ray_namespace(spec.cluster))
    actor_pid = await actor.__ray_call__.remote(lambda _self: os.getpid())
    raylet = ray._private.worker._global_node.all_processes["raylet"][0].process.pid
    print(
        json.dumps(
            {
                "state": report.state,
                "message": report.message,
                "url": report.url,
                "engine": report.engine_pid,
                "actor": actor_pid,
                "raylet": raylet,
                "driver": os.getpid(),
            }
        ),
        flush=True,
    )
    await asyncio.sleep(600)


asyncio.run(main(pickle.loads(Path(sys.argv[1]).read_bytes()), sys.argv[2]))
