"""Ray on this machine: start a head that only this machine can reach, connect, end it.

Measured on 2 cores (Ray 2.60): the head is up after 4-8 s, takes 283 MiB (GCS, raylet, API server,
client server, the `ray start` that waits), and with the settings below 0.9 % of a core when idle
(1.4 % without them).
"""

from __future__ import annotations

import contextlib
import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from random import Random
from typing import Any

from cluster.engines.base import PortNeed
from cluster.errors import ClusterError, StartFailed
from cluster.launcher import joined_ray, keys, supervised
from cluster.launcher.running import OwnRay, Running, short_runtime
from cluster.settings import ClusterPaths, ray_namespace
from cluster.topology.schema import ServingSpec, Topology
from cluster.workers.logs import last_words
from cluster.workers.ports import reserve

LOOPBACK = "127.0.0.1"
# Ray's smallest is 75 MiB. Nothing of ours puts an object there: answers below 100 KiB travel
# inside the messages.
_OBJECT_STORE_BYTES = 80 * 2**20
_START_BOUND_S = 60.0

# For whoever connects as well as for the head.
_CLIENT_ENV = {
    # Ray replaces 127.0.0.1 by the machine's outward address, and then every server of it listens
    # on all interfaces. Only with its multi-node support off does it keep loopback.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Whoever reaches Ray's ports can run code as this user, and loopback is open to all users.
    "RAY_AUTH_MODE": "token",
    "RAY_USAGE_STATS_ENABLED": "0",
}
_HEAD_ENV = {
    # `down` has ended all actors before; a head that must go at once must not wait for them.
    "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "0",
    # Engines are not children that Ray could measure; it would kill the wrong process.
    "RAY_memory_monitor_refresh_ms": "0",
    # Timers that cost CPU all day for a view of resources that changes when a worker starts.
    "RAY_raylet_report_resources_period_milliseconds": "1000",
    "RAY_raylet_report_loads_period_milliseconds": "1000",
    "RAY_gcs_pull_resource_loads_period_milliseconds": "2000",
    "RAY_task_events_report_interval_ms": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_metrics_report_interval_ms": "60000",
    "RAY_event_stats": "0",
    "RAY_enable_timeline": "0",
}


def is_local(topology: Topology) -> bool:
    """Whether the file describes this machine alone, reached over loopback."""
    provider = topology.ray.get("provider") or {}
    head = str(provider.get("head_ip", ""))
    is_loopback = head == "localhost" or head.startswith("127.") or head == "::1"
    return provider.get("type") == "local" and is_loopback and not provider.get("worker_ips")


def prepare_environment(paths: ClusterPaths) -> None:
    """Make this process fit to talk to a local head. Must come before Ray's first import, which
    reads some of it for good.

    Raises: RuntimeError: Ray is imported already and would look for the head at the outward
        address, for minutes."""
    wanted = {**_CLIENT_ENV, "RAY_AUTH_TOKEN_PATH": str(_token_file(paths))}
    is_set = all(os.environ.get(name) == value for name, value in wanted.items())
    if "ray" in sys.modules and not is_set:
        raise RuntimeError("Ray was imported before its environment was set: import it later")
    os.environ.update(wanted)


def owner(cluster: str) -> str:
    """The mark of the head and of all that Ray starts there."""
    return f"{cluster}/ray"


def start_head(paths: ClusterPaths, serving: ServingSpec, extra_env: Mapping[str, str]) -> Head:
    """Start a Ray head below a supervisor that outlives this process. Returns at once."""
    keys.kept_secret(_token_file(paths))
    folder = short_runtime(paths)
    _make_private(folder)
    log = paths.logs / "ray.log"
    lease = reserve([PortNeed("gcs"), PortNeed("client")], LOOPBACK, Random())
    with lease:
        process = supervised.launch(
            _head_command(folder, lease.ports, _cpus(serving)),
            log,
            _environment(paths, extra_env),
            owner(paths.cluster),
            folder,
        )
        own = OwnRay(
            **supervised.known_by(process),
            folder=str(folder),
            token_file=str(_token_file(paths)),
        )
        return Head(f"{LOOPBACK}:{lease.ports['gcs']}", own, process, log)


