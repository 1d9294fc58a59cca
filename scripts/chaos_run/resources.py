"""What a cluster holds at a moment when nobody asks anything of it, to be held against another
such moment: whatever is more afterwards has leaked.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
from collections import Counter, defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from chaos_run.home import ROOT, Home, kind_of
from cluster.settings import ports_dir
from cluster.workers import tree

# Of the gateways and the controller: connections that are kept for the next request come and go.
FD_SLACK = 40
# Ray's spare ones, and those that have no name yet.
_UNCOUNTED = {"idle", ""}
# Ray's other processes open ports when they like.
_OURS = {"ControllerActor", "GatewayReplica", "WorkerActor", "supervisor", "engine"}
_GATEWAY_LOOKS = 12


@dataclass(frozen=True, slots=True)
class Held:
    """Counts. Everything must be as before; file descriptors up to FD_SLACK more."""

    workers_ready: int
    leases_open: int
    requests_running: int
    kv_blocks_pinned: int
    gateway_leases_open: int
    gateway_requests_running: int
    processes: dict[str, int]
    listening_ports: dict[str, int]
    ports_reserved: int
    actors: dict[str, int]
    placement_groups: int
    shm_segments: int
    runtime_folders: int
    fds: dict[str, int]


async def held(home: Home) -> Held:
    """Look at everything. Raises: RuntimeError: the controller does not answer."""
    status = await asyncio.to_thread(home.status, 20.0)
    if status is None:
        raise RuntimeError("the controller does not answer")
    facts, (processes, ports, reserved, shm, fds) = await asyncio.gather(
        asyncio.to_thread(_ray_facts, home), asyncio.to_thread(_of_processes, home)
    )
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(force_close=True)) as session:
        running = pinned = 0
        for report in status.workers:
            if report.url:
                values = await _metrics(session, report.url)
                running += int(values["vllm:num_requests_running"])
                running += int(values["vllm:num_requests_waiting"])
                pinned += values["vllm:kv_cache_usage_perc"] > 0
        looks = [await _metrics(session, home.endpoint) for _ in range(_GATEWAY_LOOKS)]
    runtime = home.folder / "run" / f"pdcluster-{os.getuid()}" / home.cluster / "w"
    return Held(
        workers_ready=sum(report.state == "ready" for report in status.workers),
        leases_open=sum(report.counters.leases_open for report in status.workers),
        requests_running=running,
        kv_blocks_pinned=pinned,
        # Which replica answers is the kernel's choice: the most that any of them said.
        gateway_leases_open=int(max(look["pdcluster_kv_leases_open"] for look in looks)),
        gateway_requests_running=int(
            max(look["pdcluster_gateway_requests_running"] for look in looks)
        ),
        processes=processes,
        listening_ports=ports,
        ports_reserved=reserved,
        actors=facts["actors"],
        placement_groups=facts["placement_groups"],
        shm_segments=shm,
        runtime_folders=len(list(runtime.glob("*"))),
        fds=fds,
    )


def leaks(before: Held, after: Held) -> list[str]:
    """What is otherwise than before, in words."""
    found = []
    then = asdict(before)
    for name, now in asdict(after).items():
        if name == "fds":
            found += [
                f"fds of {kind}: {then['fds'].get(kind, 0)}, now {count}"
                for kind, count in now.items()
                if count > then["fds"].get(kind, 0) + FD_SLACK
            ]
        elif now != then[name]:
            found.append(f"{name.replace('_', ' ')}: {then[name]}, now {now}")
    return found


def _ray_facts(home: Home) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, str(Path(__file__).with_name("ray_facts.py")), home.cluster],
        env={**home.env, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
        start_new_session=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _of_processes(
    home: Home,
) -> tuple[dict[str, int], dict[str, int], int, int, dict[str, int]]:
    """Processes and listening ports by kind; reserved ports, shm segments; descriptors by kind."""
    processes: Counter[str] = Counter()
    ports: Counter[str] = Counter()
    fds: Counter[str] = Counter()
    reserved: set[str] = set()
    pids = []
    for process in home.processes():
        kind = kind_of(process)
        if kind in _UNCOUNTED:
            continue
        with contextlib.suppress(psutil.Error):
            pids.append(process.pid)
            processes[kind] += 1
            if kind in _OURS:
                ports[kind] += sum(
                    connection.status == psutil.CONN_LISTEN
                    for connection in process.net_connections("tcp")
                )
            reserved |= _locks(process.pid)
            if kind in ("GatewayReplica", "ControllerActor"):
                fds[kind] += process.num_fds()
    shm = len(tree.segments_used_by(pids))
    listening = {kind: count for kind, count in ports.items() if count}
    return dict(processes), listening, len(reserved), shm, dict(fds)


def _locks(pid: int) -> set[str]:
    folder = str(ports_dir())
    found = set()
    with contextlib.suppress(OSError):
        for entry in os.scandir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                target = os.readlink(entry.path)
                if target.startswith(folder):
                    found.add(target)
    return found


async def _metrics(session: aiohttp.ClientSession, url: str) -> defaultdict[str, float]:
    """Every series' value, summed over its labels."""
    found: defaultdict[str, float] = defaultdict(float)
    async with session.get(f"{url}/metrics") as response:
        for line in (await response.text()).splitlines():
            if line and not line.startswith("#"):
                name = line.partition("{")[0].partition(" ")[0]
                found[name] += float(line.rpartition(" ")[2])
    return found
