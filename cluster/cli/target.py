"""Which cluster a command is about: a topology file, a name, or the only one that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cluster.errors import ClusterError
from cluster.launcher import running
from cluster.launcher.running import Running

if TYPE_CHECKING:
    from cluster.control.actor import ControllerClient

File = Annotated[Path, typer.Argument(help="Topology file.", show_default=False)]
MaybeFile = Annotated[
    Path | None,
    typer.Argument(help="Topology file of the cluster. Default: the one that runs."),
]
Cluster = Annotated[
    str | None, typer.Option("--cluster", "-c", help="Name of the cluster, instead of FILE.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def cluster_name(file: Path | None, cluster: str | None) -> str | None:
    """Raises: TopologyError; typer.BadParameter: both are given."""
    if file is None:
        return cluster
    if cluster is not None:
        raise typer.BadParameter("give FILE or --cluster, not both")
    from cluster.topology import loader

    return loader.load(file).cluster_name


def running_cluster(file: Path | None, cluster: str | None) -> Running:
    """Raises: NotRunning, ClusterError: several run; TopologyError."""
    return running.choose(cluster_name(file, cluster))


def controller_of(at: Running) -> ControllerClient:
    """The cluster's controller; Ray must be connected. Raises: ClusterError: there is none."""
    from cluster.control import actor as controller

    client = controller.find(at.cluster)
    if client is None:
        raise ClusterError(
            f"cluster {at.cluster} has no controller; it is not up yet, or its Ray was ended"
        )
    return client
