"""cluster.nodes.farewell: hosts that leave a rack are drained first, by the control API."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.control.changes import Change, ChangeState, DrainNode
from cluster.control.client import ControlError
from cluster.nodes import farewell

CONFIG = {"metadata": {"serving": {"control": {"host": "10.0.0.10", "port": 8001}}}}


class FakeClient:
    """The control API of a cluster with workers on two hosts."""

    def __init__(self, outcome):
        self.outcome = outcome
        self.asked = []

    def status(self):
        return SimpleNamespace(
            workers=[SimpleNamespace(node_ip=f"10.0.0.{host}") for host in (11, 12)]
        )

    def ask(self, ask, why=""):
        self.asked.append((ask, why))
        return Change(len(self.asked), ask.kind, "drain", "root@head", 0.0)

    def change(self, id):
        begun = Change(id, "drain-node", "drain", "root@head", 0.0)
        return replace(begun, state=self.outcome, ended_at_s=1.0, why="no room elsewhere")


@pytest.fixture
def rack(monkeypatch, tmp_path):
    """Makes the control API answer with an outcome; what was built of it."""
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr(farewell.time, "sleep", lambda _s: None)
    state = tmp_path / "pdcluster/r"
    state.mkdir(parents=True)
    (state / "control-token").write_text("secret\n")

    def make(outcome):
        client = FakeClient(outcome)
        client.access = None

        def build(access):
            client.access = access
            return client

        monkeypatch.setattr(farewell, "ControlClient", build)
        return client

    return make


def test_hosts_with_workers_are_drained_and_others_just_leave(rack):
    client = rack(ChangeState.DONE)
    assert farewell.drain("r", ["10.0.0.11", "10.0.0.13"], CONFIG) == {}
    leaving = DrainNode("10.0.0.11", farewell.GRACE_S, may_end_service=True)
    assert client.asked == [(leaving, "the host leaves the file")]
    assert (client.access.url, client.access.token) == ("http://10.0.0.10:8001", "secret")


def test_a_drain_that_fails_is_told_and_the_host_leaves(rack):
    rack(ChangeState.FAILED)
    assert farewell.drain("r", ["10.0.0.11"], CONFIG) == {"10.0.0.11": "no room elsewhere"}


def test_without_a_controller_hosts_leave_all_the_same(rack, monkeypatch):
    client = rack(ChangeState.DONE)

    def silent():
        raise ControlError("the control API does not answer")

    client.status = silent
    assert farewell.drain("r", ["10.0.0.11"], CONFIG) == {
        "10.0.0.11": "the control API does not answer"
    }
    (problem,) = farewell.drain("another", ["10.0.0.11"], CONFIG).values()
    assert "not known here" in problem


def test_a_rack_without_serving_has_nobody_to_ask(rack):
    assert farewell.drain("r", ["10.0.0.11"], {}) == {}
