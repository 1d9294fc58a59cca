"""On a host, with real processes: what `cluster.nodes.end` ends and what it lets alone, and the
operators' lock, whose far end is a real shell behind a stand-in for ssh."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.nodes import marks
from cluster.nodes.end import end_cluster
from cluster.nodes.operator_lock import OperatorBusy, OperatorLock
from cluster.nodes.ssh import Host, Unreachable
from cluster.settings import OWNER_ENV, ClusterPaths
from cluster.workers import tree

pytestmark = pytest.mark.integration
HEAD = Host("10.0.0.1", "someone")
ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def own_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))


@pytest.fixture
def cluster() -> str:
    return f"end{os.getpid()}"


@contextlib.contextmanager
def running(mark: str, *argv: str, stdout: int | None = None) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        argv or ("sleep", "300"), env={**os.environ, OWNER_ENV: mark}, stdout=stdout
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_clusters_processes_end_and_nobody_elses(cluster: str) -> None:
    with (
        running(marks.ray_owner(cluster)) as ray,
        running(f"{cluster}/decode/0#1") as engine,
        running(f"{cluster}x/decode/0#1") as namesake,
        running(f"{cluster}x@hosts/ray") as other_ray,
    ):
        done = end_cluster(cluster)
        assert (done.ended, done.left) == (2, ())
        assert ray.wait(30) == engine.wait(30) == -signal.SIGKILL
        assert namesake.poll() is None
        assert other_ray.poll() is None
        assert end_cluster(cluster).ended == 0


def test_what_hides_its_mark_ends_by_descent(cluster: str) -> None:
    # `env -i` gives the child no environment at all, as a process title gives Ray's agents.
    parent = ["sh", "-c", "env -i sleep 300 & echo $!; wait"]
    with running(marks.ray_owner(cluster), *parent, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        child = tree.read_process(int(process.stdout.readline()))
        assert child is not None
        deadline_s = time.monotonic() + 60
        while child.pid in {found.pid for found in tree.marked(f"{cluster}@hosts/")}:
            assert time.monotonic() < deadline_s  # `env` has long become `sleep`
            time.sleep(0.02)
        assert not end_cluster(cluster).left
        now = tree.read_process(child.pid)
        assert now is None or now.start_ticks != child.start_ticks or now.state == "Z"


def test_an_orphan_of_rays_ends_by_the_session_it_logs_to(cluster: str, tmp_path: Path) -> None:
    ours, theirs = tmp_path / "session_1", tmp_path / "session_2"
    notes = ClusterPaths(cluster).state / "ray-sessions"
    notes.parent.mkdir(parents=True)
    notes.write_text(f"{ours}\n")
    agents = []
    for session in (ours, theirs):
        session.mkdir()
        with (session / "agent.log").open("w") as log:
            agents.append(
                subprocess.Popen(
                    ["ray::DashboardAgent", "300"], executable="/bin/sleep", env={}, stdout=log
                )
            )
    try:
        # Both have begun to be what they are.
        while any(b"ray::" not in _cmdline(agent.pid) for agent in agents):
            time.sleep(0.01)
        assert end_cluster(cluster).ended == 1
        assert agents[0].wait(30) == -signal.SIGKILL
        assert agents[1].poll() is None
        assert not notes.exists()
    finally:
        for agent in agents:
            agent.kill()
            agent.wait()


def test_a_supervisor_gets_its_time_to_end_its_engine_in_order(
    cluster: str, tmp_path: Path
) -> None:
    said = tmp_path / "said"
    # Ends by itself a second after its owner, and says so; killed at once it could not.
    script = f"while kill -0 $1 2>/dev/null; do sleep 0.1; done; sleep 0.5; echo in order >{said}"
    with (
        running(marks.ray_owner(cluster)) as owner,
        running(f"{cluster}/p/0#1", "sh", "-c", script, "sh", str(owner.pid)),
    ):
        # As a zombie it would look alive.
        threading.Thread(target=owner.wait, daemon=True).start()
        assert not end_cluster(cluster).left
    assert said.read_text() == "in order\n"


def test_the_command_says_how_many_and_spares_its_own_family(cluster: str) -> None:
    """As in a start command: `ray up` has marked the very shell that runs it."""
    command = f"{sys.executable} -m cluster.nodes.end --cluster {cluster}; echo still here"
    done = subprocess.run(
        ["sh", "-c", command],
        env={**os.environ, OWNER_ENV: marks.ray_owner(cluster)},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.stdout.splitlines() == ["0 processes ended", "still here"]


# the lock


@pytest.fixture
def fake_ssh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An `ssh` that runs the command here, as sshd would: by the user's shell."""
    folder = tmp_path / "bin"
    folder.mkdir()
    script = folder / "ssh"
    script.write_text('#!/bin/sh\nfor last; do :; done\nexec sh -c "$last"\n')
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return script


def test_the_second_operator_is_told_who_is_at_work(fake_ssh: Path) -> None:
    first, second = OperatorLock(HEAD, "r"), OperatorLock(HEAD, "r")
    first.acquire()
    first.acquire()
    with pytest.raises(OperatorBusy, match=rf"at work on cluster r: .*, pid {os.getpid()}, since"):
        second.acquire()
    first.release()
    first.release()
    second.acquire()
    second.release()


def test_clusters_do_not_wait_for_each_other(fake_ssh: Path) -> None:
    one, other = OperatorLock(HEAD, "one"), OperatorLock(HEAD, "other")
    one.acquire()
    other.acquire()
    one.release()
    other.release()


def test_an_operator_that_is_killed_holds_nobody_up(fake_ssh: Path) -> None:
    code = (
        "import time; from cluster.nodes.operator_lock import OperatorLock; "
        "from cluster.nodes.ssh import Host; OperatorLock(Host('10.0.0.1', 'x'), 'r').acquire(); "
        "print('held', flush=True); time.sleep(300)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, cwd=ROOT)
    assert holder.stdout is not None
    assert holder.stdout.readline() == b"held\n"
    lock = OperatorLock(HEAD, "r")
    with pytest.raises(OperatorBusy):
        lock.acquire()
    holder.kill()
    holder.wait()
    deadline_s = time.monotonic() + 15
    while True:
        try:
            lock.acquire()
            break
        except OperatorBusy:
            assert time.monotonic() < deadline_s
            time.sleep(0.05)
    lock.release()


def test_a_head_that_does_not_answer_is_named_with_sshs_words(fake_ssh: Path) -> None:
    fake_ssh.write_text("#!/bin/sh\necho 'ssh: connect to host: No route to host' >&2\nexit 255\n")
    with pytest.raises(Unreachable, match=r"10\.0\.0\.1 does not answer: .*No route to host"):
        OperatorLock(HEAD, "r").acquire()


def _cmdline(pid: int) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()
