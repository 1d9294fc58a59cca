"""On the head: what a changed file means for the nodes that run, and Ray's monitor.

    take_in        the file that `ray up` has put here ─ nodes that cannot stay drain and are ended
                   ─ our own copy of the file is replaced, which is the one the monitor reads
    ensure_monitor the autoscaler's process, anew if the copy has changed

The monitor reads its file once a second, yet keeps the start commands and node types that it began
with, and ends any node of a type with too many. So it reads a copy that changes only while it does
not run, after the right nodes have gone. Every step may be done twice: whoever dies in the middle
leaves the rest to the next `ray up`. Called by: nodes.start.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

from cluster.errors import ClusterError
from cluster.nodes import farewell, ssh
from cluster.nodes.assignment import change, start_digests
from cluster.nodes.config import INJECTED, Hosts
from cluster.nodes.marks import RayProcess, named, ray_processes
from cluster.nodes.on_head import end_hosts
from cluster.nodes.ssh import Runner
from cluster.nodes.state import Store
from cluster.settings import ClusterPaths
from cluster.workers import tree

_GONE_BOUND_S = 10.0


def installed_config(cluster: str) -> Path:
    """The copy of the file that the monitor reads."""
    return ClusterPaths(cluster).state / "autoscaling.json"


def take_in(cluster: str, given: Path, *, is_new_head: bool, runner: Runner = ssh.run) -> bool:
    """Make the given file the one that holds. `is_new_head`: Ray is about to start anew here.
    Returns whether anything was different.

    Raises: ClusterError: the file is not one that `ray up` has written."""
    config = _read(given)
    text = json.dumps(config, sort_keys=True)
    if not is_new_head and _text(installed_config(cluster)) == text:
        return False
    _end_monitors(cluster)
    hosts = Hosts.model_validate(config["provider"][INJECTED])
    starts = start_digests(config)
    store = Store.of(cluster)
    leaving = change(store.read(), hosts, starts, is_new_head=is_new_head)
    for node in leaving:
        print(f"{node.host} leaves: it {node.why}")
    if not is_new_head:
        before = json.loads(_text(installed_config(cluster)) or "{}")
        for host, why in farewell.drain(cluster, [node.host for node in leaving], before).items():
            print(f"{host} leaves without a drain: {why}")
    silent = end_hosts([hosts.host(node.host) for node in leaving], cluster, runner)
    for host, why in silent.items():
        print(f"{host} could not be ended, and something may still run there: {why}")
    gone = tuple(node.node_id for node in leaving)
    store.update(lambda state: state.without(gone).model_copy(update={"starts": starts}))
    _install(installed_config(cluster), text)
    return True


def ensure_monitor(cluster: str, found: list[RayProcess], is_changed: bool) -> None:
    """Let the monitor run, with the file as it is now. `found`: Ray's processes on this host."""
    running = named(ray_processes(cluster), "monitor")
    if running and not is_changed:
        return
    _end_monitors(cluster)
    raylet = named(found, "raylet")[0]
    gcs_address, log_dir = raylet.flag("gcs-address"), raylet.flag("log-dir")
    from ray._private import services

    # As Ray's own head does at its start; there is no public way to start it again.
    services.start_monitor(
        gcs_address,
        log_dir,
        stdout_filepath=os.path.join(log_dir, "monitor.out"),
        stderr_filepath=os.path.join(log_dir, "monitor.err"),
        autoscaling_config=str(installed_config(cluster)),
        monitor_ip=gcs_address.rpartition(":")[0],
        autoscaler_v2=True,
    )
    print("Ray's autoscaler goes on with the file as it is now")


def report_silent(cluster: str, runner: Runner = ssh.run) -> None:
    """Name every host of the file that does not answer, with the reason; note it down."""
    config = _read(installed_config(cluster))
    hosts = Hosts.model_validate(config["provider"][INJECTED])
    asked = [hosts.host(host) for host in hosts.workers]
    why = ssh.each(asked, lambda host: ssh.why_unreachable(host, runner))
    silent = {host: reason for host, reason in why.items() if reason}
    for host, reason in silent.items():
        print(f"host {host} does not answer: {reason}; it joins when it does")
    Store.of(cluster).update(lambda state: state.heard(silent, set(why) - set(silent)))


def _end_monitors(cluster: str) -> None:
    deadline_s = time.monotonic() + _GONE_BOUND_S
    while left := named(ray_processes(cluster), "monitor"):
        for monitor in left:
            tree.send(monitor.process, signal.SIGKILL)
        if time.monotonic() > deadline_s:
            raise ClusterError(f"Ray's monitor (pid {left[0].process.pid}) does not end")
        time.sleep(0.02)


def _read(path: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        Hosts.model_validate(config["provider"][INJECTED])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ClusterError(
            f"{path}: is not what `ray up` writes with cluster.nodes.BareHostProvider ({error}); "
            "run `ray up` again"
        ) from error
    return config


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError:
        return ""


def _install(path: Path, text: str) -> None:
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".new")
    draft.write_text(text, encoding="utf-8")
    os.replace(draft, path)
