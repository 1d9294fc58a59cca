"""`scripts/serve`, as a container or a service manager runs it: a real cluster of simulated engines
comes and goes with one process."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from ports import free_port

ROOT = Path(__file__).parents[2]
MARK = "PDCLUSTER_TEST_SERVE"
BOUND_S = 90
pytestmark = [pytest.mark.integration, pytest.mark.e2e, pytest.mark.slow]


@pytest.fixture
def port() -> int:
    return free_port()


@pytest.fixture
def environment(tmp_path_factory: pytest.TempPathFactory, port: int) -> dict[str, str]:
    home = tmp_path_factory.mktemp("s")  # short: Ray's sockets are below
    topology = (ROOT / "topologies/local-simulated.yaml").read_text()
    lines = [line for line in topology.splitlines() if not line.lstrip().startswith("port:")]
    cluster = f"serve-{os.getpid()}"
    text = "\n".join(lines).replace("cluster_name: local-simulated", f"cluster_name: {cluster}")
    text = text.replace("    gateway:", f"    control: {{port: {free_port()}}}\n    gateway:")
    text = text.replace("    gateway:", f"    gateway:\n      port: {port}")
    text += "\n    observability: {prometheus: {mode: off}}\n"
    (home / "t.yaml").write_text(text)
    return {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PDCLUSTER_TOPOLOGY": str(home / "t.yaml"),
        "XDG_STATE_HOME": str(home / "state"),
        "XDG_RUNTIME_DIR": str(home),
        MARK: cluster,
    }


@pytest.fixture
def serve(environment: dict[str, str]) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([ROOT / "scripts/serve"], env=environment, start_new_session=True)
    yield process
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        process.wait(BOUND_S)


def carry(mark: str) -> list[str]:
    """Command lines of processes that have inherited the mark."""
    found = []
    for folder in Path("/proc").iterdir():
        if folder.name.isdigit() and int(folder.name) != os.getpid():
            try:
                if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes().split(b"\0"):
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
            except OSError:
                continue
    return found


def answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
            return answer.status == 200
    except OSError:
        return False


def test_asked_to_end_it_brings_the_cluster_down_and_leaves_nothing(serve, environment, port):
    deadline_s = time.monotonic() + BOUND_S
    while not answers(port):
        assert serve.poll() is None
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(BOUND_S) == 0
    assert carry(environment[MARK]) == []
    with socket.create_server(("127.0.0.1", port)):
        pass


def test_asked_to_end_while_it_comes_up_it_leaves_nothing(serve, environment):
    deadline_s = time.monotonic() + BOUND_S
    while not any("cluster.workers.supervisor" in line for line in carry(environment[MARK])):
        assert time.monotonic() < deadline_s
        time.sleep(0.05)
    serve.send_signal(signal.SIGTERM)
    assert serve.wait(BOUND_S) == 0
    assert carry(environment[MARK]) == []


def test_a_cluster_that_does_not_come_up_ends_it_with_the_reasons_exit_code(environment, port):
    with socket.create_server(("127.0.0.1", port)):
        done = subprocess.run(
            [ROOT / "scripts/serve"], env=environment, capture_output=True, timeout=BOUND_S
        )
    assert done.returncode == 2
    assert str(port).encode() in done.stderr
    assert carry(environment[MARK]) == []