class Head:
    """A Ray head that is starting."""

    def __init__(
        self, address: str, own: OwnRay, process: subprocess.Popen[bytes], log: Path
    ) -> None:
        self.address = address
        self.own = own
        self._process = process
        self._log = log

    def wait_until_up(self) -> None:
        """Raises: StartFailed, with the end of Ray's own log."""
        deadline_s = time.monotonic() + _START_BOUND_S
        while not joined_ray.answers(self.address):
            if self._process.poll() is not None:
                why = f"`ray start` ended with exit code {self._process.returncode}"
                raise StartFailed("Ray", why, last_words(self._log))
            if time.monotonic() > deadline_s:
                raise StartFailed(
                    "Ray", f"not up after {_START_BOUND_S:g} s", last_words(self._log)
                )
            time.sleep(0.05)


@contextlib.contextmanager
def connected(running: Running) -> Iterator[Any]:
    """Connect this process to the cluster's Ray; disconnect at the end. Yields Ray's context.

    Raises: ClusterError: nothing answers there."""
    if running.own_ray is not None:
        prepare_environment(ClusterPaths(running.cluster))
    else:
        joined_ray.prepare_environment(running.ray_address)
    # `ray.init` would try for minutes. "auto" has no port to look at.
    if ":" in running.ray_address and not joined_ray.answers(running.ray_address):
        raise ClusterError(
            f"Ray of cluster {running.cluster} does not answer at {running.ray_address}; "
            f"clean up with: pdcluster down --cluster {running.cluster}"
        )
    import ray

    try:
        context = ray.init(
            address=running.ray_address,
            namespace=ray_namespace(running.cluster),
            log_to_driver=False,
            logging_level="error",
        )
    except (ConnectionError, RuntimeError, ray.exceptions.RayError) as error:
        raise ClusterError(
            f"cannot connect to Ray at {running.ray_address}: {str(error).partition(chr(10))[0]}"
        ) from error
    try:
        yield context
    finally:
        ray.shutdown()


def end_head(own: OwnRay, cluster: str) -> None:
    """End the Ray head and everything below it. Blocks until it is gone. Idempotent."""
    supervised.end(own, owner(cluster), 2 * supervised.END_GRACE_S + 5)


def _head_command(folder: Path, ports: Mapping[str, int], cpus: int) -> tuple[str, ...]:
    return (
        sys.executable,
        "-m",
        "ray.scripts.scripts",
        "start",
        "--head",
        "--block",
        f"--node-ip-address={LOOPBACK}",
        f"--port={ports['gcs']}",
        f"--ray-client-server-port={ports['client']}",
        f"--temp-dir={folder}",
        f"--num-cpus={cpus}",
        f"--object-store-memory={_OBJECT_STORE_BYTES}",
        "--include-dashboard=false",
        "--include-log-monitor=false",
        "--disable-usage-stats",
        # One machine has nothing to scale; the autoscaler's monitor is a process of 50 MiB.
        "--no-monitor",
    )


def _environment(paths: ClusterPaths, extra: Mapping[str, str]) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    return {
        **kept,
        **_CLIENT_ENV,
        **_HEAD_ENV,
        **extra,
        "RAY_AUTH_TOKEN_PATH": str(_token_file(paths)),
    }


def _cpus(serving: ServingSpec) -> int:
    """Ray's CPUs are tickets. A laptop's engines share its cores: there are enough for all."""
    asked = sum(
        pool.placement.resources.get("CPU", 0.0) * pool.replicas.initial for pool in serving.pools
    )
    return max(os.cpu_count() or 1, math.ceil(asked))


def _token_file(paths: ClusterPaths) -> Path:
    return paths.state / "ray-token"


def _make_private(folder: Path) -> None:
    """Raises: ClusterError: someone else has made it, and could read or replace our sockets."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    for place in (folder.parent, folder):
        status = place.lstat()
        if status.st_uid != os.getuid() or place.is_symlink():
            raise ClusterError(f"{place} belongs to another user; remove it, or set TMPDIR")
        place.chmod(0o700)
