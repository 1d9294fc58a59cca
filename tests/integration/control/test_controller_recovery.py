"""Processes of a running cluster are killed; the cluster goes on."""

from __future__ import annotations

import os
import signal
import urllib.error
import urllib.request

import pytest
import yaml
from processes import cmdline, environ

pytestmark = pytest.mark.integration


def generations(status):
    return {w["name"]: w["generation"] for w in status["workers"] if w["state"] == "ready"}


def token(cluster):
    return (cluster.home.state(cluster.name) / "control-token").read_text().strip()


def control_api(cluster, bearer):
    port = yaml.safe_load(cluster.topology.read_text())["metadata"]["serving"]["control"]["port"]
    request = urllib.request.Request(
        f"http://127.0.0.1:{port}/v1/status", headers={"authorization": f"Bearer {bearer}"}
    )
    try:
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as error:
        return error.code


def test_a_killed_controller_comes_back_and_adopts_the_same_workers(cluster):
    before = cluster.status()
    assert generations(before) == {"prefill/0": 1, "decode/0": 1}
    engines = {w["name"]: w["engine_pid"] for w in before["workers"]}
    (process,) = cluster.home.actor(cluster.name, "ControllerActor")
    assert (control_api(cluster, token(cluster)), control_api(cluster, "wrong")) == (200, 401)
    process.send_signal(signal.SIGKILL)
    process.wait(10)
    # Serving does not need it.
    assert cluster.ask()["decode"] == "decode/0"
    after = cluster.wait_for(
        lambda s: (
            s["controller_up_for_s"] < before["controller_up_for_s"] and len(generations(s)) == 2
        )
    )
    assert generations(after) == generations(before)
    assert {w["name"]: w["engine_pid"] for w in after["workers"]} == engines
    assert after["version"] > before["version"]
    # Its API is at the same place, with the same token.
    assert (control_api(cluster, token(cluster)), control_api(cluster, "wrong")) == (200, 401)
    started = next(e["text"] for e in after["events"] if e["kind"] == "ControllerStarted")
    assert started.startswith(f"{cluster.name} started adopted=2")


def test_a_killed_engine_is_replaced_by_a_new_generation_after_a_pause(cluster):
    before = cluster.worker("decode/0")
    os.kill(before["engine_pid"], signal.SIGKILL)
    after = cluster.wait_for(lambda s: generations(s).get("decode/0") == before["generation"] + 1)
    removed = [e["text"] for e in after["events"] if e["kind"] == "WorkerRemoved"]
    assert "restart_in_s=0.5" in removed[-1]
    assert [f["worker"] for f in after["failed"]] == ["decode/0"]
    assert after["failed"][0]["restart_in_s"] is None
    assert cluster.ask()["decode"] == "decode/0"


def test_a_killed_worker_actor_is_replaced_and_takes_its_engine_with_it(cluster):
    before = cluster.worker("prefill/0")
    mark = f"{cluster.name}/prefill/0#{before['generation']}:0"
    (supervisor,) = [
        process
        for process in cluster.home.processes(cluster.name)
        if environ(process).get("PDCLUSTER_OWNER") == mark and "supervisor" in cmdline(process)
    ]
    (owner,) = [word for word in cmdline(supervisor).split() if word.startswith("--owner-pid=")]
    os.kill(int(owner.partition("=")[2]), signal.SIGKILL)
    cluster.wait_for(lambda s: generations(s).get("prefill/0") == before["generation"] + 1)
    assert not os.path.exists(f"/proc/{before['engine_pid']}")
    assert cluster.ask("another question, of another length")["prefill"] == "prefill/0"
