"""Workers as Ray actors: spawn, find, remove, and what is left when a part of Ray is killed."""

import asyncio
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import ray
from ray_nodes import ray_of

from cluster.errors import PeerGone
from cluster.identity import WorkerState
from cluster.settings import ray_namespace
from cluster.topology.schema import PlacementSpec
from cluster.workers import handle, tree
from cluster.workers.gang import MeetingPlace
from cluster.workers.worker import EngineWorker

pytestmark = pytest.mark.integration

OWN_RAY = Path(__file__).parent / "own_ray.py"
ROOT = Path(__file__).parents[3]
# Until the supervisor has seen the segments of its tree.
SEEN_WITHIN_S = 2.0


@pytest.fixture
def ray_dir():
    folder = tempfile.mkdtemp(prefix="pdr-", dir="/tmp")
    yield folder
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def head():
    """The address of a Ray with two CPUs, which no test ends."""
    with ray_of(f"workers-{os.getpid()}", [{"num_cpus": 2}]) as racked:
        ray.shutdown()
        yield racked.address


@pytest.fixture
async def here(head, homes, remains):
    """This process in the namespace of the test's cluster, of which nothing is left to Ray."""
    ray.init(address=head, namespace=ray_namespace(remains.name), log_to_driver=False)
    try:
        yield
        for worker in await handle.find_all(remains.name):
            await handle.remove(remains.name, worker)
    finally:
        ray.shutdown()


def port_of(report):
    return int(report.url.rpartition(":")[2])


async def reaches(worker, *states, within_s=120.0):
    deadline_s = time.monotonic() + within_s
    while (report := await worker.report()).state not in states:
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.1)
    return report


async def test_a_worker_is_spawned_found_again_and_removed_without_a_trace(
    here, make_spec, remains, wrapped_interpreter, eventually
):
    spec = make_spec(interpreter=wrapped_interpreter)
    worker = await handle.spawn(spec)
    assert worker.id == spec.id
    assert "worker-test-secret" not in repr(spec)
    report = await reaches(worker, WorkerState.READY, WorkerState.FAILED)
    assert report.state is WorkerState.READY, report
    eventually(lambda: len(remains.segments) == 3)

    again = await handle.find(remains.name, spec.id)
    assert (await again.report()).engine_pid == report.engine_pid
    assert (await (await handle.spawn(spec)).report()).engine_pid == report.engine_pid
    assert await handle.find_all(remains.name) == [spec.id]
    assert b"simulated engine" in (await again.read_log(0, 1 << 16))[0]
    assert await again.transfers(0) == []

    await handle.remove(remains.name, spec.id)
    remains.assert_gone(within_s=0.5)
    await handle.remove(remains.name, spec.id)
    assert await handle.find(remains.name, spec.id) is None
    with pytest.raises(PeerGone):
        await again.report()


async def test_a_worker_that_fits_nowhere_says_what_is_missing_and_blocks_nobody(
    here, make_spec, remains
):
    spec = make_spec(placement=PlacementSpec(resources={"CPU": 1, "NPU": 16}))
    worker = await handle.spawn(spec)
    async with asyncio.timeout(30):
        report = await worker.report()
    assert report.state is WorkerState.STARTING
    assert "needs a node with CPU 1, NPU 16" in report.message
    assert "no NPU" in report.message
    assert await handle.find(remains.name, spec.id) is None  # not placed: taken back
    other = await handle.spawn(make_spec(index=1, placement=PlacementSpec(resources={"CPU": 2})))
    await reaches(other, WorkerState.READY)
    await handle.remove(remains.name, other.id)


async def test_a_label_that_no_node_has_keeps_a_worker_off_and_is_named(here, make_spec, remains):
    spec = make_spec(placement=PlacementSpec(labels={"accelerator": "atlas-a3"}))
    report = await (await handle.spawn(spec)).report()
    assert "no label accelerator" in report.message
    await handle.remove(remains.name, spec.id)


