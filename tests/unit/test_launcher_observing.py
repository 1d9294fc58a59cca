"""Where Prometheus and Grafana are, and what the dashboards' commands say of it."""

from __future__ import annotations

import pytest
import yaml
from topology_text import BASE

from cluster.cli import dashboards
from cluster.cli.main import GROUPS, run
from cluster.errors import ClusterError, InvalidInput
from cluster.launcher import observing, running
from cluster.launcher.running import NotRunning, Running
from cluster.settings import ClusterPaths

EXTERNAL = """\
    observability:
      prometheus: {mode: external, url: "http://prometheus:9090"}
      grafana: {url: "http://grafana:3000", token_env: OUR_TOKEN}
"""


@pytest.fixture(autouse=True)
def _nothing_runs(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(BASE + EXTERNAL)
    return path


def up(cluster, url, topology_file="/gone.yaml"):
    paths = ClusterPaths(cluster)
    paths.state.mkdir(parents=True)
    at = Running(
        cluster=cluster,
        phase="up",
        topology_file=str(topology_file),
        topology_digest="d",
        started_at_s=1.0,
        model="m",
        endpoint="http://127.0.0.1:8000",
        key_file=None,
        control_url="http://127.0.0.1:8001",
        token_file=str(paths.state / "control-token"),
        ingress="direct",
        prometheus_url=url,
    )
    running.write(paths, at)


def test_off_without_quotes_is_a_word_though_yaml_takes_it_for_false(file):
    file.write_text(BASE + "    observability: {prometheus: {mode: off}}\n")
    assert observing.find(file, None).spec.prometheus.mode == "off"


def test_the_prometheus_that_scrapes_the_running_cluster_is_asked():
    up("one", "http://127.0.0.1:9191")
    assert observing.find(None, None).prometheus_url == "http://127.0.0.1:9191"
    assert observing.find(None, "one").prometheus_url == "http://127.0.0.1:9191"


def test_the_topology_says_where_both_are(file):
    found = observing.find(file, None)
    assert found.prometheus_url == "http://prometheus:9090"
    assert found.grafana_url(None) == "http://grafana:3000"
    assert found.grafana_url("http://other") == "http://other"
    assert found.grafana_token({"OUR_TOKEN": " t\n"}) == "t"


def test_the_file_that_the_cluster_was_brought_up_with_is_read(file):
    up("t", "", file)
    assert observing.find(None, None).grafana_url(None) == "http://grafana:3000"


def test_where_nothing_runs_the_defaults_hold():
    found = observing.find(None, None)
    assert found.prometheus_url == "http://127.0.0.1:9090"
    with pytest.raises(InvalidInput, match=r"observability\.grafana\.url"):
        found.grafana_url(None)
    with pytest.raises(InvalidInput, match="GRAFANA_TOKEN is not set"):
        found.grafana_token({})


def test_of_several_clusters_one_must_be_named():
    up("one", "http://127.0.0.1:9191")
    up("two", "http://127.0.0.1:9292")
    with pytest.raises(ClusterError, match="several clusters"):
        observing.find(None, None)
    assert observing.find(None, "two").prometheus_url == "http://127.0.0.1:9292"


def test_a_cluster_that_does_not_run_is_said():
    with pytest.raises(NotRunning, match="cluster nine does not run here"):
        observing.find(None, "nine")


def test_what_another_prometheus_needs_is_printed(capsys):
    up("one", "")
    assert run(["dashboards", "prometheus-config", "--token-file", "/run/token"]) == 0
    jobs = yaml.safe_load(capsys.readouterr().out)["scrape_configs"]
    discovery = jobs[0]["http_sd_configs"][0]
    assert discovery["url"].startswith("http://127.0.0.1:8001/")
    assert discovery["authorization"]["credentials_file"] == "/run/token"


@pytest.mark.parametrize("command", dashboards.COMMANDS, ids=lambda command: command.__name__)
def test_every_command_has_a_help_with_an_example(command, capsys):
    name = command.__name__.replace("_", "-")
    assert run(["dashboards", name, "--help"]) == 0
    assert name in capsys.readouterr().out
    assert f"Example: pdcluster dashboards {name}" in command.__doc__


def test_a_group_of_commands_says_what_it_has(capsys):
    for group, _, commands in GROUPS:
        assert run([group, "--help"]) == 0
        said = capsys.readouterr().out
        assert all(command.__name__.replace("_", "-") in said for command in commands)
