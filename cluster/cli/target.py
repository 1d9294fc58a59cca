"""Which cluster a command is about: a topology file, a name, or the only one that runs.

Commands that have an argument of their own take the file by `--topology`.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from cluster.launcher.target import Target

File = Annotated[Path, typer.Argument(help="Topology file.", show_default=False)]
MaybeFile = Annotated[
    Path | None,
    typer.Argument(help="Topology file of the cluster. Default: the one that runs."),
]
TopologyFile = Annotated[
    Path | None,
    typer.Option("--topology", help="Topology file of the cluster. Default: the one that runs."),
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


def target(file: Path | None, cluster: str | None) -> Target:
    """Raises: NotRunning, ClusterError: several run; TopologyError; typer.BadParameter."""
    if file is not None and cluster is not None:
        raise typer.BadParameter("give a topology file or --cluster, not both")
    from cluster.launcher.target import resolve

    return resolve(file, cluster)
