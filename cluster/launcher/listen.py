"""Whether the endpoint and the control API can listen where the topology says, before anything is
started. Called by: launcher.up.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Iterator
from pathlib import Path

import psutil

from cluster.errors import Fault, TopologyError
from cluster.topology import source
from cluster.topology.schema import Topology


def check(topology: Topology, path: Path) -> None:
    """Raises: TopologyError: a port is taken, or the address is not this machine's."""
    serving = topology.serving
    places = {
        "gateway": (serving.gateway.host, serving.gateway.port),
        "control": (serving.control.host, serving.control.port),
    }
    faults = [*_same_port(places, path)]
    if not faults:
        for section, (host, port) in places.items():
            faults += _taken(section, host, port, path)
    if faults:
        raise TopologyError(tuple(faults))


def _same_port(places: dict[str, tuple[str, int]], path: Path) -> Iterator[Fault]:
    if places["gateway"][1] == places["control"][1]:
        found = f"{places['control'][1]} is the endpoint's, too (gateway.port)"
        yield _fault("control", found, "write another port", path)


def _taken(section: str, host: str, port: int, path: Path) -> Iterator[Fault]:
    try:
        family, kind, proto, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with contextlib.closing(socket.socket(family, kind, proto)) as probe:
            # As the servers themselves: connections that linger after a `down` are no obstacle.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        why = (error.strerror or str(error)).lower()
        found = f"{host}:{port} cannot be listened on ({why}{_holder(port)})"
        yield _fault(section, found, "end what listens there, or write another port", path)


def _fault(section: str, found: str, fix: str, path: Path) -> Fault:
    key = ("metadata", "serving", section, "port")
    return Fault(str(path), source.read(path).line(key), ".".join(key), found, fix)


def _holder(port: int) -> str:
    with contextlib.suppress(psutil.Error):
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr[1:2] == (port,):
                if connection.pid is None:
                    return ", held by another user's process"
                with contextlib.suppress(psutil.Error):
                    name = psutil.Process(connection.pid).name()
                    return f", held by {name}, pid {connection.pid}"
    return ""
