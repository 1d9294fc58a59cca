#!/usr/bin/env python3
"""The gateway against a peer, paired in one run, with engines that answer at once.

Engines without a model behind the HTTP server that vLLM uses (uvicorn), so that only the gateways'
own work is measured; all of it on one machine: load generator, two engines, one gateway at a time.
Each round measures every target, in alternating order; figures are medians over the rounds.

    .venv/bin/python scripts/bench_gateway.py --router PATH/vllm-router [--targets direct,serve]
    .venv/bin/python scripts/bench_gateway.py --clients      # only: what an HTTP client costs

Targets: `engine` (no gateway), `router` (vllm-router in prefill/decode mode), `direct` and `serve`
(this gateway in its two kinds of hosting; keys and tokenising on, every prompt another).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil
import uvicorn
import uvloop
from bench_gateway_load import (
    KEY,
    Figures,
    Processes,
    body,
    compare_clients,
    instant_engine,
    measure,
)

from cluster.gateway.auth import hash_key
from cluster.gateway.config import GatewayConfig
from cluster.gateway.hosting import SERVE_ENV
from cluster.identity import Role, WorkerId, WorkerState
from cluster.models import store
from cluster.snapshot import Fingerprint, Link, Snapshot, WorkerView
from cluster.topology.schema import ModelSpec
from cluster.traffic import GatewayReport

ROOT = Path(__file__).parents[1]
CLUSTER = "bench-gateway"
# Port of each target; below the range from which the kernel takes ports by itself.
PORTS = {"prefill": 18_201, "engine": 18_202, "router": 18_203, "direct": 18_204, "serve": 18_205}
ROUTER_METRICS_PORT = 18_206
# Against the router: at most, or at least, this many times its figure.
GOALS = {"first_byte_ms": ("<=", 0.7), "chunks_per_s": (">=", 2.0), "json_per_s": (">=", 1.0)}


# Targets


@contextmanager
def child(*argv: str) -> Iterator[int]:
    """A process that is gone when the block ends; its last words are shown if the block fails."""
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(
            argv,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )
        try:
            yield process.pid
        except BaseException:
            output.seek(0)
            sys.stderr.buffer.write(output.read()[-4000:])
            raise
        finally:
            process.terminate()
            try:
                process.wait(10)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def address(target: str) -> str:
    return f"http://127.0.0.1:{PORTS[target]}"


def wait_until_it_answers(url: str, timeout_s: float = 60.0) -> None:
    request = urllib.request.Request(
        f"{url}/v1/chat/completions",
        body(stream=False),
        {"content-type": "application/json", "authorization": f"Bearer {KEY}"},
    )
    deadline_s = time.monotonic() + timeout_s
    while True:
        try:
            with urllib.request.urlopen(request, timeout=5):
                return
        except OSError:
            if time.monotonic() > deadline_s:
                raise
            time.sleep(0.2)


def snapshot() -> Snapshot:
    fingerprint = Fingerprint("m", "none", "auto", 16, "nixl", "1", "instant", "1", "0")

    def worker(role: Role, url: str) -> WorkerView:
        return WorkerView(
            id=WorkerId(role.value, 0, 1),
            role=role,
            island="bench",
            state=WorkerState.READY,
            url=url,
            fingerprint=fingerprint,
            max_model_len_tokens=8192,
            kv_bytes_per_token=1024,
        )

    return Snapshot(
        version=1,
        cluster=CLUSTER,
        model="m",
        workers=(
            worker(Role.PREFILL, address("prefill")),
            worker(Role.DECODE, address("engine")),
        ),
        links=(Link("prefill", "decode", "nixl", 30.0, "recompute"),),
    )


class StubController:
    """What gateways ask for snapshots; it knows one."""

    async def next_snapshot(
        self, after_version: int, timeout_s: float, gateway: str = ""
    ) -> Snapshot:
        if after_version >= 1:
            await asyncio.sleep(timeout_s)
        return snapshot()

    async def gateway_report(self, report: GatewayReport) -> int:
        return report.records_to


@contextmanager
def router(path: str) -> Iterator[Processes]:
    argv = [path, "--vllm-pd-disaggregation", "--kv-connector", "nixl"]
    argv += ["--prefill", address("prefill"), "--decode", address("engine")]
    argv += ["--host", "127.0.0.1", "--port", str(PORTS["router"])]
    with child(*argv, "--prometheus-port", str(ROUTER_METRICS_PORT)) as pid:
        yield lambda: [psutil.Process(pid)]


@contextmanager
def ray_for_gateways() -> Iterator[None]:
    os.environ.update(SERVE_ENV)
    import ray

    from cluster.settings import CONTROLLER_ACTOR, ray_namespace

    with tempfile.TemporaryDirectory(prefix="bg", dir="/tmp") as folder:
        ray.init(
            address="local",
            num_cpus=2,
            include_dashboard=False,
            namespace=ray_namespace(CLUSTER),
            _temp_dir=folder,
            _node_ip_address="127.0.0.1",
            log_to_driver=False,
            logging_level="error",
        )
        try:
            controller = (
                ray.remote(StubController)
                .options(name=CONTROLLER_ACTOR, namespace=ray_namespace(CLUSTER), num_cpus=0)
                .remote()
            )
            ray.get(controller.__ray_ready__.remote())
            yield
        finally:
            ray.shutdown()


@contextmanager
def gateway(ingress: Any, model_path: str, replicas: int) -> Iterator[Processes]:
    """Needs Ray."""
    from cluster.gateway import hosting

    config = GatewayConfig(
        cluster=CLUSTER,
        model="m",
        model_path=model_path,
        port=PORTS[ingress],
        key_hashes=(hash_key(KEY),),
        engine_key="engine-key",
    )
    hosting.start(config, replicas, ingress)
    names = ("GatewayReplica",) if ingress == "direct" else ("ServeReplica", "haproxy")
    try:
        wait_until_it_answers(address(ingress))
        yield lambda: [
            process
            for process in psutil.Process().children(recursive=True)
            if any(name in " ".join(process.cmdline()) for name in names)
        ]
    finally:
        hosting.stop(CLUSTER, ingress)


# Report


def table(found: dict[str, list[Figures]]) -> dict[str, dict[str, float]]:
    return {
        target: {
            name: statistics.median(asdict(one)[name] for one in rounds)
            for name in asdict(rounds[0])
        }
        for target, rounds in found.items()
    }


def show(medians: dict[str, dict[str, float]]) -> None:
    names = list(next(iter(medians.values())))
    print(f"{'':10}" + "".join(f"{name:>24}" for name in names))
    for target, values in medians.items():
        print(f"{target:10}" + "".join(f"{values[name]:24.3f}" for name in names))
    if "router" not in medians:
        return
    for target in ("direct", "serve"):
        for name, (sign, goal) in GOALS.items() if target in medians else ():
            ratio = medians[target][name] / medians["router"][name]
            is_reached = ratio <= goal if sign == "<=" else ratio >= goal
            verdict = "reached" if is_reached else "missed"
            print(f"{target} {name}: {ratio:.2f} x the router's; goal {sign} {goal}: {verdict}")


def run(arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    targets = arguments.targets.split(",")
    if arguments.router is not None:
        targets.insert(0, "router")
    targets.insert(0, "engine")
    spec = ModelSpec(id=arguments.model)
    model_path = store.resolve(spec, lambda what, fraction: None).path
    found: dict[str, list[Figures]] = {target: [] for target in targets}
    with ExitStack() as stack:
        for name in ("prefill", "engine"):
            stack.enter_context(child(sys.executable, __file__, "--engine", str(PORTS[name])))
        wait_until_it_answers(address("engine"))
        processes: dict[str, Processes] = {"engine": list}
        if arguments.router is not None:
            processes["router"] = stack.enter_context(router(arguments.router))
            wait_until_it_answers(address("router"))
        if {"direct", "serve"} & set(targets):
            stack.enter_context(ray_for_gateways())
        for ingress in ("direct", "serve"):
            if ingress in targets:
                processes[ingress] = stack.enter_context(
                    gateway(ingress, model_path, arguments.replicas)
                )
        for number in range(arguments.rounds):
            for target in targets if number % 2 == 0 else targets[::-1]:
                figures = uvloop.run(
                    measure(
                        address(target), processes[target], arguments.requests, arguments.at_once
                    )
                )
                found[target].append(figures)
    return table(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--router", metavar="PATH", help="vllm-router 0.1.17's executable")
    parser.add_argument("--targets", default="direct", help="direct, serve, or both")
    parser.add_argument("--replicas", type=int, default=2, help="gateway replicas (2)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=4000, help="JSON requests per round")
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--model", default="smollm2-135m-instruct", help="for its tokenizer")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--clients", action="store_true", help="compare HTTP clients only")
    parser.add_argument("--engine", type=int, metavar="PORT", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine is not None:
        uvicorn.run(
            instant_engine,
            port=arguments.engine,
            http="httptools",
            lifespan="off",
            access_log=False,
            log_level="warning",
        )
    elif arguments.clients:
        with child(sys.executable, __file__, "--engine", str(PORTS["engine"])):
            wait_until_it_answers(address("engine"))
            uvloop.run(compare_clients(address("engine"), arguments.requests, arguments.at_once))
    else:
        medians = run(arguments)
        if arguments.json:
            print(json.dumps(medians, indent=2))
        else:
            show(medians)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
