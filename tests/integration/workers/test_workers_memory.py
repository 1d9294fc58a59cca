"""Engines that get no more memory: told no (RLIMIT_AS), or ended by the kernel (a cgroup)."""

import asyncio
import contextlib
import os
import signal
import sys
import uuid
from pathlib import Path

import pytest
from live_worker import reaches

from cluster.identity import WorkerState
from cluster.workers import memory

pytestmark = pytest.mark.integration

MEMORY = Path("/sys/fs/cgroup/memory")  # version 1
UNIFIED = Path("/sys/fs/cgroup")


@pytest.fixture
def interpreter(tmp_path):
    """A program that takes the place of the engine's Python: a shell script."""

    def write(script):
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    return write


@pytest.fixture
def small_group():
    """A memory cgroup of 64 MiB: the file that a process writes its pid to, to be in it."""
    name = f"pdcluster-test-{uuid.uuid4().hex[:8]}"
    is_first = (MEMORY / "memory.limit_in_bytes").exists()
    group = (MEMORY if is_first else UNIFIED) / name
    try:
        group.mkdir()
        limit = "memory.limit_in_bytes" if is_first else "memory.max"
        (group / limit).write_text(str(64 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no memory cgroup can be made here: {error}")
    yield group / "cgroup.procs"
    group.rmdir()


async def test_an_engine_that_is_refused_memory_says_so_itself(start, interpreter):
    greedy = f"exec {sys.executable} -c 'bytearray(1 << 34)'"
    worker = await start(interpreter=interpreter(f"ulimit -v 500000\n{greedy}"))
    report = await reaches(worker, WorkerState.FAILED)
    assert "exit code 1; out of memory: MemoryError" in report.message
    assert "MemoryError" in report.last_words


async def test_an_engine_that_the_kernel_ends_for_memory_is_called_that(
    start, interpreter, small_group
):
    greedy = f"exec {sys.executable} -c 'bytearray(b\"x\" * (1 << 28))'"
    worker = await start(interpreter=interpreter(f"echo $$ > {small_group}\n{greedy}"))
    report = await reaches(worker, WorkerState.FAILED)
    assert "exit code 137 (signal 9); out of memory" in report.message


async def test_a_kill_for_memory_that_was_counted_before_its_engine_ended_is_told_all_the_same(
    start, monkeypatch
):
    counted, looks = 3, asyncio.Queue()

    def kills_so_far():
        looks.put_nowait(None)
        return memory.Kills(None, counted)

    monkeypatch.setattr(memory, "kills_so_far", kills_so_far)
    monkeypatch.setattr("cluster.workers.worker._MEMORY_EVERY_LOOKS", 1)
    worker = await start()
    report = await reaches(worker, WorkerState.READY)
    counted = 4
    while not looks.empty():
        looks.get_nowait()
    async with asyncio.timeout(20):
        await looks.get()
    os.kill(report.engine_pid, signal.SIGKILL)
    report = await reaches(worker, WorkerState.FAILED)
    assert "out of memory: the kernel ended a process" in report.message
