"""`pdcluster doctor` over real ssh: two addresses of this machine stand for two hosts."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import loopback_sshd
import pytest
import yaml
from loopback_sshd import Door
from ports import free_port

HEAD, WORKER, DEAD = "127.0.0.2", "127.0.0.3", "127.0.0.4"
# What `ray up` reads whether or not there is anything in it.
READ_BY_RAY = (
    "cluster_synced_files",
    "initialization_commands",
    "setup_commands",
    "head_setup_commands",
    "worker_setup_commands",
)
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(loopback_sshd.SSHD is None, reason="openssh-server is not installed"),
]


@pytest.fixture(scope="module")
def door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Door]:
    folder = tmp_path_factory.mktemp("sshd")
    with loopback_sshd.running(folder, [HEAD, WORKER]) as door:
        yield door


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def gateway_port() -> int:
    return free_port()


@pytest.fixture
def rack(tmp_path: Path, door: Door, model: Path, gateway_port: int) -> Path:
    """A head and a worker host, both sound as far as this machine is."""
    python, node = sys.executable, {"ssh_port": door.port}
    store = "--object-store-memory=80000000"
    pool = {"engine": "simulated", "placement": {"labels": {"kind": "engine"}}}
    value = {
        "cluster_name": "doctored",
        "max_workers": 1,
        **{key: [] for key in READ_BY_RAY},
        "file_mounts": {},
        "provider": {"type": "external", "module": "cluster.nodes.BareHostProvider"},
        "auth": {"ssh_user": door.user, "ssh_private_key": str(door.key)},
        "head_node_type": "head",
        "available_node_types": {
            "head": {"node_config": {"hosts": [HEAD], **node}, "resources": {"CPU": 1}},
            "workers": {
                "node_config": {"hosts": [WORKER], **node},
                "resources": {"CPU": 2},
                "labels": {"kind": "engine"},
                "min_workers": 1,
                "max_workers": 1,
            },
        },
        "head_start_ray_commands": [
            f"{python} -m cluster.nodes.start ray start --head --port={free_port()} {store}"
        ],
        "worker_start_ray_commands": [
            f"{python} -m cluster.nodes.start ray start --address=$RAY_HEAD_IP:6379 {store}"
        ],
        "metadata": {
            "serving": {
                "model": {"id": str(model), "max_model_len_tokens": 4096},
                "pools": [
                    {"name": "prefill", "role": "prefill", **pool},
                    {"name": "decode", "role": "decode", **pool},
                ],
                "islands": [{"name": "one", "pools": ["prefill", "decode"]}],
                "gateway": {"host": HEAD, "port": gateway_port, "ingress": "direct"},
                "control": {"host": HEAD, "port": free_port()},
            }
        },
    }
    return written(tmp_path / "rack.yaml", value)


def written(path: Path, value: object) -> Path:
    path.write_text(yaml.safe_dump(value, sort_keys=False))
    return path


def doctor(*words: object) -> tuple[int, dict]:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.cli", "doctor", *map(str, words), "--json"],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout, done.stderr
    return done.returncode, json.loads(done.stdout)


def errors(said: dict) -> list[tuple[str, str]]:
    return [(f["host"], f["check"]) for f in said["findings"] if f["severity"] == "error"]


def test_sound_hosts_are_fit_and_every_one_is_looked_at(rack):
    code, said = doctor(rack)
    assert (code, errors(said)) == (0, [])
    assert [row["host"] for row in said["rows"]] == [HEAD, WORKER]
    for row in said["rows"]:
        assert row["seen"]["python"] == ".".join(map(str, sys.version_info[:3]))
        assert row["seen"]["clock"] in ("+0.00 s", "-0.00 s")


def test_a_port_that_is_held_is_named_with_its_holder(rack, gateway_port):
    with socket.create_server((HEAD, gateway_port)):
        code, said = doctor(rack)
    assert (code, errors(said)) == (1, [(HEAD, "ports")])
    held = next(f for f in said["findings"] if f["check"] == "ports" and f["severity"] == "error")
    assert f"gateway.port {gateway_port}" in held["found"]
    assert f"(pid {os.getpid()})" in held["found"]


def test_a_port_of_the_cluster_itself_is_no_fault(rack, gateway_port):
    held = (
        "import socket,time;s=socket.create_server(('127.0.0.2',int(__import__('sys').argv[1])));"
        "print(flush=True);time.sleep(300)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", held, str(gateway_port)],
        env={**os.environ, "PDCLUSTER_OWNER": "doctored@hosts/ray"},
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        process.stdout.readline()
        assert doctor(rack)[0] == 0
    finally:
        process.kill()
        process.wait()


def test_a_missing_model_folder_is_told_for_the_hosts_that_load_it(rack, model):
    model.rename(model.with_name("elsewhere"))
    code, said = doctor(rack)
    assert (code, errors(said)) == (1, [(WORKER, "model")])


def test_a_host_that_does_not_answer_is_named_and_the_others_are_looked_at(rack):
    value = yaml.safe_load(rack.read_text())
    workers = value["available_node_types"]["workers"]
    workers["node_config"]["hosts"].append(DEAD)
    workers |= {"min_workers": 2, "max_workers": 2}
    value["max_workers"] = 2
    code, said = doctor(written(rack, value))
    assert (code, errors(said)) == (1, [(DEAD, "ssh")])
    assert "refused" in said["findings"][0]["found"]
    assert [bool(row["seen"]) for row in said["rows"]] == [True, True, False]


def test_an_address_that_is_not_the_hosts_own_is_told(rack, door):
    """Behind address translation ssh gets in, but engines could not bind what the file says."""
    value = yaml.safe_load(rack.read_text())
    value["available_node_types"]["workers"]["node_config"]["hosts"] = ["10.255.255.1"]
    # Any program that carries bytes from here to there will do.
    carrier = (
        f'{sys.executable} -c "import socket,sys,threading,os;'
        f"s=socket.create_connection(('127.0.0.3',{door.port}));"
        "t=threading.Thread(target=lambda:[os.write(1,d) for d in iter(lambda:s.recv(65536),b'')]);"
        "t.start();[s.sendall(d) for d in iter(lambda:os.read(0,65536),b'')];s.shutdown(1)\""
    )
    value["auth"]["ssh_proxy_command"] = carrier
    code, said = doctor(written(rack, value), "--host", "10.255.255.1", "--host", HEAD)
    found = [f for f in said["findings"] if f["host"] == "10.255.255.1" and f["check"] == "network"]
    assert code == 1
    assert "nothing can listen there" in found[0]["found"]


def test_what_a_login_shell_prints_is_not_taken_for_an_answer(rack, tmp_path, door):
    value = yaml.safe_load(rack.read_text())
    key = "worker_start_ray_commands"
    value[key] = [f"echo '{{\"id\": 0}}'; {value[key][0]}"]
    assert doctor(written(rack, value))[0] == 0


def test_a_python_that_is_not_there_is_told_in_the_shells_words(rack):
    value = yaml.safe_load(rack.read_text())
    command = "/no/such/python -m cluster.nodes.start ray start --address=$RAY_HEAD_IP:6379"
    value["worker_start_ray_commands"] = [command]
    code, said = doctor(written(rack, value))
    assert (code, errors(said)) == (1, [(WORKER, "ssh")])
    assert "/no/such/python" in said["findings"][0]["found"]


def test_limits_are_those_that_ray_would_start_with(rack):
    value = yaml.safe_load(rack.read_text())
    key = "worker_start_ray_commands"
    value[key] = [f"ulimit -n 2000; {value[key][0]}"]
    code, said = doctor(written(rack, value))
    assert (code, errors(said)) == (1, [(WORKER, "limits")])


def test_interrupted_it_leaves_nothing_on_the_hosts(rack, tmp_path):
    """A host that takes for ever: its interpreter of an engine never says its versions."""
    mark = f"doctor-test-{os.getpid()}"
    slow = tmp_path / "python-slow"
    slow.write_text(f"#!/bin/bash\nexec -a {mark} sleep 300\n")
    slow.chmod(0o755)
    value = yaml.safe_load(rack.read_text())
    for pool in value["metadata"]["serving"]["pools"]:
        pool["interpreter"] = str(slow)
    command = [sys.executable, "-m", "cluster.cli", "doctor", str(written(rack, value))]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL)
    try:
        until(lambda: with_argument(mark))
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 130
        until(lambda: not with_argument(mark))
        until(lambda: not with_argument("pdcluster-doctor"))
    finally:
        process.kill()
        process.wait()


def with_argument(word: str) -> list[int]:
    """Processes with this word among their arguments, other than ours."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if word in (folder / "cmdline").read_text(errors="replace"):
                    found.append(int(folder.name))
            except OSError:
                continue
    return found


def until(holds) -> None:
    deadline_s = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
