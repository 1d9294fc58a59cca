"""The provider as Ray sees it, on the operator's machine and on the head, over a fake ssh."""

from __future__ import annotations

import copy
import json
import threading
from pathlib import Path
from typing import Any

import click
import pytest
from nodes_rack import HEAD, FakeSsh, rack
from ray.autoscaler import tags as ray_tags
from ray.autoscaler._private.util import hash_launch_conf

from cluster.nodes import BareHostProvider, runner
from cluster.nodes.assignment import TooFewHosts, address_of
from cluster.nodes.config import INJECTED, TOKEN_FILE, Hosts
from cluster.nodes.on_head import OnHead
from cluster.nodes.operator import Operator
from cluster.nodes.operator_lock import OperatorBusy, OperatorLock
from cluster.nodes.ssh import Answer, Host, Unreachable
from cluster.nodes.state import Store

BIG = ["10.0.0.11", "10.0.0.12"]
SMALL = ["10.0.0.21"]
WORKER_KIND = {ray_tags.TAG_RAY_NODE_KIND: ray_tags.NODE_KIND_WORKER}
HEAD_KIND = {ray_tags.TAG_RAY_NODE_KIND: ray_tags.NODE_KIND_HEAD}
BIG_TAGS = {**WORKER_KIND, ray_tags.TAG_RAY_USER_NODE_TYPE: "big"}


def hosts() -> Hosts:
    return Hosts.of(rack(big=BIG, small=SMALL))


class FakeLock(OperatorLock):
    def __init__(self, error: Exception | None = None) -> None:
        super().__init__(Host(HEAD, "x"), "r")
        self.error = error
        self.taken = 0

    def acquire(self) -> None:
        self.taken += 1
        if self.error is not None:
            raise self.error


def on_head(tmp_path: Path, ssh: FakeSsh, now_s: float = 1.0) -> OnHead:
    return OnHead("r", hosts(), Store(tmp_path / "nodes.json"), ssh, lambda: now_s)


# on the head


def test_the_head_lists_itself(tmp_path: Path) -> None:
    side = on_head(tmp_path, FakeSsh())
    assert side.nodes(HEAD_KIND) == [HEAD]
    assert side.nodes(WORKER_KIND) == []
    assert side.tags(HEAD)[ray_tags.TAG_RAY_NODE_STATUS] == ray_tags.STATUS_UP_TO_DATE


def test_created_nodes_survive_the_autoscaler(tmp_path: Path) -> None:
    on_head(tmp_path, FakeSsh()).create(BIG, BIG_TAGS, 2)
    again = on_head(tmp_path, FakeSsh())
    assert [address_of(node) for node in again.nodes(WORKER_KIND)] == BIG
    assert again.nodes({ray_tags.TAG_RAY_USER_NODE_TYPE: "small"}) == []


