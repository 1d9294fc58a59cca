#!/usr/bin/env python3
"""What the gateway adds to a real engine: a bare vLLM server with direct HTTP against a cluster of
one mixed worker with the same arguments, paired in one run.

Both are up at once; each round sends the same prompts to one, then to the other, in alternating
order, so that drift of the machine hits both alike. Figures are medians over the rounds.

    .venv/bin/python scripts/bench_overhead.py [--rounds 5] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import aiohttp
import yaml

from cluster.models import store
from cluster.settings import ClusterPaths
from cluster.topology.schema import ModelSpec

ROOT = Path(__file__).parents[1]
MODEL = "smollm2-135m-instruct"
BARE_PORT, GATEWAY_PORT = 18_101, 18_102
NAME = "bench-overhead"
GOALS = {"added_ttft_ms_at_1": 5.0, "tpot_ratio": 1.05, "tokens_per_s_ratio": 0.95}


@dataclass(frozen=True, slots=True)
class Round:
    """One burst of `streams` simultaneous streams."""

    ttft_s: float  # median over the streams
    tpot_s: float
    tokens_per_s: float


async def stream(
    session: aiohttp.ClientSession, url: str, body: dict[str, Any]
) -> tuple[float, float, int]:
    """TTFT, time from first to last token, tokens."""
    started = time.perf_counter()
    first = last = 0.0
    tokens = 0
    async with session.post(url + "/v1/completions", json=body) as answer:
        answer.raise_for_status()
        async for line in answer.content:
            if line.startswith(b"data: {"):
                last = time.perf_counter()
                first = first or last
                tokens += 1
    return first - started, last - first, tokens


async def burst(url: str, key: str, streams: int, tokens: int, prompts: list[str]) -> Round:
    headers = {"authorization": f"Bearer {key}"}
    async with aiohttp.ClientSession(headers=headers) as session:
        started = time.perf_counter()
        body = {"model": MODEL, "max_tokens": tokens, "ignore_eos": True, "temperature": 0}
        done = await asyncio.gather(
            *(
                stream(session, url, {**body, "stream": True, "prompt": p})
                for p in prompts[:streams]
            )
        )
        wall_s = time.perf_counter() - started
    return Round(
        ttft_s=statistics.median(ttft for ttft, _, _ in done),
        tpot_s=statistics.median(span / (n - 1) for _, span, n in done),
        tokens_per_s=sum(n for _, _, n in done) / wall_s,
    )


def topology() -> dict[str, Any]:
    return {
        "cluster_name": NAME,
        "max_workers": 0,
        "provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []},
        "auth": {"ssh_user": "root"},
        "metadata": {
            "serving": {
                "model": {"id": MODEL, "max_model_len_tokens": 4096, "dtype": "float32"},
                "pools": [
                    {"name": "mixed", "role": "mixed", "kv_cache_gib": 0.5, "max_num_seqs": 16}
                ],
                "islands": [{"name": "cpu", "pools": ["mixed"]}],
                "gateway": {"port": GATEWAY_PORT, "ingress": "direct"},
            }
        },
    }


@contextlib.contextmanager
def bare_server(tmp: Path) -> Any:
    """One vLLM server with the arguments of the mixed worker (see `pdcluster render`)."""
    model = store.resolve(ModelSpec(id=MODEL), lambda _what, _fraction: None)
    env = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(os.cpu_count()),
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    argv = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", model.path]
    argv += ["--served-model-name", MODEL, "--host", "127.0.0.1", "--port", str(BARE_PORT)]
    argv += ["--dtype", "float32", "--max-model-len", "4096", "--enforce-eager"]
    argv += ["--kv-cache-memory-bytes", "512M", "--distributed-executor-backend", "uni"]
    argv += ["--max-num-seqs", "16", "--disable-uvicorn-access-log"]
    with (tmp / "bare.log").open("w") as log:
        server = subprocess.Popen(
            argv, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        deadline = time.monotonic() + 240
        while True:
            with contextlib.suppress(urllib.error.URLError, OSError):
                urllib.request.urlopen(f"http://127.0.0.1:{BARE_PORT}/health", timeout=5).close()
                break
            if server.poll() is not None or time.monotonic() > deadline:
                sys.exit(
                    f"the bare server did not start; see\n{(tmp / 'bare.log').read_text()[-3000:]}"
                )
            time.sleep(0.5)
        yield
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def measure(rounds: int, tokens: int) -> dict[int, dict[str, list[Round]]]:
    key = ClusterPaths(NAME).api_key.read_text().strip()
    targets = {
        "bare": (f"http://127.0.0.1:{BARE_PORT}", ""),
        "cluster": (f"http://127.0.0.1:{GATEWAY_PORT}", key),
    }
    rng = random.Random(1)
    found: dict[int, dict[str, list[Round]]] = {}
    for streams in (1, 8, 16):
        found[streams] = {"bare": [], "cluster": []}
        # Round 0 warms both and is thrown away. One stream is quick: more rounds, less noise.
        for number in range((rounds * 3 if streams == 1 else rounds) + 1):
            prompts = [
                f"{rng.random()} The history of the city of Paris " * 4 for _ in range(streams)
            ]
            order = ["bare", "cluster"] if number % 2 else ["cluster", "bare"]
            for name in order:
                url, bearer = targets[name]
                result = asyncio.run(burst(url, bearer, streams, tokens, prompts))
                if number:
                    found[streams][name].append(result)
    return found


def summary(found: dict[int, dict[str, list[Round]]]) -> list[dict[str, float]]:
    rows = []
    for streams, sides in found.items():
        pairs = list(zip(sides["bare"], sides["cluster"], strict=True))
        rows.append(
            {
                "streams": streams,
                "bare_ttft_ms": 1e3 * statistics.median(b.ttft_s for b, _ in pairs),
                "cluster_ttft_ms": 1e3 * statistics.median(c.ttft_s for _, c in pairs),
                "added_ttft_ms": 1e3 * statistics.median(c.ttft_s - b.ttft_s for b, c in pairs),
                "tpot_ratio": statistics.median(c.tpot_s / b.tpot_s for b, c in pairs),
                "tokens_per_s_ratio": statistics.median(
                    c.tokens_per_s / b.tokens_per_s for b, c in pairs
                ),
                "bare_tokens_per_s": statistics.median(b.tokens_per_s for b, _ in pairs),
            }
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        tmp = Path(folder)
        file = tmp / "bench.yaml"
        file.write_text(yaml.safe_dump(topology()))
        pdcluster = [sys.executable, "-m", "cluster.cli"]
        with bare_server(tmp):
            try:
                subprocess.run([*pdcluster, "up", str(file)], check=True, stdout=sys.stderr)
                found = measure(options.rounds, options.tokens)
            finally:
                subprocess.run([*pdcluster, "down", str(file)], stdout=sys.stderr)
    rows = summary(found)
    if options.json:
        raw = {n: {s: [asdict(r) for r in v] for s, v in d.items()} for n, d in found.items()}
        print(json.dumps({"rows": rows, "goals": GOALS, "rounds": raw}))
        return
    print(f"goals: {GOALS}")
    for row in rows:
        print("  ".join(f"{name} {value:.2f}" for name, value in row.items()))


if __name__ == "__main__":
    main()
