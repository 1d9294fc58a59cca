"""Which cluster runs on this machine: the state file, the lock, and whether it is still true.

running.json  written before anything is started, again when all is ready, removed by `down`.
              One that a killed `up` leaves behind lets the next `up` or `down` clean up.
lock          flock, held by the one `up` or `down` at work; its text is that process's pid
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from cluster import settings
from cluster.errors import ClusterError
from cluster.launcher.supervised import Supervised
from cluster.settings import ClusterPaths
from cluster.topology.schema import Topology


class Busy(ClusterError):
    """Another `up` or `down` is at work on this cluster."""


class NotRunning(ClusterError):
    """No such cluster runs here."""


class OwnRay(Supervised):
    """The Ray head that `up` started, and where it keeps things."""

    folder: str
    token_file: str


class OwnPrometheus(Supervised):
    """The Prometheus that `up` started, and where it is asked."""

    url: str


class Running(BaseModel):
    """How to reach and end a cluster."""

    model_config = ConfigDict(frozen=True)

    cluster: str
    phase: Literal["starting", "up"]
    topology_file: str
    topology_digest: str
    started_at_s: float
    model: str
    endpoint: str
    key_file: str | None  # None: the endpoint asks for no key, or it is in `key_env`
    key_env: str | None = None
    control_url: str = ""
    token_file: str | None = None
    token_env: str | None = None
    ingress: Literal["serve", "direct"]
    ray_address: str = ""
    own_ray: OwnRay | None = None
    own_prometheus: OwnPrometheus | None = None
    prometheus_url: str = ""  # of ours or of the external one; "": nobody scrapes

    def is_alive(self) -> bool:
        """Whether the Ray we started is the one that still runs. A Ray of others is believed."""
        if self.own_ray is None:
            return bool(self.ray_address)
        return self.own_ray.is_alive()


def digest(topology: Topology) -> str:
    """Equal for two readings of files that say the same, whatever their comments and order."""
    said = {"ray": topology.ray, "serving": topology.serving.model_dump(mode="json")}
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read(paths: ClusterPaths) -> Running | None:
    """What the state file says; None if there is none, or none that can be understood."""
    try:
        return Running.model_validate_json(paths.running.read_bytes())
    except (OSError, ValidationError):
        return None


def write(paths: ClusterPaths, running: Running) -> None:
    """Replace the state file at once: a reader sees the old or the new one, never half of one."""
    paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=paths.state, prefix="running.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(running.model_dump_json(indent=2))
        os.replace(name, paths.running)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def all_running() -> list[Running]:
    """Every cluster that has a state file of this user here, by name."""
    folder = ClusterPaths("any").state.parent
    found = [read(ClusterPaths(path.parent.name)) for path in folder.glob("*/running.json")]
    return sorted((r for r in found if r is not None), key=lambda running: running.cluster)


def choose(name: str | None) -> Running:
    """The cluster called `name`, or the only one there is. Raises: NotRunning, ClusterError."""
    if name is not None:
        running = read(ClusterPaths(name))
        if running is None:
            others = ", ".join(running.cluster for running in all_running())
            raise NotRunning(
                f"cluster {name} does not run here"
                + (f"; running: {others}" if others else "; start it: pdcluster up FILE")
            )
        return running
    found = all_running()
    if not found:
        raise NotRunning("no cluster runs here; start one: pdcluster up FILE")
    if len(found) > 1:
        names = ", ".join(running.cluster for running in found)
        raise ClusterError(f"several clusters run here ({names}); say which with --cluster NAME")
    return found[0]


@contextlib.contextmanager
def lock(paths: ClusterPaths) -> Iterator[None]:
    """Hold the cluster's lock. Raises: Busy, naming the process that holds it."""
    paths.state.mkdir(mode=0o700, parents=True, exist_ok=True)
    with open(paths.lock, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "unknown"
            raise Busy(
                f"another `pdcluster up` or `down` of cluster {paths.cluster} is at work "
                f"(pid {holder}); wait for it, or end it with Ctrl-C"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        try:
            yield
        finally:
            file.truncate(0)


def short_runtime(paths: ClusterPaths) -> Path:
    """A folder for Ray's session: its sockets' names take 64 of the 107 bytes of a Unix socket
    path, so it lies near the root, under a name made of the state folder's."""
    name = hashlib.sha256(str(paths.state).encode()).hexdigest()[:8]
    return settings.ports_dir().parent / f"ray-{name}"
