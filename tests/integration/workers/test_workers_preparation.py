"""What a worker sees to on its own node before it starts an engine: model, interpreter's path."""

import asyncio
import json
import os
import shlex
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

import cluster
from cluster.identity import WorkerState
from cluster.topology.schema import ModelSpec
from cluster.workers.worker import EngineWorker

pytestmark = pytest.mark.integration


is_there = os.path.exists


async def ended_or_ready(worker):
    await worker.start()
    deadline_s = time.monotonic() + 40
    while (report := await worker.report()).state not in (WorkerState.READY, WorkerState.FAILED):
        assert time.monotonic() < deadline_s, report
        await asyncio.sleep(0.05)
    return report


async def test_a_builtin_model_is_made_on_a_node_that_lacks_it(
    make_spec, remains, tmp_path, monkeypatch
):
    spec = make_spec()  # resolved under one HOME, as `up` does on the head
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another-host"))
    spec = replace(spec, model_path=spec.model_path.replace("cache", "gone"))
    worker = EngineWorker(spec, "127.0.0.1")
    report = await ended_or_ready(worker)
    assert report.state is WorkerState.READY, report.message
    assert (tmp_path / "another-host/pdcluster/models/simulated-1/config.json").exists()
    await worker.stop(0)
    remains.assert_gone(within_s=0.5)


async def test_a_folder_that_is_missing_here_fails_the_worker_before_any_engine_starts(
    make_spec, remains
):
    spec = replace(make_spec(), model=ModelSpec(id="/weights/glm"), model_path="/weights/glm")
    worker = EngineWorker(spec, "10.0.0.6")
    report = await ended_or_ready(worker)
    assert report.state is WorkerState.FAILED
    assert report.message.startswith("model /weights/glm: is missing on node 10.0.0.6; copy")
    assert report.engine_pid is None
    assert (await worker.read_log(0, 1 << 10)) == (b"", 0)
    remains.assert_gone(within_s=0.5)


async def test_an_engine_with_an_interpreter_of_its_own_finds_our_package_and_nothing_beside_it(
    make_spec, remains, tmp_path, monkeypatch
):
    monkeypatch.delenv("PYTHONPATH", raising=False)  # the engine's would go on with it
    # The interpreter of another environment: it says what it would find, then is the engine.
    python, found = tmp_path / "python", tmp_path / "found"
    ask = (
        "import cluster, importlib.util, json; "
        "found = [bool(importlib.util.find_spec(name)) for name in ('tests', 'ray')]; "
        "print(json.dumps([cluster.__file__, *found]))"
    )
    interpreter = shlex.quote(sys.executable)
    python.write_text(
        f'#!/bin/sh\n{interpreter} -S -c {shlex.quote(ask)} > {found}\nexec {interpreter} "$@"\n'
    )
    python.chmod(0o755)
    worker = EngineWorker(make_spec(interpreter=str(python)), "127.0.0.1")
    report = await ended_or_ready(worker)
    assert report.state is WorkerState.READY, report.message
    where, *foreign = json.loads(found.read_text())
    assert Path(where).name == "__init__.py"
    assert Path(where).is_relative_to(os.environ["XDG_RUNTIME_DIR"])
    assert foreign == [False, False]
    await worker.stop(0)
    assert not is_there(where)
    assert is_there(cluster.__file__)  # the link went, not what it leads to
    remains.assert_gone(within_s=0.5)
