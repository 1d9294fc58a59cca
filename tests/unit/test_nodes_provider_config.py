"""What a file may say to the bare-host provider, and what is said of one that says it wrong."""

from __future__ import annotations

import copy
from typing import Any

import pytest
from nodes_rack import HEAD, rack

from cluster.nodes.config import INJECTED, TOKEN_FILE, Hosts, findings, uses_bare_hosts
from cluster.topology.findings import dotted

BASE = rack(big=["10.0.0.11", "10.0.0.12"], small=["10.0.0.21"])
TYPES = "available_node_types"


def changed(path: str, value: Any) -> dict[str, Any]:
    """BASE with one key set, or, for None, taken out."""
    config = copy.deepcopy(BASE)
    at = config
    *above, last = path.split("/")
    for part in above:
        at = at[part]
    if value is None:
        del at[last]
    else:
        at[last] = value
    return config


def test_a_right_file_has_no_findings() -> None:
    assert findings(BASE) == ()


@pytest.mark.parametrize(
    ("path", "value", "key", "found", "fix"),
    [
        (
            f"{TYPES}/big/node_config",
            {},
            f"{TYPES}.big.node_config.hosts",
            "missing",
            "add `hosts: [",
        ),
        (
            f"{TYPES}/big/node_config/hosts",
            [],
            f"{TYPES}.big.node_config.hosts",
            "a list of 0",
            "write a list",
        ),
        (
            f"{TYPES}/big/node_config/hosts",
            "10.0.0.11",
            f"{TYPES}.big.node_config.hosts",
            "10.0.0.11",
            "write a list",
        ),
        (
            f"{TYPES}/big/node_config/hosts",
            ["gpu-7"],
            f"{TYPES}.big.node_config.hosts[0]",
            '"gpu-7"',
            "IPv4 address",
        ),
        (
            f"{TYPES}/big/node_config/host",
            ["10.0.0.9"],
            f"{TYPES}.big.node_config.host",
            'no key "host"',
            "did you mean `hosts`?",
        ),
        (
            f"{TYPES}/big/node_config/ssh_port",
            70000,
            f"{TYPES}.big.node_config.ssh_port",
            "70000",
            "1 to 65535",
        ),
        (
            f"{TYPES}/small/node_config/hosts",
            ["10.0.0.11"],
            f"{TYPES}.small.node_config.hosts[0]",
            "10.0.0.11 stands in big",
            "once",
        ),
        (
            f"{TYPES}/big/node_config/hosts",
            ["10.0.0.11", "10.0.0.11"],
            f"{TYPES}.big.node_config.hosts[1]",
            "stands in big",
            "once",
        ),
        (
            f"{TYPES}/small/node_config/hosts",
            [HEAD],
            f"{TYPES}.small.node_config.hosts[0]",
            f"{HEAD} stands in head",
            "once",
        ),
        (
            f"{TYPES}/big/min_workers",
            3,
            f"{TYPES}.big.min_workers",
            "found 3; it has 2 hosts",
            "add hosts",
        ),
        (
            f"{TYPES}/big/max_workers",
            3,
            f"{TYPES}.big.max_workers",
            "found 3; it has 2 hosts",
            "add hosts",
        ),
        (
            f"{TYPES}/big/min_workers",
            None,
            f"{TYPES}.big.min_workers",
            "missing",
            "add `min_workers: 2`",
        ),
        (
            f"{TYPES}/head/node_config/hosts",
            [HEAD, "10.0.0.2"],
            f"{TYPES}.head.node_config.hosts",
            "2 hosts for the head",
            "write one",
        ),
        (
            f"{TYPES}/head/max_workers",
            2,
            f"{TYPES}.head.max_workers",
            "found 2 for the head",
            "take it out",
        ),
        ("provider/hosts", ["10.0.0.1"], "provider.hosts", 'no key "hosts"', "take it out"),
        ("auth", {}, "auth.ssh_user", "missing", "ssh_user: USER"),
        (
            "head_start_ray_commands",
            ["ray stop", "ray start --head"],
            "head_start_ray_commands",
            "cluster.nodes.start",
            "cluster.nodes.start ray start --head",
        ),
        (
            "worker_start_ray_commands",
            ["ray stop", "ray start"],
            "worker_start_ray_commands",
            "cluster.nodes.start",
            "--address=$RAY_HEAD_IP",
        ),
    ],
)
def test_a_fault_names_the_key_what_was_found_and_the_fix(
    path: str, value: Any, key: str, found: str, fix: str
) -> None:
    (only,) = findings(changed(path, value))
    assert dotted(only.key) == key
    assert found in only.found
    assert fix in only.fix


def test_all_faults_come_at_once() -> None:
    config = changed(f"{TYPES}/big/node_config/hosts", ["10.0.0.21", "10.0.0.21"])
    config["auth"] = {}
    assert len(findings(config)) == 3


def test_what_ray_and_the_provider_put_into_their_section_is_no_fault() -> None:
    config = changed("provider/_config_cache_path", "/tmp/x")
    config["provider"][INJECTED] = {}
    assert findings(config) == ()


def test_a_node_type_may_have_its_own_user_and_port() -> None:
    config = changed(f"{TYPES}/big/node_config/ssh_user", "npu")
    config[TYPES]["big"]["node_config"]["ssh_port"] = 2222
    hosts = Hosts.of(config)
    there, elsewhere = hosts.host("10.0.0.11"), hosts.host("10.0.0.21")
    assert (there.user, there.port) == ("npu", 2222)
    assert (elsewhere.user, elsewhere.port) == ("someone", 22)
    assert there.key == elsewhere.key == "~/key"


def test_a_host_that_has_left_the_file_is_still_reached_as_the_file_says() -> None:
    assert Hosts.of(BASE).host("10.0.0.99").user == "someone"


def test_hosts_survive_the_way_to_the_head_and_back() -> None:
    hosts = Hosts.of(BASE)
    assert hosts.head == HEAD
    assert hosts.workers == ("10.0.0.11", "10.0.0.12", "10.0.0.21")
    assert Hosts.model_validate(hosts.model_dump(mode="json")) == hosts


def test_the_token_is_known_by_where_the_file_sends_it() -> None:
    assert not Hosts.of(BASE).has_token
    assert Hosts.of(changed("file_mounts", {TOKEN_FILE: "~/mine"})).has_token


@pytest.mark.parametrize("provider", [{"type": "local"}, {"module": "x.Y"}, None, "external"])
def test_files_of_other_providers_are_not_ours(provider: Any) -> None:
    assert not uses_bare_hosts({"provider": provider})
    assert uses_bare_hosts(BASE)
