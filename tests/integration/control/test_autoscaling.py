"""The autoscaler on a running cluster of simulated engines, under load and after it."""

from __future__ import annotations

import time
from typing import Any

import pytest
import yaml
from offered_load import OfferedLoad

pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]

NAME = "it-scaling"
# A prompt of so many words is some 1,200 tokens: 0.4 s at the speed below. Three a second keep 1.2
# replicas busy.
WORDS, PER_S = 240, 3.0
SCALING = {
    "mode": "slo",
    "dry_run": True,
    "targets": [{"prefill": "prefill", "decode": "decode", "ttft_s": 2, "tpot_s": 0.5}],
    "interval_s": 1,
    "load_window_s": 6,
    "up_window_s": 2,
    "role_window_s": 3,
    "down_window_s": 8,
    "up_cooldown_s": 2,
    "down_cooldown_s": 3,
}


def edit(serving: dict[str, Any]) -> None:
    serving["scaling"] = SCALING
    for pool in serving["pools"]:
        pool["placement"] = {"resources": {"CPU": 0.25}}
        pool["replicas"] = {"initial": 1, "min": 1, "max": 3}
        if pool["role"] == "prefill":
            pool["simulated"] = {"prefill_tokens_per_s": 3000}


class Scaled:
    """The cluster, and what its autoscaler says."""

    def __init__(self, home: Any, topology: Any) -> None:
        self.home, self.topology = home, topology

    def json(self, *words: str) -> Any:
        return self.home.json(*words, "--cluster", NAME)

    def scaling(self) -> Any:
        return self.json("scaling")

    def events(self) -> list[Any]:
        return [e for e in self.json("status")["events"] if e["kind"] == "AutoscalerDecided"]

    def load(self) -> OfferedLoad:
        status = self.json("status")
        key = (self.home.state(NAME) / "api-key").read_text().strip()
        return OfferedLoad(status["endpoint"], key, status["model"], PER_S, WORDS, 20)

    def apply(self, **scaling: Any) -> None:
        """Other scaling, by way of the file."""
        parsed = yaml.safe_load(self.topology.read_text())
        parsed["metadata"]["serving"]["scaling"] |= scaling
        self.topology.write_text(yaml.safe_dump(parsed))
        self.home.run("apply", str(self.topology), "--yes")

    def ready(self) -> dict[str, int]:
        """Workers that are ready, by the role that they serve in."""
        found = {"prefill": 0, "decode": 0}
        for worker in self.json("status")["workers"]:
            found[worker["role"]] += worker["state"] == "ready"
        return found

    def wait_for(self, what: Any, within_s: float = 90) -> Any:
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            found = what()
            if found:
                return found
            time.sleep(0.5)
        raise AssertionError(f"not within {within_s} s: {self.scaling()} {self.ready()}")


@pytest.fixture(scope="module")
def scaled(home):
    topology = home.topology(NAME, edit)
    home.run("up", str(topology))
    yield Scaled(home, topology)
    home.run("down", str(topology))
    assert home.leftovers(NAME) == []


def test_a_dry_run_says_what_it_would_do_then_a_real_one_does_it_and_undoes_it(scaled):
    with scaled.load() as load:
        would = scaled.wait_for(
            lambda: [a for a in scaled.scaling()["actions"] if "prefill" in a["what"]]
        )
        assert {action["outcome"] for action in would} == {"would"}
        assert "prompts/s" in would[0]["why"]
        text = scaled.home.run("scaling", "--cluster", NAME).stdout
        assert "dry run" in text
        assert scaled.ready() == {"prefill": 1, "decode": 1}
        assert any(event["fields"]["outcome"] == "would" for event in scaled.events())
        assert scaled.json("changes") == []

        scaled.apply(dry_run=False)
        scaled.wait_for(lambda: scaled.ready()["prefill"] >= 2)
        (pool, *_) = [p for p in scaled.scaling()["pools"] if p["pool"] == "prefill"]
        assert pool["need"] >= 2
    scaled.wait_for(lambda: scaled.ready() == {"prefill": 1, "decode": 1})
    asked = [change for change in scaled.json("changes") if change["asked_by"] == "autoscaler"]
    assert {change["state"] for change in asked} <= {"done", "replaced"}
    assert load.faults == []
    assert load.answered > 20


def test_a_side_that_can_spare_a_worker_lends_it_and_gets_it_back(scaled):
    # Long enough for none of the three to end before the load is measured.
    scaled.apply(dry_run=False, down_window_s=40)
    scaled.home.run("scale", "decode", "3", "--cluster", NAME)
    with scaled.load() as load:
        scaled.wait_for(
            lambda: any(
                worker["pool"] == "decode" and worker["role"] == "prefill"
                for worker in scaled.json("status")["workers"]
            )
        )
        scaled.wait_for(lambda: scaled.ready()["prefill"] >= 2)
    scaled.wait_for(lambda: scaled.ready() == {"prefill": 1, "decode": 1}, within_s=150)
    assert load.faults == []
