"""The same cluster behind Ray Serve and its HAProxy: the default ingress."""

import json
import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]
LINE = "cluster.gateway.render local rendering trusted"


def test_a_cluster_behind_serve_comes_up_answers_and_leaves_nothing(home):
    def edit(serving):
        serving["gateway"]["ingress"] = "serve"

    topology = home.topology("it-serve", edit)
    try:
        home.run("up", str(topology))
        text = " ".join(f"word{n}" for n in range(60))
        said = home.json("chat", text, "--cluster", "it-serve")
        assert (said["prefill"], said["decode"]) == ("prefill/0", "decode/0")
        # Its log is where docs/operations.md says, and has what is not wrong, too.
        running = json.loads((home.state("it-serve") / "running.json").read_text())
        logs = Path(running["own_ray"]["folder"]) / "session_latest/logs"
        deadline_s = time.monotonic() + 30
        while not any(LINE in file.read_text() for file in logs.glob("worker-*.err")):
            assert time.monotonic() < deadline_s, "the gateway has logged nothing"
            time.sleep(0.2)
        assert any("haproxy" in process.name() for process in home.processes("it-serve"))
    finally:
        home.run("down", str(topology))
    assert home.leftovers("it-serve") == []
