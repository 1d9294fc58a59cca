"""What stands against a Prometheus beside the cluster, and what `up` makes of it. No process."""

from __future__ import annotations

import contextlib
import os
import socket

import pytest
import yaml
from control_world import desired, serving
from ports import free_port
from running_state import running_state

from cluster.control.rollout import plan as plan_of
from cluster.control.store import ApiAccess
from cluster.launcher import plan, prometheus, running, supervised
from cluster.launcher.progress import Silent
from cluster.launcher.running import OwnPrometheus
from cluster.observe import rules
from cluster.settings import ClusterPaths
from cluster.topology.schema import ObservabilitySpec, PrometheusSpec, Topology

ACCESS = ApiAccess("127.0.0.1", 8001, "pdctl-a-token")


class Heard(Silent):
    def __init__(self):
        self.warnings = []

    def warn(self, text):
        self.warnings.append(text)


@pytest.fixture
def paths(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("PATH", str(tmp_path))  # no program of any kind
    return ClusterPaths("c")


def topology(**spec):
    observability = {"prometheus": spec}
    return Topology(
        path="/t.yaml", cluster_name="c", ray={}, serving=serving(observability=observability)
    )


def followed(paths, told, heard):
    return prometheus.as_wanted(told, paths, running_state(), ACCESS, heard)


def test_without_the_program_up_says_which_package_has_it_and_goes_on(paths):
    heard = Heard()
    after = followed(paths, topology(), heard)
    (warning,) = heard.warnings
    assert "Debian's package: prometheus" in warning
    assert (after.own_prometheus, after.prometheus_url) == (None, "")
    assert running.read(paths) == after
    assert not (paths.state / "prometheus").exists()


def test_a_port_that_is_taken_is_named_with_the_key_to_change(paths, tmp_path):
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/false\n")
    program.chmod(0o755)
    heard = Heard()
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as taken:
        port = taken.getsockname()[1]
        followed(paths, topology(port=port), heard)
    (warning,) = heard.warnings
    assert f"127.0.0.1:{port}" in warning
    assert "observability.prometheus.port" in warning


def test_one_that_ends_at_once_is_told_with_its_last_words_and_leaves_nothing(paths, tmp_path):
    program = tmp_path / "prometheus"
    program.write_text("#!/bin/sh\necho no such flag\nexit 2\n")
    program.chmod(0o755)
    heard = Heard()
    after = followed(paths, topology(port=free_port()), heard)
    assert "no such flag" in heard.warnings[0]
    assert after.own_prometheus is None
    assert not (paths.state / "prometheus").exists()


@pytest.mark.parametrize(
    ("spec", "url"),
    [({"mode": "off"}, ""), ({"mode": "external", "url": "http://m:9090"}, "http://m:9090")],
)
def test_off_and_external_write_and_start_nothing(paths, spec, url):
    heard = Heard()
    after = followed(paths, topology(**spec), heard)
    assert (after.own_prometheus, after.prometheus_url, heard.warnings) == (None, url, [])
    assert not paths.state.exists()


def test_a_process_that_is_not_ours_is_not_ended(paths):
    # This very process, under a start time that is not its own: a pid that was given away.
    own = OwnPrometheus(supervisor_pid=os.getpid(), supervisor_start_ticks=1, url="http://x:1")
    prometheus.end(own, paths)
    assert not supervised.is_running(own)


def test_the_token_is_in_a_file_of_its_users_alone_and_in_no_yaml(tmp_path):
    prometheus._write_files(tmp_path, ACCESS)
    token = tmp_path / "control-token"
    assert token.read_text() == ACCESS.token
    assert token.stat().st_mode & 0o077 == 0
    for path in tmp_path.glob("*.yml"):
        assert ACCESS.token not in path.read_text()
    config = yaml.safe_load((tmp_path / "prometheus.yml").read_text())
    assert config["rule_files"] == [str(tmp_path / name) for name in rules.files()]


def test_another_prometheus_is_told_the_same_jobs():
    said = yaml.safe_load(prometheus.scrape_config("http://head:8001", "/etc/token"))
    assert [job["job_name"] for job in said["scrape_configs"]] == [
        "pdcluster",
        "pdcluster-controller",
    ]


def test_an_external_one_needs_its_address_and_ours_takes_none():
    with pytest.raises(ValueError, match="write url"):
        PrometheusSpec(mode="external")
    with pytest.raises(ValueError, match="write mode: external"):
        PrometheusSpec(url="http://m:9090")


def test_who_scrapes_can_be_changed_by_up_and_not_by_apply():
    before = desired()
    prometheus_off = ObservabilitySpec(prometheus=PrometheusSpec(mode="off"))
    after = before.serving.model_copy(update={"observability": prometheus_off})
    assert plan.needs_restart(before, before.model_copy(update={"serving": after})) == ()
    (refused,) = plan_of(before, after).refused
    assert refused.keys == ("observability.prometheus.mode",)
    assert "pdcluster up" in refused.what