def test_a_silent_host_is_taken_last_and_named_with_the_reason(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    side = on_head(tmp_path, FakeSsh(silent={BIG[0]: "Connection refused"}))
    side.create(BIG, BIG_TAGS, 1)
    assert [address_of(node) for node in side.nodes(WORKER_KIND)] == [BIG[1]]
    assert Store(tmp_path / "nodes.json").read().silent == {BIG[0]: "Connection refused"}
    assert f"host {BIG[0]} (big) does not answer: Connection refused" in caplog.text


def test_a_silent_host_is_taken_all_the_same_if_there_is_no_other(tmp_path: Path) -> None:
    side = on_head(tmp_path, FakeSsh(silent={BIG[0]: "Connection refused"}))
    side.create(BIG, BIG_TAGS, 2)
    assert {address_of(node) for node in side.nodes(WORKER_KIND)} == set(BIG)


def test_threads_that_create_at_once_share_no_host(tmp_path: Path) -> None:
    side = on_head(tmp_path, FakeSsh())
    refused: list[TooFewHosts] = []

    def create() -> None:
        try:
            side.create(BIG, BIG_TAGS, 1)
        except TooFewHosts as error:
            refused.append(error)

    threads = [threading.Thread(target=create) for _ in range(5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(address_of(node) for node in side.nodes(WORKER_KIND)) == BIG
    assert len(refused) == 3


def test_an_ended_node_frees_its_host_for_a_node_of_another_id(tmp_path: Path) -> None:
    ssh = FakeSsh()
    side = on_head(tmp_path, ssh, now_s=1.0)
    side.create(BIG, BIG_TAGS, 2)
    first = side.nodes(WORKER_KIND)[0]
    side.terminate([first])
    assert ssh.ended() == [address_of(first)]
    later = on_head(tmp_path, ssh, now_s=2.0)
    later.create(BIG, BIG_TAGS, 1)
    assert first not in later.nodes(WORKER_KIND)
    assert {address_of(node) for node in later.nodes(WORKER_KIND)} == set(BIG)


def test_ending_a_node_twice_does_not_touch_the_hosts_next_node(tmp_path: Path) -> None:
    ssh = FakeSsh()
    side = on_head(tmp_path, ssh, now_s=1.0)
    side.create(SMALL, {**BIG_TAGS, ray_tags.TAG_RAY_USER_NODE_TYPE: "small"}, 1)
    (first,) = side.nodes(WORKER_KIND)
    side.terminate([first])
    later = on_head(tmp_path, ssh, now_s=2.0)
    later.create(SMALL, {**BIG_TAGS, ray_tags.TAG_RAY_USER_NODE_TYPE: "small"}, 1)
    later.terminate([first])
    assert ssh.ended() == SMALL
    assert len(later.nodes(WORKER_KIND)) == 1


def test_a_host_that_is_cut_off_does_not_stay_a_node_for_ever(tmp_path: Path) -> None:
    on_head(tmp_path, FakeSsh()).create(BIG, BIG_TAGS, 2)
    side = on_head(tmp_path, FakeSsh(silent={BIG[0]: "timed out"}))
    lost = next(node for node in side.nodes(WORKER_KIND) if address_of(node) == BIG[0])
    side.terminate([lost])
    assert not side.is_known(lost)
    assert Store(tmp_path / "nodes.json").read().silent == {BIG[0]: "timed out"}


def test_the_head_does_not_end_itself(tmp_path: Path) -> None:
    ssh = FakeSsh()
    side = on_head(tmp_path, ssh)
    side.terminate([HEAD])
    assert ssh.asked == []
    assert side.nodes(HEAD_KIND) == [HEAD]


# on the operator's machine


def remote_state(*workers: str) -> Answer:
    nodes = {HEAD: {"host": HEAD, "node_type": "head", "tags": HEAD_KIND}}
    nodes |= {f"{host}_1": {"host": host, "node_type": "big", "tags": {}} for host in workers}
    return Answer(0, json.dumps({"nodes": nodes}), "")


def operator(ssh: FakeSsh, lock: FakeLock | None = None, said: list[str] | None = None) -> Operator:
    told = said if said is not None else []
    return Operator("r", hosts(), lock or FakeLock(), ssh, told.append)


def test_every_operator_sees_the_head_that_any_has_started() -> None:
    assert operator(FakeSsh(answers={HEAD: remote_state()})).nodes(HEAD_KIND) == [HEAD]
    assert operator(FakeSsh()).nodes(HEAD_KIND) == []


def test_a_head_that_does_not_answer_is_named() -> None:
    said: list[str] = []
    assert operator(FakeSsh(silent={HEAD: "No route to host"}), said=said).nodes(HEAD_KIND) == []
    assert said == [f"{HEAD} does not answer: No route to host"]


def test_up_on_a_dead_head_fails_at_once_with_the_reason() -> None:
    side = operator(FakeSsh(), FakeLock(Unreachable(HEAD, "Connection refused")))
    with pytest.raises(click.ClickException, match=f"{HEAD} does not answer: Connection refused"):
        side.create([HEAD], HEAD_KIND, 1)


def test_a_created_head_is_found_under_the_tags_that_ray_gave_it() -> None:
    side = operator(FakeSsh())
    tags = {
        **HEAD_KIND,
        ray_tags.TAG_RAY_USER_NODE_TYPE: "head",
        ray_tags.TAG_RAY_NODE_NAME: "ray-r-head",
        ray_tags.TAG_RAY_NODE_STATUS: ray_tags.STATUS_UNINITIALIZED,
    }
    side.create([HEAD], tags, 1)
    assert side.nodes(tags) == [HEAD]
    side.set_tags(HEAD, {ray_tags.TAG_RAY_NODE_STATUS: ray_tags.STATUS_UP_TO_DATE})
    assert side.tags(HEAD)[ray_tags.TAG_RAY_NODE_STATUS] == ray_tags.STATUS_UP_TO_DATE


def test_set_up_is_never_taken_for_done() -> None:
    side = operator(FakeSsh())
    side.set_tags(HEAD, {ray_tags.TAG_RAY_RUNTIME_CONFIG: "abc"})
    assert ray_tags.TAG_RAY_RUNTIME_CONFIG not in side.tags(HEAD)


def test_down_ends_the_head_first_then_every_host_of_the_file_and_those_the_head_knows() -> None:
    ssh = FakeSsh(answers={HEAD: remote_state(BIG[0], "10.0.0.99")})
    side = operator(ssh)
    listed = side.for_teardown(HEAD_KIND) + side.for_teardown(WORKER_KIND)
    assert listed == [HEAD, *BIG, *SMALL, "10.0.0.99"]
    ssh.answers.clear()
    side.terminate(listed)
    assert ssh.ended()[0] == HEAD
    assert sorted(ssh.ended()) == sorted(listed)
    assert side.for_teardown(HEAD_KIND) + side.for_teardown(WORKER_KIND) == []


def test_down_ends_the_workers_of_a_dead_head_and_names_it() -> None:
    why = "No route to host"
    ssh = FakeSsh(silent={HEAD: why})
    side = operator(ssh, FakeLock(Unreachable(HEAD, why)))
    listed = side.for_teardown(HEAD_KIND) + side.for_teardown(WORKER_KIND)
    with pytest.raises(click.ClickException) as error:
        side.terminate(listed)
    assert set(ssh.ended()) == {HEAD, *BIG, *SMALL}
    assert "3 of 4 hosts" in error.value.message
    assert f"\n  {HEAD}: {why}" in error.value.message
    assert side.for_teardown(WORKER_KIND) == []


def test_a_process_that_stays_is_named_with_its_host() -> None:
    ssh = FakeSsh(answers={BIG[1]: Answer(1, "", "not ended: pid 7; the kernel holds them")})
    with pytest.raises(click.ClickException, match=f"{BIG[1]}: not ended: pid 7"):
        operator(ssh).terminate([HEAD, *BIG])


def test_down_while_another_operator_is_at_work_ends_nothing() -> None:
    ssh = FakeSsh()
    side = operator(ssh, FakeLock(OperatorBusy("another operator is at work on cluster r: ann")))
    with pytest.raises(click.ClickException, match="at work on cluster r: ann"):
        side.terminate([HEAD, *BIG])
    assert ssh.ended() == []


def test_a_head_that_ray_wants_anew_is_not_ended() -> None:
    ssh = FakeSsh()
    side = operator(ssh)
    side.forget(HEAD)
    assert ssh.asked == []


# the provider


@pytest.fixture
def config(tmp_path: Path) -> dict[str, Any]:
    key = tmp_path / "id"
    key.write_text("key")
    given = rack(big=BIG, small=SMALL)
    given["auth"]["ssh_private_key"] = str(key)
    return given


def test_bootstrap_refuses_a_file_with_every_fault(config: dict[str, Any]) -> None:
    config["available_node_types"]["big"]["node_config"] = {"hots": BIG}
    config["available_node_types"]["small"]["min_workers"] = 7
    config["file_mounts"] = {TOKEN_FILE: "/no/such/token"}
    with pytest.raises(click.ClickException) as error:
        BareHostProvider.bootstrap_config(config)
    for words in ("did you mean `hosts`?", "found 7", "ray get-auth-token --generate"):
        assert words in error.value.message


def test_rays_launch_digest_of_the_head_is_the_providers(config: dict[str, Any]) -> None:
    done = BareHostProvider.bootstrap_config(config)
    provider = BareHostProvider(done["provider"], "r")
    node_config = done["available_node_types"]["head"]["node_config"]
    digest = provider.node_tags(HEAD)[ray_tags.TAG_RAY_LAUNCH_CONFIG]
    assert digest == hash_launch_conf(copy.deepcopy(node_config), config["auth"])


def test_the_heads_copy_makes_a_provider_for_the_head(
    config: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    done = BareHostProvider.bootstrap_config(config)
    here = BareHostProvider(done["provider"], "r")
    here._side = operator(FakeSsh())
    done["auth"]["ssh_private_key"] = "~/ray_bootstrap_key.pem"
    done["provider"]["_config_cache_path"] = "/tmp/x"
    sent = here.prepare_for_head_node(done)
    assert sent["provider"][INJECTED]["on_head"]
    assert sent["provider"][INJECTED]["access"]["ssh_private_key"] == "~/ray_bootstrap_key.pem"
    assert "_config_cache_path" not in sent["provider"]
    json.dumps(sent)
    there = BareHostProvider(sent["provider"], "r")
    assert there.non_terminated_nodes(HEAD_KIND) == [HEAD]
    assert BareHostProvider.bootstrap_config(sent) == sent


def test_a_provider_without_bootstrap_says_what_to_do(config: dict[str, Any]) -> None:
    with pytest.raises(click.ClickException, match="hand the topology file itself to `ray up`"):
        BareHostProvider(config["provider"], "r")


def test_commands_reach_each_host_by_its_own_user_and_port(config: dict[str, Any]) -> None:
    config["available_node_types"]["big"]["node_config"] |= {"ssh_user": "npu", "ssh_port": 2222}
    provider = BareHostProvider(BareHostProvider.bootstrap_config(config)["provider"], "r")

    asked: list[list[str]] = []

    class Recorded:
        @staticmethod
        def check_output(argv: list[str], **_: Any) -> bytes:
            asked.append(argv)
            return b""

    for node in (f"{BIG[0]}_1", SMALL[0]):
        given = provider.get_command_runner("", node, config["auth"], "r", Recorded, True)  # type: ignore[arg-type]
        given.run("uptime", with_output=True, timeout=120)
    first, second = (" ".join(argv) for argv in asked)
    assert f"npu@{BIG[0]}" in first
    assert "Port=2222" in first
    assert "ConnectTimeout=5s" in first
    assert f"someone@{SMALL[0]}" in second
    assert "Port=22 " in second


def test_in_a_container_the_mark_is_set_inside_it(config: dict[str, Any]) -> None:
    provider = BareHostProvider(BareHostProvider.bootstrap_config(config)["provider"], "r")
    asked: list[str] = []

    class Recorded:
        @staticmethod
        def check_output(argv: list[str], **_: Any) -> bytes:
            asked.append(argv[-1])
            return b""

    given = provider.get_command_runner(
        *("", BIG[0], config["auth"], "r", Recorded, True),  # type: ignore[arg-type]
        docker_config={"container_name": "box"},
    )
    given.run("ray start --head", environment_variables={}, with_output=True)
    inside = asked[-1].partition("docker exec")[2]
    assert "box" in inside
    assert "PDCLUSTER_OWNER=r@hosts/ray" in inside
    given.run("uptime", run_env="host", with_output=True)
    assert "docker" not in asked[-1]


@pytest.mark.parametrize(
    ("cmd", "has_token", "is_start", "worded"),
    [
        ("uptime", False, False, "uptime"),
        ("uptime", True, False, "export RAY_AUTH_MODE=token; uptime"),
        ("ray start", False, True, "export PDCLUSTER_OWNER=r@hosts/ray; ray start"),
        ("ray stop", True, False, "python3 -m cluster.nodes.end --cluster r"),
        ("ray stop --force", False, False, "ray stop --force"),
    ],
)
def test_commands_are_worded_for_the_host(
    cmd: str, has_token: bool, is_start: bool, worded: str
) -> None:
    assert runner.worded(cmd, "r", has_token, is_start) == worded
