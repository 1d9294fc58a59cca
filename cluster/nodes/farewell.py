"""Before hosts leave a rack: their workers finish what they have, and others start elsewhere.

On the head, where the controller is. Without one, or with one that does not answer, hosts leave all
the same: their requests then go on elsewhere as after any loss. Called by: nodes.head.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from typing import Any

from cluster.control.changes import Change, ChangeState, DrainNode
from cluster.control.client import Access, ControlClient
from cluster.errors import ClusterError
from cluster.settings import ClusterPaths
from cluster.topology.schema import ControlSpec

GRACE_S = 60.0
# What it takes beyond the grace: blocks that are still pulled, and the engine's own end.
_BOUND_S = GRACE_S + 60.0
_POLL_S = 0.5
_LOOPBACK = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def drain(cluster: str, hosts: Sequence[str], config: dict[str, Any]) -> dict[str, str]:
    """Drain those of `hosts` (addresses) that have workers. `config`: the file by which the cluster
    runs. Why one was not drained, per host."""
    serving = (config.get("metadata") or {}).get("serving")
    if not hosts or serving is None:
        return {}
    try:
        spec = ControlSpec.model_validate(serving.get("control") or {})
        client = ControlClient(_access(cluster, spec))
        in_use = {worker.node_ip for worker in client.status().workers}
    except (KeyError, OSError, ValueError) as error:
        return dict.fromkeys(hosts, f"the control API is not known here ({error})")
    except ClusterError as error:
        return dict.fromkeys(hosts, str(error))
    problems: dict[str, str] = {}
    asked: dict[str, Change] = {}
    for host in in_use & set(hosts):
        try:
            # It leaves whatever that costs: the file says so.
            leaving = DrainNode(host, GRACE_S, may_end_service=True)
            asked[host] = client.ask(leaving, "the host leaves the file")
        except ClusterError as error:
            problems[host] = str(error)
    until_s = time.monotonic() + _BOUND_S
    for host, change in asked.items():
        problem = _wait(client, change, until_s)
        if problem:
            problems[host] = problem
    return problems


def _wait(client: ControlClient, change: Change, until_s: float) -> str:
    while change.state is ChangeState.RUNNING:
        if time.monotonic() > until_s:
            return f"not over after {_BOUND_S:g} s: {change.waits_for}"
        time.sleep(_POLL_S)
        try:
            change = client.change(change.id)
        except ClusterError as error:
            return str(error)
    return "" if change.state is ChangeState.DONE else change.why


def _access(cluster: str, control: ControlSpec) -> Access:
    """Raises: OSError: the token cannot be read; KeyError: its variable is not set."""
    if control.token_env is not None:
        token = os.environ[control.token_env]
    else:
        file = control.token_file or ClusterPaths(cluster).state / "control-token"
        token = file.expanduser().read_text(encoding="utf-8").strip()
    host = _LOOPBACK.get(control.host, control.host)
    address = f"[{host}]" if ":" in host else host
    return Access(f"http://{address}:{control.port}", token)
