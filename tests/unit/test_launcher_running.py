"""State file, lock, choice of a cluster, keys and what a killed cluster left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest
from running_state import running_state

from cluster.control.state import DesiredState
from cluster.errors import ClusterError, InvalidInput
from cluster.gateway.auth import hash_key
from cluster.launcher import keys, local_ray, remains, running
from cluster.launcher.running import Busy, NotRunning, OwnRay
from cluster.settings import OWNER_ENV, ClusterPaths
from cluster.topology.schema import AuthSpec, ControlSpec, Topology
from cluster.workers import tree


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path / "run"))
    return tmp_path


def own_ray(pid, start_ticks):
    return OwnRay(
        supervisor_pid=pid, supervisor_start_ticks=start_ticks, folder="/f", token_file="/t"
    )


def topology(**ray):
    serving = {
        "model": {"id": "simulated"},
        "pools": [{"name": "p", "role": "mixed"}],
        "islands": [{"name": "i", "pools": ["p"]}],
    }
    base = {"provider": {"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}}
    return Topology.model_validate(
        {"path": "/t.yaml", "cluster_name": "c", "ray": base | ray, "serving": serving}
    )


def test_the_state_file_is_read_back_and_replaced_whole():
    paths = ClusterPaths("c")
    assert running.read(paths) is None
    running.write(paths, running_state(phase="starting"))
    running.write(paths, running_state())
    assert running.read(paths) == running_state()
    assert [p.name for p in paths.state.iterdir()] == ["running.json"]
    assert paths.state.stat().st_mode & 0o077 == 0


def test_a_broken_state_file_counts_as_none():
    paths = ClusterPaths("c")
    running.write(paths, running_state())
    paths.running.write_text('{"cluster": "c"')
    assert running.read(paths) is None


def test_the_only_running_cluster_is_the_default():
    with pytest.raises(NotRunning, match="pdcluster up FILE"):
        running.choose(None)
    running.write(ClusterPaths("a"), running_state("a"))
    assert running.choose(None).cluster == "a"
    running.write(ClusterPaths("b"), running_state("b"))
    with pytest.raises(ClusterError, match=r"several clusters run here \(a, b\).*--cluster NAME"):
        running.choose(None)
    assert running.choose("b").cluster == "b"
    with pytest.raises(NotRunning, match="cluster x does not run here; running: a, b"):
        running.choose("x")


def test_a_supervisor_that_was_replaced_by_another_process_is_not_ours():
    me = tree.read_process(os.getpid())
    assert running_state(own_ray=own_ray(me.pid, me.start_ticks)).is_alive()
    assert not running_state(own_ray=own_ray(me.pid, me.start_ticks - 1)).is_alive()
    assert not running_state().is_alive()


def test_the_lock_names_the_process_that_holds_it():
    paths = ClusterPaths("c")
    with running.lock(paths), pytest.raises(Busy, match=rf"pid {os.getpid()}"), running.lock(paths):
        pass
    with running.lock(paths):
        pass


def test_a_digest_is_of_what_a_file_says_and_not_of_how():
    assert running.digest(topology()) == running.digest(topology())
    assert running.digest(topology(max_workers=0)) != running.digest(topology())


def test_a_key_is_made_once_readable_by_its_user_only_and_kept():
    paths = ClusterPaths("c")
    warned = []
    first = keys.endpoint_hashes(AuthSpec(), paths, warned.append)
    key = paths.api_key.read_text().strip()
    assert first == (hash_key(key),)
    assert paths.api_key.stat().st_mode & 0o777 == 0o600
    assert keys.endpoint_hashes(AuthSpec(), paths, warned.append) == first
    assert warned == []
    assert keys.first_key(str(paths.api_key), None) == key


def test_a_key_file_that_others_can_read_is_warned_of(home):
    file = home / "keys"
    file.write_text("# mine\nk1\nk2\n")
    file.chmod(0o644)
    warned = []
    found = keys.endpoint_hashes(AuthSpec(keys_file=file), ClusterPaths("c"), warned.append)
    assert found == (hash_key("k1"), hash_key("k2"))
    assert "chmod 600" in warned[0]
    assert keys.first_key(str(file), None) == "k1"


def test_a_control_token_is_made_once_and_kept():
    paths = ClusterPaths("c")
    token = keys.control_token(ControlSpec(), paths, print)
    file = keys.token_file(ControlSpec(), paths)
    assert file.read_text().strip() == token == keys.control_token(ControlSpec(), paths, print)
    assert len(token) > 40
    assert file.stat().st_mode & 0o777 == 0o600


def test_a_stated_control_token_is_read_and_never_made(home, monkeypatch):
    paths, warned = ClusterPaths("c"), []
    stated = ControlSpec(token_file=home / "token")
    with pytest.raises(InvalidInput, match="cannot be read"):
        keys.control_token(stated, paths, warned.append)
    (home / "token").write_text("mine\n")
    (home / "token").chmod(0o640)
    assert keys.control_token(stated, paths, warned.append) == "mine"
    assert "chmod 600" in warned[0]
    named = ControlSpec(token_env="RACK_TOKEN")
    with pytest.raises(InvalidInput, match="RACK_TOKEN"):
        keys.control_token(named, paths, warned.append)
    monkeypatch.setenv("RACK_TOKEN", "named")
    assert keys.control_token(named, paths, warned.append) == "named"
    assert keys.token_file(named, paths) is None


def test_without_auth_no_key_is_made():
    paths = ClusterPaths("c")
    assert keys.endpoint_hashes(None, paths, print) is None
    assert not paths.api_key.exists()
    assert keys.first_key(None, None) is None


def test_an_empty_key_file_is_refused(home):
    (home / "keys").write_text("")
    with pytest.raises(InvalidInput, match="holds no API key"):
        keys.first_key(str(home / "keys"), None)


def test_keys_can_come_from_the_environment(monkeypatch):
    monkeypatch.setenv("MY_KEYS", "k1,k2")
    auth = AuthSpec(keys_env="MY_KEYS")
    assert len(keys.endpoint_hashes(auth, ClusterPaths("c"), print)) == 2
    assert keys.first_key(None, "MY_KEYS") == "k1"


@pytest.mark.parametrize(
    ("provider", "is_local"),
    [
        ({"type": "local", "head_ip": "127.0.0.1", "worker_ips": []}, True),
        ({"type": "local", "head_ip": "localhost"}, True),
        ({"type": "local", "head_ip": "10.0.0.5"}, False),
        ({"type": "local", "head_ip": "127.0.0.1", "worker_ips": ["10.0.0.6"]}, False),
        ({"type": "aws"}, False),
    ],
)
def test_only_a_loopback_head_without_workers_is_this_machine_alone(provider, is_local):
    assert local_ray.is_local(topology(provider=provider)) is is_local


def test_the_secret_of_a_cluster_is_not_in_its_desired_state():
    assert not {name for name in DesiredState.model_fields if "key" in name}


class Sleeper:
    """A process that carries an owner mark."""

    def __init__(self, mark, state_home):
        self.process = subprocess.Popen(
            [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(60)"],
            env=os.environ | {OWNER_ENV: mark, "XDG_STATE_HOME": str(state_home)},
            stdout=subprocess.PIPE,
        )
        self.process.stdout.readline()

    def close(self):
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


def test_a_sweep_ends_what_is_marked_and_nothing_else(home):
    paths = ClusterPaths("c")
    mine = Sleeper("c/decode/0#1:0", home / "state")
    others = [Sleeper("cc/decode/0#1:0", home / "state"), Sleeper("c/ray", home / "elsewhere")]
    folder = paths.runtime / "w" / "abc"
    folder.mkdir(parents=True)
    try:
        assert [p.pid for p in remains.processes(paths)] == [mine.process.pid]
        assert remains.sweep(paths) == []
        assert mine.process.wait(5) == -9
        assert all(other.process.poll() is None for other in others)
        assert not paths.runtime.exists()
    finally:
        for sleeper in (mine, *others):
            sleeper.close()


def test_a_sweep_ends_what_of_rays_hides_its_mark_and_spares_who_reads_its_log(home):
    paths = ClusterPaths("c")
    folder = running.short_runtime(paths)
    folder.mkdir(parents=True)
    with (folder / "agent.log").open("w") as log:
        agent, reader = (
            subprocess.Popen([title, "60"], executable="/bin/sleep", env={}, stdout=log)
            for title in ("ray::DashboardAgent", "less")
        )
    try:
        # Popen returns when the program has been replaced: both have their titles.
        assert remains.sweep(paths, patience_s=60.0) == []
        assert agent.wait(5) == -9
        assert reader.poll() is None
        assert not folder.exists()
    finally:
        for process in (agent, reader):
            process.kill()
            process.wait()


def test_a_sweep_waits_for_those_that_end_by_themselves(home):
    paths = ClusterPaths("c")
    script = "import time; print('up', flush=True); time.sleep(0.5)"
    leaving = subprocess.Popen(
        [sys.executable, "-c", script],
        env=os.environ | {OWNER_ENV: "c/x"},
        stdout=subprocess.PIPE,
    )
    leaving.stdout.readline()
    remains.sweep(paths, patience_s=10.0)
    assert leaving.wait(5) == 0
    leaving.stdout.close()


def test_a_sweep_removes_the_segments_that_a_killed_supervisor_had_noted():
    paths = ClusterPaths("c")
    name = f"pdcluster-test-{os.getpid()}-{time.monotonic_ns()}"
    segment = os.path.join("/dev/shm", name)
    with open(segment, "w") as file:
        file.write("x")
    folder = paths.runtime / "w" / "abc"
    folder.mkdir(parents=True)
    (folder / "segments.json").write_text(json.dumps({name: os.stat(segment).st_ino}))
    remains.sweep(paths)
    assert not os.path.exists(segment)
