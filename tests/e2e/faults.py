"""Faults of real processes, and what a cluster holds of the machine: for tests that break engines
and then look whether anything stayed behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from processes import cmdline

from cluster.settings import OWNER_ENV

_CGROUPS = Path("/sys/fs/cgroup")


def wait_until(holds: Callable[[], object], within_s: float, what: str) -> None:
    deadline_s = time.monotonic() + within_s
    while not holds():
        if time.monotonic() > deadline_s:
            pytest.fail(f"{what}: not within {within_s:g} s")
        time.sleep(0.05)


def opened(url: str) -> http.client.HTTPResponse:
    answer = urllib.request.urlopen(url, timeout=10)
    assert isinstance(answer, http.client.HTTPResponse)
    return answer


def family(pid: int) -> list[psutil.Process]:
    """A process and all its descendants."""
    first = psutil.Process(pid)
    return [first, *first.children(recursive=True)]


def engine_core(pid: int) -> psutil.Process:
    """The process behind vLLM's API server that holds the model."""
    (core,) = [p for p in family(pid)[1:] if "EngineCore" in p.name() or "EngineCore" in cmdline(p)]
    return core


@contextlib.contextmanager
def frozen(processes: Sequence[psutil.Process]) -> Iterator[None]:
    """SIGSTOP now, SIGCONT at the end to those that still exist."""
    for process in processes:
        process.send_signal(signal.SIGSTOP)
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGCONT)


def listeners(port: int) -> list[int]:
    """Pids that listen on a TCP port."""
    found = psutil.net_connections("tcp")
    return sorted(
        c.pid for c in found if c.pid and c.status == psutil.CONN_LISTEN and c.laddr.port == port
    )


def holders(port: int) -> dict[int, int]:
    """Who serves the connections to a TCP port: the client's port to the server's pid."""
    return {
        c.raddr.port: c.pid
        for c in psutil.net_connections("tcp")
        if c.pid and c.raddr and c.laddr.port == port
    }


@contextlib.contextmanager
def memory_limit(pids: Sequence[int], more_bytes: int) -> Iterator[None]:
    """The kernel lets these processes have `more_bytes` together and then kills one, as it does
    when a host's memory is used up. Skips the test where no control group can be made."""
    is_v1 = (_CGROUPS / "memory").is_dir()
    group = (_CGROUPS / "memory" if is_v1 else _CGROUPS) / f"pdcluster-e2e-{os.getpid()}"
    try:
        group.mkdir()
        limit = group / ("memory.limit_in_bytes" if is_v1 else "memory.max")
        limit.write_text(str(more_bytes))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group of memory can be made here: {error}")
    try:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                (group / "cgroup.procs").write_text(str(pid))
        yield
    finally:
        wait_until(lambda: not (group / "cgroup.procs").read_text(), 30, "the group is empty")
        group.rmdir()


# What it holds of the machine


@dataclass(frozen=True)
class Footprint:
    """What a cluster holds that a fault could leave behind."""

    actors: dict[str, int]  # living ones of its namespace, by name without generation
    placement_groups: int
    processes: dict[str, int]  # by what they are
    listening: int  # TCP sockets of engines and gateways


_ASK_RAY = """
import json, sys
from cluster.launcher import local_ray, running
with local_ray.connected(running.choose(sys.argv[1])):
    import ray
    from ray.util.placement_group import placement_group_table
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    groups = [g for g in placement_group_table().values() if g["state"] != "REMOVED"]
    print("asked:" + json.dumps([names, len(groups)]))
"""


def footprint(cluster: str) -> Footprint:
    actors, groups = _ask_ray(cluster)
    mine = [process for process in _processes(cluster) if kind_of(process)]
    sockets = [s for p in mine for s in _listening(p)]
    return Footprint(
        dict(Counter(name.partition("#")[0] for name in actors)),
        groups,
        dict(Counter(map(kind_of, mine))),
        len(sockets),
    )


def kind_of(process: psutil.Process) -> str:
    """What a process of a cluster is; "": one of Ray's own, which come and go."""
    said = cmdline(process)
    kinds = {
        "cluster.workers.supervisor": "supervisor",
        "vllm.entrypoints": "engine",
        "EngineCore": "engine core",
        "ray::WorkerActor": "worker",
        "ray::ControllerActor": "controller",
        "ray::GatewayReplica": "gateway",
    }
    return next((kind for mark, kind in kinds.items() if mark in said), "")


def _processes(cluster: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            is_ours = process.environ().get(OWNER_ENV, "").split("/")[0] == cluster
            if is_ours and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
    return found


def _listening(process: psutil.Process) -> list[int]:
    with contextlib.suppress(psutil.Error):
        sockets = process.net_connections("tcp")
        return [s.laddr.port for s in sockets if s.status == psutil.CONN_LISTEN]
    return []


def _ask_ray(cluster: str) -> tuple[list[str], int]:
    """Names of living actors, and how many placement groups there are."""
    done = subprocess.run(
        [sys.executable, "-c", _ASK_RAY, cluster], capture_output=True, text=True, timeout=60
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("asked:")]
    assert lines, done.stderr
    names, groups = json.loads(lines[-1].removeprefix("asked:"))
    return names, groups
