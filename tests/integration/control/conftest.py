"""A cluster of simulated engines through the real CLI, with its own state, runtime and cache.

`cluster` is shared by all tests of this folder. Whoever ends it need not start it again: files run
in any order, and the next test that asks for it starts it.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from chromium import Chromium
from ports import free_port
from processes import cmdline, environ

from cluster.cli.main import run
from cluster.launcher.running import short_runtime
from cluster.settings import OWNER_ENV, ClusterPaths

ROOT = Path(__file__).parents[3]
Edit = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class Home:
    """Private XDG folders, and the CLI run in them."""

    folder: Path
    extra_env: dict[str, str] = field(default_factory=dict)

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PDCLUSTER_"))}
        return kept | {
            "XDG_STATE_HOME": str(self.folder / "state"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
            "XDG_CACHE_HOME": str(self.folder / "cache"),
            **self.extra_env,
        }

    def state(self, cluster: str) -> Path:
        return self.folder / "state/pdcluster" / cluster

    def start(self, *args: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *args],
            cwd=ROOT,
            env=self.env,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Its own process group, as a terminal gives one to each command.
            start_new_session=True,
        )

    def run(self, *args: str, exit_code: int = 0, within_s: float = 200) -> Done:
        process = self.start(*args)
        try:
            stdout, stderr = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            process.kill()
            raise
        assert process.returncode == exit_code, f"{args}\n{stdout}\n{stderr}"
        return Done(stdout, stderr)

    def json(self, *args: str) -> Any:
        return json.loads(self.run(*args, "--json").stdout)

    def topology(self, name: str, edit: Edit | None = None) -> Path:
        """The shipped file under another name and on a free port, edited."""
        parsed = yaml.safe_load((ROOT / "topologies/local-simulated.yaml").read_text())
        parsed["cluster_name"] = name
        parsed["metadata"]["serving"]["gateway"]["port"] = free_port()
        parsed["metadata"]["serving"]["control"] = {"port": free_port()}
        # Not one per cluster of these tests, and never two at one port.
        parsed["metadata"]["serving"]["observability"] = {"prometheus": {"mode": "off"}}
        if edit is not None:
            edit(parsed["metadata"]["serving"])
        path = self.folder / f"{name}.yaml"
        path.write_text(yaml.safe_dump(parsed))
        return path

    def bring_up(self, name: str, edit: Edit) -> Cluster:
        """A cluster of the test's own; whoever asks for it ends it."""
        topology = self.topology(name, edit)
        return Cluster(self, name, topology, self.run("up", str(topology)))

    def processes(self, cluster: str) -> list[psutil.Process]:
        """Everything that carries the owner mark of `cluster` and lives in this home."""
        found = []
        for process in psutil.process_iter():
            told = environ(process)
            is_ours = told.get("XDG_STATE_HOME") == str(self.folder / "state")
            if is_ours and told.get(OWNER_ENV, "").startswith(f"{cluster}/"):
                found.append(process)
        # One that ended while it was looked at has no command line any more.
        return [process for process in found if cmdline(process)]

    def actor(self, cluster: str, kind: str) -> list[psutil.Process]:
        """Ray actors' processes by their class."""
        return [p for p in self.processes(cluster) if f"ray::{kind}" in cmdline(p)]

    def in_ray_folder(self, cluster: str) -> list[tuple[int, list[str]]]:
        """Processes whose open files, working folder or command line lie in there, marked or not:
        pid, and command line."""
        folder = str(self.ray_folder(cluster))
        found = []
        for process in psutil.process_iter():
            links = Path(f"/proc/{process.pid}")
            with contextlib.suppress(psutil.Error, OSError):
                argv = process.cmdline()
                places = [os.readlink(link) for link in (links / "cwd", *(links / "fd").iterdir())]
                if any(folder in place for place in (*argv, *places)):
                    found.append((process.pid, argv))
        return found

    def leftovers(self, cluster: str) -> list[str]:
        """What `down` should have taken away: processes, ports, folders, the state file."""
        left = [f"process {p.pid} {cmdline(p)}" for p in self.processes(cluster)]
        left += [f"process {pid} {argv[:3]}" for pid, argv in self.in_ray_folder(cluster)]
        if (self.state(cluster) / "running.json").exists():
            left.append("running.json")
        runtime = self.folder / "run" / f"pdcluster-{os.getuid()}" / cluster
        left += [str(p) for p in (runtime, *runtime.rglob("*")) if p.exists()]
        if self.ray_folder(cluster).exists():
            left.append(str(self.ray_folder(cluster)))
        return left

    def ray_folder(self, cluster: str) -> Path:
        """Where the cluster's own Ray head keeps its session."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("XDG_STATE_HOME", self.env["XDG_STATE_HOME"])
            return short_runtime(ClusterPaths(cluster))


@dataclass(frozen=True)
class Done:
    stdout: str
    stderr: str

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


@dataclass(frozen=True)
class Cluster:
    home: Home
    name: str
    topology: Path
    up: Done

    def open_page(self, browser: Chromium) -> None:
        """The page on the control port, with the token entered."""
        state = self.home.state(self.name)
        browser.open(json.loads((state / "running.json").read_text())["control_url"] + "/")
        browser.wait_for("document.activeElement.id === 'token'")
        browser.type((state / "control-token").read_text().strip())
        browser.press("Enter")

    def status(self) -> dict[str, Any]:
        """What `status --json` prints, run in this process: tests look often, and a process for
        each look takes 0.7 s of CPU."""
        said = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            for name in os.environ.keys() - self.home.env.keys():
                patch.delenv(name)
            for name, value in self.home.env.items():
                patch.setenv(name, value)
            assert run(["status", "--cluster", self.name, "--json"]) == 0
        found: dict[str, Any] = json.loads(said.getvalue())
        return found

    def worker(self, name: str) -> dict[str, Any]:
        for worker in self.status()["workers"]:
            if worker["name"] == name:
                found: dict[str, Any] = worker
                return found
        raise AssertionError(f"no worker {name}")

    def wait_for(self, is_so: Callable[[dict[str, Any]], bool], within_s: float = 120) -> Any:
        deadline_s = time.monotonic() + within_s
        while time.monotonic() < deadline_s:
            status = self.status()
            if is_so(status):
                return status
            time.sleep(0.3)
        raise AssertionError(f"not within {within_s} s: {json.dumps(status, indent=1)}")

    def ask(self, text: str = "hello") -> dict[str, Any]:
        found: dict[str, Any] = self.home.json(
            "chat", text, "--max-tokens", "8", "--cluster", self.name
        )
        return found


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Home]:
    home = Home(tmp_path_factory.mktemp("pd"))
    (home.folder / "run").mkdir(mode=0o700)
    yield home
    # Whatever failed: nothing of these tests outlives them.
    for state in (home.folder / "state/pdcluster").glob("*/running.json"):
        with contextlib.suppress(AssertionError, subprocess.TimeoutExpired):
            home.run("down", "--cluster", state.parent.name)
    for process in psutil.process_iter():
        told = environ(process)
        if told.get("XDG_STATE_HOME") == str(home.folder / "state") and OWNER_ENV in told:
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)


@pytest.fixture(scope="session")
def shared() -> dict[str, Cluster]:
    """The cluster that runs, by its name."""
    return {}


@pytest.fixture
def cluster(home: Home, shared: dict[str, Cluster]) -> Cluster:
    name = "it-shared"
    if name in shared and (home.state(name) / "running.json").exists():
        return shared[name]

    def edit(serving: dict[str, Any]) -> None:
        # On a machine of two cores: room for a third and a fourth worker.
        for pool in serving["pools"]:
            pool["placement"] = {"resources": {"CPU": 0.5}}

    shared[name] = home.bring_up(name, edit)
    return shared[name]
