"""The supervisor's promise, with real processes: whoever dies, nothing is left behind."""

import json
import mmap
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.workers import tree

pytestmark = pytest.mark.integration

SUPERVISOR = [sys.executable, "-m", "cluster.workers.supervisor"]


class Supervised:
    """A supervised command whose owner is this test process."""

    def __init__(self, command, tmp_path, env, grace_s=0.5, more=()):
        self.log = tmp_path / "engine.log"
        self.runtime_dir = tmp_path / "runtime"
        self.runtime_dir.mkdir()
        self.process = subprocess.Popen(
            [
                *SUPERVISOR,
                f"--owner-pid={os.getpid()}",
                f"--log={self.log}",
                f"--grace-s={grace_s}",
                f"--runtime-dir={self.runtime_dir}",
                *more,
                "--",
                *command,
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        started = self.next_event()
        assert started["event"] == "started"
        self.pid, self.supervisor_pid = started["pid"], started["supervisor_pid"]

    def next_event(self):
        return json.loads(self.process.stdout.readline())

    def stop(self, grace_s):
        self.process.stdin.write(f"stop {grace_s}\n".encode())
        self.process.stdin.flush()

    def text(self):
        return self.log.read_text() if self.log.exists() else ""


@pytest.fixture
def supervise(tmp_path, environment):
    def start(command, **options):
        return Supervised(command, tmp_path, environment, **options)

    return start


@pytest.fixture
def standing(supervise, nasty, remains, eventually):
    """The nasty tree, once all of it stands."""
    supervised = supervise(nasty)
    eventually(lambda: "up " in supervised.text())
    remains.port = int(supervised.text().split()[1])
    assert remains.listens
    assert len(remains.processes) >= 4
    assert len(remains.segments) == 3
    # The owner cleans up by this list, should the supervisor be killed.
    record = supervised.runtime_dir / "segments.json"
    eventually(lambda: record.exists() and len(json.loads(record.read_text())) == 3)
    return supervised


def test_a_stop_ends_a_tree_that_does_all_it_can_to_stay(standing, remains):
    standing.stop(0.2)
    remains.assert_gone()
    assert standing.next_event() == {"event": "exited", "code": 137}
    assert standing.next_event() == {"event": "ended", "code": 137, "lines_dropped": 0}
    assert not standing.runtime_dir.exists()


def test_sigterm_to_the_supervisor_ends_the_tree(standing, remains):
    os.kill(standing.supervisor_pid, signal.SIGTERM)
    remains.assert_gone()


def test_an_owner_that_closes_its_end_ends_the_tree(standing, remains):
    standing.process.stdin.close()
    remains.assert_gone()


def test_a_killed_command_takes_the_rest_of_its_tree_along(standing, remains):
    os.kill(standing.pid, signal.SIGKILL)
    remains.assert_gone()
    assert standing.next_event() == {"event": "exited", "code": 137}


def test_a_killed_supervisor_takes_the_command_along_and_the_mark_finds_the_rest(
    standing, remains, eventually
):
    recorded = json.loads((standing.runtime_dir / "segments.json").read_text())
    os.kill(standing.supervisor_pid, signal.SIGKILL)
    eventually(lambda: tree.read_process(standing.pid) is None, 2.0)
    assert remains.processes, "the tree was meant to leave somebody behind"
    assert tree.end_marked(remains.owner, bound_s=5.0) == []
    tree.remove_segments(recorded)
    remains.assert_gone()


def test_a_command_that_ends_by_itself_has_its_code_reported_and_its_tree_ended(
    supervise, nasty, remains
):
    supervised = supervise([*nasty, "dies"])
    assert supervised.next_event() == {"event": "exited", "code": 3}
    assert "last words" in supervised.text()
    assert supervised.next_event()["event"] == "ended"
    remains.assert_gone()


@pytest.mark.parametrize("killed", ["owner", "owner and stdin keeper"])
def test_a_killed_owner_takes_everything_along(
    tmp_path, environment, nasty, remains, killed, eventually
):
    log = tmp_path / "engine.log"
    # With a forgotten child that keeps the pipe open, only the pidfd can tell.
    keeper = (
        "os.set_inheritable(p.stdin.fileno(), True)\n"
        "subprocess.Popen(['sleep', '30'], close_fds=False)\n"
    )
    code = (
        "import os, subprocess, sys, time\n"
        f"p = subprocess.Popen({SUPERVISOR!r} + [f'--owner-pid={{os.getpid()}}',"
        f" '--log={log}', '--grace-s=0.5', '--', *{nasty!r}], stdin=subprocess.PIPE)\n"
        f"{keeper if 'keeper' in killed else ''}\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen(
        [sys.executable, "-c", code], env=environment, stdout=subprocess.DEVNULL
    )
    eventually(lambda: log.exists() and "up " in log.read_text())
    remains.port = int(log.read_text().split()[1])
    owner.kill()
    owner.wait()
    sleeper = [
        process
        for process in tree.marked(remains.owner)
        if Path(f"/proc/{process.pid}/comm").read_text().strip() == "sleep"
    ]
    eventually(
        lambda: len(remains.processes) == len(sleeper) and not remains.segments, 5.0, remains
    )
    for process in sleeper:
        tree.send(process, signal.SIGKILL)


def test_a_stopped_process_gets_its_chance_to_end_well(supervise, eventually):
    supervised = supervise(
        [
            sys.executable,
            "-c",
            "import signal, time, sys\n"
            "signal.signal(signal.SIGTERM, lambda *_: (print('bye', flush=True), sys.exit(0)))\n"
            "print('here', flush=True); time.sleep(600)",
        ],
        grace_s=10,
    )
    eventually(lambda: "here" in supervised.text())
    os.kill(supervised.pid, signal.SIGSTOP)
    supervised.stop(10)
    assert supervised.next_event() == {"event": "exited", "code": 0}
    assert "bye" in supervised.text()


def test_a_segment_that_was_there_before_is_never_removed(supervise, remains, eventually):
    # Weights kept in /dev/shm are mapped by every engine that loads them.
    path = Path(f"/dev/shm/{remains.name}-weights")
    path.write_bytes(b"w" * 4096)
    supervised = supervise([sys.executable, "-c", mapping(path)])
    eventually(lambda: "mapped" in supervised.text())
    supervised.stop(0)
    while supervised.next_event()["event"] != "ended":
        pass
    assert path.exists()


def test_a_segment_that_somebody_else_still_maps_is_left_to_them(supervise, remains, eventually):
    path = Path(f"/dev/shm/{remains.name}-shared")
    supervised = supervise(
        [sys.executable, "-c", f"open({str(path)!r}, 'wb').write(b'x' * 4096)\n" + mapping(path)]
    )
    eventually(lambda: "mapped" in supervised.text())
    eventually(lambda: path.name in (supervised.runtime_dir / "segments.json").read_text())
    with path.open("r+b") as file, mmap.mmap(file.fileno(), 4096):
        supervised.stop(0)
        while supervised.next_event()["event"] != "ended":
            pass
        assert path.exists()


SEMAPHORE = """
import multiprocessing, time
held = multiprocessing.get_context("spawn").Lock()
print("made", f"sem.{held._semlock.name[1:]}", flush=True)
time.sleep(600)
"""


def test_a_semaphore_of_an_engine_that_was_killed_is_removed(supervise, eventually):
    # glibc makes it under another name, by which it is in the maps of the process that made it.
    # Python's resource tracker would unlink it: here it is killed with the rest of the tree.
    supervised = supervise([sys.executable, "-c", SEMAPHORE])
    eventually(lambda: "made" in supervised.text())
    path = Path("/dev/shm") / supervised.text().split()[1]
    record = supervised.runtime_dir / "segments.json"
    eventually(lambda: record.exists() and path.name in record.read_text())
    for process in tree.descendants(supervised.supervisor_pid):
        tree.send(process, signal.SIGKILL)
    while supervised.next_event()["event"] != "ended":
        pass
    assert not path.exists()


def test_a_full_disk_costs_log_lines_and_not_the_engine(tmp_path, environment):
    (tmp_path / "engine.log").symlink_to("/dev/full")
    supervised = Supervised(
        [sys.executable, "-c", "for n in range(5000): print('line', n)"], tmp_path, environment
    )
    lost = []
    while (event := supervised.next_event())["event"] == "lost":
        assert event["why"] == "No space left on device"
        lost.append(event["lines"])
    assert lost == sorted(set(lost))
    assert lost[-1] == 5000
    assert event == {"event": "exited", "code": 0}
    assert supervised.next_event()["lines_dropped"] == 5000


def test_a_full_log_is_moved_away_at_a_line_end_and_one_old_one_is_kept(supervise):
    supervised = supervise(
        [sys.executable, "-c", "for n in range(40_000): print(f'{n:09d}')"],
        more=["--log-limit-mib=0.125"],
    )
    while supervised.next_event()["event"] != "ended":
        pass
    old = supervised.log.with_name("engine.log.1")
    lines = old.read_text().splitlines() + supervised.log.read_text().splitlines()
    assert [int(line) for line in lines] == list(range(int(lines[0]), 40_000))
    assert old.stat().st_size <= (1 << 17) + (1 << 16)
    assert sorted(path.name for path in supervised.log.parent.glob("engine*")) == [
        "engine.log",
        "engine.log.1",
    ]


def test_a_command_that_cannot_be_started_ends_with_127_and_the_reason(tmp_path, environment):
    process = subprocess.run(
        [
            *SUPERVISOR,
            "--owner-pid=0",
            f"--log={tmp_path / 'log'}",
            "--grace-s=1",
            "--",
            "/no/such",
        ],
        env=environment,
        check=False,
    )
    assert process.returncode == 127
    assert "/no/such" in (tmp_path / "log").read_text()


def test_without_an_owner_it_lives_on_its_own_and_passes_the_exit_code_on(tmp_path, environment):
    process = subprocess.run(
        [
            *SUPERVISOR,
            "--owner-pid=0",
            f"--log={tmp_path / 'log'}",
            "--grace-s=1",
            "--",
            sys.executable,
            "-c",
            "import os; os.kill(os.getpid(), 11)",
        ],
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
    )
    assert process.returncode == 128 + 11


def test_a_command_that_ends_at_once_has_its_exit_code_reported(tmp_path, environment):
    # A race between its end and its supervisor's start: several tries.
    for number in range(8):
        done = subprocess.run(
            [
                *SUPERVISOR,
                "--owner-pid=0",
                f"--log={tmp_path / str(number)}",
                "--grace-s=0.5",
                "--",
                "/bin/false",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env=environment,
            timeout=30,
        )
        assert done.returncode == 1


def test_an_owner_that_is_not_the_parent_is_refused(tmp_path, environment):
    process = subprocess.run(
        [*SUPERVISOR, "--owner-pid=1", f"--log={tmp_path / 'log'}", "--grace-s=1", "--", "true"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert process.returncode == 1
    assert "is not the parent" in process.stderr


def test_an_idle_supervisor_uses_no_processor_time(supervise):
    supervised = supervise(["sleep", "600"])
    time.sleep(0.5)
    before = cpu_ticks(supervised.supervisor_pid)
    time.sleep(4)
    assert cpu_ticks(supervised.supervisor_pid) == before
    supervised.stop(0)


def test_zombies_of_the_tree_are_reaped_while_it_lives(supervise, eventually):
    orphans = "import os, time\n" + (
        "for _ in range(20):\n"
        "    if os.fork() == 0:\n"
        "        os.fork() or time.sleep(0.2)\n"
        "        os._exit(0)\n"
        "    os.wait()\n"
        "print('forked', flush=True); time.sleep(600)\n"
    )
    supervised = supervise([sys.executable, "-c", orphans])
    eventually(lambda: "forked" in supervised.text())
    eventually(
        lambda: (
            [process.pid for process in tree.descendants(supervised.supervisor_pid)]
            == [supervised.pid]
        )
    )
    supervised.stop(0)


def cpu_ticks(pid):
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def mapping(path):
    return (
        "import mmap, time\n"
        f"file = open({str(path)!r}, 'r+b'); mapped = mmap.mmap(file.fileno(), 4096)\n"
        "print('mapped', flush=True); time.sleep(600)\n"
    )
