"""The environment of an engine process: what it inherits, what it must not, what is added.

An engine runs below a Ray worker process, whose environment is Ray's business and not the
engine's. Pure. Called by: workers.process.
"""

from __future__ import annotations

import site
import sys
from collections.abc import Mapping
from pathlib import Path

import cluster
from cluster.engines.base import Launch
from cluster.settings import OWNER_ENV
from cluster.transfers import RELEASE_SOCKET_ENV, SOCKET_ENV

# Ray sets this to the actor's num_cpus, often 1: it would bind a whole engine to one thread.
_DROPPED = frozenset({"OMP_NUM_THREADS"})
# Job, session and worker ids of the actor: an engine that uses Ray itself would join as it.
_DROPPED_PREFIXES = ("RAY_", "PDCLUSTER_")


def engine_environment(
    inherited: Mapping[str, str],
    launch: Launch,
    owner: str,
    transfer_socket: Path,
    release_socket: Path,
    source_root: str | None,
) -> dict[str, str]:
    """`inherited` less Ray's, then the adapter's words, then ours. Holds secrets: never print.

    `source_root`: the folder that holds the `cluster` package, put on PYTHONPATH; None if the
    interpreter finds it by itself.
    """
    kept = {
        name: value
        for name, value in inherited.items()
        if name not in _DROPPED and not name.startswith(_DROPPED_PREFIXES)
    }
    environment = {**kept, **launch.env, **launch.secret_env}
    environment[OWNER_ENV] = owner
    environment[SOCKET_ENV] = str(transfer_socket)
    environment[RELEASE_SOCKET_ENV] = str(release_socket)
    if source_root is not None:
        path = environment.get("PYTHONPATH")
        environment["PYTHONPATH"] = f"{source_root}:{path}" if path else source_root
    return environment


def package_root() -> str | None:
    """Where this `cluster` package lies, or None if that is a site-packages folder: another
    interpreter must not get all of our packages through PYTHONPATH."""
    root = Path(cluster.__file__).resolve().parent.parent
    packages = {Path(folder).resolve() for folder in site.getsitepackages()}
    in_packages = root in packages or root.is_relative_to(Path(sys.prefix).resolve())
    return None if in_packages else str(root)
