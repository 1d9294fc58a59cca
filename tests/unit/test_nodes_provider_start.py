"""`cluster.nodes.start`: when Ray is started, when it is let alone, what a changed file does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from nodes_rack import HEAD, FakeSsh, rack
from ray.autoscaler import tags as ray_tags

from cluster.errors import ClusterError, InvalidInput
from cluster.nodes import head, start
from cluster.nodes.assignment import start_digests, with_new
from cluster.nodes.config import INJECTED, Hosts
from cluster.nodes.marks import RayProcess
from cluster.nodes.start import environment, other_head, read_request, why_start
from cluster.nodes.state import State, Store
from cluster.workers.tree import Process

WORKER_ENV = {
    "PDCLUSTER_OWNER": "r@hosts/ray",
    "RAY_CLOUD_INSTANCE_ID": "10.0.0.11_1700000000000",
    "RAY_OVERRIDE_RESOURCES": '{"GPU":8}',
}
HEAD_ENV = {**WORKER_ENV, "RAY_CLOUD_INSTANCE_ID": HEAD}
WORKER_ARGV = ["ray", "start", f"--address={HEAD}:6379"]
HEAD_ARGV = ["ray", "start", "--head", "--port=6380", "--autoscaling-config=~/c.yaml"]


def process(name: str, digest: str, *argv: str) -> RayProcess:
    return RayProcess(Process(1, 1, 1, "S", 0), (f"/x/{name}", *argv), digest)


# the request


def test_a_workers_request_tells_its_address_and_its_head() -> None:
    asked = read_request(WORKER_ARGV, WORKER_ENV)
    assert (asked.cluster, asked.address, asked.is_head) == ("r", "10.0.0.11", False)
    assert asked.head_address == f"{HEAD}:6379"


def test_a_heads_request_tells_its_own_gcs_and_its_file() -> None:
    asked = read_request(HEAD_ARGV, HEAD_ENV)
    assert (asked.address, asked.head_address) == (HEAD, f"{HEAD}:6380")
    assert asked.config == Path.home() / "c.yaml"


@pytest.mark.parametrize(
    ("argv", "environ", "says"),
    [
        (WORKER_ARGV, {}, "`ray up` runs it"),
        (WORKER_ARGV, {**WORKER_ENV, "PDCLUSTER_OWNER": "r/ray"}, "`ray up` runs it"),
        ([], WORKER_ENV, "write `ray start"),
        (["ray", "stop"], WORKER_ENV, "write `ray start"),
        (["ray", "start", "--head"], HEAD_ENV, "--autoscaling-config=~/ray_bootstrap_config.yaml"),
        (["ray", "start"], WORKER_ENV, "add --address=$RAY_HEAD_IP"),
    ],
)
def test_a_command_that_cannot_be_says_what_to_write(
    argv: list[str], environ: dict[str, str], says: str
) -> None:
    with pytest.raises(InvalidInput) as error:
        read_request(argv, environ)
    assert says in str(error.value)


@pytest.mark.parametrize(
    "changed",
    [
        {"RAY_OVERRIDE_RESOURCES": '{"GPU":4}'},
        {"RAY_OVERRIDE_LABELS": '{"a":"b"}'},
        {"RAY_CLOUD_INSTANCE_ID": "10.0.0.11_1700000000001"},
    ],
)
def test_what_makes_another_node_makes_another_digest(changed: dict[str, str]) -> None:
    digest = read_request(WORKER_ARGV, WORKER_ENV).digest
    assert read_request(WORKER_ARGV, WORKER_ENV).digest == digest
    assert read_request(WORKER_ARGV, {**WORKER_ENV, **changed}).digest != digest
    assert read_request([*WORKER_ARGV, "--num-cpus=1"], WORKER_ENV).digest != digest


def test_a_setting_in_front_of_the_heads_command_makes_another_head(tmp_path: Path) -> None:
    file = tmp_path / "c.yaml"
    argv = ["ray", "start", "--head", f"--autoscaling-config={file}"]
    digests = set()
    for before in ("", "RAY_x=1 "):
        commands = [f"{before}python3 -m cluster.nodes.start ray start --head", "pdcluster up"]
        file.write_text(json.dumps({"head_start_ray_commands": commands}))
        assert start._stated_start(argv) == commands[:1]
        digests.add(read_request(argv, HEAD_ENV, start._stated_start(argv)).digest)
    assert len(digests) == 2


# whether to start


def test_a_node_that_runs_as_asked_is_let_alone() -> None:
    asked = read_request(WORKER_ARGV, WORKER_ENV)
    assert why_start(asked, [process("raylet", asked.digest)], head_answers=True) == ""


def test_a_head_that_runs_as_asked_is_let_alone() -> None:
    asked = read_request(HEAD_ARGV, HEAD_ENV)
    found = [process("raylet", asked.digest), process("gcs_server", asked.digest)]
    assert why_start(asked, found, head_answers=True) == ""


@pytest.mark.parametrize(
    ("found", "head_answers", "why"),
    [
        ([], True, "does not run"),
        ([("raylet", "other")], True, "another way"),
        ([("raylet", None)], False, "does not answer"),
        ([("gcs_server", None)], True, "does not run"),
    ],
)
def test_a_node_that_does_not_run_as_asked_is_started(
    found: list[tuple[str, str | None]], head_answers: bool, why: str
) -> None:
    asked = read_request(WORKER_ARGV, WORKER_ENV)
    processes = [process(name, digest or asked.digest) for name, digest in found]
    assert why in why_start(asked, processes, head_answers)


def test_a_head_without_its_gcs_is_started() -> None:
    asked = read_request(HEAD_ARGV, HEAD_ENV)
    assert why_start(asked, [process("raylet", asked.digest)], True) == "its head process has ended"


def test_a_host_of_another_living_head_is_not_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = read_request(WORKER_ARGV, WORKER_ENV)
    raylet = process("raylet", "x", "--gcs-address=10.9.9.9:6379")
    assert other_head(asked, [raylet]) == "10.9.9.9:6379"
    for port in (6379, 6380):
        assert other_head(asked, [process("raylet", "x", f"--gcs-address={HEAD}:{port}")]) is None
    monkeypatch.setattr(start, "ray_processes", lambda cluster: [raylet])
    monkeypatch.setattr(start, "_answers", lambda address: True)
    with pytest.raises(ClusterError, match=r"the head at 10\.9\.9\.9:6379, which still runs; end"):
        start.start(asked)


def test_what_stands_before_the_command_wins_over_our_defaults() -> None:
    mine = environment({"AUTOSCALER_UPDATE_INTERVAL_S": "9"}, "d")
    assert mine["AUTOSCALER_UPDATE_INTERVAL_S"] == "9"
    assert environment({}, "d")["AUTOSCALER_UPDATE_INTERVAL_S"] == "1"


# a changed file, on the head


@pytest.fixture(autouse=True)
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))


def given(tmp_path: Path, types: dict[str, list[str]]) -> tuple[Path, dict[str, Any]]:
    config = rack(**types)
    config["provider"][INJECTED] = Hosts.of(config).model_dump(mode="json")
    file = tmp_path / "ray_bootstrap_config.yaml"
    file.write_text(json.dumps(config))
    return file, config


def running(config: dict[str, Any], types: dict[str, list[str]]) -> None:
    """As if Ray had started every host of `types`."""
    starts = start_digests(config)
    state = State(starts=starts)
    tags = {ray_tags.TAG_RAY_NODE_KIND: ray_tags.NODE_KIND_WORKER}
    for kind, hosts in types.items():
        state = with_new(state, kind, tags, hosts, 1)
    Store.of("r").update(lambda _: state)


def hosts_now() -> set[str]:
    return {node.host for node in Store.of("r").read().nodes.values()}


def test_the_same_file_again_ends_nothing_and_leaves_the_monitor_alone(tmp_path: Path) -> None:
    types = {"a": ["10.0.0.11"]}
    file, config = given(tmp_path, types)
    assert head.take_in("r", file, is_new_head=True, runner=FakeSsh())
    running(config, types)
    ssh = FakeSsh()
    assert not head.take_in("r", file, is_new_head=False, runner=ssh)
    assert ssh.asked == []
    assert hosts_now() == {"10.0.0.11"}


def test_a_changed_file_ends_just_the_hosts_that_left(tmp_path: Path) -> None:
    before = {"a": ["10.0.0.11", "10.0.0.12"], "b": ["10.0.0.21"]}
    file, config = given(tmp_path, before)
    head.take_in("r", file, is_new_head=True, runner=FakeSsh())
    running(config, before)
    file, _ = given(tmp_path, {"a": ["10.0.0.12", "10.0.0.13"], "b": ["10.0.0.21"]})
    ssh = FakeSsh()
    assert head.take_in("r", file, is_new_head=False, runner=ssh)
    assert ssh.ended() == ["10.0.0.11"]
    assert hosts_now() == {"10.0.0.12", "10.0.0.21"}
    installed = json.loads(head.installed_config("r").read_text())
    assert installed["available_node_types"]["a"]["node_config"]["hosts"][1] == "10.0.0.13"


def test_a_leaving_host_that_does_not_answer_is_named_and_the_rest_goes_on(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {"a": ["10.0.0.11", "10.0.0.12"]}
    file, config = given(tmp_path, before)
    head.take_in("r", file, is_new_head=True, runner=FakeSsh())
    running(config, before)
    file, _ = given(tmp_path, {"a": ["10.0.0.13"]})
    head.take_in("r", file, is_new_head=False, runner=FakeSsh(silent={"10.0.0.11": "timed out"}))
    said = capsys.readouterr().out
    assert "10.0.0.11 could not be ended, and something may still run there: timed out" in said
    assert hosts_now() == set()


def test_a_take_in_that_dies_half_way_is_finished_by_the_next(tmp_path: Path) -> None:
    before = {"a": ["10.0.0.11"]}
    file, config = given(tmp_path, before)
    head.take_in("r", file, is_new_head=True, runner=FakeSsh())
    running(config, before)
    file, _ = given(tmp_path, {"a": ["10.0.0.12"]})

    class Killed(BaseException):
        pass

    def dies(*_: Any) -> Any:
        raise Killed

    with pytest.raises(Killed):
        head.take_in("r", file, is_new_head=False, runner=dies)
    assert hosts_now() == {"10.0.0.11"}
    ssh = FakeSsh()
    assert head.take_in("r", file, is_new_head=False, runner=ssh)
    assert ssh.ended() == ["10.0.0.11"]
    assert hosts_now() == set()


def test_silent_hosts_are_named_with_the_reason_and_noted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, _ = given(tmp_path, {"a": ["10.0.0.11", "10.0.0.12"]})
    head.take_in("r", file, is_new_head=True, runner=FakeSsh())
    head.report_silent("r", FakeSsh(silent={"10.0.0.12": "Connection refused"}))
    assert "host 10.0.0.12 does not answer: Connection refused" in capsys.readouterr().out
    assert Store.of("r").read().silent == {"10.0.0.12": "Connection refused"}
    head.report_silent("r", FakeSsh())
    assert Store.of("r").read().silent == {}


@pytest.mark.parametrize("text", ["", "{}", "cluster_name: r", '{"provider": {}}'])
def test_a_file_that_ray_up_did_not_write_is_refused(tmp_path: Path, text: str) -> None:
    file = tmp_path / "c.yaml"
    file.write_text(text)
    with pytest.raises(ClusterError, match="is not what `ray up` writes"):
        head.take_in("r", file, is_new_head=True, runner=FakeSsh())
