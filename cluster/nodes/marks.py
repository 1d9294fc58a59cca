"""Which processes on this host are a cluster's: its Ray, started by `ray up`, and its engines.

Every command that starts something on a bare host runs with PDCLUSTER_OWNER=CLUSTER@hosts/ray in
its environment, and Ray's processes hand it on. Workers' engines carry a mark of their own,
CLUSTER/WORKER. Ray's agents and actors overwrite theirs, so they count as ours by descent, or, as
orphans of a raylet that died, by the session folder they log to: `note_session` keeps those of this
cluster.
What is none of this is somebody else's, and is left alone.
Standard library only. Called by: nodes.start, nodes.end, nodes.head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath

from cluster.settings import ClusterPaths
from cluster.workers import tree

# Digest of the `ray start` that began a node: the same command again changes nothing.
START_ENV = "PDCLUSTER_RAY_START"
_MONITOR = "autoscaler/v2/monitor.py"


def ray_owner(cluster: str) -> str:
    """The mark of Ray's processes of this cluster. Not one of `CLUSTER/...`: `pdcluster up` on the
    head clears those away before it starts, and Ray must stay."""
    return f"{cluster}@hosts/ray"


@dataclass(frozen=True, slots=True)
class RayProcess:
    """One of Ray's processes. `start`: the digest it was started with."""

    process: tree.Process
    argv: tuple[str, ...]
    start: str

    @property
    def name(self) -> str:
        """`raylet`, `gcs_server`, `monitor`, or the program's own name."""
        if any(arg.endswith(_MONITOR) for arg in self.argv):
            return "monitor"
        return PurePath(self.argv[0]).name if self.argv else ""

    def flag(self, name: str) -> str:
        """The value of `--name=value`, dashes and underscores alike; "" if it is not given."""
        wanted = name.replace("-", "_")
        for arg in self.argv:
            key, is_given, value = arg.lstrip("-").partition("=")
            if is_given and key.replace("-", "_") == wanted:
                return value
        return ""


def ray_processes(cluster: str) -> list[RayProcess]:
    """Living processes of the cluster's Ray on this host."""
    return list(_read(ray_owner(cluster)))


def named(processes: list[RayProcess], name: str) -> list[RayProcess]:
    return [process for process in processes if process.name == name]


@dataclass(frozen=True, slots=True)
class Belonging:
    """A cluster's processes by pid: Ray's, and the workers' supervisors with all below them."""

    ray: dict[int, tree.Process]
    workers: dict[int, tree.Process]


def belonging(cluster: str) -> Belonging:
    """Everything of the cluster on this host, zombies not."""
    workers = _with_descendants(tree.marked(f"{cluster}/"))
    ray = _with_descendants(
        [*tree.marked(f"{cluster}@hosts/"), *tree.of_ray_in(_sessions(cluster))]
    )
    return Belonging({pid: ray[pid] for pid in ray if pid not in workers}, workers)


def note_session(cluster: str) -> None:
    """Remember the session folder of the Ray that runs here now."""
    file = _sessions_file(cluster)
    known = _sessions(cluster)
    for raylet in named(ray_processes(cluster), "raylet"):
        session = raylet.flag("session-dir")
        if session and session not in known:
            file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            with file.open("a", encoding="utf-8") as notes:
                notes.write(session + "\n")


def forget_sessions(cluster: str) -> None:
    """When nothing of them is left."""
    _sessions_file(cluster).unlink(missing_ok=True)


def _sessions_file(cluster: str) -> Path:
    return ClusterPaths(cluster).state / "ray-sessions"


def _sessions(cluster: str) -> set[str]:
    try:
        return set(_sessions_file(cluster).read_text(encoding="utf-8").split("\n")) - {""}
    except OSError:
        return set()


def _with_descendants(roots: Iterable[tree.Process]) -> dict[int, tree.Process]:
    found: dict[int, tree.Process] = {}
    for root in roots:
        if root.pid not in found:
            found[root.pid] = root
            found |= {process.pid: process for process in tree.descendants(root.pid)}
    return {pid: process for pid, process in found.items() if process.state != "Z"}


def _read(owner: str) -> Iterator[RayProcess]:
    for process in tree.marked(owner):
        folder = Path("/proc") / str(process.pid)
        try:
            argv = (folder / "cmdline").read_bytes().split(b"\0")[:-1]
            environ = (folder / "environ").read_bytes().split(b"\0")
        except OSError:
            continue
        start = next((e for e in environ if e.startswith(f"{START_ENV}=".encode())), b"")
        yield RayProcess(
            process,
            tuple(arg.decode(errors="replace") for arg in argv),
            start.partition(b"=")[2].decode(errors="replace"),
        )
