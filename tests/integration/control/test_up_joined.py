"""A cluster on a Ray that others have started, as on the head of a rack."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from ports import free_port

from cluster.launcher.local_ray import LOOPBACK
from cluster.workers import tree

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

ROOT = Path(__file__).parents[3]
QUIET = {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0", "RAY_USAGE_STATS_ENABLED": "0"}
# Loopback only. What the commands must have alike they find out by themselves.
OPEN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "disabled"}
WITH_TOKEN = {"RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0", "RAY_AUTH_MODE": "token"}


class ForeignRay:
    """A head that can be ended and begun again at the same address."""

    def __init__(self, env):
        self.env = env
        self.gcs, self.client = free_port(), free_port()
        self.address = f"{LOOPBACK}:{self.gcs}"
        self._folder = tempfile.TemporaryDirectory(prefix="ray-")
        self._process = None

    def start(self):
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block"]
        command += [f"--node-ip-address={LOOPBACK}", f"--port={self.gcs}"]
        command += [f"--ray-client-server-port={self.client}", "--object-store-memory=80000000"]
        command += ["--num-cpus=4", "--no-monitor", "--include-log-monitor=false"]
        command += ["--include-dashboard=false", f"--temp-dir={self._folder.name}"]
        # Ray's default, all from 10002 to 19999, is where tests find theirs.
        command += ["--min-worker-port=0", "--max-worker-port=0"]
        log = Path(self._folder.name) / "start.log"
        with log.open("w") as file:
            self._process = subprocess.Popen(
                command,
                env=self.env,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        deadline_s = time.monotonic() + 60
        while "Ray runtime started" not in log.read_text():
            assert time.monotonic() < deadline_s, log.read_text()
            assert self._process.poll() is None, log.read_text()
            time.sleep(0.1)

    def end(self):
        below = tree.descendants(self._process.pid)
        self._process.terminate()
        self._process.wait(30)
        for left in below:
            tree.send(left, signal.SIGKILL)

    def close(self):
        self.end()
        self._folder.cleanup()

    def state(self, cluster):
        """What the cluster has in Ray: actors, placement groups, entries of the store."""
        script = (
            "import ray; from ray.experimental import internal_kv;"
            f"ray.init('{self.address}', log_to_driver=False);"
            "print(ray.util.list_named_actors(all_namespaces=True),"
            "[g['state'] for g in ray.util.placement_group_table().values()],"
            f"internal_kv._internal_kv_list('{cluster}/', namespace=b'pdcluster'))"
        )
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=self.env,
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        return done.stdout.strip()


@pytest.fixture
def joining(home):
    return replace(home, extra_env=QUIET | {"PYTHONPATH": str(ROOT)})


@pytest.fixture
def foreign_ray(joining, request, tmp_path):
    env = joining.env | request.param
    if request.param == WITH_TOKEN:
        token = tmp_path / "token"
        token.write_text("a-token-of-the-racks-own-ray-0123456789")
        env["RAY_AUTH_TOKEN_PATH"] = str(token)
    ray = ForeignRay(env)
    ray.start()
    yield ray
    ray.close()


def bootstrapped(home, name, edit=None):
    """The file as Ray leaves it on the head of bare hosts: one line of JSON, with keys of its own
    added that its schema does not know."""
    parsed = yaml.safe_load(home.topology(name, edit).read_text())
    parsed |= {
        "provider": {
            "type": "external",
            "module": "cluster.nodes.BareHostProvider",
            "_bare_hosts": {"on_head": True},
            "added_by_ray": 1,
        },
        "auth": {"ssh_user": "nobody", "ssh_public_key": "~/x.pub"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"resources": {"CPU": 4}, "node_config": {"hosts": ["127.0.0.1"]}}
        },
        "no_longer": "known to the schema",
    }
    path = home.folder / f"{name}.bootstrap.json"
    path.write_text(json.dumps(parsed))
    return path


def edited(path, edit):
    parsed = json.loads(path.read_text())
    edit(parsed["metadata"]["serving"])
    path.write_text(json.dumps(parsed))


def wait_for(home, cluster, ready, within_s=60):
    deadline_s = time.monotonic() + within_s
    while True:
        status = home.json("status", "--cluster", cluster)
        if {p["name"]: p["ready"] for p in status["pools"]} == ready:
            return status
        assert time.monotonic() < deadline_s, status
        time.sleep(0.3)


@pytest.mark.parametrize("foreign_ray", [OPEN], indirect=True)
def test_a_cluster_on_a_foreign_ray_comes_up_serves_and_leaves_it_as_it_was(joining, foreign_ray):
    topology = joining.topology("it-joined")
    joining.run("up", str(topology), "--address", foreign_ray.address)
    again = joining.run("up", str(topology), "--address", foreign_ray.address)
    assert "is up already" in again.stdout
    answer = joining.json("chat", "hello", "--max-tokens", "4", "--cluster", "it-joined")
    assert (answer["prefill"], answer["decode"]) == ("prefill/0", "decode/0")
    joining.run("down", "--cluster", "it-joined")
    assert joining.leftovers("it-joined") == []
    assert foreign_ray.state("it-joined") == "[] ['REMOVED', 'REMOVED'] []"


@pytest.mark.parametrize("foreign_ray", [WITH_TOKEN], indirect=True)
def test_on_a_head_up_can_be_run_again_and_again_by_what_starts_ray(joining, foreign_ray):
    file = bootstrapped(joining, "it-head")
    up = ("up", str(file), "--no-wait")
    at_head = replace(joining, extra_env={**joining.extra_env, "RAY_ADDRESS": foreign_ray.address})

    first = at_head.json(*up)
    assert first["was_up"] is False
    both = {"prefill": 1, "decode": 1}
    engines = {w["name"]: w["engine_pid"] for w in wait_for(joining, "it-head", both)["workers"]}
    answer = joining.json("chat", "hello", "--max-tokens", "4", "--cluster", "it-head")
    assert answer["decode"] == "decode/0"

    again = at_head.json(*up)
    assert (again["was_up"], again["changed"]) == (True, [])

    edited(file, lambda serving: serving["pools"][1].update(replicas=2))
    assert at_head.json(*up)["changed"] == ["decode"]
    status = wait_for(joining, "it-head", {"prefill": 1, "decode": 2})
    assert engines.items() <= {w["name"]: w["engine_pid"] for w in status["workers"]}.items()

    edited(file, lambda serving: serving["pools"][1].update(max_num_seqs=4))
    refused = at_head.run(*up, exit_code=1)
    assert "pools[decode].max_num_seqs" in refused.stderr
    edited(file, lambda serving: serving["pools"][1].update(max_num_seqs=None))

    # As `ray down` and `ray up` do: nothing of the cluster is left in the new Ray.
    foreign_ray.end()
    foreign_ray.start()
    assert at_head.json(*up)["was_up"] is False
    wait_for(joining, "it-head", {"prefill": 1, "decode": 2})

    at_head.run("down", "--cluster", "it-head")
    assert joining.leftovers("it-head") == []
    assert foreign_ray.state("it-head").startswith("[] ")

    def behind_serve(serving):
        serving["gateway"]["ingress"] = "serve"

    refused = at_head.run(
        "up", str(bootstrapped(joining, "it-head-serve", behind_serve)), "--no-wait", exit_code=2
    )
    assert "RAY_SERVE_ENABLE_HA_PROXY=1" in refused.stderr
    assert "head_start_ray_commands" in refused.stderr
    assert "worker" not in refused.stderr.split("error:")[0]
    assert foreign_ray.state("it-head-serve").startswith("[] ")
    assert joining.leftovers("it-head-serve") == []


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
