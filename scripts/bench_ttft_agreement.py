#!/usr/bin/env python3
"""Time to first token as clients see it, and as the gateway says: do the two agree?

Brings up a cluster of simulated engines (or asks the endpoint given by --url and --key-file, whose
engines may be real), sends streams, and compares the clients' mean with the mean of
pdcluster_gateway_ttft_seconds over the same streams. Percentiles of the histogram are shown beside:
they are read between buckets 1.25 times apart.

    .venv/bin/python scripts/bench_ttft_agreement.py [--streams 200] [--at-once 8] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import aiohttp
import yaml
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[1]
NAME = "bench-ttft"
PORT = 18_203
SERIES = "pdcluster_gateway_ttft_seconds"
GOAL_PERCENT = 10.0
Buckets = dict[float, float]


async def stream(session: aiohttp.ClientSession, model: str, prompt: str) -> float:
    """Seconds from the call to the first byte of the answer."""
    body = {"model": model, "prompt": prompt, "max_tokens": 16, "stream": True}
    began = time.perf_counter()
    async with session.post("/v1/completions", json=body) as answer:
        answer.raise_for_status()
        await answer.content.readany()
        took_s = time.perf_counter() - began
        await answer.read()
    return took_s


async def histogram(session: aiohttp.ClientSession) -> tuple[Buckets, float, float]:
    """Cumulative counts by upper bound, sum and count, over all pairs of pools."""
    async with session.get("/metrics") as answer:
        text = await answer.text()
    buckets: Buckets = {}
    totals = {f"{SERIES}_sum": 0.0, f"{SERIES}_count": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name == f"{SERIES}_bucket":
                bound = float(sample.labels["le"])
                buckets[bound] = buckets.get(bound, 0.0) + sample.value
            elif sample.name in totals:
                totals[sample.name] += sample.value
    return buckets, totals[f"{SERIES}_sum"], totals[f"{SERIES}_count"]


def quantile(buckets: Buckets, share: float) -> float:
    """As histogram_quantile."""
    rank, low, below = share * max(buckets.values()), 0.0, 0.0
    for bound, count in sorted(buckets.items()):
        if count >= rank and count > below:
            return (
                low
                if bound == float("inf")
                else low + (bound - low) * (rank - below) / (count - below)
            )
        low, below = bound, count
    return low


async def measure(url: str, key: str, streams: int, at_once: int) -> dict[str, Any]:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    async with aiohttp.ClientSession(url, headers=headers) as session:
        async with session.get("/v1/models") as answer:
            model = (await answer.json())["data"][0]["id"]
        for number in range(4):
            await stream(session, model, f"warm {number} ")
        before, sum_before, count_before = await histogram(session)
        seen: list[float] = []
        turn = asyncio.Semaphore(at_once)

        async def one(number: int) -> None:
            prompt = f"{number} " + "a rack of unlike machines " * (20 + number % 7 * 40)
            async with turn:
                seen.append(await stream(session, model, prompt))

        await asyncio.gather(*(one(number) for number in range(streams)))
        after, sum_after, count_after = await histogram(session)
    counted = count_after - count_before
    lately = {bound: count - before.get(bound, 0.0) for bound, count in after.items()}
    seen.sort()
    clients, gateway = sum(seen) / len(seen), (sum_after - sum_before) / counted
    return {
        "streams": {"clients": len(seen), "gateway": int(counted)},
        "mean_s": {"clients": clients, "gateway": gateway},
        "p50_s": {"clients": seen[len(seen) // 2], "gateway": quantile(lately, 0.5)},
        "p95_s": {"clients": seen[int(len(seen) * 0.95)], "gateway": quantile(lately, 0.95)},
        "difference_of_means_percent": 100 * (clients - gateway) / clients,
        "goal_percent": GOAL_PERCENT,
    }


def topology(folder: Path) -> Path:
    parsed = yaml.safe_load((ROOT / "topologies/local-simulated.yaml").read_text())
    parsed["cluster_name"] = NAME
    serving = parsed["metadata"]["serving"]
    serving["gateway"]["port"], serving["control"] = PORT, {"port": PORT + 1}
    serving["observability"] = {"prometheus": {"mode": "off"}}
    for pool in serving["pools"]:
        # A token a character: prompts of 520 to 6,800 take 5 to 68 ms, and wait for each other.
        pool["simulated"] = {**pool.get("simulated", {}), "prefill_tokens_per_s": 100_000}
    file = folder / "bench.yaml"
    file.write_text(yaml.safe_dump(parsed))
    return file


def with_cluster(streams: int, at_once: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        file = topology(folder)
        env = {**os.environ, "XDG_STATE_HOME": str(folder / "state")}
        pdcluster = [sys.executable, "-m", "cluster.cli"]
        try:
            subprocess.run([*pdcluster, "up", str(file)], check=True, stdout=sys.stderr, env=env)
            key = (folder / "state" / "pdcluster" / NAME / "api-key").read_text().strip()
            url = f"http://127.0.0.1:{PORT}"
            return asyncio.run(measure(url, key, streams, at_once))
        finally:
            subprocess.run([*pdcluster, "down", str(file)], stdout=sys.stderr, env=env)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--url", help="an endpoint that runs, with one gateway replica")
    parser.add_argument("--key-file", type=Path, help="its API key")
    parser.add_argument("--streams", type=int, default=200)
    parser.add_argument("--at-once", type=int, default=8)
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    if options.url:
        key = options.key_file.read_text().strip() if options.key_file else ""
        found = asyncio.run(measure(options.url, key, options.streams, options.at_once))
    else:
        found = with_cluster(options.streams, options.at_once)
    if options.json:
        print(json.dumps(found))
        return
    for name, value in found.items():
        if isinstance(value, dict):
            value = "  ".join(f"{side} {number:.4g}" for side, number in value.items())
            print(f"{name:8} {value}")
    print(
        f"difference of the means {found['difference_of_means_percent']:.1f} % "
        f"(goal: within {GOAL_PERCENT:g} %)"
    )


if __name__ == "__main__":
    main()
