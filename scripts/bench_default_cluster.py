#!/usr/bin/env python3
"""The default cluster's price: seconds from `up` to the first answer, memory of everything that
belongs to the cluster (PSS: shared pages counted once), CPU while idle.

    .venv/bin/python scripts/bench_default_cluster.py [--json]
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

import psutil
import yaml

from cluster.settings import OWNER_ENV, ClusterPaths

ROOT = Path(__file__).parents[1]
NAME = "bench-default"
PORT = 18_103
IDLE_S = 30.0
GOALS = {"first_answer_s": 90.0, "memory_gib": 6.0, "idle_cpu_percent_of_a_core": 5.0}


def processes() -> list[psutil.Process]:
    """Everything marked as this cluster's in its environment."""
    mine = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(OWNER_ENV, "").split("/")[0] == NAME:
                mine.append(process)
    return mine


def name_of(process: psutil.Process) -> str:
    words = process.cmdline()
    text = " ".join(words)
    for known in ("vllm.entrypoints", "gcs_server", "raylet", "supervisor", "ray::"):
        if known in text:
            return words[0][:40] if known == "ray::" else known
    return " ".join(Path(word).name for word in words[:3])[:48]


def cpu_s(found: list[psutil.Process]) -> dict[int, float]:
    seconds = {}
    for process in found:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds[process.pid] = times.user + times.system
    return seconds


def ask(key: str) -> None:
    body = {
        "model": "smollm2-135m-instruct",
        "messages": [{"role": "user", "content": "What is the capital of France?"}],
        "max_tokens": 16,
    }
    request = urllib.request.Request(
        f"http://127.0.0.1:{PORT}/v1/chat/completions",
        data=json.dumps(body).encode(),
        headers={"authorization": f"Bearer {key}", "content-type": "application/json"},
    )
    urllib.request.urlopen(request, timeout=120).read()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    parsed = yaml.safe_load((ROOT / "topologies/local-cpu.yaml").read_text())
    parsed["cluster_name"] = NAME
    parsed["metadata"]["serving"]["gateway"]["port"] = PORT
    parsed["metadata"]["serving"]["control"] = {"port": PORT + 1}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "bench.yaml"
        file.write_text(yaml.safe_dump(parsed))
        pdcluster = [sys.executable, "-m", "cluster.cli"]
        try:
            started = time.monotonic()
            subprocess.run([*pdcluster, "up", str(file)], check=True, stdout=sys.stderr)
            ask(ClusterPaths(NAME).api_key.read_text().strip())
            first_answer_s = time.monotonic() - started
            time.sleep(10)  # let start-up work settle before measuring idleness
            found = processes()
            before, begun = cpu_s(found), time.monotonic()
            time.sleep(IDLE_S)
            after, span_s = cpu_s(found), time.monotonic() - begun
            percent = {
                pid: 100 * (after[pid] - before[pid]) / span_s for pid in after if pid in before
            }
            memory = {}
            for process in found:
                with contextlib.suppress(psutil.Error):
                    memory[process.pid] = process.memory_full_info().pss
            names = {p.pid: name_of(p) for p in found if p.pid in memory}
        finally:
            subprocess.run([*pdcluster, "down", str(file)], stdout=sys.stderr)
    result = {
        "first_answer_s": round(first_answer_s, 1),
        "memory_gib": round(sum(memory.values()) / 2**30, 2),
        "idle_cpu_percent_of_a_core": round(sum(percent.values()), 1),
    }
    if options.json:
        print(json.dumps({"measured": result, "goals": GOALS}))
        return
    print(f"measured: {result}\ngoals:    {GOALS}")
    for pid in sorted(memory, key=lambda p: -memory[p]):
        print(f"  {memory[pid] / 2**20:8.0f} MiB  {percent.get(pid, 0):5.1f} %  {names[pid]}")


if __name__ == "__main__":
    main()
