"""`up --address`: a cluster on a Ray that somebody else has started, as on the head of a rack."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest

from cluster.launcher.local_ray import LOOPBACK
from cluster.workers import tree

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[3]
# Loopback only, and no token: this Ray is not ours to guard.
RAY_ENV = {
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_AUTH_MODE": "disabled",
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    "RAY_USAGE_STATS_ENABLED": "0",
}


@pytest.fixture
def joining(home, unused_ports):
    return replace(home, extra_env=RAY_ENV | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def unused_ports():
    import socket

    probes = [socket.create_server((LOOPBACK, 0)) for _ in range(2)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@pytest.fixture
def foreign_ray(joining, unused_ports):
    gcs, client = unused_ports
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--node-ip-address={LOOPBACK}", f"--port={gcs}", "--include-dashboard=false"]
        command += [f"--ray-client-server-port={client}", "--object-store-memory=80000000"]
        command += ["--num-cpus=4", "--no-monitor", "--include-log-monitor=false"]
        process = subprocess.Popen(
            [*command, f"--temp-dir={folder}"],
            env=joining.env,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        time.sleep(3)
        yield f"{LOOPBACK}:{gcs}"
        below = tree.descendants(process.pid)
        process.terminate()
        process.wait(30)
        for left in below:
            tree.send(left, signal.SIGKILL)


def test_a_cluster_on_a_foreign_ray_comes_up_serves_and_leaves_it_as_it_was(joining, foreign_ray):
    topology = joining.topology("it-joined")
    for _ in range(20):
        up = joining.start("up", str(topology), "--address", foreign_ray)
        _, said = up.communicate(timeout=90)
        if up.returncode == 0 or "does not answer" not in said:
            break
        time.sleep(0.5)  # Ray is not up yet
    assert up.returncode == 0, said
    again = joining.run("up", str(topology), "--address", foreign_ray)
    assert "is up already" in again.stdout
    answer = joining.json("chat", "hello", "--max-tokens", "4", "--cluster", "it-joined")
    assert (answer["prefill"], answer["decode"]) == ("prefill/0", "decode/0")
    joining.run("down", "--cluster", "it-joined")
    assert joining.leftovers("it-joined") == []
    script = (
        "import ray; from ray.experimental import internal_kv;"
        f"ray.init('{foreign_ray}', log_to_driver=False);"
        "print(ray.util.list_named_actors(all_namespaces=True),"
        "[g['state'] for g in ray.util.placement_group_table().values()],"
        "internal_kv._internal_kv_list('it-joined/', namespace=b'pdcluster'))"
    )
    left = subprocess.run(
        [sys.executable, "-c", script],
        env=joining.env,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    assert left.stdout.strip() == "[] ['REMOVED', 'REMOVED'] []"


def test_a_rack_without_a_ray_here_is_told_to_use_ray_up(home, tmp_path):
    text = home.topology("it-rack").read_text()
    rack = tmp_path / "rack.yaml"
    rack.write_text(text.replace("head_ip: 127.0.0.1", "head_ip: 10.9.8.7"))
    # A Ray of another user may have left its address here.
    if os.path.exists("/tmp/ray/ray_current_cluster"):
        pytest.skip("a Ray runs here")
    refused = home.run("up", str(rack), exit_code=1)
    assert f"run `ray up {rack}`" in refused.stderr
    assert "on the head" in refused.stderr
