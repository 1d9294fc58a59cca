"""The default cluster on its machine: what listens, what a dead engine costs, what stays behind."""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path

import psutil
import pytest
from e2e.harness import Cluster, pdcluster

from cluster.settings import OWNER_ENV, ClusterPaths

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.parametrize("cluster", ["nixl"], indirect=True),
]


def processes(cluster: str) -> list[psutil.Process]:
    """Everything marked as the cluster's in its environment."""
    mine = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(OWNER_ENV, "").split("/")[0] == cluster:
                mine.append(process)
    return mine


def test_nothing_listens_beyond_loopback(cluster: Cluster) -> None:
    mine = processes(cluster.name)
    assert len(mine) > 6
    addresses = set()
    for process in mine:
        with contextlib.suppress(psutil.NoSuchProcess):
            for socket in process.net_connections(kind="inet"):
                if socket.status == psutil.CONN_LISTEN or not socket.raddr:
                    addresses.add(socket.laddr.ip)
    assert addresses
    assert addresses <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def test_a_killed_engine_is_replaced_and_the_endpoint_answers_again(cluster: Cluster) -> None:
    before = cluster.worker("prefill/0")
    psutil.Process(before["engine_pid"]).kill()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        now = [w for w in cluster.status()["workers"] if w["name"] == "prefill/0"]
        if now and now[0]["state"] == "ready" and now[0]["generation"] > before["generation"]:
            break
        # While prefill is away the island's policy answers, and says so.
        raw = cluster.ask([{"role": "user", "content": "Say yes."}], max_tokens=2)
        assert raw.headers["x-pdcluster-route"].split(":")[0] in ("recompute", "disaggregated")
        time.sleep(1)
    else:
        pytest.fail(f"prefill/0 was not replaced: {cluster.status()['workers']}")
    raw = cluster.ask([{"role": "user", "content": "What is the capital of France?"}])
    assert raw.headers["x-pdcluster-route"] == "disaggregated"
    assert "Paris" in json.loads(raw.text)["choices"][0]["message"]["content"]


def test_down_leaves_no_process_no_port_and_no_shared_memory(cluster: Cluster) -> None:
    # Runs last on this cluster; the fixture's own `down` afterwards finds nothing, which is fine.
    began_at = min(process.create_time() for process in processes(cluster.name))
    pdcluster("down", str(cluster.topology))
    assert processes(cluster.name) == []
    port = int(cluster.base_url.rpartition(":")[2])
    listening = [c for c in psutil.net_connections() if c.status == psutil.CONN_LISTEN]
    assert port not in {connection.laddr.port for connection in listening}
    assert not ClusterPaths(cluster.name).runtime.exists()
    assert [p.name for p in Path("/dev/shm").iterdir() if p.stat().st_ctime >= began_at] == []
