"""The environment of an engine process: what it inherits, what it must not, what is added.

An engine runs below a Ray worker process, whose environment is Ray's business and not the
engine's. An engine with an interpreter of its own still loads our connectors (`link_package`).
Called by: workers.worker.
"""

from __future__ import annotations

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
    package_folder: Path,
) -> dict[str, str]:
    """`inherited` less Ray's, then the adapter's words, then ours. Holds secrets: never print.

    `package_folder`: put first on PYTHONPATH, as `link_package` makes it. Pure.
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
    path = environment.get("PYTHONPATH")
    environment["PYTHONPATH"] = f"{package_folder}:{path}" if path else str(package_folder)
    return environment


def link_package(runtime_dir: Path) -> Path:
    """Make a folder in `runtime_dir` in which there is this `cluster` package and nothing else.

    Where the package itself lies, a checkout or site-packages, is no folder for another
    interpreter's path: it would get our versions of everything. Raises: OSError."""
    folder = runtime_dir / "python"
    folder.mkdir()
    (folder / "cluster").symlink_to(Path(cluster.__file__).resolve().parent)
    return folder
