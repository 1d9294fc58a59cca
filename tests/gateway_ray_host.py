"""A Ray cluster with a gateway in it, in a process of its own: Ray Serve reads its environment when
it is imported, and a test process may have imported it long ago.

Reads one pickled `Order` from stdin, answers `up` or what was raised, obeys lines on stdin, ends
all it started when stdin closes. A stub stands for the controller: it knows one snapshot.
"""

from __future__ import annotations

import os
import pickle
import sys
from dataclasses import dataclass
from typing import Any

from cluster.gateway.config import GatewayConfig
from cluster.snapshot import Snapshot
from cluster.traffic import GatewayReport


@dataclass
class Order:
    config: GatewayConfig
    snapshot: Snapshot
    count: int
    ingress: Any
    ray_dir: str


class StubController:
    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        self._versions: dict[str, int] = {}
        self._reports: dict[str, GatewayReport] = {}

    async def next_snapshot(
        self, after_version: int, timeout_s: float, gateway: str = ""
    ) -> Snapshot:
        import asyncio

        self._versions[gateway] = after_version
        if self._snapshot.version <= after_version:
            await asyncio.sleep(timeout_s)
        return self._snapshot

    async def gateway_report(self, report: GatewayReport) -> int:
        self._reports[report.gateway] = report
        return report.records_to

    async def told(self) -> tuple[dict[str, int], dict[str, GatewayReport]]:
        """What gateways have told so far: the versions that they route by, and their reports."""
        return self._versions, self._reports


ANSWER = "answer: "  # Ray writes to stdout, too


def tell(answer: str) -> None:
    print(f"{ANSWER}{answer}", flush=True)


def main() -> None:
    order: Order = pickle.load(sys.stdin.buffer)
    if order.ingress == "serve":
        from cluster.gateway.hosting import SERVE_ENV

        os.environ.update(SERVE_ENV)
    import ray

    from cluster.gateway import hosting
    from cluster.settings import CONTROLLER_ACTOR, ray_namespace

    cluster = order.config.cluster
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        namespace=ray_namespace(cluster),
        _temp_dir=order.ray_dir,
        _node_ip_address="127.0.0.1",
        log_to_driver=False,
    )
    controller = (
        ray.remote(StubController)
        .options(name=CONTROLLER_ACTOR, namespace=ray_namespace(cluster), num_cpus=0)
        .remote(order.snapshot)
    )
    ray.get(controller.__ray_ready__.remote())

    def start() -> str:
        try:
            hosting.start(order.config, order.count, order.ingress)
        except Exception as error:
            return f"{type(error).__name__}: {error}".replace("\n", " ")
        return "up"

    try:
        tell(start())
        for line in sys.stdin:
            if line.strip() == "start":
                tell(start())
            elif line.strip() == "told":
                versions, reports = ray.get(controller.told.remote())
                known = [versions.get(replica) for replica in reports]
                pairs = [pair for report in reports.values() for pair in report.pairs]
                tell(f"{known}; {[(pair.arrived, pair.finished) for pair in pairs]}")
            elif line.strip() == "stop":
                hosting.stop(cluster, order.ingress, 5.0)
                tell("stopped")
    finally:
        hosting.stop(cluster, order.ingress, 1.0)
        ray.shutdown()


if __name__ == "__main__":
    main()
