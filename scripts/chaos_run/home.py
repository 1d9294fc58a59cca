"""One cluster in folders of its own, through the real CLI; its processes, told apart by kind.

Everything of it carries the owner mark and the state folder in its environment, so that `close`
finds and ends what is its own, whatever failed, and nothing else.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import yaml

from cluster.control.client import Access, ControlClient, ControlError
from cluster.control.state import ClusterStatus
from cluster.settings import OWNER_ENV

ROOT = Path(__file__).parents[2]
_COMMAND_ENDS_WITHIN_S = 60.0
_ACTORS = ("WorkerActor", "ControllerActor", "GatewayReplica")


class CommandFailed(Exception):
    """A command of pdcluster did not end well. The text is what it said."""


@dataclass
class Home:
    """`folder` is the cluster's alone. Models are taken from the user's own cache."""

    folder: Path
    cluster: str
    topology: dict[str, Any]
    _client: ControlClient | None = field(default=None, init=False)
    _commands: set[subprocess.Popen[str]] = field(default_factory=set, init=False)

    def __post_init__(self) -> None:
        (self.folder / "run").mkdir(mode=0o700, parents=True, exist_ok=True)
        self.file.write_text(yaml.safe_dump(self.topology))

    @property
    def file(self) -> Path:
        return self.folder / f"{self.cluster}.yaml"

    @property
    def state(self) -> Path:
        return self.folder / "state/pdcluster" / self.cluster

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    @property
    def serving(self) -> dict[str, Any]:
        found: dict[str, Any] = self.topology["metadata"]["serving"]
        return found

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.serving['gateway']['port']}"

    @property
    def api_key(self) -> str:
        return (self.state / "api-key").read_text().strip()

    @property
    def engine_key(self) -> str:
        return (self.state / "engine-key").read_text().strip()

    @property
    def env(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "PDCLUSTER_"))}
        return kept | {
            "XDG_STATE_HOME": str(self.folder / "state"),
            "XDG_RUNTIME_DIR": str(self.folder / "run"),
        }

    def command(self, *args: str, within_s: float = 180.0) -> str:
        """What `pdcluster ARGS` prints. Raises: CommandFailed."""
        process = subprocess.Popen(
            [sys.executable, "-m", "cluster.cli", *args],
            cwd=ROOT,
            env=self.env,
            text=True,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            # Ctrl-C is for whoever runs us; we end the cluster in order.
            start_new_session=True,
        )
        self._commands.add(process)
        try:
            stdout, stderr = process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired as late:
            process.kill()
            raise CommandFailed(f"pdcluster {' '.join(args)}: no end in {within_s:g} s") from late
        finally:
            self._commands.discard(process)
        if process.returncode != 0:
            said = f"{stdout}\n{stderr}".strip()
            raise CommandFailed(
                f"pdcluster {' '.join(args)}: exit code {process.returncode}\n{said}"
            )
        return stdout

    def interrupt(self) -> None:
        """Ctrl-C to the commands that are at work in other threads; returns once they have ended.
        `up` takes away what it has begun."""
        for process in list(self._commands):
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(_COMMAND_ENDS_WITHIN_S)

    def up(self) -> None:
        """Raises: CommandFailed."""
        self.command("up", str(self.file), within_s=600.0)

    def down(self) -> None:
        """Raises: CommandFailed."""
        self.command("down", "--cluster", self.cluster)

    def status(self, patience_s: float = 0.0) -> ClusterStatus | None:
        """None while the controller does not answer. `patience_s`: try for so long."""
        if self._client is None:
            token = (self.state / "control-token").read_text().strip()
            url = f"http://127.0.0.1:{self.serving['control']['port']}"
            self._client = ControlClient(Access(url, token, patience_s=patience_s))
        try:
            return self._client.status()
        except ControlError:
            return None

    # Processes

    def processes(self) -> list[psutil.Process]:
        """All living processes that are the cluster's and of this home."""
        state_home = self.env["XDG_STATE_HOME"]
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                environ = process.environ()
                is_ours = environ.get("XDG_STATE_HOME") == state_home
                is_marked = environ.get(OWNER_ENV, "").startswith(f"{self.cluster}/")
                if is_ours and is_marked and process.status() != psutil.STATUS_ZOMBIE:
                    found.append(process)
        return found

    def of_kind(self, kind: str) -> list[psutil.Process]:
        """By `kind_of`, oldest first."""
        found = [process for process in self.processes() if kind_of(process) == kind]
        return sorted(found, key=lambda process: process.pid)

    def owner_of(self, worker: str) -> int | None:
        """The pid of the actor that owns an engine; `worker` is POOL/INDEX#GENERATION."""
        for process in self.of_kind("supervisor"):
            with contextlib.suppress(psutil.Error):
                if process.environ().get(OWNER_ENV) != f"{self.cluster}/{worker}:0":
                    continue
                for word in process.cmdline():
                    if word.startswith("--owner-pid="):
                        return int(word.partition("=")[2])
        return None

    def supervisor_of(self, worker: str) -> int | None:
        """The pid of the process between an engine and its actor."""
        for process in self.of_kind("supervisor"):
            with contextlib.suppress(psutil.Error):
                if process.environ().get(OWNER_ENV) == f"{self.cluster}/{worker}:0":
                    return process.pid
        return None

    @staticmethod
    def children_of(pid: int) -> list[int]:
        """The processes that an engine has started."""
        with contextlib.suppress(psutil.Error):
            return [child.pid for child in psutil.Process(pid).children()]
        return []

    def close(self) -> list[str]:
        """End all that is left, remove the folder. Returns what `down` had left behind."""
        left = [f"{p.pid} {' '.join(cmdline(p))[:200]}" for p in self.processes()]
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.send_signal(signal.SIGKILL)
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def kind_of(process: psutil.Process) -> str:
    """What a process of a cluster is, in one word; "" for one that has just ended.

    Ray keeps idle processes for work to come: those are `idle`."""
    words = cmdline(process)
    line = " ".join(words)
    if not words:
        return ""
    if "ray::" in line:
        return next((name for name in _ACTORS if f"ray::{name}" in line), "idle")
    if "cluster.workers.supervisor" in line:
        return "supervisor"
    if "cluster.engines.simulated" in line or "vllm.entrypoints" in line:
        return "engine"
    return Path(words[0]).name if "python" not in words[0] else _module(words)


def _module(words: list[str]) -> str:
    after = words[words.index("-m") + 1 :] if "-m" in words else words[1:]
    scripts: Iterable[str] = (Path(word).stem for word in after if not word.startswith("-"))
    return next(iter(scripts), "python")


def cmdline(process: psutil.Process) -> list[str]:
    with contextlib.suppress(psutil.Error):
        return process.cmdline()
    return []
