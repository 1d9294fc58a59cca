"""What runs on a host: sees what is there, and goes when nobody asks any more."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from doctor_facts import GPU_1, HEAD, plan_of, rack
from ports import free_port

from cluster.nodes.doctor.examine import asked_of
from cluster.nodes.doctor.facts import Facts
from cluster.nodes.doctor.on_host import commands, disk, reach, system, talk
from cluster.nodes.doctor.session import _BOOT, sources


def put(folder: Path, name: str, text: str) -> None:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """Puts a shell script on the PATH, before all others."""
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")

    def program(name: str, script: str) -> None:
        put(tmp_path, f"bin/{name}", f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin" / name).chmod(0o755)

    return program


@pytest.mark.parametrize("name_and_source", sources(), ids=lambda pair: pair[0])
def test_it_needs_nothing_but_an_old_python(name_and_source):
    name, source = name_and_source
    tree = ast.parse(source, name, feature_version=(3, 8))
    imported = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            is_own = node.module.startswith("cluster.nodes.doctor.on_host")
            imported |= set() if is_own else {node.module.split(".")[0]}
    assert imported <= sys.stdlib_module_names


@pytest.mark.parametrize("address", [HEAD, GPU_1])
def test_it_answers_everything_that_is_asked_here(address):
    told = talk.gather(json.loads(json.dumps(asked_of(plan_of(rack(), address)))))
    facts = Facts.of(json.loads(json.dumps(told)))
    assert facts.errors == {}
    assert facts.system.python == ".".join(map(str, sys.version_info[:3]))
    assert facts.packages["ray"]
    assert facts.shm.total_bytes
    assert facts.memory_bytes
    assert facts.ephemeral is not None
    assert facts.folders["state"].writable


def test_a_part_that_fails_leaves_its_reason_and_the_rest():
    asked = asked_of(plan_of(rack(), HEAD)) | {"ports": [{"nonsense": 1}]}
    told = talk.gather(json.loads(json.dumps(asked)))
    assert "KeyError" in told["errors"]["ports"]
    assert told["memory_bytes"] > 0


def test_a_port_is_free_held_or_not_ours():
    port = free_port()
    assert system.port(port, "127.0.0.1")["error"] == ""
    with socket.create_server(("127.0.0.1", port)):
        held = system.port(port, "127.0.0.1")
    assert held["error"] == "Address already in use"
    assert f"(pid {os.getpid()})" in held["by"]
    assert "assign" in system.port(port, "192.0.2.1")["error"]


def test_a_mark_of_the_owner_is_found_on_an_ancestor():
    """Ray's actors write their title over their own environment."""
    script = (
        "import socket,sys;s=socket.create_server(('127.0.0.1',int(sys.argv[1])));"
        "print(flush=True);sys.stdin.read()"
    )
    port = free_port()
    shell = f'env -u PDCLUSTER_OWNER {sys.executable} -c "{script}" {port}; true'
    parent = subprocess.Popen(
        ["sh", "-c", shell],
        env={**os.environ, "PDCLUSTER_OWNER": "rack@hosts/ray"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with parent:
        assert parent.stdout is not None
        parent.stdout.readline()
        assert system.port(port, "127.0.0.1")["owner"] == "rack@hosts/ray"


def test_gpus_are_told_by_nvidia_smi(programs):
    programs("nvidia-smi", "echo 'NVIDIA H200, 580.95.05'; echo 'NVIDIA H200, 580.95.05'")
    assert system.gpu() == {"names": ["NVIDIA H200"], "driver": "580.95.05"}
    programs("nvidia-smi", 'echo "couldn\'t communicate with the driver"; exit 9')
    assert system.gpu() == {"error": "couldn't communicate with the driver"}


def test_npus_are_told_by_their_installers_files(programs, tmp_path, monkeypatch):
    programs("npu-smi", "true")
    put(tmp_path, "driver", "Version=25.5.0\nascendhal_version=7.35.23\n")
    put(tmp_path, "cann/aarch64-linux/ascend_toolkit_install.info", "version=9.1.0\narch=aarch64\n")
    monkeypatch.setattr(system, "_NPU_DRIVER", str(tmp_path / "driver"))
    monkeypatch.setenv("ASCEND_TOOLKIT_HOME", str(tmp_path / "cann"))
    assert system.npu() == {"driver": "25.5.0", "cann": "9.1.0"}
    programs("npu-smi", "echo dcmi module initialize failed; exit 1")
    assert system.npu()["error"] == "dcmi module initialize failed"


def test_a_container_is_asked_for_its_own_packages(programs):
    programs("docker", 'case "$1" in image) exit 0;; inspect) echo false;; esac')
    asked = {"command": "docker", "name": "pd", "image": "pdcluster:cuda"}
    assert system.container(**asked) == {"has_image": True, "runs": False}
    programs(
        "docker",
        'case "$1" in image) exit 1;; inspect) echo true;;'
        ' exec) echo \'{"python": "3.12.3", "packages": {"ray": "2.60.0"}}\';; esac',
    )
    assert system.container(**asked) == {
        "has_image": False,
        "runs": True,
        "python": "3.12.3",
        "packages": {"ray": "2.60.0"},
    }
    programs("docker", "echo permission denied >&2; exit 1")
    assert system.container(**asked) == {"error": "permission denied"}


def test_an_interpreter_is_asked_for_its_packages(tmp_path):
    told = system.interpreter(sys.executable)
    assert told["exists"]
    assert told["packages"]["pytest"]
    assert system.interpreter(str(tmp_path / "python3")) == {"exists": False}
    put(tmp_path, "python-broken", "#!/bin/sh\necho no encodings >&2; exit 3\n")
    (tmp_path / "python-broken").chmod(0o755)
    assert system.interpreter(str(tmp_path / "python-broken")) == {
        "exists": True,
        "error": "no encodings",
    }


def test_a_library_is_looked_for_as_the_linker_does():
    assert system.library("libc.so.6") == ""
    assert "no-such" in system.library("no-such-library.so.1")


def test_a_program_that_does_not_end_is_ended(monkeypatch):
    monkeypatch.setattr(commands, "_BOUND_S", 0.2)
    code, _, why = commands.run(["sh", "-c", "sleep 60"])
    assert (code, why) == (-1, "sh did not end within 0.2 s")


# Models


def model_in(folder: Path, *names: str) -> dict:
    put(folder, "config.json", "{}")
    for name in names:
        put(folder, name, "12345")
    return disk.models([{"kind": "folder", "id": str(folder)}])[0]


def test_folders_with_the_same_names_and_sizes_have_the_same_digest(tmp_path):
    one = model_in(tmp_path / "one", "a.safetensors", "b.safetensors")
    two = model_in(tmp_path / "two", "b.safetensors", "a.safetensors")
    other = model_in(tmp_path / "other", "a.safetensors")
    assert one["digest"] == two["digest"] != other["digest"]
    assert (one["files"], one["bytes"], one["exists"]) == (3, 12, True)


def test_another_config_has_another_print(tmp_path):
    one = model_in(tmp_path / "one")
    put(tmp_path, "two/config.json", "[]")
    two = disk.models([{"kind": "folder", "id": str(tmp_path / "two")}])[0]
    assert one["digest"] == two["digest"]
    assert one["config"] != two["config"]


def test_weights_that_the_index_names_and_that_are_not_there_are_told(tmp_path):
    put(
        tmp_path,
        "m/model.safetensors.index.json",
        json.dumps({"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}),
    )
    (tmp_path / "m" / "b.safetensors").symlink_to(tmp_path / "gone")
    assert model_in(tmp_path / "m", "a.safetensors")["missing"] == ["b.safetensors"]


@pytest.mark.parametrize("index", ["[]", "no JSON", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_no_reason_to_stop(tmp_path, index):
    put(tmp_path, "m/model.safetensors.index.json", index)
    assert model_in(tmp_path / "m")["missing"] == []


def test_a_model_of_the_hub_is_found_in_its_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    need = {"kind": "hub", "id": "org/name", "revision": ""}
    assert not disk.models([need])[0]["exists"]
    put(tmp_path, "models--org--name/refs/main", "abc123")
    put(tmp_path, "models--org--name/snapshots/abc123/config.json", "{}")
    found = disk.models([need])[0]
    assert found["exists"]
    assert found["path"].endswith("/snapshots/abc123")


def test_looking_at_a_folder_that_is_not_there_makes_none(tmp_path, monkeypatch):
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME", "XDG_RUNTIME_DIR", "RAY_TMPDIR"):
        monkeypatch.setenv(name, str(tmp_path / name / "deep"))
    folders = disk.folders()
    assert folders["state"]["writable"]
    assert folders["state"]["free_bytes"] > 0
    assert list(tmp_path.iterdir()) == []


# Reaching, talking


def test_a_host_is_reached_only_if_its_own_listener_answers():
    listener = reach.Listener("127.0.0.1", 10_000, 15_000)
    target = {"address": "127.0.0.1", "port": listener.port, "word": listener.word}
    assert reach.reach([target]) == {"127.0.0.1": ""}
    wrong = {**target, "word": "another"}
    assert reach.reach([wrong]) == {"127.0.0.1": "somebody else answers there"}
    nobody = {**target, "port": free_port()}
    assert reach.reach([nobody]) == {"127.0.0.1": "Connection refused"}


def test_a_listener_says_when_the_address_is_not_the_hosts():
    with pytest.raises(OSError, match="assign"):
        reach.Listener("192.0.2.1", 10_000, 15_000)


def probe() -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-u", "-c", _BOOT],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    tell(process, sources())
    assert hear(process) == {"id": 0, "answer": None}
    return process


def tell(process: subprocess.Popen[str], message: object) -> None:
    assert process.stdin is not None
    process.stdin.write(json.dumps(message) + "\n")
    process.stdin.flush()


def hear(process: subprocess.Popen[str]) -> dict:
    assert process.stdout is not None
    return json.loads(process.stdout.readline().removeprefix(talk.MARK))


def test_it_ends_with_its_input_and_takes_its_children_along(tmp_path):
    put(tmp_path, "python-slow", f"#!/bin/sh\necho $$ > {tmp_path}/pid\nexec sleep 300\n")
    (tmp_path / "python-slow").chmod(0o755)
    os.mkfifo(tmp_path / "pid")
    process = probe()
    about = asked_of(plan_of(rack(), HEAD)) | {"interpreters": [str(tmp_path / "python-slow")]}
    tell(process, {"id": 1, "do": "facts", "about": about})
    child = int((tmp_path / "pid").read_text())
    assert process.stdin is not None
    process.stdin.close()
    assert process.wait(10) == 0
    assert process.stdout is not None
    process.stdout.close()
    deadline_s = time.monotonic() + 10
    while is_alive(child):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def is_alive(pid: int) -> bool:
    """Whether it runs; one that waits to be reaped does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_question_that_fails_or_is_unknown_is_answered_with_the_reason():
    with probe() as process:
        tell(process, {"id": 1, "do": "dance"})
        assert hear(process) == {"id": 1, "error": "ValueError: asked to dance"}
        tell(
            process,
            {"id": 2, "do": "listen", "address": "192.0.2.1", "low": 10_000, "high": 11_000},
        )
        assert "assign" in hear(process)["error"]
        process.stdin.close()
