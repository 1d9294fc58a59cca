"""Before anything starts: a Ray of others is found and spoken to, ports are looked at."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest
from ports import free_port
from topology_text import BASE

from cluster.errors import ClusterError, TopologyError
from cluster.launcher import joined_ray, listen
from cluster.topology import loader


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(BASE)
    return path


@pytest.fixture
def noted(tmp_path, monkeypatch):
    """Where `ray start --head` notes its address."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    (tmp_path / "ray").mkdir()
    return tmp_path / "ray/ray_current_cluster"


def test_the_ray_of_this_machine_is_found_without_importing_ray(file, noted):
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        noted.write_text(address + "\n")
        assert joined_ray.address_here(loader.load(file), file) == address


def test_the_note_is_where_ray_looks_for_it(noted):
    noted.write_text("127.0.0.1:1")
    script = "from ray._private.utils import read_ray_address; print(read_ray_address())"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "127.0.0.1:1"


def test_without_a_ray_here_the_way_to_one_is_told(file, noted):
    topology = loader.load(file)
    with pytest.raises(ClusterError, match=r"no Ray runs here; run `ray up .*on the head"):
        joined_ray.address_here(topology, file)
    noted.write_text(f"127.0.0.1:{free_port()}")
    with pytest.raises(ClusterError, match=r"noted at 127.0.0.1:\d+ does not answer"):
        joined_ray.address_here(topology, file)


@pytest.fixture
def gcs(monkeypatch):
    """A process that looks like Ray's head and was given settings."""
    for name in list(os.environ):
        if name.startswith("RAY_"):
            monkeypatch.delenv(name)
    port = free_port()
    script = "import time; print('up', flush=True); time.sleep(60)"
    process = subprocess.Popen(
        ["/opt/ray/gcs_server", "-c", script, f"--gcs_server_port={port}"],
        executable=sys.executable,
        env=os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "/t", "RAY_X": "1"},
        stdout=subprocess.PIPE,
    )
    process.stdout.readline()
    yield port
    process.kill()
    process.wait()
    process.stdout.close()


def test_what_ray_was_started_with_is_taken_over(gcs, monkeypatch):
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", "/stated")
    before = dict(os.environ)
    joined_ray.prepare_environment(f"127.0.0.1:{gcs + 1}")
    assert dict(os.environ) == before
    joined_ray.prepare_environment(f"127.0.0.1:{gcs}")
    # What this process was told itself stays.
    assert dict(os.environ) == before | {"RAY_AUTH_MODE": "token"}
    del os.environ["RAY_AUTH_MODE"]


def test_a_port_for_two_is_refused(tmp_path):
    path = tmp_path / "t.yaml"
    path.write_text(BASE.replace("port: 8000", "port: 8001"))
    with pytest.raises(TopologyError, match=r"t.yaml:\d+ metadata.serving.control.port: 8001 is"):
        listen.check(loader.load(path), path)


def test_every_address_that_cannot_be_listened_on_is_told_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        path = tmp_path / "t.yaml"
        text = BASE.replace("port: 8000", f"port: {port}")
        path.write_text(text + "    control: {host: 192.0.2.1, port: 8001}\n")
        with pytest.raises(TopologyError) as refused:
            listen.check(loader.load(path), path)
    gateway, control = refused.value.faults
    assert (gateway.line, gateway.key) == (18, "metadata.serving.gateway.port")
    assert f"pid {os.getpid()}" in gateway.found
    assert control.key == "metadata.serving.control.port"
    assert "cannot assign requested address" in control.found


def test_a_free_port_is_free_afterwards(tmp_path):
    path = tmp_path / "t.yaml"
    port, other = free_port(), free_port()
    path.write_text(
        BASE.replace("port: 8000", f"port: {port}") + f"    control: {{port: {other}}}\n"
    )
    for _ in range(2):
        listen.check(loader.load(path), path)
