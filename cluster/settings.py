"""Where pdcluster keeps things on a machine, and what it calls its Ray actors.

State (keys, locks, logs) outlives a reboot: $XDG_STATE_HOME/pdcluster/CLUSTER.
Cache (models) can be rebuilt: $XDG_CACHE_HOME/pdcluster.
Runtime (sockets, Ray's session) ends with the cluster: $XDG_RUNTIME_DIR or /tmp; kept short, a
Unix socket path has at most 107 bytes.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path

from cluster.identity import WorkerId

# Marks every process that belongs to a cluster, in its environment: `down` and the supervisor
# find what is theirs by this and by nothing weaker (never by process name).
OWNER_ENV = "PDCLUSTER_OWNER"


def _home(variable: str, fallback: str) -> Path:
    return Path(os.environ.get(variable) or Path.home() / fallback) / "pdcluster"


def cache_dir() -> Path:
    """Models and other things that can be fetched or made again."""
    return _home("XDG_CACHE_HOME", ".cache")


@dataclass(frozen=True, slots=True)
class ClusterPaths:
    """Files and folders of one cluster on this machine. Nothing is created by looking."""

    cluster: str

    @property
    def state(self) -> Path:
        return _home("XDG_STATE_HOME", ".local/state") / self.cluster

    @property
    def api_key(self) -> Path:
        return self.state / "api-key"

    @property
    def engine_key(self) -> Path:
        return self.state / "engine-key"

    @property
    def lock(self) -> Path:
        """Held (flock) by the one `up` or `down` that is at work."""
        return self.state / "lock"

    @property
    def running(self) -> Path:
        """JSON: how to reach and end the running cluster. Absent: not up."""
        return self.state / "running.json"

    @property
    def logs(self) -> Path:
        return self.state / "logs"

    def worker_log(self, worker: WorkerId, node_rank: int = 0) -> Path:
        rank = f".rank{node_rank}" if node_rank else ""
        return self.logs / f"{worker.pool}-{worker.index}.{worker.generation}{rank}.log"

    @property
    def runtime(self) -> Path:
        return (
            Path(os.environ.get("XDG_RUNTIME_DIR") or tempfile.gettempdir())
            / f"pdcluster-{os.getuid()}"
            / self.cluster
        )


def ports_dir() -> Path:
    """Lock files of the per-node port allocator: shared by all clusters of this user here."""
    return Path(tempfile.gettempdir()) / f"pdcluster-{os.getuid()}" / "ports"


def ray_namespace(cluster: str) -> str:
    return f"pdcluster-{cluster}"


CONTROLLER_ACTOR = "controller"


def worker_actor(worker: WorkerId, node_rank: int = 0) -> str:
    """The Ray name of the actor that owns one node of one replica generation."""
    return f"worker:{worker}:{node_rank}"


def gateway_actor(index: int) -> str:
    return f"gateway:{index}"
