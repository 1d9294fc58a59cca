"""Bring a cluster down: ask, then end, then look that nothing is left. Idempotent.

    gateway stops taking requests ─ controller stops workers ─ Prometheus ends ─ Ray's head ends
    ─ sweep ─ state file

Called by: cli, launcher.up when it must undo what it did.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.errors import ClusterError
from cluster.launcher import local_ray, prometheus, remains, running
from cluster.launcher.progress import Watcher
from cluster.launcher.running import Running
from cluster.settings import ClusterPaths
from cluster.workers.tree import Process

# Supervisors whose owner went end their engines by themselves, within this time.
_OWN_END_S = 4.0


@dataclass(frozen=True, slots=True)
class Down:
    """`was_running`: False if there was nothing to do."""

    cluster: str
    was_running: bool


def down(cluster: str, grace_s: float, watcher: Watcher) -> Down:
    """End the cluster; requests in hand get up to `grace_s` seconds to finish.

    Raises: Busy: an `up` or `down` of it is at work. ClusterError: a process would not end.
    Cancel: KeyboardInterrupt leaves the rest for the next `down`."""
    paths = ClusterPaths(cluster)
    if not (running.read(paths) or remains.processes(paths) or remains.folders(paths)):
        return Down(cluster, was_running=False)
    with running.lock(paths):
        end(paths, grace_s, watcher)
    return Down(cluster, was_running=True)


def end(paths: ClusterPaths, grace_s: float, watcher: Watcher, *, is_hasty: bool = False) -> None:
    """As `down`, by whoever holds the lock. `is_hasty`: nobody is served yet, so a Ray of our own
    is ended without asking; its workers' supervisors see to their engines."""
    state = running.read(paths)
    is_asked = state is not None and bool(state.ray_address) and state.is_alive()
    if state is not None and is_asked and not (is_hasty and state.own_ray is not None):
        try:
            _ask(state, grace_s, watcher)
        except ClusterError as error:
            # On a Ray of others nothing more can be ended from here; our notes of it go.
            watcher.warn(f"{error}; ending what is on this machine without asking")
    if state is not None and state.own_prometheus is not None:
        prometheus.end(state.own_prometheus, paths)
    if state is not None and state.own_ray is not None:
        watcher.stage("Ray")
        local_ray.end_head(state.own_ray, paths.cluster)
    left = remains.sweep(paths, _OWN_END_S)
    if left:
        raise ClusterError(f"not ended: {_named(left)}; the kernel holds them, try again later")
    prometheus.remove_files(paths)
    paths.running.unlink(missing_ok=True)


def _ask(state: Running, grace_s: float, watcher: Watcher) -> None:
    with local_ray.connected(state):
        # These import Ray, whose environment is ready only now.
        from cluster.control import actor as controller
        from cluster.gateway import hosting

        watcher.stage("gateway")
        hosting.stop(state.cluster, state.ingress, grace_s)
        client = controller.find(state.cluster)
        if client is not None:
            watcher.stage("workers")
            client.shutdown(grace_s)
            controller.end(state.cluster)


def _named(processes: Sequence[Process]) -> str:
    return ", ".join(f"pid {process.pid} (state {process.state})" for process in processes)