async def test_a_killed_actor_is_gone_for_its_handle_and_leaves_nothing(
    here, make_spec, remains, wrapped_interpreter, eventually
):
    spec = make_spec(interpreter=wrapped_interpreter)
    worker = await handle.spawn(spec)
    remains.port = port_of(await reaches(worker, WorkerState.READY))
    assert remains.listens
    eventually(lambda: len(remains.segments) == 3)
    actor = ray.get_actor(f"worker:{spec.id}:0", namespace=ray_namespace(remains.name))
    os.kill(await actor.__ray_call__.remote(lambda _self: os.getpid()), signal.SIGKILL)
    remains.assert_gone()
    with pytest.raises(PeerGone, match="decode/0#1 is gone"):
        await worker.report()
    # Its placement group is there: whoever begins anew must hear of it to take it away.
    assert await handle.find_all(remains.name) == [spec.id]
    assert await handle.find(remains.name, spec.id) is None
    assert await handle.find_all(remains.name) == []


async def test_an_actor_that_ray_ends_takes_its_engine_along(
    here, make_spec, remains, wrapped_interpreter, eventually
):
    # Ray kills the direct children of a worker that exits, and with them any supervisor there.
    spec = make_spec(interpreter=wrapped_interpreter)
    await reaches(await handle.spawn(spec), WorkerState.READY)
    eventually(lambda: len(remains.segments) == 3)
    actor = ray.get_actor(f"worker:{spec.id}:0", namespace=ray_namespace(remains.name))
    pid = await actor.__ray_call__.remote(lambda _self: os.getpid())
    actor.__ray_terminate__.remote()
    eventually(lambda: is_gone(pid), 60.0, "the actor's end")
    remains.assert_gone()


async def test_a_killed_supervisor_takes_its_engine_along(
    here, make_spec, remains, wrapped_interpreter, eventually
):
    spec = make_spec(interpreter=wrapped_interpreter)
    report = await reaches(await handle.spawn(spec), WorkerState.READY)
    remains.port = port_of(report)
    assert remains.listens
    eventually(lambda: len(remains.segments) == 3)
    await asyncio.sleep(SEEN_WITHIN_S)
    os.kill(tree.read_process(report.engine_pid).ppid, signal.SIGKILL)
    remains.assert_gone()


async def test_a_caller_in_a_foreign_namespace_is_told_how_to_connect(here, make_spec):
    with pytest.raises(RuntimeError, match=r"ray\.init\(namespace='pdcluster-other'\)"):
        await handle.find_all("other")


@pytest.mark.parametrize("victim", ["raylet", "driver"])
def test_whatever_is_killed_of_ray_nothing_is_left(
    make_spec, environment, remains, ray_dir, wrapped_interpreter, tmp_path, eventually, victim
):
    spec_file = tmp_path / "spec"
    spec_file.write_bytes(pickle.dumps(make_spec(interpreter=wrapped_interpreter)))
    # The driver and Ray itself carry another mark than the worker: they are not what is asked.
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    driver = subprocess.Popen(
        [sys.executable, str(OWN_RAY), str(spec_file), ray_dir],
        env=env,
        stdout=subprocess.PIPE,
        start_new_session=True,
    )
    ours = []
    try:
        pids = json.loads(driver.stdout.readline())
        assert pids["state"] == "ready", pids
        ours = tree.descendants(driver.pid)
        remains.port = int(pids["url"].rpartition(":")[2])
        eventually(lambda: len(remains.segments) == 3)
        assert remains.listens
        time.sleep(SEEN_WITHIN_S)
        os.kill(pids[victim], signal.SIGKILL)
        remains.assert_gone()
        # Nobody can reach it any more: the actor itself is not to linger either.
        eventually(lambda: is_gone(pids["actor"]), 5.0, "the actor's end")
    finally:
        driver.kill()
        driver.wait()
        for process in ours:
            tree.send(process, signal.SIGKILL)


def is_gone(pid):
    process = tree.read_process(pid)
    return process is None or process.state == "Z"


async def test_a_headless_rank_is_ready_when_its_process_runs_and_asks_for_its_head(
    make_spec, remains, monkeypatch
):
    asked = []

    class Gang:
        async def meeting_place(self):
            asked.append("head")
            return MeetingPlace("127.0.0.1", {"rendezvous": 9})  # nobody listens there

        def end_others(self):
            raise AssertionError("only rank 0 says this")

    spec = make_spec(nodes_per_replica=2)
    worker = EngineWorker(replace(spec, node_rank=1), "127.0.0.1", gang=Gang())
    await worker.start()
    report = await reaches(worker, WorkerState.READY)
    assert report.url == ""
    assert asked == ["head"]
    await worker.stop(0)
    remains.assert_gone(within_s=0.5)
