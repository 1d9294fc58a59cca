"""Wait, with an end, until the parts of a cluster that `up` has started are ready."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from cluster.control.state import ClusterStatus
from cluster.errors import StartFailed
from cluster.identity import WorkerState
from cluster.launcher import keys
from cluster.launcher.endpoint import Endpoint
from cluster.launcher.progress import Watcher
from cluster.launcher.running import Running
from cluster.topology.schema import ServingSpec

if TYPE_CHECKING:
    from cluster.control.actor import ControllerClient

_POLL_S = 0.25
_READY_BOUND_S = 60.0
_LISTEN_BOUND_S = 20.0
# On one machine nothing will come that a worker could still wait for.
_LOCAL_PLACEMENT_BOUND_S = 60.0


def await_control(client: ControllerClient) -> None:
    """Raises: StartFailed: the control API cannot listen."""
    deadline_s = time.monotonic() + _LISTEN_BOUND_S
    while why := client.api_problem():
        if time.monotonic() > deadline_s:
            raise StartFailed("control API", why)
        time.sleep(0.05)


def await_workers(
    client: ControllerClient,
    serving: ServingSpec,
    is_local: bool,
    watcher: Watcher,
    failed_before: frozenset[str] = frozenset(),
) -> None:
    """Until every pool has its replicas. `failed_before`: workers whose earlier failure is known.

    Raises: StartFailed: a worker failed, or cannot be placed."""
    longest_s = max(pool.start_timeout_s for pool in serving.pools)
    place_until_s = time.monotonic() + (_LOCAL_PLACEMENT_BOUND_S if is_local else longest_s)
    while True:
        status = client.status()
        for report in status.workers:
            watcher.worker(report)
        for failed in status.failed:
            if failed.worker not in failed_before:
                raise StartFailed(failed.worker, failed.why, failed.last_words)
        if all(pool.ready >= pool.desired for pool in status.pools):
            return
        if time.monotonic() > place_until_s:
            _refuse_unplaced(status)
        time.sleep(_POLL_S)


def await_endpoint(state: Running, is_for_requests: bool) -> None:
    """Until a request would find workers; `is_for_requests` False: until a gateway answers.

    Raises: StartFailed."""
    endpoint = Endpoint(state.endpoint, keys.first_key(state.key_file, state.key_env))
    deadline_s = time.monotonic() + _READY_BOUND_S
    while why := endpoint.why_not_ready() if is_for_requests else endpoint.why_silent():
        if time.monotonic() > deadline_s:
            raise StartFailed("gateway", f"not ready after {_READY_BOUND_S:g} s: {why}")
        time.sleep(0.05)


def _refuse_unplaced(status: ClusterStatus) -> None:
    for report in status.workers:
        if report.state is WorkerState.STARTING and not report.node_ip:
            why = f"it is not placed: {report.message or 'Ray says nothing of why'}"
            raise StartFailed(report.id.name, why)
