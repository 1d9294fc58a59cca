"""`pdcluster doctor` on a rack of namespaces: a sound head, a sound host, and one with faults made
on purpose. Real ssh, addresses and /dev/shm of their own; no Ray is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from e2e.hosts_rack import HEAD, OPERATOR, Hosts, address, hosts_up

SOUND, FAULTY = 2, 3
BUSY_PORT = 9120
MODEL = "/tmp/model"
pytestmark = pytest.mark.e2e


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("rack")


@pytest.fixture(scope="module")
def said(shared: Path) -> Iterator[dict[str, Any]]:
    """What the operator's host was told, and how it was with the hosts before and after."""
    rack = shared / "rack.yaml"
    rack.write_text(yaml.safe_dump(topology(), sort_keys=False))
    with hosts_up("pddoct", shared, count=4) as hosts:

        def on(host: int, script: str) -> str:
            return hosts.run(host, "bash", "-c", script).stdout

        on(SOUND, f"mkdir {MODEL}; echo '{{}}' >{MODEL}/config.json")
        on(FAULTY, "mount -o remount,size=32m /dev/shm")
        on(FAULTY, f"ip route add blackhole {address(SOUND)}")
        on(FAULTY, "echo export PYTHONHASHSEED=7 >>~/.bashrc")
        on(FAULTY, f"(setsid python3 -m http.server {BUSY_PORT} >/dev/null 2>&1 &)")
        before = [state_of(hosts, host) for host in (HEAD, SOUND, FAULTY)]
        told = on(OPERATOR, f"pdcluster doctor {rack} --json; test $? = 1")
        after = [state_of(hosts, host) for host in (HEAD, SOUND, FAULTY)]
        yield {**json.loads(told), "before": before, "after": after}


def state_of(hosts: Hosts, host: int) -> tuple[list[str], list[str]]:
    """What must not change: processes, listeners, shared memory; files of the host's own."""
    found = hosts.run(host, "bash", "-c", "find /tmp /run -xdev | sort").stdout
    return hosts.left(host), found.splitlines()


def topology() -> dict[str, Any]:
    start = "python3 -m cluster.nodes.start ray start --object-store-memory=80000000"
    pool = {
        "engine": "simulated",
        "placement": {"resources": {"CPU": 1}, "labels": {"kind": "engine"}},
    }
    empty = ("cluster_synced_files", "initialization_commands", "setup_commands")
    return {
        "cluster_name": "doctored",
        "max_workers": 2,
        **{name: [] for name in (*empty, "head_setup_commands", "worker_setup_commands")},
        "file_mounts": {},
        "provider": {"type": "external", "module": "cluster.nodes.BareHostProvider"},
        "auth": {"ssh_user": "root"},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"node_config": {"hosts": [address(HEAD)]}, "resources": {"CPU": 1}},
            "engines": {
                "node_config": {"hosts": [address(SOUND), address(FAULTY)]},
                "min_workers": 2,
                "max_workers": 2,
                "resources": {"CPU": 2},
                "labels": {"kind": "engine"},
            },
        },
        "head_start_ray_commands": [f"{start} --head --port=6379"],
        "worker_start_ray_commands": [
            f"{start} --address=$RAY_HEAD_IP:6379 --metrics-export-port={BUSY_PORT}"
        ],
        "metadata": {
            "serving": {
                "model": {"id": MODEL, "max_model_len_tokens": 4096},
                "pools": [
                    {"name": "prefill", "role": "prefill", **pool},
                    {"name": "decode", "role": "decode", **pool},
                ],
                "islands": [{"name": "one", "pools": ["prefill", "decode"]}],
                "gateway": {"host": address(HEAD), "ingress": "direct"},
                "control": {"host": address(HEAD)},
            }
        },
    }


def found(said: dict[str, Any], host: int, check: str) -> dict[str, str]:
    (finding,) = [f for f in said["findings"] if f["host"] == address(host) and f["check"] == check]
    return finding


def test_every_host_is_looked_at_and_the_sound_ones_have_no_errors_of_their_own(said):
    assert [row["host"] for row in said["rows"]] == [
        address(host) for host in (HEAD, SOUND, FAULTY)
    ]
    assert all(row["seen"] for row in said["rows"])
    own = {
        f["check"]
        for f in said["findings"]
        if f["severity"] == "error" and f["host"] != address(FAULTY)
    }
    assert own <= {"network"}
    assert said["rows"][0]["errors"] == 0


def test_a_port_that_is_held_is_told_with_its_holder(said):
    finding = found(said, FAULTY, "ports")
    assert finding["severity"] == "error"
    assert f"--metrics-export-port {BUSY_PORT}" in finding["found"]
    assert "python3" in finding["found"]


def test_a_tiny_shared_memory_is_told(said):
    assert "/dev/shm has 32 MiB" in found(said, FAULTY, "shared memory")["found"]


def test_a_missing_model_folder_is_told(said):
    finding = found(said, FAULTY, "model")
    assert finding["severity"] == "error"
    assert finding["found"] == f"no folder {MODEL}"


def test_hosts_that_do_not_reach_each_other_are_told(said):
    assert f"from {address(FAULTY)}" in found(said, SOUND, "network")["found"]
    assert f"from {address(SOUND)}" in found(said, FAULTY, "network")["found"]


def test_a_hash_seed_of_its_own_is_told(said):
    assert found(said, FAULTY, "PYTHONHASHSEED")["found"] == "7"


def test_nothing_is_changed_on_the_hosts(said):
    assert said["before"] == said["after"]
