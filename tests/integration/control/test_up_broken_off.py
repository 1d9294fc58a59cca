"""`up` that does not come to its end: what it started is gone. A cluster of its own each time."""

from __future__ import annotations

import signal
import time

import pytest

from cluster.launcher import local_ray
from cluster.settings import ClusterPaths
from cluster.topology import loader

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]


def wait_until(is_so, within_s=120.0):
    deadline_s = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline_s
        time.sleep(0.2)


def test_a_worker_that_cannot_start_fails_up_with_its_last_words_and_leaves_nothing(home, tmp_path):
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'no accelerator on this node' >&2\nexit 3\n")
    interpreter.chmod(0o755)

    def edit(serving):
        serving["pools"][0]["interpreter"] = str(interpreter)

    failed = home.run("up", str(home.topology("it-broken", edit)), exit_code=1)
    assert "prefill/0 did not start: the engine ended while" in failed.stderr
    assert "exit code 3" in failed.stderr
    assert "no accelerator on this node" in failed.stderr
    assert home.leftovers("it-broken") == []


def slow(serving):
    for pool in serving["pools"]:
        pool["simulated"] = {"load_s": 60}


@pytest.mark.parametrize("stage", ["Ray", "workers"])
def test_ctrl_c_during_up_leaves_nothing(home, stage):
    name = f"it-stop-{stage.lower()}"
    topology = home.topology(name, slow)
    first = home.start("up", str(topology))
    said = ""
    assert first.stderr is not None
    while stage not in said.split():  # a line is `   2.1 s  Ray`
        line = first.stderr.readline()
        assert line, f"up ended early: {said}"
        said += line
    if stage == "workers":
        wait_until(lambda: len(home.actor(name, "WorkerActor")) == 2)
        # And a second one at this moment is told so.
        second = home.run("up", str(topology), exit_code=1)
        assert f"pid {first.pid}" in second.stderr
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=120)
    assert first.returncode == 130
    assert home.leftovers(name) == []


def test_what_a_killed_up_left_is_taken_away_by_down(home):
    topology = home.topology("it-killed", slow)
    first = home.start("up", str(topology))
    wait_until(lambda: len(home.actor("it-killed", "WorkerActor")) == 2)
    first.kill()
    first.wait(10)
    assert home.processes("it-killed")
    home.run("down", "--cluster", "it-killed")
    assert home.leftovers("it-killed") == []


def test_a_head_that_a_killed_up_had_not_noted_down_is_taken_away_agents_and_all(home, monkeypatch):
    # As Ctrl-C does in the moment between the head's start and the note of it.
    for name, value in home.env.items():
        monkeypatch.setenv(name, value)
    topology = loader.load(home.topology("it-unnoted"))
    head = local_ray.start_head(ClusterPaths("it-unnoted"), topology.serving, {})
    try:
        agents = {"ray::DashboardAgent", "ray::RuntimeEnvAgent"}
        wait_until(lambda: agents <= {argv[0] for _, argv in home.in_ray_folder("it-unnoted")})
        home.run("down", "--cluster", "it-unnoted")
        assert home.leftovers("it-unnoted") == []
    finally:
        local_ray.end_head(head.own, "it-unnoted")
