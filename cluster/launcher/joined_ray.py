"""A Ray that others have started, on the head of a rack: find it, speak to it, join it.

Who talks to it must find in its own environment what Ray was started with (whether it asks for a
token, whether it keeps to loopback), and Ray reads that when it is imported. On the head it can be
looked up: in the environment of Ray's own process, as far as this user may see it.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import psutil

from cluster.errors import ClusterError, InvalidInput
from cluster.topology.schema import Topology

_CONNECT_BOUND_S = 5.0
_ASK_BOUND_S = 60.0
_ON_HEAD = {"node:__internal_head__": 0.001}
# What both sides of a connection must have alike (Ray 2.60).
_SHARED = (
    "RAY_AUTH_MODE",
    "RAY_AUTH_TOKEN",
    "RAY_AUTH_TOKEN_PATH",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER",
)


def address_here(topology: Topology, path: Path) -> str:
    """The address of the Ray cluster that this machine is the head of, HOST:PORT.

    Raises: ClusterError: there is none, or it does not answer."""
    noted = _noted_address()
    found = os.environ.get("RAY_ADDRESS") or noted
    if found and answers(found):
        return found
    kind = (topology.ray.get("provider") or {}).get("type")
    why = f"the one noted at {found} does not answer" if found else "no Ray runs here"
    raise ClusterError(
        f"{path} describes nodes beyond this machine (provider.type: {kind}), and {why}; "
        f"run `ray up {path}`: Ray starts the nodes, and on the head, where Ray then runs, "
        f"`pdcluster up {path}` brings the serving up (put `pdcluster up --no-wait "
        "~/ray_bootstrap_config.yaml` behind `ray start` in head_start_ray_commands, or run it "
        f"there with `ray exec {path} 'pdcluster up FILE'`)"
    )


def answers(address: str) -> bool:
    """Whether somebody listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=_CONNECT_BOUND_S).close()
    except (OSError, ValueError):
        return False
    return True


def prepare_environment(address: str) -> None:
    """Take over what Ray at `address` was started with, as far as this process has not been told
    otherwise. To be called before Ray's first import."""
    if address == "auto":
        address = _noted_address() or ""
    port = address.rpartition(":")[2]
    for environ in _environments_of_gcs(port):
        for name in _SHARED:
            if name in environ:
                os.environ.setdefault(name, environ[name])
        return


def refuse_without(wanted: Mapping[str, str]) -> None:
    """Raises: InvalidInput: Ray's processes on the head, which is connected, do not have `wanted`
    in their environment, and Ray Serve would start without HAProxy."""
    import ray

    def environment(names: list[str]) -> dict[str, str | None]:
        return {name: os.environ.get(name) for name in names}

    asked: Any = ray.remote(environment).options(num_cpus=0, resources=_ON_HEAD)
    found = ray.get(asked.remote(list(wanted)), timeout=_ASK_BOUND_S)
    if {name: found[name] for name in wanted} == dict(wanted):
        return
    settings = " ".join(f"{name}={value}" for name, value in wanted.items())
    raise InvalidInput(
        "metadata.serving.gateway.ingress: serve needs settings that this Ray was started without; "
        f"put `{settings}` in front of `ray start` in head_start_ray_commands and "
        "worker_start_ray_commands and restart Ray, or write `ingress: direct`"
    )


def _noted_address() -> str | None:
    """What `ray start --head` has left for others on this machine. Read without Ray, which must not
    be imported yet (ray._private.utils.read_ray_address)."""
    folder = os.environ.get("RAY_TMPDIR") or os.environ.get("TMPDIR") or "/tmp"
    try:
        text = (Path(folder) / "ray/ray_current_cluster").read_text(encoding="utf-8")
    except OSError:
        return None
    return text.strip() or None


def _environments_of_gcs(port: str) -> Iterator[dict[str, str]]:
    for process in psutil.process_iter(["cmdline"]):
        words = process.info["cmdline"] or []
        if not words or Path(words[0]).name != "gcs_server":
            continue
        if any(word.lstrip("-").replace("-", "_") == f"gcs_server_port={port}" for word in words):
            try:
                yield process.environ()
            except psutil.Error:  # another user's
                continue
